"""Tests of `sq_llava/training/`."""
