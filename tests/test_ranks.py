"""Several ranks as one: the same training on one, two and four processes (gloo, on the CPU), and what happens when one of them fails.

Each rank is a process of its own, a fork of warm.py with torchrun's variables in its environment; one test uses torchrun itself.
"""
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PROJECT, curve, differences, free_port, make_config, make_model, newest
from safetensors.torch import load_file, save_file
from test_faults import at_sample, command, in_backward, live, loss_times, once, processes, send, tiny_settings  # noqa: F401  (the first and the last are fixtures)

import checkpoint
import data
import lora_layers
import model
import ranks
import record

EXACT = ["--model.compute_dtype=fp32", "--lora.dropout=0"]


def as_rank(rank, of, port, then, given):
    """In a child: be that rank, and do then(*given)."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(of), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    importlib.reload(ranks)
    then(*given)


def train_as_rank(arguments, log, fault, given, chosen):
    """A run as this rank; the fault is in rank `chosen` alone (None: in all)."""
    import train
    main = train.main
    train.main = ranks.together(main)
    live(arguments, f"{log}-{ranks.RANK}", fault if chosen in (None, ranks.RANK) else None, given)


@pytest.fixture
def fleet(processes, tmp_path):  # noqa: F811
    """fleet(count, then, *given) runs then(*given) in that many ranks; returns their processes."""
    started = []

    def begin(count, then, *given):
        port = free_port()
        fleet = [processes.Process(target=as_rank, args=(rank, count, port, then, given)) for rank in range(count)]
        for process in fleet:
            process.start()
        started.extend(fleet)
        return fleet

    yield begin
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.fixture
def run(fleet, tiny_settings, tmp_path):  # noqa: F811
    """run(count, "name", *options, fault=(function, ...), rank=1) trains in that many ranks; returns their exit codes, in order."""
    def wait(count, name, *options, fault=(None,), rank=None):
        started = fleet(count, train_as_rank, command(tiny_settings, tmp_path / name, options), tmp_path / name, fault[0], fault[1:], rank)
        for process in started:
            process.join(100)
            assert process.exitcode is not None, "a rank hangs"
        return [process.exitcode for process in started]
    return wait


def log(tmp_path, name, rank=0):
    return (tmp_path / f"{name}-{rank}").read_text()


def far(a, b, tags=("train/loss", "train/grad_norm", "train/tokens", "train/supervised_tokens", "eval/loss", "eval/token_accuracy")):
    """The largest relative difference between two runs' figures."""
    assert len(curve(a)) == len(curve(b)) > 0
    pairs = [(x[tag], y[tag]) for x, y in zip(curve(a), curve(b)) for tag in tags if tag in x]
    assert all((tag in x) == (tag in y) for x, y in zip(curve(a), curve(b)) for tag in tags)
    return max(abs(u - v) / max(abs(u), 1e-9) for u, v in pairs)


# ---------------------------------------------------------------------------------------------------- the same gradient

def gradient_of_window(folder, lengths, dtype, sharded, place):
    """The gradient of a window of documents of these lengths, summed over all ranks, as the training loop forms it; the first rank writes it down."""
    ranks.start(60)
    config = make_config(folder, "none" if dtype == "fp64" else "nf4", dtype, memory={"shard": sharded})
    network = model.load(config, "cpu")
    rows = window_rows(lengths)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, matrix in lora_layers.adapters(network).items():
            if ".lora_B." in name:
                matrix.copy_(0.1 * torch.randn(matrix.shape, generator=generator))
    window = data.share(rows, list(range(len(lengths))), 40, sharded and ranks.RANKS > 1)
    supervised = ranks.total(torch.tensor(sum(len(batch.targets) for batch in window))).item()
    loss = torch.zeros(())
    for batch in window:
        part, _, _ = model.summed_loss(network, batch)
        (part / supervised).backward()
        loss += part.detach().float() / supervised
    gradient = ranks.total(network.adapter_memory.flat.grad)
    ranks.total(loss)
    if ranks.FIRST:
        save_file({"gradient": gradient, "loss": loss}, place)
    ranks.finish()


def window_rows(lengths):
    """data.Rows of random documents; a negative length is a document without a supervised token."""
    import types
    import numpy as np
    generator = np.random.default_rng(0)
    offsets = np.cumsum([0] + [abs(n) for n in lengths])
    supervised = np.concatenate([np.r_[False, generator.random(abs(n) - 1) < 0.6] * (n > 0) for n in lengths]).astype(bool)
    return types.SimpleNamespace(ids=generator.integers(3, 300, offsets[-1]), supervised=supervised, offsets=offsets)


