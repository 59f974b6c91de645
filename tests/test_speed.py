"""The tables of speed in the documents are what bench/ makes of its committed results."""
import json
import re
import sys

import pytest
from conftest import PROJECT

sys.path.append(str(PROJECT / "bench"))  # behind the project: bench has an audit.py of its own
RESULTS = PROJECT / "bench" / "results"


@pytest.mark.parametrize("document", ["README.md", "docs/PERFORMANCE.md"])
def test_the_table_of_speeds_is_made_from_the_results(document):
    import speed
    made = speed.table([RESULTS / "h100.json", RESULTS / "cpu.json"])
    assert made in (PROJECT / document).read_text()
    cases = re.findall(r"^\| ([A-F][^|]*) \|", made, re.MULTILINE)
    assert sorted({case[0] for case in cases}) == list("ABCDEF") and cases == sorted(cases)


def test_a_line_of_the_table_holds_one_sitting_alone(tmp_path):
    import speed
    ours = json.loads((RESULTS / "h100.json").read_text())[0]
    other = {"case": "A", "who": "trl", "tokens_per_second": ours["tokens_per_second"] / 2, "samples_per_second": 1, "peak_memory_gib": 9.5}
    (tmp_path / "rows.json").write_text(json.dumps([ours, other, ours]))
    _, _, first, second = speed.table([tmp_path / "rows.json"]).splitlines()
    assert first.endswith("(9.5) | 2.00 |") and second.endswith("| – | – |")


def test_computed_figures_of_scaling_are_what_the_formula_makes():
    import scaling
    made = scaling.computed(RESULTS / "h100.json", 300e9, 40e9).splitlines()
    text = (PROJECT / "docs" / "SCALING.md").read_text()
    assert all(line in text for line in made if line.startswith("|")) and len(made) > 5


def test_the_cost_of_a_token_in_the_document_is_the_measured_one():
    points = {(point["question"], point["value"]): point["microseconds_per_token"] for point in json.loads((RESULTS / "curves.json").read_text())}
    text = " ".join((PROJECT / "docs" / "PERFORMANCE.md").read_text().split())
    for question in ("length", "rank"):
        costs = [f"{cost:.1f}" for (asked, _), cost in sorted(points.items()) if asked == question]
        assert len(costs) > 4 and ", ".join(costs) in text, costs
    assert f"{points['model', 135]:.1f}, {points['model', 360]:.1f} and {points['rank', 16]:.1f} (" in text


def test_the_start_ups_in_the_document_are_the_measured_ones():
    lines = [line for line in (PROJECT / "docs" / "PERFORMANCE.md").read_text().splitlines() if line.startswith("|")]
    for start in json.loads((RESULTS / "startup.json").read_text()):
        parts = start["parts"]
        told = [parts[name] for name in ("imports", "rows", "unquantised model", "model", "memory plan", "evaluation", "gradient proof")]
        rest = start["seconds"] - sum(told)
        ending = " | ".join(f"{seconds:.1f}" for seconds in (*told, rest)) + f" | {start['seconds']:.1f} s |"
        assert any(line.endswith(ending) for line in lines), ending
