"""A SIGKILL at any moment leaves the complete output under its final name, or nothing."""

import json

import pytest

from tests.kills import NUM_KILLS, WRITERS, kill_at_random_moments
from tests.processes import ended, fork


@pytest.mark.long
@pytest.mark.parametrize("name", WRITERS)
def test_command_killed_at_random_moments_leaves_all_or_nothing(name, tmp_path):
    log = tmp_path / "log"
    assert ended(fork(kill_at_random_moments, (name, tmp_path), log)) == [0], log.read_text()[-3000:]
    assert json.loads(log.read_text().splitlines()[-1])["killed"] > NUM_KILLS / 2
