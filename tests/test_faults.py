"""A whole run under real faults: processes killed, told to end, run side by side, on full and read-only disks, with damaged checkpoints.

Every run is a process of its own (a fork of warm.py), so that a SIGKILL is one. "The same curve" is: the figures of every
step, the samples drawn, evaluations and what was generated, and the final adapter, optimizer, generators and state, bit
for bit those of a run that nothing happened to.
"""
import ctypes
import errno
import functools
import json
import math
import multiprocessing
import os
import pathlib
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PROJECT, After, curve, differences, newest, settings_of

import checkpoint
import config
import data
import eval as evaluation
import model
import record
import schedule

# Three epochs of 23 rows in 15 ragged steps that grow, packed into several micro-batches; with dropout, clipping that follows the
# norms, and early stopping that counts and does not stop.
EVERYTHING = ["--lora.dropout=0.1", "--train.max_steps=0", "--train.epochs=3", "--schedule.batch_points=[[1,3],[5,4],[9,6]]",
              "--schedule.clip_percentile=40", "--schedule.clip_norm=100", "--schedule.clip_window=10", "--eval.patience=5",
              "--eval.min_delta=0.2", "--eval.every_steps=4", "--save.every_steps=3", "--save.keep=9", "--memory.max_tokens=64",
              "--log.tensorboard=true"]


# ------------------------------------------------------------------------------------------------- processes and faults

@pytest.fixture(scope="session")
def processes():
    """multiprocessing's fork server with warm.py imported: what it starts is a third of a second away from its first step."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "warm", "test_faults"])
    here = pathlib.Path(__file__).parent
    before, hidden = os.environ.copy(), {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}:{here.parent}"}
    os.environ.update(hidden)
    context.Process(target=int).start()
    for name in hidden:
        os.environ.pop(name) if name not in before else os.environ.__setitem__(name, before[name])
    return context


def live(arguments, log, fault, given):
    """In a child: do fault(*given), which prepares what is to happen, then be `python train.py ARGUMENTS`."""
    import train
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv = ["train.py", *arguments]
    if fault:
        fault(*given)
    train.settings.run_command(train.main)


@pytest.fixture(scope="session")
def tiny_settings(tiny_inputs, tmp_path_factory):
    return settings_of(tiny_inputs, tmp_path_factory.mktemp("settings") / "tiny.json")


@pytest.fixture(scope="session")
def whole(processes, tiny_settings, tmp_path_factory):
    """whole(options) is the folder of a run with these options that nothing happened to."""
    @functools.cache
    def in_peace(*options):
        folder = tmp_path_factory.mktemp("whole")
        process = processes.Process(target=live, args=(command(tiny_settings, folder / "run", options), folder / "log", None, ()))
        process.start()
        process.join(120)
        assert process.exitcode == 0, (folder / "log").read_text()[-3000:]
        return folder / "run"
    return lambda options=(): in_peace(*options)


def command(path, folder, options):
    """train.py's arguments; of an option given twice, the last holds."""
    return [str(path), f"--out={folder}", *{option.partition("=")[0]: option for option in options}.values()]


@pytest.fixture
def start(processes, tiny_settings, tmp_path):
    """start("name", *options, fault=(function, …)) starts a run in tmp_path/name."""
    started = []

    def begin(name, *options, fault=(None,)):
        arguments = (command(tiny_settings, tmp_path / name, options), tmp_path / f"{name}.log", fault[0], fault[1:])
        process = processes.Process(target=live, args=arguments)
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.fixture
def run(start):
    """run("name", *options, fault=…) waits for that run and returns its exit code; a negative one is the signal that killed it."""
    def wait(*arguments, **fault):
        process = start(*arguments, **fault)
        process.join(120)
        assert process.exitcode is not None, "the run hangs"
        return process.exitcode
    return wait


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def wait_for(path):
    while not path.exists():
        time.sleep(0.02)


def once(owner, name, number, what, *given):
    """Do what(*given) when OWNER.NAME (module, or module.Class) is called for the number-th time, before the call itself."""
    owner = pkgutil.resolve_name(owner)
    real, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            what(*given)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


def at_sample(number, what, *given):
    """Do what(*given) when the window is taken that begins at sample `number` or behind it, once."""
    real, done = data.sample_stream, []

    def stream(n_rows, seed, first, count):
        if first >= number and not done:
            done.append(1)
            what(*given)
        return real(n_rows, seed, first, count)

    data.sample_stream = stream


def once_trained(install):
    """Call install() when the run has tried its first window and begins: what is counted from there on is the run's own."""
    import memory
    real = memory.rehearse
    memory.rehearse = lambda *given: (real(*given), install())[0]


