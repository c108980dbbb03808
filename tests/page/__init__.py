"""Tests of `sq_llava/page/`."""