RAGGED = [3, 30, 7, 21, 12, 5, 16, 9]


@pytest.mark.parametrize("lengths", [RAGGED, [20], [12, -9, 5], [-9, 14]], ids=["ragged", "one document", "a masked one", "a rank with nothing to learn from"])
@pytest.mark.parametrize("count, dtype, sharded", [(2, "fp32", False), (3, "fp64", False), (2, "fp32", True), (2, "fp64", True)])
def test_the_gradient_of_a_window_is_that_of_one_process(fleet, tmp_path, lengths, count, dtype, sharded):
    make_model(tmp_path / "model", dtype=torch.float64 if dtype == "fp64" else torch.float32)
    found = []
    for n in (1, count):
        for process in fleet(n, gradient_of_window, tmp_path / "model", lengths, dtype, sharded, tmp_path / f"{n}.safetensors"):
            process.join(60)
            assert process.exitcode == 0
        found.append(load_file(tmp_path / f"{n}.safetensors"))
    alone, shared = found
    bound = 1e-10 if dtype == "fp64" else 1e-5
    assert (alone["gradient"] - shared["gradient"]).norm() <= bound * alone["gradient"].norm() and alone["gradient"].norm() > 0
    assert shared["loss"].item() == pytest.approx(alone["loss"].item(), rel=1e-6)


def test_ranks_get_about_as_many_tokens_each_and_every_sample_once(monkeypatch):
    rows, parts = window_rows([50, 3, 40, 8, 30, 20, 9, 33]), []
    monkeypatch.setattr(ranks, "RANKS", 3)
    for rank in range(3):
        monkeypatch.setattr(ranks, "RANK", rank)
        parts.append(ranks.share(rows, list(range(8))))
    assert sorted(sum(parts, [])) == list(range(8))
    loads = [sum(int(rows.offsets[i + 1] - rows.offsets[i]) for i in part) for part in parts]
    assert max(loads) - min(loads) <= 8


# ----------------------------------------------------------------------------------------------------------- the same run

@pytest.mark.parametrize("options", [[], ["--memory.shard=true"], ["--memory.shard=true", "--model.quant=int8", "--memory.checkpoint_layers=1"],
                                     ["--memory.shard=true", "--model.quant=none", "--memory.fused=false", "--memory.checkpoint_layers=2"], ["--train.accumulation=1", "--train.micro_batch_size=1"]],
                         ids=["replicated", "sharded", "sharded int8, recomputed", "sharded, plain layers", "windows of one sample"])
def test_two_ranks_train_as_one_does(run, tmp_path, options):
    assert run(1, "alone", *EXACT, *[option for option in options if "shard" not in option]) == [0]
    assert run(2, "two", *EXACT, *options) == [0, 0]
    assert far(tmp_path / "alone", tmp_path / "two") < 2e-5
    ours, theirs = (newest(tmp_path / name)["tensors"]["adapter_model.safetensors"] for name in ("alone", "two"))
    assert max((ours[name] - theirs[name]).norm() / ours[name].norm() for name in ours) < 1e-3  # Adam divides small differences by small gradients
    assert log(tmp_path, "two", 1).strip() == "", "the others are silent"


@pytest.mark.parametrize("sharded", [[], ["--memory.shard=true"]], ids=["replicated", "sharded"])
@pytest.mark.parametrize("dtype, bound", [("fp32", 1e-5), ("fp64", 1e-10)])
def test_the_first_step_of_a_run_applies_the_gradient_of_one_process(run, tmp_path, dtype, bound, sharded):
    """train.py's own: after one step AdamW's first moment is a tenth of the clipped gradient. Three ranks, one without a sample."""
    options = [f"--model.compute_dtype={dtype}", "--lora.dropout=0", "--train.max_steps=1", "--schedule.lr_warmup_steps=0", "--schedule.clip_norm=0.1",
               "--train.accumulation=1", *["--model.quant=none"] * (dtype == "fp64")]
    moments = []
    for count, more in ((1, []), (3, sharded)):
        assert run(count, f"of-{count}", *options, *more) == [0] * count
        moments.append({name: tensor for name, tensor in newest(tmp_path / f"of-{count}")["tensors"]["optimizer.safetensors"].items() if name.endswith("exp_avg")})
    norm = lambda tensors: sum(tensor.double().square().sum() for tensor in tensors).sqrt().item()
    alone, shared = moments
    assert norm(alone.values()) == pytest.approx(0.01, rel=1e-3), "a tenth of what the norm was clipped to"
    assert norm(alone[name] - shared[name] for name in alone) <= bound * norm(alone.values())


