"""Will a run learn, and did it: a forecast from its settings, a diagnosis from
its record alone.

    python health.py trainer_state.json --rows=45000
    python health.py runs/approach1          a run folder or metrics.jsonl of ours
    python health.py logs                    a folder of TensorBoard events

trainer_state.json is what transformers' Trainer, TRL, Unsloth, axolotl and
LLaMA-Factory leave behind. --rows=N (rows of the training set) and --clip=X
(gradient norm clipped at) help where the record does not hold them.

Every reader makes the same plain Record, and every rule reads nothing else. A
rule yields findings: a fault (this run cannot have learnt, or its figures cannot
be trusted), a warning (it learnt less than it could), a note, or "unjudged" with
what was lacking. Statistics are medians and median absolute deviations, so that
a few wild steps decide nothing. Leaves out: the model (a record shows that
gradients were dead, not which module cut them), and comparing runs. Exit codes:
0 when the record could be read, whatever was found in it; 2 when it could not.
"""
import json
import math
import pathlib
import statistics
import textwrap
from dataclasses import dataclass, field

import config
import schedule

SEVERITIES = ("fault", "warning", "note", "unjudged")
NAMES = {  # what a value is called in a record of ours, of TensorBoard and of the Trainer -> here
    "train/loss": "loss", "train/grad_norm": "grad_norm", "train/learning_rate": "rate", "train/epoch": "epoch", "train/samples": "samples",
    "train/clip_threshold": "clip", "eval/loss": "eval_loss", "eval/adapter_digest": "digest", "adapters/lora_A_norm": "lora_A norm",
    "adapters/lora_B_norm": "lora_B norm", "loss": "loss", "grad_norm": "grad_norm", "learning_rate": "rate", "epoch": "epoch", "eval_loss": "eval_loss"}
NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
NEGLIGIBLE = 0.01   # of the peak rate: a hundred such steps move a weight as far as one at the peak
SMALL_AREA = 0.02   # Adam moves a weight by about the rate a step, so the sum of the rates is how far B, which starts at 0, can travel;
#                     QLoRA's own recipe (2e-4, 1,875 steps) sums to 0.375, and a twentieth of that is little
SPIKE = 8           # robust standard deviations of the logarithm: out of reach of ordinary noise over thousands of steps
CUT = ("Train ten steps on ten rows and look at the gradients. With gradient checkpointing set gradient_checkpointing_kwargs={'use_reentrant': False}, "
       "or call model.enable_input_require_grads(). Then check that the adapters have requires_grad=True, that the optimizer holds them, and that "
       "labels are not all -100. After the first backward pass every lora_B gradient must be non-zero.")


@dataclass
class Finding:
    severity: str                                 # one of SEVERITIES
    name: str                                     # what it is, in a few words
    evidence: str                                 # what the record says, in numbers; unjudged: what it lacks
    cause: str = ""
    remedy: str = ""
    figures: dict = field(default_factory=dict)   # the numbers, for programs


@dataclass
class Record:
    kind: str                                     # what was read, in words
    steps: list                                   # [{"step": int, name: float or text, …}], steps rising, every other key optional
    planned_steps: int = 0                        # 0: unknown
    rows: int = 0                                 # training rows; 0: unknown
    clip: float = 0.0                             # gradient norm clipped at, where the steps do not hold it; 0: unknown

    def series(self, name, finite=True):
        """[(step, value)] of the steps that hold `name`; only finite numbers unless told otherwise."""
        return [(line["step"], line[name]) for line in self.steps if name in line and (not finite or math.isfinite(line[name]))]


# ------------------------------------------------------------------------------------------------------------- readers

def to_record(kind, lines, **known):
    """A Record from dictionaries with `step` and names of any of the trainers; those of one step are merged, the later value stays."""
    steps = {}
    for line in lines:
        merged = steps.setdefault(line["step"], {"step": line["step"]})
        for name, value in line.items():
            value = NONFINITE.get(value, value) if isinstance(value, str) else value
            name = NAMES.get(name, "eval_loss" if name.startswith("eval_") and name.endswith("_loss") and "eval_loss" not in line else "")
            if name and type(value) in ((str,) if name == "digest" else (int, float)):
                merged[name] = math.inf if type(value) is int and abs(value) > 1e300 else value
    return Record(kind, [steps[step] for step in sorted(steps)], **known)


