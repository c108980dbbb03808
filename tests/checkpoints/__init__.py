"""Tests of `sq_llava/checkpoints/`."""
