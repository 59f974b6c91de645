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


# --------------------------------------------------------------------------------------------------------------- runs

def read_run(run):
    """A run folder's record: {"path", "name", "config": flat, "state", "metrics", "environment", "evaluations": {step: arrays},
    "metadata": {step: texts}, "notes"}. Raises ValueError naming what is not there and the command that makes it."""
    run = pathlib.Path(run)
    metrics, trees = record.read_metrics(run), {}
    for name in ("config", "environment"):
        path = run / f"{name}.json"
        try:
            trees[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error}); the run wrote it, restore it or remove it") from None
        if not isinstance(trees[name], dict):
            raise ValueError(f"{path}: must be an object; the run wrote it, restore it or remove it")
    tree, raw = {name: values for name, values in trees["config"].items() if isinstance(values, dict)}, record.read_evaluations(run)
    kept, notes = verdict.same_evaluations(metrics, raw)
    recorded, last = {line["step"] for line in metrics if "eval/loss" in line}, metrics[-1]["step"] if metrics else 0
    by_hand = {step: arrays for step, (arrays, _) in raw.items() if type(step) is int and step not in recorded and step <= last}
    evaluations = {step: arrays for step, arrays in sorted({**{key: value for key, value in kept.items() if type(key) is int}, **by_hand}.items())}
    if not any(evaluations):  # none, or one before training alone
        there = f"only figures of step 0, before training, are in {run / 'evaluations'}" if evaluations else f"{run / 'evaluations'} holds no figures by row"
        raise ValueError(f"{run}: {there}{'; ' * bool(notes)}{' '.join(notes).rstrip('.')}; make them with: python eval.py --ckpt {run} --keep")
    return {"path": run, "name": run.resolve().name, "config": {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()},
            **verdict.progress(tree, metrics), "metrics": metrics, "environment": trees["environment"], "evaluations": evaluations, "metadata": {step: raw[step][1] for step in evaluations},
            "notes": [f"{run.resolve().name}: {note}" for note in notes]}


def name_apart(runs, longest=12):
    """Give every run a short name of its own: its folder's without what all begin with, the parent's before it where two are alike."""
    names = [run["name"] for run in runs]
    if len(set(names)) < len(names):
        names = ["/".join(run["path"].resolve().parts[-2:]) for run in runs]
    shared = re.match(r".*[-_/]|", os.path.commonprefix(names)).group()
    names = [name[len(shared):] or name for name in names]
    short = [name if len(name) <= longest else "…" + name[1 - longest:] for name in names]
    for run, name in zip(runs, short if len(set(short)) == len(short) else [f"{i}-{name}"[:longest] for i, name in enumerate(short, start=1)]):
        run["name"] = name


def check_comparable(runs):
    """Raises ValueError with the reason where two runs were not evaluated on the same rows by the same tokenizer."""
    first = runs[0]
    about = lambda run: (run["metadata"][max(run["metadata"])], run["evaluations"][max(run["evaluations"])])
    for run in runs[1:]:
        (meta_a, rows_a), (meta_b, rows_b) = about(first), about(run)
        whose = f"{first['path']} and {run['path']} cannot be compared: "
        stated = lambda key: ", ".join(f"{key} {json.dumps(which['config'][key])}" if key in which["config"] else f"{key} not recorded" for which in (first, run))
        for what in ("tokenizer", "rows_digest"):
            unknown = [str(which["path"]) for which, meta in ((first, meta_a), (run, meta_b)) if not meta.get(what)]
            if unknown:
                raise ValueError(f"{whose}the figures of {' and '.join(unknown)} do not say of which {'tokenizer' if what == 'tokenizer' else 'rows'} they are; make them anew with: "
                                 + "; ".join(f"python eval.py --ckpt {path} --keep" for path in unknown))
        if meta_a["tokenizer"] != meta_b["tokenizer"]:
            raise ValueError(f"{whose}their tokenizers differ ({stated('model.path')}), so a token of one is not a token of the other, and losses a token have different units")
        if meta_a["rows_digest"] != meta_b["rows_digest"]:
            raise ValueError(f"{whose}they were evaluated on other rows, or on the same ones under another template or length ({stated('data.eval')}; {stated('data.max_length')}); "
                             "train both with the same --data.eval, --data.chat_template and --data.max_length" + (", and name data.eval: rows held out of the training rows depend on the seed"
                                                                                                                   if not first["config"].get("data.eval", True) else ""))
        if len(rows_a["tokens"]) != len(rows_b["tokens"]):
            raise ValueError(f"{whose}one was evaluated on {len(rows_a['tokens']):,} rows, the other on {len(rows_b['tokens']):,} ({stated('eval.max_rows')}); train both with the same --eval.max_rows")
        if not np.array_equal(rows_a["tokens"], rows_b["tokens"]):
            raise ValueError(f"{whose}their rows have other numbers of supervised tokens though the digests agree; make the figures anew with python eval.py --ckpt RUN --keep")


