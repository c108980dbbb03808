"""Checkpoints: compose from parts, load, merge, convert, verify, inspect and publish them."""
