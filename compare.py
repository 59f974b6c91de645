"""Runs against each other on the same evaluation rows: which one is better, by how much, how surely, and at what price.

    python compare.py runs/a runs/b                     each against the first; draws runs/compare.png
    python compare.py runs/a runs/b runs/c --out=ab     ab/compare.md with ab/compare.png
    python compare.py runs/a runs/b --at=best --json    --at: common (the last step that all evaluated), best, last or a step
    python compare.py --ab model.quant=nf4,int8 configs/approach1.json [--section.key=value ...]
                                                        trains runs/approach1-nf4 and runs/approach1-int8, and compares them

The same rows under two adapters are hard or easy together, so what counts is the difference row by row: its interval comes
from drawing rows with replacement (verdict.resampled_sums), and says how the difference would come out on other rows like
these. It says nothing about other seeds; for that, --ab train.seed=0,1,2 shows the spread. Runs on other rows, or whose
tokenizer differs, are not comparable and refused. --ab trains what is not there: a finished run with the same settings is
taken as it is, an unfinished one resumed. Reads records only, no model. Leaves out: whether a run did well (verdict.py).
Exit codes: 0; 2 where runs cannot be read or compared; with --ab that of a training that did not end well.
"""
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np

import config as settings
import record
import verdict
import words

CONFIDENCE = 0.95
AXES = {"step": "step", "samples": "samples trained on", "tokens": "tokens trained on", "seconds": "seconds in training steps"}
HOW_ONLY = ("log", "save", "criteria", "alerts", "forecast", "proof")  # sections that shape no figure compared here
PATHS = ("model.path", "data.train", "data.eval", "data.chat_template", "eval.prompts", "lora.init_from")


# --------------------------------------------------------------------------------------------------------------- runs

def read_json(path):
    """An object from a JSON file, {} where there is none. Raises ValueError naming the file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the run wrote it, restore it or remove it") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: must be an object; the run wrote it, restore it or remove it")
    return tree


def read_run(folder):
    """A run folder's record: {"path", "name", "config": flat, "step", "planned_steps", "state", "metrics", "environment",
    "evaluations": {step: arrays}, "metadata": {step: texts}, "notes"}. ValueError names what is not there and the command that makes it."""
    folder = pathlib.Path(folder)
    name, damaged = folder.resolve().name, []
    metrics = record.read_metrics(folder, damaged)
    tree = {section: values for section, values in read_json(folder / "config.json").items() if isinstance(values, dict)}
    every = record.read_evaluations(folder, damaged)
    kept, _, notes = verdict.same_evaluations(metrics, every)
    notes = [f"{problem}." for problem in damaged[:3]] + notes
    recorded, last = {line["step"] for line in metrics if "eval/loss" in line}, metrics[-1]["step"] if metrics else 0
    by_hand = {step for step in every if type(step) is int and step not in recorded and step <= last}  # eval.py --keep, between evaluations
    steps = sorted(by_hand | {step for step in kept if type(step) is int})
    if not any(steps):
        there = "holds only figures of step 0, before training" if steps else "holds no figures by row"
        why = "".join(f" {note}" for note in notes)
        raise ValueError(f"{folder / 'evaluations'} {there}.{why} Make them with: python eval.py --ckpt {folder} --keep")
    flat = {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}
    return {"path": folder, "name": name, "config": flat, **verdict.progress(tree, metrics), "metrics": metrics,
            "environment": read_json(folder / "environment.json"), "evaluations": {step: every[step][0] for step in steps},
            "metadata": {step: every[step][1] for step in steps}, "notes": [f"{name}: {note}" for note in notes]}


def name_apart(runs, longest=12):
    """Give every run a short name of its own: its folder's without what all begin with, the parent's before it where two are alike, the
    parent's alone where all are and the two together are long."""
    names = [run["name"] for run in runs]
    if len(set(names)) < len(names):
        both = ["/".join(run["path"].resolve().parts[-2:]) for run in runs]
        alike = len(set(names)) == 1 and len(set(both)) == len(both) and max(map(len, both)) > longest
        names = [name.partition("/")[0] for name in both] if alike else both
    shared = re.match(r".*[-_/]|", os.path.commonprefix(names)).group()
    names = [name[len(shared):] or name for name in names]
    short = [name if len(name) <= longest else "…" + name[1 - longest:] for name in names]
    if len(set(short)) < len(short):
        short = [f"{i}-{name}"[:longest] for i, name in enumerate(short, start=1)]
    for run, name in zip(runs, short):
        run["name"] = name