def test_llm_int8_is_the_same_model_sharded_as_replicated(run, tmp_path):
    """Not that of one rank: which columns are products in 16 bits follows from what a micro-batch holds."""
    options = ["--model.quant=llm_int8", "--lora.dropout=0", "--train.max_steps=4"]
    assert run(2, "whole", *options) == [0, 0] and run(2, "split", *options, "--memory.shard=true") == [0, 0]
    assert far(tmp_path / "whole", tmp_path / "split") < 1e-6


def test_a_warning_is_told_by_the_first_rank_alone(run, tmp_path):
    assert run(2, "two", *EXACT, "--train.max_steps=1", "--schedule.lr_warmup_steps=0", fault=(warn,)) == [0, 0]
    assert log(tmp_path, "two").count("warning: tokens that nobody trained") == 1 and log(tmp_path, "two", 1).strip() == ""


def warn():
    import eval as evaluation
    evaluation.untrained_tokens = lambda network, tokenizer, rows: "tokens that nobody trained"


def test_alerts_and_verdict_are_those_of_one_process(run, tmp_path):
    """Of the data of all ranks: the alerts of each step, what each criterion measured, what each evaluation row came to."""
    options = [*EXACT, "--train.max_steps=24", "--train.adam_eps=0.1", "--schedule.learning_rate=0.03", "--eval.every_steps=8",
               "--criteria.milestone_step=24", "--criteria.baseline=quantised", "--alerts.window=10", "--alerts.guessing=5.0"]
    assert run(1, "alone", *options) == [0] and run(2, "two", *options) == [0, 0]
    told = [[(line["step"], alert["name"]) for line in curve(tmp_path / name) for alert in json.loads(line.get("alerts", "[]"))] for name in ("alone", "two")]
    assert told[0] == told[1] and len(told[0]) >= 2
    judged = [json.loads((tmp_path / name / "verdict.json").read_text())["criteria"] for name in ("alone", "two")]
    assert [(entry["name"], entry["outcome"]) for entry in judged[0]] == [(entry["name"], entry["outcome"]) for entry in judged[1]]
    measured = [[entry["measured"] for entry in of_run if entry["measured"] is not None] for of_run in judged]
    assert measured[0] == pytest.approx(measured[1], rel=1e-3) and len(measured[0]) >= 5
    rows = [record.read_evaluations(tmp_path / name)[24][0] for name in ("alone", "two")]
    assert all(rows[0][what] == pytest.approx(rows[1][what], rel=1e-3) for what in ("nll", "tokens", "correct")) and len(rows[0]["nll"]) == 6


def test_the_record_says_how_many_ranks_and_what_the_one_with_most_memory_took(run, tmp_path):
    assert run(2, "two", *EXACT, "--log.report=true", fault=(takes, 7 * 2**30), rank=1) == [0, 0]
    assert all(line["train/peak_memory_gib"] == 7 for line in record.read_metrics(tmp_path / "two")[1:])
    assert json.loads((tmp_path / "two/environment.json").read_text())["ranks"] == 2 and "ranks     2 share each window\n" in log(tmp_path, "two")
    assert "Machine: 2 ranks, " in (tmp_path / "two/report.md").read_text()


def takes(size):
    import memory
    memory.peak = lambda device: size


def test_four_ranks_share_a_window_of_three_samples(run, tmp_path):
    options = [*EXACT, "--train.micro_batch_size=3", "--train.accumulation=1", "--train.max_steps=4", "--eval.every_steps=0", "--schedule.lr_warmup_steps=1"]
    assert run(1, "alone", *options) == [0] and run(4, "four", *options) == [0] * 4
    assert far(tmp_path / "alone", tmp_path / "four") < 2e-5


def test_a_sharded_model_takes_half_the_room_on_each_of_two_ranks(fleet, tmp_path):
    make_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    sizes = {}
    for name, sharded in (("whole", False), ("split", True)):
        for process in fleet(2, size_of_projections, tmp_path / "model", sharded, tmp_path / name):
            process.join(60)
            assert process.exitcode == 0
        sizes[name] = int((tmp_path / name).read_text())
    assert 0.5 <= sizes["split"] / sizes["whole"] < 0.53  # codebooks and offsets stay whole


def test_no_rank_ever_holds_more_than_its_part_and_a_layer_while_a_sharded_model_is_loaded(fleet, tmp_path):
    make_model(tmp_path / "model", num_hidden_layers=6)
    for process in fleet(2, most_held, tmp_path / "model", tmp_path / "held"):
        process.join(60)
        assert process.exitcode == 0
    most, at_the_end = json.loads((tmp_path / "held").read_text())
    assert at_the_end < most < at_the_end * (1 + 2.2 / 6), "of six layers one is whole, which is two parts; codebooks make up the rest"


