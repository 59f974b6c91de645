"""Run the experiments of docs/FINDINGS.md, each by the project's own commands, and keep what their records come to.

    python bench/findings.py --list                                   every experiment with its command and the seconds it may take
    python bench/findings.py approach1-s0 approach1-s1 --rows=../rows one or several, by name; `bits-*` takes all that begin so; all
    python bench/findings.py all --rows=../rows --jobs=5 --minutes=9 --write=docs/findings
    python bench/findings.py all --work=FOLDER --write=docs/findings --minutes=0          only write summaries of what ran already

--rows: a folder with tldr-train.jsonl, tldr-validation.jsonl and gsm8k-train.jsonl (or .jsonl.gz). --jobs so many run at a time on one GPU;
an experiment whose time is of interest runs alone, as a command of its own, the others in processes forked from one that has imported what
all of them need; every summary says what ran beside it. After --minutes what runs is told to save and end; the same command goes on from
there, and what has ended is not run again. So a training may begin shortly before the end; not with --last, which begins only what can
end. --section.key=value goes to every training. Runs lie in --work (default runs/findings), with a log each; --write keeps of each what
docs/make_findings.py reads: settings, the thinned record, the verdict, the diagnosis of health.py, and what each evaluation row came to,
without any text of the rows. What is kept there, or in --kept=FOLDER, is not run again unless it is named in full.
--peers-site=FOLDER: packages of the peers (trl, unsloth, ...), which no other process sees.
"""
import collections
import contextlib
import fnmatch
import gzip
import json
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "bench")]

import compare
import config as settings
import forked
import health
import record
import verdict

GRACE = 20  # seconds that a run gets to save
SOON = 45   # seconds that must be left for a training to begin, which the next sitting goes on with
TLDR = {"data.train": "tldr-train.jsonl", "data.eval": "tldr-validation.jsonl"}
GSM8K = {"data.train": "gsm8k-train.jsonl", "data.eval": "", "data.eval_rows": 500}
BESIDE = {"memory.max_tokens": 8192, "memory.checkpoint_layers": 0,  # no probe of a GPU that others use
          "proof.parts": "no", "data.audit": "off", "log.tensorboard": "false", "log.report": "false"}
FIGURES = BESIDE | {"eval.samples": 0, "save.every_steps": 0}          # where only figures are compared
SHORT = {"train.max_steps": 500, "schedule.lr_warmup_steps": 50}       # what the peers run
CLEAN = {"data.drop": "duplicate,near_duplicate,leak"}
CLEAN_OF_WORDS = {"data.drop": f"{CLEAN['data.drop']},one_word"}
FORKED = ("train.py", "eval.py", "bench/cut.py")  # not the peers, who change what they import
TRAININGS = ("train.py", "bench/cut.py")  # they save when told to end, and go on
UNGUARDED = {"proof.enabled": "false", "alerts.stop": "[]"}

Experiment = collections.namedtuple("Experiment", "name commands seconds alone ends", defaults=(False, (0, 5)))


def training(name, config, values, seconds, alone=False, ends=(0, 5), program="train.py"):
    """An experiment that is one training. values: {key: value} on the command line; ends: exit codes that it may end with."""
    command = [program, f"configs/{config}.json", "--out=WORK/" + name, *(f"--{key}={value}" for key, value in values.items())]
    return Experiment(name, [command], seconds, alone, ends)


def seeded(name, config, values, seconds, seeds=(0, 1, 2)):
    return [training(f"{name}-s{seed}", config, values | {"train.seed": seed}, seconds) for seed in seeds]


def peer(name, who, seconds, more=()):
    """A peer on our rows in our order, and our evaluation of what it saved."""
    values, run = TLDR | SHORT | {"data.audit": "off"}, f"WORK/{name}"
    given = [*more, *(f"--{key}={value}" for key, value in values.items())]
    commands = [["bench/peers.py", who, "configs/approach1.json", f"--out={run}", *given],
                ["eval.py", f"--ckpt={run}", "--keep", "--eval.samples=0"]]
    return Experiment(name, commands, seconds)


