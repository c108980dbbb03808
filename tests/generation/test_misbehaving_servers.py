"""Runs with servers that misbehave as real ones do. The documentation has the outcomes as a table."""

import os
from unittest.mock import patch

import pytest

from tests import ROOT
from tests.chat_server import KEY
from tests.generation.misbehaving_servers import CAP, sessions, to_markdown


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes():
    with patch.dict(os.environ, {"OPENAI_API_KEY": KEY}):
        return list(sessions())


def test_no_server_is_paid_more_than_the_cap_or_more_than_was_counted(outcomes):
    for each in outcomes:
        assert each.charged <= each.counted + 1e-9 and each.charged <= CAP, each


def test_run_that_is_repeated_pays_for_nothing_again(outcomes):
    for each in outcomes:
        if not each.server.again and each.exit_codes[0] == 0:
            assert each.num_requests[1] == 0, each


def test_table_in_the_documentation_is_what_the_sessions_gave(outcomes):
    """Write it again with `python -m tests.generation.misbehaving_servers`."""
    assert to_markdown(outcomes) in (ROOT / "docs" / "make-data.md").read_text()
