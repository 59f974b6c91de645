"""The run: what it learns, what it writes down, and that neither an interruption nor how it is watched changes it.

Runs are real ones, in this process, of a model with 64 channels on 23 rows; a few are processes of their own.
"""
import gc
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT, differences, make_model

import checkpoint
import data
import eval as evaluation
import lora_layers
import memory
import model
import quant
import record
import train

TINY = {"lora": {"r": 4, "alpha": 8.0}, "train": {"micro_batch_size": 2, "accumulation": 2, "max_steps": 8},
        "schedule": {"learning_rate": 1e-2, "lr_min": 1e-3, "lr_warmup_steps": 2},
        "eval": {"every_steps": 4, "samples": 1, "max_new_tokens": 3, "unquantised": "no"},
        "save": {"every_steps": 4}, "log": {"every_steps": 4, "tensorboard": False, "report": False}, "proof": {"enabled": False}}
# 15 steps, the last one of 5 samples
EVERYTHING = ["--lora.dropout=0.1", "--train.max_steps=0", "--train.epochs=3", "--schedule.batch_points=[[1,3],[5,4],[9,6]]",
              "--schedule.clip_percentile=40", "--schedule.clip_norm=100", "--schedule.clip_window=10", "--eval.patience=5",
              "--eval.min_delta=0.2", "--save.every_steps=3", "--save.keep=9"]
# what depends on the clock, or on how a run is watched
WATCHED = re.compile(r"(seconds|per_second|memory_gib|^eval/.*|^adapters/.*|^proof/.*|^startup/.*|^alerts)$")


@pytest.fixture(autouse=True)
def handlers_and_threads():
    """Signal handlers as they were, and one thread: what is compared bit for bit must not be summed in another order."""
    before, threads = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}, torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def launch(tiny_inputs, tmp_path):
    """launch("name", *options) trains into tmp_path/name and returns the exit code; of an option given twice, the last holds."""
    path = tmp_path / "tiny.json"
    places = {"model": {"path": str(tiny_inputs / "model")},
              "data": {"train": str(tiny_inputs / "train.jsonl"), "eval": str(tiny_inputs / "eval.jsonl")}}
    path.write_text(json.dumps(TINY | places))

    def run(name, *options):
        return train.main(run.arguments(name, *options))

    run.arguments = lambda name, *options: [str(path), f"--out={tmp_path / name}",
                                            *{option.partition("=")[0]: option for option in options}.values()]
    return run


def unrehearsed(*args):
    """In memory.rehearse's place, where a test counts forward passes."""
    return {"step_seconds": 1.0, "peak_bytes": 1, "available_bytes": 2**40}


def curve(run):
    """Every step of a run but what depends on clock and watching."""
    return [{tag: value for tag, value in line.items() if not WATCHED.search(tag)} for line in record.read_metrics(run) if line["step"]]


def column(run, tag):
    return [line[tag] for line in record.read_metrics(run) if tag in line]


def newest(run):
    return checkpoint.load(checkpoint.newest_valid(run)[0])


def assert_same_end(a, b):
    """Adapters, optimizer and generators of two runs' newest checkpoints, bit for bit, and the state but for clock and watching."""
    a, b = newest(a), newest(b)
    assert a["step"] == b["step"] and a["tensors"].keys() == b["tensors"].keys()
    for file, tensors in a["tensors"].items():
        assert tensors.keys() == b["tensors"][file].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, b["tensors"][file][name]), (file, name)
    for name in a["state"].keys() - {"line", "accepted"}:
        assert a["state"][name] == b["state"][name], name


def after_samples(number, what, monkeypatch):
    """Call what() when the window that begins at sample `number` is taken, once."""
    real, done = data.sample_stream, []

    def stream(n_rows, seed, start, count):
        if start >= number and not done:
            done.append(what())
        return real(n_rows, seed, start, count)

    monkeypatch.setattr(data, "sample_stream", stream)


def spoil(monkeypatch, rows, how):
    """how(loss) in place of the loss of training micro-batches that hold one of `rows` (None: all)."""
    real = model.summed_loss

    def loss_of(network, batch):
        loss, nll, correct = real(network, batch)
        return (how(loss) if torch.is_grad_enabled() and (rows is None or set(rows) & set(batch.samples)) else loss), nll, correct

    monkeypatch.setattr(model, "summed_loss", loss_of)


def nan_gradient(loss):
    loss.register_hook(lambda gradient: gradient * math.nan)
    return loss


# ------------------------------------------------------------------------------------------------------------ learning

