"""Checkpoints: made from parts, loaded, merged, converted, verified, inspected, published."""
