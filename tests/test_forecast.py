"""The forecast's figures against arithmetic by hand, and each rule in both directions."""
import dataclasses
import json
import math
import subprocess
import sys

import pytest
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st

import config
import forecast

FACTS = forecast.Facts(rows=45_000, tokens=4_000_000, supervised_tokens=1_000_000)


def of(name, facts=FACTS, **overrides):
    return forecast.forecast(
        config.read(PROJECT / "configs" / f"{name}.json", [(key.replace("__", "."), value) for key, value in overrides.items()]), facts
    )


def severities(outcome):
    return {found.name: found.severity for found in outcome.findings}


# -------------------------------------------------------------------------------------------- the plan's configurations

def test_the_failed_runs_settings_are_warned_of_and_not_refused():
    outcome = of("seed-failure")
    f = outcome.figures
    assert severities(outcome) == {"small rate area": "warning", "rate ends at nothing": "warning", "coverage below one epoch": "warning"}
    assert f["samples"] == 4000 and f["coverage"] == pytest.approx(0.0889, abs=5e-5) and f["area"] == pytest.approx(500 * 5e-5 / 2)
    assert (
        f["full_rate_steps"] == pytest.approx(250) and f["negligible_from"] == 469
    )  # cos² (pi/2 · 468/499) > 0.01 > cos² (pi/2 · 469/499)
    assert forecast.refusals(outcome, config.Forecast()) == []


def test_low_coverage_is_not_said_to_mean_failure():
    text = " ".join(forecast.show_forecast(of("seed-failure")).split())
    assert "8.9%" in text and "0.0125" in text and "By itself that fails no run" in text
    runs = sorted((PROJECT / "docs" / "findings").glob("seed-failure-s*/metrics.jsonl"))
    lines = [line for run in runs for line in map(json.loads, run.read_text().splitlines()) if "eval/loss" in line]
    first, last = ([line["eval/loss"] for line in lines if line["step"] == step] for step in (0, 500))
    assert len(first) == len(last) == 3
    said = f"from an evaluation loss of {sum(first) / 3:.2f} to {sum(last) / 3:.2f} in 500 steps"
    assert said in text and all(said in " ".join((PROJECT / page).read_text().split()) for page in ("README.md", "docs/HEALTH.md"))


@pytest.mark.parametrize("rows, seen, epoch", [(8, "all of them 500 times:", "an epoch is 1 step\n"), (12_000, "33.3% of them:", "an epoch is 1,500 steps\n")])
def test_few_rows_are_told_as_what_they_are(rows, seen, epoch):
    text = forecast.show_forecast(of("seed-failure", dataclasses.replace(FACTS, rows=rows, tokens=rows * 40)), width=200)
    assert seen in text and epoch in text


@pytest.mark.parametrize(
    "name, coverage, area",
    [
        ("approach1", 1.422, 1e-4 * 100.5 + 1800 * 5.5e-5),
        ("approach2", 7.111, 2e-4 * 250.5 + 4500 * 1.1e-4),
        ("approach3", 1.422, 1e-4 * 100.5 + 1800 * 5.5e-5),
    ],
)
def test_the_approaches_pass(name, coverage, area):
    outcome = of(name)
    f = outcome.figures
    assert outcome.findings == [] and f["coverage"] == pytest.approx(coverage, abs=5e-4)
    assert f["area"] == pytest.approx(area, rel=1e-3) and f["warmup_share"] == pytest.approx(0.1) and f["supervised_share"] == 0.25


def test_approach_1_with_a_cosine_to_zero_has_eight_times_the_area_of_the_failed_run():
    assert of("approach1", schedule__lr_min="0").figures["area"] == pytest.approx(0.100, abs=5e-4)
    assert of("approach1").figures["area"] == pytest.approx(0.109, abs=5e-4)


# ---------------------------------------------------------------------------------------------------------------- rules

def run(schedule=None, train=None, facts=FACTS, **rest):
    tree = {"train": {"max_steps": 2000, "epochs": 0, **(train or {})}, "schedule": {"lr_warmup_steps": 100, **(schedule or {})}, **rest}
    return forecast.forecast(config.from_dict(tree), facts)


def counted(**counts):
    return dataclasses.replace(
        FACTS,
        counts={
            "rows_read": 45_000,
            "rows_truncated": 0,
            "rows_lost": 0,
            "rows_skipped": 0,
            "rows_unsupervised": 0,
            "supervised_tokens_lost": 0,
            **counts,
        },
    )