def read(path):
    """The Record at `path`: trainer_state.json, metrics.jsonl, or a folder that holds one of them, checkpoint-* or TensorBoard events.

    ValueError says what could not be read and where. A record without steps is a record.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        checkpoints = sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda file: (len(file.parent.name), file.parent.name))  # 500 before 1000
        files = [path / "metrics.jsonl", path / "trainer_state.json", *reversed(checkpoints)]
        found = [file for file in files if file.is_file()]
        if not found and any(path.glob("events.out.tfevents.*")):
            return read_events(path)
        if not found:
            raise ValueError(f"{path}: holds neither metrics.jsonl nor trainer_state.json nor TensorBoard events; name the file or folder that does")
        path = found[0]
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); name a trainer_state.json, a metrics.jsonl or a run folder") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not text; name a trainer_state.json, a metrics.jsonl, or the folder of TensorBoard events") from None
    if path.suffix != ".jsonl":
        state = parse(text, path)
        if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
            raise ValueError(f"{path}: has no log_history list, so it is not a trainer_state.json; the Trainer writes one into every checkpoint-* folder")
        planned = state.get("max_steps")
        return to_record("transformers' trainer_state.json", checked(state["log_history"], f"{path}, log_history entry"), planned_steps=planned if type(planned) is int else 0)
    lines = text.split("\n")
    whole = lines[:-1]  # a kill leaves an unfinished last line; one that only lacks its newline is read
    if lines[-1].rstrip().endswith("}"):
        whole = lines
    return to_record("metrics.jsonl", checked([parse(line, f"{path}, line {number}") for number, line in enumerate(whole, start=1) if line.strip()], f"{path}, entry"))


def parse(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); was the file cut off or edited?") from None


def checked(lines, where):
    """`lines`, if every one is an object with a whole number >= 0 as step."""
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 0:
            raise ValueError(f"{where} {number}: must be an object with a whole number as step, got {json.dumps(line)[:60]}")
    return lines


def read_events(folder):
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow, and the only need for a package
    except ImportError:
        raise ValueError(f"{folder}: TensorBoard events need the package tensorboard; install it, or name a trainer_state.json or metrics.jsonl") from None
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag in NAMES]
    return to_record("TensorBoard events", [{"step": event.step, tag: event.value} for tag in tags for event in events.Scalars(tag)])


# -------------------------------------------------------------------------------------------------------------- figures

def fall(values):
    """(first, last, error): medians of the first and last tenth (3 values at least) and the standard error of their difference; None below 6 values.

    The noise comes from differences of neighbours, which a trend hardly touches: their MAD x 1.4826 / sqrt 2 is a step's
    standard deviation, and a median of n values has 1.2533 / sqrt n of it.
    """
    if len(values) < 6:
        return None
    tenth = max(3, len(values) // 10)
    noise = 1.4826 * statistics.median(abs(b - a) for a, b in zip(values, values[1:])) / math.sqrt(2)
    return statistics.median(values[:tenth]), statistics.median(values[-tenth:]), 1.2533 * noise * math.sqrt(2 / tenth)


def learned(record):
    """True where the loss, in training or on evaluation rows, fell by far more than its noise: then something did learn."""
    train, evals = fall([value for _, value in record.series("loss")]), [value for _, value in record.series("eval_loss")]
    return bool(train and train[0] - train[1] > max(5 * train[2], 0.02 * abs(train[0]))) or len(evals) > 1 and evals[0] - evals[-1] > 0.02 * abs(evals[0])


def dead_from(record):
    """The first step from which on every recorded gradient norm is exactly 0.0; None if the last one is not."""
    norms = record.series("grad_norm", finite=False)
    alive = max((i for i, (_, norm) in enumerate(norms) if norm != 0), default=-1)
    return norms[alive + 1][0] if alive + 1 < len(norms) else None


def rate_figures(points):
    """Of [(step, rate)], straight lines between them, the first rate before them: peak, area (sum over all steps), full_rate_steps
    (area / peak), and negligible_from, the step from which on every rate is below 1 % of the peak (0: never)."""
    peak, pairs = max(rate for _, rate in points), list(zip(points, points[1:]))
    area = points[0][0] * points[0][1] + math.fsum((b - a) * (start + end) / 2 + (end - start) / 2 for (a, start), (b, end) in pairs)  # steps a+1 to b
    falls = [a + 1 + int((b - a) * (start - NEGLIGIBLE * peak) / (start - end)) for (a, start), (b, end) in pairs if start >= NEGLIGIBLE * peak > end]
    return {"peak": peak, "area": area, "full_rate_steps": area / peak if peak else 0.0, "negligible_from": falls[-1] if falls and points[-1][1] < NEGLIGIBLE * peak else 0}


def coverage(record):
    """Passes over the training rows (0.089: it saw 8.9 % of them), or None: from the recorded epoch, or else from samples and --rows."""
    epochs, samples = record.series("epoch"), record.series("samples")
    if samples and record.rows and len(samples) == samples[-1][0]:  # every step is there
        return sum(count for _, count in samples) / record.rows
    return epochs[-1][1] if epochs else None


def listed(steps):
    """Up to four step numbers in words."""
    return f"step{'s' * (len(steps) > 1)} {', '.join(f'{step:,}' for step in steps[:4])}" + (f" and {len(steps) - 4:,} more" if len(steps) > 4 else "")


# ---------------------------------------------------------------------------------------------------------------- rules

def dead_gradients(record):
    """A norm of exactly 0.0 is not a small one: no rate, batch or rounding makes it; the loss does not reach the adapters, or nothing is supervised.

    If the loss fell all the same, the recorded norm is what is wrong. Zeros between healthy steps are windows without a target.
    """
    norms = record.series("grad_norm", finite=False)
    if not norms:
        yield Finding("unjudged", "gradients", "the record holds no gradient norm")
        return
    zeros, start = [step for step, norm in norms if norm == 0], dead_from(record)
    evidence = f"The gradient norm is exactly 0.0 in {len(zeros):,} of {len(norms):,} recorded steps"
    if len(zeros) == len(norms) and learned(record):
        yield Finding("warning", "gradient norm wrongly recorded", evidence + ", yet the loss fell by far more than its noise.", "Something learnt, so gradients existed; the figure was taken "
                      "after they were cleared, or by a backend that does not report it.", "Compute the norm yourself between the backward pass and the optimizer step.")
    elif len(zeros) == len(norms) or start is not None and len(norms) > 1 and norms[-2][1] == 0:
        since = "from the first to the last" if len(zeros) == len(norms) else f"in all from step {start:,} on"
        yield Finding("fault", "dead gradients", f"{evidence}, {since}.", "The path from the loss to the adapters is cut (gradient checkpointing over frozen embeddings does it), nothing "
                      "trainable lies on it, or no token is supervised. Another learning rate, batch size or number of bits would not have cured it: an update made from a zero gradient "
                      "is zero at any of them.", CUT, {"zero_norms": len(zeros), "norms": len(norms), "from_step": start})
    elif zeros:
        yield Finding("warning", "steps without gradient", f"{evidence}, at {listed(zeros)}, and not around them.", "Those steps held no supervised token: answers cut off by the maximum length, or "
                      "labels masked throughout.", "Count supervised tokens row by row; raise the maximum length or drop the rows without any.")


def nonfinite(record):
    """A loss that is not a number ends learning. A norm may be: fp16 finds its loss scale by a few overflowing steps, which are skipped."""
    for name, what in (("loss", "training loss"), ("eval_loss", "evaluation loss"), ("grad_norm", "gradient norm"), ("rate", "learning rate")):
        points = record.series(name, finite=False)
        bad = [step for step, value in points if not math.isfinite(value)]
        search = name == "grad_norm" and len(bad) <= max(3, 0.1 * len(points)) and bad and bad[-1] < points[-1][0]
        if bad:
            yield Finding("note" if search else "fault", f"non-finite {what}", f"{len(bad):,} of {len(points):,} are NaN or infinite, at {listed(bad)}.",
                          "A few such norms are how fp16 finds its loss scale; those steps are skipped." if search else "Overflow in fp16, a rate that is far too high, or a row without a supervised token (0/0).",
                          "Nothing, if it stays at a few." if search else "Compute in bf16, lower the rate, clip at 1.0, and look at the rows of the first bad step.")


def zero_loss(record):
    """A language model's loss is never exactly 0.0, not even on rows known by heart; negative losses (of RL) have another meaning."""
    losses = record.series("loss")
    zeros = [step for step, loss in losses if loss == 0]
    if len(zeros) > len(losses) / 2 and all(loss >= 0 for _, loss in losses):
        yield Finding("fault", "loss of zero", f"The training loss is exactly 0.0 in {len(zeros):,} of {len(losses):,} recorded steps.", "No token is supervised (labels all -100, a response "
                      "template that is not in the text), or the loss overflowed and was replaced.", "Print one row's labels; the answer and its end-of-turn token must not be -100.")