def choose(runs, at):
    """The step to compare each run at: a list. at: common, best, last, or a step as text. Raises ValueError with the steps there are."""
    has = lambda run: f"{run['path']} has " + ", ".join(f"{step:,}" for step in run["evaluations"])
    if at == "last":
        return [max(run["evaluations"]) for run in runs]
    if at == "best":
        loss = lambda arrays: arrays["nll"].sum() / arrays["tokens"].sum()
        return [min((step for step in run["evaluations"] if step), key=lambda step: (not math.isfinite(loss(run["evaluations"][step])), loss(run["evaluations"][step]))) for run in runs]
    if at != "common" and not at.isdigit():
        raise ValueError(f"--at: must be common, best, last or a step, got {at}")
    shared = sorted(set.intersection(*(set(run["evaluations"]) for run in runs)))
    if at == "common":
        if not any(shared):
            raise ValueError(f"the runs share no evaluated step after training: {'; '.join(map(has, runs))}. Compare them --at=last or --at=best, or evaluate both after the same step")
        return [shared[-1]] * len(runs)
    if int(at) not in shared:
        lacking = [run for run in runs if int(at) not in run["evaluations"]]
        make = [f"python eval.py --ckpt {run['path']}@step-{int(at):06d} --keep" for run in lacking if (run["path"] / "checkpoints" / f"step-{int(at):06d}").is_dir()]
        raise ValueError(f"--at: {'; '.join(map(has, lacking))}, not {int(at):,}" + (". Make it with: " + "; ".join(make) if make else ""))
    return [int(at)] * len(runs)


# ----------------------------------------------------------------------------------------------------------- comparing

def differences(runs, steps):
    """What each run came to at its step, and against the first, paired row by row: a list of {"loss", "token_accuracy", "perplexity",
    "low", "high": the loss's interval, "loss_difference", "accuracy_difference": {"value", "low", "high"} or None, "rows_better"}."""
    arrays = [run["evaluations"][step] for run, step in zip(runs, steps)]
    counted = arrays[0]["tokens"] > 0
    if not counted.any():
        raise ValueError(f"{runs[0]['path']}: no evaluation row holds a supervised token, so there is nothing to compare")
    tokens = arrays[0]["tokens"][counted]
    table = np.stack([tokens] + [a[name][counted] for a in arrays for name in ("nll", "correct")], axis=1)
    finite = [bool(np.isfinite(a["nll"][counted]).all()) for a in arrays]
    ratios = verdict.with_draws(np.where(np.isfinite(table), table, 0.0), lambda sums: sums[:, 1:] / sums[:, :1])
    found = []
    for i, a in enumerate(arrays):
        loss, accuracy = ratios[:, 2 * i], ratios[:, 2 * i + 1]
        low, high = verdict.interval(loss, CONFIDENCE) if finite[i] else (None, None)
        entry = {"loss": float(loss[0]) if finite[i] else math.nan, "low": low, "high": high, "token_accuracy": float(accuracy[0]),
                 "perplexity": math.exp(min(700.0, float(loss[0]))) if finite[i] else math.nan, "loss_difference": None, "accuracy_difference": None, "rows_better": None}
        if i and finite[i] and finite[0]:
            for name, gap in (("loss_difference", loss - ratios[:, 0]), ("accuracy_difference", accuracy - ratios[:, 1])):
                low, high = verdict.interval(gap, CONFIDENCE)
                entry[name] = {"value": float(gap[0]), "low": low, "high": high}
            better, worse = (a["nll"] < arrays[0]["nll"])[counted].mean(), (a["nll"] > arrays[0]["nll"])[counted].mean()
            entry |= {"rows_better": float(better), "rows_worse": float(worse)}
        found.append(entry)
    return found


