"""Makes instruction data: a module for each command (llava, captions, curate, self), and shared modules."""
