"""Files of several formats -> checked rows: layouts, images, messages, lengths, turns that ask, packing."""
