"""Scores a model on benchmarks: one module for each task, and what they share."""
