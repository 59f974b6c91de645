"""Comparing runs: known differences found with the right intervals, what is not comparable refused, and --ab training what is missing."""

import contextlib
import importlib.util
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PROJECT
from test_verdict import GOOD, LOOP, make_run, rows_of

import compare
import config
import record
import verdict


@pytest.fixture(autouse=True)
def unless_it_is_about_the_picture_draw_none(request, monkeypatch):
    """Drawing takes a second."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(compare, "draw", lambda runs, path: path.write_bytes(b"not drawn"))


def shifted(run, like, by, steps=None):
    """Make the figures of `run` those of `like` with every row's loss a token moved by `by`, so that the difference is known exactly."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, (arrays, metadata) in record.read_evaluations(like).items():
        if type(step) is int and (steps is None or step in steps):
            moved = arrays | {"nll": arrays["nll"] + by * arrays["tokens"]}
            record.save_evaluation(run, f"step-{step:06d}", moved, metadata)
            for line in lines:
                if line["step"] == step:
                    line["eval/loss"] = moved["nll"].sum() / moved["tokens"].sum()
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def pair(tmp_path):
    a = make_run(
        tmp_path / "runs" / "tldr-a", samples={0: [LOOP], 200: [GOOD, GOOD | {"prompt": "and how?", "text": "like `this` | ```that```"}]}
    )
    b = make_run(
        tmp_path / "runs" / "tldr-b",
        samples={200: [GOOD | {"text": "print files"}, GOOD | {"prompt": "and how?", "text": "otherwise"}]},
        sections={"model": {"quant": "int8"}},
    )
    return a, shifted(b, a, -0.05)


def compared(*arguments, capsys=None):
    """What compare.py --json prints."""
    capsys.readouterr()
    assert compare.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def edit_metadata(run, **changes):
    for step, (arrays, metadata) in record.read_evaluations(run).items():
        name = step if isinstance(step, str) else f"step-{step:06d}"
        record.save_evaluation(run, name, arrays, {key: value for key, value in (metadata | changes).items() if value is not None})


