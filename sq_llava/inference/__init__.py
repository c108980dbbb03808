"""Inference: the model answers, asks, and talks to itself. What prompts share is computed once."""
