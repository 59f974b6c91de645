"""report.py and plots.py: what they state of whole, short, interrupted and damaged records, read off the page and off the drawn axes."""
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from matplotlib.figure import Figure

import config
import plots
import record
import report
import words

SAMPLES = [{"prompt": "what | is <b>?", "reference": "two\nlines", "text": "a `b` *c* <script>", "tokens": 4, "stopped": False}]
MODULES = {f"model.layers.{layer}.{part}": [0.01 * (layer + 1), 4.0 + layer, 0.2] for layer in range(3)
           for part in ("self_attn.q_proj", "mlp.down_proj")}
VERDICT = {"outcome": "FAIL", "judged": ["minimum"], "rows": 1309, "confidence": 0.95, "sets": {"minimum": "PASS", "optimal": "FAIL"},
           "notes": [], "criteria": [
    {"set": "minimum", "name": "eval loss down", "outcome": "PASS", "threshold": 0.2, "measured": 1.77, "low": 1.7, "high": 1.85,
     "reason": "The whole interval lies above 0.2."},
    {"set": "optimal", "name": "perplexity", "outcome": "FAIL", "threshold": 6.0, "measured": 8.61, "low": 8.3, "high": 8.9,
     "reason": "The whole interval lies above 6."}]}
ALERT = {"name": "loss spike", "severity": "warning", "evidence": "Loss 40 is 9 times the median before it.", "cause": "A broken row.",
         "remedy": "Look at the rows."}


@pytest.fixture(autouse=True)
def quickly(monkeypatch, request):
    """Pictures are drawn, and rendered only where a test is about that: laying out and rasterising is nearly all of their time."""
    if "rendered" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda figure, path: path.write_bytes(b"\x89PNG"))


@pytest.fixture
def rendered():
    """Asks for pictures as they are."""


def write_run(folder, steps=40, planned=40, evals=(0, 20, 40), change=None, files=None):
    """A run folder whose loss falls from 5 by 0.05 a step. change: {step: {tag: value}} on top; files: {name: text or object}."""
    folder.mkdir()
    lines = []
    for step in range(0, steps + 1):
        line = {"step": step}
        if step:
            line |= {"train/learning_rate": 1e-4, "train/clip_threshold": 1.0, "train/samples": 32, "train/tokens": 2000,
                     "train/supervised_tokens": 500, "train/epoch": step / 100,
                     "train/loss": 5 - 0.05 * step, "train/grad_norm": 2.0, "train/skipped": 0.0, "train/seconds": 0.5,
                     "train/tokens_per_second": 4000.0, "train/peak_memory_gib": 1.25}
        if step in evals:
            line |= {"eval/loss": 6 - 0.05 * step, "eval/perplexity": 20.0, "eval/token_accuracy": 0.25 + step / 400, "eval/seconds": 2.0,
                     "eval/stop_rate": 0.0, "eval/samples": json.dumps(SAMPLES)}
        line |= (change or {}).get(step, {})
        if len(line) > 1:
            lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tree = config.from_dict({"model": {"path": "/home/someone/models/tiny"}, "train": {"max_steps": planned}, "lora": {"rslora": True}}).to_dict()
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    for name, value in (files or {}).items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder


