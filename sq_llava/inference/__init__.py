"""Inference: the model answers, asks, and talks to itself. A common prefix of several prompts is computed once."""
