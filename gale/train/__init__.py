"""Optimisers, the one training loop, exact resume, and one file a stage."""