def generation(name, more, seconds=40):
    """What approach1-s0 writes, for our own prompts and for 200 commands of the validation rows."""
    asked = lambda to, *which: ["eval.py", "--ckpt=WORK/approach1-s0", "--json", f"--to=WORK/{name}/{to}.out", *which, *more]
    return Experiment(name, [asked("prompts", "--prompts=bench/prompts.txt", "--eval.max_rows=1"),
                             asked("commands", "--data=WORK/commands.jsonl", "--eval.samples=200")], seconds)


def experiments():
    """All of them, in the order in which they are run: what is timed alone, then what matters most, further seeds last."""
    failure = TLDR | BESIDE | {"eval.samples": 4}
    first, later = (0,), (1, 2)
    rates = {rate: {"schedule.learning_rate": rate, "schedule.lr_min": floor}  # the floor is a tenth, as approach 1's is
             for rate, floor in (("2e-4", "2e-5"), ("5e-4", "5e-5"), ("1e-3", "1e-4"), ("2e-3", "2e-4"))}
    patient = GSM8K | FIGURES | {"eval.every_steps": 100, "eval.patience": 2}
    plan = [training("approach1-s0", "approach1", TLDR | {"train.seed": 0, "eval.samples": 16}, 120, alone=True),
            training("approach3", "approach3", TLDR | BESIDE | {"eval.samples": 16}, 150),
            *seeded("seed-failure", "seed-failure", failure, 35),
            training("cut", "seed-failure", failure, 25, ends=(4,), program="bench/cut.py"),
            training("cut-unguarded", "seed-failure", failure | UNGUARDED, 35, program="bench/cut.py"),
            *seeded("cure-rate", "seed-failure", failure | {"schedule.learning_rate": "1e-4"}, 35),
            *seeded("cure-batch", "seed-failure", failure | {"train.micro_batch_size": 2, "train.accumulation": 16}, 40),
            *seeded("cure-floor", "seed-failure", failure | {"schedule.lr_min": "1e-5"}, 35),
            *seeded("cure-steps", "seed-failure", failure | {"train.max_steps": 2000, "eval.every_steps": 500}, 50),
            *seeded("approach1", "approach1", TLDR | BESIDE | {"eval.samples": 16}, 65, later),
            training("approach2", "approach2", TLDR | BESIDE | {"eval.samples": 16}, 160),
            generation("generation-before", ["--untrained"]), generation("generation-after", []),
            generation("generation-before-bf16", ["--untrained", "--model.quant=none"]),
            training("gsm8k", "approach1", GSM8K | BESIDE | {"eval.samples": 16, "eval.every_steps": 250}, 110),
            training("gsm8k-early", "approach1", patient, 90), training("gsm8k-early-5e-4", "approach1", patient | rates["5e-4"], 90)]
    variant = lambda name, values, seeds=first, seconds=50: seeded(name, "approach1", TLDR | FIGURES | values, seconds, seeds)
    single = {"bits-single": {"model.double_quant": "false"}, "factor-rank": {"lora.r": 32, "lora.alpha": 64},
              "factor-rslora": {"lora.rslora": "true"},
              "factor-targets": {"lora.targets": "q_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"},
              "factor-dropout": {"lora.dropout": 0.1}}
    bits = {kind: {"model.quant": kind} for kind in ("none", "int8")}
    schedules = {"zero": {"schedule.lr_min": 0}, "wsd": {"schedule.lr_kind": "wsd"}, "constant": {"schedule.lr_kind": "constant"},
                 "floor-3e-5": {"schedule.lr_min": "3e-5"}, "growing-batch": {"schedule.batch_points": "[[1,16],[1001,48]]"},
                 "adaptive-clip": {"schedule.clip_percentile": 50, "schedule.clip_norm": 100}, "no-clip": {"schedule.clip_norm": 0}}
    plan += [run for kind in bits for run in variant(f"bits-{kind}", bits[kind])]
    plan += [run for name in single for run in variant(name, single[name], seconds=55)]
    plan += seeded("factor-all-but-bits", "approach3", TLDR | FIGURES | {"model.quant": "nf4"}, 60, first)
    plan += [*seeded("ours-500", "approach1", TLDR | FIGURES | SHORT, 40), peer("peer-trl", "trl", 240)]
    plan += [run for name in schedules for run in variant(f"schedule-{name}", schedules[name])]
    plan += variant("clean", CLEAN, seconds=55) + variant("clean-words", CLEAN_OF_WORDS, seconds=55)
    plan += [peer("peer-unsloth", "unsloth", 200), peer("peer-trl-fp32", "trl", 240, more=["--adapters=fp32"])]
    brief = TLDR | FIGURES | {"train.max_steps": 200, "schedule.lr_warmup_steps": 20}
    slow = brief | {"memory.fused": "false", "memory.graphs": "no", "memory.keep_dequantized": "no"}
    plan += [run for seed in (*first, *later) for name, values in (("fast-200", brief), ("slow-200", slow))
             for run in seeded(name, "approach1", values, 35 if name == "fast-200" else 90, (seed,))]
    plan += [run for rate in ("5e-4", "1e-3", "2e-4", "2e-3") for run in variant(f"rate-{rate}", rates[rate])]
    high = {"wsd": schedules["wsd"], "constant": schedules["constant"], "zero": schedules["zero"], "clip-off": schedules["no-clip"]}
    plan += [run for name in high for run in variant(f"rate-5e-4-{name}", rates["5e-4"] | high[name])]
    plan += variant("rate-1e-3", rates["1e-3"], later) + variant("bits-none", bits["none"], later)
    plan += [run for name in ("wsd", "constant", "zero") for run in variant(f"schedule-{name}", schedules[name], later)]
    plan += variant("clean", CLEAN, later, 55) + variant("bits-int8", bits["int8"], later)
    return plan + variant("rate-5e-4", rates["5e-4"], later)


