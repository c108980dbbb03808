"""The page as a Hub Space runs it, and as it runs anywhere.

    MODEL=runs/demo/model python app.py

A Space needs this file, `sq_llava/`, the three files of the Hub trio, `requirements.txt` and the README of `space/`;
its variable MODEL names the checkpoint. What this file does not do: take options; `sq-llava demo` does.
"""

import os

from sq_llava.inference import load
from sq_llava.page.layout import LAUNCH, create_page


if __name__ == "__main__":
    create_page(load(os.environ.get("MODEL", "runs/demo/model"))).launch(**LAUNCH)