def verdict_on(gap):
    """A loss difference in one word: lower, higher, or unclear where its interval holds 0; same where not a bit differs."""
    if gap is None:
        return "not comparable"
    if gap["low"] == gap["high"] == 0:
        return "same"
    return "lower" if gap["high"] < 0 else "higher" if gap["low"] > 0 else "unclear"


def curve(run):
    """Where a run stood at each recorded step: {"step", "samples", "tokens", "seconds": summed up to it, "loss": of training}, float64
    arrays, a NaN where the record lacks it; and {"eval": [(index, eval loss, token accuracy)]}."""
    tag = lambda line, name: float(line[name]) if type(line.get(name)) in (int, float) else math.nan
    lines, summed = run["metrics"], {"step": np.array([line["step"] for line in run["metrics"]], float), "loss": np.array([tag(line, "train/loss") for line in run["metrics"]])}
    trained = np.array([line["step"] > 0 for line in lines], bool)
    for name in ("samples", "tokens", "seconds"):
        values = np.array([tag(line, f"train/{name}") for line in lines])
        summed[name] = np.cumsum(np.where(trained, values, 0.0))
    passed, samples = np.array([tag(line, "train/epoch") for line in lines]), run["config"].get("train.micro_batch_size", 0) * run["config"].get("train.accumulation", 0)
    if np.isnan(summed["samples"]).all() and samples and not run["config"].get("schedule.batch_points") and np.isfinite(passed).any():  # older records counted epochs alone
        summed["samples"] = summed["step"] * samples
    summed["eval"] = [(i, tag(line, "eval/loss"), tag(line, "eval/token_accuracy")) for i, line in enumerate(lines) if "eval/loss" in line]
    return summed


def costs(run):
    """{"tokens_per_second": median of the steps, "seconds_per_step": median, "seconds": of all steps, "peak_memory_gib", "memory_of", "machine"}, None where not recorded."""
    column = lambda tag: np.array([line[tag] for line in run["metrics"] if type(line.get(tag)) in (int, float) and math.isfinite(line[tag])])
    of = lambda tag, what: float(what(column(tag))) if len(column(tag)) else None
    devices = run["environment"].get("devices") or []
    packages = run["environment"].get("packages") or {}
    return {"tokens_per_second": of("train/tokens_per_second", np.median), "seconds_per_step": of("train/seconds", np.median), "seconds": of("train/seconds", np.sum),
            "peak_memory_gib": of("train/peak_memory_gib", np.max), "memory_of": "GPU" if devices else "process",
            "machine": ", ".join([str(device.get("name", "GPU")) for device in devices] or [str(run["environment"].get("cpu", "machine not recorded"))])
                       + (f", torch {packages['torch']}" if packages.get("torch") else "")}


def samples_at(run, step):
    """(step, samples) of the last sampling up to `step`, or (None, [])."""
    written = [(line["step"], samples) for line in run["metrics"] if line["step"] <= step for samples in [verdict.samples_of(line)] if samples]
    return written[-1] if written else (None, [])


def settings_that_differ(runs):
    """{"section.key": [value of each run, None where it has none]} of what is not the same in all."""
    keys = dict.fromkeys(key for run in runs for key in run["config"])
    by_key = {key: [run["config"].get(key) for run in runs] for key in keys}
    return {key: values for key, values in by_key.items() if len(set(map(json.dumps, values))) > 1}


