"""Makes instruction data: a module for each method (llava, captions, curate, self), and shared modules."""
