"""The files that travel with each checkpoint."""
