"""docs/RELIABILITY.md names a test for each fault and each pitfall: they exist, and every row has one."""
import ast
import functools
import json
import re
import sys

from conftest import PROJECT

TEXT = (PROJECT / "docs/RELIABILITY.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if re.match(r"\| \d+ \|", line)]


@functools.cache
def functions_of(name):
    """Names of the test functions of a file, if it is one."""
    path = PROJECT / "tests" / name
    if not path.is_file():
        return set()
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_every_fault_and_every_pitfall_has_a_row_with_a_test():
    assert [int(row.split("|")[1]) for row in ROWS] == [*range(1, 26), *range(1, 26)]
    assert not [row for row in ROWS if not re.search(r"`test_\w+\.py::test_\w+`", row)]


def test_every_test_that_the_tables_name_exists():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", TEXT)
    assert len(named) > 100 and not [f"{file}::{name}" for file, name in named if name not in functions_of(file)]


def test_every_row_of_the_faults_has_a_guard_whose_absence_its_test_was_seen_to_notice():
    """bench/controls.py takes them away, which takes many minutes; here: it could still do so, and did so with these."""
    sys.path.insert(0, str(PROJECT / "bench"))
    from controls import CONTROLS
    entries = json.loads((PROJECT / "bench/results/controls.json").read_text(encoding="utf-8"))
    seen = {(entry["row"], entry["wrong"], entry["file"], entry["test"]): entry["noticed"] for entry in entries}
    assert sorted({row for row, *_ in CONTROLS}) == list(range(1, 26))
    for row, wrong, file, old, new, test in CONTROLS:
        name, _, function = test.partition("::")
        assert function.partition("[")[0] in functions_of(name), test
        stands = (PROJECT / file).read_text(encoding="utf-8").count(old)
        assert stands == 1 and old != new, f"bench/controls.py, row {row}, {wrong}: {old!r} must stand once in {file}; bring it up to date"
        assert seen.get((row, wrong, file, test)), f"row {row}, {wrong}: run bench/controls.py --json=bench/results/controls.json"
