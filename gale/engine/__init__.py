"""Text generation: requests in, tokens out, many at once."""