def most_held(folder, place):
    """Write down how many bytes of frozen projections this rank held at most while it loaded, and how many at the end."""
    import loading
    import quant
    ranks.start(60)
    networks, seen = [], []
    make, read = loading.architecture, loading.read_tensor
    here = lambda parameter: (parameter.to_local() if hasattr(parameter, "to_local") else parameter).nbytes

    def held():
        weights = [module for module in networks[-1].modules() if isinstance(module, quant.FrozenWeight)]
        return sum(here(parameter) for weight in weights for parameter in weight.parameters() if not parameter.is_meta)

    loading.architecture = lambda *given: networks.append(make(*given)) or networks[-1]
    loading.read_tensor = lambda *given: seen.append(held()) or read(*given)
    model.load(make_config(folder, "nf4", memory={"shard": True}), "cpu")
    if ranks.FIRST:
        place.write_text(json.dumps([max(seen), held()]))
    ranks.finish()


def size_of_projections(folder, sharded, place):
    ranks.start(60)
    network = model.load(make_config(folder, "nf4", memory={"shard": sharded, "keep_dequantized": "no"}), "cpu")
    if ranks.FIRST:
        place.write_text(str(model.memory_table(network)["projections"][1]))
    ranks.finish()


# ------------------------------------------------------------------------------------------------------------- going on

DROPOUT = ["--lora.dropout=0.1", "--save.every_steps=2", "--save.keep=9", "--schedule.clip_percentile=40"]


def test_ranks_go_on_bit_for_bit(run, tmp_path):
    assert run(2, "peace", *DROPOUT) == [0, 0]
    assert run(2, "again", *DROPOUT, fault=(at_sample, 20, os._exit, 9)) == [9, 9]
    assert run(2, "again", *DROPOUT, "--resume") == [0, 0]
    assert differences(tmp_path / "peace", tmp_path / "again") == []


def test_the_generators_of_all_ranks_are_what_makes_it_so(run, tmp_path, monkeypatch):
    """The control of the test above: without the second rank's generator, dropout hits other elements."""
    assert run(2, "peace", *DROPOUT) == [0, 0]
    assert run(2, "again", *DROPOUT, fault=(at_sample, 20, os._exit, 9)) == [9, 9]
    assert run(2, "again", *DROPOUT, "--resume", fault=(forget_generator,), rank=1) == [0, 0]
    assert differences(tmp_path / "peace", tmp_path / "again") != []


def forget_generator():
    import continuation
    continuation.set_generators = lambda states, device: None


@pytest.mark.parametrize("count", [1, 4])
def test_another_number_of_ranks_goes_on_where_that_is_accepted(run, tmp_path, count):
    assert run(2, "run", *EXACT, fault=(at_sample, 20, os._exit, 9)) == [9, 9]
    codes = run(count, "run", *EXACT, "--resume")
    assert codes[0] == 2 and "ranks: was 2, is" in log(tmp_path, "run")
    assert run(count, "run", *EXACT, "--resume", "--accept=ranks") == [0] * count
    assert newest(tmp_path / "run")["state"]["accepted"] == [{"step": 4, "ranks": {"was": 2, "is": count}}]
    assert run(1, "alone", *EXACT) == [0] and far(tmp_path / "alone", tmp_path / "run") < 2e-5


@pytest.mark.parametrize("count", [1, 4])
def test_another_number_of_ranks_goes_on_bit_for_bit_where_the_window_splits_alike(run, tmp_path, count):
    """Windows of one sample: the first rank does all the work, whatever their number. (Evaluation rows are shared otherwise, so they differ by rounding.)"""
    options = ["--train.accumulation=1", "--train.micro_batch_size=1", "--lora.dropout=0"]
    assert run(2, "peace", *options) == [0, 0]
    assert run(2, "run", *options, fault=(at_sample, 5, os._exit, 9)) == [9, 9]
    assert run(count, "run", *options, "--resume", "--accept=ranks") == [0] * count and "ranks was 2, is" in log(tmp_path, "run")
    trained = lambda name: [{tag: value for tag, value in line.items() if tag.startswith("train/")} for line in curve(tmp_path / name)]
    assert trained("peace") == trained("run") and len(trained("run")) == 9
    ours, theirs = (newest(tmp_path / name)["tensors"] for name in ("peace", "run"))
    assert all(torch.equal(ours[file][name], theirs[file][name]) for file in ("adapter_model.safetensors", "optimizer.safetensors") for name in ours[file])


