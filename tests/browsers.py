"""The browser that tests of pages drive: Debian's."""

from pathlib import Path


CHROMIUM = Path("/usr/bin/chromium")
