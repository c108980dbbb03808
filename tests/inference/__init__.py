"""Tests of `sq_llava/inference/`."""
