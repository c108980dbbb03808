"""Tests of `sq_llava/resumable/`."""
