"""Gale: your text to a model, the model to a service, the service to people, and their feedback back to the model."""

__version__ = "0.1.0"
