"""Every command of `sq-llava`. Nothing imports it."""
