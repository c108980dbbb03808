"""Tests of `sq_llava/generation/`."""