def test_the_loss_falls(launch, tmp_path, capsys):
    assert launch("run", "--train.max_steps=40", "--train.accumulation=4", "--schedule.learning_rate=2e-2") == 0
    losses = column(tmp_path / "run", "train/loss")
    assert len(losses) == 40 and sum(losses[-5:]) / 5 < losses[0] - 2
    evals = record.read_metrics(tmp_path / "run")
    assert evals[-1]["eval/loss"] < evals[0]["eval/loss"] - 1 and evals[-1]["eval/token_accuracy"] > evals[0]["eval/token_accuracy"] + 0.2
    shown = capsys.readouterr().out
    assert "samples before training" in shown and "samples after training" in shown and f"loss {evals[-1]['eval/loss']:.4f}" in shown
    assert max(map(len, re.sub(re.escape(str(tmp_path)), "runs", shown).splitlines())) <= 90


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_how_a_window_is_split_changes_nothing_but_rounding(launch, tmp_path, quant):
    for name, split in (("a", ["8", "1", "4096"]), ("b", ["4", "2", "100"]), ("c", ["2", "4", "1"])):
        keys = ("train.micro_batch_size", "train.accumulation", "memory.max_tokens")
        launch(name, f"--model.quant={quant}", "--model.compute_dtype=fp32", *(f"--{key}={value}" for key, value in zip(keys, split)))
    for tag, tolerance in (("train/loss", 1e-5), ("train/grad_norm", 1e-4), ("eval/loss", 1e-5)):
        for other in "bc":
            assert column(tmp_path / other, tag) == pytest.approx(column(tmp_path / "a", tag), rel=tolerance)


def test_the_loss_of_a_window_is_the_mean_over_its_supervised_tokens(launch, tmp_path, tiny_inputs):
    """Not a mean of means: transformers' own sum over every row of the first window, divided once."""
    from transformers import AutoModelForCausalLM
    launch("run", "--train.max_steps=1", "--schedule.lr_warmup_steps=0", "--model.quant=none", "--model.compute_dtype=fp32",
           "--memory.max_tokens=1")
    tokenizer = data.load_tokenizer(tiny_inputs / "model")
    rows = data.tokenize(data.read_rows(str(tiny_inputs / "train.jsonl")), tokenizer, train.settings.Data())
    network, total, count = AutoModelForCausalLM.from_pretrained(tiny_inputs / "model"), 0.0, 0
    for r in data.sample_stream(23, 0, 0, 4):
        at = slice(rows.offsets[r], rows.offsets[r + 1])
        ids, supervised = torch.from_numpy(rows.ids[at]).long(), torch.from_numpy(rows.supervised[at])
        labels = torch.where(supervised, ids, -100)
        total += network(input_ids=ids[None], labels=labels[None]).loss.item() * int(supervised.sum())
        count += int(supervised.sum())
    first, = curve(tmp_path / "run")
    assert first["train/supervised_tokens"] == count and first["train/loss"] == pytest.approx(total / count, rel=1e-5)


def test_one_step_of_adamw_decays_both_matrices_and_moves_b_by_the_rate(launch, tmp_path):
    launch("run", "--train.max_steps=1", "--train.weight_decay=0.5", "--schedule.lr_warmup_steps=0", "--schedule.clip_norm=0",
           "--train.adam_eps=1e-30")
    after = newest(tmp_path / "run")["tensors"]["adapter_model.safetensors"]
    before = lora_layers.adapters(model.load(train.settings.read(tmp_path / "run" / "config.json"), "cpu"))  # drawn anew from the same seed
    for name in after:
        if ".lora_A." in name:  # its gradient is 0 while B is 0: only decay moves it
            torch.testing.assert_close(after[name], before[name].detach() * (1 - 1e-2 * 0.5))
        else:  # the first step of Adam has length 1 in every element whose gradient is not 0
            moved = after[name][after[name] != 0]
            assert len(moved) and before[name].count_nonzero() == 0
            torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-2))


def test_the_norm_is_logged_before_clipping_and_what_is_applied_is_clipped(launch, tmp_path, monkeypatch):
    applied = []

    class Spy(torch.optim.AdamW):
        def step(self):
            applied.append(torch.linalg.vector_norm(self.param_groups[0]["params"][0].grad).item())
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    launch("run", "--schedule.clip_norm=0.3", "--train.max_steps=12", "--schedule.clip_percentile=50")
    lines = curve(tmp_path / "run")
    logged, thresholds = [line["train/grad_norm"] for line in lines], [line["train/clip_threshold"] for line in lines]
    assert applied == pytest.approx([min(norm, threshold) for norm, threshold in zip(logged, thresholds)], rel=1e-4)
    assert max(applied) <= 0.3 * (1 + 1e-6) < max(logged)
    assert [line["train/clipped"] for line in lines] == [float(norm > threshold) for norm, threshold in zip(logged, thresholds)]
    assert set(thresholds[:11]) == {0.3}


def test_fp16_trains_and_its_loss_scale_is_halved_by_a_step_that_overflows(launch, tmp_path, monkeypatch, capsys):
    real, calls = model.summed_loss, []
    monkeypatch.setattr(memory, "rehearse", unrehearsed)

    def overflow_in_step_3(network, batch):
        loss, *rest = real(network, batch)
        calls.append(network.training and torch.is_grad_enabled())
        return (nan_gradient(loss) if calls[-1] and sum(calls) == 3 else loss, *rest)

    monkeypatch.setattr(model, "summed_loss", overflow_in_step_3)
    assert launch("run", "--model.compute_dtype=fp16", "--train.max_steps=30", "--train.nonfinite_limit=1",
                  "--schedule.learning_rate=3e-2") == 0
    lines = curve(tmp_path / "run")
    assert [line["train/loss_scale"] for line in lines] == [65536.0] * 2 + [32768.0] * 28
    assert [line["step"] for line in lines if line["train/skipped"]] == [3] and "step 3 was not applied" in capsys.readouterr().out
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.3


