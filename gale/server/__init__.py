"""HTTP: the OpenAI-compatible API and the chat page's own."""
