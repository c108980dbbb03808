"""The web page of `sq-llava demo`: chat about a picture, and let the model ask."""

import os


# Gradio reads these when it is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