GIB = 2**30
SICK_AND_WELL = [
    ("nothing supervised", "refuse", dict(facts=dataclasses.replace(FACTS, supervised_tokens=0)), {}),
    ("nothing supervised", "refuse", dict(facts=forecast.Facts(0, 0, 0)), {}),
    (
        "nothing trainable",
        "refuse",
        dict(facts=dataclasses.replace(FACTS, trainable=0)),
        dict(facts=dataclasses.replace(FACTS, trainable=1)),
    ),
    ("rate of zero", "refuse", dict(schedule={"learning_rate": 0.0, "lr_min": 0.0}), {}),
    ("warm-up as long as the run", "refuse", dict(schedule={"lr_warmup_steps": 2000}), dict(schedule={"lr_warmup_steps": 1000})),
    (
        "more memory than there is",
        "refuse",
        dict(facts=dataclasses.replace(FACTS, peak_bytes=9 * GIB, available_bytes=8 * GIB)),
        dict(facts=dataclasses.replace(FACTS, peak_bytes=7 * GIB, available_bytes=8 * GIB)),
    ),
    (
        "more memory than there is",
        "refuse",
        dict(facts=dataclasses.replace(FACTS, memory={"weights": 9 * GIB}, available_bytes=8 * GIB)),
        {},
    ),
    ("coverage below one epoch", "warning", dict(train={"max_steps": 1400}), dict(train={"max_steps": 1407})),
    ("many epochs", "warning", dict(facts=dataclasses.replace(FACTS, rows=3000)), dict(facts=dataclasses.replace(FACTS, rows=3300))),
    ("small rate area", "warning", dict(schedule={"learning_rate": 1e-5, "lr_min": 1e-6}), {}),
    ("rate ends at nothing", "warning", dict(schedule={"lr_min": 0.0}), dict(schedule={"lr_min": 3e-6})),
    ("high rate", "warning", dict(schedule={"learning_rate": 0.1, "lr_min": 0.01}), dict(schedule={"learning_rate": 1e-2})),
    ("long warm-up", "warning", dict(schedule={"lr_warmup_steps": 1200}), dict(schedule={"lr_warmup_steps": 1000})),
    (
        "few supervised tokens",
        "warning",
        dict(facts=dataclasses.replace(FACTS, supervised_tokens=100_000)),
        dict(facts=dataclasses.replace(FACTS, supervised_tokens=130_000)),
    ),
    ("heavy truncation", "warning", dict(facts=counted(rows_truncated=5000)), dict(facts=counted(rows_truncated=4000))),
    ("heavy truncation", "warning", dict(facts=counted(supervised_tokens_lost=60_000)), dict(facts=counted(supervised_tokens_lost=40_000))),
    ("rows lost", "warning", dict(facts=counted(rows_lost=1500, rows_unsupervised=1500)), dict(facts=counted(rows_lost=1500))),
    (
        "leaked rows",
        "warning",
        dict(facts=dataclasses.replace(FACTS, eval_rows=500, audit={"leak": 20})),
        dict(facts=dataclasses.replace(FACTS, eval_rows=500, audit={"leak": 5})),
    ),
    (
        "duplicate rows",
        "warning",
        dict(facts=dataclasses.replace(FACTS, audit={"duplicate": 3000, "near_duplicate": 2000})),
        dict(facts=dataclasses.replace(FACTS, audit={"duplicate": 3000})),
    ),
    (
        "duplicate evaluation rows",
        "warning",
        dict(facts=dataclasses.replace(FACTS, eval_rows=500, eval_repeats=60)),
        dict(facts=dataclasses.replace(FACTS, eval_rows=500, eval_repeats=40)),
    ),
    ("memory nearly full", "warning", dict(facts=dataclasses.replace(FACTS, peak_bytes=int(7.9 * GIB), available_bytes=8 * GIB)), {}),
]


@pytest.mark.parametrize("name, severity, sick, well", SICK_AND_WELL, ids=lambda value: value if isinstance(value, str) else "")
def test_a_rule_tells_the_sick_from_the_well(name, severity, sick, well):
    outcome = run(**sick)
    found = {f.name: f for f in outcome.findings}[name]
    assert found.severity == severity and found.evidence and found.cause and found.remedy
    assert (found in forecast.refusals(outcome, config.Forecast())) == (severity == "refuse")
    assert name not in severities(run(**well))


def test_every_warning_can_be_acknowledged_and_no_other_name():
    assert {name for name, severity, _, _ in SICK_AND_WELL if severity == "warning"} == set(config.FORECAST_WARNINGS)
    with pytest.raises(ValueError, match="forecast.acknowledge: there is no \"coverage\""):
        config.from_dict({}, [("forecast.acknowledge", "coverage")])


def test_strict_refuses_warnings_but_for_those_acknowledged_by_name_and_never_what_cannot_learn():
    names = lambda outcome, **keys: [found.name for found in forecast.refusals(outcome, config.from_dict({"forecast": keys}).forecast)]
    outcome = of("seed-failure")
    assert names(outcome) == [] and len(names(outcome, strict=True)) == 3
    assert names(outcome, strict=True, acknowledge=["small rate area", "rate ends at nothing"]) == ["coverage below one epoch"]
    assert names(run(facts=dataclasses.replace(FACTS, supervised_tokens=0)), acknowledge=list(config.FORECAST_WARNINGS)) == [
        "nothing supervised"
    ]