def in_backward(number, what, *given):
    """Do what(*given) in the backward pass of the number-th training micro-batch: mid-window, half of the gradient added."""
    once_trained(lambda: spoil_backward(number, what, given))


def spoil_backward(number, what, given):
    real, calls = model.summed_loss, []

    def loss_of(network, batch):
        loss, nll, correct = real(network, batch)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == number:
                loss.register_hook(lambda gradient: what(*given))
        return loss, nll, correct

    model.summed_loss = loss_of


CALLS = ("mkdir", "write", "fsync", "rename", "replace", "unlink", "rmdir")


def at_call(number, after, log):
    """Be killed at the number-th call that changes the disk: before it, or just after (a write: half-way). Calls are written to `log`."""
    notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    seen = [0]

    def dying(name):
        original = getattr(os, name)

        def wrapper(*args, **kwargs):
            seen[0] += 1
            real_write(notes, f"{name}\n".encode())
            if seen[0] == number:
                if after and name == "write":
                    args = (args[0], args[1][:len(args[1]) // 2])
                try:
                    after and original(*args, **kwargs)
                finally:
                    die()
            return original(*args, **kwargs)
        return wrapper

    real_write = os.write
    for name in CALLS:
        setattr(os, name, dying(name))


# ---------------------------------------------------------------------------------------------------- the same curve

def each_step_stands_once(folder, steps):
    """In metrics.jsonl and in TensorBoard, which purges what a resumed run does again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    lines = record.read_metrics(folder)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [line["step"] for line in lines] == list(range(steps + 1))
    assert [step for step, _ in losses] == list(range(1, steps + 1))
    assert [loss for _, loss in losses] == pytest.approx([line["train/loss"] for line in lines[1:]], rel=1e-6)


def go_on(folder):
    """--resume where there is a checkpoint; a run killed before its first one is begun again by the same command."""
    return ["--resume"] * bool(list((folder / "checkpoints").glob("step-*")) if (folder / "checkpoints").exists() else [])


# ---------------------------------------------------------------------------------------------------------------- killed

def noting(path, what=int, *given):
    """Write down which rows each window takes, and from which sample on; then what(*given)."""
    real = data.samples

    def samples(rows, seed, start, count):
        taken = real(rows, seed, start, count)
        with open(path, "a") as file:
            file.write(f"{start} {' '.join(map(str, taken))}\n")
        return taken

    data.samples = samples
    what(*given)


def windows(path):
    """{first sample: rows} of what `noting` wrote; a window that was taken again was the same."""
    found = {}
    for line in path.read_text().splitlines():
        start, *taken = map(int, line.split())
        assert found.setdefault(start, taken) == taken, f"the window from sample {start} on was another one after a resume"
    return found


@pytest.mark.parametrize("quant, times", [("nf4", 6), ("int8", 6), ("llm_int8", 2)])
def test_a_run_killed_six_times_three_of_them_in_one_epoch_has_the_same_curve(run, whole, tmp_path, quant, times):
    options = [*EVERYTHING, f"--model.quant={quant}"]
    faults = [(in_backward, 2, die), (at_sample, 13, die), (at_sample, 17, die),  # the first epoch ends with sample 23
              (at_sample, 23, die), (once, "checkpoint", "save", 1, die), (once, "record.Recorder", "flush", 2, die)]
    for fault in faults[-times:]:
        assert run("run", *options, *go_on(tmp_path / "run"), fault=(noting, tmp_path / "ids", *fault)) == -signal.SIGKILL
    assert run("run", *options, "--resume", fault=(noting, tmp_path / "ids")) == 0
    assert differences(tmp_path / "run", whole(options)) == []
    taken = windows(tmp_path / "ids")
    order = [row for start in sorted(taken) for row in taken[start]]
    assert list(taken)[0] == 0 and len(taken) == 15
    assert [sorted(order[i:i + 23]) for i in (0, 23, 46)] == [list(range(23))] * 3, "each row once an epoch"
    each_step_stands_once(tmp_path / "run", 15)
    state = newest(whole(options))["state"]
    assert 0 < state["without_improvement"] < 5, "early stopping was not half counted"
    thresholds = [line["train/clip_threshold"] for line in curve(whole(options))[1:]]  # clip_norm until ten norms are known
    assert set(thresholds[:11]) == {100} and max(thresholds[11:]) < 10 and len(set(thresholds[11:])) > 1, "clipping did not follow the norms"
    assert [line["train/samples"] for line in curve(whole(options))[1:]] == [3] * 4 + [4] * 4 + [6] * 6 + [5]
    for line in curve(whole(options)):
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))


def noisy(what=int, *given):
    """Let neighbouring gradients seem to have next to nothing in common, so that the noise scale is large; then what(*given)."""
    import telemetry
    real = telemetry.NoiseScale.update
    telemetry.NoiseScale.update = lambda self, numbers: real(self, [abs(numbers[0]) / 1000, *numbers[1:]] if len(numbers) else numbers)
    what(*given)


@pytest.mark.parametrize("fault, code, saved", [
    ((at_sample, 92, die), -signal.SIGKILL, 12), ((at_sample, 92, send, signal.SIGTERM), 143, 24),
    ((once, "eval", "evaluate", 2, send, signal.SIGTERM), 143, 25),
], ids=["between evaluations", "between the two windows of a pair", "in the evaluation of the step that it is told at"])
def test_an_alert_that_rests_on_all_the_steps_so_far_is_told_at_the_same_step_by_a_run_that_was_interrupted(
        run, tmp_path, fault, code, saved):
    """The noise scale is averaged over steps 4 and 5, 14 and 15, 24 and 25; its alert comes with the third pair."""
    options = ["--train.max_steps=26", "--lora.dropout=0.1", "--eval.every_steps=25", "--save.every_steps=12"]
    assert run("whole", *options, fault=(noisy,)) == 0
    assert [line["step"] for line in curve(tmp_path / "whole") if "noisy gradients" in line.get("alerts", "")] == [25]
    assert run("run", *options, fault=(noisy, *fault)) == code
    assert newest(tmp_path / "run")["step"] == saved and ("noise.safetensors" in newest(tmp_path / "run")["tensors"]) == (saved == 24)
    assert run("run", *options, "--resume", fault=(noisy,)) == 0
    assert differences(tmp_path / "run", tmp_path / "whole") == []


def without_generators():
    torch.set_rng_state = lambda state: None


def data_shifted_by_one_sample():
    real = data.sample_stream
    data.sample_stream = lambda rows, seed, first, count: real(rows, seed, first + 1, count)


def rate_shifted_by_one_step():
    real = schedule.learning_rate
    schedule.learning_rate = lambda step, settings, steps: real(step + 1, settings, steps)


def without_moments():
    import continuation
    real = continuation.views
    continuation.views = lambda flat, adapters: [(name, view.clone()) for name, view in real(flat, adapters)]


@pytest.mark.parametrize("mistake, seen", [
    (without_generators, "train/loss"), (data_shifted_by_one_sample, "train/loss"),
    (rate_shifted_by_one_step, "train/learning_rate"), (without_moments, "train/loss")])
def test_a_resume_with_one_thing_wrong_does_not_have_the_same_curve(run, whole, tmp_path, mistake, seen):
    """The control of the test above: each of these mistakes is found by it, and none of them by anything else."""
    assert run("run", *EVERYTHING, fault=(at_sample, 30, die)) == -signal.SIGKILL
    assert run("run", *EVERYTHING, "--resume", fault=(mistake,)) == 0
    found = differences(tmp_path / "run", whole(EVERYTHING))
    assert seen in " ".join(found), found


@pytest.mark.parametrize("after", [False, True])
def test_a_run_killed_at_any_call_that_changes_the_disk_goes_on_to_the_same_end(run, tmp_path, after):
    """A sample of all calls of a run with three saves that replace each other; every call of a save has a test in test_checkpoint.py."""
    options = ["--train.max_steps=6", "--save.every_steps=2", "--save.keep=1", "--eval.every_steps=3", "--lora.dropout=0.1",
               "--log.tensorboard=true"]
    assert run("whole", *options, fault=(at_call, 0, after, tmp_path / "calls")) == 0
    calls = (tmp_path / "calls").read_text().split()
    assert set(calls) == set(CALLS)
    of_a_kind = {len(calls) - calls[::-1].index(name) if n % 2 else calls.index(name) + 1 for n, name in enumerate(CALLS)}
    for number in sorted(of_a_kind if after else set(range(9, len(calls), len(calls) // 6))):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        code = run("run", *options, fault=(at_call, number, after, tmp_path / "killed"))
        assert code == -signal.SIGKILL, (number, calls, (tmp_path / "killed").read_text().split())
        assert (tmp_path / "killed").read_text().split() == calls[:number]
        for path in (tmp_path / "run/checkpoints").glob("step-??????"):
            checkpoint.verify(path)
        assert run("run", *options, *go_on(tmp_path / "run")) == 0, (number, calls[number - 1], (tmp_path / "run.log").read_text()[-2000:])
        assert differences(tmp_path / "run", tmp_path / "whole") == [], (number, calls[number - 1])
        each_step_stands_once(tmp_path / "run", 6)
        left = [path.name for path in (tmp_path / "run/checkpoints").iterdir() if not re.fullmatch(r"step-\d{6}", path.name)]
        # the next save would sweep what is left; there was none
        assert left == [] or "finished already" in (tmp_path / "run.log").read_text(), left


def damage(path, how):
    if how == "a flipped bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
    elif how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()


@pytest.mark.parametrize("name, how", [("optimizer.safetensors", "a flipped bit"), ("state.json", "cut"), ("manifest.json", "missing")])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(run, whole, tmp_path, name, how):
    options = ["--save.every_steps=2", "--lora.dropout=0.1"]
    assert run("run", *options, fault=(at_sample, 28, die)) == -signal.SIGKILL
    damage(tmp_path / "run/checkpoints/step-000006" / name, how)
    assert run("run", *options, "--resume") == 0
    told = (tmp_path / "run.log").read_text()
    assert re.search(rf"warning: passed over a damaged checkpoint: .*step-000006/{name}: ", told) and "going on after step 4" in told
    assert differences(tmp_path / "run", whole(options)) == []


def test_with_every_checkpoint_damaged_a_run_neither_goes_on_nor_starts_afresh(run, tmp_path):
    options = ["--save.every_steps=2"]
    assert run("run", *options, fault=(at_sample, 28, die)) == -signal.SIGKILL
    for path in (tmp_path / "run/checkpoints").iterdir():
        damage(path / "adapter_model.safetensors", "a flipped bit")
    before = {path: path.read_bytes() for path in tmp_path.glob("run/**/*") if path.is_file()}
    assert run("run", *options, "--resume") == 2 and run("run", *options) == 2
    told = (tmp_path / "run.log").read_text()
    assert "no valid checkpoint" in told and told.count("adapter_model.safetensors: changed since it was saved") == 3
    assert "Traceback" not in told
    now = {path: path.read_bytes() for path in tmp_path.glob("run/**/*") if path.is_file()}
    assert now | {tmp_path / "run/.lock": b""} == before | {tmp_path / "run/.lock": b""}


# --------------------------------------------------------------------------------------------------------- told to end

@pytest.mark.parametrize("fault, step", [((at_sample, 20, send, signal.SIGTERM, signal.SIGTERM), 6),
                                         ((once, "checkpoint", "save", 2, send, signal.SIGTERM, signal.SIGTERM), 8)])
def test_told_twice_to_end_a_run_saves_one_step_boundary_and_goes_on_to_the_same_end(run, whole, tmp_path, fault, step):
    options = ["--lora.dropout=0.1", "--save.every_steps=4"]
    began = time.monotonic()
    assert run("run", *options, fault=fault) == (143 if step < 8 else 0) and time.monotonic() - began < 30
    names = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert sorted(names) == sorted({"step-000004", f"step-{step:06d}"}) and newest(tmp_path / "run")["step"] == step
    assert run("run", *options, "--resume") == 0
    assert differences(tmp_path / "run", whole(options)) == []


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_three_times_a_run_ends_at_once_and_what_was_saved_before_stays(run, whole, tmp_path, number, code):
    assert run("run", fault=(in_backward, 6, send, number, number, number)) == code
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000004"]
    assert "Traceback" not in (tmp_path / "run.log").read_text()
    assert run("run", "--resume") == 0 and differences(tmp_path / "run", whole()) == []


def slow_micro_batches(sample):
    """SIGTERM in a window of several micro-batches, of a fifth of a second each from there on, and patience for half a second only."""
    once_trained(lambda: slow_down(sample))


def slow_down(sample):
    import train
    train.PATIENCE = 0.5
    real, slow = model.summed_loss, []
    at_sample(sample, lambda: (send(signal.SIGTERM), slow.append(1)))

    def loss_of(network, batch):
        time.sleep(0.2 * bool(slow))
        return real(network, batch)

    model.summed_loss = loss_of


def test_a_window_that_would_take_too_long_after_a_signal_is_given_up_and_done_by_the_resumed_run(run, whole, tmp_path):
    # 8 micro-batches a window, 1.6 s
    options = ["--lora.dropout=0.1", "--memory.max_tokens=1", "--train.accumulation=4", "--train.max_steps=4"]
    assert run("run", *options, fault=(slow_micro_batches, 16)) == 143
    assert newest(tmp_path / "run")["step"] == 2 and "interrupted after step 2" in (tmp_path / "run.log").read_text()
    assert run("run", *options, "--resume") == 0 and differences(tmp_path / "run", whole(options)) == []


def test_a_run_interrupted_in_its_first_evaluation_does_all_of_it_when_it_goes_on(run, whole, tmp_path):
    options = ["--eval.unquantised=auto"]
    assert run("run", *options, fault=(once, "eval", "evaluate", 2, send, signal.SIGTERM)) == 143  # the first is the unquantised model's
    assert newest(tmp_path / "run")["step"] == 0
    assert run("run", *options, "--resume") == 0 and differences(tmp_path / "run", whole(options)) == []
    assert "eval/unquantised_loss" in curve(tmp_path / "run")[0] and (tmp_path / "run/evaluations/unquantised.safetensors").exists()


def test_a_signal_ends_generation_after_the_next_token(run, whole, tiny_inputs, tmp_path):
    network, tokenizer, prompts, end_ids = sampler(tiny_inputs)
    asked = After(4)
    assert evaluation.generate(network, tokenizer, prompts, 60, [7], asked) is None and -3 <= asked.left < 0 and network.training
    options = ["--eval.max_new_tokens=40"]
    # the first call is the check of the architecture
    assert run("run", *options, fault=(once, "attention", "own_attention", 3, send, signal.SIGTERM)) == 143
    assert newest(tmp_path / "run")["step"] == 4
    assert run("run", *options, "--resume") == 0 and differences(tmp_path / "run", whole(options)) == []


def test_a_run_made_in_a_new_folder_while_another_one_for_it_loads_is_not_lost(run, whole, tmp_path):
    """Two were started at once: the first is over before the second has loaded, and finds no folder to refuse when it looks."""
    assert run("run", fault=(once, "model", "load", 1, shutil.copytree, whole(), tmp_path / "run")) == 2
    assert "another process made a run in this folder" in (tmp_path / "run.log").read_text()
    assert differences(tmp_path / "run", whole()) == []


def test_a_second_process_is_refused_while_the_first_trains_and_does_not_disturb_it(start, run, whole, tmp_path):
    first = start("run", fault=(at_sample, 8, wait_for, tmp_path / "go on"))
    while not (tmp_path / "run/metrics.jsonl").exists():
        time.sleep(0.05)
        assert first.is_alive()
    for options in ([], ["--resume"], ["--overwrite"]):
        assert run("run", *options) == 2
    (tmp_path / "go on").touch()
    first.join(60)
    told = (tmp_path / "run.log").read_text()
    assert first.exitcode == 0 and told.count(f"error: {tmp_path / 'run'}: another training process (pid {first.pid})") == 3
    assert differences(tmp_path / "run", whole()) == []


# ------------------------------------------------------------------------------------------------ full, read-only disks

def on_a_small_disk(folder, size, what, *given):
    """Mount a file system of `size` on `folder`, for this process alone; exit code 77 where that is not allowed."""
    libc, owner = ctypes.CDLL(None, use_errno=True), os.getuid()
    new_mounts, new_user, private = 0x20000, 0x10000000, 0x44000
    if libc.unshare(new_mounts | (new_user if owner else 0)):
        sys.exit(77)
    if owner:
        pathlib.Path("/proc/self/uid_map").write_text(f"0 {owner} 1")
    if libc.mount(b"none", b"/", None, private, None) or libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()):
        sys.exit(77)
    what(libc, folder, *given)


def train_through(libc, folder, options, sample, read_only):
    """Train on that disk; from the window of `sample` on nothing can be written. Make room, go on, and compare with a run in peace."""
    import train
    filler = folder / "filler"

    def remount(flags):
        assert libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags | 32, None) == 0

    def fill():
        with open(filler, "wb", buffering=0) as file:
            for piece in (1 << 16, 1 << 8, 1):  # to the last byte
                while True:
                    try:
                        file.write(bytes(piece))
                    except OSError as error:
                        assert error.errno == errno.ENOSPC
                        break

    def attempt(name, *more, fault=None):
        child = os.fork()
        if child == 0:
            try:
                if fault:
                    at_sample(sample, fault)
                sys.argv = ["train.py", sys.argv[1], f"--out={folder / name}", *options, *more]
                train.settings.run_command(train.main)
            except SystemExit as end:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(end.code)
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert attempt("whole") == 0
    if read_only:  # a disk with open files cannot be made read-only from here: the run is killed first, and told to go on there
        assert attempt("run", fault=die) == -signal.SIGKILL
        remount(1)
        assert attempt("run", "--resume") == 2
    else:
        assert attempt("run", fault=fill) == 2
    for path in (folder / "run/checkpoints").glob("step-*"):
        checkpoint.verify(path)
    assert checkpoint.newest_valid(folder / "run")[1] == []
    remount(0) if read_only else filler.unlink()
    assert attempt("run", "--resume") == 0
    assert differences(folder / "run", folder / "whole") == []
    sys.exit(0)


@pytest.mark.parametrize("read_only, tensorboard", [(False, "false"), (False, "true"), (True, "false")],
                         ids=["full", "full, with TensorBoard", "read-only"])
def test_a_disk_that_fills_or_turns_read_only_in_a_run_costs_no_checkpoint_and_the_run_goes_on(run, tmp_path, read_only, tensorboard):
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["--train.max_steps=6", "--save.every_steps=2", "--lora.dropout=0.1", f"--log.tensorboard={tensorboard}"]
    code = run("run", *options, fault=(on_a_small_disk, disk, "8m", train_through, options, 12, read_only))
    if code == 77:
        pytest.skip("a small file system cannot be mounted here")
    told = (tmp_path / "run.log").read_text()
    assert code == 0 and "Traceback" not in told, told[-3000:]
    refused = (r"error: .*cannot hold a run.*cannot be written to" if read_only else
               r"error: .*(metrics.jsonl|step-000004|TensorBoard).*make room and run again with --resume")
    assert re.search(refused, told), told[-2000:]


@pytest.mark.parametrize("name, moment, told", [
    (".config.json.tmp", ("train", "open_record"), "run/config.json could"),
    (".verdict.json.tmp", ("verdict", "write"), "the verdict could"), ("report.md", ("report", "write"), "the report could")])
def test_a_file_for_which_there_is_no_room_is_named(run, tmp_path, name, moment, told):
    (tmp_path / "run").mkdir()
    full = (once, *moment, 1, os.symlink, "/dev/full", tmp_path / "run" / name)
    assert run("run", "--train.max_steps=1", "--schedule.lr_warmup_steps=0", "--log.report=true", fault=full) == 2
    assert re.search(f"error: .*{told} not be written \\(No space left on device\\); make room", (tmp_path / "run.log").read_text())


# ----------------------------------------------------------------------------------------------------- memory runs out

# fp32, so that only rounding differs between splits
PLAIN = ["--model.quant=none", "--model.compute_dtype=fp32", "--memory.max_tokens=128"]


def memory_for(tokens, number=0, training=True):
    """Let micro-batches of more tokens fail in the allocator itself; with a number, only the number-th of those in training (or
    evaluation)."""
    once_trained(lambda: limit_memory(tokens, number, training))


def limit_memory(tokens, number=0, training=True):
    real, calls = model.summed_loss, []

    def loss_of(network, batch):
        if torch.is_grad_enabled() == training:
            calls.append(1)
            if len(batch.input_ids) > tokens and number in (0, len(calls)):
                torch.empty(1 << 60, dtype=torch.uint8)
        return real(network, batch)

    model.summed_loss = loss_of


def close(a, b):
    """The curves of two runs but for rounding: losses, norms, evaluations."""
    for tag, tolerance in (("train/loss", 1e-5), ("train/grad_norm", 1e-4), ("eval/loss", 1e-5)):
        left, right = ([line[tag] for line in curve(run) if tag in line] for run in (a, b))
        assert left == pytest.approx(right, rel=tolerance), tag


def test_where_memory_runs_out_mid_window_the_same_window_is_done_again_in_smaller_pieces(run, whole, tmp_path):
    options = [*PLAIN, "--train.accumulation=4"]
    # the second micro-batch of the second window: its gradient is half added by then
    assert run("run", *options, fault=(memory_for, 0, 5)) == 0
    close(tmp_path / "run", whole(options))
    state, lines = newest(tmp_path / "run")["state"], curve(tmp_path / "run")
    shrunk, = state["plan"]["shrunk"]
    assert state["plan"]["max_tokens"] == 128 > state["plan"]["fits"] == shrunk["to"] and shrunk["from"] == 128
    assert [line.get("train/max_tokens") for line in lines[1:]] == [None] * (shrunk["step"] - 1) + [shrunk["to"]] * (9 - shrunk["step"])
    assert f"step {shrunk['step']}: memory ran out over" in (tmp_path / "run.log").read_text()
    assert not any(line.get("train/skipped") for line in lines)


def killed_with_little_memory(tokens, sample):
    memory_for(tokens)
    at_sample(sample, die)


def test_what_fitted_is_remembered_by_the_run_that_goes_on_and_no_memory_is_missed_twice(run, tmp_path):
    # with dropout the split decides what is dropped: the same split, the same curve
    options = [*PLAIN, "--lora.dropout=0.1", "--save.every_steps=2"]
    assert run("peace", *options, fault=(memory_for, 60)) == 0
    assert run("run", *options, fault=(killed_with_little_memory, 60, 24)) == -signal.SIGKILL
    assert run("run", *options, "--resume", fault=(memory_for, 60)) == 0
    assert differences(tmp_path / "run", tmp_path / "peace") == []
    assert (tmp_path / "run.log").read_text().count("memory ran out") == (tmp_path / "peace.log").read_text().count("memory ran out") >= 1


def test_a_window_that_is_done_again_draws_the_dropout_that_it_would_have_drawn(run, tmp_path):
    """Out of memory in the second micro-batch of the first window, and no trace of the first attempt is left: neither masks nor half
    a gradient."""
    options = [*PLAIN, "--train.accumulation=4", "--lora.dropout=0.1"]
    assert run("run", *options, fault=(memory_for, 0, 2)) == 0
    fits = newest(tmp_path / "run")["state"]["plan"]["fits"]
    assert run("small", *options, f"--memory.max_tokens={fits}") == 0  # cut like that from the start
    counts = lambda tag: tag.startswith("train/") and tag != "train/max_tokens"
    trained = [[{tag: value for tag, value in line.items() if counts(tag)} for line in curve(tmp_path / name)]
               for name in ("run", "small")]
    assert trained[0] == trained[1] and len(trained[0]) == 9 and fits < 128
    assert not [found for found in differences(tmp_path / "run", tmp_path / "small") if "safetensors" in found]


@pytest.mark.parametrize("where, step", [("training", 4), ("evaluation", 4), ("the first evaluation", 0)])
def test_a_row_that_does_not_fit_even_alone_is_named_and_nothing_is_lost(run, whole, tiny_inputs, tmp_path, where, step):
    """fault: from a moment on nothing fits, until the run goes on with more memory."""
    fault = {"training": (at_sample, 16, limit_memory, 0), "evaluation": (at_sample, 8, limit_memory, 0, 0, False),
             "the first evaluation": (memory_for, 0, 0, False)}[where]
    assert run("run", *PLAIN, fault=fault) == 2
    told = (tmp_path / "run.log").read_text()
    name, length = re.search(r"error: .*/((?:train|eval)\.jsonl:\d+): this row of (\d+) tokens does not fit into memory even alone; "
                             r".*data.max_length.*saved .*--resume", told).groups()
    assert name.startswith("train" if where == "training" else "eval") and "Traceback" not in told
    raw, tokenizer = data.read_rows(str(tiny_inputs / name.partition(":")[0])), data.load_tokenizer(str(tiny_inputs / "model"))
    rows = data.tokenize(raw, tokenizer, config.Data())
    row = int(name.partition(":")[2]) - 1
    assert int(length) == rows.offsets[row + 1] - rows.offsets[row]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{step:06d}"]
    assert run("run", *PLAIN, "--resume") == 0
    close(tmp_path / "run", whole(PLAIN))


def test_where_memory_runs_out_in_an_evaluation_it_is_done_again_in_smaller_pieces(run, whole, tmp_path):
    assert run("run", *PLAIN, fault=(memory_for, 60, 0, False)) == 0
    close(tmp_path / "run", whole(PLAIN))
    plan = newest(tmp_path / "run")["state"]["plan"]
    assert plan["evaluates"] < 128 and plan["fits"] == 128


def test_samples_that_do_not_fit_together_are_written_in_halves(tiny_inputs, monkeypatch):
    network, tokenizer, prompts, end_ids = sampler(tiny_inputs)
    expected = evaluation.generate(network, tokenizer, prompts, 5, end_ids)
    real, sizes = network.generate, []

    def generate(input_ids, **rest):
        sizes.append(len(input_ids))
        return real(input_ids=input_ids, **rest) if len(input_ids) < 2 else torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(network, "generate", generate)
    written = evaluation.generate(network, tokenizer, prompts, 5, end_ids)
    assert [sample["text"] for sample in written] == [sample["text"] for sample in expected] and sizes == [3, 1, 2, 1, 1]
    monkeypatch.setattr(network, "generate", lambda **rest: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(model.DoesNotFit, match="eval.prompts: the prompt .* does not fit into memory"):
        evaluation.generate(network, tokenizer, prompts, 5, end_ids)
    monkeypatch.setattr(network, "generate", lambda **rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluation.generate(network, tokenizer, prompts, 5, end_ids)


def sampler(inputs):
    settings = config.read(settings_of(inputs, inputs / "sampler.json"), [("eval.samples", "3")])
    tokenizer = data.load_tokenizer(str(inputs / "model"))
    return model.load(settings, "cpu"), tokenizer, data.prompts(settings, tokenizer), data.end_of_turn(tokenizer)


def test_other_errors_in_a_micro_batch_are_not_taken_for_a_lack_of_memory(run, tmp_path):
    assert run("run", *PLAIN, fault=(in_backward, 6, torch.zeros(2).view, 3)) not in (0, 2)
    assert "memory ran out" not in (tmp_path / "run.log").read_text()


# ------------------------------------------------------------------------------------------- rates, spikes, what changed

@pytest.mark.parametrize("options", [
    ["--schedule.lr_warmup_steps=0"], ["--schedule.lr_warmup_steps=7"], ["--train.max_steps=1", "--schedule.lr_warmup_steps=0"],
    ["--schedule.lr_kind=wsd", "--schedule.lr_decay_steps=3"],
], ids=["no warm-up", "nothing but warm-up", "one step", "decay at the end"])
def test_the_rate_on_record_is_the_formulas_of_that_step_across_a_kill(run, tiny_settings, tmp_path, options):
    steps = 1 if "--train.max_steps=1" in options else 8
    if steps > 1:
        assert run("run", *options, "--save.every_steps=2", fault=(at_sample, 16, die)) == -signal.SIGKILL
    assert run("run", *options, "--save.every_steps=2", *go_on(tmp_path / "run")) == 0
    settings = config.read(tiny_settings, [tuple(option[2:].split("=")) for option in options]).schedule
    rates = [line["train/learning_rate"] for line in curve(tmp_path / "run")[1:]]
    assert rates == [schedule.learning_rate(step, settings, steps) for step in range(1, steps + 1)]


def loss_times(factor, number):
    """The loss of the number-th micro-batch in training is that many times as high."""
    once_trained(lambda: spike(factor, number))


def spike(factor, number):
    real, calls = model.summed_loss, []

    def loss_of(network, batch):
        loss, nll, correct = real(network, batch)
        calls.append(torch.is_grad_enabled())
        return (loss * factor if calls[-1] and sum(calls) == number else loss), nll, correct

    model.summed_loss = loss_of


def test_a_loss_spike_of_a_hundred_times_is_clipped_and_its_true_norm_is_on_record(run, whole, tmp_path):
    assert run("run", fault=(loss_times, 100, 5)) == 0
    spiked, calm = curve(tmp_path / "run"), curve(whole())
    assert str(spiked[:5]) == str(calm[:5]) and spiked[5]["train/loss"] == pytest.approx(100 * calm[5]["train/loss"], rel=1e-3)
    assert spiked[5]["train/grad_norm"] == pytest.approx(100 * calm[5]["train/grad_norm"], rel=1e-2) and spiked[5]["train/clipped"] == 1.0
    assert spiked[8]["eval/loss"] == pytest.approx(calm[8]["eval/loss"], rel=0.05), "the spike moved the run"


@pytest.mark.parametrize("what", ["training rows", "tokenizer"])
def test_rows_in_another_order_or_another_tokenizer_is_another_run(run, tiny_inputs, tmp_path, what):
    inputs = tmp_path / "inputs"
    shutil.copytree(tiny_inputs, inputs)
    where = [f"--model.path={inputs / 'model'}", f"--data.train={inputs / 'train.jsonl'}", "--save.every_steps=2"]
    assert run("run", *where, fault=(at_sample, 16, die)) == -signal.SIGKILL
    if what == "training rows":
        rows = (inputs / "train.jsonl").read_text().splitlines(keepends=True)
        (inputs / "train.jsonl").write_text("".join([rows[1], rows[0], *rows[2:]]))
    else:
        text = (inputs / "model/tokenizer.json").read_text()
        (inputs / "model/tokenizer.json").write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true', 1))
        assert (inputs / "model/tokenizer.json").read_text() != text
    before = checkpoint.newest_valid(tmp_path / "run")
    assert run("run", *where, "--resume") == 2
    assert re.search(rf"because this changed:\n(.*\n)*  {what}: was ", (tmp_path / "run.log").read_text())
    assert checkpoint.newest_valid(tmp_path / "run") == before


# ---------------------------------------------------------------------------------------------------- secrets, the soak

def with_secrets(home):
    os.environ.update(HF_TOKEN="hf_SeCrEtOfTheTest", HUGGING_FACE_HUB_TOKEN="hf_SeCrEtOfTheTest", WANDB_API_KEY="SeCrEtOfTheTest",
                      AWS_SECRET_ACCESS_KEY="SeCrEtOfTheTest", http_proxy="http://somebody:SeCrEtOfTheTest@proxy.example:3128",
                      HOME=home)


def test_no_secret_of_the_environment_reaches_a_file_or_the_console(run, tmp_path):
    assert run("run", "--log.tensorboard=true", fault=(with_secrets, str(tmp_path / "home of SeCrEtOfTheTest"))) == 0
    files = [path for path in [*tmp_path.rglob("*")] if path.is_file()]
    assert len(files) > 15 and not [path for path in files if b"SeCrEtOfTheTest" in path.read_bytes()]


def test_half_a_minute_of_kills_at_random_costs_one_checkpoint_interval_each_at_most(tmp_path):
    """The short form of bench/soak.py; docs/RELIABILITY.md has the figures of half an hour."""
    done = subprocess.run([sys.executable, str(PROJECT / "bench/soak.py"), "--minutes=0.2", "--faults=5",
                           f"--json={tmp_path / 'soak.json'}", "--seed=1"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["faults"] >= 5 and result["same_curve_as_in_peace"]
    assert all(kind["most_steps_lost"] <= result["checkpoint_interval"] for kind in result["kinds"].values())