def spreads(runs, found):
    """Runs that differ in their seed alone, with what they came to: [{"runs", "seeds", "loss", "token_accuracy": {"mean", "deviation", "low", "high"}}]."""
    groups = {}
    for run, entry in zip(runs, found):
        if "train.seed" in run["config"]:
            same = json.dumps({key: value for key, value in run["config"].items() if key != "train.seed" and key.split(".")[0] not in HOW_ONLY}, sort_keys=True)
            groups.setdefault(same, []).append((run, entry))
    described = []
    for group in groups.values():
        seeds = [run["config"]["train.seed"] for run, _ in group]
        if len(set(seeds)) > 1:
            spread = lambda values: {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1)), "low": min(values), "high": max(values)}
            described.append({"runs": [run["name"] for run, _ in group], "seeds": seeds, "loss": spread([entry["loss"] for _, entry in group]),
                              "token_accuracy": spread([entry["token_accuracy"] for _, entry in group])})
    return described


def compare(paths, at="common"):
    """The comparison of run folders, the first one the reference, as a dictionary of plain values. Raises ValueError where they are not comparable."""
    if len(paths) < 2:
        raise ValueError(f"give two runs or more, as in: python compare.py runs/a runs/b (got {' '.join(map(str, paths)) or 'none'})")
    resolved = [pathlib.Path(path).resolve() for path in paths]
    twice = [str(path) for path, place in zip(paths, resolved) if resolved.count(place) > 1]
    if twice:
        raise ValueError(f"{twice[0]}: given twice; a run differs in nothing from itself")
    runs = [read_run(path) for path in paths]
    check_comparable(runs)
    name_apart(runs)
    steps = choose(runs, at)
    found = differences(runs, steps)
    curves = [curve(run) for run in runs]
    rows = [{"run": run["name"], **{name: float(values[name][i]) for name in AXES}, "eval_loss": loss, "token_accuracy": accuracy}
            for run, values in zip(runs, curves) for i, loss, accuracy in values["eval"]]
    described = [{"name": run["name"], "path": str(run["path"]), "state": run["state"], "last_step": run["step"], "planned_steps": run["planned_steps"], "at_step": step, **entry, **costs(run),
                  "training_loss": training_loss(values), "sampled_step": samples_at(run, step)[0], "samples": samples_at(run, step)[1]} for run, step, entry, values in zip(runs, steps, found, curves)]
    return {"at": at, "rows": int((runs[0]["evaluations"][steps[0]]["tokens"] > 0).sum()), "confidence": CONFIDENCE, "runs": described, "curves": rows,
            "settings": settings_that_differ(runs), "seeds": spreads(runs, found), "notes": [note for run in runs for note in run["notes"]]}, runs


def training_loss(values):
    """Median training loss of a run's last steps (verdict.windows), or None."""
    losses = values["loss"][np.isfinite(values["loss"])]
    return float(np.median(losses[-max(1, verdict.windows(len(losses))[1]):])) if len(losses) else None


# ------------------------------------------------------------------------------------------------------------- showing