def settings_of(run, **changes):
    tree = json.loads((run / "config.json").read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    (run / "config.json").write_text(json.dumps(tree))


# --------------------------------------------------------------------------------------------------------- differences


def test_a_difference_that_is_the_same_in_every_row_is_found_exactly_and_without_doubt(pair, capsys):
    found = compared(*pair, capsys=capsys)
    gap = found["runs"][1]["loss_difference"]
    assert [gap[name] for name in ("value", "low", "high")] == pytest.approx([-0.05] * 3, abs=1e-9)
    assert found["rows"] == 300 and found["runs"][1]["rows_better"] == 1 and found["runs"][0]["loss_difference"] is None
    assert found["runs"][1]["accuracy_difference"]["value"] == 0


def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(verdict, "RESAMPLES", 300)
    rng, held, tries = np.random.default_rng(2), 0, 250
    for _ in range(tries):
        rows = rows_of(rng, 100, {"a": 2.4, "b": 2.3})
        runs = [{"path": name, "evaluations": {1: rows[name]}} for name in "ab"]
        monkeypatch.setattr(
            verdict,
            "with_draws",
            lambda table, of, seed=0: of(np.concatenate((table.sum(0, keepdims=True), verdict.resampled_sums(table, 300, seed)))),
        )
        gap = compare.differences(runs, [1, 1])[1]["loss_difference"]
        held += gap["low"] <= -0.1 <= gap["high"]
    assert 0.91 <= held / tries <= 0.98


def test_a_difference_smaller_than_its_noise_is_said_to_be_unclear(tmp_path, capsys):
    runs = [
        make_run(tmp_path / name, evals=evals, rows=60)
        for name, evals in (("a", {0: 4.6, 200: 2.0}), ("b", {0: 4.6, 100: 3.0, 200: 2.001}))
    ]
    gap = compared(*runs, capsys=capsys)["runs"][1]["loss_difference"]
    assert gap["low"] < 0 < gap["high"]
    compare.main([str(run) for run in runs])
    assert "b cannot be told apart from a" in capsys.readouterr().out


def test_runs_that_do_not_differ_in_a_bit_are_said_to_be_the_same(tmp_path, capsys):
    runs = [make_run(tmp_path / name) for name in "ab"]
    compare.main([str(run) for run in runs])
    assert "same as a to the last bit: did the setting change anything?" in capsys.readouterr().out


def test_few_rows_tell_no_runs_apart_however_they_differ(tmp_path, capsys):
    runs = [make_run(tmp_path / name, evals={0: 4.6, 200: last}, rows=verdict.MIN_ROWS - 1) for name, last in (("a", 2.0), ("b", 3.0))]
    compare.main([str(run) for run in runs])
    shown = " ".join(capsys.readouterr().out.split())
    assert "b cannot be told apart from a: +1.0" in shown and "19 rows: too few" in shown


def test_rows_without_a_target_count_for_nothing(tmp_path, capsys):
    runs = []
    for name, by in (("a", 0.0), ("b", 0.1)):
        run = make_run(tmp_path / name, evals={0: 4.6, 200: 2.0})
        arrays, metadata = record.read_evaluations(run)[200]
        arrays = {
            key: np.concatenate((value + (by * arrays["tokens"] if key == "nll" else 0), np.zeros(50))) for key, value in arrays.items()
        }
        record.save_evaluation(run, "step-000200", arrays, metadata | {"adapter_digest": f"{200:012x}"})
        runs.append(run)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines[-1]["eval/loss"] = arrays["nll"].sum() / arrays["tokens"].sum()
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compared(*runs, capsys=capsys)
    assert found["rows"] == 300 and found["runs"][1]["loss_difference"]["value"] == pytest.approx(0.1)
    assert "step-000000.safetensors is of other rows" in found["notes"][0]


# -------------------------------------------------------------------------------------------------------- which step


def test_the_last_common_evaluation_is_taken_unless_told_otherwise(tmp_path, capsys):
    a = make_run(tmp_path / "a", evals={0: 4.6, 50: 3.0, 100: 1.5, 150: 2.0, 200: 2.2})
    b = make_run(tmp_path / "b", steps=120, planned=200, evals={0: 4.6, 50: 2.9, 100: 2.5, 120: 2.0})
    steps = lambda *options: [run["at_step"] for run in compared(a, b, *options, capsys=capsys)["runs"]]
    assert steps() == [100, 100] and steps("--at=last") == [200, 120] and steps("--at=best") == [100, 120] and steps("--at=50") == [50, 50]
    for wrong, said in (("--at=150", "has 0, 50, 100, 120, not 150"), ("--at=soon", "must be common, best, last or a step")):
        with pytest.raises(ValueError, match=said):
            compare.main([str(a), str(b), wrong])


def test_runs_that_share_only_the_evaluation_before_training_are_refused_with_a_way_out(tmp_path):
    a, b = make_run(tmp_path / "a", evals={0: 4.6, 60: 3.0}), make_run(tmp_path / "b", evals={0: 4.6, 80: 3.0})
    with pytest.raises(ValueError, match="share no evaluated step after training.*0, 60.*0, 80.*--at=last"):
        compare.main([str(a), str(b)])
    assert compare.main([str(a), str(b), "--at=last"]) == 0


def test_an_evaluation_that_was_made_by_hand_counts(tmp_path, capsys):
    a, b = make_run(tmp_path / "a", evals={0: 4.6, 200: 2.0}), make_run(tmp_path / "b", evals={0: 4.6, 100: 2.5, 200: 2.0})
    rows = rows_of(np.random.default_rng(0), 300, {0: 4.6, "x": 2.2})["x"]  # the same rows, since drawn alike
    record.save_evaluation(a, "step-000100", rows, record.read_evaluations(a)[200][1])
    assert compared(a, b, "--at=100", capsys=capsys)["runs"][0]["at_step"] == 100


def test_a_step_without_figures_but_with_a_checkpoint_is_named_with_the_command_that_makes_them(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", evals={0: 4.6, 200: 2.0})
    (b / "checkpoints" / "step-000100").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"python eval.py --ckpt {b}@step-000100 --keep"):
        compare.main([str(a), str(b), "--at=100"])


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "how, said",
    [
        (lambda run: edit_metadata(run, tokenizer="other"), "tokenizers differ"),
        (lambda run: edit_metadata(run, rows_digest="other"), 'other rows.*both name ".+", and what is in there has changed'),
        (lambda run: [edit_metadata(run, rows_digest="other"), settings_of(run, data__max_length=99)], r"length \(data.max_length is 2048 and 99\);"),
        (lambda run: edit_metadata(run, tokenizer=None), "do not say of which tokenizer.*python eval.py --ckpt .*b --keep"),
        (lambda run: edit_metadata(run, rows_digest=None), "do not say of which rows"),
        (
            lambda run: [path.unlink() for path in (run / "evaluations").glob("*")],
            "holds no figures by row. Make them with: python eval.py --ckpt .*b --keep",
        ),
        (
            lambda run: [path.unlink() for path in (run / "evaluations").glob("step-000[12]*")]
            + [(run / "evaluations" / "step-000050.safetensors").unlink()],
            "holds only figures of step 0, before training",
        ),
        (lambda run: (run / "metrics.jsonl").unlink(), "no such file"),
        (lambda run: (run / "config.json").write_text("{"), "config.json: not valid JSON"),
        (
            lambda run: [path.write_bytes(b"x") for path in (run / "evaluations").glob("*")],
            "step-000050.safetensors: not a whole.*Make them with",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(tmp_path, how, said):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    how(b)
    with pytest.raises(ValueError, match=said):
        compare.main([str(a), str(b)])


def test_another_count_of_rows_is_refused_with_the_reason(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", rows=200)
    edit_metadata(b, rows_digest="rows-300")  # the digest is of all evaluation rows, and eval.max_rows took fewer
    with pytest.raises(ValueError, match="one was evaluated on 300 rows, the other on 200.*--eval.max_rows"):
        compare.main([str(a), str(b)])


def test_the_same_run_twice_or_one_alone_is_refused(tmp_path):
    a = make_run(tmp_path / "a")
    for arguments, said in (
        ([a, a], "given twice"),
        ([a, tmp_path / "b" / ".." / "a"], "given twice"),
        ([a], "two runs or more"),
        ([], "two runs or more"),
        ([a, a, "--train.seed=3"], "--ab only"),
    ):
        with pytest.raises(ValueError, match=said):
            compare.main([str(argument) for argument in arguments])


def test_refusals_leave_with_exit_code_2_and_one_message(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    edit_metadata(b, tokenizer="other")
    done = subprocess.run([sys.executable, PROJECT / "compare.py", a, b], capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and "Traceback" not in done.stderr
        and not (tmp_path / "compare.png").exists()
    )


# ------------------------------------------------------------------------------------------------------- sick records


def test_a_run_whose_evaluation_is_not_finite_is_shown_without_a_difference(tmp_path, capsys):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", evals={0: 4.6, 100: 3.0, 200: math.nan})
    found = compared(a, b, capsys=capsys)
    assert found["runs"][1]["loss"] is None and found["runs"][1]["loss_difference"] is None and found["runs"][0]["loss"] > 0
    assert compare.main([str(b), str(a)]) == 0 and "a loss is not finite" in capsys.readouterr().out
    assert [run["at_step"] for run in compared(a, b, "--at=best", capsys=capsys)["runs"]] == [200, 100]


def test_a_killed_run_and_one_with_nan_among_its_steps_are_compared_and_the_unfinished_told(tmp_path, capsys):
    a = make_run(tmp_path / "a", change={step: {"train/loss": "nan", "train/tokens_per_second": "inf"} for step in range(60, 90)})
    b = make_run(tmp_path / "b", steps=110, planned=200)
    assert compare.main([str(a), str(b)]) == 0
    assert "b is not at its end: step 110 of 200." in capsys.readouterr().out


def test_runs_of_one_step_are_compared(tmp_path, capsys):
    runs = [make_run(tmp_path / name, steps=1, evals={0: 4.6, 1: last}) for name, last in (("a", 4.5), ("b", 4.0))]
    assert compared(*runs, capsys=capsys)["runs"][1]["loss_difference"]["high"] < 0


def test_a_thinned_record_whose_lines_stand_for_many_steps_tells_the_time_of_one_step(tmp_path, capsys):
    place = importlib.util.spec_from_file_location("findings", PROJECT / "bench" / "findings.py")
    place.loader.exec_module(findings := importlib.util.module_from_spec(place))
    whole, thin = (make_run(tmp_path / name) for name in ("whole", "thin"))
    lines = findings.thinned(record.read_metrics(thin), most=20)
    (thin / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(lines) < 30
    first, second = compared(whole, thin, capsys=capsys)["runs"]
    for name in ("seconds_per_step", "seconds", "tokens_per_second", "peak_memory_gib"):
        assert first[name] == pytest.approx(second[name], rel=1e-4), name


def test_what_a_record_lacks_is_left_open(tmp_path, capsys):
    gone = {
        step: dict.fromkeys(
            ("train/samples", "train/seconds", "train/tokens", "train/tokens_per_second", "train/peak_memory_gib", "train/epoch")
        )
        for step in range(1, 201)
    }
    runs = [make_run(tmp_path / name, change=gone) for name in "ab"]
    found = compared(*runs, capsys=capsys)
    assert found["runs"][0]["tokens_per_second"] is None and {row["run"] for row in found["curves"]} == {"a", "b"}
    for run in runs:
        (run / "config.json").unlink()
    assert compare.main([str(run) for run in runs]) == 0
    assert "–" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ showing


def test_the_page_holds_everything_in_80_columns_and_the_picture_lies_beside_it(pair, tmp_path, capsys):
    assert compare.main([str(run) for run in pair] + [f"--out={tmp_path / 'ab'}"]) == 0
    page, shown = (tmp_path / "ab" / "compare.md").read_text(encoding="utf-8"), capsys.readouterr().out
    assert (tmp_path / "ab" / "compare.png").read_bytes().startswith(b"\x89PNG") and "![" in page and "![" not in shown
    assert max(len(line) for line in page.splitlines()) <= 80 and max(len(line) for line in shown.splitlines() if "/" not in line) <= 80
    assert "b is better than a on these rows: -0.0500 nats" in " ".join(page.split())
    assert "| `model.quant` | `nf4` | `int8` |" in page and "| a   | 200  | 6,400   | 400,000 | 100.0" in page
    assert "list all files of this folder           print files" in page and "````text" in page  # a fence that the text inside cannot close


def test_without_out_the_picture_lies_beside_the_runs_and_no_page_is_written(pair):
    compare.main([str(run) for run in pair])
    assert (pair[0].parent / "compare.png").is_file() and not list(pair[0].parent.glob("*.md"))


def test_four_runs_with_long_names_fit_too_and_are_told_apart(tmp_path, capsys):
    runs = [
        make_run(tmp_path / f"a-rather-long-name-of-a-run-{i}-{'x' * 12}", evals={0: 4.6, 200: 2 + i / 10}, samples={200: [GOOD]})
        for i in range(4)
    ]
    found = compared(*runs, capsys=capsys)
    assert len({run["name"] for run in found["runs"]}) == 4
    compare.main([*map(str, runs)])
    assert max(len(line) for line in capsys.readouterr().out.splitlines() if "/" not in line) <= 80


@pytest.mark.parametrize(
    "folders, names",
    [
        (["r/tldr-nf4", "r/tldr-int8"], ["nf4", "int8"]),
        (["x/run", "y/run"], ["x/run", "y/run"]),
        (["findings/cure-rate-s0", "again/cure-rate-s0"], ["findings", "again"]),
        (["a", "a-b"], ["a", "a-b"]),
        (["q-1", "q-12"], ["1", "12"]),
        (["one", "other"], ["one", "other"]),
    ],
)
def test_runs_are_called_by_what_their_folders_do_not_share(tmp_path, folders, names):
    runs = [{"path": tmp_path / folder, "name": folder.rpartition("/")[2]} for folder in folders]
    compare.name_apart(runs)
    assert [run["name"] for run in runs] == names


def test_the_picture_has_four_panels_with_each_runs_evaluations_at_their_step_samples_tokens_and_time(pair, tmp_path, monkeypatch):
    import plots

    real, seen = plots.sheet, []

    @contextlib.contextmanager
    def sheet(*arguments):
        with real(*arguments) as axes:
            seen.extend(axes)
            yield axes

    monkeypatch.setattr(plots, "sheet", sheet)
    compare.main([str(run) for run in pair])
    assert [axis.get_xlabel() for axis in seen] == ["step", "samples trained on", "tokens trained on", "seconds in training steps"]
    last = [[line.get_xdata()[-1] for line in axis.lines if line.get_label() in "ab"] for axis in seen]
    assert last == [[200, 200], [6400, 6400], [400000, 400000], [100, 100]]


def test_machines_that_differ_are_told_since_speed_and_memory_follow_them(pair, capsys):
    for run, name in zip(pair, ("Big GPU", "Small GPU")):
        (run / "environment.json").write_text(json.dumps({"devices": [{"name": name, "memory_gib": 80}], "packages": {"torch": "2.13"}}))
    compare.main([str(run) for run in pair])
    shown = " ".join(capsys.readouterr().out.split())
    assert "The machines differ" in shown and "a on Big GPU, torch 2.13; b on Small GPU" in shown


def test_runs_that_differ_in_their_seed_alone_show_their_spread(tmp_path, capsys):
    runs = [
        make_run(tmp_path / f"run-{seed}", evals={0: 4.6, 200: loss}, sections={"train": {"max_steps": 200, "seed": seed}})
        for seed, loss in enumerate((2.0, 2.1, 2.2))
    ]
    other = make_run(tmp_path / "run-int8", sections={"model": {"quant": "int8"}})
    found = compared(*runs, other, capsys=capsys)
    group, losses = found["seeds"][0], [run["loss"] for run in found["runs"][:3]]
    assert (
        len(found["seeds"]) == 1
        and group["seeds"] == [0, 1, 2]
        and group["loss"]["deviation"] == pytest.approx(np.std(losses, ddof=1))
        and group["loss"]["low"] == min(losses)
    )
    compare.main([*map(str, runs)])
    assert "differ in their seed alone" in capsys.readouterr().out


def test_settings_that_shape_nothing_compared_do_not_make_runs_differ_in_more_than_their_seed(tmp_path, capsys):
    runs = [
        make_run(tmp_path / f"run-{seed}", sections={"train": {"max_steps": 200, "seed": seed}, "log": {"every_steps": 1 + seed}})
        for seed in (0, 1)
    ]
    assert len(compared(*runs, capsys=capsys)["seeds"]) == 1


def test_no_model_library_is_loaded():
    code = "import sys, compare; sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


# ------------------------------------------------------------------------------------------------------ training both


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """train.py replaced by one that writes a run in no time: trainer.calls are its arguments, trainer.codes what it exits with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.json").write_text('{"train": {"max_steps": 200}}')
    fake = SimpleNamespace(calls=[], codes=[], steps=200)

    def run(command):
        name, out, *rest = command[2:]
        fake.calls.append(rest)
        overrides = [tuple(option[2:].split("=", 1)) for option in rest if "=" in option]
        folder = tmp_path / out.partition("=")[2]
        if "--resume" in rest:
            (folder / "metrics.jsonl").unlink()
            folder.rename(folder.with_suffix(".old"))
        make_run(folder, steps=fake.steps, planned=200, evals={0: 4.6, 100: 3.0, 200: 2.0 + len(fake.calls) / 20})
        (folder / "config.json").write_text(json.dumps(config.located(config.read(name, overrides)).to_dict()))
        (folder / "checkpoints" / "step-000100").mkdir(parents=True)
        return SimpleNamespace(returncode=fake.codes.pop(0) if fake.codes else 0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    return fake


def test_ab_trains_each_value_into_its_own_folder_and_compares_them(trainer, tmp_path, capsys):
    assert compare.main(["--ab", "model.quant=nf4,int8", "tiny.json", "--eval.samples=0"]) == 0
    assert trainer.calls == [["--eval.samples=0", "--model.quant=nf4"], ["--eval.samples=0", "--model.quant=int8"]]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["compare.png", "tiny-int8", "tiny-nf4"]
    assert "int8 is worse than nf4" in capsys.readouterr().out


def test_ab_takes_finished_runs_as_they_are_and_resumes_unfinished_ones(trainer, tmp_path, capsys):
    compare.main(["--ab=model.quant=nf4,int8", "tiny.json"])
    assert compare.main(["--ab=model.quant=nf4,int8", "tiny.json", "--log.every_steps=3"]) == 0 and len(trainer.calls) == 2
    assert capsys.readouterr().out.count("taken as it is") == 2
    lines = (tmp_path / "runs/tiny-int8/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs/tiny-int8/metrics.jsonl").write_text("".join(lines[:120]))
    assert compare.main(["--ab=model.quant=nf4,int8", "tiny.json"]) == 0
    assert trainer.calls[2:] == [["--model.quant=int8", "--resume"]]


def test_ab_refuses_a_folder_that_holds_a_run_with_other_settings(trainer):
    compare.main(["--ab=model.quant=nf4,int8", "tiny.json"])
    with pytest.raises(ValueError, match="runs/tiny-nf4: holds a run with other settings .lora.r was 16, is 8"):
        compare.main(["--ab=model.quant=nf4,int8", "tiny.json", "--lora.r=8"])


def test_ab_checks_all_settings_before_it_trains_any(trainer):
    for arguments, said in (
        (["--ab=model.quant=nf4,nf5", "tiny.json"], "model.quant: must be one of"),
        (["--ab=lora.r=8,0", "tiny.json", "--train.seed=x"], "train.seed.*whole number"),
        (["--ab=model.quant=nf4", "tiny.json"], "two different values"),
        (["--ab=model.quant=nf4,nf4", "tiny.json"], "two different values"),
        (["--ab=quant=nf4,int8", "tiny.json"], "must be KEY=VALUE,VALUE"),
        (["--ab=lora.r=8,16", "tiny.json", "--lora.r=4"], "leave it out"),
        (["--ab=lora.r=8,16"], "give one configuration"),
        (["--ab=lora.r=8,16", "none.json"], "cannot read"),
        (["--ab=train.seed=0,1", "tiny.json", "--data.eval="], "drawn by the seed"),
    ):
        with pytest.raises(ValueError, match=said):
            compare.main(arguments)
    assert trainer.calls == []


@pytest.mark.parametrize("code, trained, exits", [(4, 1, 4), (130, 1, 130), (-9, 1, 137), (5, 2, 0)])
def test_a_training_that_does_not_end_well_ends_ab_with_its_code_and_one_that_failed_criteria_is_compared(
    trainer, code, trained, exits, capsys
):
    trainer.codes = [code]
    assert compare.main(["--ab=model.quant=nf4,int8", "tiny.json"]) == exits and len(trainer.calls) == trained
    assert (f"ended with exit code {code}" in capsys.readouterr().err) == (exits != 0)


def test_several_seeds_are_one_command(trainer, capsys):
    assert compare.main(["--ab=train.seed=0,1,2", "tiny.json"]) == 0
    assert "differ in their seed alone" in capsys.readouterr().out


def test_ab_with_the_real_trainer_trains_compares_and_takes_its_runs_the_second_time(tiny_inputs, tmp_path, monkeypatch, capsys):
    import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "catch_signals", list)  # in this process, which goes on afterwards
    monkeypatch.setattr(compare.subprocess, "run", lambda command: SimpleNamespace(returncode=train.main(command[2:])))
    (tmp_path / "tiny.json").write_text(
        json.dumps(
            {
                "model": {"path": str(tiny_inputs / "model")},  # the dtype is settled by the run
                "data": {name: str(tiny_inputs / f"{name}.jsonl") for name in ("train", "eval")},
                "train": {"max_steps": 4, "micro_batch_size": 2, "accumulation": 2},
                "schedule": {"learning_rate": 1e-2, "lr_warmup_steps": 1},
                "lora": {"r": 4, "alpha": 8},
                "eval": {"samples": 0},
                "log": {"tensorboard": False},
            }
        )
    )
    for said in ("training with lora.r=2", "runs/tiny-2: finished, with the same settings; taken as it is"):
        assert compare.main(["--ab", "lora.r=2,4", "tiny.json", "--json", "--out=ab"]) == 0
        shown = capsys.readouterr().out
        assert said in shown
    found, metrics = json.loads(shown[shown.index("\n{") + 1 :]), record.read_metrics(tmp_path / "runs" / "tiny-4")
    assert [run["name"] for run in found["runs"]] == ["2", "4"] and found["settings"]["lora.r"] == [2, 4] and found["rows"] == 6
    assert found["runs"][1]["loss"] == pytest.approx(metrics[-1]["eval/loss"]) and (tmp_path / "ab" / "compare.md").is_file()


def test_values_are_split_at_commas_outside_brackets():
    assert compare.split('["q_proj","v_proj"],["all-linear"]') == ['["q_proj","v_proj"]', '["all-linear"]'] and compare.split(
        "1e-4, 2e-4"
    ) == ["1e-4", "2e-4"]
