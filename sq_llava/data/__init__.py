"""Training data: files of several formats -> checked rows; images, messages, lengths, self-questions, packing."""
