"""The browser that the tests of web pages use."""

from pathlib import Path


CHROMIUM = Path("/usr/bin/chromium")
