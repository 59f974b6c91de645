"""Rates, batch sizes and clipping thresholds against formulas written another way, for every step."""
import math

import numpy as np
import pytest
from conftest import PROJECT
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import config
import schedule


def settings_of(**changes):
    return config.from_dict({"schedule": changes}).schedule


def rates(max_steps, **changes):
    return [schedule.learning_rate(step, settings_of(**changes), max_steps) for step in range(1, max_steps + 1)]


# --------------------------------------------------------------------------------------------------------------- rates

def reference(kind, peak, floor, warmup, max_steps, decay=0, points=()):
    """Rates of all steps as one array: a ramp, then a shape over a linspace that begins at the peak and ends with the run."""
    ramp = peak * np.arange(1, warmup + 1) / max(warmup, 1)
    rest = max_steps - max(warmup, 1) + 1  # steps from the peak to the last, both counted
    if kind == "points":
        steps = np.arange(1, max_steps + 1)
        shape = np.maximum(floor, peak * np.interp(steps, [p[0] for p in points], [p[1] for p in points]))
        return np.concatenate((ramp, shape[warmup:]))[:max_steps]
    if kind == "constant":
        shape = np.full(max(rest, 1), peak)
    elif kind == "linear":
        shape = np.linspace(peak, floor, max(rest, 1))
    elif kind == "cosine":
        shape = floor + (peak - floor) * np.cos(np.linspace(0, np.pi / 2, max(rest, 1))) ** 2  # half-angle form
    else:
        falling = min(decay or max(1, max_steps // 5), rest - 1)
        shape = np.concatenate((np.full(max(rest - falling, 0), peak), np.linspace(peak, floor, max(falling, 0) + 1)[1:]))
    return np.concatenate((ramp[:-1], shape))[:max_steps] if warmup else shape[:max_steps]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd", "points"])
@pytest.mark.parametrize("warmup, max_steps", [(0, 1), (1, 1), (0, 2), (0, 50), (1, 50), (7, 50), (49, 50), (50, 50), (80, 50)])
def test_the_rate_of_every_step_is_its_formulas(kind, warmup, max_steps):
    points = [[5, 1.0], [20, 0.25], [40, 0.0]] if kind == "points" else []
    got = rates(max_steps, lr_kind=kind, learning_rate=3e-4, lr_min=2e-5, lr_warmup_steps=warmup, lr_points=points)
    np.testing.assert_allclose(got, reference(kind, 3e-4, 2e-5, warmup, max_steps, points=points), rtol=1e-12)


@pytest.mark.parametrize("decay", [1, 10, 43, 500])
def test_wsd_decays_over_its_last_steps(decay):
    got = rates(50, lr_kind="wsd", learning_rate=1e-3, lr_min=0.0, lr_warmup_steps=7, lr_decay_steps=decay)
    np.testing.assert_allclose(got, reference("wsd", 1e-3, 0.0, 7, 50, decay), atol=1e-18)
    assert got[-1] == 0.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_begins_at_one_part_in_w_and_is_never_zero(kind):
    got = rates(40, lr_kind=kind, learning_rate=1e-3, lr_min=0.0, lr_warmup_steps=8)
    assert got[0] == 1e-3 / 8 and got[7] == 1e-3 == max(got)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_without_warm_up_the_first_step_has_the_peak_even_if_it_is_the_only_one(kind):
    for max_steps in (1, 2, 100):
        assert rates(max_steps, lr_kind=kind, learning_rate=1e-3, lr_min=1e-5, lr_warmup_steps=0)[0] == 1e-3


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_floor_and_none_after_the_peak_lies_below_it(kind):
    got = rates(60, lr_kind=kind, learning_rate=1e-3, lr_min=1e-4, lr_warmup_steps=6)
    assert got[-1] == pytest.approx(1e-4, rel=1e-12) and min(got[5:]) >= 1e-4 * (1 - 1e-12)
    assert all(later <= earlier for earlier, later in zip(got[5:], got[6:]))


def test_the_failed_runs_rates_add_up_to_what_is_known_of_it():
    c = config.read(PROJECT / "configs/seed-failure.json")
    total = math.fsum(schedule.learning_rate(step, c.schedule, c.train.max_steps) for step in range(1, c.train.max_steps + 1))
    assert total == pytest.approx(0.0125, rel=1e-9)  # 500 steps at half of 5e-5


def test_rates_depend_on_the_step_alone():
    asked = settings_of(lr_kind="cosine", lr_warmup_steps=5)
    forwards = [schedule.learning_rate(step, asked, 30) for step in range(1, 31)]
    assert [schedule.learning_rate(step, asked, 30) for step in range(30, 0, -1)] == forwards[::-1]


# ---------------------------------------------------------------------------------------------------- samples a step

def run_of(batch_points=(), micro=2, accumulation=3, **train):
    return config.from_dict({"train": {"micro_batch_size": micro, "accumulation": accumulation, **train}, "schedule": {"batch_points": [list(p) for p in batch_points]}})


batch_points = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 50)), max_size=5, unique_by=lambda point: point[0]).map(sorted)


