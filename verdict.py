"""Did a run learn what was asked of it: each criterion PASS, FAIL, INCONCLUSIVE or ALREADY MET, from its record alone.

    python verdict.py runs/approach1                        print it, and write runs/approach1/verdict.json
    python verdict.py RUN --criteria.optimal_perplexity=5   judge by other criteria than the run's own
    python verdict.py RUN --json

Reads metrics.jsonl, evaluations/ and config.json: during a run, after it, on another machine. A figure comes with the
interval that other rows like these would have put it in; PASS and FAIL are said only where the whole interval lies on one
side of the threshold. docs/VERDICT.md argues how each criterion is measured. Leaves out: what is wrong with a run that
fails (health.py), and comparing runs (compare.py). Exit codes: 0; 2 where the record cannot be read; 5 where the run has
finished and criteria.enforce names a set that it does not pass.
"""
import collections
import json
import math
import os
import pathlib
import re
import textwrap
from dataclasses import asdict, dataclass, field

import numpy as np

import config as settings
import record
import words

PASS, FAIL, INCONCLUSIVE, ALREADY_MET = "PASS", "FAIL", "INCONCLUSIVE", "ALREADY MET"
SETS = ("milestone", "minimum", "optimal")
RESAMPLES = 2000
MOST_UNITS = 5000
MIN_ROWS = 20    # with fewer evaluation rows, percentiles of a bootstrap are too narrow (docs/VERDICT.md has the coverage)
MIN_WINDOW = 5   # steps in a window: the bootstrap of a median of 5 spans them all, which holds the true median in 94 of 100 cases
MOST_REPAIR = {  # (nats, share of tokens) that quantisation can have cost, where the unquantised model was not measured: what it
    # cost the smallest model measured here, rounded up (docs/VERDICT.md); larger models lose less
    "nf4": (0.7, 0.065), "int8": (0.02, 0.01), "llm_int8": (0.1, 0.01), "none": (0.0, 0.0)}


@dataclass
class Criterion:
    set: str                  # one of SETS
    name: str
    outcome: str              # PASS, FAIL, INCONCLUSIVE or ALREADY MET
    threshold: float
    measured: float | None    # None: could not be measured
    low: float | None         # the interval of `measured`; None: not known
    high: float | None
    reason: str


@dataclass
class Verdict:
    outcome: str              # of the enforced set, of the minimum where none is enforced: PASS, FAIL or INCONCLUSIVE
    sets: dict                # {set: outcome}, ALREADY MET where nothing in it was left to learn
    criteria: list            # of Criterion
    facts: dict = field(default_factory=dict)   # what the judgement rests on: step, planned_steps, state, rows, baseline, …
    notes: list = field(default_factory=list)   # what in the record could not be used


@dataclass
class Evidence:
    """What a record holds for the criteria. Estimates are float64 (1 + RESAMPLES,), or (1,) where there are no figures by row."""
    criteria: settings.Criteria
    metrics: list             # of record.read_metrics
    quant: str                # model.quant, empty where it is not known, none where there is nothing to repair
    start: str                # what the run started from, in a word or two
    step: int                 # the last one recorded
    planned_steps: int        # 0 where it is not known
    state: str                # see progress
    evals: list               # [(step, loss)]
    parts: list               # see parts
    losses: dict              # {step or "unquantised": estimate}
    accuracies: dict
    rows: int                 # evaluation rows with figures of their own; 0: none


# -------------------------------------------------------------------------------------------------------- uncertainty

def resampled_sums(table, resamples=RESAMPLES, seed=0):
    """Column sums of `table`, float64 (rows, columns), over rows drawn with replacement: float64 (resamples, columns).

    The bootstrap of Efron and Tibshirani 1993 (chapters 6 and 8). All columns share each draw, so a difference of two
    of them is paired. More than MOST_UNITS rows are drawn in groups of neighbours, as many as that: a sum of many independent
    rows varies as it would otherwise, and 2,000 draws of 100,000 rows take a second instead of twenty.
    """
    if len(table) > MOST_UNITS:
        table = np.add.reduceat(table, np.linspace(0, len(table), MOST_UNITS, endpoint=False).astype(int), axis=0)
    rng, rows, sums = np.random.default_rng(seed), len(table), np.empty((resamples, table.shape[1]))
    for i in range(resamples):
        times = np.bincount(rng.integers(0, rows, rows, dtype=np.int32), minlength=rows)
        sums[i] = times.astype(np.float64) @ table
    return sums


def with_draws(table, of, seed=0):
    """of(column sums) on the rows of `table` as they are, then on RESAMPLES draws of them: float64 (1 + RESAMPLES, …)."""
    return of(np.concatenate((table.sum(0, keepdims=True), resampled_sums(table, RESAMPLES, seed))))