def test_an_alert_of_the_steps_before_a_resume_is_known_to_all_ranks(run, tmp_path):
    """The rate is high from step 1 on, which is told once: a rank that knew nothing of it would be told again after the resume, and end all."""
    options = [*DROPOUT, "--schedule.learning_rate=0.03", "--schedule.lr_kind=constant", "--schedule.lr_warmup_steps=0"]
    assert run(2, "run", *options, fault=(at_sample, 20, os._exit, 9)) == [9, 9]
    assert run(2, "run", *options, "--resume", "--alerts.stop=high rate") == [0, 0]
    assert [line["step"] for line in curve(tmp_path / "run") if "high rate" in line.get("alerts", "")] == [1]


def test_ranks_go_on_though_the_adapter_that_the_run_began_with_is_gone(run, tmp_path):
    assert run(1, "first", "--train.max_steps=1", "--schedule.lr_warmup_steps=0") == [0]
    initial = tmp_path / "first/checkpoints/step-000001"
    assert run(2, "run", *DROPOUT, f"--lora.init_from={initial}", fault=(at_sample, 20, os._exit, 9)) == [9, 9]
    initial.rename(tmp_path / "elsewhere")
    assert run(2, "run", *DROPOUT, f"--lora.init_from={initial}", "--resume") == [0, 0]


# ---------------------------------------------------------------------------------------------------------------- faults

def test_a_rank_that_is_killed_ends_the_others_at_once_and_nothing_is_lost(run, tmp_path):
    assert run(2, "peace", *DROPOUT) == [0, 0]
    began = time.monotonic()
    assert run(2, "killed", *DROPOUT, fault=(at_sample, 20, send, signal.SIGKILL), rank=1) == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 60 and "another rank has ended" in log(tmp_path, "killed")
    assert checkpoint.newest_valid(tmp_path / "killed")[0].name == "step-000004"
    assert run(2, "killed", *DROPOUT, "--resume") == [0, 0] and differences(tmp_path / "peace", tmp_path / "killed") == []


def test_a_rank_that_is_killed_while_others_wait_for_its_part_of_the_weights_ends_them_with_one_message(run, tmp_path):
    options = [*DROPOUT, "--memory.shard=true"]
    assert run(2, "killed", *options, fault=(in_backward, 6, send, signal.SIGKILL), rank=1) == [1, -signal.SIGKILL]
    assert log(tmp_path, "killed").count("another rank has ended") == 1 and "Traceback" not in log(tmp_path, "killed")
    assert run(2, "killed", *options, "--resume") == [0, 0]


def test_a_rank_that_fails_by_itself_ends_first_so_torchrun_reports_that_one(fleet, tiny_settings, tmp_path):  # noqa: F811
    first, second = fleet(2, train_as_rank, command(tiny_settings, tmp_path / "run", ["--data.train=none.jsonl"]), tmp_path / "run", None, (), None)
    first.join(60)
    assert first.exitcode == 2 and "none.jsonl: no such file" in log(tmp_path, "run")
    second.join(0.5)
    assert second.is_alive()
    second.join(60)
    assert second.exitcode == 1 and log(tmp_path, "run", 1).count("\n") == 1 and "another rank has ended, and said why" in log(tmp_path, "run", 1)


def test_the_first_rank_killed_ends_the_others_too(run, tmp_path):
    assert run(2, "killed", *DROPOUT, fault=(at_sample, 20, send, signal.SIGKILL), rank=0) == [-signal.SIGKILL, 1]
    assert "another rank has ended" in log(tmp_path, "killed", 1)


def test_a_rank_that_stalls_is_waited_for_so_long_and_no_longer(fleet, tiny_settings, tmp_path):  # noqa: F811
    arguments = command(tiny_settings, tmp_path / "run", [*DROPOUT, "--train.rank_wait=3"])
    first, second = fleet(2, train_as_rank, arguments, tmp_path / "run", at_sample, (20, send, signal.SIGSTOP), 1)
    first.join(60)
    assert first.exitcode == 1 and "did not come within train.rank_wait" in log(tmp_path, "run")
    assert checkpoint.newest_valid(tmp_path / "run")[0].name == "step-000004"


