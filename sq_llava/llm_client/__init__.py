"""Any OpenAI-compatible chat server: asked in threads, within caps, never paid twice."""
