"""Train a tiny model for half an hour while it is killed at random, and compare with runs that nothing happened to.

    python bench/soak.py                          30 minutes, at least 60 faults
    python bench/soak.py --minutes=0.5 --faults=6 --json=soak.json --seed=1

In rounds: a run in peace, then the same run beset by faults until it has ended all the same. Each round has other
settings (NF4, int8, unquantised; dropout, a growing batch, clipping that follows the norms, evaluations, TensorBoard).
Faults: SIGKILL and SIGTERM at a random time, a disk full to the last byte, and SIGKILL with the newest checkpoint damaged
after it. After each: which steps were recorded, and from which checkpoint the run can go on. A fault may cost the steps of
one checkpoint interval at most, SIGTERM none. At the end of a round every figure of every step, evaluations, samples, and the
final adapter, optimizer and generators must be the peaceful run's, bit for bit; and nothing may have printed a traceback.

The full disk is a small file system in memory, mounted for this process alone; where that is not allowed, that fault is left
out, and the result says so. One thread; every run is a fork of this process, so that imports are paid once. Exit code 1 if a
promise was broken. Leaves out: power cuts, of which nothing here can make one.
"""
import ctypes
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

PROJECT = pathlib.Path(__file__).resolve().parent.parent
INTERVAL = 10  # steps between checkpoints
SETTINGS = [["--model.quant=nf4"], ["--model.quant=int8", "--schedule.clip_percentile=40"],
            ["--model.quant=none", "--model.compute_dtype=fp32", "--lora.dropout=0"]]
COMMON = ["--lora.dropout=0.1", "--schedule.batch_points=[[1,3],[30,5]]", "--memory.max_tokens=96", f"--save.every_steps={INTERVAL}",
          "--save.keep=3", "--eval.every_steps=25", "--eval.patience=1000", "--log.tensorboard=true"]


def small_disk(folder, size):
    """Mount a file system of `size` on `folder` for this process alone; False where that is not allowed. Call before threads start."""
    libc, owner = ctypes.CDLL(None, use_errno=True), os.getuid()
    if libc.unshare(0x20000 | (0x10000000 if owner else 0)):
        return False
    if owner:
        pathlib.Path("/proc/self/uid_map").write_text(f"0 {owner} 1")
    return (not libc.mount(b"none", b"/", None, 0x44000, None)
            and not libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()))


def fill(path):
    """Take every byte that is left on the disk."""
    with open(path, "wb", buffering=0) as file:
        for piece in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(piece))
            except OSError:
                pass


def begin(arguments, log):
    """A child process that is `python train.py ARGUMENTS`, its words appended to `log`. Returns its process id."""
    import train
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.argv = ["train.py", *arguments]
        train.settings.run_command(train.main)
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def ended(child, seconds):
    """The exit code of a child that ends within so many seconds (minus the signal that killed it), else None."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


def recorded(run):
    """The last step on record."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def standing(run):
    """(last step on record, step of the newest valid checkpoint, number of valid ones) of a run; 0 where there is none."""
    import checkpoint
    steps = []
    for folder in sorted((run / "checkpoints").glob("step-??????")):
        try:
            steps.append(checkpoint.verify(folder)["step"])
        except ValueError:  # damaged by us, or what a run passed over
            pass
    return recorded(run), (steps[-1] if steps else 0), len(steps)


def damage(run, chance):
    """Flip a bit of, cut or remove one file of the newest checkpoint. Returns what was done."""
    newest = (run / "checkpoints") / f"step-{standing(run)[1]:06d}"
    path = chance.choice(sorted(newest.iterdir()))
    how = chance.choice(["flipped a bit of", "cut", "removed"])
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "cut":
        os.truncate(path, chance.randrange(len(content)))
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    return f"{how} {newest.name}/{path.name}"