def check_comparable(runs):
    """Raises ValueError with the reason where two runs were not evaluated on the same rows by the same tokenizer."""
    newest = lambda run: max(run["evaluations"])
    for run in runs:
        metadata = run["metadata"][newest(run)]
        missing = [what for key, what in (("tokenizer", "tokenizer"), ("rows_digest", "rows")) if not metadata.get(key)]
        if missing:
            raise ValueError(f"{run['path']}: its figures do not say of which {' and '.join(missing)} they are, so nothing can be "
                             f"compared; make them anew with: python eval.py --ckpt {run['path']} --keep")
    first = runs[0]
    for run in runs[1:]:
        about, other_about = (which["metadata"][newest(which)] for which in (first, run))
        rows, other_rows = (which["evaluations"][newest(which)] for which in (first, run))
        stated = lambda key: f"{key} is {' and '.join(json.dumps(which['config'].get(key)) for which in (first, run))}"
        refused = f"{first['path']} and {run['path']} cannot be compared: "
        if about["tokenizer"] != other_about["tokenizer"]:
            raise ValueError(f"{refused}their tokenizers differ ({stated('model.path')}), so a token of one is not a token of the other, "
                             "and losses a token have different units")
        if about["rows_digest"] != other_about["rows_digest"]:
            named = first["config"].get("data.eval", True)
            held_out = "" if named else "; name data.eval, since rows held out of the training rows depend on the seed"
            shaping = ("data.eval", "data.eval_rows", "data.chat_template", "data.max_length")
            other = [stated(key) for key in shaping if first["config"].get(key) != run["config"].get(key)]
            same = f"both name {json.dumps(named)}, and what is in there has changed" if named else "both hold rows out"
            why = "; ".join(other) or same
            raise ValueError(f"{refused}they were evaluated on other rows, or on the same ones under another template or length "
                             f"({why}); train both with the same --data.eval, --data.chat_template and --data.max_length{held_out}")
        if len(rows["tokens"]) != len(other_rows["tokens"]):
            raise ValueError(f"{refused}one was evaluated on {len(rows['tokens']):,} rows, the other on {len(other_rows['tokens']):,} "
                             f"({stated('eval.max_rows')}); train both with the same --eval.max_rows")
        if not np.array_equal(rows["tokens"], other_rows["tokens"]):
            raise ValueError(f"{refused}their rows hold other numbers of supervised tokens, though the digests agree; "
                             "make the figures anew with: python eval.py --ckpt RUN --keep")


def loss_of(arrays):
    """Nats a token over all rows."""
    return float(arrays["nll"].sum() / max(1.0, arrays["tokens"].sum()))


def choose(runs, at):
    """The step to compare each run at: a list. at: common, best, last, or a step as text. Raises ValueError with the steps there are."""
    has = lambda run: f"{run['path']} has " + ", ".join(f"{step:,}" for step in run["evaluations"])
    if at == "last":
        return [max(run["evaluations"]) for run in runs]
    if at == "best":
        rank = lambda arrays: (not math.isfinite(loss_of(arrays)), loss_of(arrays))
        return [min((step for step in run["evaluations"] if step), key=lambda step: rank(run["evaluations"][step])) for run in runs]
    if at != "common" and not at.isdigit():
        raise ValueError(f"--at: must be common, best, last or a step, got {at}")
    shared = sorted(set.intersection(*(set(run["evaluations"]) for run in runs)))
    if at == "common":
        if not any(shared):
            raise ValueError(f"the runs share no evaluated step after training: {'; '.join(map(has, runs))}. Compare them --at=last or "
                             "--at=best, or evaluate them after the same step")
        return [shared[-1]] * len(runs)
    if int(at) not in shared:
        lacking = [run for run in runs if int(at) not in run["evaluations"]]
        saved = [run["path"] for run in lacking if (run["path"] / "checkpoints" / f"step-{int(at):06d}").is_dir()]
        make = "; ".join(f"python eval.py --ckpt {path}@step-{int(at):06d} --keep" for path in saved)
        raise ValueError(f"--at: {'; '.join(map(has, lacking))}, not {int(at):,}" + (f". Make it with: {make}" if make else ""))
    return [int(at)] * len(runs)