# ------------------------------------------------------------------------------------------------------------ running

def found_in(rows, name):
    """The file of that name in the folder `rows`, or the same with .gz."""
    for path in (rows / name, rows / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"--rows: {rows} holds no {name} and no {name}.gz")


def filled_in(command, work, rows, overrides):
    """(a command's words with its places filled in, the file that its output goes to or None). An override replaces the own value."""
    given = dict(word.partition("=")[::2] for word in command[1:] if word.startswith("--"))
    trains = command[0] != "eval.py"
    given |= {f"--{key}": value for key, value in overrides if trains}
    for key, value in given.items():
        given[key] = str(found_in(rows, value)) if key in ("--data.train", "--data.eval") and value and not os.path.exists(value) else \
            value.replace("WORK", str(work))
    to = given.pop("--to", None)
    run = pathlib.Path(given.get("--out", ""))
    if command[0] in ("train.py", "bench/cut.py") and run.exists():
        given["--resume" if any(run.glob("checkpoints/step-*")) else "--overwrite"] = ""
    bare = ("--resume", "--overwrite", "--json", "--keep", "--untrained")
    words = [key if key in bare else f"{key}={value}" for key, value in given.items()]
    return [command[0], *(word for word in command[1:] if not word.startswith("--")), *words], to and pathlib.Path(to)


def begin(experiment, place, work, rows, overrides, threads, peers_site=None):
    """Start command number `place` of an experiment; what it says goes to its log. peers_site: the folder of packages for the peers alone,
    behind those that everybody sees."""
    words, to = filled_in(experiment.commands[place], work, rows, overrides)
    log = open(work / f"{experiment.name}.log", "ab")
    log.write(f"\n$ python {' '.join(words)}\n".encode())
    log.flush()
    if to:
        to.parent.mkdir(exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if peers_site and words[0] == "bench/peers.py":
        environment |= forked.packages(peers_site)
    if experiment.alone or words[0] not in FORKED:
        with open(to, "wb") if to else contextlib.nullcontext(log) as output:
            started = [sys.executable, str(PROJECT / words[0]), *words[1:]]
            return subprocess.Popen(started, stdout=output, stderr=log, cwd=PROJECT, env=os.environ | environment)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eval", "train", "datasets", "matplotlib.pyplot", "torch.utils.tensorboard",
                                    "transformers.models.llama.modeling_llama"])
    process = context.Process(target=forked.run_script, args=(words, to, log.name, environment))
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that looking for a GPU does not start CUDA, which survives no fork
    process.start()
    return process


