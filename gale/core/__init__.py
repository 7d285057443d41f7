"""Settings, errors, logging, seeds, device choice, progress and atomic files: what every room stands on."""