def test_the_loss_scale_doubles_after_2000_finite_steps_and_never_falls_below_1():
    scaler = {"scale": torch.tensor(8.0), "good_steps": torch.tensor(1998.0)}
    seen = []
    for finite in (True, True, True, False, False, False, False, False, False):
        train.rescale(scaler, torch.tensor(finite))
        seen.append((scaler["scale"].item(), scaler["good_steps"].item()))
    assert seen == [(8, 1999), (16, 0), (16, 1), (8, 0), (4, 0), (2, 0), (1, 0), (1, 0), (1, 0)]


# ---------------------------------------------------------------------------------------------------------- non-finite

@pytest.mark.parametrize("how", [lambda loss: loss * math.nan, nan_gradient], ids=["loss", "gradient alone"])
def test_a_window_that_is_not_finite_is_skipped_with_its_rows_named(launch, tmp_path, monkeypatch, capsys, how):
    third = data.sample_stream(23, 0, 8, 4)
    spoil(monkeypatch, third[:1], how)
    assert launch("run", "--eval.every_steps=1", "--eval.samples=0") == 0
    lines = record.read_metrics(tmp_path / "run")
    bad = [line["step"] for line in lines if line.get("train/skipped")]
    assert bad == [3, *(step for step in range(4, 9) if third[0] in data.sample_stream(23, 0, 4 * step - 4, 4))]
    digests = [line["eval/adapter_digest"] for line in lines]  # of step 0, 1, ...
    assert [step for step in range(1, 9) if digests[step] == digests[step - 1]] == bad
    told = next(line for line in capsys.readouterr().out.splitlines() if "step 3 was not applied" in line)
    assert all(f"train.jsonl:{r + 1}" in told for r in third)


