"""What counts as sick, and why: each rule once, over a few figures that a record (health.py) or a running run (alerts.py) gives it.

A rule yields Findings. A fault: this run cannot learn, or its figures cannot be trusted. A warning: it learns less than it could.
A note: worth knowing. "unjudged": what was lacking. Statistics are medians and median absolute deviations, so that a few wild
steps decide nothing. docs/HEALTH.md has every rule with its reasoning. Leaves out: reading records, and the forecast.
"""
import bisect
import json
import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from advice import ADVICE

SEVERITIES = ("fault", "warning", "note", "unjudged")
ROTE = 1e-3        # nats: a loss below this has been learnt by heart, and its gradient may vanish in rounding
HIGH_RATE = 0.02   # the elements of A are about 1 / sqrt(width) large, 0.02 to 0.04 in common models
MOVES = 1e-6       # sum of rates after which an evaluation in 16 bits differs in some digit: Adam moves a weight by about the rate a step


@dataclass
class Finding:
    severity: str                                 # one of SEVERITIES
    name: str                                     # what it is, in a few words
    evidence: str                                 # what was seen, in numbers; unjudged: what was lacking
    cause: str = ""
    remedy: str = ""
    figures: dict = field(default_factory=dict)   # the numbers, for programs


def finding(severity, name, evidence, advice="", **figures):
    """A Finding with the cause and remedy that ADVICE holds under its name, or under `advice`."""
    return Finding(severity, name, evidence, *ADVICE[advice or name], figures)


# -------------------------------------------------------------------------------------------------------------- figures

