"""The table of launchers in docs/training.md: its tests exist, and it is the one that the script writes."""

import ast

from tests import ROOT, launcher_table


FILES = ["training/test_distributed.py", "training/test_recovery.py", "deepspeed_checks.py"]
TESTS = [test for row in launcher_table.ROWS.values() for tests in row.values() for test in tests]


def test_each_test_behind_the_table_exists():
    trees = [ast.parse((ROOT / "tests" / file).read_text()) for file in FILES]
    functions = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {test.removeprefix("refused: ").partition("[")[0] for test in TESTS} <= functions


def test_document_has_the_table_of_tests_that_all_passed():
    passed = dict.fromkeys((test.removeprefix("refused: ") for test in TESTS), True)
    assert launcher_table.table(passed) in launcher_table.DOCUMENT.read_text()


def test_failed_test_shows_in_the_table(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text('<testsuite><testcase name="a"/><testcase name="b"><failure/></testcase></testsuite>')
    passed = launcher_table.outcomes([report])
    assert launcher_table.cell(("a",), passed) == "yes" and launcher_table.cell(("a", "b"), passed) == "**fails**"
    assert (
        launcher_table.cell(("refused: a",), passed) == "refused" and launcher_table.cell((), passed) == "not tested"
    )
