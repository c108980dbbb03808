"""Tests of `sq_llava/llm_client/`."""
