"""The decoder and its checkpoints in Hugging Face layout."""