def beset(run, arguments, log, steps, kinds, longest, chance, over, suffered):
    """Start the run again and again, with a fault each time, until it ends by itself. Appends {"kind", "lost", "allowed"} to `suffered`."""
    while True:
        stood, newest, valid = standing(run)
        peaceful = over()
        child = begin([*arguments, *["--resume"] * bool(valid)], log)
        code = None
        if chance.random() < 0.8:  # most faults meet a run that trains, the others one that loads
            while code is None and recorded(run) <= newest:
                code = ended(child, 0.05)
        code = ended(child, 3600 if peaceful else chance.uniform(0, longest)) if code is None else code
        if code is not None:
            assert code == 0, f"ended with {code} and no fault"
            return
        assert not peaceful, "a run in peace hangs"
        kind = chance.choice(kinds)
        if kind == "full disk":
            fill(run.parent / "filler")
            code = ended(child, 60)
            (run.parent / "filler").unlink()
            assert code in (2, 0), f"{kind}: ended with {code}"
        else:
            os.kill(child, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
            code = ended(child, 30)
            assert code in ((143, 0, -signal.SIGTERM) if kind == "SIGTERM" else (-signal.SIGKILL, 0)), f"{kind}: ended with {code}"
        before = newest
        last, newest, valid = standing(run)
        assert newest >= before, f"{kind}: the newest checkpoint was of step {before} and is of step {newest}"
        lost = max(0, last - newest) if (last, newest) != (stood, before) else 0  # where nothing moved, it was still loading
        suffered.append({"kind": "SIGKILL" if kind == "damaged checkpoint" else kind, "lost": lost,
                         "allowed": 0 if code == 143 else INTERVAL})
        if kind == "damaged checkpoint" and valid > 1:
            damage(run, chance)
            suffered.append({"kind": kind, "lost": newest - standing(run)[1], "allowed": INTERVAL})


def main(argv):
    options = {"minutes": "30", "faults": "60", "seed": "0", "json": ""}
    for argument in argv:
        name, _, value = argument.removeprefix("--").partition("=")
        if name not in options or not value:
            print(__doc__)
            return 2
        options[name] = value
    minutes, least, chance = float(options["minutes"]), int(options["faults"]), random.Random(int(options["seed"]))
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place) / "disk"
        folder.mkdir()
        kinds = ["SIGKILL", "SIGTERM", "damaged checkpoint"] + ["full disk"] * small_disk(folder, "64m")
        sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports on what is not used here
        import torch
        from conftest import differences, make_inputs, settings_of
        import record
        import train
        torch.set_num_threads(1)
        inputs = pathlib.Path(place) / "inputs"
        settings, log = settings_of(make_inputs(inputs), pathlib.Path(place) / "settings.json"), pathlib.Path(place) / "log"
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with open(os.devnull, "w") as silence:  # once in this process, so that its forks find everything imported
            shown, sys.stdout = sys.stdout, silence
            short = ["--train.max_steps=1", "--schedule.lr_warmup_steps=0", "--log.tensorboard=true"]
            assert train.main([str(settings), f"--out={place}/warm", *short]) == 0
            sys.stdout = shown
        for number, handler in handlers.items():
            signal.signal(number, handler)

        began, suffered, rounds, broken, total = time.monotonic(), [], 0, [], 0
        steps, longest = min(300, max(60, int(60 * minutes))), min(4.0, max(1.0, 2 * minutes))
        over = lambda: time.monotonic() - began > 60 * minutes and len(suffered) >= least
        while not over() and not broken:
            run, quiet = folder / f"run-{rounds}", pathlib.Path(place) / f"quiet-{rounds}"
            chosen = [*COMMON, *SETTINGS[rounds % len(SETTINGS)], f"--train.max_steps={steps}", f"--train.seed={rounds}"]
            arguments = [str(settings), *{option.partition("=")[0]: option for option in chosen}.values()]  # of one given twice, the last
            assert ended(begin([*arguments, f"--out={quiet}"], log), 3600) == 0, log.read_text()[-3000:]
            before = len(suffered)
            try:
                beset(run, [*arguments, f"--out={run}"], log, steps, kinds, longest, chance, over, suffered)
                broken += [f"round {rounds}: {difference}" for difference in differences(run, quiet)[:9]]
            except AssertionError as error:
                broken.append(f"round {rounds}: {error}")
            broken += [f"round {rounds}: {fault['kind']} cost {fault['lost']} steps, {fault['allowed']} are allowed"
                       for fault in suffered[before:] if fault["lost"] > fault["allowed"]]
            broken += ["a traceback was printed"] * ("Traceback" in log.read_text(errors="replace"))
            total, rounds = total + steps, rounds + 1
            print(f"round {rounds}: {steps} steps, {len(suffered) - before} faults, {(time.monotonic() - began) / 60:.1f} min", flush=True)
            for old in (run, quiet):
                shutil.rmtree(old, ignore_errors=True)
        if "full disk" in kinds:
            ctypes.CDLL(None).umount2(str(folder).encode(), 2)
        if broken:
            print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
    lost = {kind: [fault["lost"] for fault in suffered if fault["kind"] == kind] for kind in kinds}
    result = {"minutes": round((time.monotonic() - began) / 60, 1), "rounds": rounds, "steps": total, "faults": len(suffered),
              "checkpoint_interval": INTERVAL, "same_curve_as_in_peace": not broken, "broken": broken, "environment": record.environment(),
              "kinds": {kind: {"count": len(steps), "most_steps_lost": max(steps, default=0),
                               "mean_steps_lost": round(sum(steps) / max(1, len(steps)), 2)}
                        for kind, steps in lost.items()}}
    print(f"\n{len(suffered)} faults in {rounds} runs of {total // rounds} steps, {result['minutes']} minutes")
    for kind, entry in result["kinds"].items():
        print(f"  {kind:<20} {entry['count']:>4}  steps lost: at most {entry['most_steps_lost']}, mean {entry['mean_steps_lost']}")
    peace = f"  every run ended as in peace, bit for bit; checkpoints every {INTERVAL} steps"
    print("\n".join(["  BROKEN: " + what for what in broken] or [peace]))
    if "full disk" not in kinds:
        print("  a small disk could not be mounted here: no run met a full one")
    if options["json"]:
        pathlib.Path(options["json"]).write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(broken) or len(suffered) < least)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
