"""The page as a Hub Space runs it, and as it runs anywhere.

    MODEL=runs/demo/model python app.py

As a Space, whose variable MODEL names the checkpoint (its own folder `model`, or an id on the Hub):

    mkdir -p runs/space
    cp -r app.py sq_llava *_sq_llava.py model_card.md space/* runs/space
    hf upload org/space runs/space --repo-type space --exclude "**/__pycache__/*"

What this file does not do: take options; `sq-llava demo` does.
"""

import os

from sq_llava import load
from sq_llava.page.layout import LAUNCH, create_page


if __name__ == "__main__":
    create_page(load(os.environ.get("MODEL", "runs/demo/model"))).launch(**LAUNCH)
