"""Regular expressions take no time that explodes with the length of a text that somebody else wrote."""

import re
import time
from importlib import import_module

import pytest

from tests import ROOT


MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in ROOT.glob("sq_llava/**/*.py")
    if "re.compile(" in file.read_text()
)
# What a quantifier may match in several ways: each is repeated, before a character that ends the match.
REPEATED = ["a ", "\t ", "# ", ".)", "a'", "<a ", "a/", "1,", "A.", *"a \n-*_.'</1=|"]
SECONDS = 0.5


@pytest.mark.parametrize("module", MODULES)
def test_long_texts_are_searched_at_once(module):
    """With 300 repetitions, quadratic time is milliseconds; cubic time is seconds, and exponential time never ends."""
    for name, pattern in vars(import_module(module)).items():
        if isinstance(pattern, re.Pattern):
            for part in REPEATED:
                began = time.process_time()
                for end in ("", "\0", "!"):
                    text = part * 300 + end
                    text = text.encode() if isinstance(pattern.pattern, bytes) else text
                    pattern.search(text)
                    pattern.fullmatch(text)
                assert time.process_time() - began < SECONDS, f"{module}.{name} on {part!r}"
