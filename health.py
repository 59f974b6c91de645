"""Did a run learn: a diagnosis from its record alone, without its model.

    python health.py trainer_state.json --rows=45000
    python health.py runs/approach1          a run folder or metrics.jsonl of ours
    python health.py trainer_log.jsonl       LLaMA-Factory; logging.jsonl of ms-swift
    python health.py train.log               a saved console log of the Trainer's kin
    python health.py logs                    a folder of TensorBoard events

trainer_state.json is what transformers' Trainer, TRL, Unsloth, axolotl and
LLaMA-Factory leave behind. --rows=N (rows of the training set) and --clip=X
(gradient norm clipped at) help where the record does not hold them; --json
prints the findings for programs.

logs.py makes the same plain Record of each; the rules are below and in rules.py,
which the alerts of a running run share; docs/HEALTH.md states each with its
reason. Leaves out: the model (a record shows that gradients were dead, not which
module cut them), and comparing runs. Exit codes: 0 when the record could be
read, whatever was found in it; 2 when it could not.
"""
import bisect
import json
import math
import statistics
import textwrap

import config
import logs
import rules
import words
from logs import read, to_record  # noqa: F401 (both are part of what this file offers)
from rules import SEVERITIES, Finding, finding, listed

SMALL_AREA = 0.02   # Adam moves a weight by about the rate a step, so the sum of the rates is how far B, which starts at 0, can travel;
#                     QLoRA's own recipe (2e-4, 1,875 steps) sums to 0.375, and a twentieth of that is little


def unjudged(name, lacking):
    return Finding("unjudged", name, lacking)


# -------------------------------------------------------------------------------------------------------------- figures

