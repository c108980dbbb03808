"""Runs the chat page as a Hub Space, or on your own machine.

    MODEL=runs/demo/model python space/app.py

`sq-llava push FOLDER org/name --space` publishes a model and such a Space for it (`sq_llava/checkpoints/space.py`).

This file has no options. `sq-llava demo` starts the same page with options.
"""

import os

from sq_llava import load
from sq_llava.page.layout import create_page, launch_settings


if __name__ == "__main__":
    page = create_page(load(os.environ.get("MODEL", "runs/demo/model")))
    # A Space sets this variable to 0.0.0.0.
    page.launch(**launch_settings(os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")))
