"""A model that answers, asks and talks to itself; what prompts share is computed once."""
