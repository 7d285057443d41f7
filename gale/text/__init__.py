"""Text to tokens and back: tokenizer, chat template with its loss mask, streaming detokeniser."""
