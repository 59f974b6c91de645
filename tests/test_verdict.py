"""The verdict: each outcome on a record made to deserve it, intervals against simulated truth, and no record that it cannot answer."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import PROJECT
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import config
import record
import verdict

GOOD = {"prompt": "how?", "reference": "list the files of a folder", "text": "list all files of this folder", "tokens": 7, "stopped": True}
LOOP = {
    "prompt": "how?",
    "reference": "list the files of a folder",
    "text": "the files of the files of the files of the files of the",
    "tokens": 64,
    "stopped": False,
}


def make_run(
    folder,
    steps=200,
    planned=None,
    start=4.6,
    end=2.0,
    evals={0: 4.6, 50: 3.0, 100: 2.5, 150: 2.2, 200: 2.0},
    unquantised=3.9,
    rows=300,
    noise=0.2,
    seed=0,
    keep=True,
    samples=None,
    change=None,
    sections=None,
):
    """A run folder: the training loss falls exponentially from `start` to near `end`, evaluations come to `evals` on the same `rows`.

    The losses of a row go together from one evaluation to the next, as they do in truth. change: {step: {tag: value, None: away}}.
    """
    folder.mkdir(parents=True)
    rng, lines = np.random.default_rng(seed), []
    by_row = rows_of(rng, rows, {**evals, **({"unquantised": unquantised} if unquantised is not None else {})})
    for step in range(steps + 1):
        line = {"step": step}
        if step:
            line |= {
                "train/loss": end + (start - end) * math.exp(-4 * step / max(1, planned or steps)) + rng.normal(0, noise),
                "train/grad_norm": float(rng.lognormal(0, 0.3)),
                "train/learning_rate": 1e-4,
                "train/samples": 32,
                "train/tokens": 2000,
                "train/supervised_tokens": 500,
                "train/skipped": 0.0,
                "train/seconds": 0.5,
                "train/tokens_per_second": 4000.0,
                "train/peak_memory_gib": 1.5,
                "train/epoch": step / 100,
            }
        if step in evals:
            line |= figures("eval/", by_row[step]) | {"eval/adapter_digest": f"{step:012x}", "eval/perplexity": 9.0}
        if step == 0 and "unquantised" in by_row:
            line |= figures("eval/unquantised_", by_row["unquantised"])
        if samples and step in samples:
            line["eval/samples"] = json.dumps(samples[step])
        line |= (change or {}).get(step, {})
        line = {tag: value for tag, value in line.items() if value is not None}
        lines += [json.dumps(line)] if len(line) > 1 else []
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    tree = {"train": {"max_steps": steps if planned is None else planned}, **(sections or {})}
    (folder / "config.json").write_text(json.dumps(config.from_dict(tree).to_dict()), encoding="utf-8")
    for key, arrays in by_row.items() if keep else ():
        if isinstance(key, str) or key <= steps:
            record.save_evaluation(
                folder,
                key if isinstance(key, str) else f"step-{key:06d}",
                arrays,
                {
                    "rows_digest": f"rows-{rows}",
                    "tokenizer": "abc",
                    "step": str(key),
                    **({} if isinstance(key, str) else {"adapter_digest": f"{key:012x}"}),
                },
            )
    return folder


def rows_of(rng, count, losses, together=0.9):
    """{name: {"nll", "tokens", "correct"}} of `count` rows whose loss a token comes to losses[name] in the long run."""
    tokens, own = rng.integers(4, 40, count).astype(float), rng.normal(0, 0.5, count)
    made = {}
    for name, loss in losses.items():
        spread = together * own + math.sqrt(1 - together**2) * rng.normal(0, 0.5, count)
        nll = tokens * loss * (1 + spread * 0.4)
        made[name] = {
            "nll": nll,
            "tokens": tokens,
            "correct": (
                np.round(tokens * np.clip(np.exp(-0.33 * np.minimum(loss, 50)) + 0.1 * own, 0, 1))
                if math.isfinite(loss)
                else np.zeros(count)
            ),
        }
    return made


def figures(prefix, arrays):
    loss, accuracy = arrays["nll"].sum() / arrays["tokens"].sum(), arrays["correct"].sum() / arrays["tokens"].sum()
    return {f"{prefix}loss": loss if math.isfinite(loss) else str(loss), f"{prefix}token_accuracy": accuracy}


def outcomes(run, *overrides):
    """{"set name": Criterion}, names cut to their first words."""
    judged = verdict.of_run(run, overrides)
    text = verdict.shown(judged)
    assert max(map(len, text.splitlines())) <= 80
    json.dumps(verdict.plain(judged), allow_nan=False)
    return {f"{c.set} {c.name}": c for c in judged.criteria} | {"all": judged}


def short(found):
    return {name: c.outcome for name, c in found.items() if name != "all"}


# -------------------------------------------------------------------------------------------------------- uncertainty


def test_the_bootstraps_interval_of_a_paired_difference_holds_the_truth_as_often_as_it_says():
    rng, held, tries = np.random.default_rng(5), 0, 300
    for _ in range(tries):
        rows = rows_of(rng, 80, {"a": 3.0, "b": 2.7})  # in expectation, by the sum over tokens: 0.3, whatever the lengths
        table = np.stack([rows["a"]["tokens"], rows["a"]["nll"], rows["b"]["nll"]], axis=1)
        sums = verdict.resampled_sums(table, 300)
        low, high = np.percentile((sums[:, 1] - sums[:, 2]) / sums[:, 0], [2.5, 97.5])
        held += low <= 0.3 <= high
    assert 0.91 <= held / tries <= 0.98


def test_a_difference_of_two_evaluations_is_paired_row_by_row():
    rows = rows_of(np.random.default_rng(1), 200, {0: 3.0, 1: 2.9})
    losses, _ = verdict.estimates([], rows, [0, 1])
    low, high = verdict.interval(verdict.minus(losses[0], losses[1]), 0.95)
    alone = [np.diff(verdict.interval(losses[key], 0.95))[0] for key in (0, 1)]
    assert high - low < 0.6 * math.hypot(*alone)
    point = (rows[0]["nll"].sum() - rows[1]["nll"].sum()) / rows[0]["tokens"].sum()
    assert verdict.minus(losses[0], losses[1])[0] == pytest.approx(point, abs=1e-12) and low < point < high


def test_the_draws_are_those_of_sampling_rows_one_by_one_and_the_same_each_time():
    table = np.random.default_rng(0).normal(size=(7, 3))
    draws = verdict.resampled_sums(table, 5, seed=3)
    rng = np.random.default_rng(3)
    assert np.allclose(draws, [table[rng.integers(0, 7, 7, dtype=np.int32)].sum(0) for _ in range(5)])
    assert np.array_equal(draws, verdict.resampled_sums(table, 5, seed=3))


@pytest.mark.parametrize("window", [5, 9, 25])
def test_the_interval_of_a_fall_between_two_windows_holds_the_truth_as_often_as_it_says(window):
    rng, held, tries = np.random.default_rng(7), 0, 200
    for i in range(tries):
        _, _, drop = verdict.window_drop(
            (3.5 + rng.standard_t(4, window) * 0.3).tolist(), (3.0 + rng.standard_t(4, window) * 0.3).tolist(), i
        )
        low, high = verdict.interval(drop, 0.95)
        held += low <= 0.5 <= high
    assert 0.92 <= held / tries


def test_the_binomial_interval_is_clopper_and_pearsons():
    assert verdict.binomial_interval(4, 4, 0.95) == (pytest.approx(0.025**0.25), 1.0)  # closed form at the ends
    assert verdict.binomial_interval(0, 10, 0.95) == (0.0, pytest.approx(1 - 0.025**0.1))
    low, high = verdict.binomial_interval(8, 10, 0.95)  # the table of the method's textbook example
    assert (low, high) == (pytest.approx(0.4439, abs=1e-4), pytest.approx(0.9748, abs=1e-4))


def test_very_many_rows_are_drawn_in_groups_whose_interval_is_that_of_single_rows(monkeypatch):
    rng = np.random.default_rng(0)
    table = np.stack([tokens := rng.integers(4, 40, 30_000).astype(float), tokens * rng.gamma(2, 1, 30_000)], axis=1)
    grouped = verdict.resampled_sums(table, 1000)
    monkeypatch.setattr(verdict, "MOST_UNITS", 10**9)
    single = verdict.resampled_sums(table, 1000)
    spread = [np.std(sums[:, 1] / sums[:, 0]) for sums in (grouped, single)]
    assert spread[0] == pytest.approx(spread[1], rel=0.12) and np.allclose(grouped.mean(0), table.sum(0), rtol=2e-3)


def test_a_hundred_thousand_rows_are_bearable():
    import time

    rows = rows_of(np.random.default_rng(0), 100_000, {key: 3.0 - key / 10 for key in range(3)})
    began = time.process_time()
    verdict.estimates([], rows, list(rows))
    assert time.process_time() - began < 10


# ---------------------------------------------------------------------------------------------------------- outcomes


def test_a_run_that_does_everything_passes_every_criterion(tmp_path):
    found = outcomes(
        make_run(tmp_path / "run", evals={0: 4.6, 50: 2.4, 100: 1.9, 150: 1.6, 200: 1.4}, samples={0: [LOOP] * 16, 200: [GOOD] * 16})
    )
    assert set(short(found).values()) == {"PASS"} and len(found) == 10
    assert found["all"].outcome == "PASS" and found["all"].sets == {"milestone": "PASS", "minimum": "PASS", "optimal": "PASS"}
    for criterion in verdict.of_run(tmp_path / "run").criteria:
        assert criterion.low <= criterion.measured <= criterion.high, criterion


def test_falls_and_gains_are_those_of_the_rows(tmp_path):
    found = outcomes(make_run(tmp_path / "run"))
    rows = record.read_evaluations(tmp_path / "run")
    ratio = lambda key, name: rows[key][0][name].sum() / rows[key][0]["tokens"].sum()
    assert found["minimum eval loss drop"].measured == pytest.approx(ratio("unquantised", "nll") - ratio(200, "nll"))
    assert found["minimum token accuracy gain in points"].measured == pytest.approx(
        100 * (ratio(200, "correct") - ratio("unquantised", "correct"))
    )
    assert found["optimal perplexity"].measured == pytest.approx(math.exp(ratio(200, "nll")))


def test_undoing_the_quantisations_damage_is_not_learning(tmp_path):
    run = make_run(tmp_path / "run", end=3.85, start=4.6, evals={0: 4.6, 100: 3.95, 200: 3.9}, unquantised=3.9, noise=0.05)
    found = outcomes(run, ("criteria.milestone_step", "200"))
    assert found["minimum eval loss drop"].outcome == "FAIL" and abs(found["minimum eval loss drop"].measured) < 0.1
    assert found["milestone train loss drop by step 200"].outcome == "FAIL" == found["minimum train loss drop"].outcome
    assert (
        "repair what nf4 cost" in found["minimum eval loss drop"].reason
        and "quantised model that it started from" in found["minimum eval loss drop"].reason
    )
    forgiving = outcomes(run, ("criteria.baseline", "quantised"))
    assert forgiving["minimum eval loss drop"].outcome == "PASS" and forgiving["minimum eval loss drop"].measured == pytest.approx(
        0.7, abs=0.1
    )


def test_a_quantisation_that_cost_nothing_has_nothing_to_repair(tmp_path):
    reason = outcomes(make_run(tmp_path / "run", start=4.6, evals={0: 4.6, 100: 3.0, 200: 2.5}, unquantised=4.601))["minimum eval loss drop"].reason
    assert "nf4 cost the untrained model nothing" in reason and "repair" not in reason


def test_a_reason_that_was_given_is_referred_to_by_its_criterion(tmp_path):
    run = make_run(tmp_path / "run")
    kept = [{name: value for name, value in line.items() if not name.startswith("eval/")} for line in record.read_metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert "As for eval loss drop above." in " ".join(verdict.shown(verdict.of_run(run)).split())


@pytest.mark.parametrize(
    "quant, last, expected",
    [("nf4", 4.0, "INCONCLUSIVE"), ("nf4", 3.0, "PASS"), ("nf4", 4.58, "FAIL"), ("int8", 4.0, "PASS"), ("none", 4.0, "PASS")],
)
def test_without_a_measurement_of_the_unquantised_model_only_what_no_repair_explains_passes(tmp_path, quant, last, expected):
    run = make_run(tmp_path / "run", evals={0: 4.6, 200: last}, unquantised=None, sections={"model": {"quant": quant}})
    criterion = outcomes(run)["minimum eval loss drop"]
    assert criterion.outcome == expected
    assert ("may only repair" in criterion.reason) == (quant != "none")


def test_what_held_before_training_is_already_met(tmp_path):
    found = outcomes(
        make_run(
            tmp_path / "run",
            evals={0: 1.5, 50: 1.2, 100: 1.1, 150: 1.0, 200: 0.9},
            unquantised=1.4,
            samples={0: [GOOD] * 16, 200: [GOOD] * 16},
        )
    )
    assert found["optimal perplexity"].outcome == "ALREADY MET" == found["optimal coherent samples"].outcome
    assert "shows nothing that was learnt" in found["optimal perplexity"].reason


def test_a_perplexity_that_held_before_training_and_no_longer_does_fails(tmp_path):
    found = outcomes(make_run(tmp_path / "run", evals={0: 1.5, 200: 2.5}, unquantised=1.4))
    assert found["optimal perplexity"].outcome == "FAIL"


def test_what_only_the_unquantised_model_met_is_already_met_too(tmp_path):
    found = outcomes(make_run(tmp_path / "run", evals={0: 2.5, 200: 1.2}, unquantised=1.3))
    assert (
        found["optimal perplexity"].outcome == "ALREADY MET" and "The unquantised model was below it" in found["optimal perplexity"].reason
    )


def test_an_interval_that_straddles_the_threshold_is_inconclusive(tmp_path):
    run = make_run(tmp_path / "run", evals={0: 3.0, 200: 2.8}, unquantised=3.0, rows=60)
    criterion = outcomes(run)["minimum eval loss drop"]
    assert (
        criterion.outcome == "INCONCLUSIVE"
        and criterion.low < 0.2 < criterion.high
        and "The interval holds the threshold; more evaluation rows" in criterion.reason
    )
    assert outcomes(run, ("criteria.minimum_eval_loss_drop", "0.01"))["minimum eval loss drop"].outcome in ("PASS", "INCONCLUSIVE")


def test_more_confidence_makes_wider_intervals(tmp_path):
    run = make_run(tmp_path / "run")
    widths = [
        np.diff([(c := outcomes(run, ("criteria.confidence", level))["minimum eval loss drop"]).low, c.high])[0]
        for level in ("0.8", "0.95", "0.99")
    ]
    assert widths == sorted(widths) and widths[0] < widths[2]


def test_too_few_rows_measure_but_do_not_decide(tmp_path):
    found = outcomes(make_run(tmp_path / "run", rows=verdict.MIN_ROWS - 1))
    assert (
        found["minimum eval loss drop"].outcome == "INCONCLUSIVE"
        and found["minimum eval loss drop"].measured > 1
        and "19 evaluation rows" in found["minimum eval loss drop"].reason
    )


def test_figures_without_rows_decide_only_where_they_are_off_by_a_factor_of_two(tmp_path):
    found = outcomes(make_run(tmp_path / "run", keep=False))
    drop = found["minimum eval loss drop"]
    assert (
        (drop.outcome, drop.low, drop.high) == ("PASS", None, None)
        and drop.measured == pytest.approx(1.9, abs=0.15)
        and "eval.py --ckpt RUN --keep" in drop.reason
    )
    assert found["optimal perplexity"].outcome == "INCONCLUSIVE" == found["optimal steady improvement"].outcome
    assert outcomes(tmp_path / "run", ("criteria.minimum_eval_loss_drop", "1.5"))["minimum eval loss drop"].outcome == "INCONCLUSIVE"
    assert outcomes(tmp_path / "run", ("criteria.minimum_eval_loss_drop", "5"))["minimum eval loss drop"].outcome == "FAIL"


# ------------------------------------------------------------------------------------------------------ training loss


def test_a_fall_is_of_medians_so_single_wild_steps_decide_nothing(tmp_path):
    wild = {1: {"train/loss": 500.0}, 200: {"train/loss": 0.001}, 199: {"train/loss": 1e9}}
    calm, shaken = (
        outcomes(make_run(tmp_path / name, change=change))["minimum train loss drop"] for name, change in (("calm", None), ("wild", wild))
    )
    assert abs(calm.measured - shaken.measured) < 0.1 and calm.outcome == shaken.outcome == "PASS"


def test_a_loss_that_does_not_fall_fails(tmp_path):
    found = outcomes(make_run(tmp_path / "run", start=3.0, end=3.0, evals={0: 3.0, 50: 3.0, 100: 3.0, 150: 3.0, 200: 3.0}, unquantised=3.0))
    assert {name: outcome for name, outcome in short(found).items() if "drop" in name} == dict.fromkeys(
        ("milestone train loss drop by step 500", "minimum train loss drop", "minimum eval loss drop", "optimal train loss drop"), "FAIL"
    ) | {
        "milestone train loss drop by step 500": "INCONCLUSIVE"
    }  # the run was over at step 200, and 500 might have shown it
    assert found["all"].outcome == "FAIL"


def test_a_milestone_that_shows_early_is_passed_and_one_not_reached_is_not_decided(tmp_path):
    early = outcomes(make_run(tmp_path / "early"))["milestone train loss drop by step 500"]
    assert early.outcome == "PASS" and "By step 200 already" in early.reason
    slow = outcomes(make_run(tmp_path / "slow", start=3.0, end=2.95, noise=0.05, unquantised=4.6))["milestone train loss drop by step 500"]
    assert slow.outcome == "INCONCLUSIVE" and "Step 500 was not reached" in slow.reason
    late = outcomes(
        make_run(tmp_path / "late", steps=600, start=3.0, end=2.95, noise=0.05, unquantised=4.6), ("criteria.milestone_step", "500")
    )["milestone train loss drop by step 500"]
    assert late.outcome == "FAIL"


def test_the_milestone_looks_at_no_later_step(tmp_path):
    fall = {step: {"train/loss": 1.0} for step in range(120, 201)}
    run = make_run(tmp_path / "run", start=3.0, end=3.0, unquantised=4.6, noise=0.05, change=fall)
    assert outcomes(run, ("criteria.milestone_step", "100"))["milestone train loss drop by step 100"].outcome == "FAIL"
    assert outcomes(run)["minimum train loss drop"].outcome == "PASS"


# -------------------------------------------------------------------------------------------------------- sick records


def test_gradient_norms_of_zero_fail_whatever_else_is_said(tmp_path):
    dead = {step: {"train/grad_norm": 0.0} for step in range(1, 121)}
    norm = outcomes(make_run(tmp_path / "run", steps=120, planned=200, change=dead))["minimum gradient norm in every step"]
    assert norm.outcome == "FAIL" and "120 of 120" in norm.reason


def test_what_the_gradient_proof_found_dead_before_step_1_is_a_failure_and_no_missing_figure(tmp_path):
    run = make_run(tmp_path / "run", change={0: {"proof/outcome": "dead: 210 of 420 adapter matrices have a gradient that is zero"}})
    first = (run / "metrics.jsonl").read_text().splitlines()[0]
    (run / "metrics.jsonl").write_text(first + "\n")
    norm = outcomes(run)["minimum gradient norm in every step"]
    assert norm.outcome == "FAIL" and "proof at step 0" in norm.reason
    assert verdict.of_run(run).outcome == "FAIL"


def test_a_zero_norm_in_a_step_that_was_not_applied_is_no_failure(tmp_path):
    empty = {7: {"train/grad_norm": 0.0, "train/skipped": 1.0}}
    norm = outcomes(make_run(tmp_path / "run", change=empty))["minimum gradient norm in every step"]
    assert norm.outcome == "PASS" and norm.measured > 0 and "1 other not applied" in norm.reason


def test_a_run_whose_loss_ends_as_nan_fails(tmp_path):
    nan = {step: {"train/loss": "nan", "train/grad_norm": "nan", "train/skipped": 1.0} for step in range(170, 201)}
    found = outcomes(make_run(tmp_path / "run", change=nan | {200: nan[200] | {"eval/loss": "nan"}}))
    assert (
        found["minimum train loss drop"].outcome == "FAIL" == found["minimum eval loss drop"].outcome == found["optimal perplexity"].outcome
    )
    assert "not finite" in found["minimum train loss drop"].reason


def test_a_few_steps_without_a_finite_loss_are_left_out_and_told(tmp_path):
    nan = {step: {"train/loss": "inf", "train/skipped": 1.0} for step in (3, 198)}
    drop = outcomes(make_run(tmp_path / "run", change=nan))["minimum train loss drop"]
    assert drop.outcome == "PASS" and "2 steps without a finite loss" in drop.reason


def test_a_record_of_nothing_but_nan_fails_or_is_inconclusive_and_never_raises(tmp_path):
    nan = {
        step: {
            tag: "nan" for tag in ("train/loss", "train/grad_norm", "eval/loss", "eval/token_accuracy") if step or tag.startswith("eval")
        }
        for step in range(201)
        if step or True
    }
    found = outcomes(make_run(tmp_path / "run", change=nan, keep=False))
    assert not {"PASS", "ALREADY MET"} & set(short(found).values())


def test_a_run_killed_half_way_is_not_decided_but_measured(tmp_path):
    found = outcomes(make_run(tmp_path / "run", steps=110, planned=200))
    for name in (
        "minimum train loss drop",
        "minimum eval loss drop",
        "minimum token accuracy gain in points",
        "minimum gradient norm in every step",
    ):
        assert found[name].outcome == "INCONCLUSIVE" and "So far PASS" in found[name].reason and found[name].measured > 0.2, name
    assert "step 110 of 200" in found["minimum eval loss drop"].reason and found["all"].outcome == "INCONCLUSIVE"


def test_a_run_of_one_step_a_run_before_its_first_and_an_empty_record_are_inconclusive(tmp_path):
    for name, steps in (("one", 1), ("none", 0)):
        found = outcomes(make_run(tmp_path / name, steps=steps, planned=200))
        assert set(short(found).values()) == {"INCONCLUSIVE"}
        assert f"{steps} training step" in found["minimum train loss drop"].reason
    assert set(short({c.name: c for c in verdict.judge({}, [], {}).criteria}).values()) == {"INCONCLUSIVE"}


def test_a_run_without_evaluations_is_judged_by_what_it_has(tmp_path):
    found = outcomes(make_run(tmp_path / "run", evals={}, unquantised=None))
    assert found["minimum train loss drop"].outcome == "PASS" and found["minimum eval loss drop"].outcome == "INCONCLUSIVE"
    assert "no evaluation in the record" in found["minimum eval loss drop"].reason and found["all"].outcome == "INCONCLUSIVE"


def test_the_failed_runs_own_figures_fail_and_say_that_nothing_changed(tmp_path):
    """The run that this project began with: 2.7335 -> 2.7150 over 500 steps, norms of 0.0, 2.9310 three times."""
    run = make_run(
        tmp_path / "run",
        steps=500,
        start=2.7335,
        end=2.7150,
        noise=0.01,
        evals={0: 2.931, 250: 2.931, 500: 2.931},
        unquantised=None,
        keep=False,
        change={step: {"train/grad_norm": 0.0} for step in range(1, 501)}
        | {step: {"eval/loss": 2.9310, "eval/token_accuracy": 0.4, "eval/adapter_digest": "same"} for step in (0, 250, 500)},
    )
    run_change = outcomes(run)
    assert {name: outcome for name, outcome in short(run_change).items() if name.startswith("m")} == {
        "milestone train loss drop by step 500": "FAIL",
        "minimum train loss drop": "FAIL",
        "minimum eval loss drop": "FAIL",
        "minimum token accuracy gain in points": "FAIL",
        "minimum gradient norm in every step": "FAIL",
    }
    assert "to the last bit what they were" in run_change["minimum eval loss drop"].reason and run_change["all"].outcome == "FAIL"


def test_an_evaluation_file_of_other_rows_or_of_another_run_is_left_out_and_named(tmp_path):
    run = make_run(tmp_path / "run")
    other = rows_of(np.random.default_rng(9), 300, {"x": 1.0})["x"]
    record.save_evaluation(run, "step-000050", other, {"rows_digest": "rows-300", "adapter_digest": f"{50:012x}"})  # other rows
    arrays, metadata = record.read_evaluations(run)[100]
    record.save_evaluation(run, "step-000100", arrays, metadata | {"adapter_digest": "another"})  # another adapter
    arrays, metadata = record.read_evaluations(run)[150]
    record.save_evaluation(run, "step-000150", arrays | {"nll": arrays["nll"] * 2}, metadata)  # not the recorded loss
    notes = verdict.of_run(run).notes
    assert [any(name in note for note in notes) for name in ("step-000050", "step-000100", "step-000150", "step-000200")] == [
        True,
        True,
        True,
        False,
    ]


def test_damaged_lines_and_files_are_left_out_and_named(tmp_path):
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:9] + ["{broken\n"] + lines[10:]))
    (run / "evaluations" / "step-000100.safetensors").write_bytes(b"x")
    found = outcomes(run)
    assert found["minimum eval loss drop"].outcome == "PASS" and [
        any(name in note for note in found["all"].notes) for name in ("line 10", "step-000100")
    ] == [True, True]


@pytest.mark.parametrize(
    "tree",
    [
        {"train": {"max_steps": "many"}},
        {"model": {"quant": ["nf4"]}},
        {"eval": {"patience": "x", "min_delta": None}},
        {"train": {"max_steps": 0, "epochs": "1"}},
    ],
)
def test_settings_that_make_no_sense_do_not_keep_a_record_from_being_judged(tree):
    assert verdict.judge(
        tree, [{"step": 0, "eval/loss": 3.0}, {"step": 1, "train/loss": 3.0, "train/epoch": 1.0, "eval/loss": 2.0}], {}
    ).outcome in ("FAIL", "INCONCLUSIVE")


def test_evaluations_on_other_rows_than_the_last_ones_are_not_compared_with_it(tmp_path):
    run = make_run(tmp_path / "files")
    for key in (0, "unquantised"):
        arrays, metadata = record.read_evaluations(run)[key]
        record.save_evaluation(run, "unquantised" if key else "step-000000", arrays, metadata | {"rows_digest": "others"})
    found = outcomes(run)
    assert (
        found["minimum eval loss drop"].outcome == "INCONCLUSIVE"
        and "holds no evaluation loss of the untrained model" in found["minimum eval loss drop"].reason
    )
    counted = make_run(
        tmp_path / "counts",
        keep=False,
        change={step: {"eval/supervised_tokens": 100 if step < 200 else 300} for step in (0, 50, 100, 150, 200)},
    )
    assert outcomes(counted)["minimum eval loss drop"].measured is None
    assert len(verdict.of_run(counted).notes) == 4 and outcomes(counted)["optimal steady improvement"].outcome == "INCONCLUSIVE"


def test_a_run_that_started_from_an_adapter_is_judged_against_that_adapter(tmp_path):
    run = make_run(tmp_path / "run", evals={0: 2.2, 200: 2.1}, unquantised=3.9, sections={"lora": {"init_from": "runs/before"}})
    drop = outcomes(run)["minimum eval loss drop"]
    assert (
        drop.outcome == "FAIL"
        and drop.measured == pytest.approx(0.1, abs=0.05)
        and "against the adapter that it started from" in drop.reason
    )


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(
                [
                    "train/loss",
                    "train/grad_norm",
                    "train/skipped",
                    "train/epoch",
                    "train/samples",
                    "eval/loss",
                    "eval/token_accuracy",
                    "eval/samples",
                    "eval/unquantised_loss",
                    "eval/adapter_digest",
                    "eval/unquantised_token_accuracy",
                ]
            ),
            st.one_of(
                st.floats(allow_nan=True, allow_infinity=True), st.integers(-10, 10), st.text(max_size=5), st.just('[{"text": "a"}]')
            ),
        ),
        max_size=40,
    ),
    st.sampled_from(
        [{}, {"train": {"max_steps": 30}}, {"train": {"max_steps": 0, "epochs": 1.0}}, {"eval": {"patience": 2, "min_delta": 0.1}}]
    ),
)
def test_whatever_stands_in_a_record_it_is_answered(lines, tree):
    judged = verdict.judge(tree, [{**line, "step": i} for i, line in enumerate(lines)], {})
    assert judged.outcome in ("PASS", "FAIL", "INCONCLUSIVE")
    assert max(map(len, verdict.shown(judged).splitlines())) <= 80
    json.dumps(verdict.plain(judged), allow_nan=False)


# ------------------------------------------------------------------------------------------- steadiness and coherence


def steady(tmp_path, evals, **options):
    return outcomes(make_run(tmp_path / "run", evals=evals, **options))["optimal steady improvement"]


def test_improvement_is_steady_where_every_quarter_of_the_run_brings_some(tmp_path):
    criterion = steady(tmp_path, {step: 4.6 - 2.4 * step / 200 for step in range(0, 201, 25)})
    assert criterion.outcome == "PASS" and "0, 50, 100, 150, 200" in criterion.reason


def test_a_rise_in_one_quarter_is_not_steady(tmp_path):
    criterion = steady(tmp_path, {0: 4.6, 50: 2.0, 100: 3.5, 150: 2.0, 200: 1.5})
    assert criterion.outcome == "FAIL" and "from step 50 to 100" in criterion.reason and criterion.measured < -1


def test_a_quarter_that_cannot_be_told_from_flat_is_inconclusive(tmp_path):
    assert steady(tmp_path, {0: 4.6, 50: 3.0, 100: 2.5, 150: 2.498, 200: 2.0}).outcome == "INCONCLUSIVE"


def test_too_few_evaluations_say_nothing_of_steadiness(tmp_path):
    criterion = steady(tmp_path, {0: 4.6, 100: 3.0, 200: 2.5})
    assert criterion.outcome == "INCONCLUSIVE" and "eval.every_steps" in criterion.reason


@pytest.mark.parametrize(
    "text, share",
    [
        ("", 0),
        ("a b c", 0),
        ("a b c d e f", 0),
        ("a b c d a b c d", 1 / 5),
        ("the " * 64, 60 / 61),
        ("aaaa" * 400, 96 / 97),
        ("我们去我们去我们去", 3 / 6),
        ("- - - - - -", 2 / 3),
        ("00000000", 4 / 5),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_stood_before(text, share):
    assert verdict.repetition(text) == pytest.approx(share)


@pytest.mark.parametrize(
    "text, reference, f1",
    [
        ("list files", "list files", 1),
        ("", "list", 0),
        ("List FILES!", "list files", 4 / 5),
        ("files files files", "files", 1 / 2),
        ("red", "blue", 0),
    ],
)
def test_overlap_is_the_f1_of_words(text, reference, f1):
    assert verdict.overlap(text, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, True),
        ({"stopped": False}, False),
        ({"text": ""}, False),
        ({"text": "violet oranges dance"}, False),
        ({"text": "list the files of a " * 5}, False),
        ({"reference": ""}, True),
        ({"stopped": False, "reference": "list the files of a folder and all that lies below it, one a line"}, True),
    ],
)
def test_a_coherent_sample_ends_says_something_turns_in_no_circle_and_has_to_do_with_its_reference(change, expected):
    assert verdict.coherent(GOOD | change, config.Criteria()) is expected


def test_few_samples_are_inconclusive_and_many_decide(tmp_path):
    judged = lambda name, samples: outcomes(make_run(tmp_path / name, samples=samples))["optimal coherent samples"]
    few = judged("few", {0: [LOOP] * 4, 200: [GOOD] * 4})
    assert few.outcome == "INCONCLUSIVE" and "--eval.samples=16" in few.reason and few.measured == 1.0
    assert judged("many", {0: [LOOP] * 16, 200: [GOOD] * 15 + [LOOP]}).outcome == "PASS"
    assert judged("none", {0: [LOOP] * 16, 200: [LOOP] * 16}).outcome == "FAIL"
    assert judged("before", {0: [LOOP] * 16}).outcome == "INCONCLUSIVE"


# ------------------------------------------------------------------------------------------------------- when it ended


@pytest.mark.parametrize(
    "tree, lines, state",
    [
        ({"train": {"max_steps": 4}}, 4, "finished"),
        ({"train": {"max_steps": 5}}, 4, "unfinished"),
        ({}, 4, "unknown"),
        ({"train": {"max_steps": 0, "epochs": 0.04}}, 4, "finished"),
        ({"train": {"max_steps": 0, "epochs": 0.05}}, 4, "unfinished"),
        ({"train": {"max_steps": 9}, "eval": {"patience": 2, "min_delta": 0.0}}, 4, "stopped early"),
        ({"train": {"max_steps": 9}, "eval": {"patience": 3}}, 4, "unfinished"),
    ],
)
def test_whether_a_run_has_ended_is_read_from_its_settings_and_record(tree, lines, state):
    metrics = [{"step": 0, "eval/loss": 3.0}] + [
        {"step": i, "train/epoch": i / 100, "train/samples": 8, "eval/loss": 2.0 if i == 2 else 2.5} for i in range(1, lines + 1)
    ]
    assert verdict.progress(tree, metrics)["state"] == state


# ------------------------------------------------------------------------------------------------------------- command


def command(*arguments):
    return subprocess.run([sys.executable, PROJECT / "verdict.py", *map(str, arguments)], capture_output=True, text=True)


def test_the_command_prints_the_verdict_and_writes_it_beside_the_record(tmp_path):
    run = make_run(tmp_path / "run")
    done = command(run)
    assert (
        done.returncode == 0
        and done.stdout.startswith("verdict    PASS (minimum), run finished at step 200 of 200")
        and "minimum: PASS" in done.stdout
    )
    written = json.loads((run / "verdict.json").read_text())
    assert written["outcome"] == "PASS" and set(written["criteria"][0]) == {
        "set",
        "name",
        "outcome",
        "threshold",
        "measured",
        "low",
        "high",
        "reason",
    }
    assert written == json.loads(command(run, "--json").stdout)


@pytest.mark.parametrize("enforce, planned, code", [("none", 200, 0), ("minimum", 200, 0), ("optimal", 200, 5), ("optimal", 400, 0)])
def test_exit_code_5_where_a_finished_run_does_not_pass_what_is_enforced(tmp_path, enforce, planned, code):
    run = make_run(tmp_path / "run", planned=planned, sections={"criteria": {"enforce": enforce}})
    assert verdict.exit_code(verdict.of_run(run)) == code
    assert command(run).returncode == code


def test_the_optimal_set_cannot_be_enforced_past_a_minimum_that_fails(tmp_path):
    run = make_run(tmp_path / "run", change={3: {"train/grad_norm": 0.0}})
    assert verdict.of_run(run, [("criteria.enforce", "optimal")]).outcome == "FAIL"


def test_a_threshold_of_zero_leaves_its_criterion_out(tmp_path):
    keys = [
        key
        for key in config.Config().to_dict()["criteria"]
        if key.startswith(("milestone_train", "minimum_train", "minimum_eval", "minimum_token", "optimal"))
    ]
    judged = verdict.of_run(make_run(tmp_path / "run"), [(f"criteria.{key}", "0") for key in keys])
    assert (
        [c.name for c in judged.criteria] == ["gradient norm in every step"]
        and judged.outcome == "PASS"
        and judged.sets["optimal"] == "INCONCLUSIVE"
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["RUN", "--train.max_steps=3"], "only criteria"),
        (["RUN", "--criteria.perplexity=3"], "unknown key"),
        (["RUN", "--criteria.confidence=2"], "must be <= 0.99"),
        ([], "give one run folder"),
        (["nowhere"], "no such file"),
    ],
)
def test_bad_input_is_refused_in_one_message(tmp_path, arguments, said):
    run = make_run(tmp_path / "run")
    done = command(*[run if argument == "RUN" else argument for argument in arguments])
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"train": 3}'])
def test_a_broken_config_is_refused_by_name(tmp_path, content):
    run = make_run(tmp_path / "run")
    (run / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        verdict.of_run(run)


def test_a_record_without_settings_is_judged_by_the_plans_criteria(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.json").unlink()
    found = outcomes(run)
    assert found["minimum eval loss drop"].outcome == "PASS" and "run at step 200" in verdict.shown(found["all"])


def test_neither_torch_nor_a_plotting_library_is_needed():
    code = "import sys, verdict; sys.exit(bool({'torch', 'matplotlib', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0
