"""Fixtures for all tests. The functions behind them are in `tests/tiny.py`. No test needs a network.

Libraries are imported late, because the process that distributes the tests to workers needs none of them.
"""

import multiprocessing
import os
from collections import Counter
from importlib import import_module


# Set before transformers is imported: a test that tries to use the network then fails.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# The processes that tests start inherit this: with another number of threads, sums differ in their last bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.browsers import CHROMIUM
from tests.chat_server import KEY
from tests.warm_python import warm_python


def pytest_collection_modifyitems(items):
    """Runs files with slow tests first. Each file runs on one worker, and none should start a long file at the end."""
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -num_slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def warm_processes():
    multiprocessing.set_executable(warm_python())


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    # The models are so small that a second thread costs more time than it saves.
    import_module("torch").set_num_threads(1)


@pytest.fixture(params=["parquet", "folder"])
def layout(request):
    """The layout of a benchmark's data: as on the Hub, or as in LLaVA's folders."""
    return request.param


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def api_key(monkeypatch):
    """Sets the API key that a client of `chat_server` needs, and removes any server from the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def byte_level_tokenizer():
    return import_module("tests.tiny").byte_level_tokenizer()


@pytest.fixture
def llama_tokenizer():
    return import_module("tests.tiny").llama_tokenizer()


@pytest.fixture(params=["byte_level", "byte_level_trimmed", "llama", "llama_legacy"])
def any_tokenizer(request):
    """Runs the test with each kind of tokenizer."""
    return import_module("tests.tiny").TOKENIZERS[request.param]()


@pytest.fixture
def tiny_config():
    return import_module("tests.tiny").tiny_config()


@pytest.fixture
def tiny_model():
    return import_module("tests.tiny").tiny_model()


@pytest.fixture
def tiny_processor():
    return import_module("tests.tiny").tiny_processor()


@pytest.fixture
def image():
    return import_module("tests.tiny").picture()


@pytest.fixture(scope="module")
def assistant():
    return import_module("tests.assistants").tiny_assistant()
