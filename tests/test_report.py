"""report.py: what it states of whole, short, interrupted and damaged records, read off the page and off the drawn axes."""
import json
import math

import numpy as np
import pytest

import config
import report

SAMPLES = [{"prompt": "what | is <b>?", "reference": "two\nlines", "text": "a `b` *c* <script>", "tokens": 4, "stopped": False}]


def write_run(folder, steps=40, planned=40, evals=(0, 20, 40), change=None):
    """A run folder whose loss falls from 5 by 0.05 a step. change: {step: {tag: value}} on top."""
    folder.mkdir()
    lines = []
    for step in range(0, steps + 1):
        line = {"step": step}
        if step:
            line |= {"train/learning_rate": 1e-4, "train/clip_threshold": 1.0, "train/samples": 32, "train/tokens": 2000, "train/supervised_tokens": 500, "train/epoch": step / 100,
                     "train/loss": 5 - 0.05 * step, "train/grad_norm": 2.0, "train/skipped": 0.0, "train/seconds": 0.5, "train/tokens_per_second": 4000.0, "train/peak_memory_gib": 1.25}
        if step in evals:
            line |= {"eval/loss": 6 - 0.05 * step, "eval/perplexity": 20.0, "eval/token_accuracy": 0.25 + step / 400, "eval/seconds": 2.0, "eval/stop_rate": 0.0, "eval/samples": json.dumps(SAMPLES)}
        line |= (change or {}).get(step, {})
        if len(line) > 1:
            lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config.from_dict({"model": {"path": "/home/someone/models/tiny"}, "train": {"max_steps": planned}, "lora": {"rslora": True}}).to_dict()), encoding="utf-8")
    return folder


def page_of(run):
    assert report.main([str(run)]) == 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    return (run / "report.md").read_text(encoding="utf-8")


def drawn(run):
    """The loss panel's axes, still open, and what was drawn in it by label."""
    figure, axis = report.plt.subplots()
    report.draw_loss(axis, report.read_run(run)[0])
    report.plt.close(figure)
    return axis, {line.get_label(): line.get_xydata() for line in axis.lines}


def test_first_and_last_figures_are_medians_over_a_quarter_of_a_short_run(tmp_path):
    page = page_of(write_run(tmp_path / "run", change={20: {"eval/loss": 3.5}}))
    assert "training loss, nats a token (median of 10 steps) | 4.7250 | 3.2250 | -1.5000" in page  # medians of 4.95 … 4.50 and 3.45 … 3.00
    assert "evaluation loss, nats a token | 6.0000 (step 0) | 4.0000 (step 40) | -2.0000 | 3.5000 (step 20) |" in page
    assert "token accuracy | 0.2500 (step 0) | 0.3500 (step 40) | +0.1000 | 0.3500 (step 40) |" in page
    assert "40 of 40 planned steps" in page and "interrupted" not in page


def test_a_single_wild_step_moves_no_figure(tmp_path):
    calm, wild = write_run(tmp_path / "calm"), write_run(tmp_path / "wild", change={1: {"train/loss": 1e6}})
    figures = lambda run: report.first_and_last(report.read_run(run)[0])[0][1:]
    assert abs(float(figures(calm)[0]) - float(figures(wild)[0])) <= 0.051
    _, lines = drawn(wild)
    assert lines["median of 9 steps"][:, 1].max() < 6 < lines["training"][:, 1].max()


def test_the_picture_shows_every_evaluation_with_its_value(tmp_path):
    axis, lines = drawn(write_run(tmp_path / "run"))
    assert lines["evaluation"].tolist() == [[0, 6.0], [20, 5.0], [40, 4.0]]
    assert {text.get_text() for text in axis.texts} == {"6.000", "5.000", "4.000"}


def test_many_evaluations_are_labelled_at_first_best_and_last_only(tmp_path):
    axis, lines = drawn(write_run(tmp_path / "run", evals=range(0, 41, 4), change={12: {"eval/loss": 1.5}}))
    assert len(lines["evaluation"]) == 11
    assert [text.get_text() for text in axis.texts] == ["6.000", "1.500", "4.000"]


def test_a_run_without_evaluations_is_reported_and_says_what_is_missing(tmp_path):
    page = page_of(write_run(tmp_path / "run", evals=()))
    assert "no evaluation in the record" in page and "No samples" in page and "evaluation loss, nats" not in page


def test_one_step_is_reported_without_a_change_being_claimed(tmp_path):
    page = page_of(write_run(tmp_path / "run", steps=1, planned=1, evals=()))
    assert "One training step says nothing" in page
    assert "training loss, nats a token (single steps) | 4.9500 | 4.9500 | – |" in page


