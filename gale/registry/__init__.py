"""Finding models by name."""