def spread(values):
    """Robust standard deviation: the median absolute deviation x 1.4826."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values)


def noise(values):
    """Standard deviation of one value, from differences of neighbours, which a trend hardly touches; 0 below two values."""
    return 1.4826 * statistics.median(abs(b - a) for a, b in zip(values, values[1:])) / math.sqrt(2) if len(values) > 1 else 0.0


def block(step, values, deviation):
    """(last step, median, its standard error) of n values in a row.

    The error is the larger of 1.2533 deviation / sqrt n, as for normal noise, and half the distance of the values sqrt(n) / 2 ranks below
    and above the median, which holds for any distribution, also one with two humps.
    """
    ordered, half = sorted(values), math.sqrt(len(values)) / 2
    middle = (len(values) - 1) / 2
    ranks = ordered[math.ceil(min(len(values) - 1, middle + half))] - ordered[math.floor(max(0, middle - half))]
    return step, statistics.median(ordered), max(1.2533 * deviation / math.sqrt(len(values)), ranks / 2)


def rate_figures(points, negligible=0.01):
    """Of [(step, rate)], straight lines between them, the first rate before them: peak, area (sum over all steps), full_rate_steps
    (area / peak), and negligible_from, the step from which on every rate is below `negligible` x the peak (0: never)."""
    peak, low, pairs = max(rate for _, rate in points), negligible, list(zip(points, points[1:]))
    between = math.fsum((b - a) * (start + end) / 2 + (end - start) / 2 for (a, start), (b, end) in pairs)  # steps a+1 to b of each pair
    area = points[0][0] * points[0][1] + between
    falls = [a + 1 + int((b - a) * (start - low * peak) / (start - end)) for (a, start), (b, end) in pairs if start >= low * peak > end]
    last = falls[-1] if falls and points[-1][1] < low * peak else 0
    return {"peak": peak, "area": area, "full_rate_steps": area / peak if peak else 0.0, "negligible_from": last}


def listed(steps):
    """Up to four step numbers in words."""
    first = ", ".join(f"{step:,}" for step in steps[:4])
    return f"step{'s' * (len(steps) > 1)} {first}" + (f" and {len(steps) - 4:,} more" if len(steps) > 4 else "")


def repeated(text):
    """Share of the four-word sequences of a text that stood in it before; 0 below eight words."""
    words = text.split()
    grams = [tuple(words[i:i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if len(words) >= 8 else 0.0


# ---------------------------------------------------------------------------------------------------------------- rules

class Spikes:
    """Values far above the ones before them. Heavy tails are healthy: single rows are hard, and single gradients large.

    A spike lies `deviations` robust deviations of the logarithm above the window's median, `ratio` times above its 80th percentile (in
    mixed rows the hard ones are no exception), and above the level that the run began with: late in a run that learns by heart, one hard
    row is far above the rest and no harm. A huge one (3 times the beginning's loss, or 10 times its norm) is told at once, smaller ones
    of the loss where three fall into 200 steps. Smaller ones of the norm are a note however many they are: who knows most rows has small
    gradients of them and a large one of a hard row, and Adam and clipping bound the step that it makes. Where it does harm, the loss tells.
    """

    def __init__(self, what, alerts):
        self.name, self.deviations, self.size = f"spikes of the {what}", alerts.spike_deviations, alerts.window
        self.ratio, self.huge, self.crowd = (alerts.loss_spike, 3.0, 3) if what == "training loss" else (alerts.norm_spike, 10.0, math.inf)
        self.recent, self.ordered, self.start, self.seen, self.begin = deque(), [], [], 0, -math.inf
        self.spikes, self.largest, self.alarming = [], 0.0, False

    def expect(self, value):
        """Takes another figure for the level that the run began with, such as the evaluation before it, if it is higher."""
        if value > 0:
            self.begin = max(self.begin, math.log(value))

    def add(self, step, value):
        """True where `value` (finite, above 0) is a spike; its window then holds it too."""
        logarithm, spike, self.seen = math.log(value), False, self.seen + 1
        if self.seen > 20:
            usual = self.ordered[4 * len(self.ordered) // 5]
            if logarithm - usual > math.log(self.ratio) and logarithm > self.begin:
                middle = self.ordered[len(self.ordered) // 2]
                spike = logarithm - middle > self.deviations * spread(self.recent)
        else:
            self.start.append(value)
            if self.seen == 20:
                self.expect(statistics.median(self.start))
        if spike:
            self.spikes.append(step)
            self.largest = max(self.largest, math.exp(logarithm - middle))
            close = len(self.spikes) >= self.crowd and step - self.spikes[-self.crowd] <= 200
            self.alarming |= close or logarithm - max(middle, self.begin) > math.log(self.huge)
        self.recent.append(logarithm)
        bisect.insort(self.ordered, logarithm)
        if len(self.recent) > self.size:
            del self.ordered[bisect.bisect_left(self.ordered, self.recent.popleft())]
        return spike

    def found(self):
        if self.spikes:
            told = f"{len(self.spikes):,} of {self.seen:,} values, at {listed(self.spikes)}; "
            told += f"the largest is {self.largest:.3g} times the median before it."
            yield finding("warning" if self.alarming else "note", self.name, told, spikes=len(self.spikes), largest=self.largest)


def clipping(ratios, threshold, alerts):
    """Adam divides by the gradient's own size, so clipping every step by a constant factor changes nothing: a note.

    By clip_factor or more, Adam's epsilon (1e-8) comes near what is left of a gradient spread over millions of weights. Never clipped is
    fine, and says that the threshold guards from outliers alone. ratios: norm / threshold of steps in a row.
    """
    share, factor = sum(ratio > 1 for ratio in ratios) / len(ratios), statistics.median(ratios)
    if share >= 0.95:
        far = factor >= alerts.clip_factor
        told = f"{share:.0%} of {len(ratios):,} steps were clipped at {threshold:.3g}; the median norm is {factor:.3g} times that."
        severity, advice = ("warning", "always clipped by far") if far else ("note", "")
        yield finding(severity, "always clipped", told, advice, share=share, factor=factor)
    elif share == 0:
        told = f"None of {len(ratios):,} norms reached the threshold of {threshold:.3g}; the largest was {max(ratios):.2g} of it."
        yield finding("note", "never clipped", told, share=0.0)


def diverged(blocks, alerts):
    """The training loss climbs. blocks: (step, median, error) in a row, three at least; the two newest must agree.

    Above the start by `divergence` (a tenth) and four standard errors: a fault, since learning does not raise the loss of its own rows.
    More than half of the fall lost again, by six errors and a tenth of the lowest: a warning, since harder rows or a high rate may do that
    for a while.
    """
    first, lowest = blocks[0], min(blocks, key=lambda entry: entry[1])
    newest = min(blocks[-2:], key=lambda entry: entry[1])
    error = math.hypot(newest[2], first[2])
    told = f"The median training loss went from {first[1]:.4f} to {blocks[-1][1]:.4f} (standard error {error:.4f}); "
    told += f"its lowest was {lowest[1]:.4f}."
    numbers = {"first": first[1], "last": blocks[-1][1], "lowest": lowest[1], "error": error}
    if newest[1] - first[1] > max(4 * error, alerts.divergence * abs(first[1])):
        yield finding("fault", "divergence", told, **numbers)
    elif newest[1] - lowest[1] > max(6 * math.hypot(newest[2], lowest[2]), 0.5 * (first[1] - lowest[1]), 0.1 * abs(lowest[1])):
        yield finding("warning", "divergence", told, **numbers)


def course(first, last, error):
    """Where a loss went over a whole run: "fell" (by two standard errors), "rose" (by four and 2 %), "stood" (a fall of a tenth would
    have shown), or "hidden" by its noise."""
    if first - last >= 2 * error and first != last:
        return "fell"
    if last - first > max(4 * error, 0.02 * abs(first)):
        return "rose"
    return "stood" if first - last + 2 * error < 0.1 * abs(first) else "hidden"


def too_high(peak):
    """Beyond HIGH_RATE a step of Adam is no small one any more."""
    if peak > HIGH_RATE:
        yield finding("warning", "high rate", f"The rate is {peak:.3g}.", peak=peak)


def guessing(loss, where, alerts):
    """Guessing evenly among V tokens costs ln V nats, 12.5 for the largest vocabularies; a trained model does not begin above that."""
    if loss > alerts.guessing:
        told = f"{where} is {loss:.2f} nats a token; guessing evenly among 262,144 tokens costs 12.5."
        yield finding("warning", "loss above guessing", told, loss=loss)


def disagreement(train, evaluated):
    """Before learning, the loss on training rows and on evaluation rows is the same model's. Twice as much is no matter of luck.

    train: median of the first losses, at rates that could not yet have taught much; evaluated: the evaluation before training.
    """
    if evaluated > 0.1 and train > 2 * evaluated or 0.1 < train < evaluated / 2:
        times = train / evaluated
        whole = times > 1.5 and abs(times - round(times)) < 0.06 * times
        told = f"Before training the evaluation loss is {evaluated:.4f}; the first training losses are {train:.4f}, {times:.2f} times that"
        told += f", close to the whole number {round(times)}: are there {round(times)} micro-batches?" if whole else "."
        yield finding("warning" if times > 1 else "note", "training and evaluation disagree", told, times=times)


def frozen(evals, alerts):
    """Weights that moved change an evaluation in some digit. The same loss twice to five digits, or three times, is no chance.

    evals: dictionaries in a row with step, loss, and, where known, digest, area and top (sum and highest of the rates since the evaluation
    before), peak. Looks at the evaluations that end the list.
    """
    same = [evals[-1]]
    for entry in evals[-2::-1]:
        if entry["loss"] != same[0]["loss"]:
            break
        same.insert(0, entry)
    if len(same) < 2:
        return
    areas, loss = [entry.get("area") for entry in same[1:]], same[0]["loss"]
    idle = all(entry.get("top") is not None and entry["top"] < alerts.negligible_rate * entry["peak"] for entry in same[1:])
    if None not in areas and sum(areas) < MOVES and not idle:
        return
    digests = {entry["digest"] for entry in same if "digest" in entry}
    certain = len(same) > 2 or len(str(loss).partition(".")[2]) > 4
    shown = f"{loss:.4f}" if round(loss, 4) == loss else f"{loss:.8g}"
    steps = ", ".join(f"{entry['step']:,}" for entry in same[:6]) + ("…" if len(same) > 6 else "")
    told = f"The same loss, {shown}, {len(same)} times, to the last digit: steps {steps}."
    found = finding("note" if idle else "fault" if certain else "warning", "evaluation frozen", told, times=len(same))
    if idle:
        found.cause = "The learning rate was next to nothing in between."
    elif len(digests) > 1:
        found.cause = "The adapters did change, so the evaluation looks at other weights than the training."
    yield found


def unmoved(evals):
    """B starts at 0 and any update changes it: the same digest, or a change of the weights of exactly 0, means that there was none."""
    last, before = evals[-1], evals[-2] if len(evals) > 1 else {}
    area = last.get("area")
    if not last["step"] and last.get("lora_B norm", 0) > 0 and not last.get("initial"):
        told = f"Before training the norm of lora_B is {last['lora_B norm']:.3g} in the mean."
        yield finding("fault", "adapters do not start at zero", told)
    elif not last["step"] and last.get("delta_ratio", 0) > 0 and not last.get("initial"):
        told = f"Before training the adapters already change the weights, by {last['delta_ratio']:.2g} of their norm."
        yield finding("fault", "adapters do not start at zero", told)
    if len(evals) < 2 or area is not None and area < MOVES:
        return
    if last.get("digest") and last.get("digest") == before.get("digest"):
        told = f"Their digest is {last['digest']} at step {before['step']:,} and at step {last['step']:,}."
        yield finding("fault", "adapters never moved", told)
    elif last.get("delta_ratio") == 0:
        yield finding("fault", "adapters never moved", f"At step {last['step']:,} they change the weights by exactly 0.")
    else:
        still = [name for name, value in last.get("modules", {}).items() if value == 0]
        if still:
            told = f"At step {last['step']:,} {len(still)} of {len(last['modules'])} adapters change their weight by exactly 0: "
            told += ", ".join(still[:3]) + ("…" if len(still) > 3 else "") + "."
            yield finding("fault", "adapters never moved", told, modules=still)


def worsened(evals, alerts):
    """Evaluations above the one before training: by a tenth at once, by `worse` where the two newest agree. Same rows: no luck is in it."""
    first, losses = evals[0], [entry["loss"] for entry in evals[1:]]
    if first["step"] > 0 or not losses or first["loss"] <= 0:
        return
    far, twice = losses[-1] > 1.1 * first["loss"], len(losses) > 1 and min(losses[-2:]) > (1 + alerts.worse) * first["loss"] + 0.01
    if far or twice:
        told = f"The evaluation loss was {first['loss']:.4f} before training and is {losses[-1]:.4f} at step {evals[-1]['step']:,}."
        yield finding("warning", "evaluation worse than before training", told, rise=losses[-1] / first["loss"] - 1)


def unfollowed(entry, first, began, covered):
    """Within the first pass the training rows are as new to the model as the evaluation rows, so both losses fall together.

    A training loss down by half a nat (and six errors) with an evaluation loss down by less than a quarter of that: they are not the
    same thing. entry: an evaluation with train and error; first: the one before training; began: the first training losses; covered:
    passes over the rows.
    """
    if covered > 1.001 or first["step"] or "train" not in entry or not began:
        return
    fell, followed = began - entry["train"], first["loss"] - entry["loss"]
    if fell > max(0.5, 6 * entry["error"]) and followed < 0.25 * fell:
        told = (f"Up to step {entry['step']:,}, in the first pass over the rows, the training loss fell from {began:.4f} "
                f"to {entry['train']:.4f}; the evaluation loss was {first['loss']:.4f} before training and is {entry['loss']:.4f}.")
        yield finding("warning", "evaluation does not follow training", told, fell=fell, followed=followed)


def gap(evals, alerts):
    """Learning by heart: the evaluation loss rose by `gap` (and a hundredth of a nat) above its lowest, in all of two or more later
    evaluations, while the training loss went on falling. A gap that widens while both fall is what training looks like. evals with train
    and error, the training loss near each."""
    best = min(evals, key=lambda entry: entry["loss"])
    after = [entry for entry in evals if entry["step"] > best["step"]]
    if len(after) < 2 or best["loss"] <= 0 or "train" not in best or "train" not in after[-1]:
        return
    higher = min(entry["loss"] for entry in after[-2:])
    rise = higher / best["loss"] - 1
    falling = best["train"] - after[-1]["train"] > 2 * math.hypot(best["error"], after[-1]["error"])
    if rise > alerts.gap and higher - best["loss"] > 0.01 and falling:
        told = f"The evaluation loss rose from {best['loss']:.4f} at step {best['step']:,} to {after[-1]['loss']:.4f}, "
        told += f"while the training loss fell from {best['train']:.4f} to {after[-1]['train']:.4f}."
        found = finding("warning", "growing gap", told, rise=rise)
        found.remedy = f"Keep the checkpoint of step {best['step']:,}. " + found.remedy
        yield found


def damage(entry, alerts):
    """NF4 costs an 8B model some hundredths of a nat, and one of 135M parameters 0.7; twice the worst that was seen is something else."""
    harm = entry["loss"] - entry.get("unquantised_loss", math.inf)
    if harm > alerts.quantisation_damage:
        told = f"Before training the loss is {entry['loss']:.4f}, and {entry['unquantised_loss']:.4f} unquantised: {harm:.2f} nats worse."
        yield finding("warning", "damage by quantisation", told, harm=harm)


def coherence(evals, alerts):
    """Whether the newest evaluation's samples stop, repeat themselves, and follow the loss. Asked from half of the run on, and only
    where the model predicts half of the tokens: the samples of a model that has not learnt much yet are bad without a fault.

    Never stopping is judged by samples that ran on past one and a half times their reference: others were cut off by eval.max_new_tokens.
    Repetition is compared with the references' own.
    Not following the loss: a model that puts the right token first with probability a begins an answer with a right word (of some two
    tokens) with a^2, so all of n samples miss their references with (1 - a^2)^n at most, and all are empty, wrong in their first
    token, with (1 - a)^n. Below a hundredth, that is no chance.
    """
    last, first = evals[-1], evals[0]
    samples, able = last.get("samples") or [], last.get("accuracy", 1.0)
    if able < 0.5:
        return
    known = [sample for sample in samples if sample.get("reference")]
    overrun = [sample for sample in known if len(sample["text"]) > 1.5 * len(sample["reference"]) + 10]
    stopped = [sample for sample in samples if sample.get("stopped")]
    if not stopped and len(overrun) > 1 and last.get("overlap", 1.0) >= 0.1:  # what it writes is to the point, but for the end
        told = f"None of {len(samples)} samples at step {last['step']:,} ended by itself, though {len(overrun)} are longer than "
        yield finding("warning", "samples never stop", told + "one and a half times their reference.")
    elif not known and last.get("stop_rate") == 0 and max((entry.get("stop_rate", 0) for entry in evals), default=0) > 0:
        yield finding("warning", "samples never stop", f"No sample at step {last['step']:,} ended by itself, and earlier ones did.")
    share = statistics.mean(repeated(sample["text"]) for sample in samples) if samples else last.get("repetition", 0)
    usual = statistics.mean(repeated(sample["reference"]) for sample in known) if known else 0
    if share > max(alerts.repetition, usual + 0.3):
        told = f"At step {last['step']:,} {share:.0%} of the samples' four-word sequences stood in them before"
        yield finding("warning", "samples repeat themselves", told + (f" ({usual:.0%} in the references)." if known else "."), share=share)
    overlap, empty = last.get("overlap", 1.0), not any(sample["text"].strip() for sample in known)
    if overlap <= 0.15 * able and (1 - able ** (1 if empty else 2)) ** len(known) < 0.01 and first["loss"] - last["loss"] > 0.5:
        told = f"The evaluation loss fell from {first['loss']:.4f} to {last['loss']:.4f}"
        told += f" and {able:.0%} of its tokens are put first" if "accuracy" in last else ""
        told += f", yet the overlap of {len(known)} samples with their references is {overlap:.2f}{', since all are empty' * empty}."
        yield finding("warning", "samples do not follow the loss", told, overlap=overlap)


def proved(line):
    """What the gradient proof found at the step of a line with the names of logs.NAMES: "dead" or "wrong" gradients, by its own word
    where that is recorded.

    Else by its figures: the measured change of the loss along the gradient over the predicted one is 1, up to the stated tolerance.
    """
    outcome, _, told = line.get("proof_outcome", "").partition(": ")
    ratio, tolerance = line.get("proof", math.nan), line.get("proof_tolerance", 0.1)
    if outcome == "dead":
        yield finding("fault", "dead gradients", f"The gradient proof at step {line['step']:,}: {told}")
    elif outcome in ("wrong", "stale"):
        yield finding("fault", "wrong gradients", f"The gradient proof at step {line['step']:,}: {told}", ratio=ratio)
    elif not outcome and not abs(ratio - 1) <= tolerance:
        told = f"At step {line['step']:,} the loss changes along the gradient by {ratio:.3f} times what it predicts (1 +- {tolerance:.2g})."
        yield finding("fault", "wrong gradients", told, ratio=ratio)


def empty(windows, step):
    """Steps whose windows hold no supervised token are not applied. windows: [bool] of steps up to `step` in a row.

    Ten in a row, or all of three and more that there are: nothing is supervised at all. Three, and a tenth: rows without an answer.
    """
    count, row = sum(windows), next((i for i, none in enumerate(reversed(windows)) if not none), len(windows))
    if row >= 10 or row == len(windows) > 2:
        told = f"None of the last {row:,} steps, up to step {step:,}, held a supervised token."
        yield finding("fault", "steps not applied", told, "no step applied", steps=row)
    elif count >= max(3, len(windows) // 10):
        told = f"{count:,} of {len(windows):,} steps, up to step {step:,}, held no supervised token."
        yield finding("warning", "steps not applied", told, steps=count)


def evaluation_entry(line):
    """What the rules on evaluations read, from a line with the names of logs.NAMES; None without a finite evaluation loss."""
    if not math.isfinite(line.get("eval_loss", math.nan)):
        return None
    entry = {"step": line["step"], "loss": line["eval_loss"]}
    names = ("digest", "delta_ratio", "accuracy", "stop_rate", "repetition", "overlap", "unquantised_loss", "lora_B norm")
    entry |= {name: line[name] for name in names if name in line}
    for name in ("modules", "written"):
        try:
            value = json.loads(line.get(name, "null"))
        except ValueError:
            value = None  # a text that something else wrote there: it then counts as absent
        if name == "modules" and isinstance(value, dict):
            entry["modules"] = {module: figures[0] for module, figures in value.items() if isinstance(figures, list) and figures}
        if name == "written" and isinstance(value, list):
            entry["samples"] = [sample for sample in value if isinstance(sample, dict) and isinstance(sample.get("text"), str)]
    return entry
