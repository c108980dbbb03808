"""Checkpoints: compose, load, merge, convert, verify, inspect and publish them."""