def interval(draws, confidence):
    """The percentile interval (low, high) of an estimate's draws; (None, None) where it has none."""
    if len(draws) < 2:
        return None, None
    low, high = np.percentile(draws[1:], [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def binomial_interval(hits, count, confidence):
    """The exact interval of a probability after `hits` in `count` trials (Clopper and Pearson 1934)."""
    tail = (1 - confidence) / 2
    at_least = lambda p, k: math.fsum(math.comb(count, i) * p**i * (1 - p)**(count - i) for i in range(k, count + 1))

    def root(k, level):  # at_least rises with p
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if at_least(middle, k) < level else (low, middle)
        return low

    return (root(hits, tail) if hits else 0.0), (root(hits + 1, 1 - tail) if hits < count else 1.0)


def minus(a, b):
    """The difference of two estimates from the same rows, paired draw by draw; without draws where one has none."""
    n = min(len(a), len(b))
    return a[:n] - b[:n]


def windows(count):
    """Steps in the window at the start and at the end of `count` steps: 25 each, or a tenth (5 at least) and a quarter of a short run.
    The loss falls fastest at the start, so a long window there would hide part of the fall."""
    return min(25, max(MIN_WINDOW, count // 10)), min(25, count // 4)


# ------------------------------------------------------------------------------------------------- what the record says

def number(value):
    """A value of the record as a float; NaN for what is none."""
    return float(value) if type(value) in (int, float) else math.nan


def points(metrics, tag):
    """[(step, value)] of the lines that hold `tag`; what is no number reads as NaN."""
    return [(line["step"], number(line[tag])) for line in metrics if tag in line]


def progress(tree, metrics):
    """How far a run is, from its settings as a nested dict and its record: {"step", "planned_steps": 0 where unknown, "state"}.

    state: finished; stopped early (eval.patience); unfinished (it goes on, was interrupted or stopped); unknown.
    """
    given = lambda section, name: value if type(value := tree.get(section, {}).get(name)) in (int, float) else 0
    step, planned, epochs = metrics[-1]["step"] if metrics else 0, given("train", "max_steps"), given("train", "epochs")
    best, waited = math.inf, 0
    for _, loss in points(metrics, "eval/loss"):
        waited = 0 if loss < best - (given("eval", "min_delta") if best < math.inf else 0) else waited + 1
        best = loss if not waited else best
    passed, samples = points(metrics, "train/epoch"), sum(value for _, value in points(metrics, "train/samples"))
    if epochs and not planned and passed:  # the last sample of the run is the nearest one to epochs x rows
        done = passed[-1][1] >= epochs - (0.51 * passed[-1][1] / samples if samples > 0 else 1e-6)
    else:
        done = planned and step >= planned
    early = 0 < given("eval", "patience") <= waited
    state = "finished" if done else "stopped early" if early else "unfinished" if planned or epochs else "unknown"
    return {"step": step, "planned_steps": planned, "state": state}


def same_evaluations(metrics, evaluations):
    """({step or "unquantised": arrays} of the evaluations by row that belong to the record, steps that were evaluated on other rows
    than the last evaluation, [notes] on what was left out).

    One belongs where its rows are those of the last one and its figures are the recorded ones: another run's file, or one of
    steps that were cut off since, is left out.
    """
    recorded = {line["step"]: line for line in metrics if "eval/loss" in line}
    last = max((key for key in evaluations if key in recorded and key != "unquantised"), default=None)
    found, others, notes = {}, set(), []
    counts = {key: number(line.get("eval/supervised_tokens")) for key, line in recorded.items() if "eval/supervised_tokens" in line}
    for key, count in counts.items():
        if count != counts[max(counts)]:
            others |= {key, "unquantised"} if key == 0 else {key}  # which was measured together with step 0
            notes.append(f"The evaluation at step {key:,} counted {count:,.0f} supervised tokens, the last one "
                         f"{counts[max(counts)]:,.0f}: it was made on other rows, and was left out.")
    unquantised = {"eval/loss": metrics[0].get("eval/unquantised_loss")} if metrics else {}
    for key, (arrays, metadata) in evaluations.items():
        if key not in recorded and key != "unquantised":
            continue  # of a checkpoint that was evaluated later, by hand
        name, line = (f"step-{key:06d}", recorded[key]) if key in recorded else (key, unquantised)
        rows, about = evaluations[last] if last is not None else (arrays, metadata)
        loss = arrays["nll"].sum() / arrays["tokens"].sum() if arrays["tokens"].sum() else math.nan
        stated, digests = line.get("eval/loss"), {line.get("eval/adapter_digest"), metadata.get("adapter_digest")} - {None}
        if not np.array_equal(arrays["tokens"], rows["tokens"]) or metadata.get("rows_digest") != about.get("rows_digest"):
            others.add(key)
            notes.append(f"evaluations/{name}.safetensors is of other rows than the last evaluation, and was left out.")
        elif len(digests) > 1 or math.isfinite(number(stated)) and not abs(loss - stated) <= 1e-3 * max(1.0, abs(stated)):
            notes.append(f"evaluations/{name}.safetensors is not the recorded evaluation (its loss is {loss:.4f}, the recorded {stated}; "
                         "or the adapters are others), and was left out.")
        else:
            found[key] = arrays
    return found, others, notes


def estimates(metrics, rows, keys):
    """({key: loss}, {key: token accuracy}) of the evaluations `keys`: estimates, float64 (1 + RESAMPLES,) with paired draws, or (1,)
    where the record holds the figure alone. rows: from same_evaluations."""
    losses, accuracies = {}, {}
    for line in metrics:
        for key, prefix in ((line["step"], "eval/"), ("unquantised", "eval/unquantised_")):
            if key in keys and f"{prefix}loss" in line:
                losses[key], accuracies[key] = (np.array([number(line.get(prefix + name))]) for name in ("loss", "token_accuracy"))
    known = [key for key in keys if key in rows and all(np.isfinite(array).all() for array in rows[key].values())]
    if known:
        tokens = rows[known[0]]["tokens"]
        counted = tokens > 0
        table = np.stack([tokens, *(rows[key][name] for key in known for name in ("nll", "correct"))], axis=1)[counted]
        if len(table):
            ratios = with_draws(table, lambda sums: sums[:, 1:] / sums[:, :1])
            for i, key in enumerate(known):
                losses[key], accuracies[key] = ratios[:, 2 * i], ratios[:, 2 * i + 1]
    return losses, accuracies


# ----------------------------------------------------------------------------------------------------------- coherence

PIECES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\d|[^\W\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{1,16}|[^\w\s]|_")


def pieces(text):
    """Words in lower case; digits, signs and CJK characters one by one, endless words in pieces of 16 letters."""
    return PIECES.findall(text.lower())


def repetition(text):
    """Share of the 4-grams of words that stood in the text before: 0 none … 1 (Welleck et al. 2020, seq-rep-4, section 6)."""
    found = pieces(text)
    grams = [tuple(found[i:i + 4]) for i in range(len(found) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def overlap(text, reference):
    """F1 of the words that a text shares with its reference, 0 … 1, as SQuAD scores answers (Rajpurkar et al. 2016, section 6.1)."""
    written, wanted = collections.Counter(pieces(text)), collections.Counter(pieces(reference))
    shared = (written & wanted).total()
    return 2 * shared / (written.total() + wanted.total()) if shared else 0.0


def coherent(sample, criteria):
    """Whether a generation sample says something, ends by itself (or was cut off where its reference is longer still), does not
    go round in circles, and has words in common with its reference, where there is one."""
    text, reference = sample["text"], sample.get("reference") or ""
    ended = sample["stopped"] or len(pieces(reference)) > len(pieces(text))
    related = not reference or overlap(text, reference) >= criteria.coherent_overlap
    return bool(pieces(text)) and ended and related and repetition(text) <= criteria.coherent_repetition


def samples_of(line):
    """The samples of a line of the record, or None where they cannot be read."""
    try:
        samples = json.loads(line["eval/samples"])
    except (KeyError, TypeError, ValueError):
        return None
    good = lambda s: isinstance(s, dict) and isinstance(s.get("text"), str) and "stopped" in s and isinstance(s.get("reference") or "", str)
    return samples if isinstance(samples, list) and samples and all(map(good, samples)) else None


# ------------------------------------------------------------------------------------------------------------ judgement

def decide(measured, low, high, threshold, below=False):
    """PASS where the whole interval lies above the threshold (below it, if so asked), FAIL where none of it does.

    Without an interval a figure decides where it is off by a factor of two, and is INCONCLUSIVE otherwise.
    """
    if below:
        return decide(-measured, None if high is None else -high, None if low is None else -low, -threshold)
    if low is None:
        twice, half = (2 * threshold, threshold / 2) if threshold > 0 else (threshold / 2, 2 * threshold)
        return PASS if measured > twice and threshold else FAIL if measured <= half and threshold else INCONCLUSIVE
    return PASS if low > threshold else FAIL if high <= threshold else INCONCLUSIVE


def judge(config_dict, metrics, evaluations):
    """The Verdict on a run: its settings as a nested dict ({}: all at their defaults), record.read_metrics and
    record.read_evaluations of it ({}: no figures by row). Raises ValueError for criteria that break their rules."""
    criteria = settings.from_dict({"criteria": config_dict.get("criteria", {})}, origin="criteria").criteria
    rows, others, notes = same_evaluations(metrics, evaluations)
    evals = [(step, loss) for step, loss in points(metrics, "eval/loss") if step not in others]
    quant, adapter = str(config_dict.get("model", {}).get("quant", "")), config_dict.get("lora", {}).get("init_from", "")
    division = parts([step for step, _ in evals], criteria.optimal_steady_parts)
    keys = {step for step, _ in evals[:1] + evals[-1:]} | set(division)
    if not adapter and "unquantised" not in others:  # an adapter that the run started from has repaired already what it could
        keys.add("unquantised")
    losses, accuracies = estimates(metrics, rows, sorted(keys, key=str))
    start = "adapter" if adapter else "model" if quant == "none" else "quantised model"
    run = Evidence(criteria, metrics, quant="none" if adapter else quant, start=start, **progress(config_dict, metrics), evals=evals,
                   parts=division, losses=losses, accuracies=accuracies,
                   rows=max((int((arrays["tokens"] > 0).sum()) for arrays in rows.values()), default=0))
    repair = repair_measured(run, 0)

    found = [milestone(run), train_loss_drop(run, "minimum", criteria.minimum_train_loss_drop), eval_loss_drop(run),
             token_accuracy_gain(run), gradient_norm(run), train_loss_drop(run, "optimal", criteria.optimal_train_loss_drop),
             perplexity(run), coherent_samples(run), steady_improvement(run)]
    found = [criterion for criterion in found if criterion]
    sets = {name: together([c.outcome for c in found if c.set == name]) for name in SETS}
    judged = ["minimum", "optimal"] if criteria.enforce == "optimal" else ["minimum"]
    outcome = together([sets[name] for name in judged])
    facts = {"enforced": criteria.enforce, "judged": judged, "step": run.step, "planned_steps": run.planned_steps, "state": run.state,
             "rows": run.rows, "evaluated_step": evals[-1][0] if evals else None, "confidence": criteria.confidence,
             "resamples": RESAMPLES, "baseline": criteria.baseline, "quantisation_cost": None if repair is None else float(repair[0])}
    return Verdict(PASS if outcome == ALREADY_MET else outcome, sets, found, facts, notes)


def undecided(outcome, low, what):
    """Why an outcome with an interval is INCONCLUSIVE, as the end of a reason."""
    return f" The interval holds the threshold; more {what} would narrow it." if outcome == INCONCLUSIVE and low is not None else ""


def together(outcomes):
    """What several outcomes come to: one FAIL fails, then one INCONCLUSIVE is inconclusive; ALREADY MET only where all are."""
    for outcome in (FAIL, INCONCLUSIVE, PASS, ALREADY_MET):
        if outcome in outcomes:
            return outcome
    return INCONCLUSIVE


def finish(run, criterion, final=False, by_rows=False):
    """What may still change is not decided while the run has not ended, nor what rests on too few rows.

    final: it cannot change any more. by_rows: it rests on the evaluation rows.
    """
    if criterion.outcome == INCONCLUSIVE or criterion.measured is None or final:
        return criterion
    if by_rows and 0 < run.rows < MIN_ROWS:
        criterion.reason = f"{run.rows} evaluation rows are too few to say how others would do; it takes {MIN_ROWS}. {criterion.reason}"
        criterion.outcome = INCONCLUSIVE
    elif run.state == "unfinished":
        planned = f" of {run.planned_steps:,}" if run.planned_steps else ""
        criterion.reason = f"So far {criterion.outcome}, but the run is not at its end (step {run.step:,}{planned}). {criterion.reason}"
        criterion.outcome = INCONCLUSIVE
    return criterion


def unmeasured(set, name, threshold, reason, outcome=INCONCLUSIVE):
    """A Criterion without a figure."""
    return Criterion(set, name, outcome, threshold, None, None, None, reason)


def repair_measured(run, which):
    """What quantisation cost the untrained model on the evaluation rows: an estimate in nats (which: 0) or share of tokens (1), or None."""
    figures, sign = ((run.losses, 1), (run.accuracies, -1))[which]
    known = 0 in figures and "unquantised" in figures and np.isfinite(figures[0][0]) and np.isfinite(figures["unquantised"][0])
    return sign * minus(figures[0], figures["unquantised"]) if known else None


# ------------------------------------------------------------------------------------------------------------ criteria

def window_drop(first, last, seed):
    """Fall of the training loss between the medians of two windows, lists of losses: (first, last, estimate of the fall).

    Values that are not finite are left out. Each draw takes either window's steps with replacement.
    """
    rng, medians = np.random.default_rng(seed), []
    for part in (first, last):
        finite = np.array([loss for loss in part if math.isfinite(loss)])
        drawn = finite[rng.integers(0, len(finite), (RESAMPLES, len(finite)))]
        medians.append(np.concatenate(([np.median(finite)], np.median(drawn, axis=1))))
    return medians[0][0], medians[1][0], medians[0] - medians[1]


def drop_of(run, losses, threshold, set, name):
    """A Criterion on the fall of the training loss over `losses`, a list of one value a step."""
    lengths = windows(len(losses))
    if lengths[1] < MIN_WINDOW:
        return unmeasured(set, name, threshold, f"{words.count(len(losses), 'training step')} recorded; it takes {4 * MIN_WINDOW} to tell "
                          "a fall from noise.")
    ends = losses[:lengths[0]], losses[-lengths[1]:]
    bad = [sum(not math.isfinite(loss) for loss in end) for end in ends]
    if 2 * bad[1] > lengths[1]:
        return unmeasured(set, name, threshold, f"The training loss is not finite in {bad[1]} of the last {lengths[1]} steps.", FAIL)
    if 2 * bad[0] > lengths[0] or min(length - n for length, n in zip(lengths, bad)) < MIN_WINDOW - 2:
        return unmeasured(set, name, threshold, f"The training loss is not finite in {bad[0]} of the first {lengths[0]} steps and {bad[1]} "
                          f"of the last {lengths[1]}, so there is too little to measure a fall from.")
    first, last, drop = window_drop(*ends, 1)
    reason = (f"Training loss {first:.4f} -> {last:.4f}, medians of the first {lengths[0]} and the last {lengths[1]} steps: "
              f"{drop[0]:.3f} below the {run.start} that it started from.")
    if sum(bad):
        reason += f" {sum(bad)} steps without a finite loss are left out."
    return counted(run, set, name, threshold, drop, reason, 0, paired=False)


def counted(run, set, name, threshold, gain, reason, which, unit=1.0, paired=True):
    """The Criterion on a fall or gain that was measured from the quantised model: less the repair of the quantisation, unless that counts.

    which: 0 loss, in nats; 1 token accuracy. unit: threshold and figures are in these. paired: the gain is of the evaluation rows
    too; otherwise the two are independent, and their draws are put together as they come.
    """
    what, form = ("nats", ".3f") if which == 0 else ("points", ".1f")
    low_allowance = 0.0
    if run.quant != "none" and run.criteria.baseline == "unquantised":
        repair, quant = repair_measured(run, which), run.quant or "quantising"
        if repair is not None:
            gain = minus(gain, unit * repair) if paired else gain - unit * repair
            cost = f"{unit * repair[0]:{form}}"
            reason += (f" Of it {cost} repair what {quant} cost the untrained model on evaluation rows; the rest counts."
                       if float(cost) > 0 else f" {quant} cost the untrained model nothing on evaluation rows.")
        else:
            low_allowance = unit * MOST_REPAIR.get(run.quant, MOST_REPAIR["nf4"])[which]
            reason += f" Up to {low_allowance:.2g} {what} of it may only repair what {quant} cost: the unquantised model was not measured."
    low, high = interval(gain, run.criteria.confidence)
    measured = float(gain[0])
    if low is None and low_allowance:  # decided on the point, at either end of what repair can be
        ends = {decide(measured - low_allowance, None, None, threshold), decide(measured, None, None, threshold)}
        outcome = ends.pop() if len(ends) == 1 else INCONCLUSIVE
    else:
        low = None if low is None else low - low_allowance
        outcome = decide(measured, low, high, threshold)
    reason += undecided(outcome, low, "evaluation rows" if paired else "steps")
    return Criterion(set, name, outcome, threshold, measured, low, high, reason)


def milestone(run):
    """The training loss fell by so much by a step. A fall that shows earlier will do; without it, only that step can tell."""
    threshold, step = run.criteria.milestone_train_loss_drop, run.criteria.milestone_step
    if not threshold:
        return None
    name = f"train loss drop by step {step:,}"
    criterion = drop_of(run, [loss for at, loss in points(run.metrics, "train/loss") if 0 < at <= step], threshold, "milestone", name)
    if run.step < step and criterion.outcome != PASS:
        criterion.outcome = INCONCLUSIVE
        criterion.reason = f"Step {step:,} was not reached: the record ends at step {run.step:,}. " + criterion.reason
    elif run.step < step:
        criterion.reason = f"By step {run.step:,} already. " + criterion.reason
    return criterion


def train_loss_drop(run, set, threshold):
    losses = [loss for step, loss in points(run.metrics, "train/loss") if step > 0]
    criterion = drop_of(run, losses, threshold, set, "train loss drop") if threshold else None
    return criterion and finish(run, criterion)


def two_evaluations(run, set, name, threshold):
    """(a Criterion that says why nothing can be measured, None) or (None, step of the last evaluation)."""
    evals = run.evals
    if not evals or evals[-1][0] == 0:
        where = "after training" if evals else "in the record"
        return unmeasured(set, name, threshold, f"There is no evaluation {where}; eval.every_steps makes them."), None
    if not math.isfinite(evals[-1][1]):
        return unmeasured(set, name, threshold, f"The evaluation loss at step {evals[-1][0]:,} is not finite.", FAIL), None
    return None, evals[-1][0]


def without_rows(draws):
    """What to say where an estimate has no interval."""
    return "" if len(draws) > 1 else " No interval: the record does not hold this by row; python eval.py --ckpt RUN --keep adds it."


def against_start(run, set, name, threshold, figures, better, form, unit, which, tag):
    """The Criterion on the last evaluation against the untrained model. better: +1 where a higher figure is better, -1 a lower."""
    why_not, last = two_evaluations(run, set, name, threshold)
    if why_not:
        return why_not
    start, plain = figures.get(0), figures.get("unquantised")
    usable = [figure is not None and math.isfinite(figure[0]) for figure in (start, plain)]
    if not math.isfinite(figures[last][0]) or not (usable[0] or usable[1] and run.criteria.baseline == "unquantised"):
        return unmeasured(set, name, threshold, f"The record holds no {tag} of the untrained model or of step {last:,} to compare.")
    if not usable[0]:
        gain = unit * better * minus(figures[last], plain)
        low, high = interval(gain, run.criteria.confidence)
        reason = f"{tag.capitalize()} {plain[0]:{form}} -> {figures[last][0]:{form}} at step {last:,}, counted from the unquantised model."
        outcome = decide(gain[0], low, high, threshold)
        return Criterion(set, name, outcome, threshold, float(gain[0]), low, high, reason + without_rows(gain))
    gain = unit * better * minus(figures[last], start)
    reason = (f"{tag.capitalize()} {start[0]:{form}} -> {figures[last][0]:{form}} at step {last:,}: "
              f"{gain[0]:.{3 if which == 0 else 1}f} against the {run.start} that it started from.")
    digests = [line.get("eval/adapter_digest") for line in run.metrics if "eval/loss" in line]
    if digests[0] is not None and digests[0] == digests[-1]:
        reason += " The adapters are to the last bit what they were before training."
    criterion = counted(run, set, name, threshold, gain, reason, which, unit)
    criterion.reason += without_rows(gain)
    return criterion


def eval_loss_drop(run):
    threshold, name = run.criteria.minimum_eval_loss_drop, "eval loss drop"
    criterion = threshold and against_start(run, "minimum", name, threshold, run.losses, -1, ".4f", 1.0, 0, "evaluation loss")
    return finish(run, criterion, by_rows=True) if threshold else None


def token_accuracy_gain(run):
    threshold, name = run.criteria.minimum_token_accuracy_gain, "token accuracy gain in points"
    criterion = threshold and against_start(run, "minimum", name, threshold, run.accuracies, 1, ".4f", 100.0, 1, "token accuracy")
    return finish(run, criterion, by_rows=True) if threshold else None


def gradient_norm(run):
    """Every step that was applied had a norm above the threshold. A count of what happened, so there is no interval."""
    threshold, name = run.criteria.minimum_gradient_norm, "gradient norm in every step"
    dead = [line["step"] for line in run.metrics if str(line.get("proof/outcome", "")).startswith("dead")]
    if dead:
        reason = f"The gradient proof at step {dead[0]:,} found adapter matrices that no gradient reaches."
        return unmeasured("minimum", name, threshold, reason, FAIL)
    lines = [line for line in run.metrics if "train/grad_norm" in line]
    if not lines:
        return unmeasured("minimum", name, threshold, "The record holds no gradient norm.")
    applied = [(line["step"], number(line["train/grad_norm"])) for line in lines if not line.get("train/skipped")]
    if not applied:
        return unmeasured("minimum", name, threshold, f"None of {len(lines):,} recorded steps was applied.", FAIL)
    low = [f"{step:,}" for step, norm in applied if not norm > threshold]
    smallest = min((norm for _, norm in applied if math.isfinite(norm)), default=None)
    skipped = f" {words.count(len(lines) - len(applied), 'other')} not applied." if len(applied) < len(lines) else ""
    if low:
        reason = (f"{len(low):,} of {words.count(len(applied), 'applied step')} had a norm of {threshold:g} or less, or none that is a "
                  f"number: {words.listed(low)}." + skipped)
        return finish(run, Criterion("minimum", name, FAIL, threshold, smallest, smallest, smallest, reason), final=True)
    middle = float(np.median([norm for _, norm in applied]))
    reason = f"Of {words.count(len(applied), 'applied step')} the smallest norm before clipping is {smallest:.3g}, the median {middle:.3g}."
    return finish(run, Criterion("minimum", name, PASS, threshold, smallest, smallest, smallest, reason + skipped))


def perplexity(run):
    threshold, name = run.criteria.optimal_perplexity, "perplexity"
    why_not, last = two_evaluations(run, "optimal", name, threshold) if threshold else (None, None)
    if not threshold or why_not:
        return why_not
    level = lambda losses: np.exp(np.minimum(losses, 700.0))
    judged = lambda losses: (float(level(losses)[0]), *interval(level(losses), run.criteria.confidence))
    after = judged(run.losses[last])
    starts = {f"the {run.start} before training": 0, "the unquantised model": "unquantised"}
    before = {what: judged(run.losses[key]) for what, key in starts.items() if key in run.losses}
    outcome = decide(*after, threshold, below=True)
    reason = "; ".join([f"At step {last:,}", *(f"{what} {figures[0]:.2f}" for what, figures in before.items())]) + "."
    reason += without_rows(run.losses[last]) + undecided(outcome, after[1], "evaluation rows")
    held = [what for what, figures in before.items() if decide(*figures, threshold, below=True) == PASS]
    if held and outcome == PASS:
        outcome, reason = ALREADY_MET, f"{held[0].capitalize()} was below it, so this shows nothing that was learnt. " + reason
    return finish(run, Criterion("optimal", name, outcome, threshold, *after, reason), by_rows=True)


def coherent_samples(run):
    threshold, name = run.criteria.optimal_coherent_share, "coherent samples"
    if not threshold:
        return None
    written = [(line["step"], samples) for line in run.metrics for samples in [samples_of(line)] if samples]
    if not written or written[-1][0] == 0:
        why = "The record holds no samples from after training" + "; eval.samples says how many are written." * (not written)
        return unmeasured("optimal", name, threshold, why)
    (first, before), (last, after) = written[0], written[-1]
    share = lambda samples: (sum(coherent(s, run.criteria) for s in samples), len(samples))
    figures = lambda hits, count: (hits / count, *binomial_interval(hits, count, run.criteria.confidence))
    outcome, held = decide(*figures(*share(after)), threshold), first == 0 and decide(*figures(*share(before)), threshold) == PASS
    ended, again = sum(bool(s["stopped"]) for s in after) / len(after), sum(repetition(s["text"]) for s in after) / len(after)
    common = [overlap(s["text"], s["reference"]) for s in after if s.get("reference")]
    reason = (f"{share(after)[0]} of {len(after)} at step {last:,}"
              + f", {share(before)[0]} of {len(before)} before training" * (first == 0)
              + f". {ended:.0%} stop by themselves, {again:.0%} of their 4-grams stood before"
              + (f", and their overlap with the references is {sum(common) / len(common):.2f}." if common else "."))
    if outcome == INCONCLUSIVE:
        reason += f" {words.count(len(after), 'sample')} cannot tell; --eval.samples={max(16, 4 * len(after))} would."
    if held and outcome == PASS:
        outcome, reason = ALREADY_MET, "So many were coherent before training. " + reason
    return finish(run, Criterion("optimal", name, outcome, threshold, *figures(*share(after)), reason))


def parts(steps, count):
    """Of the evaluations' steps those nearest to the ends of `count` equal parts of the run, the first one's start included."""
    if not steps or not count:
        return []
    return sorted({min(steps, key=lambda step: abs(step - (steps[0] + (steps[-1] - steps[0]) * i / count))) for i in range(count + 1)})


def steady_improvement(run):
    """The evaluation loss fell in each part of the run. The figure is the least sure fall; all intervals together hold at the confidence
    asked for (Bonferroni: each at 1 - (1 - confidence) / parts)."""
    threshold, name, count, steps = 0.0, "steady improvement", run.criteria.optimal_steady_parts, run.parts
    if not count:
        return None
    why_not, last = two_evaluations(run, "optimal", name, threshold)
    if why_not:
        return why_not
    bad = [step for step in steps if not math.isfinite(run.losses[step][0])]
    if bad:
        return unmeasured("optimal", name, threshold, f"The evaluation loss at step {bad[0]:,} is not finite.", FAIL)
    if len(steps) < count + 1:
        why = (f"{words.count(len(run.evals), 'evaluation')}: too few to see each of {count} parts of the run; it takes one before "
               f"training and {count} spread over it (eval.every_steps).")
        return unmeasured("optimal", name, threshold, why)
    level = 1 - (1 - run.criteria.confidence) / count
    falls = [minus(run.losses[a], run.losses[b]) for a, b in zip(steps, steps[1:])]
    spans = [(float(fall[0]), *interval(fall, level)) for fall in falls]
    least = min(range(count), key=lambda i: spans[i][0] if spans[i][1] is None else spans[i][1])
    outcomes = [decide(*span, threshold) for span in spans]
    where, losses = ", ".join(f"{step:,}" for step in steps), ", ".join(f"{run.losses[step][0]:.4f}" for step in steps)
    reason = (f"The evaluation loss at steps {where} is {losses}; the figure is the fall from step {steps[least]:,} to "
              f"{steps[least + 1]:,}, the least sure one." + without_rows(falls[0]))
    reason += undecided(together(outcomes), spans[least][1], "evaluation rows")
    return finish(run, Criterion("optimal", name, together(outcomes), threshold, *spans[least], reason), by_rows=True)


# ------------------------------------------------------------------------------------------------------------- printing

def plain(verdict):
    """A Verdict as JSON-ready dictionaries; what is not finite is None."""
    finite = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
    criteria = [{name: finite(value) for name, value in asdict(criterion).items()} for criterion in verdict.criteria]
    facts = {name: finite(value) for name, value in verdict.facts.items()}
    return {"outcome": verdict.outcome, "sets": verdict.sets, "criteria": criteria, **facts, "notes": verdict.notes}


def shown(verdict):
    """A Verdict as text of at most 80 columns."""
    facts, lines, told = verdict.facts, [], {}
    wrap = lambda text, indent: textwrap.wrap(text, 80, initial_indent=" " * indent, subsequent_indent=" " * indent, break_on_hyphens=False)
    planned = f" of {facts['planned_steps']:,}" if facts["planned_steps"] else ""
    lines += wrap(f"verdict    {verdict.outcome} ({' and '.join(facts['judged'])}), "
                  f"{'run' if facts['state'] == 'unknown' else 'run ' + facts['state']} at step {facts['step']:,}{planned}", 0)
    if facts["rows"]:
        lines += [f"           intervals of {facts['confidence']:.0%}, from {facts['rows']:,} evaluation rows"]
    for name in SETS:
        chosen = [criterion for criterion in verdict.criteria if criterion.set == name]
        lines += [f"\n{name}: {verdict.sets[name]}"] if chosen else []
        for c in chosen:
            sign = "<" if c.name == "perplexity" else ">"
            figure = "–" if c.measured is None else f"{c.measured:.4g}"
            if c.low is not None and c.low < c.high:
                figure += f" [{c.low:.4g}, {c.high:.4g}]"
            lines += [f"  {c.outcome:<13} {c.name} {sign} {c.threshold:g}: {figure}"]
            lines += wrap(f"As for {told[c.reason]} above." if c.reason in told else c.reason, 16)
            told.setdefault(c.reason, c.name)
    for note in verdict.notes:
        lines += [""] + wrap("note: " + note, 0)
    return "\n".join(lines)


def settings_of(run):
    """What RUN/config.json holds, as a dict of sections. Raises ValueError naming the file."""
    path = pathlib.Path(run) / "config.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the run wrote it, restore it or remove it") from None
    if not isinstance(tree, dict) or not all(isinstance(section, dict) for section in tree.values()):
        raise ValueError(f"{path}: must be an object of sections; the run wrote it, restore it or remove it")
    return tree


def of_run(run, overrides=()):
    """The Verdict on a run folder. overrides: ("criteria.key", "text") pairs. Raises ValueError where there is no record, or its
    settings cannot be read; damaged lines and evaluations are left out and told in the notes."""
    problems, path = [], pathlib.Path(run) / "config.json"
    metrics, evaluations = record.read_metrics(run, problems), record.read_evaluations(run, problems)
    tree = settings_of(run) if path.exists() else {}
    wrong = [key for key, _ in overrides if not key.startswith("criteria.")]
    if wrong:
        raise ValueError(f"--{wrong[0]}: only criteria can be changed here; the run's other settings are what it was")
    tree["criteria"] = asdict(settings.from_dict({"criteria": tree.get("criteria", {})}, overrides, str(path)).criteria)
    judged = judge(tree, metrics, evaluations)
    judged.notes += [f"{problem}. It was left out." for problem in problems[:5]]
    judged.notes += [f"{len(problems) - 5:,} more like these."] * (len(problems) > 5)
    return judged


def write(run, verdict):
    """Put a Verdict into RUN/verdict.json, whole or not at all, and return its path."""
    path = pathlib.Path(run) / "verdict.json"
    temporary = path.with_name(".verdict.json.tmp")
    temporary.write_text(json.dumps(plain(verdict), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def exit_code(verdict):
    """5 where the run has ended and does not pass what criteria.enforce asks for, 0 otherwise."""
    ended, enforced = verdict.facts["state"] in ("finished", "stopped early"), verdict.facts["enforced"] != "none"
    return 5 if ended and enforced and verdict.outcome != PASS else 0


def main(argv):
    words, flags, overrides = settings.command_line(argv, {"json": False, "help": False})
    if flags["help"]:
        print(__doc__.strip())
        return 0
    if len(words) != 1:
        raise ValueError(f"give one run folder, as in: python verdict.py runs/approach1 (got {' '.join(words) or 'none'})")
    verdict = of_run(words[0], overrides)
    path = write(words[0], verdict)
    print(json.dumps(plain(verdict), indent=1, allow_nan=False) if flags["json"] else f"{shown(verdict)}\n\n{path}")
    return exit_code(verdict)


if __name__ == "__main__":
    settings.run_command(main)