# ----------------------------------------------------------------------------------------------------------- comparing

def differences(runs, steps):
    """What each run came to at its step, and against the first, paired row by row: a list of {"loss", "low", "high", "perplexity",
    "token_accuracy", "loss_difference" and "accuracy_difference": {"value", "low", "high"} or None, "rows_better", "rows_worse"}."""
    arrays = [run["evaluations"][step] for run, step in zip(runs, steps)]
    counted = arrays[0]["tokens"] > 0
    if not counted.any():
        raise ValueError(f"{runs[0]['path']}: no evaluation row holds a supervised token, so there is nothing to compare")
    table = np.stack([arrays[0]["tokens"][counted]] + [a[name][counted] for a in arrays for name in ("nll", "correct")], axis=1)
    finite = [bool(np.isfinite(a["nll"][counted]).all()) for a in arrays]
    ratios = verdict.with_draws(np.where(np.isfinite(table), table, 0.0), lambda sums: sums[:, 1:] / sums[:, :1])
    found = []
    for i, a in enumerate(arrays):
        loss, accuracy = ratios[:, 2 * i], ratios[:, 2 * i + 1]
        low, high = verdict.interval(loss, CONFIDENCE) if finite[i] else (None, None)
        mean = float(loss[0]) if finite[i] else math.nan
        entry = {"loss": mean, "low": low, "high": high, "perplexity": math.exp(min(700.0, mean)) if finite[i] else math.nan,
                 "token_accuracy": float(accuracy[0])}
        entry |= dict.fromkeys(("loss_difference", "accuracy_difference", "rows_better", "rows_worse"))
        if i and finite[i] and finite[0]:
            for name, gap in (("loss_difference", loss - ratios[:, 0]), ("accuracy_difference", accuracy - ratios[:, 1])):
                low, high = verdict.interval(gap, CONFIDENCE)
                entry[name] = {"value": float(gap[0]), "low": low, "high": high}
            entry["rows_better"] = float((a["nll"] < arrays[0]["nll"])[counted].mean())
            entry["rows_worse"] = float((a["nll"] > arrays[0]["nll"])[counted].mean())
        found.append(entry)
    return found


def sense(gap):
    """A loss difference in a word: lower, higher, unclear where its interval holds 0, same where not a bit differs, or none."""
    if gap is None:
        return "none"
    if gap["low"] == gap["high"] == 0:
        return "same"
    return "lower" if gap["high"] < 0 else "higher" if gap["low"] > 0 else "unclear"


def curve(run):
    """Where a run stood at each recorded step, float64 (lines,) each, NaN where the record lacks it: {"step", "samples", "tokens",
    "seconds": summed up to it, "loss": of training, "eval_loss", "token_accuracy"}."""
    column = lambda tag: np.array([verdict.number(line.get(tag)) for line in run["metrics"]])
    tags = {"step": "step", "loss": "train/loss", "eval_loss": "eval/loss", "token_accuracy": "eval/token_accuracy"}
    values = {name: column(tag) for name, tag in tags.items()}
    for name in ("samples", "tokens", "seconds"):
        values[name] = np.cumsum(np.where(values["step"] > 0, column(f"train/{name}"), 0.0))
    return values


