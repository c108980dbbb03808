"""The web page of `sq-llava demo`: chat about a picture, and let the model ask."""
