"""Alerts: each raised for its sickness, once, and for no healthy run however noisy; cheap and of bounded memory."""
import json
import math
import random
import time

import pytest
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st

import alerts
import config
import health
import schedule


def setup(steps=400, warmup=None, **sections):
    tree = {
        "train": {"max_steps": steps, "epochs": 0},
        "schedule": {"lr_warmup_steps": steps // 10 if warmup is None else warmup, **sections.pop("schedule", {})},
        **sections,
    }
    return config.from_dict(tree)


def healthy(settings_, seed=0, loss=None, norm=None, evals=5, rows=10_000, evaluated=None, noise=0.1):
    """Lines of a healthy run with the tags of ours: losses and norms by the functions of (step share, rng), else an exponential fall."""
    rng, steps = random.Random(seed), settings_.train.max_steps
    loss = loss or (lambda t, rng: 1.5 + 2.5 * math.exp(-5 * t) + rng.gauss(0, noise))
    norm = norm or (lambda t, rng: (0.5 + 0.3 * t) * math.exp(rng.gauss(0, 0.35)))
    evaluated = evaluated or (lambda t, rng: 1.6 + 2.4 * math.exp(-5 * t) + rng.gauss(0, 0.003))
    lines = [evaluation(0, evaluated(0, rng), "d0", 0.0)]
    for step in range(1, steps + 1):
        rate = schedule.learning_rate(step, settings_.schedule, steps)
        lines.append(
            {
                "step": step,
                "train/loss": loss(step / steps, rng),
                "train/grad_norm": norm(step / steps, rng),
                "train/learning_rate": rate,
                "train/samples": 32,
                "train/clip_threshold": settings_.schedule.clip_norm,
                "train/epoch": 32 * step / rows,
                "train/supervised_tokens": 500,
                "train/skipped": 0.0,
            }
        )
        if step % 25 == 0:
            lines[-1] |= {"adapters/lora_A_norm": 3 + step / 1e4, "adapters/lora_B_norm": step / 1e3}
        if step % max(1, steps // evals) == 0:
            lines[-1] |= evaluation(step, evaluated(step / steps, rng), f"d{step}", step / 1e4)
    return lines


def evaluation(step, loss, digest, delta, stop=True, text="a small answer", reference="a small answer"):
    samples = [{"prompt": "p", "reference": reference, "text": text, "tokens": 5, "stopped": stop}] * 3
    return {
        "step": step,
        "eval/loss": loss,
        "eval/adapter_digest": digest,
        "adapters/delta_ratio": delta,
        "eval/stop_rate": float(stop),
        "eval/samples": json.dumps(samples),
        "eval/overlap": 0.2 + 0.3 * min(1.0, step),
        "eval/repetition": 0.0,
        "eval/token_accuracy": 0.7,
        "adapters/modules": json.dumps({"q": [delta, 2.0, None], "v": [delta, 2.0, None]}),
    }


def raised(settings_, lines, upto=None):
    """[(step, finding)] of everything raised."""
    watch = alerts.Alerts(settings_, settings_.train.max_steps, 10_000)
    return [(line["step"], found) for line in lines[:upto] for found in watch.see(line)]


def alarms(settings_, lines):
    return [
        (step, found.severity, found.name, found.evidence)
        for step, found in raised(settings_, lines)
        if found.severity in ("fault", "warning")
    ]


def first(settings_, lines, name):
    """(step, finding) of the first alert of that name; KeyError where there is none."""
    found = {}
    for step, one in raised(settings_, lines):
        found.setdefault(one.name, (step, one))
    return found[name]


def changed(lines, change):
    """The lines with change(line) merged into each training step's."""
    return [line | (change(line) if "train/loss" in line else {}) for line in lines]


# -------------------------------------------------------------------------------------------------------- healthy runs

@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_healthy_noisy_run_raises_an_alarm(data):
    draw = lambda strategy: data.draw(strategy)
    steps, seed = draw(st.integers(20, 600)), draw(st.integers(0, 10**6))
    settings_ = setup(
        steps,
        warmup=draw(st.integers(0, steps // 2)),
        schedule={
            "clip_norm": draw(st.sampled_from([0.0, 0.3, 1.0, 5.0])),
            "lr_kind": draw(st.sampled_from(["cosine", "linear", "constant", "wsd"])),
        },
    )
    tails, start = draw(st.booleans()), draw(st.floats(1.0, 8.0))
    noise = draw(st.floats(0.0, 0.12 if tails else 0.35))
    floor, speed, onset = draw(st.floats(0.0, 0.8)), draw(st.floats(0.5, 30)), draw(st.floats(0.0, 0.7))
    base, growth, spread = draw(st.floats(1e-3, 10)), draw(st.floats(-3, 1)), draw(st.floats(0.05, 0.25 if tails else 0.5))

    def gauss(rng, deviation):  # with tails: Student's t of 5 degrees of freedom, up to what one of 2,000 values passes: more is a spike
        return deviation * max(-8, min(8, rng.gauss(0, 1) / (math.sqrt(rng.gammavariate(2.5, 2) / 5) if tails else 1)))

    course = lambda t: start * (floor + (1 - floor) * math.exp(-speed * max(0.0, t - onset)))
    lines = healthy(
        settings_,
        seed,
        evals=draw(st.integers(1, 12)),
        rows=draw(st.sampled_from([50, 10_000])),
        loss=lambda t, rng: course(t) * math.exp(gauss(rng, noise)),
        norm=lambda t, rng: base * math.exp(growth * t + gauss(rng, spread)),
        evaluated=lambda t, rng: 1.05 * course(t) + 0.02 + rng.gauss(0, 0.001),
    )
    flat = course(0) - course(1) < 0.15 * course(0)  # nothing to learn from is told, and rightly
    assert [alarm for alarm in alarms(settings_, lines) if not (flat and alarm[2] == "training loss flat")] == []


@pytest.mark.parametrize("seed", range(3))
def test_hard_but_healthy_courses_raise_no_alarm(seed):
    s = setup(400)
    plateau = lambda t, rng: (3.0 if t < 0.75 else 3.0 - 6 * (t - 0.75)) + rng.gauss(0, 0.05)
    by_heart = lambda t, rng: 3 * math.exp(-9 * t) * math.exp(rng.gauss(0, 0.3)) + (
        0.5 if rng.random() < 0.02 else 0
    )  # and a hard row now and then
    stairs = lambda t, rng: 3 - 0.4 * int(5 * t) + rng.gauss(0, 0.1)  # an epoch is a step down
    two_humps = lambda t, rng: (0.1 if rng.random() < 0.5 else 2.5) * math.exp(rng.gauss(0, 0.1))  # half of the batches known by heart
    assert (
        alarms(s, healthy(s, seed, plateau)) == []
        and alarms(s, healthy(s, seed, by_heart)) == []
        and alarms(s, healthy(s, seed, stairs)) == []
    )
    assert [alarm for alarm in alarms(s, healthy(s, seed, two_humps)) if alarm[2] != "training and evaluation disagree"] == []
    half = setup(400, warmup=200)
    assert alarms(half, healthy(half, seed, lambda t, rng: 4 - 1.5 * t * t + rng.gauss(0, 0.2))) == []


def test_the_recorded_run_of_approach_1_raises_no_alarm():
    """A real one: 2,000 steps on tldr, of which 98 % were clipped, and from 4.58 to 1.9 on unseen rows."""
    lines = [json.loads(line) for line in (PROJECT / "docs/findings/approach1-tldr/metrics.jsonl").read_text().splitlines()]
    c = config.read(PROJECT / "configs/approach1.json")
    found = raised(c, lines)
    assert {one.name: one.severity for _, one in found} == {"always clipped": "note"}


def test_a_resumed_run_raises_what_the_uninterrupted_one_would_have():
    s = setup(300)
    lines = changed(healthy(s), lambda line: {"train/grad_norm": 0.0} if line["step"] > 200 else {})
    watch = alerts.Alerts(s, 300, 10_000)
    for line in lines[:150]:
        watch.see(json.loads(json.dumps(line)))  # as read back
    assert [one.name for line in lines[150:] for one in watch.see(line)] == [one.name for step, one in raised(s, lines) if step > 149]


# ---------------------------------------------------------------------------------------------------------- sick runs

def test_dead_gradients_are_a_fault_after_three_steps_stop_the_run_and_are_told_once():
    s = setup()
    watch, told = alerts.Alerts(s, 400, 10_000), []
    for line in changed(healthy(s), lambda line: {"train/grad_norm": 0.0}):
        found = watch.see(line)
        told += [(line["step"], one.name, one.severity) for one in found if one.name == "dead gradients"]
        assert bool(watch.fatal(found)) == (line["step"] == 3)
    assert told == [(3, "dead gradients", "fault")]


def test_dead_gradients_that_come_back_are_told_again():
    s = setup()
    lines = changed(healthy(s), lambda line: {"train/grad_norm": 0.0} if line["step"] % 100 < 10 else {})
    assert [step for step, one in raised(s, lines) if one.name == "dead gradients"] == [3, 102, 202, 302]


def test_a_window_without_targets_is_not_dead_gradients():
    s = setup()
    empty = lambda line: (
        {"train/grad_norm": 0.0, "train/loss": 0.0, "train/supervised_tokens": 0, "train/skipped": 1.0} if line["step"] % 4 == 0 else {}
    )
    names = {one.name for _, one in raised(s, changed(healthy(s), empty))}
    assert "dead gradients" not in names and "steps not applied" in names
    single = first(s, changed(healthy(s), lambda line: {"train/grad_norm": 0.0} if line["step"] == 77 else {}), "steps without gradient")
    assert single[0] == 78 and "step 77" in single[1].evidence


def test_gradients_that_vanish_where_all_is_learnt_are_a_note():
    s = setup()
    rote = lambda t, rng: 3 * math.exp(-30 * t)
    lines = changed(
        healthy(s, loss=rote, evaluated=lambda t, rng: 0.001 + 3 * math.exp(-30 * t)),
        lambda line: {"train/grad_norm": 0.0} if line["train/loss"] < 1e-4 else {},
    )
    assert first(s, lines, "nothing left to learn")[1].severity == "note" and alarms(s, lines) == []


def test_rows_that_an_earlier_adapter_knows_by_heart_do_not_stop_the_run():
    s = setup(lora={"init_from": "somewhere"})
    known = healthy(s, loss=lambda t, rng: 4e-4 + rng.random() * 1e-4, evaluated=lambda t, rng: 1e-3 + 1e-5 * t)
    names = {one.name for _, one in raised(s, changed(known, lambda line: {"train/grad_norm": 0.0}))}
    assert "nothing left to learn" in names and "dead gradients" not in names


def test_a_loss_of_zero_from_the_start_is_a_fault():
    s = setup()
    assert first(s, changed(healthy(s), lambda line: {"train/loss": 0.0}), "loss of zero")[1].severity == "fault"


@pytest.mark.parametrize("value", [math.nan, "nan", "inf"])
def test_a_non_finite_loss_is_a_warning_and_three_in_a_row_a_fault(value):
    s = setup()
    bad = lambda *steps: changed(
        healthy(s), lambda line: {"train/loss": value, "train/grad_norm": math.nan, "train/skipped": 1.0} if line["step"] in steps else {}
    )
    told = lambda lines: [(step, one.severity) for step, one in raised(s, lines) if one.name == "non-finite training loss"]
    assert told(bad(50)) == [(50, "warning")] and told(bad(50, 51, 52, 53)) == [(50, "warning"), (52, "fault")]
    assert "non-finite gradient norm" not in {one.name for _, one in raised(s, bad(50))}  # it follows the loss


def test_fp16_finding_its_loss_scale_is_no_alarm_and_overflowing_all_the_time_is():
    s = setup()
    fp16 = lambda bad: changed(
        healthy(s),
        lambda line: {"train/loss_scale": 1024.0} | ({"train/grad_norm": math.inf, "train/skipped": 1.0} if bad(line["step"]) else {}),
    )
    assert alarms(s, fp16(lambda step: step < 12 or step == 200)) == []
    assert first(s, fp16(lambda step: step % 3 == 0), "steps not applied")[1].severity == "warning"


@pytest.mark.parametrize("threshold, severity", [(0.1, "note"), (1e-6, "warning")])
def test_always_clipped_is_a_note_unless_by_a_large_factor_and_never_clipped_is_one(threshold, severity):
    s = setup(schedule={"clip_norm": threshold})
    assert first(s, healthy(s), "always clipped")[1].severity == severity
    calm = setup(schedule={"clip_norm": 50.0})
    assert first(calm, healthy(calm), "never clipped")[1].severity == "note" and first(calm, healthy(calm), "never clipped")[0] == 100


@pytest.mark.parametrize("tag", ["train/loss", "train/grad_norm"])
def test_a_spike_of_a_hundred_times_is_told_at_once(tag):
    s = setup()
    step, found = first(
        s,
        changed(healthy(s), lambda line: {tag: 100 * line[tag]} if line["step"] == 123 else {}),
        f"spikes of the {'training loss' if tag[6:] == 'loss' else 'gradient norm'}",
    )
    assert step == 123 and found.severity == "warning" and "step 123" in found.evidence


def test_smaller_spikes_of_the_loss_are_a_note_until_three_fall_close_together():
    s = setup()
    spiky = changed(
        healthy(s, loss=lambda t, rng: 2.0 * math.exp(rng.gauss(0, 0.05))),
        lambda line: {"train/loss": 4.5} if line["step"] in (100, 150, 190) else {},
    )
    assert [(step, one.severity) for step, one in raised(s, spiky) if one.name == "spikes of the training loss"] == [
        (100, "note"),
        (190, "warning"),
    ]


def test_smaller_spikes_of_the_norm_are_a_note_however_many():
    """A model that knows most rows, and now and then a row that it does not: its loss barely shows it, and the step is bounded."""
    s = setup()
    learnt = changed(
        healthy(s, norm=lambda t, rng: (1.8 - 1.7 * t) * math.exp(rng.gauss(0, 0.1))),
        lambda line: {"train/grad_norm": 6.0} if line["step"] in (250, 300, 350, 390) else {},
    )
    assert [(step, one.severity) for step, one in raised(s, learnt) if one.name == "spikes of the gradient norm"][:1] == [(250, "note")]
    assert "spikes of the gradient norm" not in [one.name for _, one in raised(s, learnt) if one.severity != "note"]


def test_a_loss_that_climbs_diverges_early_and_one_that_loses_its_fall_is_warned_of():
    s = setup()
    step, found = first(s, healthy(s, loss=lambda t, rng: 4.6 + 3 * t + rng.gauss(0, 0.3)), "divergence")
    assert found.severity == "fault" and step < 200
    assert first(s, healthy(s, loss=lambda t, rng: 2 + 4 * abs(t - 0.4) + rng.gauss(0, 0.1)), "divergence")[1].severity == "warning"


def test_a_small_but_sure_rise_is_told_at_the_end():
    s = setup()
    step, found = first(s, healthy(s, loss=lambda t, rng: 2 + 0.1 * t + rng.gauss(0, 0.01)), "divergence")
    assert (step, found.severity) == (400, "warning")


def test_a_rate_far_too_high_is_told_within_some_tens_of_steps():
    s = setup(200)
    step, _ = first(s, healthy(s, loss=lambda t, rng: (4.5 if t < 0.05 else 9.5) + rng.gauss(0, 0.5)), "divergence")
    assert step <= 40


def test_a_plateau_is_a_note_and_a_loss_flat_to_the_end_a_warning():
    s = setup()
    still = healthy(s, loss=lambda t, rng: 2.7 + rng.gauss(0, 0.03))
    assert first(s, still, "plateau")[1].severity == "note" and first(s, still, "plateau")[0] < 300
    assert (
        first(s, still, "training loss flat") == (400, first(s, still, "training loss flat")[1])
        and first(s, still, "training loss flat")[1].severity == "warning"
    )
    assert "training loss flat" not in {one.name for _, one in raised(s, healthy(s))}


def test_a_plateau_that_ended_may_be_told_again():
    s = setup(800)
    level = lambda t: 3.0 if t < 0.45 else 3.0 - 10 * (t - 0.45) if t < 0.55 else 2.0
    told = [step for step, one in raised(s, healthy(s, loss=lambda t, rng: level(t) + rng.gauss(0, 0.02))) if one.name == "plateau"]
    assert len(told) == 2 and told[0] < 400 < told[1]


def test_a_loss_above_guessing_is_told_after_ten_steps():
    s = setup()
    assert first(s, healthy(s, loss=lambda t, rng: 16 * (4.6 - t)), "loss above guessing")[0] == 10


def test_a_training_loss_that_is_a_multiple_of_the_evaluation_loss_names_the_multiple():
    s = setup()
    eight = first(s, healthy(s, loss=lambda t, rng: 8 * (4 - t)), "training and evaluation disagree")[1]
    assert eight.severity == "warning" and "whole number 8" in eight.evidence
    assert "training and evaluation disagree" not in {one.name for _, one in raised(s, healthy(s, loss=lambda t, rng: 5 - t))}


@pytest.mark.parametrize("rate, told", [(0.1, True), (0.02, False), (1e-3, False)])
def test_a_rate_that_moves_weights_by_their_own_size_is_told(rate, told):
    s = setup(schedule={"learning_rate": rate})
    assert ("high rate" in {one.name for _, one in raised(s, healthy(s))}) == told


def test_what_was_acknowledged_of_the_forecast_is_not_raised_again():
    s = setup(schedule={"learning_rate": 0.1}, forecast={"acknowledge": ["high rate"]})
    assert "high rate" not in {one.name for _, one in raised(s, healthy(s))}


def test_a_rate_that_dies_early_is_told_when_it_does_and_the_end_of_a_cosine_after_an_epoch_is_not():
    s = setup(400, schedule={"lr_kind": "points", "lr_points": [[0, 1.0], [150, 0.0]], "lr_min": 0.0})
    step, found = first(s, healthy(s), "rate ends at nothing")
    assert 150 <= step <= 160 and found.severity == "warning"
    cosine = setup(400, schedule={"lr_min": 0.0})
    assert "rate ends at nothing" not in {one.name for _, one in raised(cosine, healthy(cosine))}
    unseen = healthy(cosine, rows=100_000)
    assert "12.8%" in first(cosine, unseen, "rate ends at nothing")[1].evidence or first(cosine, unseen, "rate ends at nothing")[0] > 370


def test_the_same_evaluation_loss_twice_is_a_fault_and_says_whether_the_adapters_moved():
    s = setup()
    stale = healthy(s, evaluated=lambda t, rng: 2.9310123)
    step, found = first(s, stale, "evaluation frozen")
    assert step == 80 and found.severity == "fault" and "other weights" in found.cause
    assert [step for step, one in raised(s, stale) if one.name == "evaluation frozen"] == [80]  # once, though it lasts


def test_evaluations_before_any_rate_was_spent_may_agree():
    s = setup(400, warmup=200, schedule={"learning_rate": 1e-9, "lr_min": 0.0})
    assert "evaluation frozen" not in {one.name for _, one in raised(s, healthy(s, evaluated=lambda t, rng: 2.9310123))}


@pytest.mark.parametrize(
    "change",
    [
        {"eval/adapter_digest": "same"},
        {"adapters/delta_ratio": 0.0},
        {"adapters/modules": json.dumps({"q": [0.1, 1, None], "v": [0.0, 0, None]})},
    ],
)
def test_adapters_that_never_moved_are_told_by_digest_change_or_module(change):
    s = setup()
    lines = [line | change if "eval/loss" in line else line for line in healthy(s)]
    step, found = first(s, lines, "adapters never moved")
    assert step == 80 and found.severity == "fault"


@pytest.mark.parametrize("matrix", "AB")
def test_a_matrix_whose_norm_repeats_never_moved(matrix):
    s = setup()
    lines = [line | {f"adapters/lora_{matrix}_norm": 3.25} if "adapters/lora_A_norm" in line else line for line in healthy(s)]
    assert first(s, lines, "adapters never moved")[0] == 75


def test_adapters_that_change_the_model_before_training_are_told_unless_they_were_loaded():
    lines = healthy(setup())
    lines[0]["adapters/delta_ratio"] = 0.3
    assert first(setup(), lines, "adapters do not start at zero")[0] == 0
    loaded = setup(lora={"init_from": "somewhere"})
    assert "adapters do not start at zero" not in {one.name for _, one in raised(loaded, lines)}


def test_an_evaluation_worse_than_before_training_is_told_at_once_where_it_is_far_and_else_by_two():
    s = setup()
    told = lambda evaluated: [
        step for step, one in raised(s, healthy(s, evaluated=evaluated)) if one.name == "evaluation worse than before training"
    ]
    assert told(lambda t, rng: 4.0 + 1.0 * t + (0 if t else 0)) == [240, 400] or told(lambda t, rng: 4.0 + 1.0 * t)[0] <= 240
    assert told(lambda t, rng: 4.0 if t == 0 else 9.0) == [80]
    assert told(lambda t, rng: 4.1 if 0 < t < 0.3 else 4.0 - t) == []


def test_an_evaluation_that_rises_while_the_training_loss_falls_is_a_growing_gap():
    s = setup()
    rising = healthy(
        s, loss=lambda t, rng: 3 - 2 * t + rng.gauss(0, 0.05), evaluated=lambda t, rng: 3 - t if t < 0.5 else 2.6 + 0.8 * (t - 0.5)
    )
    step, found = first(s, rising, "growing gap")
    assert step == 320 and "step 160" in found.remedy
    both = healthy(s, loss=lambda t, rng: 3 - 2 * t + rng.gauss(0, 0.05), evaluated=lambda t, rng: 3 - 0.5 * t)
    assert "growing gap" not in {one.name for _, one in raised(s, both)}


def test_an_evaluation_that_stands_while_the_training_loss_falls_in_the_first_pass_does_not_follow():
    s = setup()
    told = lambda rows, evaluated: [
        step for step, one in raised(s, healthy(s, rows=rows, evaluated=evaluated)) if one.name == "evaluation does not follow training"
    ]
    assert told(100_000, lambda t, rng: 3.9 - 0.2 * t) == [80]
    assert told(100, lambda t, rng: 3.9 - 0.2 * t) == []  # rows seen 25 times by then may be known by heart
    assert told(100_000, lambda t, rng: 4.0 - 3 * t) == []


def test_a_norm_of_B_above_zero_before_training_is_a_fault_unless_an_adapter_was_given():
    s = setup()
    lines = lambda norm: [healthy(s)[0] | {"adapters/lora_B_norm": norm}]
    assert first(s, lines(0.3), "adapters do not start at zero")[1].severity == "fault" and raised(s, lines(0.0)) == []
    assert raised(setup(lora={"init_from": "somewhere"}), lines(0.3)) == []


def test_damage_by_quantisation_is_told_beyond_what_nf4_usually_costs():
    s = setup()
    with_loss = lambda loss: [healthy(s)[0] | {"eval/unquantised_loss": loss}]
    assert first(s, with_loss(1.0), "damage by quantisation")[0] == 0 and raised(s, with_loss(3.3)) == []


def test_samples_are_judged_from_half_of_the_run_on_by_their_references():
    s = setup()
    swapped = lambda **sample: [
        line
        | (
            {
                name: value
                for name, value in evaluation(line["step"], 0, "", 0, **sample).items()
                if name in ("eval/samples", "eval/stop_rate")
            }
            if "eval/loss" in line
            else {}
        )
        for line in healthy(s)
    ]
    names = lambda lines: {one.name: step for step, one in raised(s, lines)}
    on_and_on = "one two three four five six seven eight nine ten eleven twelve"
    assert names(swapped(stop=False, text=on_and_on)) == {"samples never stop": 240}
    assert names(swapped(stop=False, text=on_and_on, reference=3 * on_and_on)) == {}  # cut off by eval.max_new_tokens
    unable = lambda lines, **change: [line | change if "eval/loss" in line else line for line in lines]
    free = swapped(reference="")  # prompts of one's own have no reference: samples that stopped and no longer do are told
    assert names([*free[:100], *swapped(stop=False, reference="", text=on_and_on)[100:]]) == {"samples never stop": 240} and names(free) == {}
    assert names(unable(swapped(stop=False, text=on_and_on), **{"eval/token_accuracy": 0.4})) == {}  # bad, but for want of training
    assert names(unable(swapped(stop=False, text=on_and_on), **{"eval/overlap": 0.0, "eval/token_accuracy": 0.55})) == {}
    assert names(swapped(text="the cat sat on " * 8)) == {"samples repeat themselves": 240}
    assert names(swapped(text="red " * 12, reference="red " * 12)) == {}  # as they should


def test_samples_that_do_not_follow_the_loss_are_told():
    s = setup()

    def told(**figures):
        lines = [line | figures if "eval/loss" in line else line for line in healthy(s)]
        return [one.severity for _, one in raised(s, lines) if one.name == "samples do not follow the loss"]

    assert told(**{"eval/overlap": 0.02, "eval/token_accuracy": 0.9}) == ["warning"]
    assert told(**{"eval/overlap": 0.5, "eval/token_accuracy": 0.9}) == []
    assert told(**{"eval/overlap": 0.0, "eval/token_accuracy": 0.5}) == []  # a model that has barely begun writes nothing right yet
    one_sample = json.dumps(json.loads(evaluation(0, 0, "", 0)["eval/samples"])[:1])
    assert told(**{"eval/overlap": 0.0, "eval/token_accuracy": 0.8, "eval/samples": one_sample}) == []  # one may be bad luck
    six = lambda text: json.dumps([{"prompt": "p", "text": text, "stopped": True, "reference": "red fox"}] * 6)
    assert told(**{"eval/overlap": 0.0, "eval/token_accuracy": 0.6, "eval/samples": six("cat")}) == []
    assert told(**{"eval/overlap": 0.0, "eval/token_accuracy": 0.6, "eval/samples": six(" \n")}) == ["warning"]  # wrong in the first token, all of them


def test_what_the_gradient_proof_says_by_its_own_word_counts_before_its_figures():
    s = setup()
    proof = lambda outcome, **figures: [healthy(s)[0] | {"proof/outcome": outcome, **figures}]
    dead = first(s, proof("dead: 14 of 28 adapter matrices"), "dead gradients")[1]
    assert dead.severity == "fault" and "14 of 28" in dead.evidence
    assert first(s, proof("wrong: WRONG in a part", **{"proof/ratio": 1.0, "proof/tolerance": 0.1}), "wrong gradients")
    assert raised(s, proof("open: too rough", **{"proof/ratio": 0.2, "proof/tolerance": 0.1})) == []
    assert raised(s, proof("proved: all", **{"proof/ratio": 1.0, "proof/tolerance": 0.1})) == []


def test_a_run_without_a_supervised_token_is_a_fault_and_some_such_steps_a_warning():
    s = setup()
    lines = lambda empty: [line | ({"train/supervised_tokens": 0, "train/skipped": 1.0, "train/grad_norm": 0.0, "train/loss": 0.0} if empty(line["step"]) else {})
                           for line in healthy(s)]
    step, fault = first(s, lines(lambda step: step > 0), "steps not applied")
    assert step == 3 and fault.severity == "fault" and "--preview" in fault.remedy
    assert first(s, lines(lambda step: step % 5 == 0), "steps not applied")[1].severity == "warning"
    assert not any(one.name == "steps not applied" for _, one in raised(s, lines(lambda step: step in (7, 30))))


def test_a_gradient_proof_outside_its_tolerance_is_a_fault():
    s = setup()
    proof = lambda ratio: [healthy(s)[0] | {"proof/ratio": ratio, "proof/tolerance": 0.05}]
    assert (
        first(s, proof(0.4), "wrong gradients")[1].severity == "fault"
        and first(s, proof(math.nan), "wrong gradients")
        and raised(s, proof(1.03)) == []
    )


def test_noise_far_above_the_batch_is_a_note():
    s = setup()
    lines = changed(healthy(s), lambda line: {"train/noise_scale": 5000.0} if line["step"] % 20 == 0 else {})
    assert first(s, lines, "noisy gradients")[1].severity == "note" and "noisy gradients" not in {
        one.name for _, one in raised(s, changed(healthy(s), lambda line: {"train/noise_scale": 100.0}))
    }


# -------------------------------------------------------------------------------------------------- settings and costs

def test_every_name_that_is_raised_can_be_named_in_the_configuration_and_ignored():
    s = setup(alerts={"ignore": ["dead gradients", "plateau", "training loss flat"], "stop": []})
    lines = changed(healthy(s, loss=lambda t, rng: 2.7 + rng.gauss(0, 0.03)), lambda line: {"train/grad_norm": 0.0})
    assert raised(s, lines) == []
    source = (PROJECT / "alerts.py").read_text() + (PROJECT / "rules.py").read_text()
    for name in config.ALERTS:
        assert name in source or name.removeprefix("non-finite ") in source or name.removeprefix("spikes of the ") in source, name
    for key in ("stop", "ignore"):
        with pytest.raises(ValueError, match=f"alerts.{key}: there is no \"dead\""):
            config.from_dict({"alerts": {key: ["dead"]}})


def test_what_is_raised_becomes_the_text_of_its_tag():
    s = setup()
    found = [one for _, one in raised(s, changed(healthy(s), lambda line: {"train/grad_norm": 0.0}))]
    assert {"name", "severity", "evidence", "cause", "remedy"} == set(json.loads(alerts.as_text(found))[0])


def test_a_step_costs_well_under_a_fifth_of_a_millisecond_and_memory_is_bounded():
    s = setup(20_000)
    lines = healthy(s)
    watch = alerts.Alerts(s, 20_000, 10_000)
    start = time.perf_counter()
    for line in lines:
        watch.see(line)
    assert (time.perf_counter() - start) / len(lines) < 2e-4
    held = [len(value) for owner in (watch, *watch.spikes.values()) for value in vars(owner).values() if hasattr(value, "__len__")]
    assert max(held) <= max(500, watch.size)


def test_a_record_gets_the_same_names_from_the_diagnosis_as_from_its_alerts():
    s = setup()
    sick = changed(
        healthy(s, evaluated=lambda t, rng: 2.9310123), lambda line: {"train/grad_norm": 0.0, "train/loss": 2.7 + line["step"] % 7 / 100}
    )
    told = {one.name for _, one in raised(s, sick) if one.severity == "fault"}
    judged = {one.name for one in health.diagnose(health.to_record("test", sick)) if one.severity == "fault"}
    assert told == judged == {"dead gradients", "evaluation frozen"}


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 0}],
        [{"step": 5, "train/loss": "nan"}],
        [{"step": 1, "train/loss": 2.0}],
        [{"step": 0, "eval/loss": math.nan}], [{"step": 1, "train/grad_norm": 0.5}],
        [{"step": 0, "eval/loss": 1.0, "eval/samples": "{broken", "adapters/modules": "[1]"}],
        [{"step": 1, "train/loss": -1.0, "train/grad_norm": 1e-300}],
    ],
)
def test_lines_that_hold_little_or_nonsense_are_survived(lines):
    raised(setup(), lines)
