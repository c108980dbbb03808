"""Tests of `sq_llava/cli/`."""
