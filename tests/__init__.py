"""Tests, in folders named after the packages that they are of. What they share stands beside the folders."""

from pathlib import Path


ROOT = Path(__file__).parent.parent
