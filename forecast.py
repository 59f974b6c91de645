"""Will it learn: what a run of these settings on these rows comes to, before it begins.

    before = forecast(config, Facts.of(rows, eval_rows))                        no model needed
    after = forecast(config, dataclasses.replace(facts, trainable=..., ...))    once a step was probed
    print(show_forecast(after)); refused = refusals(after, config.forecast)     not empty: exit code 3

Two severities. "refuse": what provably cannot learn or does not fit. "warning": what learns less than it could, which by itself
fails no run: with correct gradients, the settings of the failed run (8.9 % coverage, rates that add up to 0.0125) took
SmolLM2-135M in NF4 from an evaluation loss of 4.58 to 2.62 in 500 steps. docs/HEALTH.md states each rule with its reason.
Leaves out: guesses. Memory and time are told where they were measured. Imports no torch.
"""
import math
import re
import textwrap
from dataclasses import dataclass, field

import schedule
import words
from rules import HIGH_RATE, Finding, rate_figures

SMALL_AREA = 0.02      # see docs/HEALTH.md for these: a twentieth of what QLoRA's own recipe sums to
MANY_EPOCHS = 20
FEW_SUPERVISED = 0.03  # of all tokens
CUT, CUT_TOKENS, LOST = 0.10, 0.05, 0.05  # of the rows; of the supervised tokens; of the rows
LEAKED, DUPLICATE = 0.01, 0.10  # of the evaluation rows; of the training rows, or of the evaluation rows
LONG_WARMUP = 0.5      # of the steps
NEARLY_FULL = 0.95     # of the memory
KNOWN = ("By itself that fails no run: with correct gradients, settings of 8.9 % coverage and area 0.0125 took SmolLM2-135M in NF4 "
         "from an evaluation loss of 4.58 to 2.62 in 500 steps.")


@dataclass(frozen=True)
class Facts:
    """What is known of rows, model and a probed step; None where it is not known (yet)."""
    rows: int                             # training rows that were kept
    tokens: int
    supervised_tokens: int
    eval_rows: int | None = None
    eval_repeats: int = 0                 # evaluation rows whose tokens are those of an earlier one
    longest: int | None = None            # tokens of the longest row
    counts: dict = field(default_factory=dict)   # data.Rows.counts: rows_read, rows_truncated, rows_lost, …
    audit: dict = field(default_factory=dict)    # {check: rows} of data's audit: duplicate, near_duplicate, leak
    trainable: int | None = None          # trainable parameters
    memory: dict = field(default_factory=dict)   # {part: bytes}, such as weights, adapters, optimizer, activations
    peak_bytes: int | None = None         # most memory in use in a probed step
    available_bytes: int | None = None
    step_seconds: float | None = None     # of a probed step

    @classmethod
    def of(cls, rows, eval_rows=None):
        """Facts of two data.Rows."""
        longest = int((rows.offsets[1:] - rows.offsets[:-1]).max()) if len(rows) else 0
        evaluated, counts = None if eval_rows is None else len(eval_rows), rows.counts
        bounds = zip(eval_rows.offsets, eval_rows.offsets[1:]) if evaluated else ()
        distinct = {hash(eval_rows.ids[start:end].tobytes()) for start, end in bounds}
        repeats = (evaluated or 0) - len(distinct)
        return cls(len(rows), counts["tokens"], counts["supervised_tokens"], evaluated, repeats, longest, counts, rows.audit)


@dataclass
class Forecast:
    figures: dict       # by name, for programs; see forecast()
    findings: list      # rules.Finding, severity "refuse" before "warning"
    acknowledged: list  # names of warnings that the configuration knows and accepts


