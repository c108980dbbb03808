"""Tests of `sq_llava/serving/`."""