def fall(values):
    """(first, last, error): medians of the first and last tenth (3 values at least) and the standard error of their difference.

    None below 6 values. A median of n values has 1.2533 / sqrt n of their deviation.
    """
    if len(values) < 6:
        return None
    tenth = max(3, len(values) // 10)
    return statistics.median(values[:tenth]), statistics.median(values[-tenth:]), 1.2533 * rules.noise(values) * math.sqrt(2 / tenth)


def learned(record):
    """True where the loss, in training or on evaluation rows, fell by far more than its noise: then something did learn."""
    train, evals = fall([value for _, value in record.series("loss")]), [value for _, value in record.series("eval_loss")]
    if train and train[0] - train[1] > max(5 * train[2], 0.02 * abs(train[0])):
        return True
    return len(evals) > 1 and evals[0] - evals[-1] > 0.02 * abs(evals[0])


def by_heart(record):
    """True where the loss came down to next to nothing by degrees: then a loss or gradient of 0 is what is left of it in rounding."""
    losses = [value for _, value in record.series("loss")]
    start = next((i for i, loss in enumerate(losses) if loss < rules.ROTE), None)
    return bool(start) and 0 < losses[start - 1] < 0.05 < max(losses[:start])


def dead_from(record):
    """The first step from which on every recorded gradient norm is exactly 0.0; None if the last one is not, or all was learnt."""
    norms = record.series("grad_norm", finite=False)
    alive = max((i for i, (_, norm) in enumerate(norms) if norm != 0), default=-1)
    return norms[alive + 1][0] if alive + 1 < len(norms) and not by_heart(record) else None


def coverage(record):
    """Passes over the training rows (0.089: it saw 8.9 % of them), or None: from the recorded epoch, or else from samples and --rows."""
    epochs, samples = record.series("epoch"), record.series("samples")
    if samples and record.rows and len(samples) == samples[-1][0]:  # every step is there
        return sum(count for _, count in samples) / record.rows
    return epochs[-1][1] if epochs else None


def evaluations(record):
    """The record's evaluations as the rules read them: with the rates spent since the one before, and the training loss near each."""
    losses, rates, entries = record.series("loss"), record.series("rate"), []
    steps, deviation = [step for step, _ in losses], rules.noise([value for _, value in losses])
    tenth, peak = max(3, len(losses) // 10), max((rate for _, rate in rates), default=0)
    for line in record.steps:
        entry = rules.evaluation_entry(line)
        if entry is None:
            continue
        entry["initial"] = record.initial
        since = entries[-1]["step"] if entries else -1
        between = [(step, rate) for step, rate in rates if since < step <= entry["step"]]
        if between and since >= 0:  # a logged rate stands for the steps since the one logged before it
            starts = [since, *[step for step, _ in between]]
            area = sum(rate * (step - before) for before, (step, rate) in zip(starts, between))
            entry |= {"area": area, "top": max(rate for _, rate in between), "peak": peak}
        if len(losses) > 2:
            at = max(min(3, len(steps)), bisect.bisect_right(steps, entry["step"]))
            near = [value for _, value in losses[max(0, at - tenth):at]]
            entry |= dict(zip(("train", "error"), rules.block(0, near, deviation)[1:]))
        entries.append(entry)
    return entries


# ---------------------------------------------------------------------------------------------------------------- rules

def dead_gradients(record):
    """A norm of exactly 0.0 is not a small one: no rate, batch or rounding makes it. The loss does not reach the adapters, or nothing is
    supervised.

    If the loss fell all the same, the recorded norm is what is wrong. Zeros between healthy steps are windows without a target.
    """
    norms = record.series("grad_norm", finite=False)
    if not norms:
        yield unjudged("gradients", "the record holds no gradient norm")
        return
    zeros, start = [step for step, norm in norms if norm == 0], dead_from(record)
    evidence = f"The gradient norm is exactly 0.0 in {len(zeros):,} of {len(norms):,} recorded steps"
    if zeros and by_heart(record):
        yield finding("note", "nothing left to learn", evidence + ", where the loss is next to nothing.")
    elif zeros and record.rewarded:
        yield finding("warning" if len(zeros) > len(norms) / 2 else "note", "steps without gradient", evidence + ".", "equal rewards")
    elif len(zeros) == len(norms) and learned(record):
        yield finding("warning", "gradient norm wrongly recorded", evidence + ", yet the loss fell by far more than its noise.")
    elif len(zeros) == len(norms) or start is not None and len(norms) > 1 and norms[-2][1] == 0:
        since = "from the first to the last" if len(zeros) == len(norms) else f"in all from step {start:,} on"
        yield finding("fault", "dead gradients", f"{evidence}, {since}.", zero_norms=len(zeros), norms=len(norms), from_step=start)
    elif zeros:
        yield finding("warning", "steps without gradient", f"{evidence}, at {listed(zeros)}, and not around them.")


def nonfinite(record):
    """A loss that stays no number ends learning; a few that pass were skipped. fp16 finds its loss scale by a few overflowing norms."""
    lost = []
    watched = {"loss": "training loss", "eval_loss": "evaluation loss", "grad_norm": "gradient norm", "rate": "learning rate"}
    for name, what in watched.items():
        points = record.series(name, finite=False)
        bad = [step for step, value in points if not math.isfinite(value) and (name != "grad_norm" or step not in lost)]
        lost = set(bad) if name == "loss" else lost  # where the loss is not finite, the norm only follows it
        search = name == "grad_norm" and len(bad) <= max(3, 0.1 * len(points)) and bad and bad[-1] < points[-1][0]
        if bad:
            passing = len(bad) <= 0.1 * len(points) and math.isfinite(points[-1][1])  # NaN that reached the weights would have stayed
            severity, advice = ("note", "fp16 search") if search else ("warning" if passing else "fault", "non-finite")
            told = f"{len(bad):,} of {len(points):,} are NaN or infinite, at {listed(bad)}."
            yield finding(severity, f"non-finite {what}", told, advice)


def zero_loss(record):
    """A language model's loss is never exactly 0.0 but for what rounding leaves of rows known by heart; that of RL has another meaning."""
    losses = record.series("loss")
    zeros = [step for step, loss in losses if loss == 0]
    ending = next((i for i, (_, loss) in enumerate(reversed(losses)) if loss != 0), len(losses))  # zeros in a row at the end
    other = by_heart(record) or record.rewarded or any(loss < 0 for _, loss in losses)
    if (len(zeros) > len(losses) / 2 or ending > 2) and not other:
        yield finding("fault", "loss of zero", f"The training loss is exactly 0.0 in {len(zeros):,} of {len(losses):,} recorded steps.")


def evaluation(record):
    """The rules on evaluations (rules.py): frozen, unmoved adapters, worse than before, growing gap, damage by quantisation, samples."""
    entries, alerts = evaluations(record), config.Alerts()
    if len(entries) < 2:
        yield unjudged("evaluation frozen", f"{words.count(len(entries), 'evaluation')} recorded, and it takes two")
    frozen = [found for upto in range(2, len(entries) + 1) for found in rules.frozen(entries[:upto][-50:], alerts)]
    if frozen:
        yield max(frozen, key=lambda found: found.figures["times"])
    still = [found for upto in range(1, len(entries) + 1) for found in rules.unmoved(entries[:upto])]
    yield from {found.name: found for found in reversed(still)}.values()  # the first of each
    if len(entries) > 1:
        yield from rules.worsened(entries, alerts)
        firsts, passes = [loss for step, loss in record.series("loss") if step <= 10], record.series("epoch")
        began = statistics.median(firsts) if len(firsts) > 5 and not record.rewarded else 0
        covered = lambda entry: max((epoch for step, epoch in passes if step <= entry["step"]), default=2.0)
        yield from [found for entry in entries[1:] for found in rules.unfollowed(entry, entries[0], began, covered(entry))][-1:]
    if len(entries) < 3 or len(record.series("loss")) < 6:
        evals, losses = len(entries), len(record.series("loss"))
        counts = f"{words.count(evals, 'evaluation')} and {words.count(losses, 'training loss')}"
        yield unjudged("gap between training and evaluation", f"{counts}; it takes 3 and 6")
    else:
        yield from rules.gap(entries, alerts)
    if entries:
        yield from rules.coherence(entries, alerts) if entries[-1]["step"] >= 0.5 * record.planned_steps else ()
        if entries[0]["step"] == 0:
            yield from rules.guessing(entries[0]["loss"], "The evaluation loss before training", alerts)
            yield from rules.damage(entries[0], alerts)
            early = [loss for step, loss in record.series("loss") if step <= 10]
            if len(early) > 5 and not record.rewarded:
                yield from rules.disagreement(statistics.median(early), entries[0]["loss"])


def proof(record):
    """What our own gradient proof found, and where it could tell nothing."""
    for line in record.steps:
        if "proof" in line or "proof_outcome" in line:
            yield from rules.proved(line)
        if line.get("proof_outcome", "").startswith("open"):
            yield unjudged(f"gradients of step {line['step']:,}", line["proof_outcome"].partition(": ")[2])


def empty_steps(record):
    """Steps without a supervised token, where the record counts them: they were not applied, and a run of nothing else learns nothing."""
    counts = record.series("supervised")
    if counts:
        yield from rules.empty([count == 0 for _, count in counts], counts[-1][0])


def still_adapters(record):
    """B starts at 0 and an update moves both matrices, so a norm that repeats to the last digit in every recorded step means no update,
    unless the recorded rates between them were nothing."""
    seen, rates = False, record.series("rate")
    for name in ("lora_A norm", "lora_B norm"):
        steps, values = [step for step, _ in record.series(name)], [value for _, value in record.series(name)]
        seen |= len(values) > 1
        spent = [rate for step, rate in rates if steps and steps[0] < step <= steps[-1]]
        idle = bool(spent) and sum(spent) < rules.MOVES
        if len(values) > 1 and len(set(values)) == 1 and not idle:
            yield finding("fault", "adapters never moved", f"The {name} is {values[0]:g} in all {len(values):,} recorded steps.")
    if not seen and not record.series("delta_ratio") and not any("digest" in line for line in record.steps):
        yield unjudged("movement of the adapters", "the record holds no norms, changes or digests of adapters")


def clipping(record):
    known = dict(record.series("clip"))
    pairs = [(norm, known.get(step, record.clip)) for step, norm in record.series("grad_norm")]
    pairs = [(norm, limit) for norm, limit in pairs if 0 < limit < math.inf]
    if len(pairs) >= 20 and any(norm for norm, _ in pairs):
        yield from rules.clipping([norm / limit for norm, limit in pairs], statistics.median(limit for _, limit in pairs), config.Alerts())
    elif record.series("grad_norm") and dead_from(record) is None:
        give = "" if known or record.clip else "; give it as --clip=1.0"
        yield unjudged("clipping", f"it takes 20 gradient norms and the threshold they were clipped at{give}")


def spikes(record):
    for name, what in (("loss", "training loss"), ("grad_norm", "gradient norm")):
        watch, points = rules.Spikes(what, config.Alerts()), [(step, value) for step, value in record.series(name) if value > 0]
        if name == "loss" and record.rewarded:
            continue
        if name == "loss" and record.series("eval_loss")[:1] and record.series("eval_loss")[0][0] == 0:
            watch.expect(record.series("eval_loss")[0][1])
        for step, value in points:
            watch.add(step, value)
        yield from watch.found()
        if 0 < len(points) <= 20:
            yield unjudged(f"spikes of the {what}", f"{words.count(len(points), 'value')}, and it takes more than 20")


def training_loss(record):
    """Divergence, a flat loss, and one above guessing. Medians of tenths against their noise, since two single losses mostly compare two
    handfuls of rows. Flat: a fall below two standard errors, where the noise would have let a fall of 10 % be seen."""
    points = record.series("loss")
    losses = [value for _, value in points]
    figures = fall(losses)
    if record.rewarded:
        yield unjudged("training loss", "the record holds rewards, so it is of reinforcement learning, whose loss does not show progress")
        return
    if figures is None:
        counted = words.count(len(losses), "finite loss")
        yield unjudged("fall of the training loss", f"{counted}, and it takes 6: two single losses compare two handfuls of rows")
        return
    first, last, error = figures
    tenth, alerts, deviation = max(3, len(losses) // 10), config.Alerts(), rules.noise(losses)
    yield from rules.guessing(first, "The median of the first training losses", alerts)
    starts = range(0, len(losses) - tenth + 1, tenth)
    blocks = [rules.block(points[at + tenth - 1][0], losses[at:at + tenth], deviation) for at in starts]
    climbs = list(rules.diverged(blocks, alerts)) if len(blocks) > 2 and first > 0 else []
    yield from climbs
    told = f"Median of the first tenth {first:.4f}, of the last {last:.4f}: a change of {last - first:+.4f}, "
    told += f"with a standard error of {error:.4f}."
    went = rules.course(first, last, error)
    if climbs or by_heart(record) or not any(losses):
        return
    if went == "hidden":
        yield unjudged("fall of the training loss", f"{told} The noise could hide a fall of 10 %; log more often or train longer")
    if went in ("stood", "rose"):
        told += " That is noise." * (abs(last - first) < 2 * error)
        yield finding("warning", "training loss flat" if went == "stood" else "divergence", told, first=first, last=last, error=error)


def learning_rate(record):
    """The sum of the rates bounds how far Adam can carry a weight.

    Ending at nothing is the Trainer's default and a note, unless a tenth of the steps or, below one epoch, unseen rows are given away
    by it. A small area is a note: a whole model needs less than adapters, and the record does not say which it was.
    """
    points = record.series("rate")
    if len(points) < 2:
        yield unjudged("learning rate", "fewer than two learning rates recorded")
        return
    steps, figures, covered = points[-1][0], rules.rate_figures(points, config.Alerts().negligible_rate), coverage(record)
    told = (f"The rates of {steps:,} steps add up to {figures['area']:.3g}, as much as {figures['full_rate_steps']:,.0f} steps "
            f"at the peak of {figures['peak']:.3g}.")
    if figures["area"] <= 0:
        yield finding("fault", "learning rate of zero", "Every recorded rate is 0.", **figures)
    elif figures["negligible_from"]:
        early = covered is not None and covered < 1
        when = f", when at most {covered:.1%} of the rows had been seen." if early else "."
        yield finding("warning" if early or steps - figures["negligible_from"] >= 0.1 * steps else "note", "rate ends at nothing",
                      f"{told} From step {figures['negligible_from']:,} on it is below 1 % of the peak{when}", **figures)
    yield from rules.too_high(figures["peak"])
    partial = steps < record.planned_steps or any(doubt.startswith("steps") for doubt in record.doubts)
    if 0 < figures["area"] < SMALL_AREA and not partial:
        nothing = figures["area"] < SMALL_AREA / 200  # no adapter is moved by that, and hardly a whole model
        yield finding("warning" if nothing else "note", "small rate area",
                      f"The rates add up to {figures['area']:.3g}, which is little for adapters (below {SMALL_AREA:g}).", **figures)


def data_coverage(record):
    """Rows that were never seen taught nothing. It weakens learning in proportion, and by itself it fails no run."""
    covered = coverage(record)
    if covered is None and not record.doubts:
        give = "" if record.rows else "; give the rows of the training set as --rows=N, which helps where samples are recorded"
        yield unjudged("coverage", f"the record holds no epoch{give}")
        return
    last = record.steps[-1]["step"] if record.steps else 0
    planned = covered * record.planned_steps / last if covered and 0 < last < record.planned_steps else covered
    if planned is not None and planned < 1 - 1e-3:
        seen = f": {covered * record.rows:,.0f} of {record.rows:,} rows" if record.rows else ""
        whole = "" if planned == covered else f" All of its {record.planned_steps:,} planned steps would see {planned:.1%}."
        found = finding("warning", "coverage below one epoch", f"The run saw {covered:.1%} of its training rows{seen}.{whole}",
                        coverage=covered)
        if dead_from(record) is not None:
            found.cause = found.cause[:-1] + "; it does not explain a gradient norm of exactly 0.0 or identical evaluations."
        found.remedy = f"For one epoch train {1 / planned:.1f} times as many samples." if planned else "Train longer."
        yield found


def left_open(record):
    """What the run and its format leave open: steps that were planned and are not there, how steps were counted."""
    last = record.steps[-1]["step"] if record.steps else 0
    if 0 < last < record.planned_steps:
        stops = f"the record stops at step {last:,} of {record.planned_steps:,}"
        yield unjudged("the end of the run", f"{stops}: the run goes on, was stopped early, or was killed")
    for doubt in record.doubts:
        name, _, lacking = doubt.partition(": ")
        yield unjudged(name, lacking)


RULES = (dead_gradients, proof, empty_steps, nonfinite, zero_loss, evaluation, still_adapters, training_loss, data_coverage,
         learning_rate, spikes, clipping, left_open)


def diagnose(record):
    """All findings on a Record, the gravest first, what could not be judged last. One name stands once, with all its evidence."""
    merged = {}
    for found in sorted((found for rule in RULES for found in rule(record)), key=lambda found: SEVERITIES.index(found.severity)):
        first = merged.setdefault((found.severity == "unjudged", found.name), found)
        if first is not found and found.evidence not in first.evidence:
            first.evidence += f" {found.evidence}"
    return list(merged.values())


# -------------------------------------------------------------------------------------------------------------- console

def shown(findings):
    """Findings as text of 80 columns."""
    lines = []
    for found in findings:
        if found.severity != "unjudged":
            lines.append(f"\n{found.severity.upper()}: {found.name}")
            for label, text in (("seen", found.evidence), ("cause", found.cause), ("remedy", found.remedy)):
                lines += textwrap.wrap(text, 80, initial_indent=f"  {label:<8}", subsequent_indent=" " * 10, break_on_hyphens=False)
    open_questions = [found for found in findings if found.severity == "unjudged"]
    lines += ["\nNot judged, for lack of data"] if open_questions else []
    for found in open_questions:
        text = f"{found.name}: {found.evidence.rstrip('.')}."
        lines += textwrap.wrap(text, 80, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)


def headline(record, findings):
    """What it comes to, in a sentence or two."""
    faults = list(dict.fromkeys(found.name for found in findings if found.severity == "fault"))
    warnings = list(dict.fromkeys(found.name for found in findings if found.severity == "warning"))
    if not record.steps:
        return "The record is empty: nothing can be judged. Did the run reach its first logged step?"
    if "dead gradients" in faults:
        if dead_from(record) is None and record.series("grad_norm"):
            return ("Dead gradients in a part of the adapters, which learn nothing, at any rate, batch size or number of bits. "
                    "Repair the gradients first; the evidence below names them.")
        since = "This run" if all(norm == 0 for _, norm in record.series("grad_norm")) else f"From step {dead_from(record):,} on this run"
        later = [name for name in warnings if name in ("coverage below one epoch", "rate ends at nothing", "training loss flat")]
        rest = f"; only then look at the rest ({', '.join(later)})" if later else ""
        return (f"Dead gradients. {since} learnt nothing, and could not. Other rates, batch sizes or bits would not have cured it, "
                "nor more steps or more rows, and so none of the three approaches in configs would: every update was made from "
                f"a gradient of zero. Repair the gradients first{rest}.")
    if faults:
        return f"Faulty: {', '.join(faults)}. See to the first fault below before anything else."
    if warnings:
        return f"No fault found, but it learnt less than it could: {', '.join(warnings)}."
    if len(record.series("loss")) < 6 and len(record.series("eval_loss")) < 2:
        return "Too little is recorded to judge this run by, and nothing is wrong in that little."
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
    paths, flags, overrides = config.command_line(argv, {"rows": "", "clip": "", "json": False, "help": False})
    if flags["help"]:
        print(__doc__.strip())
        return 0
    if len(paths) != 1 or overrides:
        raise ValueError("usage: python health.py PATH [--rows=N] [--clip=X] [--json], "
                         "with a trainer_state.json, a metrics.jsonl or a folder as PATH")
    record = logs.read(paths[0])
    record.rows, record.clip = whole_number(flags["rows"], "rows", int), whole_number(flags["clip"], "clip", float)
    findings = diagnose(record)
    last = record.steps[-1]["step"] if record.steps else 0
    if flags["json"]:
        finite = lambda figures: {name: value for name, value in figures.items() if not isinstance(value, float) or math.isfinite(value)}
        plain = [{**vars(found), "figures": finite(found.figures)} for found in findings]
        print(json.dumps({"record": record.kind, "steps": last, "planned_steps": record.planned_steps,
                          "headline": headline(record, findings), "findings": plain}, indent=1))
        return 0
    counted = {"loss": "loss", "grad_norm": "gradient norm", "eval_loss": "evaluation"}
    counts = ", ".join(words.count(len(record.series(name, finite=False)), what) for name, what in counted.items())
    upto = f"up to step {last:,}" + (f" of {record.planned_steps:,}" if record.planned_steps > 0 else "")
    print(paths[0])
    print("\n".join(textwrap.wrap(f"{record.kind}, {upto}: {counts}", 80)))
    print("\n" + "\n".join(textwrap.wrap(headline(record, findings), 80, break_on_hyphens=False)))
    print(shown(findings))
    return 0


if __name__ == "__main__":
    config.run_command(main)