def costs(run):
    """{"tokens_per_second" and "seconds_per_step": medians of the steps, "seconds": of all steps, "peak_memory_gib", "memory_of",
    "machine"}, None where not recorded."""
    def of(values, what):
        return float(what(values[np.isfinite(values)])) if np.isfinite(values).any() else None

    column = lambda tag: np.array([verdict.number(line.get(tag)) for line in run["metrics"]])
    seconds = column("train/seconds")
    stood_for = np.maximum(1, np.diff([line["step"] for line in run["metrics"]], prepend=0))  # a line of a thinned record: several steps
    about = run["environment"]
    devices, torch = about.get("devices") or [], (about.get("packages") or {}).get("torch")
    machine = [str(device.get("name", "GPU")) for device in devices] or [str(about.get("cpu", "machine not recorded"))]
    return {"tokens_per_second": of(column("train/tokens_per_second"), np.median), "seconds_per_step": of(seconds / stood_for, np.median),
            "seconds": of(seconds, np.sum), "peak_memory_gib": of(column("train/peak_memory_gib"), np.max),
            "memory_of": "GPU" if devices else "process", "machine": ", ".join(machine + [f"torch {torch}"] * bool(torch))}


def samples_at(run, step):
    """(step, samples) of the last sampling up to `step`, or (None, [])."""
    read = ((line["step"], verdict.samples_of(line)) for line in run["metrics"] if line["step"] <= step)
    written = [(at, samples) for at, samples in read if samples]
    return written[-1] if written else (None, [])


def settings_that_differ(runs):
    """{"section.key": [value of each run, None where it has none]} of what is not the same in all."""
    keys = dict.fromkeys(key for run in runs for key in run["config"])
    by_key = {key: [run["config"].get(key) for run in runs] for key in keys}
    return {key: values for key, values in by_key.items() if len(set(map(json.dumps, values))) > 1}


def spread(values):
    """Mean, standard deviation and range of what several seeds came to."""
    return {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1)), "low": min(values), "high": max(values)}


def seeds(runs, found):
    """Groups of runs that differ in their seed alone: [{"runs": names, "seeds", "loss" and "token_accuracy": spread}]."""
    groups = {}
    for run, entry in zip(runs, found):
        shaping = {key: value for key, value in run["config"].items() if key != "train.seed" and key.split(".")[0] not in HOW_ONLY}
        if "train.seed" in run["config"]:
            groups.setdefault(json.dumps(shaping, sort_keys=True), []).append((run, entry))
    groups = [group for group in groups.values() if len({run["config"]["train.seed"] for run, _ in group}) > 1]
    return [{"runs": [run["name"] for run, _ in group], "seeds": [run["config"]["train.seed"] for run, _ in group],
             **{name: spread([entry[name] for _, entry in group]) for name in ("loss", "token_accuracy")}} for group in groups]


def compare(paths, at="common", names=()):
    """(the comparison of run folders as plain values, the runs as read), the first one the reference.

    names: what to call them; empty: their folders. Raises ValueError where they cannot be compared.
    """
    if len(paths) < 2:
        raise ValueError(f"give two runs or more, as in: python compare.py runs/a runs/b (got {' '.join(map(str, paths)) or 'none'})")
    resolved = [pathlib.Path(path).resolve() for path in paths]
    twice = [str(path) for path, place in zip(paths, resolved) if resolved.count(place) > 1]
    if twice:
        raise ValueError(f"{twice[0]}: given twice; a run differs in nothing from itself")
    runs = [read_run(path) for path in paths]
    check_comparable(runs)
    for run, name in zip(runs, names):
        run["name"] = name
    name_apart(runs) if not names else None
    steps = choose(runs, at)
    found, described, rows = differences(runs, steps), [], []
    for run, step, entry in zip(runs, steps, found):
        values, (sampled, samples) = curve(run), samples_at(run, step)
        described.append({"name": run["name"], "path": str(run["path"]), "state": run["state"], "last_step": run["step"],
                          "planned_steps": run["planned_steps"], "at_step": step, **entry, **costs(run), "sampled_step": sampled,
                          "samples": samples})
        for i in (i for i, line in enumerate(run["metrics"]) if "eval/loss" in line):
            rows.append({"run": run["name"], **{name: float(values[name][i]) for name in (*AXES, "eval_loss", "token_accuracy")}})
    count = int((runs[0]["evaluations"][steps[0]]["tokens"] > 0).sum())
    return {"at": at, "rows": count, "confidence": CONFIDENCE, "runs": described, "curves": rows, "settings": settings_that_differ(runs),
            "seeds": seeds(runs, found), "notes": [note for run in runs for note in run["notes"]]}, runs