def frozen_evaluation(record):
    """Weights that moved change an evaluation in some digit. The same loss twice to five digits, or three times, or the same digest, is no chance."""
    evals, digests = record.series("eval_loss"), [(line["step"], line["digest"]) for line in record.steps if "digest" in line]
    for points, what in ((evals, "loss"), (digests, "adapter digest")):
        if len(points) < 2:
            yield from () if what != "loss" else [Finding("unjudged", "evaluation frozen", f"{len(points) or 'no'} evaluation{'s' * (not points)} recorded, and it takes two")]
            continue
        begin, best = 0, (0, 0)
        for i in range(1, len(points) + 1):
            if i == len(points) or points[i][1] != points[begin][1]:
                begin, best = i, max(best, (i - begin, -begin))
        same = points[-best[1]:][:best[0]]
        if len(same) < 2:
            continue
        shown = f"{same[0][1]:.4f}" if what == "loss" and round(same[0][1], 4) == same[0][1] else same[0][1]
        rates = record.series("rate")
        between = [rate for step, rate in rates if same[0][0] < step <= same[-1][0]]
        idle = between and max(between) < NEGLIGIBLE * max(rate for _, rate in rates)
        certain = what != "loss" or len(same) > 2 or len(str(same[0][1]).partition(".")[2]) > 4
        moved = what == "loss" and len({digest for step, digest in digests if same[0][0] <= step <= same[-1][0]}) > 1
        cause = ("The learning rate was next to nothing in between." if idle else "The adapters did change, so the evaluation looks at other weights than the training." if moved else
                 "Nothing changed the weights between these evaluations, or they were made on a stale copy of them. Little data or a low rate makes evaluations alike, not identical.")
        yield Finding("warning" if idle or not certain else "fault", f"evaluation frozen ({what})", f"The same {what}, {shown}, {len(same)} times, to the last digit: steps "
                      + ", ".join(f"{step:,}" for step, _ in same[:6]) + ("…" if len(same) > 6 else "") + ".", cause, "Cure dead gradients first if there are any; then print one lora_B before and after a step, "
                      "and evaluate the very model that the optimizer updates.", {"times": len(same)})