@pytest.mark.parametrize("sharded", [[], ["--memory.shard=true"]], ids=["replicated", "sharded"])
def test_a_signal_to_one_rank_ends_all_with_one_checkpoint(run, tmp_path, sharded):
    assert run(2, "peace", *DROPOUT, *sharded) == [0, 0]
    assert run(2, "ended", *DROPOUT, *sharded, fault=(at_sample, 20, send, signal.SIGTERM), rank=1) == [143, 143]
    assert checkpoint.newest_valid(tmp_path / "ended")[0].name == "step-000006" and "interrupted after step 6" in log(tmp_path, "ended")
    assert run(2, "ended", *DROPOUT, *sharded, "--resume") == [0, 0] and differences(tmp_path / "peace", tmp_path / "ended") == []


@pytest.mark.parametrize("owner, name, number", [("eval", "generate", 3), ("model", "summed_loss", 6), ("eval", "evaluate", 2), ("ranks", "words", 2), ("ranks", "words", 7)],
                         ids=["while the last samples are written", "in a window", "as an evaluation begins", "as the ranks ask each other before the first step", "as they ask each other"])
def test_a_signal_to_one_rank_at_a_bad_moment_leaves_none_behind(run, tmp_path, owner, name, number):
    assert run(2, "peace", *DROPOUT) == [0, 0]
    assert run(2, "ended", *DROPOUT, fault=(once, owner, name, number, send, signal.SIGTERM), rank=1) == [143, 143]
    assert run(2, "ended", *DROPOUT, "--resume") == [0, 0] and differences(tmp_path / "peace", tmp_path / "ended") == []


def test_no_rank_ends_while_the_first_still_saves(fleet, tiny_settings, tmp_path):  # noqa: F811
    """torchrun would kill the first half a minute later, and with it a save that takes longer."""
    arguments = command(tiny_settings, tmp_path / "run", ["--save.every_steps=0", "--eval.every_steps=0"])
    first, second = fleet(2, train_as_rank, arguments, tmp_path / "run", told_to_end_and_slow, (tmp_path / "saving",), None)
    while not (tmp_path / "saving").exists():
        assert first.is_alive()
        time.sleep(0.02)
    second.join(1)
    assert second.is_alive()
    assert [process.join(60) or process.exitcode for process in (first, second)] == [143, 143]


def told_to_end_and_slow(flag):
    if ranks.FIRST:
        once("checkpoint", "save", 1, lambda: (flag.touch(), time.sleep(2)))
    else:
        at_sample(20, send, signal.SIGTERM)


def run_out(*_):
    raise torch.OutOfMemoryError("injected")


def test_a_rank_that_runs_out_of_memory_tries_again_and_the_others_wait(run, tmp_path):
    options = [*EXACT, "--train.accumulation=4"]
    assert run(2, "peace", *options) == [0, 0]
    assert run(2, "short", *options, fault=(in_backward, 3, run_out), rank=1) == [0, 0]
    assert far(tmp_path / "peace", tmp_path / "short") < 2e-5


def test_the_size_that_fits_on_one_rank_is_every_ranks_told_and_remembered(run, tmp_path):
    options = [*DROPOUT, "--train.accumulation=4", "--memory.max_tokens=128"]
    assert run(2, "peace", *options, fault=(in_backward, 3, run_out), rank=1) == [0, 0]
    shrunk, = newest(tmp_path / "peace")["state"]["plan"]["shrunk"]
    assert shrunk["to"] < 128 and f"step {shrunk['step']}: memory ran out on another rank:" in log(tmp_path, "peace")
    assert [line.get("train/max_tokens") for line in curve(tmp_path / "peace")[1:]] == [None] * (shrunk["step"] - 1) + [shrunk["to"]] * (9 - shrunk["step"])
    assert run(2, "again", *options, fault=(short_and_ended, 3, 44), rank=1) == [143, 143]
    assert run(2, "again", *options, "--resume") == [0, 0] and differences(tmp_path / "peace", tmp_path / "again") == []


def short_and_ended(number, sample):
    in_backward(number, run_out)
    at_sample(sample, send, signal.SIGTERM)


def test_a_row_that_fits_on_no_rank_ends_all_with_its_name(run, tmp_path):
    assert run(2, "run", *EXACT, "--memory.max_tokens=1", fault=(in_backward, 7, run_out), rank=1) == [2, 2]
    assert "does not fit into memory even alone" in log(tmp_path, "run") and "train.jsonl:" in log(tmp_path, "run")
    assert checkpoint.newest_valid(tmp_path / "run")[0] is not None
    assert run(2, "run", *EXACT, "--memory.max_tokens=1", "--resume") == [0, 0]


def test_a_sharded_rank_without_memory_ends_all_and_says_what_to_change(run, tmp_path):
    codes = run(2, "run", *EXACT, "--memory.shard=true", "--save.every_steps=1", fault=(in_backward, 7, run_out), rank=1)
    assert codes == [1, 2] and "lower memory.max_tokens" in log(tmp_path, "run", 1)
    assert run(2, "run", *EXACT, "--memory.shard=true", "--save.every_steps=1", "--resume") == [0, 0]


