"""Measuring models: metrics and reports."""