def clipping(record):
    """Adam divides by the gradient's own size, so clipping every step by a small factor costs little: a note. By 10 or more, Adam's epsilon and the
    moments of the rare small steps begin to distort it. Never clipped is fine too, and only says that the threshold guards from outliers alone."""
    known = dict(record.series("clip"))
    pairs = [(norm, known.get(step, record.clip)) for step, norm in record.series("grad_norm") if known.get(step, record.clip)]
    if len(pairs) < 20 or not any(norm for norm, _ in pairs):
        if record.series("grad_norm") and dead_from(record) is None:
            yield Finding("unjudged", "clipping", "it takes 20 gradient norms and the threshold they were clipped at" + ("; give it as --clip=1.0" if not known and not record.clip else ""))
        return
    share, factor = sum(norm > limit for norm, limit in pairs) / len(pairs), statistics.median(norm / limit for norm, limit in pairs)
    if share >= 0.95:
        yield Finding("warning" if factor >= 10 else "note", "always clipped", f"{share:.0%} of the steps were clipped; the median norm is {factor:.2g} times the threshold.", "The threshold lies below the "
                      "usual norm, so that it sets the size of every gradient.", f"Clip near the usual norm, {factor * pairs[-1][1]:.2g}." if factor >= 10 else "Nothing need be done: Adam cancels a constant factor.", {"share": share})
    elif share == 0:
        yield Finding("note", "never clipped", f"None of {len(pairs):,} norms reached the threshold; the largest was {max(norm / limit for norm, limit in pairs):.2g} of it.", "The run was calm.", "Nothing need be done.")


