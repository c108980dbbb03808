"""Tests of `sq_llava/data/`."""
