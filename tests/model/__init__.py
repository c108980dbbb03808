"""Tests of the four files that are saved with each checkpoint."""