def page_of(run):
    """The page, with every picture that it shows on the disk and no other; paragraphs unwrapped, so that sentences can be looked for."""
    assert report.main([str(run)]) == 0
    page = (run / "report.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\(plots/(\w+\.png)\)", page))
    assert shown == {path.name for path in (run / "plots").iterdir()}
    assert all((run / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    return re.sub(r"\n +(?! *- )", " ", re.sub(r"(?<=[^\n|`\-])\n(?=[^\n|`#\- ])", " ", page))


def drawn(draw, *args):
    """Axes, still open, and what `draw` drew in them by label."""
    axis = Figure().subplots()
    draw(axis, *args)
    return axis, {line.get_label(): line.get_xydata() for line in axis.lines}


def loss_of(run):
    metrics = report.read_run(run)["metrics"]
    return report.series(metrics, "train/loss"), report.series(metrics, "eval/loss")


# ------------------------------------------------------------------------------------------------------------ the page

def test_the_verdict_comes_first_with_every_criterion_its_interval_and_its_reason(tmp_path):
    page = page_of(write_run(tmp_path / "run", files={"verdict.json": VERDICT}))
    assert page.index("## Verdict: FAIL") < page.index("## What happened") < page.index("## Alerts")
    assert re.search(r"### minimum: PASS\n\n.*\n.*\n\| eval loss down +\| PASS +\| > 0.2 +\| 1.77 \[1.7, 1.85\] +\|", page)
    assert re.search(r"### optimal: FAIL\n\n.*\n.*\n\| perplexity +\| FAIL +\| < 6 +\| 8.61 \[8.3, 8.9\] +\|", page)
    assert "The outcome is that of the minimum set. The intervals are of 95%, from 1,309 evaluation rows." in page
    assert "**perplexity**: The whole interval lies above 6." in page


def test_without_a_verdict_the_page_says_so_and_claims_none(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert "## No verdict" in page and "not judged" in page and "PASS" not in page and "FAIL" not in page


def test_the_summary_tells_learning_from_the_repair_of_quantisation(tmp_path):
    page = page_of(write_run(tmp_path / "run", change={0: {"eval/unquantised_loss": 5.5, "eval/unquantised_token_accuracy": 0.3}}))
    assert "the loss fell from 6.0000 to 4.0000 from step 0 to 40" in page and "puts first rose from 25.0% to 35.0%" in page
    assert "has 5.5000 there: 0.5000 nats of the fall undo what quantisation cost, and 1.5000 lie beyond the original model." in page
    assert re.search(r"\| unquantised +\| 5.5000 \|", page) and "unquantised: the untouched model" in page


def test_a_trained_model_that_is_still_worse_than_the_original_is_told_as_such(tmp_path):
    assert "the trained one is still 0.5000 above it" in page_of(write_run(tmp_path / "run", change={0: {"eval/unquantised_loss": 3.5}}))


def test_an_alert_is_told_with_step_evidence_cause_and_remedy_and_repeats_are_counted(tmp_path):
    page = page_of(write_run(tmp_path / "run", change={step: {"alerts": json.dumps([ALERT])} for step in (7, 9, 30)}))
    assert "**loss spike** (warning), step 7, and 2 more up to step 30" in page
    assert "Seen: Loss 40 is 9 times" in page and "Likely cause: A broken row." in page and "Remedy: Look at the rows." in page
    assert "3 alerts were raised: loss spike." in page


def test_no_alert_is_claimed_only_where_the_run_watched_for_them(tmp_path):
    old, new = write_run(tmp_path / "old"), write_run(tmp_path / "new")
    for run, sections in ((old, {}), (new, {"alerts": {"window": 50}})):
        tree = json.loads((run / "config.json").read_text())
        tree.pop("alerts", None)
        (run / "config.json").write_text(json.dumps(tree | sections))
    assert "nothing says that any were watched for" in page_of(old)
    assert "No alert was raised." in page_of(new)


def test_first_and_last_figures_are_medians_over_a_quarter_of_a_short_run(tmp_path):
    page = page_of(write_run(tmp_path / "run", change={20: {"eval/loss": 3.5}}))
    assert re.search(r"\| loss, nats a token +\| 4.7250 \| 3.2250 \| -1.5000 \|", page)  # medians of 4.95 … 4.50 and 3.45 … 3.00
    assert "medians of the first and last 10 recorded values" in page
    assert "The lowest was 3.5000 after step 20." in page and re.search(r"\| 20 \(best\) +\| 3.5000 +\|", page)
    assert "interrupted" not in page and "40 steps of training consumed 1,280 samples" in page


def test_a_single_wild_step_moves_no_figure(tmp_path):
    calm, wild = write_run(tmp_path / "calm"), write_run(tmp_path / "wild", change={1: {"train/loss": 1e6}})
    figure = lambda run: float(re.search(r"\| loss, nats a token +\| ([\d.]+)", page_of(run))[1])
    assert abs(figure(calm) - figure(wild)) <= 0.051
    axis, lines = drawn(plots.draw_loss, *loss_of(wild))
    assert lines["running median of 9"][:, 1].max() < 6 < lines["training"][:, 1].max()
    assert axis.get_ylim()[1] < 10 and "1 beyond the scale, up to 1e+06" in lines


def test_many_evaluations_become_a_table_of_twelve_with_the_first_best_and_last(tmp_path):
    page = page_of(write_run(tmp_path / "run", evals=range(0, 41), change={7: {"eval/loss": 1.5}}))
    table = page[page.index("## Evaluations"):page.index("## Generation")]
    assert all(text in table for text in ("| 0 ", "| 7 (best)", "| 40 ")) and re.search(r"2[89] of 41 evaluations are not listed", table)


def test_settings_off_their_defaults_are_listed_without_folders_of_the_machine(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert re.search(r"\| `lora.rslora` +\| `true`", page) and "`models/tiny`" in page and "someone" not in page and "adam_eps" not in page


def test_time_tokens_and_memory_are_sums_and_the_peak(tmp_path):
    page = page_of(write_run(tmp_path / "run", change={7: {"train/peak_memory_gib": 3.5}}))
    assert re.search(r"\| time in steps +\| 20.0 s", page) and re.search(r"\| time in evaluations, without samples +\| 6.0 s", page)
    assert "80,000, of them supervised 20,000" in page and "3.50 GiB of the process" in page


@pytest.mark.parametrize("epoch, told", [(0.089, "The run saw 8.9% of its training rows; what was never seen taught nothing."),
                                         (1.422, "passed 1.42 times over its training rows, so that every row was seen."),
                                         (7.11, "so that every row was seen at least 7 times."), (3.0, "at least 3 times")])
def test_coverage_is_told_in_words(tmp_path, epoch, told):
    assert told in page_of(write_run(tmp_path / "run", change={40: {"train/epoch": epoch}}))


@pytest.mark.parametrize("scale, told", [(400.0, "most of its gradient is noise, and larger steps would pay"), (32.0, "about right"),
                                         (4.0, "smaller steps would learn as much from fewer samples")])
def test_the_noise_scale_is_explained_against_the_samples_of_a_step(tmp_path, scale, told):
    page = page_of(write_run(tmp_path / "run", change={step: {"train/noise_scale": scale} for step in (10, 20, 30)}
                             | {40: {"train/noise_scale": -3.0}}))
    assert f"is {scale:.3g} samples. A step has 32: {told}" in page and "1 of 4 estimates were not positive" in page


def test_the_adapters_are_told_by_their_most_and_least_moved_module(tmp_path):
    still = MODULES | {"model.layers.1.self_attn.q_proj": [0.0, 0.0, None]}
    page = page_of(write_run(tmp_path / "run", change={20: {"adapters/modules": "{}"}, 40: {"adapters/modules": json.dumps(still)}}))
    assert "After step 40" in page and "(3.00%), least in q_proj of layer 1 (0.00%)" in page
    assert "1 module never moved, among them q_proj of layer 1" in page
    assert "of 16 that the adapters could use" in page


def test_the_grid_of_modules_has_projections_in_rows_layers_in_order_and_experts_averaged():
    names = {"model.layers.10.mlp.experts.0.up_proj": [1.0, 1, None], "model.layers.10.mlp.experts.1.up_proj": [3.0, 1, None],
             "model.layers.2.self_attn.q_proj": [5.0, 2, None], "score": [7.0, 1, None]}
    ratio, _, step_ratio, layers, projections = report.module_grid(json.dumps(names))
    assert layers == ["2", "10", "–"] and projections == ["q_proj", "up_proj", "score"]
    assert np.array_equal(ratio, [[5, math.nan, math.nan], [math.nan, 2, math.nan], [math.nan, math.nan, 7]], equal_nan=True)
    assert np.isnan(step_ratio).all()


def test_a_gradient_that_disagrees_with_its_loss_is_marked(tmp_path):
    page = page_of(write_run(tmp_path / "run", change={0: {"proof/ratio": 1.004, "proof/tolerance": 0.02},
                                                       20: {"proof/ratio": 0.41, "proof/tolerance": 0.02}, 40: {"proof/ratio": 1.5}}))
    rows = {row.split("|")[1].strip(): row for row in page[page.index("## Gradient proof"):].splitlines() if row.startswith("| ")}
    assert "| yes" in rows["0"] and "**no**" in rows["20"] and "–" in rows["40"] and "yes" not in rows["40"]


def test_the_forecast_is_repeated_with_its_reasons_beside_what_came(tmp_path):
    given = {"figures": {"coverage": 0.089, "area": 0.0125, "peak_bytes": 2**31, "rates": [[1, 2]], "seconds": None, "something_new": 3},
             "findings": [{"severity": "warning", "name": "coverage below one epoch", "evidence": "4,000 of 45,000 rows.",
                           "reason": "Unseen rows teach nothing.", "remedy": "More steps."}]}
    page = page_of(write_run(tmp_path / "run", files={"forecast.json": given}))
    assert "**coverage below one epoch** (warning)" in page and "Why it matters: Unseen rows teach nothing." in page
    assert re.search(r"\| something new +\| 3 ", page)
    assert re.search(r"\| passes over the training rows +\| 0.089 +\| 0.4 +\|", page)
    assert re.search(r"summed over all steps +\| 0.0125 +\| 0.004 +\|", page)
    assert re.search(r"\| most memory in use, GiB +\| 2.00 +\| 1.25 +\|", page)


def test_samples_stand_side_by_side_with_their_references_in_eighty_columns(tmp_path):
    after = [SAMPLES[0] | {"text": "x = [\n    1,\n]\n" + "日本" * 30, "stopped": True}]
    page_of(write_run(tmp_path / "run", change={40: {"eval/samples": json.dumps(after)}}))
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    block = page[page.index("```"):page.index("\n```\n")].splitlines()
    assert re.fullmatch(r"before \(step 0\) +after step 40 +reference", block[3]) and "not stop" in " ".join(block)
    assert any(line[26:].startswith("    1,") for line in block) and all(words.columns_of(line) <= 80 for line in block)


def test_what_a_model_wrote_cannot_break_out_of_its_block_or_drive_a_console(tmp_path):
    nasty = [SAMPLES[0] | {"text": "```\n# not a heading\n````\x1b[2J\x07", "prompt": "<script>`"}]
    run = write_run(tmp_path / "run", change={40: {"eval/samples": json.dumps(nasty)}, 0: {"eval/samples": json.dumps(nasty)}})
    page_of(run)
    page = (run / "report.md").read_text(encoding="utf-8")
    block = re.search(r"^(`{5,})text\n(.*?)\n\1$", page, re.M | re.S)
    assert block and "# not a heading" in block[2] and "\x1b" not in page and "\x07" not in page
    assert "<script>" not in page.replace(block[0], "")


def test_words_of_findings_cannot_make_markdown(tmp_path):
    strange = ALERT | {"evidence": "a | b\n# c <i> *d* `e` _f_ $g$ lora_B [h](i)", "name": "x|y"}
    page = page_of(write_run(tmp_path / "run", change={7: {"alerts": json.dumps([strange])}}))
    assert r"a \| b # c \<i> \*d\* \`e\` \_f\_ \$g\$ lora_B \[h](i)" in page


def test_no_line_of_prose_is_longer_than_80_columns_or_begins_by_chance_like_a_list():
    text = "word " * 15 + "5. " * 40 + "- # + 12) " * 30
    lines = words.prose(text).splitlines()
    assert max(map(len, lines)) <= 80 and not any(re.match(r"(\d+[.)]|[-+#])( |$)", line) for line in lines[1:])
    assert re.sub(r"\\", "", " ".join(lines)).split() == text.split()


# ------------------------------------------------------------------------------------------------------ what is lacking

def test_a_run_without_evaluations_is_reported_and_says_what_is_missing(tmp_path):
    page = page_of(write_run(tmp_path / "run", evals=()))
    assert "no evaluation in the record" in page and "Not in the record: evaluations, generation samples" in page
    assert "## Evaluations" not in page


def test_one_step_is_reported_without_a_change_being_claimed(tmp_path, rendered):
    page = page_of(write_run(tmp_path / "run", steps=1, planned=1, evals=()))
    assert "1 training step cannot show whether the loss falls" in page and "single values" in page
    assert re.search(r"\| loss, nats a token +\| 4.9500 \| 4.9500 \| – +\|", page)


def test_an_evaluation_before_any_step_is_reported_alone(tmp_path):
    page = page_of(write_run(tmp_path / "run", steps=0))
    assert "one finite evaluation, after step 0" in page and "0 training steps cannot" in page and "they were taken once" in page


def test_a_run_that_did_not_reach_its_end_is_told_as_such(tmp_path):
    page = page_of(write_run(tmp_path / "run", steps=30, planned=40, evals=(0, 20)))
    assert "40 steps were planned: the run goes on, was interrupted, or stopped early." in page and "from step 0 to 20" in page


def test_a_run_killed_before_its_first_step_gives_a_page_with_its_forecast(tmp_path):
    run = write_run(tmp_path / "run", files={"metrics.jsonl": "", "forecast.json": {"figures": {"coverage": 0.089}, "findings": []}})
    page = page_of(run)
    assert "holds no finished step" in page and "0.089" in page and not list((run / "plots").iterdir())


def test_steps_that_are_not_finite_are_counted_and_left_out_of_medians(tmp_path):
    bad = {"train/loss": "nan", "train/grad_norm": "inf", "train/skipped": 1.0}
    run = write_run(tmp_path / "run", change={2: bad, 38: bad, 20: {"eval/loss": "nan"}})
    page = page_of(run)
    assert "not finite in 2 of 40 steps (2, 38)" in page and "2 steps were not applied" in page
    assert "evaluation loss is not finite after step 20" in page
    first, last = (float(value) for value in re.search(r"\| loss, nats a token +\| ([\d.]+) +\| ([\d.]+)", page).groups())
    assert 4.5 < first < 4.95 and 3 < last < 3.45
    _, lines = drawn(plots.draw_loss, *loss_of(run))
    assert lines["loss not finite"][:, 0].tolist() == [2, 38] and np.isfinite(lines["running median of 9"]).all()


def test_a_record_of_nothing_but_nan_is_still_a_page(tmp_path, rendered):
    bad = {"train/loss": "nan", "train/grad_norm": "nan", "train/skipped": 1.0}
    page = page_of(write_run(tmp_path / "run", evals=(), change={step: bad for step in range(1, 41)}))
    assert "not finite in 40 of 40 steps" in page and "could not" not in page and "| nan" not in page


def test_gradient_norms_of_exactly_zero_are_named_and_drawn(tmp_path):
    run = write_run(tmp_path / "run", change={3: {"train/grad_norm": 0.0}, 4: {"train/grad_norm": 0.0}})
    assert "exactly 0 in 2 of 40 steps" in page_of(run)
    metrics = report.read_run(run)["metrics"]
    _, lines = drawn(plots.draw_norms, report.series(metrics, "train/grad_norm"), report.series(metrics, "train/clip_threshold"))
    assert lines["exactly 0 (2 steps)"][:, 0].tolist() == [3, 4] and "clipped above (95% of the steps were)" in lines


def test_missing_lines_are_counted(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:10] + lines[13:]))
    assert "the loss of 37 of these 40 steps" in page_of(run)


def test_broken_lines_are_left_out_and_named(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines[:10], "{broken\n", *lines[11:], '{"step": 41, "train/lo']))
    page = page_of(run)
    assert "line 11: not valid JSON" in page and "the loss of 39 of these 40 steps" in page
    with pytest.raises(ValueError, match="line 11"):  # who must not pass over one still is told
        record.read_metrics(run)