@given(batch_points, st.integers(1, 60))
@hypothesis_settings(max_examples=200, deadline=None)
def test_windows_tile_the_stream_without_gap_or_overlap(points, max_steps):
    c = run_of(points, max_steps=max_steps)
    steps, total = schedule.plan_steps(c, train_rows=17)
    position, size = 0, c.samples_per_step
    sizes = dict(points) | ({1: dict(points)[0]} if 0 in dict(points) and 1 not in dict(points) else {})  # step 0 is before the first
    for step in range(1, steps + 1):
        size = sizes.get(step, size)
        assert schedule.window_samples(step, c, total) == (position, size)
        position += size
    assert (steps, position) == (max_steps, total)


@given(batch_points, st.floats(0.01, 5.0), st.integers(1, 300))
@hypothesis_settings(max_examples=200, deadline=None)
def test_epochs_are_covered_to_the_last_sample_by_as_few_steps_as_it_takes(points, epochs, rows):
    c = run_of(points, max_steps=0, epochs=epochs)
    steps, total = schedule.plan_steps(c, rows)
    windows = [schedule.window_samples(step, c, total) for step in range(1, steps + 1)]
    assert total == max(1, round(epochs * rows)) == sum(count for _, count in windows)
    assert all(count >= 1 for _, count in windows) and all(start + count == later for (start, count), (later, _) in zip(windows, windows[1:]))


def test_the_last_window_of_an_epoch_takes_what_is_left():
    c = run_of(micro=2, accumulation=4, max_steps=0, epochs=2.0)
    assert schedule.plan_steps(c, 23) == (6, 46)
    assert [schedule.window_samples(step, c, 46) for step in (1, 5, 6)] == [(0, 8), (32, 8), (40, 6)]


def test_the_batch_size_grows_where_the_points_say():
    c = run_of([[1, 4], [3, 8], [6, 32]], max_steps=7)
    assert [schedule.samples_at(step, c) for step in range(1, 8)] == [4, 4, 8, 8, 8, 32, 32]
    assert schedule.samples_before(8, c) == 4 * 2 + 8 * 3 + 32 * 2


# ------------------------------------------------------------------------------------------------------------ clipping

@given(st.lists(st.floats(1e-6, 1e6), min_size=0, max_size=60), st.floats(0.1, 100), st.integers(10, 30), st.floats(0.01, 1e7))
@hypothesis_settings(max_examples=300, deadline=None)
def test_the_adaptive_threshold_is_the_percentile_of_recent_norms_and_never_above_clip_norm(norms, percentile, window, clip_norm):
    asked = settings_of(clip_norm=clip_norm, clip_percentile=percentile, clip_window=window)
    expected = clip_norm if len(norms) < 10 else min(clip_norm, np.percentile(norms[-window:], percentile))
    assert schedule.clip_threshold(norms, asked) == pytest.approx(expected, rel=1e-9)


def test_without_a_percentile_the_threshold_is_clip_norm_and_without_that_there_is_none():
    assert schedule.clip_threshold([5.0] * 50, settings_of(clip_norm=0.7)) == 0.7
    assert schedule.clip_threshold([5.0] * 50, settings_of(clip_norm=0.0)) == math.inf
