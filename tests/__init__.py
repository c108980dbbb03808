"""The tests, in one folder for each package. The modules beside the folders are shared by all tests."""

from pathlib import Path


ROOT = Path(__file__).parent.parent