def test_damaged_files_beside_the_record_are_named_and_the_rest_is_reported(tmp_path):
    page = page_of(write_run(tmp_path / "run", files={"config.json": "{", "verdict.json": "[1]", "environment.json": "\x00",
                                                      "forecast.json": json.dumps({"findings": 3})}, change={
        20: {"alerts": "not json", "adapters/modules": '{"a": 3}', "eval/samples": "[1]"}, 30: {"train/loss": "ten"}}))
    for told in ("config.json: not valid JSON", "verdict.json: must be an object", "environment.json:", "alerts of step 20:",
                 "samples of step 20:", "adapters/modules:", "Forecast:"):
        assert told in page[page.index("## What this report cannot say"):], told
    assert "fell from 6.0000 to 4.0000" in page and "Not in the record: " in page and "settings" in page


def test_a_record_alone_is_enough(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.json").unlink()
    assert "Not in the record:" in page_of(run)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 10**400), st.floats(), st.text(max_size=8),
                   st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.none(), max_size=2))
TREES = st.one_of(VALUES, st.dictionaries(
    st.sampled_from(["outcome", "sets", "judged", "criteria", "figures", "findings", "train", "model", "lora", "devices", "packages"]),
    st.one_of(VALUES, st.lists(VALUES, max_size=2),
              st.lists(st.dictionaries(st.sampled_from(["set", "name", "reason", "low", "high", "severity", "evidence"]), VALUES), max_size=2),
              st.dictionaries(st.sampled_from(["path", "quant", "max_steps", "epochs", "r", "targets", "coverage"]), VALUES, max_size=3))))