def test_an_evaluation_before_any_step_is_reported_alone(tmp_path):
    page = page_of(write_run(tmp_path / "run", steps=0))
    assert "one evaluation, after step 0" in page and "0 training steps are too few" in page
    assert "Samples were taken once" in page


def test_a_run_that_did_not_reach_its_end_is_told_as_such(tmp_path):
    page = page_of(write_run(tmp_path / "run", steps=30, planned=40, evals=(0, 20)))
    assert "30 of 40 planned steps" in page and "interrupted" in page
    assert "5.0000 (step 20) | -1.0000" in page


def test_steps_that_are_not_finite_are_counted_and_left_out_of_medians(tmp_path):
    bad = {"train/loss": "nan", "train/grad_norm": "inf", "train/skipped": 1.0}
    run = write_run(tmp_path / "run", change={2: bad, 38: bad, 20: {"eval/loss": "nan"}})
    page = page_of(run)
    assert "not finite in 2 of 40 steps (2, 38)" in page and "2 steps were not applied" in page
    assert "evaluation loss is not finite after step 20" in page
    first, last = (float(value) for value in report.first_and_last(report.read_run(run)[0])[0][1:3])
    assert 4.5 < first < 4.95 and 3 < last < 3.45
    _, lines = drawn(run)
    assert lines["loss not finite"][:, 0].tolist() == [2, 38]
    assert np.isfinite(lines["median of 9 steps"]).all()


def test_a_record_of_nothing_but_nan_is_still_a_page(tmp_path):
    bad = {"train/loss": "nan", "train/grad_norm": "nan", "train/skipped": 1.0}
    page = page_of(write_run(tmp_path / "run", evals=(), change={step: bad for step in range(1, 41)}))
    assert "not finite in 40 of 40 steps" in page and "| nan | nan |" in page


def test_gradient_norms_of_exactly_zero_are_named(tmp_path):
    assert "exactly 0 in 2 steps" in page_of(write_run(tmp_path / "run", change={3: {"train/grad_norm": 0.0}, 4: {"train/grad_norm": 0.0}}))


def test_missing_lines_are_counted(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:10] + lines[13:]))
    assert "3 of these steps have no line" in page_of(run)


def test_a_run_without_clipping_is_drawn_without_its_line(tmp_path):
    run = write_run(tmp_path / "run", change={step: {"train/clip_threshold": "inf"} for step in range(1, 41)})
    figure, axis = report.plt.subplots()
    report.draw_norms(axis, report.read_run(run)[0])
    report.plt.close(figure)
    assert "clipped above" not in [line.get_label() for line in axis.lines] and math.isfinite(axis.get_ylim()[1])


def test_what_a_model_wrote_cannot_break_the_page(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    row = next(line for line in page.splitlines() if "what &#124; is" in line)
    assert row.count("|") == 5 and "<script>" not in page and "two<br>lines" in row and "\\`b\\`" in row
    assert row.count("*(did not stop)*") == 2


def test_settings_off_their_defaults_are_listed_without_folders_of_the_machine(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert "| `lora.rslora` | `true` |" in page and "`models/tiny`" in page and "someone" not in page and "adam_eps" not in page


def test_time_tokens_and_memory_are_sums_and_the_peak(tmp_path):
    page = page_of(write_run(tmp_path / "run", change={7: {"train/peak_memory_gib": 3.5}}))
    assert "| time in steps | 20.0 s |" in page and "| time in evaluations, without samples | 6.0 s |" in page
    assert "80,000, of them supervised 20,000" in page and "3.50 GiB of the process" in page


def test_a_record_alone_is_enough(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.json").unlink()
    assert "settings are not known" in page_of(run)


def test_picture_writes_that_file_and_nothing_else(tmp_path):
    run = write_run(tmp_path / "run")
    before = {path.name for path in run.iterdir()}
    assert report.main([str(run), f"--picture={tmp_path / 'loss.png'}"]) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") and {path.name for path in run.iterdir()} == before


@pytest.mark.parametrize("argv, what", [([], "give one run folder"), (["a", "b"], "give one run folder"), (["none-such"], "no such file"), (["none-such", "--train.seed=1"], "give one run folder")])
def test_a_wrong_command_line_is_refused_with_the_right_one(argv, what):
    with pytest.raises(ValueError, match=what):
        report.main(argv)


def test_an_empty_or_damaged_run_is_refused_by_name_and_nothing_is_written(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        report.main([str(run)])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no finished step yet"):
        report.main([str(run)])
    assert not (run / "report.md").exists() and not (run / "curves.png").exists()
