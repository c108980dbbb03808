"""Runs the chat page as a Hub Space, or on your own machine.

    MODEL=runs/demo/model python app.py

To publish it as a Space, set the Space's variable MODEL to a folder in the Space or to a Hub id, and upload:

    mkdir -p runs/space
    cp -r app.py sq_llava *_sq_llava.py model_card.md space/* runs/space
    hf upload org/space runs/space --repo-type space --exclude "**/__pycache__/*"

This file has no options. `sq-llava demo` starts the same page with options.
"""

import os

from sq_llava import load
from sq_llava.page.layout import create_page, launch_settings


if __name__ == "__main__":
    page = create_page(load(os.environ.get("MODEL", "runs/demo/model")))
    # A Space sets this variable to 0.0.0.0.
    page.launch(**launch_settings(os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")))
