"""Scores models on benchmarks: one module per task, and the code that all tasks share."""
