"""Tests of `sq_llava/doctor/`."""