# ------------------------------------------------------------------------------------------------------------- showing

def draw(runs, path):
    """One picture with four panels: evaluation loss, and the running median of the training loss, by step, samples, tokens and time."""
    import plots  # matplotlib, which nothing else here needs
    colors = [plots.TRAIN, plots.EVAL, "#3a8f5c", "#8e5bb5", "#b8860b", "#17808e", "#a3456f", "#555555"]
    with plots.sheet(path, 2, 2, 6.6) as panels:
        for axis, (name, label) in zip(panels, AXES.items()):
            drawn = []
            for number, run in enumerate(runs):
                values, color = curve(run), colors[number % len(colors)]
                trained, evaluated = (np.isfinite(values[tag]) & np.isfinite(values[name]) for tag in ("loss", "eval_loss"))
                if trained.sum() >= 20:
                    width = max(9, min(101, int(trained.sum()) // 20)) | 1
                    at = np.unique(np.linspace(0, trained.sum() - 1, min(int(trained.sum()), 400)).astype(int))
                    medians = plots.running_median(values["loss"][trained], width, at)
                    axis.plot(values[name][trained][at], medians, color=color, linewidth=1, alpha=0.5)
                    drawn += medians.tolist()
                if evaluated.any():
                    axis.plot(values[name][evaluated], values["eval_loss"][evaluated], "os^vDPX*"[number % 8] + "-", color=color,
                              linewidth=1.6, markersize=5, label=run["name"])
                    drawn += values["eval_loss"][evaluated].tolist()
            axis.set(xlabel=label, ylabel="loss (nats a token)" if name in ("step", "tokens") else "")
            axis.xaxis.set_major_locator(plots.MaxNLocator(nbins=5))
            axis.xaxis.set_major_formatter(plots.FuncFormatter(lambda x, _: f"{x / 1e6:g}M" if abs(x) >= 1e6 else f"{x:,.10g}"))
            if not drawn:
                plots.nothing(axis, "not in the record")
                continue
            low, high = plots.bounds(np.array(drawn))  # a run that exploded does not flatten the others
            margin = 0.08 * (high - low) or 0.1
            axis.set_ylim(low - margin, high + margin)
        panels[0].set_title("evaluation (marks), training (thin: running median)")


def signed(value, form):
    return f"{value:+{form}}" if value else f"{value:{form}}"


def difference(gap, scale, form):
    """A difference and its interval as two cells of a table."""
    if not gap:
        return ["–", "–"]
    value, low, high = (signed(scale * gap[name], form) for name in ("value", "low", "high"))
    return [value, f"{low} to {high}"]


def text_of(comparison, picture=""):
    """A comparison as Markdown whose tables line up, in 80 columns wherever settings are short. picture: its file, relative to the page."""
    runs, level = comparison["runs"], f"{CONFIDENCE:.0%} interval"
    name_of = lambda run: words.plain(run["name"])
    first = name_of(runs[0])
    parts = [f"# {' and '.join(map(name_of, runs))}", words.prose(where(comparison)),
             "\n".join(words.prose(sentence, "- ") for sentence in conclusions(comparison)),
             f"![loss by step, samples, tokens and time]({picture})" if picture else "", f"## Evaluation, and differences from {first}"]
    rows = [[name_of(run), f"{run['at_step']:,}", words.number(run["loss"], ".4f"), *difference(run["loss_difference"], 1, ".4f"),
             "–" if run["rows_better"] is None else f"{run['rows_better']:.0%}"] for run in runs]
    parts.append(words.table(["run", "step", "loss", "difference", level, "better"], rows))
    rows = [[name_of(run), words.number(run["perplexity"], ".3f"), f"{run['token_accuracy']:.2%}",
             *difference(run["accuracy_difference"], 100, ".2f")] for run in runs]
    parts.append(words.table(["run", "perplexity", "tokens right", "difference", level], rows))
    parts.append(words.prose("Better: the share of rows with a lower loss. Tokens right: the share of supervised tokens that the model "
                             "puts first; its differences are in points."))
    if comparison["seeds"]:
        rows = [[words.plain(", ".join(group["runs"])), f"{group['loss']['mean']:.4f}", f"{group['loss']['deviation']:.4f}",
                 f"{group['loss']['low']:.4f} to {group['loss']['high']:.4f}", f"{group['token_accuracy']['mean']:.2%}"]
                for group in comparison["seeds"]]
        parts += ["## Seeds", words.table(["runs", "mean loss", "deviation", "range", "tokens right"], rows)]

    milliseconds = lambda run: None if run["seconds_per_step"] is None else 1000 * run["seconds_per_step"]
    rows = [[name_of(run), words.number(run["tokens_per_second"], ",.0f"), words.number(milliseconds(run), ",.1f"),
             "–" if run["seconds"] is None else words.duration(run["seconds"]), words.number(run["peak_memory_gib"], ".2f"),
             run["memory_of"]] for run in runs]
    parts += ["## Price", words.table(["run", "tokens/s", "ms a step", "all steps", "peak GiB", "of the"], rows)]
    parts.append(words.prose(machines(runs)))

    amount = lambda value, form=",.0f": f"{value:{form}}" if math.isfinite(value) else "–"
    rows = [[words.plain(row["run"]), *(amount(row[name]) for name in ("step", "samples", "tokens")), amount(row["seconds"], ",.1f"),
             amount(row["eval_loss"], ".4f"), amount(row["token_accuracy"], ".2%")] for row in thinned(comparison["curves"])]
    parts += ["## Curves", words.table(["run", "step", "samples", "tokens", "seconds", "eval loss", "right"], rows)]

    shown = lambda key, value: "–" if value is None else words.code(words.short(value) if key in PATHS else value)
    rows = [[words.code(key), *(shown(key, value) for value in values)] for key, values in comparison["settings"].items()]
    parts += ["## Settings that differ", words.table(["key", *map(name_of, runs)], rows) if rows else "None."]
    parts += ["## Samples, greedy", samples_text(runs)]
    if comparison["notes"]:
        parts += ["## Left out", "\n".join(words.prose(words.plain(note), "- ") for note in comparison["notes"])]
    return words.paragraphs(*parts) + "\n"


def where(comparison):
    """On how many rows, and after which steps, the runs are compared."""
    runs, steps = comparison["runs"], {run["at_step"] for run in comparison["runs"]}
    why = {"common": "the last that all evaluated", "best": "each run's best on these very rows, which flatters it",
           "last": "each run's last"}
    after = f"after step {steps.pop():,}" if len(steps) == 1 else "each after its own step"
    return f"{len(runs)} runs on {comparison['rows']:,} evaluation rows, {after} ({why.get(comparison['at'], 'as asked')})."


def machines(runs):
    """What the runs ran on; a warning where it was not the same."""
    known = {run["machine"] for run in runs}
    if len(known) == 1:
        return words.plain(known.pop()) + "."
    listed = "; ".join(words.plain(f"{run['name']} on {run['machine']}") for run in runs)
    return f"The machines differ, so speed and memory do not compare the settings alone: {listed}."


def thinned(rows):
    """Of each run's evaluations at most 8, the first and the last among them."""
    kept = []
    for name in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == name]
        kept += [own[i] for i in sorted(set(np.linspace(0, len(own) - 1, min(8, len(own))).round().astype(int)))]
    return kept


def conclusions(comparison):
    """What the figures come to, as sentences."""
    runs, first = comparison["runs"], words.plain(comparison["runs"][0]["name"])
    for run in runs[1:]:
        gap, name = run["loss_difference"], words.plain(run["name"])
        if sense(gap) == "none":
            yield f"{name} and {first} cannot be compared: a loss is not finite."
        elif sense(gap) == "same":
            yield f"{name} is the same as {first} to the last bit: did the setting change anything?"
        else:
            told = {"lower": f"is better than {first} on these rows", "higher": f"is worse than {first} on these rows",
                    "unclear": f"cannot be told apart from {first}"}[sense(gap) if comparison["rows"] >= verdict.MIN_ROWS else "unclear"]
            value, low, high = (signed(gap[part], ".4f") for part in ("value", "low", "high"))
            yield f"{name} {told}: {value} nats a token, {CONFIDENCE:.0%} interval {low} to {high}."
    if comparison["rows"] < verdict.MIN_ROWS:
        yield (f"{words.count(comparison['rows'], 'row')}: too few to tell runs apart, and for intervals to be wide enough; it takes "
               f"{verdict.MIN_ROWS}.")
    for group in comparison["seeds"]:
        loss, names = group["loss"], words.plain(", ".join(group["runs"]))
        yield (f"{names} differ in their seed alone: loss {loss['mean']:.4f} ± {loss['deviation']:.4f} over "
               f"{len(set(group['seeds']))} seeds. Differences of that size are chance.")
    yield ("The intervals are about other rows like these, not about other seeds"
           + ("." if comparison["seeds"] else ", which were not tried: --ab train.seed=0,1,2 shows their spread."))
    for run in runs:
        if run["state"] == "unfinished":
            planned = f" of {run['planned_steps']:,}" if run["planned_steps"] else ""
            yield f"{words.plain(run['name'])} is not at its end: step {run['last_step']:,}{planned}."


def samples_text(runs):
    """What the runs wrote for the same prompts, up to three beside each other."""
    written = [{sample.get("prompt", ""): sample for sample in run["samples"]} for run in runs]
    shared = [prompt for prompt in written[0] if all(prompt in samples for samples in written)]
    if not shared:
        return "The records hold no samples for the same prompts." if any(written) else "No samples are in the records."
    told = lambda sample: (sample["text"].strip() or "(nothing)") + ("" if sample["stopped"] else " … (did not stop)")
    heading = lambda run: run["name"] + (f", step {run['sampled_step']:,}" if run["sampled_step"] != run["at_step"] else "")
    blocks = []
    for prompt in shared:
        columns = [(heading(run), told(samples[prompt])) for run, samples in zip(runs, written)]
        reference = written[0][prompt].get("reference")
        title = f"prompt: {prompt}" + (f"\nreference: {reference}" if reference else "")
        blocks += [words.side_by_side(title if i == 0 else "…", dict(columns[i:i + 3])) for i in range(0, len(columns), 3)]
    return "\n\n".join(blocks)


# ------------------------------------------------------------------------------------------------------ training both

def split(text):
    """The values of a list given as text, apart at commas that stand in no bracket."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def train_all(ab, path, overrides):
    """Train `path` once for each value of --ab KEY=VALUE,VALUE..., or take what is there: (run folders, names for them, exit code).

    All settings are checked before the first run begins. A run with the same settings is taken where it is finished, resumed
    where it is not; a folder that holds another run is refused.
    """
    key, equals, values = ab.partition("=")
    values = split(values)
    if not equals or "." not in key or len(values) < 2 or not all(values) or len(set(values)) < len(values):
        raise ValueError(f"--ab: must be KEY=VALUE,VALUE with two different values or more, as in --ab model.quant=nf4,int8, got {ab}")
    if key in dict(overrides):
        raise ValueError(f"--{key}: is given its values by --ab; leave it out")
    source = pathlib.Path(settings.find(path))
    plans, errors = [], []
    for value in values:
        chosen, suffix = [*overrides, (key, value)], re.sub(r"[^A-Za-z0-9_.+-]+", "-", pathlib.PurePath(value).name).strip("-")
        try:
            plans.append((pathlib.Path("runs") / f"{source.stem}-{suffix}", settings.located(settings.read(source, chosen)), chosen))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(dict.fromkeys(errors)))
    folders = [folder for folder, _, _ in plans]
    if len(set(folders)) < len(folders):
        raise ValueError(f"--ab: the values of {key} give the same folder ({folders[0]}); name files differently")
    if key == "train.seed" and not plans[0][1].data.eval:
        raise ValueError("--ab train.seed: without data.eval the evaluation rows are drawn by the seed, so the runs would not share them; "
                         "name evaluation rows with --data.eval=")
    states = [state_of(folder, config) for folder, config, _ in plans]
    for (folder, _, chosen), state in zip(plans, states):
        if state == "finished":
            print(f"{folder}: finished, with the same settings; taken as it is", flush=True)
            continue
        command = [sys.executable, str(settings.PROJECT / "train.py"), str(source), f"--out={folder}"]
        command += [f"--{name}={value}" for name, value in chosen]
        command += ["--resume"] * (state == "begun")
        print(f"{folder}: {'resuming' if state == 'begun' else 'training'} with {key}={dict(chosen)[key]}\n", flush=True)
        code = subprocess.run(command).returncode
        if code not in (0, 5):  # 5: finished, and failed criteria that are enforced; it can still be compared
            print(f"error: {folder}: train.py ended with exit code {code}; the same command goes on from here", file=sys.stderr)
            return folders, (), code if code > 0 else 128 - code
        print(flush=True)
    labels = [value if len(value) <= 12 else "…" + value[-11:] for value in values]
    return folders, labels if len(set(labels)) == len(labels) else (), 0


def state_of(folder, config):
    """What lies in a run folder for these settings: "none", "begun" or "finished". Raises ValueError where it is a run with others."""
    try:
        stored = settings.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")), origin=str(folder / "config.json"))
        metrics = record.read_metrics(folder)
    except FileNotFoundError:
        return "none"
    except ValueError as error:
        if not (folder / "metrics.jsonl").is_file():
            return "none"
        raise ValueError(f"{folder}: cannot tell which run lies there ({error}); remove or rename the folder") from None
    config = settings.settled(config, stored.model.compute_dtype)  # a run goes on in what it began in
    shaping = lambda c: {name: value for name, value in c.flat().items() if name.split(".")[0] not in HOW_ONLY}
    differ = [name for name, value in shaping(config).items() if shaping(stored)[name] != value]
    if differ:
        was, now = stored.flat(), config.flat()
        told = words.listed([f"{name} was {json.dumps(was[name])}, is {json.dumps(now[name])}" for name in differ], 4)
        raise ValueError(f"{folder}: holds a run with other settings ({told}); remove or rename the folder")
    if verdict.progress(stored.to_dict(), metrics)["state"] in ("finished", "stopped early"):
        return "finished"
    return "begun" if any(folder.glob("checkpoints/step-*")) else "none"


def strict(value):
    """The same with None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {str(name): strict(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv):
    labels = ()
    names, flags, overrides = settings.command_line(argv, {"ab": "", "at": "", "out": "", "json": False, "help": False})
    if flags["help"]:
        print(__doc__.strip())
        return 0
    if flags["ab"]:
        if len(names) != 1:
            raise ValueError("--ab: give one configuration, as in: python compare.py --ab model.quant=nf4,int8 configs/approach1.json "
                             f"(got {' '.join(names) or 'none'})")
        names, labels, code = train_all(flags["ab"], names[0], overrides)
        if code:
            return code
    elif overrides:
        raise ValueError(f"--{overrides[0][0]}: settings can be given with --ab only; finished runs have theirs")
    comparison, runs = compare(names, flags["at"] or "common", labels)
    folder = pathlib.Path(flags["out"]) if flags["out"] else runs[0]["path"].parent
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "compare.png"
    draw(runs, picture)
    files = [picture]
    if flags["out"]:
        files.append(folder / "compare.md")
        files[1].write_text(text_of(comparison, picture.name), encoding="utf-8")
    if flags["json"]:
        print(json.dumps(strict(comparison) | {"picture": str(picture)}, indent=1, allow_nan=False))
    else:
        print(text_of(comparison), *files, sep="\n")
    return 0


if __name__ == "__main__":
    settings.run_command(main)