def draw(runs, path):
    """One picture with four panels: evaluation loss, and the median of the training loss, by step, samples, tokens and time."""
    import plots  # matplotlib, which nothing else here needs
    with plots.sheet(path, 2, 2, 6.6) as panels:
        colors = [plots.TRAIN, plots.EVAL, "#3a8f5c", "#8e5bb5", "#b8860b", "#17808e", "#a3456f", "#555555"]
        for axis, (name, label) in zip(panels, AXES.items()):
            bulk = []
            for number, run in enumerate(runs):
                values, color = curve(run), colors[number % len(colors)]
                x, trained = values[name], np.isfinite(values["loss"]) & np.isfinite(values[name])
                points = [(x[i], loss) for i, loss, _ in values["eval"] if math.isfinite(x[i]) and math.isfinite(loss)]
                if trained.sum() >= 20:
                    width = max(9, min(101, int(trained.sum()) // 20)) | 1
                    at = np.unique(np.linspace(0, trained.sum() - 1, min(int(trained.sum()), 400)).astype(int))
                    medians = plots.running_median(values["loss"][trained], width, at)
                    axis.plot(x[trained][at], medians, color=color, linewidth=1, alpha=0.5)
                    bulk += medians.tolist()
                if points:
                    axis.plot(*zip(*points), "os^vDPX*"[number % 8] + "-", color=color, linewidth=1.6, markersize=5, label=run["name"])
                    bulk += [loss for _, loss in points]
            axis.set(xlabel=label, ylabel="loss (nats a token)" if name in ("step", "tokens") else "")
            axis.xaxis.set_major_locator(plots.MaxNLocator(nbins=5))
            axis.xaxis.set_major_formatter(plots.FuncFormatter(lambda value, _: f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value:,.10g}"))
            if not bulk:
                plots.nothing(axis, "not in the record")
                continue
            low, high = plots.bounds(np.array(bulk))  # a run that exploded does not flatten the others
            margin = 0.08 * (high - low) or 0.1
            axis.set_ylim(low - margin, high + margin)
        panels[0].set_title("evaluation (marks), training (thin: running median)")


def signed(value, form):
    return f"{value:+{form}}" if value else f"{value:{form}}"


def text_of(comparison, picture=""):
    """A comparison as Markdown whose tables line up, 80 columns wide wherever names allow."""
    runs, first = comparison["runs"], comparison["runs"][0]["name"]
    same = len({run["at_step"] for run in runs}) == 1
    chosen = {"common": "the last that all evaluated", "best": "each run's best by these very rows, which flatters it", "last": "each run's last"}.get(comparison["at"], "as asked")
    head = f"{len(runs)} runs on {comparison['rows']:,} evaluation rows, " + (f"after step {runs[0]['at_step']:,} ({chosen})." if same else f"at different steps ({chosen}).")
    parts = [f"# {' and '.join(words.plain(run['name']) for run in runs)}", words.prose(head)]
    parts.append("\n".join(words.prose(sentence, "- ") for sentence in conclusions(comparison)))
    if picture:
        parts.append(f"![loss by step, samples, tokens and time]({picture})")

    cell = lambda gap, scale, form: [signed(scale * gap["value"], form), f"{signed(scale * gap['low'], form)} to {signed(scale * gap['high'], form)}"] if gap else ["–", "–"]
    parts.append(f"## Evaluation, and differences from {words.plain(first)}\n\n" + words.table(["run", "step", "loss", "difference", f"{CONFIDENCE:.0%} interval", "better"], [
        [words.plain(run["name"]), f"{run['at_step']:,}", words.number(run["loss"], ".4f"), *cell(run["loss_difference"], 1, ".4f"), "–" if run["rows_better"] is None else f"{run['rows_better']:.0%}"]
        for run in runs]))
    parts.append(words.prose("Better: the share of rows with a lower loss. Tokens right: the share of supervised tokens that the model puts first; its differences are in points."))
    parts.append(words.table(["run", "perplexity", "tokens right", "difference", f"{CONFIDENCE:.0%} interval"], [
        [words.plain(run["name"]), words.number(run["perplexity"], ".3f"), f"{100 * run['token_accuracy']:.2f}%", *cell(run["accuracy_difference"], 100, ".2f")] for run in runs]))
    if comparison["seeds"]:
        parts.append("## Seeds\n\n" + words.table(["runs", "loss: mean", "deviation", "range", "tokens right"], [
            [words.plain(", ".join(group["runs"])), f"{group['loss']['mean']:.4f}", f"{group['loss']['deviation']:.4f}", f"{group['loss']['low']:.4f} to {group['loss']['high']:.4f}",
             f"{100 * group['token_accuracy']['mean']:.2f}%"] for group in comparison["seeds"]]))
    parts.append("## Price\n\n" + words.table(["run", "tokens/s", "ms a step", "all steps", "peak GiB", "of the"], [
        [words.plain(run["name"]), words.number(run["tokens_per_second"], ",.0f"), words.number(run["seconds_per_step"] and 1000 * run["seconds_per_step"], ",.1f"),
         "–" if run["seconds"] is None else words.duration(run["seconds"]), words.number(run["peak_memory_gib"], ".2f"), run["memory_of"]] for run in runs]))
    machines = {run["machine"] for run in runs}
    parts.append(words.prose(words.plain(machines.pop()) + "." if len(machines) == 1 else "The machines differ, so speeds and memory do not compare the settings alone: "
                             + "; ".join(f"{words.plain(run['name'])} on {words.plain(run['machine'])}" for run in runs) + "."))
    amount = lambda value, form=",.0f": "–" if not math.isfinite(value) else f"{value:{form}}"
    parts.append("## Curves\n\n" + words.table(["run", "step", "samples", "tokens", "seconds", "eval loss", "right"], [
        [words.plain(row["run"]), amount(row["step"]), amount(row["samples"]), amount(row["tokens"]), amount(row["seconds"], ",.1f"), amount(row["eval_loss"], ".4f"), amount(100 * row["token_accuracy"], ".2f") + "%"]
        for row in thinned(comparison["curves"])]))
    parts.append("## Settings that differ\n\n" + (words.table(["key", *(words.plain(run["name"]) for run in runs)], [
        [words.code(key), *("–" if value is None else words.code(words.short(value) if key in PATHS else value) for value in values)] for key, values in comparison["settings"].items()])
        if comparison["settings"] else "None."))
    parts.append("## Samples, greedy\n\n" + samples_text(runs))
    if comparison["notes"]:
        parts.append("## Left out\n\n" + "\n".join(words.prose(words.plain(note), "- ") for note in comparison["notes"]))
    return "\n\n".join(parts) + "\n"


PATHS = ("model.path", "data.train", "data.eval", "data.chat_template", "eval.prompts", "lora.init_from")


def thinned(rows):
    """Of each run's evaluations at most 8, the first and the last among them."""
    kept = []
    for name in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == name]
        kept += [own[i] for i in sorted(set(np.linspace(0, len(own) - 1, min(8, len(own))).round().astype(int)))]
    return kept


def conclusions(comparison):
    """What the figures come to, as sentences."""
    runs, seeds = comparison["runs"], comparison["seeds"]
    first = runs[0]
    alike = {name for group in seeds for name in group["runs"]} if any(first["name"] in group["runs"] for group in seeds) else set()
    for run in runs[1:]:
        gap, name = run["loss_difference"], words.plain(run["name"])
        told = {"lower": "is better", "higher": "is worse", "unclear": "cannot be told apart", "same": "is the same to the last bit", "not comparable": "has no finite loss to compare, or the first has none"}[verdict_on(gap)]
        if gap is None or verdict_on(gap) == "same":
            yield f"{name} {told}{'' if gap is None else ': did the setting change anything?'}"
            continue
        figure = f"{signed(gap['value'], '.4f')} nats a token, {CONFIDENCE:.0%} interval {signed(gap['low'], '.4f')} to {signed(gap['high'], '.4f')}"
        against = f"from {words.plain(first['name'])}" if verdict_on(gap) == "unclear" else f"than {words.plain(first['name'])} on these rows"
        yield f"{name} {told} {against}: {figure}."
    for group in seeds:
        loss = group["loss"]
        yield f"{words.plain(', '.join(group['runs']))} differ in their seed alone: loss {loss['mean']:.4f} ± {loss['deviation']:.4f} over {len(set(group['seeds']))} seeds. Differences of that size are chance."
    if not seeds:
        yield "The intervals are about other rows like these, not about other seeds, which were not tried: --ab train.seed=0,1,2 shows their spread."
    elif not set(run["name"] for run in runs) <= alike:
        yield "The intervals are about other rows like these; beside them stands the spread of the seeds."
    for run in runs:
        if run["state"] == "unfinished":
            yield f"{words.plain(run['name'])} is not at its end: step {run['last_step']:,}" + (f" of {run['planned_steps']:,}." if run["planned_steps"] else ".")


def samples_text(runs):
    """What the runs wrote for the same prompts, beside each other; below each other where there are more than three."""
    prompts = dict.fromkeys(sample.get("prompt", "") for sample in runs[0]["samples"])
    by_run = [{sample.get("prompt", ""): sample for sample in run["samples"]} for run in runs]
    shared = [prompt for prompt in prompts if all(prompt in written for written in by_run)]
    if not shared:
        return "The records hold no samples for the same prompts." if any(by_run) else "No samples are in the records."
    blocks, ended = [], lambda sample: (sample["text"].strip() or "(nothing)") + ("" if sample["stopped"] else " … (did not stop)")
    for prompt in shared:
        columns = {run["name"] + (f", step {run['sampled_step']:,}" if run["sampled_step"] != run["at_step"] else ""): ended(written[prompt]) for run, written in zip(runs, by_run)}
        reference = by_run[0][prompt].get("reference") or ""
        title = f"prompt: {prompt}" + (f"\nreference: {reference}" if reference else "")
        blocks += [words.side_by_side(title, columns)] if len(columns) <= 3 else [words.side_by_side(title if i == 0 else "…", dict(list(columns.items())[i:i + 3])) for i in range(0, len(columns), 3)]
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
    """Train `path` once for each value of --ab KEY=VALUE,VALUE..., or take what is there: (run folders, exit code).

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
        chosen = [*overrides, (key, value)]
        try:
            plans.append((pathlib.Path("runs") / f"{source.stem}-{re.sub(r'[^A-Za-z0-9_.+-]+', '-', pathlib.PurePath(value).name).strip('-')}", settings.located(settings.read(source, chosen)), chosen))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(dict.fromkeys(errors)))
    folders = [folder for folder, _, _ in plans]
    if len(set(folders)) < len(folders):
        raise ValueError(f"--ab: the values of {key} give the same folder ({folders[0]}); name files differently")
    if key == "train.seed" and not plans[0][1].data.eval:
        raise ValueError("--ab train.seed: without data.eval the evaluation rows are drawn by the seed, so the runs would not share them; name evaluation rows with --data.eval=")
    states = [state_of(folder, config) for folder, config, _ in plans]
    for (folder, _, chosen), state in zip(plans, states):
        if state == "finished":
            print(f"{folder}: finished, with the same settings; taken as it is", flush=True)
            continue
        command = [sys.executable, str(settings.PROJECT / "train.py"), str(source), f"--out={folder}", *(f"--{name}={value}" for name, value in chosen), *["--resume"] * (state == "begun")]
        print(f"{folder}: {'resuming' if state == 'begun' else 'training'} with {key}={dict(chosen)[key]}\n", flush=True)
        code = subprocess.run(command).returncode
        if code not in (0, 5):  # 5: finished, and failed criteria that are enforced; it can still be compared
            print(f"error: {folder}: train.py ended with exit code {code}; the runs before it are kept, and the same command goes on from here", file=sys.stderr)
            return folders, code if code > 0 else 128 - code
        print(flush=True)
    return folders, 0


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
    shaping = lambda c: {name: value for name, value in c.flat().items() if name.split(".")[0] not in HOW_ONLY}
    differ = [name for name, value in shaping(config).items() if shaping(stored)[name] != value]
    if differ:
        told = ", ".join(f"{name} was {json.dumps(stored.flat()[name])}, is {json.dumps(config.flat()[name])}" for name in differ[:4]) + (", …" if len(differ) > 4 else "")
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
    names, flags, overrides = settings.command_line(argv, {"ab": "", "at": "", "out": "", "json": False, "help": False})
    if flags["help"]:
        print(__doc__.strip())
        return 0
    if flags["ab"]:
        if len(names) != 1:
            raise ValueError(f"--ab: give one configuration, as in: python compare.py --ab model.quant=nf4,int8 configs/approach1.json (got {' '.join(names) or 'none'})")
        names, code = train_all(flags["ab"], names[0], overrides)
        if code:
            return code
    elif overrides:
        raise ValueError(f"--{overrides[0][0]}: settings can be given with --ab only; finished runs have theirs")
    comparison, runs = compare(names, flags["at"] or "common")
    folder = pathlib.Path(flags["out"]) if flags["out"] else runs[0]["path"].parent
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "compare.png"
    draw(runs, picture)
    text = text_of(comparison, "compare.png" if flags["out"] else "")
    if flags["out"]:
        (folder / "compare.md").write_text(text, encoding="utf-8")
    if flags["json"]:
        print(json.dumps(strict(comparison) | {"picture": str(picture)}, indent=1, allow_nan=False))
    else:
        print((text_of(comparison) if flags["out"] else text) + "\n" + "\n".join([str(picture)] + [str(folder / "compare.md")] * bool(flags["out"])))
    return 0


if __name__ == "__main__":
    settings.run_command(main)