@pytest.mark.parametrize("watch", [[f"--eval.every_steps={every}", f"--save.every_steps={every}"] for every in (0, 5, 1)])
def test_so_many_steps_in_a_row_that_are_not_finite_stop_the_run(launch, tmp_path, monkeypatch, capsys, watch):
    bad = {3, 4}
    real, steps = model.summed_loss, []
    after_each = data.sample_stream
    def noted(n, seed, start, count):
        steps.append(start // 4 + 1)
        return after_each(n, seed, start, count)

    def not_finite_in_bad_steps(network, batch):
        loss, *rest = real(network, batch)
        return (loss * math.nan if torch.is_grad_enabled() and steps[-1] in bad else loss, *rest)

    monkeypatch.setattr(data, "sample_stream", noted)
    monkeypatch.setattr(model, "summed_loss", not_finite_in_bad_steps)
    assert launch("run", "--train.nonfinite_limit=2", *watch) == 4
    assert [line["step"] for line in curve(tmp_path / "run")] == [1, 2, 3, 4]
    assert "2 steps in a row were not finite" in capsys.readouterr().out
    assert launch("other", "--train.nonfinite_limit=3", *watch) == 0


def test_a_window_without_a_supervised_token_is_skipped_and_does_not_stop_the_run(launch, tmp_path, monkeypatch):
    real = data.pack
    packs = [0]  # the rehearsal packs the first window too
    third = lambda rows: len(rows) == 23 and packs.append(1) is None and len(packs) == 5
    monkeypatch.setattr(data, "pack", lambda rows, samples, most: [] if third(rows) else real(rows, samples, most))
    assert launch("run", "--train.nonfinite_limit=1", "--model.compute_dtype=fp16") == 0
    lines = curve(tmp_path / "run")
    assert [line["step"] for line in lines if line["train/skipped"]] == [3]
    assert lines[2]["train/supervised_tokens"] == 0 and lines[2]["train/loss"] == 0
    assert {line["train/loss_scale"] for line in lines} == {65536.0}


# -------------------------------------------------------------------------------------------- watching changes nothing

def test_evaluating_saving_and_logging_do_not_change_the_curve(launch, tmp_path):
    launch("often", *EVERYTHING, "--eval.every_steps=1", "--save.every_steps=1", "--log.every_steps=1", "--log.tensorboard=true",
           "--eval.patience=0")
    launch("never", *EVERYTHING, "--eval.every_steps=0", "--save.every_steps=0", "--log.every_steps=99", "--eval.samples=0",
           "--eval.patience=0")
    assert len(set(column(tmp_path / "often", "train/clip_threshold"))) > 3  # the bound for 11 steps, then it follows the norms
    assert len(curve(tmp_path / "often")) == 15 and curve(tmp_path / "often") == curve(tmp_path / "never")
    for file in ("adapter_model.safetensors", "optimizer.safetensors", "generators.safetensors"):
        often, never = (newest(tmp_path / name)["tensors"][file] for name in ("often", "never"))
        assert all(torch.equal(tensor, never[name]) for name, tensor in often.items())


# -------------------------------------------------------------------------------------------------------------- resume

class Killed(BaseException):
    pass


def kill():
    raise Killed


def send(number):
    return lambda: os.kill(os.getpid(), number)


def test_a_run_that_was_killed_again_and_again_ends_as_if_it_had_not_been(launch, tmp_path, monkeypatch):
    assert launch("whole", *EVERYTHING) == 0
    for number, samples in enumerate((30, 10, 47, 66)):  # mid-run, before the checkpoint gone on from, ...
        with monkeypatch.context() as patch:
            after_samples(samples, kill, patch)
            try:
                launch("run", *EVERYTHING, *["--resume"] * bool(number))
            except Killed:
                pass
        gc.collect()  # frees the lock, as the end of a process would
        if number == 1:
            shutil.rmtree(checkpoint.newest_valid(tmp_path / "run")[0])
    assert launch("run", *EVERYTHING, "--resume") == 0
    whole = curve(tmp_path / "whole")
    assert [line["step"] for line in whole] == list(range(1, 16)) and curve(tmp_path / "run") == whole
    for tag in ("eval/loss", "eval/samples"):
        assert column(tmp_path / "run", tag) == column(tmp_path / "whole", tag)
    assert 0 < newest(tmp_path / "whole")["state"]["without_improvement"]  # the early-stopping counter was half counted
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("when, number, code", [
    ("in a step", signal.SIGINT, 130), ("in an evaluation", signal.SIGTERM, 143), ("in the first evaluation", signal.SIGINT, 130),
    ("in a save", signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_one_boundary_and_ends_as_if_it_had_not_been(launch, tmp_path, monkeypatch, capsys, when, number, code):
    launch("whole", *EVERYTHING)
    with monkeypatch.context() as patch:
        if when == "in a step":
            after_samples(20, send(number), patch)
        elif when == "in a save":
            real, saves = checkpoint.save, []
            patch.setattr(checkpoint, "save", lambda *args: (saves.append(1), send(number)() if len(saves) == 1 else None, real(*args))[2])
        else:
            real, calls = evaluation.evaluate, []
            at = 1 if "first" in when else 2
            patch.setattr(evaluation, "evaluate",
                          lambda *args: (calls.append(1), send(number)() if len(calls) == at else None, real(*args))[2])
        assert launch("run", *EVERYTHING) == code
    saved = checkpoint.newest_valid(tmp_path / "run")[0]
    assert f"saved {saved}" in capsys.readouterr().out
    assert saved.name == {"in a step": "step-000007", "in an evaluation": "step-000004", "in the first evaluation": "step-000000",
                          "in a save": "step-000004"}[when]
    assert launch("run", *EVERYTHING, "--resume") == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    for tag in ("step", "eval/loss", "eval/adapter_digest", "eval/samples", "train/loss"):
        assert column(tmp_path / "run", tag) == column(tmp_path / "whole", tag), tag
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_an_interrupted_overfit_is_not_told_to_go_on_for_it_cannot(launch, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        after_samples(4, send(signal.SIGINT), patch)
        assert launch("run", "--overfit=2") == 130
    said = capsys.readouterr().out
    assert "interrupted after step" in said and "--resume" not in said


def test_a_process_that_is_told_to_end_saves_exits_143_and_goes_on(launch, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = ["--train.max_steps=400", "--log.every_steps=1", "--eval.every_steps=0", "--lora.dropout=0.1"]
    process = subprocess.Popen([sys.executable, PROJECT / "train.py", *launch.arguments("run", *options)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "go on with --resume" in out and err == ""
    step = newest(tmp_path / "run")["step"]
    assert 5 <= step < 400 and f"interrupted after step {step}" in out
    assert [line["step"] for line in curve(tmp_path / "run")] == list(range(1, step + 1))


def test_going_back_to_an_earlier_checkpoint_repeats_what_came_after_it(launch, tmp_path):
    launch("run", *EVERYTHING)
    whole = curve(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    assert launch("run", *EVERYTHING, f"--resume={tmp_path / 'run/checkpoints/step-000006'}") == 0
    assert curve(tmp_path / "run") == whole
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_what_is_loaded_is_no_garbage_while_a_run_lasts_and_may_be_behind_it(launch, monkeypatch):
    rehearse, frozen = memory.rehearse, []
    monkeypatch.setattr(memory, "rehearse", lambda *given: frozen.append(gc.get_freeze_count()) or rehearse(*given))
    assert launch("run", "--train.max_steps=1", "--schedule.lr_warmup_steps=0", "--schedule.lr_min=0") == 0
    assert frozen[0] > 10_000 and gc.get_freeze_count() == 0


def test_a_run_goes_on_in_the_dtype_that_it_began_in_on_a_device_that_would_choose_another(launch, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quant, "has_bf16", lambda device: True)
    assert launch("run", "--train.max_steps=2", "--schedule.lr_warmup_steps=1") == 0
    monkeypatch.setattr(quant, "has_bf16", lambda device: False)
    assert launch("other", "--train.max_steps=2", "--schedule.lr_warmup_steps=1") == 0
    assert launch("run", "--train.max_steps=3", "--schedule.lr_warmup_steps=1", "--resume", "--accept=train.max_steps") == 0
    kept = [json.loads((tmp_path / name / "config.json").read_text())["model"]["compute_dtype"] for name in ("run", "other")]
    assert kept == ["bf16", "fp32"] and "computing in bf16" in capsys.readouterr().out.rpartition("network ")[2]
    state = json.loads((tmp_path / "run/checkpoints/step-000003/state.json").read_text())
    assert state["accepted"] == [{"step": 2, "train.max_steps": {"was": 2, "is": 3}}]


@pytest.mark.parametrize("matrix, step", [("lora_B", 1), ("lora_A", 2)])
def test_what_is_found_dead_in_the_first_steps_ends_the_run_and_is_in_its_record(launch, tmp_path, monkeypatch, capsys, matrix, step):
    """The proof before step 1 found all alive; in training itself one matrix gets no gradient."""
    import health
    import verdict
    real, load = train.ranks.total, model.load
    networks = []
    monkeypatch.setattr(model, "load", lambda *given: networks.append(load(*given)) or networks[-1])

    def total(tensor):
        if networks and tensor is networks[-1].adapter_memory.flat.grad:
            name = next(name for name in lora_layers.adapters(networks[-1]) if f".{matrix}." in name)
            dict(train.continuation.views(tensor, lora_layers.adapters(networks[-1])))[name].zero_()
        return real(tensor)

    monkeypatch.setattr(train.ranks, "total", total)
    assert launch("run", "--proof.enabled=true") == 4
    assert f"DEAD: after step {step} 1 of the {matrix}" in capsys.readouterr().out
    lines = curve(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, step + 1)), "every step that was taken is in the record"
    last = record.read_metrics(tmp_path / "run")[-1]
    assert last["proof/outcome"].startswith(f"dead: after step {step}") and last["train/grad_norm"] > 0
    assert verdict.of_run(tmp_path / "run").outcome == "FAIL"
    held = health.read(tmp_path / "run/metrics.jsonl")
    assert "dead gradients" in [found.name for found in health.diagnose(held)]


def test_a_run_goes_on_in_a_folder_of_its_own_with_the_record_until_there(launch, tmp_path, monkeypatch, capsys):
    launch("run", *EVERYTHING)
    at = tmp_path / "run/checkpoints/step-000006"
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    fork = [*EVERYTHING, f"--resume={at}"]
    with monkeypatch.context() as patch:  # killed before its first checkpoint: the same command begins again
        patch.setattr(checkpoint, "save", lambda *given: (_ for _ in ()).throw(MemoryError("killed")))
        with pytest.raises(MemoryError):
            launch("fork", *fork)
        gc.collect()
    assert launch("fork", *fork) == 0
    assert "begun in another folder: run@step-000006" in capsys.readouterr().out
    assert curve(tmp_path / "fork") == curve(tmp_path / "run")
    assert [found for found in differences(tmp_path / "fork", tmp_path / "run") if "best" not in found and "state" not in found] == []
    assert record.continues(tmp_path / "fork") == "run@step-000006" and record.continues(tmp_path / "run") == ""
    best = newest(tmp_path / "fork")["state"]["best_step"]
    assert best > 6 and checkpoint.find(f"{tmp_path / 'fork'}@best").name == f"step-{best:06d}"
    now = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert now == before, "the run that it came from was touched"
    (tmp_path / "lone").mkdir()
    shutil.copytree(at, tmp_path / "lone/step-000006")  # a checkpoint without its run: there is no record to take along
    assert launch("alone", *EVERYTHING, f"--resume={tmp_path / 'lone/step-000006'}") == 0
    assert [line["step"] for line in curve(tmp_path / "alone")][0] > 6


def test_a_run_does_not_go_on_from_another_ones_checkpoint_where_that_would_mix_two_records(launch, tmp_path, monkeypatch):
    launch("run", *EVERYTHING)
    launch("other", *EVERYTHING, "--train.seed=5")
    before = (tmp_path / "other/metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="another run"):
        launch("other", *EVERYTHING, f"--resume={tmp_path / 'run/checkpoints/step-000006'}")
    assert (tmp_path / "other/metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="end of its run.*train.max_steps"):
        launch("new", *EVERYTHING, f"--resume={tmp_path / 'run'}")
    config, _, *rest = launch.arguments("unused", *EVERYTHING, f"--resume={tmp_path / 'run/checkpoints/step-000006'}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"no checkpoint of runs/tiny.*--out={tmp_path / 'run'}"):
        train.main([config, *rest])
    assert not (tmp_path / "new").exists() and not (tmp_path / "runs").exists()


def test_a_finished_run_is_not_trained_again(launch, tmp_path, capsys):
    launch("run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert launch("run", "--resume") == 0
    assert "finished already" in capsys.readouterr().out and (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_resume_with_nothing_there_is_refused_and_makes_nothing(launch, tmp_path):
    with pytest.raises(ValueError, match="nothing to go on from"):
        launch("run", "--resume")
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_no_checkpoint_to_go_on_from(launch, tmp_path):
    launch("run")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(checkpoint.newest_valid(tmp_path / "run")[0] / name, adapter)
    with pytest.raises(ValueError, match="--lora.init_from="):
        launch("run", f"--resume={adapter}")


@pytest.mark.parametrize("changed", ["training rows", "evaluation rows", "base weights", "chat template", "train.seed", "lora.alpha",
                                     "memory.max_tokens", "generators"])
def test_a_run_does_not_go_on_with_something_else_unless_that_is_accepted_by_name(launch, tmp_path, tiny_inputs, changed):
    inputs = tmp_path / "inputs"
    shutil.copytree(tiny_inputs, inputs)
    where = [f"--model.path={inputs / 'model'}", f"--data.train={inputs / 'train.jsonl'}", f"--data.eval={inputs / 'eval.jsonl'}",
             "--eval.samples=0"]
    launch("run", *where)
    shutil.rmtree(tmp_path / "run/checkpoints/step-000008")
    if changed in ("training rows", "evaluation rows"):
        file = inputs / {"training rows": "train.jsonl", "evaluation rows": "eval.jsonl"}[changed]
        text = file.read_text()
        file.write_text(text.replace("orange", "Orange", 1))
        assert text != file.read_text()
    elif changed == "base weights":
        make_model(inputs / "model", seed=1)
    elif changed == "chat template":
        template = inputs / "template.jinja"
        template.write_text(data.load_tokenizer(inputs / "model").chat_template + "{# another #}")
        where.append(f"--data.chat_template={template}")
    elif changed == "generators":
        saved = newest(tmp_path / "run")
        del saved["tensors"]["generators.safetensors"]
        checkpoint.save(tmp_path / "run", 4, saved["tensors"], saved["texts"], 3)
    else:
        where.append(f"--{changed}=16")
    with pytest.raises(ValueError, match=rf"\n  {changed}: was "):
        launch("run", *where, "--resume")
    assert launch("run", *where, "--resume", f"--accept={changed}") == 0
    accepted, = newest(tmp_path / "run")["state"]["accepted"]
    assert accepted["step"] == 4 and changed in accepted


def test_files_may_move_and_a_run_may_be_watched_otherwise(launch, tmp_path, tiny_inputs):
    launch("run")
    launch("whole")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000008")
    shutil.copytree(tiny_inputs, tmp_path / "moved")
    moved = [f"--model.path={tmp_path / 'moved/model'}", f"--data.train={tmp_path / 'moved/train.jsonl'}",
             f"--data.eval={tmp_path / 'moved/eval.jsonl'}"]
    assert launch("run", "--resume", *moved, "--eval.every_steps=3", "--save.every_steps=1", "--memory.checkpoint_layers=1",
                  "--criteria.minimum_eval_loss_drop=9", "--alerts.window=20") == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "whole") and newest(tmp_path / "run")["state"]["accepted"] == []


def test_the_packing_chosen_at_the_start_is_kept(launch, tmp_path):
    launch("run", "--memory.max_tokens=50")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000008")
    assert launch("run", "--resume") == 0
    assert newest(tmp_path / "run")["state"]["plan"]["max_tokens"] == 50


# --------------------------------------------------------------------------------------------------- evaluation, best

def scripted(monkeypatch, losses):
    """Evaluations that return `losses` in turn."""
    real, left = evaluation.evaluate, list(losses)
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: (real(*args)[0] | {"loss": left.pop(0)}, real(*args)[1]))


def test_early_stopping_stops_saves_says_so_and_can_be_lifted(launch, tmp_path, monkeypatch, capsys):
    stopping = ["--eval.every_steps=2", "--eval.patience=2", "--eval.min_delta=0.1"]
    with monkeypatch.context() as patch:
        scripted(patch, [5.0, 4.0, 3.95, 3.91])
        assert launch("run", *stopping) == 0
    assert newest(tmp_path / "run")["step"] == 6
    assert "stopped early: the evaluation loss no longer fell by 0.1 (eval.min_delta)" in capsys.readouterr().out
    assert launch("run", *stopping, "--resume") == 0 and "finished already" in capsys.readouterr().out
    launch("whole", "--eval.every_steps=2")
    assert launch("run", "--eval.every_steps=2", "--resume") == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_the_best_checkpoint_is_saved_and_stays(launch, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, [5.0, 4.0, 3.0, math.nan, 3.5, 3.6, 3.7, 3.8, 3.9])
    assert launch("run", "--eval.every_steps=1", "--save.every_steps=3", "--save.keep=1") == 0
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-000002", "step-000008"]
    assert checkpoint.find(f"{tmp_path / 'run'}@best").name == "step-000002" and "best after step 2" in capsys.readouterr().out


def test_a_run_that_begins_with_a_loss_of_nan_can_still_save(launch, tmp_path, monkeypatch):
    scripted(monkeypatch, [math.nan, math.nan, 3.0])
    assert launch("run") == 0
    assert newest(tmp_path / "run")["state"]["best_loss"] == 3.0
    assert math.isnan(record.read_metrics(tmp_path / "run")[0]["eval/loss"])


# ----------------------------------------------------------------------------------------------------------- the record

def test_metrics_hold_every_step_and_tensorboard_mirrors_them(launch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    launch("run", "--log.tensorboard=true")
    lines = record.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(9))
    for tag in ("train/loss", "train/grad_norm", "train/learning_rate", "train/supervised_tokens", "train/tokens_per_second",
                "train/clip_threshold", "train/clipped", "train/skipped"):
        assert all(tag in line for line in lines[1:]), tag
    for tag in ("eval/loss", "eval/perplexity", "eval/token_accuracy", "eval/stop_rate", "eval/adapter_digest", "eval/samples"):
        assert [line["step"] for line in lines if tag in line] == [0, 4, 8], tag
    assert [line["step"] for line in lines if "adapters/lora_B_norm" in line] == [4, 8]
    assert {"prompt", "text", "reference", "stopped"} <= json.loads(lines[8]["eval/samples"])[0].keys()
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    tags = {tag for line in lines for tag, value in line.items() if not isinstance(value, str)} - {"step"}
    assert tags <= set(events.Tags()["scalars"])
    for tag in tags:
        told = {line["step"]: line[tag] for line in lines if tag in line}
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(told, rel=1e-6)
    assert {"adapters/lora_A_norm", "adapters/lora_B_norm"} <= set(events.Tags()["histograms"])
    assert "eval/samples/text_summary" in events.Tags()["tensors"]


def test_adapter_norms_are_those_of_the_step_they_stand_at(launch, tmp_path):
    launch("run", "--log.every_steps=1", "--save.every_steps=1", "--save.keep=9")
    launch("seldom", "--log.every_steps=1", "--save.every_steps=0", "--eval.every_steps=0")
    for line in record.read_metrics(tmp_path / "run")[1:]:
        tensors = checkpoint.load(tmp_path / f"run/checkpoints/step-{line['step']:06d}")["tensors"]["adapter_model.safetensors"]
        norms = [tensor.norm().item() for name, tensor in tensors.items() if ".lora_B." in name]
        assert line["adapters/lora_B_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    assert column(tmp_path / "seldom", "adapters/lora_B_norm") == column(tmp_path / "run", "adapters/lora_B_norm")


def test_the_run_folder_holds_settings_that_make_the_same_run_again(launch, tmp_path):
    launch("run", "--lora.dropout=0.1")
    launch("again", "--overwrite")
    assert train.main([str(tmp_path / "run/config.json"), f"--out={tmp_path / 'third'}"]) == 0
    assert curve(tmp_path / "third") == curve(tmp_path / "run") != curve(tmp_path / "again")
    assert json.loads((tmp_path / "run/environment.json").read_text())["packages"]["torch"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock", "checkpoints", "config.json", "environment.json", "evaluations", "forecast.json", "metrics.jsonl", "verdict.json"}


def test_peft_loads_what_was_trained_and_gives_the_same_logits(launch, tmp_path, tiny_inputs):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    launch("run", "--model.quant=none", "--model.compute_dtype=fp32", "--lora.rslora=true")
    base = AutoModelForCausalLM.from_pretrained(tiny_inputs / "model")
    network = PeftModel.from_pretrained(base, checkpoint.newest_valid(tmp_path / "run")[0]).eval()
    rows = data.tokenize(data.read_rows(str(tiny_inputs / "eval.jsonl")), data.load_tokenizer(tiny_inputs / "model"), train.settings.Data())
    total = 0.0
    for r in range(len(rows)):
        at = slice(rows.offsets[r], rows.offsets[r + 1])
        ids, supervised = torch.from_numpy(rows.ids[at]).long(), torch.from_numpy(rows.supervised[at])
        total += network(input_ids=ids[None], labels=torch.where(supervised, ids, -100)[None]).loss.item() * int(supervised.sum())
    assert record.read_metrics(tmp_path / "run")[-1]["eval/loss"] == pytest.approx(total / rows.counts["supervised_tokens"], rel=1e-5)


# -------------------------------------------------------------------------------------------------- starts and refusals

def test_a_second_run_does_not_touch_the_first_unless_told_to(launch, tmp_path):
    launch("run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="--resume.*--out=.*--overwrite"):
        launch("run", "--train.seed=1")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError):  # not even with --overwrite, as long as the new one is not accepted
        launch("run", "--overwrite", "--data.train=none.jsonl")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert launch("run", "--overwrite", "--train.seed=1") == 0
    assert curve(tmp_path / "run") != [json.loads(line) for line in before.splitlines()] and len(curve(tmp_path / "run")) == 8


def test_two_trainers_do_not_share_a_folder(launch, tmp_path):
    held = checkpoint.lock(tmp_path / "run")
    with pytest.raises(ValueError, match=f"pid {os.getpid()}"):
        launch("run")
    held.close()


def test_a_run_can_start_from_an_adapter(launch, tmp_path):
    launch("first")
    adapter = checkpoint.newest_valid(tmp_path / "first")[0]
    assert launch("second", f"--lora.init_from={adapter}", "--train.max_steps=1", "--schedule.lr_warmup_steps=0") == 0
    first, second = (record.read_metrics(tmp_path / name) for name in ("first", "second"))
    assert second[0]["eval/adapter_digest"] == first[-1]["eval/adapter_digest"]
    for changes, said in ((["--lora.r=8"], r"--lora.r=4"), (["--lora.alpha=4"], r"--lora.alpha=8"),
                          (["--lora.rslora=true"], "--lora.rslora=false"), (["--lora.targets=q_proj"], "other targets")):
        with pytest.raises(ValueError, match=said):
            launch("third", f"--lora.init_from={adapter}", *changes)
    assert not (tmp_path / "third").exists()


def broken(tiny_inputs, folder, what):
    """Overrides of a run with one thing wrong, made in `folder`."""
    rows = folder / "rows.jsonl"
    if what.startswith("rows:"):
        rows.write_bytes({"empty": b"", "json": b'{"text": "a"}\n{"text": \n', "null": b"null\n",
                          "column": b'{"question": "a", "answer": "b"}\n',
                          "type": b'{"messages": "hello"}\n', "role": b'{"messages": [{"role": "boss", "content": "a"}]}\n',
                          "turns": b'{"messages": [{"role": "user", "content": "a"}]}\n'}[what[5:]])
        return [f"--data.train={rows}"]
    if what.startswith("tokenizer:"):
        shutil.copytree(tiny_inputs / "model", folder / "model")
        settings = json.loads((folder / "model/tokenizer_config.json").read_text())
        (folder / "model/chat_template.jinja").unlink(missing_ok=True)
        settings.pop("chat_template", None)
        if what == "tokenizer:neither":
            settings.pop("eos_token", None)
        (folder / "model/tokenizer_config.json").write_text(json.dumps(settings))
        return [f"--model.path={folder / 'model'}"]
    return {"no model": ["--model.path=no/such/model"], "no rows": ["--data.train=none.jsonl"], "no eval rows": ["--data.eval=none.jsonl"],
            "no prompts": ["--eval.prompts=none.txt"], "no template file": ["--data.chat_template=none.jinja"],
            "no initial adapter": ["--lora.init_from=none"],
            "held out": ["--data.eval=", "--data.eval_rows=23"]}[what]


@pytest.mark.parametrize("what, said", [
    ("no model", "model.path"), ("no rows", "none.jsonl: no such file"), ("no eval rows", "none.jsonl: no such file"),
    ("no prompts", "none.txt: no such file"), ("no template file", "data.chat_template"),
    ("no initial adapter", "none: not a run folder"), ("held out", "data.eval_rows"), ("rows:empty", "rows.jsonl: holds no rows"),
    ("rows:json", "rows.jsonl:2: not valid JSON"), ("rows:null", "rows.jsonl:1: a row must be an object"),
    ("rows:column", "rows.jsonl:1: the keys question, answer"), ("rows:type", "rows.jsonl:1: messages must be a list"),
    ("rows:role", "rows.jsonl:1: .*boss"), ("rows:turns", "rows.jsonl:1: no assistant turn"),
    ("tokenizer:no template", "rows?.*template|template.*data.chat_template"), ("tokenizer:neither", "neither a chat template nor an eos"),
])
def test_bad_input_is_refused_before_the_model_is_loaded_and_leaves_nothing_behind(launch, tmp_path, tiny_inputs, monkeypatch, what, said):
    monkeypatch.setattr(model, "load", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=said):
        launch("run", *broken(tiny_inputs, tmp_path, what))
    assert not (tmp_path / "run").exists()


def test_a_target_that_matches_nothing_and_a_foreign_tokenizer_leave_nothing_behind(launch, tmp_path, tiny_inputs):
    with pytest.raises(ValueError, match="lora.targets: 'query' matches no projection.*q_proj"):
        launch("run", "--lora.targets=query,v_proj")
    shutil.copytree(tiny_inputs / "model", tmp_path / "small")
    make_model(tmp_path / "small", vocab_size=64)
    with pytest.raises(ValueError, match="embeds ids below 64"):
        launch("run", f"--model.path={tmp_path / 'small'}")
    assert not (tmp_path / "run").exists()


def test_the_command_tells_a_bad_input_in_one_message_and_exits_2(launch, tmp_path):
    done = subprocess.run([sys.executable, PROJECT / "train.py", *launch.arguments("run", "--data.train=none.jsonl")],
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: none.jsonl: no such file")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, said", [
    ([], "give one configuration"), (["a.json", "b.json"], "give one configuration"),
    (["none.json"], "cannot read the configuration"), (["configs/quickstart.json", "--resume", "--overwrite"], "give one of them"),
    (["configs/quickstart.json", "--accept=train.seed"], "goes with --resume"),
    (["configs/quickstart.json", f"--out={pathlib.Path(__file__)}"], "is a file")])
def test_a_command_line_that_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        train.main(arguments)


def test_a_place_that_cannot_hold_a_run_is_refused_before_anything_loads(launch, tmp_path, monkeypatch):
    def loaded(*_):
        raise AssertionError("the tokenizer was loaded first")

    monkeypatch.setattr(train.data, "load_tokenizer", loaded)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for name, said in (("link", "leads nowhere"), ("file/run", "is a file"), ("a\0b", "zero byte")):
        with pytest.raises(ValueError, match=f"^--out: .*{said}"):
            launch(name)
    monkeypatch.setattr(train.os, "access", lambda *_: False)  # what a read-only file system says, to root too
    with pytest.raises(ValueError, match="^--out: .*cannot be written to; name another folder"):
        launch("a/b/run")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir() and path.name in ("a", "run")) == []


def test_a_finished_run_whose_record_was_lost_is_concluded_without_it(launch, tmp_path, capsys):
    assert launch("run") == 0
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    capsys.readouterr()
    launch("run", "--resume")
    assert "evaluation none in " in capsys.readouterr().out


def test_going_on_from_beyond_the_runs_end_is_refused_though_the_end_is_accepted(launch):
    assert launch("run") == 0
    said = r"--resume: the checkpoint is of step \d+, and the run as asked for ends with step 2; raise train.max_steps"
    with pytest.raises(ValueError, match=said):
        launch("run", "--resume", "--train.max_steps=2", "--schedule.lr_warmup_steps=1",
               "--accept=train.max_steps,schedule.lr_warmup_steps")