def test_an_acknowledged_warning_is_shown_in_a_line_and_not_in_full():
    text = forecast.show_forecast(of("seed-failure", forecast__acknowledge="small rate area"))
    assert "WARNING: small rate area" not in text and "acknowledged: small rate area" in text and "WARNING: coverage" in text


def test_a_remedy_for_low_coverage_reaches_an_epoch():
    steps = of("seed-failure").findings[0].remedy.rpartition("=")[2].rstrip(".")
    assert "coverage below one epoch" not in severities(of("seed-failure", train__max_steps=steps))


# -------------------------------------------------------------------------------------------------------------- console

def test_two_stages_the_second_adds_memory_and_time_and_nothing_is_guessed_before():
    first, second = of("approach2"), of(
        "approach2",
        dataclasses.replace(
            FACTS,
            trainable=4_884_480,
            memory={"weights": 90_000_000, "activations": GIB},
            peak_bytes=2 * GIB,
            available_bytes=80 * GIB,
            step_seconds=0.72,
        ),
    )
    text = forecast.show_forecast(first)
    assert "memory" not in text and "time" not in text and first.figures["seconds"] is None
    text = forecast.show_forecast(second)
    assert (
        "4,884,480 parameters" in text
        and "weights 85.8 MiB" in text
        and "2.00 GiB in the probed step, of 80.00 GiB" in text
        and "60.0 minutes" in text
    )
    assert second.figures["seconds"] == pytest.approx(3600)


def test_a_forecast_becomes_json_and_stays_small():
    import json
    tree = json.loads(json.dumps(forecast.as_json(of("approach2"))))
    assert (
        tree["figures"]["area"] == pytest.approx(0.545, abs=1e-3)
        and len(tree["figures"]["rates"]) == 200
        and tree["figures"]["rates"][-1][0] == 5000
    )
    assert json.loads(json.dumps(forecast.as_json(of("seed-failure"))))["findings"][0]["remedy"]


def test_the_curve_is_the_schedule_from_its_first_step_to_its_last():
    lines = forecast.curve([(step, step) for step in range(1, 101)], 50, height=4)
    assert (
        [len(line) for line in lines] == [50] * 4 and lines[0].startswith(" " * 37) and lines[-1].endswith("█")
    )
    assert forecast.curve([(1, 0.0), (2, 0.0)], 50) == ["  "] * 4


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 10**8),
    share=st.floats(0, 1),
    steps=st.integers(1, 300),
    peak=st.floats(1e-9, 10),
    warmup=st.integers(0, 400),
    floor=st.floats(0, 1),
    kind=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    width=st.integers(60, 120),
    seconds=st.none() | st.floats(1e-4, 1e4),
)
def test_any_forecast_fits_its_width_and_its_area_lies_below_peak_times_steps(
    rows, share, steps, peak, warmup, floor, kind, width, seconds
):
    settings_ = config.from_dict(
        {
            "train": {"max_steps": steps, "epochs": 0},
            "schedule": {"learning_rate": peak, "lr_min": floor * peak, "lr_warmup_steps": warmup, "lr_kind": kind},
        }
    )
    tokens = rows * 60
    facts = forecast.Facts(
        rows,
        tokens,
        int(share * tokens),
        step_seconds=seconds,
        peak_bytes=GIB,
        available_bytes=3 * GIB,
        counts={"rows_read": rows, "rows_truncated": rows // 3},
    )
    outcome = forecast.forecast(settings_, facts)
    assert max(map(len, forecast.show_forecast(outcome, width).splitlines())) <= width
    assert 0 < outcome.figures["area"] <= peak * steps * (1 + 1e-9) and math.isfinite(outcome.figures["full_rate_steps"])


def test_facts_come_from_rows_of_data(tmp_path):
    import numpy as np

    import data
    rows = data.Rows(
        np.zeros(9, np.int32), np.array([0, 4, 9]), np.ones(9, bool), ["a", "b"], {"tokens": 9, "supervised_tokens": 7, "rows_read": 2}, ""
    )
    facts = forecast.Facts.of(rows, rows)
    assert (facts.rows, facts.eval_rows, facts.eval_repeats, facts.longest, facts.tokens, facts.supervised_tokens) == (2, 2, 0, 5, 9, 7)
    again = dataclasses.replace(rows, ids=np.array([5, 6, 7, 5, 6, 5, 6, 7], dtype=np.int32), offsets=np.array([0, 3, 5, 8]))
    assert forecast.Facts.of(rows, again).eval_repeats == 1


def test_forecast_alerts_and_diagnosis_need_no_torch():
    script = "import sys, forecast, alerts, health, logs, rules; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