def test_a_step_that_is_not_finite_on_one_rank_is_applied_on_none_and_its_rows_are_named(run, tmp_path):
    assert run(2, "run", *EXACT, "--save.every_steps=1", fault=(loss_times, float("nan"), 3), rank=1) == [0, 0]
    assert [line["step"] for line in record.read_metrics(tmp_path / "run") if line.get("train/skipped")] == [3]
    told, = [line for line in log(tmp_path, "run").splitlines() if line.startswith("step 3 was not applied")]
    assert all(f"train.jsonl:{row + 1}" in told for row in data.sample_stream(23, 0, 8, 4)), "those of both ranks"


def without_gradient():
    """One module's output goes past its adapter, and the first rank finds nothing in its part of a window that could tell."""
    import proof
    real = ranks.total

    def total(tensor):
        real(tensor)
        if tensor.numel() > 1000:
            tensor[:256] = 0  # the first lora_A
        return tensor

    ranks.total = total
    if ranks.FIRST:
        proof.telling = lambda window: False


def test_dead_gradients_are_found_and_told_though_the_first_rank_has_nothing_to_tell_them_by(run, tmp_path):
    assert run(2, "run", *EXACT, "--proof.enabled=true", "--proof.tokens=8", fault=(without_gradient,)) == [4, 4]
    assert "gradients  DEAD: after step" in log(tmp_path, "run")
    assert record.read_metrics(tmp_path / "run")[-1]["proof/outcome"].startswith("dead: after step")


OTHERS = {"training rows": lambda folder: ["--data.train=" + str(folder / "other.jsonl")], "base weights": lambda folder: [f"--model.path={folder / 'other'}"],
          "schedule.learning_rate": lambda folder: ["--schedule.learning_rate=0.02"], "prompts": lambda folder: ["--eval.prompts=" + str(folder / "prompts.txt")]}


@pytest.mark.parametrize("what", OTHERS)
def test_ranks_that_would_train_something_else_are_refused_by_name_before_anything_is_written(run, tiny_inputs, tmp_path, what):
    (tmp_path / "other.jsonl").write_text("".join((tiny_inputs / "train.jsonl").read_text().splitlines(keepends=True)[::-1]))
    (tmp_path / "prompts.txt").write_text("red\n")
    make_model(tmp_path / "other", seed=1, initializer_range=0.1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "other" / name).write_bytes((tiny_inputs / "model" / name).read_bytes())
    assert run(2, "run", fault=(ask_also, *OTHERS[what](tmp_path)), rank=1) == [2, 2]
    assert f"\n  {what}: " in log(tmp_path, "run") and " on rank 1\n" in log(tmp_path, "run") and log(tmp_path, "run", 1).strip() == ""
    assert not (tmp_path / "run").exists()


def ask_also(*options):
    named = {option.partition("=")[0] for option in options}
    sys.argv[1:] = [word for word in sys.argv[1:] if word.partition("=")[0] not in named] + list(options)


def test_adapters_that_differ_at_the_start_are_found_there(run, tmp_path):
    assert run(2, "run", *EXACT, fault=(keep_own,), rank=1) == [2, 2]
    assert "\n  adapters: " in log(tmp_path, "run") and not (tmp_path / "run").exists()


def keep_own():
    """What the first rank tells is heard, and not taken over."""
    import lora_layers
    real, taken = ranks.from_first, lora_layers.draw_adapters
    ranks.from_first = lambda tensors: real([tensor.clone() for tensor in tensors])
    lora_layers.draw_adapters = lambda network, seed: taken(network, seed + 1)


def test_ranks_whose_adapters_differ_are_stopped(run, tmp_path):
    codes = run(2, "torn", *EXACT, fault=(nudge,), rank=1)
    assert 0 not in codes and "adapters differ" in log(tmp_path, "torn") + log(tmp_path, "torn", 1)


def nudge():
    """Let this rank's weights drift from the others'."""
    real = ranks.total

    def total(tensor):
        real(tensor)
        if tensor.numel() > 1000:
            tensor[0] += 1
        return tensor

    ranks.total = total


def test_sharding_needs_ranks(run, tmp_path):
    assert run(1, "run", "--memory.shard=true") == [2] and "torchrun --nproc-per-node=2" in log(tmp_path, "run")


