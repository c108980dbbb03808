"""Tests of `sq_llava/evaluation/`."""