def forecast(config, facts):
    """The Forecast of a run of `config` (config.Config) with `facts`: a pure function.

    figures: rows, eval_rows, longest, epochs and coverage (samples / rows: 1.42 is 142 %), samples, steps, steps_per_epoch, tokens_seen,
    supervised_tokens_seen, supervised_share, cut_share, lost_share, unsupervised_share, skipped_share, supervised_tokens_lost_share, peak,
    floor, area (sum of the rates), full_rate_steps (area / peak), negligible_from (first step below 1 % of the peak for good; 0: none),
    warmup_share, rates ([(step, rate)]: the curve), trainable, memory, memory_total, peak_bytes, available_bytes, step_seconds, seconds;
    None where not known.
    """
    counts, findings = facts.counts, []
    refuse = lambda *texts: findings.append(Finding("refuse", *texts))
    warn = lambda *texts: findings.append(Finding("warning", *texts))
    steps, samples = schedule.plan_steps(config, max(1, facts.rows))
    stride = max(1, steps // 20_000)
    points = [(step, schedule.learning_rate(step, config.schedule, steps)) for step in [*range(1, steps, stride), steps]]
    rates, read = rate_figures(points), counts.get("rows_read") or facts.rows
    share = lambda name, whole: counts[name] / whole if name in counts and whole else None
    per_row = samples / facts.rows if facts.rows else 0.0
    lost_tokens = counts.get("supervised_tokens_lost", 0)
    f = {"rows": facts.rows, "eval_rows": facts.eval_rows, "longest": facts.longest, "epochs": per_row, "coverage": per_row,
         "samples": samples, "steps": steps, "steps_per_epoch": steps / per_row if per_row else None,
         "samples_per_step": (schedule.samples_at(1, config), schedule.samples_at(steps, config)),
         "tokens_seen": round(facts.tokens * per_row), "supervised_tokens_seen": round(facts.supervised_tokens * per_row),
         "supervised_share": facts.supervised_tokens / facts.tokens if facts.tokens else 0.0,
         "cut_share": share("rows_truncated", facts.rows), "lost_share": share("rows_lost", read),
         "skipped_share": share("rows_skipped", read), "unsupervised_share": share("rows_unsupervised", facts.rows),
         "supervised_tokens_lost_share": lost_tokens / (lost_tokens + facts.supervised_tokens) if lost_tokens else 0.0,
         **rates, "warmup_share": min(1.0, config.schedule.lr_warmup_steps / steps), "rates": points, "floor": config.schedule.lr_min,
         "trainable": facts.trainable, "memory": facts.memory, "memory_total": sum(facts.memory.values()) if facts.memory else None,
         "peak_bytes": facts.peak_bytes, "available_bytes": facts.available_bytes, "step_seconds": facts.step_seconds,
         "seconds": None if facts.step_seconds is None else facts.step_seconds * steps}
    area = f"The rates of {steps:,} steps add up to {f['area']:.3g}, as much as {f['full_rate_steps']:,.0f} steps at the peak"
    gone = f["supervised_tokens_lost_share"]

    if facts.supervised_tokens <= 0:
        refuse("nothing supervised", f"{facts.rows:,} rows hold no supervised token.",
               "The loss counts no token, so every gradient is zero.",
               "See that the rows hold answers, and that data.max_length does not cut them off.")
    if facts.trainable is not None and facts.trainable <= 0:
        refuse("nothing trainable", "The model has no trainable parameter.", "The optimizer holds nothing that a gradient could change.",
               "Name projections of this model in lora.targets.")
    if f["area"] <= 0:
        refuse("rate of zero", "The learning rate is 0 at every step.", "An update of rate 0 changes nothing.",
               "Set schedule.learning_rate above 0.")
    elif config.schedule.lr_warmup_steps >= max(2, steps):
        refuse("warm-up as long as the run", f"{config.schedule.lr_warmup_steps:,} steps of warm-up in a run of {steps:,}.",
               "The run would end before its rate has reached the peak that was asked for.",
               f"--schedule.lr_warmup_steps={steps // 10}, or train longer.")
    need = facts.peak_bytes or f["memory_total"]
    if need and facts.available_bytes and need > facts.available_bytes:
        measured = ", measured by a step over the longest rows," if facts.peak_bytes else ""
        refuse("more memory than there is", f"{gib(need)} are needed{measured} and {gib(facts.available_bytes)} are there.",
               "It would fail later, at the longest rows.",
               "Lower memory.max_tokens, raise memory.checkpoint_layers, or set memory.keep_dequantized=no.")

    if 0 < samples < facts.rows:
        warn("coverage below one epoch", f"{samples:,} samples are {per_row:.1%} of {facts.rows:,} rows.",
             f"Rows that are never seen teach nothing. {KNOWN}",
             f"For one epoch at this batch size: --train.max_steps={math.ceil(steps * facts.rows / samples)}.")
    if per_row > MANY_EPOCHS:
        warn("many epochs", f"Every row is seen {per_row:.0f} times.",
             "After some passes the rows are learnt by heart, and the evaluation gets worse.",
             f"For five: --train.max_steps={math.ceil(5 * steps / per_row)}; watch the evaluation loss (eval.patience ends the run by it).")
    if 0 < f["area"] < SMALL_AREA:
        warn("small rate area", f"{area}, below {SMALL_AREA:g}.",
             "The sum of the rates bounds how far Adam can carry an adapter's weight. By itself that fails no run.",
             "More steps, or a higher schedule.learning_rate.")
    if f["negligible_from"] and f["area"] > 0:
        warn("rate ends at nothing", f"From step {f['negligible_from']:,} of {steps:,} on the rate is below 1 % of its peak.",
             "Those steps teach next to nothing.",
             f"A floor of a tenth of the peak: --schedule.lr_min={f['peak'] / 10:g}.")
    if f["peak"] > HIGH_RATE:
        warn("high rate", f"The rate rises to {f['peak']:.3g}.",
             "One step of Adam then moves each weight of B by about as much as the weights of A are large, and training usually diverges.",
             "Adapters train at 1e-4 to 1e-3.")
    if LONG_WARMUP < f["warmup_share"] and config.schedule.lr_warmup_steps < max(2, steps):
        warn("long warm-up", f"{f['warmup_share']:.0%} of the steps warm up.", "Most of the run goes by below the rate that was asked for.",
             f"--schedule.lr_warmup_steps={steps // 10}.")
    if 0 < f["supervised_share"] < FEW_SUPERVISED:
        warn("few supervised tokens",
             f"{facts.supervised_tokens:,} of {facts.tokens:,} tokens, {f['supervised_share']:.1%}, are supervised.",
             "Nearly all of the work is spent on tokens that the loss does not count, or the answers were not found.",
             "See that the answers are whole (data.max_length) and found by the chat template; or data.supervise=all.")
    if (f["cut_share"] or 0) > CUT or gone > CUT_TOKENS:
        warn("heavy truncation",
             f"{f['cut_share'] or 0:.1%} of the rows are cut at data.max_length, and {gone:.1%} of the supervised tokens are lost by it.",
             "A cut answer has no end, so the model is not taught to stop there.", f"Raise data.max_length (now {config.data.max_length}).")
    lost = sum(f[name] or 0 for name in ("lost_share", "skipped_share", "unsupervised_share"))
    if lost > LOST:
        warn("rows lost", f"{lost:.1%} of the rows teach nothing: {f['lost_share'] or 0:.1%} lost to data.max_length, "
             f"{f['skipped_share'] or 0:.1%} could not be read, {f['unsupervised_share'] or 0:.1%} hold no supervised token.",
             "Whole rows are missing from training, often the long ones.",
             "Raise data.max_length, mend the rows, or look at the chat template.")
    leaked, twice = facts.audit.get("leak", 0), facts.audit.get("duplicate", 0) + facts.audit.get("near_duplicate", 0)
    if leaked > LEAKED * (facts.eval_rows or facts.rows):
        warn("leaked rows", f"{leaked:,} training rows stand among the {facts.eval_rows or 0:,} evaluation rows too, the same or nearly.",
             "The evaluation then measures what was learnt by heart, and looks better than it is.",
             "--data.drop=leak; python data.py CONFIG --check shows them.")
    if twice > DUPLICATE * facts.rows:
        warn("duplicate rows", f"{twice:,} of {facts.rows:,} training rows repeat an earlier one, or nearly.",
             "A row that stands twice is learnt twice: more epochs for some rows than were asked for.",
             "--data.drop=duplicate,near_duplicate; python data.py CONFIG --check shows them.")
    if facts.eval_repeats > DUPLICATE * (facts.eval_rows or math.inf):
        warn("duplicate evaluation rows", f"{facts.eval_repeats:,} of {facts.eval_rows:,} evaluation rows are the same as an earlier one.",
             "They count twice, and tell nothing twice: the verdict's intervals, which take rows for independent, are then too narrow.",
             "Leave each of them once in data.eval.")
    if facts.peak_bytes and facts.available_bytes and NEARLY_FULL * facts.available_bytes < facts.peak_bytes <= facts.available_bytes:
        warn("memory nearly full", f"A step takes {gib(facts.peak_bytes)} of {gib(facts.available_bytes)}.",
             "Fragmentation or a neighbour on the same device ends such runs.",
             "Lower memory.max_tokens a little.")
    return Forecast(f, findings, list(config.forecast.acknowledge))


def refusals(outcome, forecast_config):
    """The findings of a Forecast for which a run is refused (exit code 3): what cannot learn, and with strict (of config.forecast) every
    warning that acknowledge does not name."""
    return [found for found in outcome.findings
            if found.severity == "refuse" or forecast_config.strict and found.name not in forecast_config.acknowledge]


def as_json(outcome):
    """A Forecast as plain JSON-ready data: {"figures", "findings", "acknowledged"}, the curve of the rate thinned to 200 points."""
    points = outcome.figures["rates"]
    thinned = [points[at * (len(points) - 1) // 199] for at in range(200)] if len(points) > 200 else points
    findings = [vars(found) for found in outcome.findings]
    return {"figures": outcome.figures | {"rates": thinned}, "findings": findings, "acknowledged": outcome.acknowledged}


# -------------------------------------------------------------------------------------------------------------- console

def gib(size):
    """Bytes in words."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def duration(seconds):
    """Seconds in words of two figures or so."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 2 else f"{seconds:.2g} seconds"


def curve(points, columns, height=4):
    """Lines of text that draw [(step, rate)]: the mean of the rates that fall into each column, in eighths of a line."""
    last, top, columns = points[-1][0], max(rate for _, rate in points) or 1.0, max(1, min(columns, points[-1][0]))
    sums = [[0.0, 0] for _ in range(columns)]
    for step, rate in points:
        column = sums[min(columns - 1, (step - 1) * columns // last)]
        column[0], column[1] = column[0] + rate, column[1] + 1
    heights = [round(8 * height * total / count / top) if count else 0 for total, count in sums]
    return ["".join(" ▁▂▃▄▅▆▇█"[max(0, min(8, level - 8 * row))] for level in heights) for row in reversed(range(height))]


def show_forecast(outcome, width=80):
    """A Forecast as text of at most `width` columns: figures, the curve of the rate, then what is refused or warned of."""
    f, lines, indent = outcome.figures, [], 10

    def tell(what, *sentences):
        for sentence in sentences:
            sentence = re.sub(r"(?<=\d) (?=[KMG]iB)", "\u00a0", sentence)  # a number and its unit stay on one line
            wrapped = textwrap.wrap(sentence, width, initial_indent=f"{what:<{indent}}", subsequent_indent=" " * indent,
                                    break_on_hyphens=False)
            lines.extend(line.replace("\u00a0", " ") for line in wrapped)
            what = ""

    small, large = f["samples_per_step"]
    sizes = f"{small:,}" if small == large else f"{small:,} to {large:,}"
    told = {"cut_share": "cut at data.max_length", "lost_share": "lost to it", "skipped_share": "could not be read",
            "unsupervised_share": "without a supervised token"}
    shares = [f"{f[name]:.1%} {what}" for name, what in told.items() if f[name]]
    tell("rows", f"{f['rows']:,} to train on" + (f", {f['eval_rows']:,} to evaluate on" if f["eval_rows"] is not None else "")
         + (f"; the longest has {f['longest']:,} tokens" if f["longest"] else ""), *([", ".join(shares)] if shares else []))
    share = f"{f['coverage']:.1%} of them" if f["coverage"] < 10 else f"all of them {f['coverage']:,.0f} times"
    tell("seen", f"{share}: {f['samples']:,} samples in {f['steps']:,} steps of {sizes}"
         + (f"; an epoch is {words.count(round(f['steps_per_epoch']), 'step')}" if f["steps_per_epoch"] else ""),
         f"{f['supervised_tokens_seen']:,} supervised tokens, {f['supervised_share']:.1%} of all")
    below = f"below 1 % of it from step {f['negligible_from']:,} on" if f["negligible_from"] else "never below 1 % of it after the warm-up"
    tell("rate", f"peak {f['peak']:.3g}, floor {f['floor']:.3g}; {f['warmup_share']:.1%} of the steps warm up",
         f"adds up to {f['area']:.3g}: {f['full_rate_steps']:,.0f} steps at the peak; {below}")
    drawn = curve(f["rates"], width - indent - 11)
    for label, line in zip([f"{f['peak']:.2g}", *[""] * (len(drawn) - 2), "0"], drawn):
        lines.append((" " * indent + f"{label:>8} |{line}").rstrip())
    under = f"step 1{f['steps']:>{min(width - indent - 11, f['steps']) - 5},}" if f["steps"] > 12 else f"steps 1 to {f['steps']}"
    lines.append(" " * (indent + 9) + under)
    if f["trainable"] is not None:
        tell("training", f"{f['trainable']:,} parameters")
    if f["memory"]:
        tell("memory", ", ".join(f"{part} {gib(size)}" for part, size in f["memory"].items()))
    if f["peak_bytes"]:
        there = f", of {gib(f['available_bytes'])}" if f["available_bytes"] else ""
        tell("" if f["memory"] else "memory", f"{gib(f['peak_bytes'])} in the probed step{there}")
    if f["seconds"] is not None:
        tell("time", f"{duration(f['seconds'])}, at {f['step_seconds']:.3g} seconds a step as probed, without evaluations")
    for severity, heading in (("refuse", "REFUSED"), ("warning", "WARNING")):
        for found in outcome.findings:
            if found.severity == severity and not (severity == "warning" and found.name in outcome.acknowledged):
                lines.append(f"\n{heading}: {found.name}")
                for label, text in (("seen", found.evidence), ("reason", found.cause), ("remedy", found.remedy)):
                    lines += textwrap.wrap(text, width, initial_indent=f"  {label:<8}", subsequent_indent=" " * 10, break_on_hyphens=False)
    known = [found.name for found in outcome.findings if found.severity == "warning" and found.name in outcome.acknowledged]
    if known:
        lines.append("")
        lines += textwrap.wrap(f"acknowledged: {', '.join(known)}", width)
    return "\n".join(lines)
