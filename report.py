"""A run as a page for someone who was not there: RUN/report.md, with its pictures in RUN/plots/.

    python report.py runs/approach1                          report.md and plots/ in that folder
    python report.py runs/approach1 --picture loss.png       only a picture of the loss

Every run makes one at its end. It is made of what the folder holds: metrics.jsonl, verdict.json, forecast.json,
config.json, environment.json, any of them absent, cut off or strange; the page says what it can, and names what it
cannot say. So it can be made of a run that is still going, was killed, or lies on another machine. First and last
figures are medians over several steps, since single steps are noise. Leaves out: judging (verdict.py and health.py,
whose words it repeats), drawing (plots.py), wording (words.py), and comparing runs (compare.py).
"""
import json
import math
import pathlib
import re

import numpy as np

import config as settings
import health
import logs
import record
from words import code, count, duration, listed, moved, number, paragraphs, plain, prose, short, side_by_side, table

PATHS = ("model.path", "data.train", "data.eval", "data.chat_template", "eval.prompts", "lora.init_from")
ALWAYS = ("model.path", "model.quant", "model.compute_dtype", "lora.r", "lora.alpha", "lora.dropout", "lora.targets", "data.train",
          "data.eval", "train.seed", "train.micro_batch_size", "train.accumulation", "train.max_steps", "schedule.learning_rate",
          "schedule.lr_min", "schedule.lr_kind", "schedule.lr_warmup_steps", "schedule.clip_norm")
FORECAST = {  # figures of a forecast: what each is, and how it is written; those that a run has too are in happened()
    "rows": ("training rows", "{:,.0f}"), "eval_rows": ("evaluation rows", "{:,.0f}"), "longest": ("tokens of the longest row", "{:,.0f}"),
    "coverage": ("passes over the training rows", "{:.3g}"), "samples": ("samples", "{:,.0f}"), "steps": ("steps", "{:,.0f}"),
    "steps_per_epoch": ("steps a pass takes", "{:,.0f}"),
    "tokens_seen": ("tokens", "{:,.0f}"), "supervised_tokens_seen": ("supervised tokens", "{:,.0f}"),
    "supervised_share": ("share of the tokens that are supervised", "{:.1%}"),
    "cut_share": ("share of the rows cut to data.max_length", "{:.1%}"), "lost_share": ("share of the rows lost to it", "{:.1%}"),
    "supervised_tokens_lost_share": ("share of the supervised tokens lost to it", "{:.1%}"),
    "skipped_share": ("share of the rows that could not be read", "{:.1%}"),
    "unsupervised_share": ("share of the rows without a supervised token", "{:.1%}"),
    "peak": ("peak learning rate", "{:.3g}"), "floor": ("floor under the learning rate", "{:.3g}"),
    "area": ("learning rates, summed over all steps", "{:.4g}"),
    "full_rate_steps": ("steps at the peak rate worth as much", "{:,.0f}"), "warmup_share": ("share of the steps that warm up", "{:.1%}"),
    "negligible_from": ("step from which on the rate is below 1 % of its peak", "{:,.0f}"),
    "trainable": ("trainable parameters", "{:,.0f}"), "peak_bytes": ("most memory in use, GiB", "{:.2f}"),
    "available_bytes": ("memory that was free for it, GiB", "{:.2f}"),
    "step_seconds": ("seconds a step", "{:.3g}"), "seconds": ("seconds in steps", "{:,.0f}")}
EVALUATION = {  # columns of the table of evaluations: tag, heading, how it is written, what it means
    "eval/loss": ("loss", ".4f", ""), "eval/perplexity": ("perplexity", "#.4g", ""),
    "eval/token_accuracy": ("accuracy", ".4f", "share of the supervised tokens that the model puts first"),
    "eval/stop_rate": ("stops", ".2f", "share of the samples that end by themselves"),
    "eval/repetition": ("repetition", ".3f", "share of a sample's four-token sequences that occur in it before"),
    "eval/overlap": ("overlap", ".3f", "with the reference; 1: the same tokens")}


# ------------------------------------------------------------------------------------------------------------- reading

def attempt(problems, what, make, *args):
    """make(*args). No record may fail a report: what goes wrong becomes a sentence in `problems`, and the answer is None."""
    try:
        return make(*args)
    except (ValueError, OSError) as error:
        problems.append(f"{what}: {error}")
    except Exception as error:
        problems.append(f"{what}: what the record holds could not be used ({type(error).__name__}: {error})")
    return None


def read_json(path):
    """The object in a JSON file, {} where there is none. ValueError for anything else."""
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ValueError(f"must be an object, got {json.dumps(tree)[:60]}")
    return tree


def entries(text):
    """The objects in a JSON list given as text."""
    values = json.loads(text)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"must be a list of objects, got {text[:60]}")
    return values