TAGS = ["step", "train/loss", "train/grad_norm", "train/clip_threshold", "train/epoch", "train/samples", "train/noise_scale",
        "train/learning_rate", "train/tokens_per_second", "eval/loss", "eval/perplexity", "eval/token_accuracy", "eval/samples",
        "eval/unquantised_loss", "adapters/modules", "alerts", "proof/ratio", "proof/tolerance"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(lines=st.lists(st.dictionaries(st.sampled_from(TAGS), VALUES, max_size=6), max_size=4),
       texts=st.lists(st.tuples(st.sampled_from(TAGS), st.one_of(VALUES, st.lists(VALUES, max_size=2))), max_size=3),
       trees=st.fixed_dictionaries({name: TREES for name in ("config", "environment", "verdict", "forecast")}))
def test_no_record_however_strange_fails_the_report(tmp_path_factory, lines, texts, trees):
    run = tmp_path_factory.mktemp("run")
    lines = [{"step": i} | line for i, line in enumerate(lines)]
    lines += [{"step": 10 + i, tag: json.dumps(value)} for i, (tag, value) in enumerate(texts) if tag != "step"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, tree in trees.items():
        (run / f"{name}.json").write_text(json.dumps(tree))
    paths = report.write(run)
    assert paths[0] == run / "report.md" and all(path.is_file() for path in paths) and "## What happened" in paths[0].read_text()


# -------------------------------------------------------------------------------------------------------- the pictures

def test_a_full_record_draws_every_picture_and_a_later_poorer_one_leaves_none_behind(tmp_path, rendered):
    change = {0: {"eval/unquantised_loss": 5.5, "eval/unquantised_token_accuracy": 0.3}, 20: {"train/noise_scale": 60.0},
              40: {"adapters/modules": json.dumps(MODULES), "eval/repetition": 0.1, "eval/overlap": 0.4}}
    run = write_run(tmp_path / "run", change=change)
    page_of(run)
    assert {path.stem for path in (run / "plots").iterdir()} == {"loss", "evaluation", "steps", "coverage", "noise", "adapters",
                                                                 "resources"}
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.0}\n')
    page_of(run)
    assert {path.stem for path in (run / "plots").iterdir()} == {"loss"}


def test_the_picture_shows_every_evaluation_with_its_value_the_untouched_model_and_alerts(tmp_path):
    axis, lines = drawn(plots.draw_loss, *loss_of(write_run(tmp_path / "run")), 3.9, [7, 30])
    assert lines["evaluation"].tolist() == [[0, 6.0], [20, 5.0], [40, 4.0]]
    assert {text.get_text() for text in axis.texts} == {"6.000", "5.000", "4.000"}
    assert lines["untouched model, not quantised: 3.900"][:, 1].tolist() == [3.9, 3.9] and lines["alert"][:, 0].tolist() == [7, 30]


def test_many_evaluations_are_labelled_at_first_best_and_last_only(tmp_path):
    axis, lines = drawn(plots.draw_loss, *loss_of(write_run(tmp_path / "run", evals=range(0, 41, 4), change={12: {"eval/loss": 1.5}})))
    assert len(lines["evaluation"]) == 11 and [text.get_text() for text in axis.texts] == ["6.000", "1.500", "4.000"]


def test_a_run_without_clipping_is_drawn_without_its_line():
    steps, infinite = np.arange(40), np.full(40, math.inf)
    axis, lines = drawn(plots.draw_norms, (steps, np.full(40, 2.0)), (steps, infinite))
    assert not any("clipped" in label for label in lines) and math.isfinite(axis.get_ylim()[1])


def test_a_running_median_follows_a_fast_fall_at_the_start_and_passes_over_nan():
    values = np.array([9.0, 8, 7, math.nan, 5, 5, 5, 5, 5, 100, 5, 5])
    assert plots.running_median(values, 9, [0])[0] == 8.0 and plots.running_median(values, 5, [9])[0] == 5.0
    assert np.isnan(plots.running_median(np.full(5, math.nan), 3, [2]))[0]


def test_the_scale_follows_the_bulk_of_the_points_and_not_one_spike():
    rng = np.random.default_rng(0)
    values = 2 + rng.normal(0, 0.1, 500)
    low, high = plots.bounds(values)
    assert low == values.min() and high == values.max()
    values[100] = 1e4
    assert plots.bounds(values)[1] < 4 and plots.bounds(np.full(3, math.nan)) == (0.0, 1.0)


def test_a_module_that_never_moved_is_red_and_one_that_does_not_exist_is_not():
    axis = Figure().subplots()
    plots.heat(axis, np.array([[0.0, 1.0], [math.nan, 2.0]]), ["0", "1"], ["q_proj", "k_proj"], "t", "u", "{:.2g}")
    assert [(patch.get_x(), patch.get_y()) for patch in axis.patches] == [(-0.5, -0.5)]


# --------------------------------------------------------------------------------------------------------- the command

def test_a_run_that_imports_the_report_loads_no_drawing_library_before_its_end():
    code = "import sys, report; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=config.PROJECT, check=True, timeout=60)


def test_picture_writes_that_file_and_nothing_else(tmp_path, rendered):
    run = write_run(tmp_path / "run")
    before = {path.name for path in run.iterdir()}
    assert report.main([str(run), f"--picture={tmp_path / 'loss.png'}"]) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") and {path.name for path in run.iterdir()} == before


@pytest.mark.parametrize("argv, what", [([], "give one run folder"), (["a", "b"], "give one run folder"),
                                        (["none-such"], "not the folder of a run"),
                                        (["none-such", "--train.seed=1"], "give one run folder")])
def test_a_wrong_command_line_is_refused_with_the_right_one(argv, what):
    with pytest.raises(ValueError, match=what):
        report.main(argv)


def test_a_page_without_pictures_is_written_where_none_can_be_drawn(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    monkeypatch.setattr(plots, "loss", lambda *args: 1 / 0)
    page = page_of(run)
    assert "picture of loss:" in page and "ZeroDivisionError" in page and "plots/steps.png" in page
