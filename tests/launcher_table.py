"""Writes the table of launchers and what works with them into docs/training.md, from the outcome of the tests.

python -m pytest tests/training/test_distributed.py tests/training/test_recovery.py --junitxml=/tmp/suite.xml
.venv-deepspeed/bin/python -m pytest tests/deepspeed_checks.py --junitxml=/tmp/deepspeed.xml
python -m tests.launcher_table /tmp/suite.xml /tmp/deepspeed.xml
"""

import sys
from pathlib import Path
from xml.etree import ElementTree

from tests import ROOT


DOCUMENT = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- launchers: written by tests/launcher_table.py -->\n", "<!-- end of launchers -->\n"
COLUMNS = ("DDP", "FSDP2", "FSDP2, sharded files", "HSDP", "ZeRO-2", "ZeRO-3")
EQUAL = "test_two_processes_equal_one_where_one_sees_text_only"
KILLED = "test_killed_sharded_run_resumes_and_leaves_what_one_process_leaves"
KILLED_ZERO = "test_killed_run_resumes_and_leaves_what_one_process_leaves"
AT_RANDOM = "run_killed_at_random_moments_equals_the_uninterrupted_one"
MESH = "test_four_processes_replicate_and_shard_and_two_resume_their_run"
TIED_ZERO = "test_tied_head_is_trained_with_lora_under_zero2_but_not_zero3"
OWN_LAUNCH, OWN_LAUNCH_ZERO = (
    "test_sharded_run_resumes_only_under_its_own_launch",
    "test_run_resumes_only_under_its_own_launch",
)


def with_zero(cases: dict[str, tuple[str, ...]], test: str, *ids: str) -> dict[str, tuple[str, ...]]:
    """Adds the tests of ZeRO-2 and ZeRO-3, whose ids differ only in the name of the launch."""
    zero = {f"ZeRO-{stage}": tuple(f"{test}[zero{stage}-{name}]" for name in ids) for stage in (2, 3)}
    return cases | zero


# What works, and the tests that show it for each launcher. A name after "refused: " is a test of the refusal.
ROWS = {
    "LoRA equals one process": with_zero(
        {
            "DDP": (f"{EQUAL}[ddp]",),
            "FSDP2": (f"{EQUAL}[images first]", f"{EQUAL}[text first, accumulated]"),
            "HSDP": (MESH,),
        },
        EQUAL, "images first", "text first, accumulated", "stage 1",
    ),
    "full fine-tuning equals one process": with_zero(
        {"FSDP2": (f"{EQUAL}[in full]",)}, EQUAL, "images first, in full", "text first, in full", "stage 1, in full"
    ),
    "packing equals one process": with_zero({"FSDP2": (f"{EQUAL}[packed]",)}, EQUAL, "packed"),
    "tied head, LoRA": {
        "FSDP2": ("test_tied_head_is_sharded[adapter]",),
        "ZeRO-2": (TIED_ZERO,),
        "ZeRO-3": (f"refused: {TIED_ZERO}",),
    },
    "tied head, full fine-tuning": with_zero(
        {"FSDP2": ("test_tied_head_is_sharded[in full]",)}, EQUAL, "tied head, in full"
    ),
    "killed and resumed": with_zero(
        {
            "DDP": (f"test_{AT_RANDOM}[2-2]",),
            "FSDP2": (f"{KILLED}[in full]", f"test_sharded_{AT_RANDOM}"),
            "FSDP2, sharded files": (f"{KILLED}[adapter from shards]",),
        },
        KILLED_ZERO, "adapter", "in full",
    ),
    "leaves the files of one process": with_zero(
        {"FSDP2": (f"{KILLED}[in full]",), "FSDP2, sharded files": (f"{KILLED}[adapter from shards]",)},
        KILLED_ZERO, "adapter", "in full",
    ),
    "resumed by another number of processes": {
        "HSDP": (MESH,),
        "ZeRO-2": (f"refused: {OWN_LAUNCH_ZERO}",),
    },
    "resumed by another launcher": {
        "FSDP2": (f"refused: {OWN_LAUNCH}",),
        "HSDP": (MESH,),
        "ZeRO-2": (f"refused: {OWN_LAUNCH_ZERO}",),
    },
    "a refused step is not applied": {
        "DDP": ("test_fault_in_one_of_two_processes_ends_both_and_loses_no_checkpoint[poison_row-"
                "was not applied: its loss is nan]",),
        "ZeRO-2": ("test_step_that_is_refused_is_not_applied[zero2]",),
        "ZeRO-3": ("test_step_that_is_refused_is_not_applied[zero3]",),
    },
}  # fmt: skip


def outcomes(reports: list[Path]) -> dict[str, bool]:
    """Whether each test of some JUnit reports passed. Its name includes its parameters."""
    cases = [case for report in reports for case in ElementTree.parse(report).iter("testcase")]
    return {
        case.get("name"): not any(child.tag in ("failure", "error", "skipped") for child in case) for case in cases
    }


def cell(tests: tuple[str, ...], passed: dict[str, bool]) -> str:
    if not tests:
        return "not tested"
    names = [test.removeprefix("refused: ") for test in tests]
    if missing := [name for name in names if name not in passed]:
        raise SystemExit(f"The reports have no test {', '.join(missing)}. Run the tests that the docstring names.")
    if not all(passed[name] for name in names):
        return "**fails**"
    return "refused" if tests[0].startswith("refused") else "yes"


def table(passed: dict[str, bool]) -> str:
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for row, cases in ROWS.items():
        lines.append(f"| {row} | {' | '.join(cell(cases.get(column, ()), passed) for column in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def main():
    text = DOCUMENT.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(outcomes([Path(name) for name in sys.argv[1:]]))}\n{END}{after}")


if __name__ == "__main__":
    main()