def spikes(record):
    """A value far above the 50 before it: 8 robust deviations of the logarithm, and by half (loss) or threefold (norm)."""
    for name, what, ratio in (("loss", "training loss", 1.5), ("grad_norm", "gradient norm", 3.0)):
        points = [(step, math.log(value)) for step, value in record.series(name) if value > 0]
        found = []
        for i in range(20, len(points)):
            window = [value for _, value in points[max(0, i - 50):i]]
            middle = statistics.median(window)
            spread = 1.4826 * statistics.median(abs(value - middle) for value in window)
            if points[i][1] - middle > max(SPIKE * spread, math.log(ratio)):
                found.append((points[i][0], math.exp(points[i][1] - middle)))
        if found:
            yield Finding("warning", f"spikes of the {what}", f"{len(found)} of {len(points):,}, at {listed([step for step, _ in found])}; the largest is {max(size for _, size in found):.3g} times the median before it.",
                          "Broken or very long rows, or a rate at the edge of what the run bears.", "Look at the rows of those steps. If they are in order, lower the rate, lengthen the warm-up, or clip lower.", {"spikes": len(found)})
        elif points and len(points) <= 20:
            yield Finding("unjudged", f"spikes of the {what}", f"{len(points)} values, and it takes more than 20")


def training_loss(record):
    """Divergence and plateau. Medians of tenths against their noise, since two single losses mostly compare two handfuls of rows.

    Diverged: ends above its start by four standard errors and 2 %, or lost more than half of its fall again (six). Flat: a fall below two standard
    errors, where the noise would have let a fall of 10 % be seen.
    """
    losses = [value for _, value in record.series("loss")]
    figures = fall(losses)
    if figures is None:
        yield Finding("unjudged", "fall of the training loss", f"{len(losses) or 'no'} finite loss{'es' * (len(losses) != 1)}, and it takes 6: two single losses compare two handfuls of rows")
        return
    first, last, error = figures
    tenth = max(3, len(losses) // 10)
    lowest = min(statistics.median(losses[i:i + tenth]) for i in range(0, len(losses) - tenth + 1, tenth))
    told = f"Median of the first tenth {first:.4f}, of the last {last:.4f}: a change of {last - first:+.4f}, with a standard error of {error:.4f}."
    numbers = {"first": first, "last": last, "error": error}
    if last - first > max(4 * error, 0.02 * abs(first)) or last - lowest > max(6 * error, 0.5 * (first - lowest), 0.02 * abs(lowest)):
        yield Finding("fault", "divergence", f"{told} Its lowest median was {lowest:.4f}.", "The rate is too high, or the gradients are wrong although they are not zero.", "Try a tenth of the rate. If the loss "
                      "still climbs, the gradients are wrong: check the change of the loss along them by two forward passes.", numbers)
    elif first - last < 2 * error or first == last:
        if 2 * error > 0.1 * abs(first):
            yield Finding("unjudged", "fall of the training loss", f"{told} The noise would hide a fall of 10 %; log more often or train longer")
        else:
            yield Finding("warning", "training loss flat", told + " That is noise.", "Nothing was learnt, the rate is far too low, or the model knew it already.", "See to faults first; then compare a rate ten times as high over the same steps.", numbers)


def learning_rate(record):
    """The sum of the rates bounds how far Adam can carry a weight. Ending at nothing is the Trainer's default and a note, unless a tenth of the steps
    or, below one epoch, unseen rows are given away by it. A small area is a note: a whole model needs less than adapters, and the record does not say."""
    points = record.series("rate")
    if len(points) < 2:
        yield Finding("unjudged", "learning rate", "fewer than two learning rates recorded")
        return
    steps, figures, covered = points[-1][0], rate_figures(points), coverage(record)
    told = f"The rates of {steps:,} steps add up to {figures['area']:.3g}, as much as {figures['full_rate_steps']:,.0f} steps at the peak of {figures['peak']:.3g}."
    if figures["area"] <= 0:
        yield Finding("fault", "learning rate of zero", "Every recorded rate is 0.", "The schedule or the optimizer got no rate.", "Set a learning rate above 0.", figures)
    elif figures["negligible_from"]:
        early = covered is not None and covered < 1
        yield Finding("warning" if early or steps - figures["negligible_from"] >= 0.1 * steps else "note", "rate ends at nothing", f"{told} From step {figures['negligible_from']:,} on it is below 1 % of the peak"
                      + (f", when at most {covered:.1%} of the rows had been seen." if early else "."), "The schedule falls to zero, and the steps near its end teach next to nothing.", "Give the rate a floor of a tenth of its peak.", figures)
    if 0 < figures["area"] < SMALL_AREA:
        yield Finding("note", "small rate area", f"The rates add up to {figures['area']:.3g}, which is little for adapters (below {SMALL_AREA:g}).", "Few steps or a low rate.", "For adapters: more steps, or a peak of 1e-4 to 2e-4.", figures)


def data_coverage(record):
    """Rows that were never seen taught nothing. It weakens learning in proportion, and by itself it fails no run."""
    covered = coverage(record)
    if covered is None:
        yield Finding("unjudged", "coverage", "the record holds no epoch" + ("" if record.rows else "; give the rows of the training set as --rows=N, which helps where samples are recorded"))
    elif covered < 1 - 1e-3:
        seen = f": {covered * record.rows:,.0f} of {record.rows:,} rows" if record.rows else ""
        yield Finding("warning", "coverage below one epoch", f"The run saw {covered:.1%} of its training rows{seen}.", "Too few steps or too few samples a step for this many rows. This explains weak learning"
                      + ("." if dead_from(record) is None else "; it does not explain a gradient norm of exactly 0.0 or identical evaluations."), f"For one epoch train {1 / covered:.1f} times as many samples." if covered else "Train longer.", {"coverage": covered})


def gap(record):
    """Overfitting: the evaluation loss rose by 2 % above its lowest, in all of two or more later evaluations, while the training loss went on falling.
    A gap that widens while both fall is what training looks like."""
    evals, losses = record.series("eval_loss"), record.series("loss")
    if len(evals) < 3 or len(losses) < 6:
        yield Finding("unjudged", "gap between training and evaluation", f"{len(evals)} evaluation{'s' * (len(evals) != 1)} and {len(losses)} training loss{'es' * (len(losses) != 1)}; it takes 3 and 6")
        return
    best = min(range(len(evals)), key=lambda i: evals[i][1])
    after = [value for _, value in evals[best + 1:]]
    tenth = max(3, len(losses) // 10)
    near = statistics.median(loss for _, loss in sorted(losses, key=lambda point: abs(point[0] - evals[best][0]))[:tenth])
    last = statistics.median(loss for _, loss in losses[-tenth:])
    if len(after) > 1 and evals[best][1] > 0 and min(after[-2:]) > 1.02 * evals[best][1] and last < near - 2 * fall([loss for _, loss in losses])[2]:
        yield Finding("warning", "growing gap", f"The evaluation loss rose from {evals[best][1]:.4f} at step {evals[best][0]:,} to {after[-1]:.4f}, while the training loss fell from {near:.4f} to {last:.4f}.",
                      "The adapters learn the training rows by heart.", f"Keep the checkpoint of step {evals[best][0]:,}; train on fewer epochs, more rows, or with dropout.")


def still_adapters(record):
    """B starts at 0 and an update moves both matrices, so a norm that repeats to the last digit in every recorded step means no update."""
    seen = False
    for name in ("lora_A norm", "lora_B norm"):
        values = [value for _, value in record.series(name)]
        seen |= len(values) > 1
        if len(values) > 1 and len(set(values)) == 1:
            yield Finding("fault", f"{name[:6]} never moved", f"The {name} is {values[0]:g} in all {len(values):,} recorded steps.", "No update reached these matrices: no gradient, a rate of zero, or an optimizer that does not hold them.", CUT)
    if not seen:
        yield Finding("unjudged", "movement of the adapters", "fewer than two adapter norms recorded")


RULES = (dead_gradients, nonfinite, zero_loss, frozen_evaluation, still_adapters, training_loss, data_coverage, learning_rate, gap, spikes, clipping)


def diagnose(record):
    """All findings on a Record, the gravest first, what could not be judged last."""
    return sorted((finding for rule in RULES for finding in rule(record)), key=lambda finding: SEVERITIES.index(finding.severity))


# ------------------------------------------------------------------------------------------------------------- forecast

def forecast(settings, rows, tokens, supervised_tokens):
    """What a run of `settings` (a config.Config) can learn from so many rows and tokens: findings, the gravest first.

    The note "forecast" always stands and its figures are coverage, samples, steps, peak, area, full_rate_steps, negligible_from (0: never), warmup_share and
    supervised_share. A fault cannot learn and is to be refused; a warning learns less than it could. Nothing here says that a run with a warning fails.
    """
    if rows <= 0 or supervised_tokens <= 0:
        return [Finding("fault", "nothing supervised", f"{rows:,} rows hold {max(0, supervised_tokens):,} supervised tokens.", "The loss counts no token, so every gradient is zero.", "See that the rows hold answers, and that data.max_length does not cut them off.")]
    steps, samples = schedule.plan_steps(settings, rows)
    rates = rate_figures([(step, schedule.learning_rate(step, settings.schedule, steps)) for step in range(1, steps + 1)])
    figures = {"coverage": samples / rows, "samples": samples, "steps": steps, **rates, "warmup_share": min(1.0, settings.schedule.lr_warmup_steps / steps),
               "supervised_share": supervised_tokens / tokens}
    area = f"The rates of {steps:,} steps add up to {figures['area']:.3g}, as much as {figures['full_rate_steps']:,.0f} steps at the peak of {figures['peak']:g}"
    findings = [Finding("note", "forecast", f"{samples:,} samples in {steps:,} steps, {figures['coverage']:.1%} of {rows:,} rows. {area}; {figures['warmup_share']:.1%} of the steps warm up. "
                        f"{figures['supervised_share']:.1%} of {tokens:,} tokens are supervised.", figures=figures)]
    if figures["area"] <= 0:
        findings.append(Finding("fault", "rate of zero", "The learning rate is 0 at every step.", "An update of rate 0 changes nothing.", "Set schedule.learning_rate above 0."))
    elif settings.schedule.lr_warmup_steps >= max(2, steps):
        findings.append(Finding("fault", "warm-up as long as the run", f"{settings.schedule.lr_warmup_steps:,} steps of warm-up in a run of {steps:,}.", "The run ends before its rate has reached the peak that was set.",
                                f"Set schedule.lr_warmup_steps to {steps // 10:,} or train longer."))
    elif figures["area"] < SMALL_AREA:
        findings.append(Finding("warning", "small rate area", f"{area}, below {SMALL_AREA:g}.", "The sum of the rates bounds how far Adam can carry an adapter's weight from where it starts.", "More steps, or a higher schedule.learning_rate."))
    if figures["negligible_from"] and figures["area"] > 0:
        findings.append(Finding("warning", "rate ends at nothing", f"From step {figures['negligible_from']:,} of {steps:,} on the rate is below 1 % of its peak.", "Those steps teach next to nothing.",
                                f"Set schedule.lr_min to a tenth of the peak, {figures['peak'] / 10:g}."))
    if samples < rows:
        findings.append(Finding("warning", "coverage below one epoch", f"{samples:,} samples are {figures['coverage']:.1%} of {rows:,} rows.", "Rows that are never seen teach nothing; learning is weaker, not impossible.",
                                f"For one epoch at this batch size: train.max_steps={math.ceil(steps * rows / samples)}."))
    if figures["supervised_share"] < 0.03:
        findings.append(Finding("warning", "few supervised tokens", f"{supervised_tokens:,} of {tokens:,} tokens, {figures['supervised_share']:.1%}, are supervised.", "Nearly all of the work is spent on tokens that the loss does not count.",
                                "See that the answers are whole (data.max_length) and found by the chat template; or data.supervise=all."))
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


# -------------------------------------------------------------------------------------------------------------- console

def shown(findings):
    """Findings as text of 80 columns."""
    lines = []
    for finding in findings:
        if finding.severity != "unjudged":
            lines.append(f"\n{finding.severity.upper()}: {finding.name}")
            for label, text in (("seen", finding.evidence), ("cause", finding.cause), ("remedy", finding.remedy)):
                lines += textwrap.wrap(text, 80, initial_indent=f"  {label:<8}", subsequent_indent=" " * 10, break_on_hyphens=False)
    unjudged = [finding for finding in findings if finding.severity == "unjudged"]
    lines += ["\nNot judged, for lack of data"] if unjudged else []
    for finding in unjudged:
        lines += textwrap.wrap(f"{finding.name}: {finding.evidence.rstrip('.')}.", 80, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)


def headline(record, findings):
    """What it comes to, in a sentence or two."""
    faults = [finding.name for finding in findings if finding.severity == "fault"]
    warnings = [finding.name for finding in findings if finding.severity == "warning"]
    if not record.steps:
        return "The record is empty: nothing can be judged. Did the run reach its first logged step?"
    if "dead gradients" in faults:
        since = "This run" if all(norm == 0 for _, norm in record.series("grad_norm")) else f"From step {dead_from(record):,} on this run"
        later = [name for name in warnings if name in ("coverage below one epoch", "rate ends at nothing", "training loss flat")]
        return (f"Dead gradients. {since} learnt nothing, and could not. Other rates, batch sizes or bits would not have cured it. Repair the gradients first"
                + (f"; only then look at the rest ({', '.join(later)})." if later else "."))
    if faults:
        return f"Faulty: {', '.join(faults)}. See to the first fault below before anything else."
    if warnings:
        return f"No fault found, but it learnt less than it could: {', '.join(warnings)}."
    return "Nothing wrong found in what the record holds. What it does not hold could not be judged."


def whole_number(text, flag, kind):
    try:
        value = kind(text or 0)
    except ValueError:
        value = -1
    if not 0 <= value < math.inf or text and value == 0:
        raise ValueError(f"--{flag}: must be a number above 0, got {text}")
    return value


def main(argv):
    words, flags, overrides = config.command_line(argv, {"rows": "", "clip": "", "help": False})
    if flags["help"]:
        print(__doc__.strip())
        return 0
    if len(words) != 1 or overrides:
        raise ValueError("usage: python health.py PATH [--rows=N] [--clip=X], with a trainer_state.json, a metrics.jsonl or a folder as PATH")
    record = read(words[0])
    record.rows, record.clip = whole_number(flags["rows"], "rows", int), whole_number(flags["clip"], "clip", float)
    findings = diagnose(record)
    last = record.steps[-1]["step"] if record.steps else 0
    counts = ", ".join(f"{len(record.series(name, finite=False)):,} {what}" for name, what in (("loss", "losses"), ("grad_norm", "gradient norms"), ("eval_loss", "evaluations")))
    print(words[0])
    print("\n".join(textwrap.wrap(f"{record.kind}, up to step {last:,}" + (f" of {record.planned_steps:,}" if record.planned_steps > 0 else "") + f": {counts}", 80)))
    print("\n" + "\n".join(textwrap.wrap(headline(record, findings), 80, break_on_hyphens=False)))
    print(shown(findings))
    return 0


if __name__ == "__main__":
    config.run_command(main)