def read_run(run):
    """What a run's folder says: {"name", "metrics", "config" by "section.key", "environment", "verdict", "forecast",
    "alerts": [(step, alert)], "problems"}. What is not there is empty; what cannot be read is told in "problems".

    Raises ValueError if the folder is none of a run.
    """
    run = pathlib.Path(run)
    if not any((run / name).is_file() for name in ("metrics.jsonl", "config.json", "forecast.json", "verdict.json")):
        raise ValueError(f"{run}: holds no metrics.jsonl, so it is not the folder of a run that has begun; name one, as runs/approach1")
    found = {"name": run.resolve().name, "metrics": [], "config": {}, "alerts": [], "problems": []}
    problems, broken = found["problems"], []
    if (run / "metrics.jsonl").is_file():
        found["metrics"] = attempt(problems, "metrics.jsonl", record.read_metrics, run, broken) or []
        problems += broken[:3] + [f"metrics.jsonl: {len(broken) - 3:,} more lines like these"] * (len(broken) > 3)
    for name in ("config", "environment", "verdict", "forecast"):
        found[name] = attempt(problems, f"{name}.json", read_json, run / f"{name}.json") or {}
    sections = [(section, values) for section, values in found["config"].items() if isinstance(values, dict)]
    found["config"] = {f"{section}.{key}": value for section, values in sections for key, value in values.items()}
    for line in found["metrics"]:
        if "alerts" in line:
            raised = attempt(problems, f"alerts of step {line['step']}", entries, line["alerts"]) or []
            found["alerts"] += [(line["step"], alert) for alert in raised]
    return found


def is_number(value):
    return type(value) in (int, float)


def series(metrics, tag):
    """(steps, values) of the lines where `tag` is a number, NaN and infinities among them: int64 (n,) and float64 (n,)."""
    points = [(line["step"], line[tag]) for line in metrics if is_number(line.get(tag))]
    values = [math.copysign(math.inf, value) if abs(value) > 1e300 else value for _, value in points]  # a whole number can exceed any float
    return np.array([step for step, _ in points], np.int64), np.array(values, np.float64)