def exit_code(process):
    """Of a subprocess.Popen or a multiprocessing.Process, minus the signal that killed it; None while it runs."""
    return process.exitcode if hasattr(process, "exitcode") else process.poll()


def sittings_of(work, name):
    """What was done of an experiment so far: [{"seconds", "beside": most others at a time, "exit"}, ...], one entry a start."""
    path = work / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else []


def ended(experiment, work):
    sittings = sittings_of(work, experiment.name)
    return bool(sittings) and sittings[-1]["exit"] in experiment.ends


def kept_already(experiment, folders):
    """Whether one of the folders of kept records says that an experiment ended: in an earlier sitting, maybe on another machine."""
    return any(compare.read_json(folder / experiment.name / "summary.json").get("exit") in experiment.ends for folder in folders)


def last_step(run):
    """The last step on record, for a look at a run that goes on."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 100_000))
        steps = re.findall(rb'^\{"step": (\d+)', file.read(), re.M)
    return int(steps[-1]) if steps else 0


def needs(experiment, work, plan):
    """Names of experiments that one reads and that have not ended: the generations are of approach1-s0."""
    read = [word.split("WORK/")[1] for word in experiment.commands[0] if word.startswith("--ckpt=WORK/")]
    return [other.name for other in plan if other.name in read and not ended(other, work)]


def run_all(chosen, plan, work, rows, jobs, seconds, overrides, done, peers_site=None, last=False):
    """Run experiments until they have ended or the time is over. done(experiment): called as each ends.

    last: no sitting comes after this one, so nothing begins that cannot end. Returns those that did not end well.
    """
    began, threads = time.monotonic(), max(1, (os.cpu_count() or 1) // max(1, jobs))
    pending, running, failed, told, stopping = [e for e in chosen if not ended(e, work)], [], [], began, []
    # these need less than the whole time, nobody knows how much
    begun = [e for e in pending if any((work / e.name).glob("checkpoints/step-*"))]
    say = lambda text: print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)
    ratios = []  # how much longer than alone experiments took so far, beside each other
    slower = lambda: max(1.0, float(np.median(ratios))) if len(ratios) > 2 else 1.0
    resumes = lambda e: all(command[0] in TRAININGS for command in e.commands)
    soon = lambda e: resumes(e) and (e in begun or not e.alone and not last)
    takes = lambda e: SOON if soon(e) else GRACE + e.seconds * (1.0 if e.alone else slower())
    previous = {number: signal.signal(number, lambda *_: stopping.append(True)) for number in (signal.SIGINT, signal.SIGTERM)}
    left = lambda: seconds - (time.monotonic() - began)
    while pending or running:
        for entry in list(running):
            entry["beside"] = max(entry["beside"], len(running) - 1)
            code, experiment = exit_code(entry["process"]), entry["experiment"]
            if code is None:
                continue
            if code in experiment.ends and entry["place"] + 1 < len(experiment.commands) and not stopping:
                entry["place"] += 1
                entry["process"] = begin(experiment, entry["place"], work, rows, overrides, threads, peers_site)
                continue
            running.remove(entry)
            complete = entry["place"] + 1 == len(experiment.commands)
            took = time.monotonic() - entry["began"]
            sitting = {"seconds": round(took, 1), "beside": entry["beside"],
                       "exit": code if complete or code not in experiment.ends else None}
            (work / f"{experiment.name}.json").write_text(json.dumps([*sittings_of(work, experiment.name), sitting]))
            if ended(experiment, work):
                ratios += [took / experiment.seconds] if entry["beside"] and experiment not in begun else []
                say(f"{experiment.name} ended with {code} after {took:.0f} s beside {entry['beside']}")
                try:
                    done(experiment)
                except Exception as error:  # the others go on; --minutes=0 writes the summary again
                    say(f"{experiment.name}: its summary could not be written: {type(error).__name__}: {error}")
            else:
                failed.append(experiment)
                tail = (work / f"{experiment.name}.log").read_bytes()[-600:].decode(errors="replace").strip()
                how = "was stopped" if stopping else "FAILED"
                say(f"{experiment.name} {how} with {code} after {took:.0f} s" + ("" if stopping else f":\n{tail}"))
        if not stopping and left() < GRACE:
            stopping.append(True)
        if stopping:
            if len(stopping) < 1000:  # once
                stopping += [True] * 1000
                for entry in running:
                    entry["process"].terminate()
            if left() < 0:
                for entry in running:
                    entry["process"].kill()
            if not running:
                break
        ready = [e for e in pending if not needs(e, work, plan) and takes(e) < left()] if not stopping else []
        if not running and pending and not ready:
            break
        while ready and len(running) < jobs and not any(entry["experiment"].alone for entry in running):
            experiment = next((e for e in ready if not e.alone or not running), None)
            if experiment is None or ready[0].alone and running:  # the next one wants to be alone: wait for it
                break
            ready.remove(experiment), pending.remove(experiment)
            say(f"{experiment.name} begins")
            running.append({"experiment": experiment, "place": 0, "began": time.monotonic(), "beside": len(running),
                            "process": begin(experiment, 0, work, rows, overrides, threads, peers_site)})
        if time.monotonic() - told > 30:
            told = time.monotonic()
            say("; ".join(f"{entry['experiment'].name} at {last_step(work / entry['experiment'].name):,}" for entry in running))
        time.sleep(0.1)
    for number, handler in previous.items():
        signal.signal(number, handler)
    for experiment in pending:
        if missing := needs(experiment, work, plan):
            say(f"{experiment.name} reads {', '.join(missing)}, which has not ended in {work}; name it too")
    return failed + pending


# ---------------------------------------------------------------------------------------------------------- summaries

SUMS = ("train/seconds", "train/samples", "train/tokens", "train/supervised_tokens")
MEANS = ("train/loss", "train/grad_norm", "train/clipped", "train/skipped")
DROPPED = ("eval/samples", "adapters/modules")


def thinned(lines, most=100):
    """A record of at most about `most` lines: a line stands for the steps since the line before it, with sums of samples, tokens and
    seconds, means of loss and norm, and the last value of all else. Evaluations, alerts and proofs end such a stretch."""
    every, kept, group = max(1, len(lines) // most), [], []
    for line in lines:
        group.append(line)
        closing = line["step"] % every == 0 or any(tag.startswith(("eval/", "proof/")) or tag == "alerts" for tag in line)
        if not closing and line is not lines[-1]:
            continue
        values = {tag: value for part in group for tag, value in part.items() if tag not in DROPPED}
        for tag in (*SUMS, *MEANS):
            found = [part[tag] for part in group if tag in part]
            if found:
                values[tag] = sum(found) if tag in SUMS else float(np.mean(found))
        if "train/tokens_per_second" in values and values.get("train/seconds"):
            values["train/tokens_per_second"] = values["train/tokens"] / values["train/seconds"]
        short = lambda value: float(f"{value:.6g}") if np.isfinite(value) else str(value)
        kept.append({tag: short(value) if isinstance(value, float) else value for tag, value in values.items()})
        group = []
    return kept


def facts_of(run, lines):
    """What takes every step to tell, from a whole record."""
    column = lambda tag: np.array([verdict.number(line[tag]) for line in lines if tag in line])
    finite = lambda values: values[np.isfinite(values)]
    norms, seconds, loss = finite(column("train/grad_norm")), finite(column("train/seconds")), finite(column("train/loss"))
    some = lambda values, of: float(f"{of(values):.6g}") if len(values) else None
    edge = min(25, max(1, len(loss) // 4))
    alerts = [{"step": line["step"]} | {key: alert[key] for key in ("name", "severity")} for line in lines
              for alert in json.loads(line.get("alerts", "[]"))]
    samples, epoch = column("train/samples").sum(), column("train/epoch")
    held = health.read(run / "metrics.jsonl")
    held.rows = round(samples / epoch[-1]) if len(epoch) and epoch[-1] else 0
    diagnosis = health.diagnose(held)
    forecast = compare.read_json(run / "forecast.json").get("findings", [])
    proofs = [[line["step"], line["proof/ratio"], line.get("proof/tolerance")] for line in lines if "proof/ratio" in line]
    return {"steps": lines[-1]["step"], "rows": held.rows, "samples": int(samples), "tokens": int(column("train/tokens").sum()),
            "train_seconds": some(seconds, np.sum), "step_seconds": some(seconds, np.median),
            "peak_memory_gib": some(column("train/peak_memory_gib"), np.max),
            "loss": [some(loss[:edge], np.median), some(loss[-edge:], np.median)], "loss_window": edge,
            "norm": [some(norms, of) for of in (np.min, np.median, np.max)], "zero_norms": int((norms == 0).sum()),
            "clipped": some(column("train/clipped"), np.mean), "skipped": int(column("train/skipped").sum()), "alerts": alerts,
            "proof": [[at, *(float(f"{value:.4g}") if np.isfinite(value := verdict.number(part)) else None for part in rest)]
                      for at, *rest in proofs],
            "forecast": [{"name": found["name"], "severity": found["severity"]} for found in forecast],
            "diagnosis": [{"name": found.name, "severity": found.severity} for found in diagnosis if found.severity != "unjudged"],
            "headline": health.headline(held, diagnosis)}


def bare(text):
    """What a model wrote for a command, without the white space, back-quotes and code fence around it."""
    text = text.strip()
    fenced = re.fullmatch(r"```\w*\n(.*?)\n?```", text, re.S)
    return (fenced.group(1) if fenced else text).strip().strip("`").strip()


def generation_facts(folder):
    """{"prompts": what was written for our own prompts, whole; "commands": whether each validation command was right and stopped}."""
    read = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.out")}
    own = [{name: sample[name] for name in ("prompt", "text", "tokens", "stopped")} for sample in read["prompts"]["samples"]]
    rows = []
    for sample in read["commands"]["samples"]:
        text, wanted = sample["text"], sample["reference"].strip()
        rows.append({"exact": bare(text) == wanted, "holds": wanted in text, "stopped": bool(sample["stopped"]),
                     "overlap": round(verdict.overlap(text, wanted), 4)})
    return {"prompts": own, "commands": rows}


def plain_paths(text, work, rows):
    """Text without the folders of the machine that the runs were made on."""
    for folder in (work, rows, PROJECT):
        text = text.replace(f"{folder}/", "") if folder and str(folder) not in (".", "") else text
    return text.replace(".jsonl.gz", ".jsonl")


def write(experiment, work, rows, into, overrides=()):
    """Keep what an experiment came to in into/NAME. overrides: ((key, value), ...) that its trainings were given."""
    run, folder = work / experiment.name, into / experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    strict = lambda tree: plain_paths(json.dumps(tree, indent=1), work, rows) + "\n"
    sittings = sittings_of(work, experiment.name)
    given = {f"--{key}": f"--{key}={value}" for key, value in overrides}
    told = lambda command: [*(word for word in command if word.partition("=")[0] not in given), *given.values()]
    about = {"name": experiment.name,
             "commands": [f"python {' '.join(command if command[0] == 'eval.py' else told(command))}" for command in experiment.commands],
             "exit": sittings[-1]["exit"], "seconds": round(sum(sitting["seconds"] for sitting in sittings), 1),
             "alone": len(sittings) == 1 and not sittings[0]["beside"]}
    if (run / "metrics.jsonl").is_file():
        lines = record.read_metrics(run)
        about |= facts_of(run, lines)
        tree = json.loads((run / "config.json").read_text())
        for section, key in (("model", "path"), ("data", "train"), ("data", "eval")):
            tree[section][key] = pathlib.Path(tree[section][key]).name
        (folder / "config.json").write_text(strict(tree))
        (folder / "environment.json").write_text(json.dumps(compare.read_json(run / "environment.json"), indent=1) + "\n")
        (folder / "metrics.jsonl").write_text("".join(plain_paths(json.dumps(line), work, rows) + "\n" for line in thinned(lines)))
        (folder / "verdict.json").write_text(strict(verdict.plain(verdict.of_run(run))))
        if "one_word" in tree["data"]["drop"]:
            (folder / "rows.json").write_text(json.dumps({"one_word": one_word(rows)}) + "\n")
        by_row = record.read_evaluations(run)
        steps = [step for step in by_row if type(step) is int]
        first = set() if experiment.name.endswith(("-s1", "-s2")) else {0, "unquantised"}  # the same for every seed
        for step in ({max(steps)} | first) & set(by_row) if steps else ():
            arrays, metadata = by_row[step]
            small = {"nll": arrays["nll"]} | {name: arrays[name].astype(np.uint16) for name in ("tokens", "correct")}
            record.save_evaluation(folder, f"step-{step:06d}" if type(step) is int else step, small, metadata)
    elif (run / "commands.out").is_file():
        (folder / "generation.json").write_text(strict(generation_facts(run)))
    (folder / "summary.json").write_text(strict(about))


def validation(rows):
    """The lines of the validation rows, as text."""
    opener = gzip.open if (source := found_in(rows, TLDR["data.eval"])).suffix == ".gz" else open
    with opener(source, "rt", encoding="utf-8") as file:
        return list(file)


def one_word(rows):
    """Which validation rows, counted from 0, have an answer of one word: what training without such answers is looked at by."""
    return [number for number, line in enumerate(validation(rows)) if len(json.loads(line)["messages"][-1]["content"].split()) == 1]


def commands_of(rows, path):
    """200 of the validation rows that ask for a command, every fifth, chosen before anything was generated."""
    asking = [line for line in validation(rows) if json.loads(line)["messages"][0]["content"].startswith("Give a shell command")]
    path.write_text("".join(asking[::5][:200] if len(asking) >= 1000 else asking[:200]), encoding="utf-8")


def main(argv):
    texts = dict.fromkeys(("rows", "work", "write", "kept", "peers-site", "jobs", "minutes"), "")
    names, flags, overrides = settings.command_line(argv, texts | {"list": False, "last": False, "help": False})
    plan = experiments()
    if flags["help"] or not names and not flags["list"]:
        print(__doc__.strip())
        return 0
    wanted = [e for e in plan if names in ([], ["all"]) or any(fnmatch.fnmatchcase(e.name, name) for name in names)]
    strange = [name for name in names if name != "all" and not any(fnmatch.fnmatchcase(e.name, name) for e in plan)]
    if strange:
        raise ValueError(f"{', '.join(strange)}: there is no such experiment; --list shows them")
    folders = [pathlib.Path(flags[name]).resolve() for name in ("kept", "write") if flags[name]]
    known = [e for e in wanted if e.name not in names and kept_already(e, folders)]
    if flags["list"]:
        for experiment in wanted:
            alone, kept = ", alone" if experiment.alone else "", ", kept" if experiment in known else ""
            print(f"{experiment.name}   {experiment.seconds} s{alone}{kept}")
            print(*(f"    python {' '.join(command)}" for command in experiment.commands), sep="\n")
        wanted = [e for e in wanted if e not in known]
        kept = f" and {len(known)} kept" if known else ""
        print(f"{len(wanted)} experiments{kept}, {sum(e.seconds for e in wanted) / 60:.0f} minutes one after the other")
        return 0
    work, rows = (pathlib.Path(flags["work"] or "runs/findings").resolve(), pathlib.Path(flags["rows"] or ".").resolve())
    into = pathlib.Path(flags["write"]).resolve() if flags["write"] else None
    minutes, jobs = float(flags["minutes"] or 1e6), int(flags["jobs"] or 1)
    work.mkdir(parents=True, exist_ok=True)
    keep = lambda experiment: into and write(experiment, work, rows, into, overrides)
    if minutes == 0:
        for experiment in wanted:
            keep(experiment) if ended(experiment, work) else None
        return 0
    wanted = [e for e in wanted if e not in known]
    commands_of(rows, work / "commands.jsonl")
    site = pathlib.Path(flags["peers-site"]).resolve() if flags["peers-site"] else None
    if site and not site.is_dir():
        raise ValueError(f"--peers-site: {site} is no folder; leave it out where the peers' packages are installed")
    left = run_all(wanted, plan, work, rows, jobs, 60 * minutes, overrides, keep, site, flags["last"])
    kept = f", {len(known)} were kept already" if known else ""
    print(f"{len(wanted) - len(left)} of {len(wanted)} ended{kept}; left: {', '.join(e.name for e in left) or 'none'}")
    return 0 if not left else 1


if __name__ == "__main__":
    settings.run_command(main)
