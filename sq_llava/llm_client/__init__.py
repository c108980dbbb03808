"""A client for any OpenAI-compatible chat server: many requests at a time, within caps, each answer paid for once."""