def median(values):
    """Median of the finite ones; NaN if there is none."""
    finite = np.asarray(values)[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def edge(values):
    """How many points at each end a first or last median is taken over: 25, or a quarter of a short run."""
    return min(25, len(values) // 4) or 1


def last_value(metrics, tag):
    """The last finite value of `tag`, or None."""
    values = series(metrics, tag)[1]
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def last_modules(metrics):
    """(step, text) of the last adapters/modules, or None."""
    told = [(line["step"], line["adapters/modules"]) for line in metrics if isinstance(line.get("adapters/modules"), str)]
    return told[-1] if told else None


def module_grid(text):
    """(delta ratio, effective rank, step ratio, layers, projections) of an adapters/modules text.

    The first three are float64 (projections, layers): NaN where there is no such module, the mean where there are several
    (experts). Modules without a layer number are in layer "–".
    """
    figures = {name: [*figures, None, None, None][:3] for name, figures in json.loads(text).items()}
    values = {name: [float(value) if is_number(value) else math.nan for value in row] for name, row in figures.items()}
    place = {name: ((re.search(r"\.(\d+)\.", name) or ["", "–"])[1], name.rpartition(".")[2]) for name in values}
    layers = sorted({layer for layer, _ in place.values()}, key=lambda layer: (not layer.isdigit(), int(layer) if layer.isdigit() else 0))
    projections = sorted({name for _, name in place.values()}, key=lambda name: (settings.PROJECTIONS + (name,)).index(name))
    cells = {}
    for name, where in place.items():
        cells.setdefault(where, []).append(values[name])
    grid = np.array([[np.mean(cells.get((layer, name), [[math.nan] * 3]), axis=0) for layer in layers] for name in projections])
    return *(grid[:, :, i] for i in range(3)), layers, projections


# -------------------------------------------------------------------------------------------------------- what happened

def title_of(found):
    """What was trained, in a few words."""
    config, last = found["config"], found["metrics"][-1]["step"] if found["metrics"] else 0
    model = pathlib.PurePath(str(config.get("model.path") or "model not recorded")).name
    return ", ".join(filter(None, [model, str(config.get("model.quant", "")), count(last, "step")]))


def summary(found):
    """The run in some sentences, each only where the record holds what it takes."""
    metrics, config = found["metrics"], found["config"]
    if not metrics:
        yield "The record holds no finished step: the run was stopped before its first, or has not come to it yet."
        return
    if config.get("model.path"):
        bits = {"none": "not quantised", "nf4": "in 4 bits (nf4)", "int8": "in 8 bits (int8)", "llm_int8": "in 8 bits (llm_int8)"}
        rank = f" of rank {config['lora.r']}" if "lora.r" in config else ""
        quant = bits.get(str(config.get("model.quant")), "its bits not recorded")
        yield f"{pathlib.PurePath(str(config['model.path'])).name}, {quant}, got LoRA adapters{rank}."
    yield from extent(found)
    (steps, losses), n = series(metrics, "train/loss"), edge(series(metrics, "train/loss")[1])
    if len(steps) < 8:
        yield f"{count(len(steps), 'training step').capitalize()} cannot show whether the loss falls."
    elif np.isfinite(losses).any():
        fall = health.fall(losses[np.isfinite(losses)].tolist())
        noise = ", which is within its noise" if fall and abs(fall[0] - fall[1]) < 2 * fall[2] else ""
        yield (f"The training loss {moved(median(losses[:n]), median(losses[-n:]))} nats a token{noise} "
               f"(medians of the first and last {n} recorded values).")
    yield from bad_steps(metrics)
    yield from evaluated(metrics)
    if found["alerts"]:
        names = list(dict.fromkeys(str(alert.get("name")) for _, alert in found["alerts"]))
        yield f"{count(len(found['alerts']), 'alert')} {'were' if len(found['alerts']) > 1 else 'was'} raised: {listed(names)}."
    seconds, peak = np.nansum(series(metrics, "train/seconds")[1]), series(metrics, "train/peak_memory_gib")[1]
    if seconds:
        in_use = f", with at most {np.nanmax(peak):.2f} GiB in use" if np.isfinite(peak).any() else ""
        yield f"Its steps took {duration(seconds)}{in_use}."


def extent(found):
    """How long the run was, and how much of what was planned."""
    metrics, config = found["metrics"], found["config"]
    planned, epochs, samples = config.get("train.max_steps"), config.get("train.epochs"), series(metrics, "train/samples")[1]
    last, epoch = metrics[-1]["step"], last_value(metrics, "train/epoch")
    seen = "" if not epoch else f", {epoch:.2f} passes over the training rows" if epoch >= 0.9995 else f", {epoch:.1%} of the training rows"
    consumed = f"consumed {samples.sum():,.0f} samples" if len(samples) == last > 0 else "are recorded"
    yield f"{count(last, 'step')} of training {consumed}{seen}."
    short_of = f"{planned:,} steps" if planned and is_number(planned) and last < planned else ""
    if not planned and epochs and is_number(epochs) and (epoch or 0) < 0.999 * epochs:
        short_of = f"{epochs:g} passes"
    if short_of:
        yield f"{short_of} were planned: the run goes on, was interrupted, or stopped early."
    if not planned and not epochs:
        yield "How many steps were planned is not recorded."
    recorded = len(series(metrics, "train/loss")[0])
    if recorded < last:
        yield f"The record holds the loss of {recorded:,} of these {count(last, 'step')}."


def bad_steps(metrics):
    """Steps that were not finite, not applied, or without any gradient."""
    (steps, losses), norms = series(metrics, "train/loss"), series(metrics, "train/grad_norm")[1]
    bad = steps[~np.isfinite(losses)]
    if len(bad):
        which = listed(bad.tolist())
        yield f"The training loss is not finite in {len(bad):,} of {count(len(steps), 'step')} ({which}); medians leave them out."
    skipped = int(np.nansum(series(metrics, "train/skipped")[1]))
    if skipped:
        yield f"{count(skipped, 'step')} {'were' if skipped > 1 else 'was'} not applied, so the weights did not move there."
    if (norms == 0).any():
        yield f"The gradient norm is exactly 0 in {(norms == 0).sum():,} of {count(len(norms), 'step')}: nothing was learnt there."


def evaluated(metrics):
    """What the evaluations say, against the untouched models too."""
    steps, losses = series(metrics, "eval/loss")
    if not len(losses):
        yield "There is no evaluation in the record, so it cannot say how the model does on rows that it was not trained on."
        return
    known = np.isfinite(losses)
    if not known.all():
        yield f"The evaluation loss is not finite after step {listed(steps[~known].tolist())}."
    steps, losses = steps[known], losses[known]
    if len(losses) == 1:
        yield f"There is one finite evaluation, after step {steps[0]:,}: loss {losses[0]:.4f}. It takes two to see a change."
    if len(losses) < 2:
        return
    accuracy = series(metrics, "eval/token_accuracy")[1]
    put_first = len(accuracy) > 1 and np.isfinite(accuracy[[0, -1]]).all()
    yield (f"On the evaluation rows, which it was not trained on, the loss {moved(losses[0], losses[-1])} "
           f"from step {steps[0]:,} to {steps[-1]:,}"
           + (f", and the share of tokens that the model puts first {moved(accuracy[0], accuracy[-1], '.1%')}." if put_first else "."))
    if losses.argmin() != len(losses) - 1 and losses.min() < losses[-1]:
        yield f"The lowest was {losses.min():.4f} after step {steps[losses.argmin()]:,}."
    untouched = last_value(metrics, "eval/unquantised_loss")
    if untouched is not None and steps[0] == 0:
        damage, beyond = losses[0] - untouched, untouched - losses[-1]
        repaired = f"{damage:.4f} nats of the fall undo what quantisation cost, and " if damage > 0 else ""
        yield (f"The untouched model, not quantised, has {untouched:.4f} there: "
               + (f"{repaired}{beyond:.4f} lie beyond the original model." if beyond > 0 else
                  f"the trained one is still {-beyond:.4f} above it."))


# ------------------------------------------------------------------------------------------------------------ sections

def picture(pictures, name, words):
    """The line that shows a picture, if it was drawn."""
    return f"![{words}](plots/{name}.png)" if name in pictures else ""


def verdict(found):
    """The outcome with its criteria and reasons."""
    given = found["verdict"]
    if not given:
        return "## No verdict\n\n" + prose("The run was not judged: there is no readable `verdict.json` in its folder.")
    judged, confidence, outcomes = given.get("judged"), given.get("confidence"), given.get("sets") or {}
    basis = ""
    if isinstance(judged, list) and judged:
        basis = f"The outcome is that of the {' and '.join(map(str, judged))} set{'s' * (len(judged) > 1)}."
    if given.get("rows") and is_number(given["rows"]) and is_number(confidence):
        basis += f" The intervals are of {confidence:.0%}, from {given['rows']:,} evaluation rows."
    parts, before = [f"## Verdict: {plain(given.get('outcome', 'not stated'))}", prose(plain(basis))], {}
    criteria = [entry for entry in given.get("criteria") or [] if isinstance(entry, dict)]
    for group in dict.fromkeys(str(entry.get("set")) for entry in criteria):
        rows, reasons = [], []
        for entry in [entry for entry in criteria if str(entry.get("set")) == group]:
            name, reason = plain(entry.get("name", "?")), str(entry.get("reason") or "no reason recorded")
            low, high, measured = entry.get("low"), entry.get("high"), number(entry.get("measured"))
            sign = "<" if entry.get("name") == "perplexity" else ">"  # the one criterion where less is better
            if is_number(low) and is_number(high) and low < high:
                measured += f" [{number(low, '.3g')}, {number(high, '.3g')}]"
            rows.append([name, plain(entry.get("outcome", "?")), sign + " " + number(entry.get("threshold")), measured])
            reasons.append(prose(f"**{name}**: " + (f"as for {before[reason]} above." if reason in before else plain(reason)), "- "))
            before.setdefault(reason, name)
        parts += [f"### {plain(group)}" + (f": {plain(outcomes[group])}" if group in outcomes else ""),
                  table(["criterion", "outcome", "needed", "measured"], rows), "\n".join(reasons)]
    notes = given.get("notes") if isinstance(given.get("notes"), list) else []
    return paragraphs(*parts, "" if criteria else "It holds no criteria.", *(prose("Note: " + plain(note)) for note in notes))


def told(entry, times=""):
    """A finding or an alert as an item of a list: evidence, cause and remedy below its name."""
    lines = [prose(f"**{plain(entry.get('name', 'unnamed'))}** ({plain(entry.get('severity', 'severity not recorded'))}){times}", "- ")]
    for label, key in (("Seen", "evidence"), ("Why it matters", "reason"), ("Likely cause", "cause"), ("Remedy", "remedy")):
        if entry.get(key):
            lines.append(prose(f"{label}: {plain(entry[key])}", "  - "))
    return "\n".join(lines)


def alerts(found):
    """Alerts by name, each with its steps and what was seen at the first of them."""
    if not found["alerts"]:
        watched = any(key.startswith("alerts.") for key in found["config"])
        return "No alert was raised." if watched else "None is in the record, and nothing says that any were watched for."
    by_name = {}
    for step, alert in found["alerts"]:
        by_name.setdefault(str(alert.get("name")), []).append((step, alert))
    again = lambda raised: f", and {len(raised) - 1:,} more up to step {raised[-1][0]:,}" if len(raised) > 1 else ""
    return "\n".join(told(raised[0][1], f", step {raised[0][0]:,}" + again(raised)) for raised in by_name.values())


def diagnosis(found):
    """What health.py reads off the finished record, less what an alert told already."""
    known = {str(alert.get("name")) for _, alert in found["alerts"]}
    steps = logs.to_record("metrics.jsonl", found["metrics"], **logs.of_settings(found["config"]))
    findings = [finding for finding in health.diagnose(steps) if finding.name not in known]
    grave = [told(vars(finding)) for finding in findings if finding.severity in ("fault", "warning")]
    notes = [f"{plain(finding.name)}: {plain(finding.evidence)}" for finding in findings if finding.severity == "note"]
    unjudged = [plain(finding.name) for finding in findings if finding.severity == "unjudged"]
    nothing = "No fault and no reason for a warning was found" + (" beyond the alerts above." if known else ".")
    return paragraphs("\n".join(grave) or nothing, prose(f"Also seen, and no reason to worry: {' '.join(notes)}") if notes else "",
                      prose(f"Not judged, for lack of data: {', '.join(unjudged)}.") if unjudged else "")


def loss(found, pictures):
    return picture(pictures, "loss", "training and evaluation loss by step")


def evaluations(found, pictures):
    """The evaluations as a picture and a table: some twelve, the first, best and last among them."""
    metrics = found["metrics"]
    lines = [line for line in metrics if is_number(line.get("eval/loss"))]
    if not lines:
        return ""
    finite = [i for i in range(len(lines)) if math.isfinite(lines[i]["eval/loss"])]
    best = min(finite, key=lambda i: lines[i]["eval/loss"]) if len(finite) > 1 else -1
    kept = sorted({*np.linspace(0, len(lines) - 1, min(len(lines), 12)).round().astype(int).tolist(), max(best, 0)})
    columns = {tag: column for tag, column in EVALUATION.items() if any(tag in line for line in lines)}
    row = lambda label, values: [label, *(number(values.get(tag), form) for tag, (_, form, _) in columns.items())]
    rows = [row(f"{lines[i]['step']:,}" + " (best)" * (i == best), lines[i]) for i in kept]
    untouched = {f"eval/{name}": last_value(metrics, f"eval/unquantised_{name}") for name in ("loss", "token_accuracy")}
    if untouched["eval/loss"] is not None:
        rows.insert(0, row("unquantised", untouched | {"eval/perplexity": math.exp(min(untouched["eval/loss"], 700))}))
    meaning = "; ".join([f"{name}: {words}" for name, _, words in columns.values() if words]
                        + ["unquantised: the untouched model in 16 or 32 bits"] * (len(rows) > len(kept)))
    left_out = f"{len(lines) - len(kept)} of {len(lines)} evaluations are not listed. " if len(kept) < len(lines) else ""
    return paragraphs(picture(pictures, "evaluation", "perplexity, token accuracy and samples by step"),
                      table(["step", *(name for name, _, _ in columns.values())], rows),
                      prose(left_out + (meaning[:1].upper() + meaning[1:] + "." if meaning else "")))


def samples(found):
    """What the model wrote for the same prompts at the first and last sampling, side by side with the references."""
    written = []
    for line in [line for line in found["metrics"] if "eval/samples" in line]:
        read = attempt(found["problems"], f"samples of step {line['step']}", entries, line["eval/samples"])
        written += [(line["step"], {str(sample.get("prompt")): sample for sample in read})] if read else []
    if not written:
        return ""
    (first, before), (last, after) = written[0], written[-1]
    cut = lambda text: str(text).strip()[:800]
    text = lambda sample: (cut(sample.get("text", "")) or "(nothing)") + ("" if sample.get("stopped", True) else " … (did not stop)")
    blocks = []
    for prompt, sample in before.items():
        columns = {f"before (step {first:,})" if first == 0 < last else f"after step {first:,}": text(sample)}
        columns |= {f"after step {last:,}": text(after[prompt]) if prompt in after else "(not sampled)"} if last != first else {}
        columns |= {"reference": cut(sample["reference"])} if sample.get("reference") else {}
        blocks.append(side_by_side("prompt: " + cut(prompt), columns))
    stops = [sum(bool(sample.get("stopped")) for sample in part.values()) for part in (before, after)]
    itself = "itself" if stops[0] == 1 else "themselves"
    head = (f"Greedy. Of {count(len(before), 'sample')}, {stops[0]} ended by {itself} after step {first:,}"
            + (f" and {stops[1]} after step {last:,}." if first != last else "; they were taken once."))
    return paragraphs(prose(head), *blocks)


def training(found, pictures):
    """First and last figures of the steps, and the learning rate in words."""
    rows, window = [], ""
    for tag, what, form in (("train/loss", "loss, nats a token", ".4f"), ("train/grad_norm", "gradient norm before clipping", ".3f")):
        values = series(found["metrics"], tag)[1]
        if len(values):
            n = edge(values)
            first, last = median(values[:n]), median(values[-n:])
            rows.append([what, number(first, form), number(last, form), number(last - first, "+" + form) if len(values) > 1 else "–"])
            window = f"First and last are medians of {n} values." if n > 1 else "First and last are single values."
    if not rows:
        return ""
    steps, rates = series(found["metrics"], "train/learning_rate")
    if len(rates) and len(rates) == steps[-1] and np.isfinite(rates).all():  # with steps missing, the sum would be another
        window += (f" The learning rate has its peak of {rates.max():.3g} at step {steps[rates.argmax()]:,} and ends at {rates[-1]:.3g}; "
                   f"over all steps it adds up to {rates.sum():.4g}.")
    return paragraphs(picture(pictures, "steps", "learning rate and gradient norm by step"),
                      table(["what", "first", "last", "change"], rows), prose(window))


def coverage(found, pictures):
    """How much of the training rows was seen."""
    seen = last_value(found["metrics"], "train/epoch")
    if not seen:
        return ""
    times = f" at least {int(seen + 1e-3)} times" if seen >= 1.9995 else ""
    return paragraphs(picture(pictures, "coverage", "share of the training rows seen"),
                      prose(f"The run saw {seen:.1%} of its training rows; what was never seen taught nothing." if seen < 0.9995 else
                            f"The run passed {seen:.2f} times over its training rows, so that every row was seen{times}."))


def noise(found, pictures):
    """The gradient noise scale, with what it means (McCandlish et al. 2018, section 2.2)."""
    scale = series(found["metrics"], "train/noise_scale")[1]
    usable = scale[np.isfinite(scale) & (scale > 0)]
    if not len(usable):
        return ""
    late, batch = median(usable[len(usable) // 2:]), last_value(found["metrics"], "train/samples")
    told = ("The gradient noise scale is the number of samples a step at which noise and signal in the gradient weigh the same: well below "
            "it every doubling of the step saves nearly half of the steps, well above it nearly none (McCandlish et al. 2018). Its median "
            f"over the second half of the run is {late:,.3g} samples.")
    if batch:
        told += f" A step has {batch:,.0f}: " + (
            "most of its gradient is noise, and larger steps would pay." if late > 2 * batch else
            "smaller steps would learn as much from fewer samples." if late < 0.5 * batch else "about right.")
    if len(usable) < len(scale):
        told += f" {len(scale) - len(usable):,} of {len(scale):,} estimates were not positive and are left out."
    return paragraphs(picture(pictures, "noise", "gradient noise scale and batch size by step"), prose(told))


def adapters(found, pictures):
    """How far the adapters moved the weights."""
    last = last_modules(found["metrics"])
    if not last:
        return ""
    ratio, rank, step_ratio, layers, projections = module_grid(last[1])
    name = lambda place: f"{projections[place[0]]} of layer {layers[place[1]]}"
    lines = []
    if np.isfinite(ratio).any():
        most, least = (np.unravel_index(pick(ratio), ratio.shape) for pick in (np.nanargmax, np.nanargmin))
        lines.append(f"After step {last[0]:,} the adapters' update ΔW has {np.nanmean(ratio):.2%} of the size of its weight W "
                     f"(Frobenius norms, mean over modules): most in {name(most)} ({ratio[most]:.2%}), "
                     f"least in {name(least)} ({ratio[least]:.2%}).")
        still = np.argwhere(ratio == 0)
        if len(still):
            lines.append(f"{count(len(still), 'module')} never moved, among them {name(still[0])}: look at the gradients there.")
    if np.isfinite(rank).any():
        available = found["config"].get("lora.r")
        lines.append(f"The effective rank, the number of directions that an update really uses, is {np.nanmean(rank):.1f} on average"
                     + (f", of {available} that the adapters could use." if is_number(available) else "."))
    if np.isfinite(step_ratio).any():
        size = np.nanmean(step_ratio)
        lines.append(f"The update of a weight is {size:.2g} of the mean distance between neighbouring values of its quantised form: "
                     + ("merged back into it, much would be rounded away." if size < 0.5 else "it would survive there too."))
    return paragraphs(picture(pictures, "adapters", "size and effective rank of every module's update"), prose(plain(" ".join(lines))))


def proof(found):
    """Measured against predicted change of the loss along the gradient."""
    rows = []
    for line in [line for line in found["metrics"] if is_number(line.get("proof/ratio"))][:12]:
        ratio, tolerance = line["proof/ratio"], line.get("proof/tolerance")
        told = str(line.get("proof/outcome", "")).startswith
        if told("open"):
            agrees = "cannot be told"
        elif not is_number(tolerance):
            agrees = "–"
        else:
            agrees = "yes" if abs(ratio - 1) <= tolerance and not told(("wrong", "stale")) else "**no**"
        rows.append([f"{line['step']:,}", number(ratio, ".4f"), number(tolerance, ".4f") if is_number(tolerance) else "–", agrees])
    return paragraphs(prose("Forward passes on either side along the gradient measure how the loss changes, and gradients on the way "
                            "predict it: the ratio must be 1 within the tolerance of the precision, or the gradient is not that of this "
                            "loss."),
                      table(["after step", "measured / predicted", "tolerance", "agrees"], rows)) if rows else ""


def happened(metrics):
    """What the record holds of the figures that a forecast tells, by the forecast's names."""
    total = lambda tag: np.nansum(series(metrics, tag)[1])
    steps, rates = series(metrics, "train/learning_rate")
    figures = {"coverage": last_value(metrics, "train/epoch"), "steps": metrics[-1]["step"] if metrics else 0,
               "samples": total("train/samples"),
               "tokens_seen": total("train/tokens"), "supervised_tokens_seen": total("train/supervised_tokens"),
               "seconds": total("train/seconds"), "peak_bytes": max(series(metrics, "train/peak_memory_gib")[1], default=None)}
    if len(rates) and len(rates) == steps[-1]:  # with steps missing, the sum would be another, and a line holds the seconds of several
        figures |= {"peak": rates.max(), "area": rates.sum(), "step_seconds": median(series(metrics, "train/seconds")[1])}
    return {name: float(value) for name, value in figures.items() if value}


def forecast(found):
    """What was said of the run before it began, beside what came."""
    given, rows, came = found["forecast"], [], happened(found["metrics"])
    if not given:
        return ""
    known = lambda entry: ", acknowledged in the configuration" if entry.get("name") in (given.get("acknowledged") or []) else ""
    entries = [entry | {"reason": entry.get("reason") or entry.get("cause"), "cause": ""} for entry in given.get("findings") or []]
    findings = [told(entry, known(entry)) for entry in entries]
    figures = given.get("figures") or {}
    others = [name for name in figures if name not in FORECAST and name not in ("epochs", "memory_total")]  # told by other names
    for name in [*[name for name in FORECAST if name in figures], *others]:
        (what, form), value = FORECAST.get(name, (name.replace("_", " "), "{:.4g}")), figures[name]
        if is_number(value) and (value or name == "floor"):
            said = form.format(value / 2**30 if name.endswith("_bytes") else value)
            rows.append([plain(what), said, form.format(came[name]) if name in came else ""])
    return paragraphs("\n".join(findings) or "Nothing was found against the run.",
                      table(["figure", "forecast", "the run"], rows) if rows else "")


def resources(found, pictures):
    """Time, tokens and memory."""
    metrics = found["metrics"]
    total = lambda tag: np.nansum(series(metrics, tag)[1])
    peak, speed = series(metrics, "train/peak_memory_gib")[1], series(metrics, "train/tokens_per_second")[1]
    rows = [["time in steps", f"{total('train/seconds'):,.1f} s"],
            ["time in evaluations, without samples", f"{total('eval/seconds'):,.1f} s"],
            ["tokens trained on", f"{total('train/tokens'):,.0f}, of them supervised {total('train/supervised_tokens'):,.0f}"]]
    if np.isfinite(speed).any():
        rows.append(["tokens a second, median step", f"{median(speed):,.0f}"])
    if np.isfinite(peak).any():
        where = "the GPU" if found["environment"].get("devices") else "the process (no GPU)"
        rows.append(["most memory in use", f"{np.nanmax(peak):.2f} GiB of {where}"])
    return paragraphs(picture(pictures, "resources", "tokens a second and peak memory by step"), table(["what", "value"], rows))


def settings_table(found):
    """The settings that say what the run was, and every other one that is not at its default."""
    config, defaults = found["config"], settings.Config().flat()
    projections = lambda value: ", ".join(name.removesuffix("_proj") for name in value)
    written = lambda key, value: short(value) if key in PATHS else projections(value) if key == "lora.targets" else value
    rows = [[f"`{key}`", code(written(key, value))] for key, value in config.items() if key in ALWAYS or defaults.get(key) != value]
    return table(["key", "value"], rows) if rows else ""


def machine(found):
    """What the run ran on."""
    environment = found["environment"]
    if not environment:
        return ""
    gpus = [f"{gpu.get('name')} ({gpu.get('memory_gib')} GiB)" for gpu in environment.get("devices") or []]
    packages = [f"{name} {version}" for name, version in (environment.get("packages") or {}).items() if version]
    cuda = [f"CUDA {environment['cuda']}"] if environment.get("cuda") else []
    processes = [f"{environment['ranks']} ranks"] if is_number(environment.get("ranks")) and environment["ranks"] > 1 else []
    hardware = [*processes, *gpus, str(environment.get("cpu", "CPU not recorded")), f"{environment.get('cores', '?')} cores"]
    return "\n".join([prose(f"Machine: {plain(', '.join(hardware))}.", "- "),
                      prose(f"Software: {plain(', '.join(['Python ' + str(environment.get('python', '?')), *cuda, *packages]))}.", "- ")])


# ---------------------------------------------------------------------------------------------------------------- page

def draw(found, folder):
    """Draw what the record holds into `folder`; the names of the pictures. One that cannot be drawn is told in the record's problems."""
    import plots  # matplotlib is slow to import, and a page without pictures is better than none
    metrics, config, drawn, problems = found["metrics"], found["config"], [], found["problems"]
    of = lambda tag: series(metrics, tag)
    has = lambda tag: len(of(tag)[0]) > 0
    untouched, accuracy = last_value(metrics, "eval/unquantised_loss"), last_value(metrics, "eval/unquantised_token_accuracy")
    measures = {"end by themselves": "eval/stop_rate", "repetition": "eval/repetition", "overlap with reference": "eval/overlap"}
    (noise_steps, scale), modules, seen = of("train/noise_scale"), last_modules(metrics), last_value(metrics, "train/epoch")
    usable = np.isfinite(scale) & (scale > 0)
    planned = config.get("train.max_steps") or config.get("train.epochs")
    if seen and config.get("train.max_steps") and is_number(planned):
        planned *= seen / metrics[-1]["step"]  # passes
    gpus = found["environment"].get("devices") or []
    capacity = gpus[0].get("memory_gib") if len(gpus) == 1 else None
    wanted = {  # name of the picture: what plots' function of that name is given, or nothing
        "loss": metrics and (title_of(found), of("train/loss"), of("eval/loss"), untouched, sorted({step for step, _ in found["alerts"]})),
        "evaluation": has("eval/loss") and (of("eval/perplexity"), of("eval/token_accuracy"),
                                            {what: of(tag) for what, tag in measures.items() if has(tag)},
                                            (math.exp(min(untouched, 700)), accuracy) if None not in (untouched, accuracy) else None),
        "steps": has("train/learning_rate") and (of("train/learning_rate"), of("train/grad_norm"), of("train/clip_threshold")),
        "coverage": seen and (seen, planned if is_number(planned) else None),
        "noise": usable.any() and ((noise_steps[usable], scale[usable]), of("train/samples")),
        "adapters": modules and attempt(problems, "adapters/modules", lambda: (*module_grid(modules[1]), modules[0])),
        "resources": has("train/tokens_per_second") and (of("train/tokens_per_second"), of("train/peak_memory_gib"), capacity,
                                                         "GPU" if gpus else "process")}
    folder.mkdir(exist_ok=True)
    for name, given in wanted.items():
        (folder / f"{name}.png").unlink(missing_ok=True)  # one of an earlier record
        if given:
            known = len(problems)
            attempt(problems, f"picture of {name}", getattr(plots, name), folder / f"{name}.png", *given)
            drawn += [name] if len(problems) == known else []
    return drawn


SECTIONS = {"Alerts": alerts, "Diagnosis of the record": diagnosis, "Loss": loss, "Evaluations": evaluations, "Generation samples": samples,
            "Learning rate and gradient norm": training, "Coverage": coverage, "Gradient noise scale": noise, "Adapters": adapters,
            "Gradient proof": proof, "Forecast": forecast, "Time and memory": resources, "Settings": settings_table, "Environment": machine}
ILLUSTRATED = (loss, evaluations, training, coverage, noise, adapters, resources)


def page(found, pictures):
    """The report as Markdown. A section that the record holds nothing for is named at the end."""
    problems, missing = found["problems"], []
    parts = [f"# {plain(found['name'])}", attempt(problems, "title", lambda: plain(title_of(found)) + "."),
             attempt(problems, "verdict", verdict, found),
             "## What happened", attempt(problems, "what happened", lambda: prose(plain(" ".join(summary(found)))))]
    for heading, make in SECTIONS.items():
        text = attempt(problems, heading, make, found, *[pictures] * (make in ILLUSTRATED))
        missing += [heading.lower()] if text == "" else []
        parts += [f"## {heading}", text] if text else []
    gaps = [prose(f"Not in the record: {', '.join(missing)}.", "- ")] * bool(missing)
    gaps += [prose(plain(problem), "- ") for problem in dict.fromkeys(problems)]
    parts += ["## What this report cannot say", "\n".join(gaps)] if gaps else []
    return paragraphs(*parts, f"Made of the run's record by `python report.py {found['name']}`.") + "\n"


def write(run):
    """Write RUN/report.md and the pictures in RUN/plots/. Returns their paths, report.md first.

    Fails for no record, however strange: what cannot be said is named on the page. Raises ValueError if `run` is not a run's
    folder, and OSError if the page cannot be written there.
    """
    run, found = pathlib.Path(run), read_run(run)
    pictures = attempt(found["problems"], "pictures", draw, found, run / "plots") or []
    (run / "report.md").write_text(page(found, pictures), encoding="utf-8", errors="replace")
    return [run / "report.md", *(run / "plots" / f"{name}.png" for name in pictures)]


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip())
        return 0
    words, flags, overrides = settings.command_line(argv, {"picture": ""})
    if len(words) != 1 or overrides:
        raise ValueError("give one run folder, as in: python report.py runs/approach1 [--picture FILE.png]")
    if not flags["picture"]:
        print("\n".join(map(str, write(words[0]))))
        return 0
    import plots
    found = read_run(words[0])
    losses, evals = series(found["metrics"], "train/loss"), series(found["metrics"], "eval/loss")
    plots.loss(pathlib.Path(flags["picture"]), title_of(found), losses, evals, last_value(found["metrics"], "eval/unquantised_loss"))
    print(flags["picture"])
    return 0


if __name__ == "__main__":
    settings.run_command(main)
