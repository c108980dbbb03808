"""A page in the browser: a person drops a picture, chats about it, and lets the model ask."""