@pytest.mark.parametrize("program", ["eval", "export", "proof"])
def test_what_works_in_one_process_says_so_where_torchrun_started_several(monkeypatch, program):
    monkeypatch.setattr(ranks, "RANKS", 2)
    main = importlib.import_module(program).main
    with pytest.raises(ValueError, match=f"start it with python {program}.py"):
        main(["--ckpt=run"])
    monkeypatch.setattr(ranks, "FIRST", False)
    monkeypatch.setattr(ranks, "let_end", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main(["--ckpt=run"])
    assert ended.value.code == 2


# --------------------------------------------------------------------------------------------------------- the real thing

def torchrun(folder, meeting, settings, *options):
    """train.py under torchrun, on the CPU, in `folder`; returns torchrun's process, whose output is piped."""
    line = [sys.executable, "-m", "torch.distributed.run", *meeting, str(PROJECT / "train.py"), str(settings), *options]
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})


def outputs(processes, seconds):
    """[(stdout, stderr)] of processes once they have ended; none outlives the time that they are given."""
    try:
        return [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_torchrun_runs_it(tiny_settings, tmp_path):  # noqa: F811
    done = torchrun(tmp_path, ["--nproc-per-node=2", "--standalone"], tiny_settings, "--out=run", *EXACT)
    (said, errors), = outputs([done], 200)
    assert done.returncode == 0, errors[-3000:]
    assert said.count("packing ") == 1 and [line["step"] for line in record.read_metrics(tmp_path / "run")] == list(range(9))
    assert json.loads((tmp_path / "run" / "environment.json").read_text())


def test_what_all_ranks_find_wrong_is_told_once(tiny_settings, tmp_path):  # noqa: F811
    done = torchrun(tmp_path, ["--nproc-per-node=3", "--standalone"], tiny_settings, "--lora.r=0")
    (_, errors), = outputs([done], 100)
    assert done.returncode == 1 and errors.count("lora.r: must be >= 1") == 1 and "exitcode  : 2" in errors


def test_two_hosts_train_as_one_process_does(run, tiny_settings, tmp_path):  # noqa: F811
    """Two torchrun agents that meet at one address, as on two hosts, of two ranks each; the record lies with the first."""
    assert run(1, "alone", *EXACT) == [0]
    port = free_port()
    hosts = []
    for number in (0, 1):
        (tmp_path / f"host-{number}").mkdir()
        meeting = ["--nnodes=2", "--nproc-per-node=2", f"--node-rank={number}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        hosts.append(torchrun(tmp_path / f"host-{number}", meeting, tiny_settings, "--out=run", *EXACT))
    told = outputs(hosts, 200)
    assert [host.returncode for host in hosts] == [0, 0], told
    assert far(tmp_path / "alone", tmp_path / "host-0/run") < 2e-5
    assert told[1][0].strip() == "" and list((tmp_path / "host-1").iterdir()) == []


def test_ranks_that_go_on_from_another_run_count_its_evaluations_alike(run, tmp_path):
    """The best evaluation is looked for anew, on every rank: one that went on counting would end before the others."""
    options = [*EXACT, "--train.max_steps=8", "--eval.every_steps=1", "--eval.patience=3", "--eval.min_delta=100", "--save.every_steps=1", "--save.keep=9"]
    assert run(2, "run", *options) == [0, 0] and newest(tmp_path / "run")["step"] == 3
    assert run(2, "fork", *options, f"--resume={tmp_path / 'run/checkpoints/step-000002'}") == [0, 0]
    assert newest(tmp_path / "fork")["step"] == 6


# -------------------------------------------------------------------------------------------------- what more ranks would do

def test_what_is_computed_for_more_ranks_has_the_limits_that_it_must(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT / "bench"))
    import scaling
    size = scaling.sizes("8B")
    assert size["gradient"] == 4 * 41_943_040, "rank 16 on the seven projections of Llama 3 8B has as many trained numbers, as PEFT counts them"
    free = scaling.shares("8B", 8, 1e30, 1000.0, 8192, 8192)
    assert free[0] == pytest.approx(1) and free[1] == pytest.approx(1)
    as_long = 2 * 7 / 8 * size["gradient"] / (8192 / 1000.0)  # bytes a second at which the sum takes as long as the computation
    replicated, sharded, summed, gathered = scaling.shares("8B", 8, as_long, 1000.0, 8192, 8192)
    assert replicated == pytest.approx(0.5) and summed == pytest.approx(8.192) and gathered == pytest.approx(7 / 8 * size["layer"] / as_long)
    layer = 8.192 / size["layers"]
    assert gathered > layer and sharded == pytest.approx(8.192 / (2 * gathered * size["layers"] + summed)), "gathering alone is left of each pass"
