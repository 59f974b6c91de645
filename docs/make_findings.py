"""Make every table and picture of docs/FINDINGS.md, and README's first results, from the records under docs/findings/.

    python docs/make_findings.py            rewrite what stands between `<!-- made: NAME -->` and `<!-- end -->`, and the pictures
    python docs/make_findings.py --check    exit code 1 where FINDINGS.md is not what the records say
    python docs/make_findings.py --from=FOLDER --page=FILE     other records, another page (its pictures lie beside it)

The records are what bench/findings.py keeps of its runs. Intervals are those of compare.py and verdict.py: evaluation rows drawn with
replacement, the same draw on both sides. Where a setting ran with several seeds, each row's loss is first averaged over them. A
difference is called clear where its interval excludes 0 and it is larger than what seeds alone do in 95 of 100 cases, by Student's t and
the deviation between seeds, pooled over all settings that have several. What was not run is called so.
"""
import json
import math
import pathlib
import re
import sys
import types

import numpy as np
import scipy.interpolate
import scipy.stats

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import compare
import config as settings
import record
import schedule
import verdict
import words

SEEDS = ("", "-s0", "-s1", "-s2")
NOT_RUN = "not run"
DASH = "–"


# ------------------------------------------------------------------------------------------------------------- records

def read(folder):
    """{name: run} of all experiments kept in `folder`: {"name", "summary", "config", "verdict", "metrics", "evaluations", "generation",
    "rows"}."""
    runs = {}
    for path in sorted(folder.glob("*/summary.json")):
        here, name = path.parent, path.parent.name
        trees = {part: compare.read_json(here / f"{part}.json") for part in ("summary", "config", "verdict", "generation", "rows")}
        runs[name] = trees | {"name": name, "evaluations": record.read_evaluations(here),
                              "metrics": record.read_metrics(here) if (here / "metrics.jsonl").is_file() else []}
    return runs


def seeds_of(runs, name):
    """The runs of an experiment, one a seed; [] where none was run."""
    return [runs[name + seed] for seed in SEEDS if name + seed in runs]


def last(run):
    """The last evaluated step."""
    return max((step for step in run["evaluations"] if type(step) is int), default=None)


def rows_of(found, step=None):
    """What each evaluation row came to after `step` (None: the last), averaged over runs that differ in their seed; None where not
    recorded."""
    arrays = [run["evaluations"].get(last(run) if step is None else step, (None,))[0] for run in found]
    arrays = [a for a in arrays if a is not None]
    if not arrays:
        return None
    same = all(np.array_equal(a["tokens"], arrays[0]["tokens"]) for a in arrays)
    if not same:
        raise ValueError(f"{', '.join(run['name'] for run in found)}: were not evaluated on the same rows")
    return {"tokens": arrays[0]["tokens"].astype(float)} | {key: np.mean([a[key] for a in arrays], axis=0) for key in ("nll", "correct")}


def against(reference, others):
    """compare.differences of row figures from `reference`: [None or its entry] for each of `others` (None where there are none)."""
    if reference is None:
        return [None] * len(others)
    known = [other for other in others if other is not None]
    for other in known:
        if not np.array_equal(other["tokens"], reference["tokens"]):
            raise ValueError("runs that were evaluated on different rows cannot be compared")
    pretended = [{"path": "docs/findings", "evaluations": {0: arrays}} for arrays in (reference, *known)]
    entries = iter(compare.differences(pretended, [0] * len(pretended))[1:])
    return [None if other is None else next(entries) for other in others]


def loss(run, step=None):
    arrays = rows_of([run], step)
    return math.nan if arrays is None else compare.loss_of(arrays)


def several(runs):
    """{setting: the last evaluation losses of its seeds} of those that ran with several."""
    names = sorted({re.sub(r"-s\d$", "", name) for name in runs if re.search(r"-s\d$", name)})
    losses = {name: [value for value in map(loss, seeds_of(runs, name)) if math.isfinite(value)] for name in names}
    return {name: values for name, values in losses.items() if len(values) > 1}


def seed_deviation(runs, without=()):
    """(standard deviation of the last evaluation loss between seeds, its degrees of freedom), pooled over all settings that ran with
    several, but those named in `without`. (NaN, 0) where there is none."""
    groups = [values for name, values in several(runs).items() if name not in without]
    freedom = sum(len(values) - 1 for values in groups)
    return (math.sqrt(sum(np.var(values) * len(values) for values in groups) / freedom), freedom) if freedom else (math.nan, 0)


def seed_noise(deviation, freedom, seeds):
    """How large a difference between `seeds` = (runs here, runs there) seeds alone make in 95 of 100 cases; 0 where that is not known."""
    return float(scipy.stats.t.ppf(0.975, freedom)) * deviation * math.sqrt(1 / seeds[0] + 1 / seeds[1]) if freedom else 0.0


def sense(gap, noise):
    """lower, higher or unclear: of a loss difference beside what seeds alone make of it."""
    word = compare.sense(gap)
    return "unclear" if word in ("lower", "higher") and abs(gap["value"]) < noise else word


# -------------------------------------------------------------------------------------------------------------- pieces

def named(findings, worst="note"):
    """Names of findings, those below `worst` left out."""
    grave = ("refuse", "fault", "warning", "note")
    names = dict.fromkeys(found["name"] for found in findings if grave.index(found["severity"]) <= grave.index(worst))
    return ", ".join(names) or "nothing"


def spread(values, form=".4f"):
    """A figure, or the mean of several and their standard deviation."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    if not values:
        return DASH
    return f"{np.mean(values):{form}}" + (f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else "")


def gap_cells(entry, found, reference, deviation):
    """A loss difference, its interval, and what it says, as cells. A run that is one of the reference's, bit for bit, shows nothing."""
    if entry is None or entry["loss_difference"] is None:
        return [DASH, DASH, DASH]
    if any(np.array_equal(rows_of([ours])["nll"], rows_of([theirs])["nll"]) for ours in found for theirs in reference):
        return [DASH, DASH, "the same run, bit for bit"]
    noise = seed_noise(*deviation, (len(found), len(reference)))
    return [*compare.difference(entry["loss_difference"], 1, ".4f"), sense(entry["loss_difference"], noise)]


def asked_for(found):
    """What bench/findings.py is called with to run these again: an experiment's name, or a pattern where it ran with several seeds."""
    pattern = re.sub(r"-s\d$", "-s*", found[0]["name"]) if found else ""
    return f"`{pattern}`" if len(found) > 1 else f"`{found[0]['name']}`" if found else DASH


def differences_table(runs, what, reference, names, more=None):
    """A table of settings against the first. names: {row's label: experiment}; more: {heading: {row's label: cell}} of further columns."""
    deviation, base = seed_deviation(runs), seeds_of(runs, reference[1])
    groups = {label: seeds_of(runs, name) for label, name in names.items()}
    entries = against(rows_of(base) if base else None, [rows_of(found) if found else None for found in groups.values()])
    rows = []
    for label, found, entry in [(reference[0], base, None), *((*group, entry) for group, entry in zip(groups.items(), entries))]:
        cells = [len(found), spread(map(loss, found)), *gap_cells(entry, found, base, deviation)] if found else [NOT_RUN, *[DASH] * 4]
        rows.append([label, *cells, *(column.get(label, DASH) for column in (more or {}).values()), asked_for(found)])
    return words.table([what, "seeds", "eval loss", "difference", "95% interval", "says", *(more or ()), "experiment"], rows)


def figure(value, form, scale=1.0):
    return DASH if value is None or not math.isfinite(value) else f"{scale * value:{form}}"


def evaluated(run, step):
    """The evaluation loss that the record gives for a step; NaN where it has none."""
    return next((verdict.number(line["eval/loss"]) for line in run["metrics"] if line["step"] == step and "eval/loss" in line), math.nan)


def accuracy(run, step=None):
    arrays = rows_of([run], step)
    return math.nan if arrays is None else float(arrays["correct"].sum() / arrays["tokens"].sum())


def outcome(run, which):
    return run["verdict"].get("sets", {}).get(which, DASH)


# -------------------------------------------------------------------------------------------------------------- blocks

def proofs_of(run):
    """What the gradient proof found at each step where it was made: the ratio, or why there is none."""
    found = []
    for line in run["metrics"]:
        if "proof/ratio" in line or "proof/outcome" in line:
            outcome, _, why = line.get("proof/outcome", "").partition(": ")
            ratio = verdict.number(line.get("proof/ratio", math.nan))
            why = f" ({why.partition(': ')[0]})" if why else ""
            found.append(f"{f'{ratio:.3f}' if math.isfinite(ratio) else (outcome or 'no gradient') + why} at step {line['step']:,}")
    return ", ".join(found) or "not made"


def said(runs):
    """What the tools say of the failed run's settings, as they were and with a cut graph; the failed run's own record first."""
    state = json.loads((PROJECT / "docs" / "examples" / "failed-run" / "trainer_state.json").read_text())["log_history"]
    trained, evals = [line["loss"] for line in state if "loss" in line], [line["eval_loss"] for line in state if "eval_loss" in line]
    norm = max(line.get("grad_norm", 0.0) for line in state)
    rows = [["the failed run, as reported", f"{norm:.1f}", f"{trained[0]:.4f} → {trained[-1]:.4f}",
             " ".join(f"{value:.4f}" for value in evals), DASH, DASH]]
    told = []
    for label, name in (("seed-failure", "seed-failure-s0"), ("cut, guards on", "cut"), ("cut, guards off", "cut-unguarded")):
        run = runs.get(name)
        if run is None:
            rows.append([label, NOT_RUN, *[DASH] * 4])
            told.append(f"- {label}: {NOT_RUN}.")
            continue
        about = run["summary"]
        norms = figure(about["norm"][0], ".3g") + " to " + figure(about["norm"][2], ".3g") if about["norm"][0] is not None else DASH
        trend = " → ".join(figure(value, ".4f") for value in about["loss"]) if about["loss"][0] is not None else DASH
        evaluated = " ".join(f"{line['eval/loss']:.4f}" for line in run["metrics"] if "eval/loss" in line)
        rows.append([label, norms, trend, evaluated, about["exit"], f"`{name}`"])
        tools = (f"forecast {named(about['forecast'])}; gradient proof {proofs_of(run)}; alerts {named(about['alerts'])}; health.py "
                 f"{named(about['diagnosis'])}")
        told.append(words.prose(f"{label}: {tools}; verdict {run['verdict']['outcome']} (milestone {outcome(run, 'milestone')}).", "- "))
    head = ["run", "gradient norms", "training loss", "evaluation losses", "exit code", "experiment"]
    return words.table(head, rows) + "\n\n" + "\n".join(told)


CURES = {"rate 1e-4": "cure-rate", "batch 32": "cure-batch", "floor 1e-5": "cure-floor", "2,000 steps": "cure-steps"}


def cures(runs):
    return differences_table(runs, "changed", ("nothing", "seed-failure"), CURES | {"all, approach 1": "approach1"})


def unmet(run):
    """The criteria of minimum and optimal that a run did not pass, by name, with how they came out."""
    wanted = [found for found in run["verdict"].get("criteria", [])
              if found["set"] in ("minimum", "optimal") and found["outcome"] != "PASS"]
    return ", ".join(f"{found['set']} {found['name']} {found['outcome']}" for found in wanted)


def approaches(runs, names=("approach1", "approach2", "approach3")):
    rows, prices = [], []
    for name in names:
        found = seeds_of(runs, name)
        if not found:
            rows.append([name, NOT_RUN, *[DASH] * 9])
            continue
        first = found[0]
        trained = " → ".join(figure(value, ".4f") for value in first["summary"]["loss"])
        puzzled = " → ".join(figure(math.exp(value), "#.3g") for value in (loss(first, 0), loss(first)))
        lowest, at = min((line["eval/loss"], line["step"]) for line in first["metrics"] if "eval/loss" in line)
        right = f"{figure(accuracy(first, 0), '.4f')} → {spread(map(accuracy, found))}"
        rows.append([name, len(found), trained, figure(loss(first, 0), ".4f"), spread(map(loss, found)), f"{lowest:.4f}, step {at:,}",
                     puzzled, right, outcome(first, "minimum"), outcome(first, "optimal"), asked_for(found)])
        about, tail = first["summary"], first["metrics"][-1]
        prices.append([name, *(figure(norm, ".3g") for norm in about["norm"]), figure(about["clipped"], ".0%"),
                       figure(tail.get("adapters/delta_ratio"), ".4f"), figure(about["step_seconds"], ".1f", 1000),
                       figure(about["train_seconds"], ".0f"), figure(about["seconds"], ".0f") + ("" if about["alone"] else "*"),
                       figure(about["peak_memory_gib"], ".1f")])
    tables = [words.table(["run", "seeds", "training loss", "eval loss before", "after", "lowest, seed 0", "perplexity", "token accuracy",
                           "minimum", "optimal", "experiment"], rows)]
    if prices:
        head = ["run", "least norm", "median", "largest", "clipped", "ΔW/W", "ms a step", "s in steps", "s in all", "peak GiB"]
        note = ("Training loss (medians of the first and last 25 steps), perplexity, norms, ΔW/W (‖ΔW‖/‖W‖, mean of the modules), verdicts "
                "and times are of seed 0. A star: others ran beside it on the same GPU, so its times are too long.")
        short = [f"{name}: {failed}." for name in names if (found := seeds_of(runs, name)) and (failed := unmet(found[0]))]
        tables += [words.table(head, prices), words.prose(note)]
        tables += [words.prose(f"Criteria that did not pass. {' '.join(short)}")] if short else []
    return words.paragraphs(*tables)


def approach1(runs):
    """Approach 1's evaluations by step, after those of the untouched model."""
    run = runs.get("approach1-s0")
    if run is None:
        return f"({NOT_RUN}.)"
    row = lambda label, value, right: [label, f"{value:.4f}", figure(math.exp(value), "#.3g"), f"{right:.4f}"]
    first, *later = [line for line in run["metrics"] if "eval/loss" in line]
    rows = []
    if "eval/unquantised_loss" in first:
        rows.append(row("untouched, 16 bits", first["eval/unquantised_loss"], first["eval/unquantised_token_accuracy"]))
    rows += [row(label, line["eval/loss"], line["eval/token_accuracy"])
             for label, line in (("untouched, NF4 (step 0)", first), *((f"step {line['step']:,}", line) for line in later))]
    return words.table(["", "loss", "perplexity", "token accuracy"], rows)


UNTRAINED = {"16 bits": "bits-none-s0", "int8, weights only": "bits-int8-s0", "LLM.int8()": "approach3", "NF4": "bits-single-s0",
             "NF4, double": "approach1-s0"}


def untrained(runs):
    """{weights: (row figures before step 1 or None, their difference from 16 bits or None)}."""
    arrays = [rows_of([runs[name]], 0) if name in runs else None for name in UNTRAINED.values()]
    if arrays[0] is None and "approach1-s0" in runs:  # the same model, measured before that run
        arrays[0] = rows_of([runs["approach1-s0"]], "unquantised")
    return dict(zip(UNTRAINED, zip(arrays, against(arrays[0], arrays))))


def bits_before(runs):
    """What quantising costs the untrained model, from the evaluations before step 1."""
    rows = []
    for label, (found, entry) in untrained(runs).items():
        if found is None:
            rows.append([label, NOT_RUN, *[DASH] * 4])
            continue
        gap = entry["loss_difference"] if entry and label != "16 bits" else None
        right = found["correct"].sum() / found["tokens"].sum()
        rows.append([label, f"{compare.loss_of(found):.4f}", *compare.difference(gap, 1, ".4f"), f"{right:.4f}",
                     f"`{UNTRAINED[label]}`"])
    return words.table(["weights", "loss", "cost", "95% interval", "token accuracy", "step 0 of"], rows)


def bits_after(runs):
    names = {"int8, weights only": "bits-int8", "NF4": "bits-single", "NF4, double": "approach1"}
    found, before, told = {label: seeds_of(runs, name) for label, name in names.items()}, untrained(runs), []
    base = seeds_of(runs, "bits-none")
    entries = against(rows_of(base) if base else None, [rows_of(group) if group else None for group in found.values()])
    for label, entry in zip(found, entries):
        cost = before[label][1]
        if entry and cost and cost["loss_difference"]:
            was, now, gap = cost["loss_difference"]["value"], entry["loss_difference"]["value"], entry["loss_difference"]
            told_apart = not gap["low"] <= 0 <= gap["high"]
            left = f": {now / was:.0%} of it is left" if told_apart else ": none is left that could be told"
            share = left if was > 0.01 and (now > 0 or not told_apart) else ""
            told.append(words.prose(f"{label}: {was:+.4f} nats before training, {now:+.4f} after{share}.", "- "))
    ours, cost = seeds_of(runs, "approach1"), before["NF4, double"][1]
    early, plain = (mean(lambda run: evaluated(run, 500), group) if group else math.nan for group in (ours, base))
    if cost and math.isfinite(early - plain):
        was, gained, still = cost["loss_difference"]["value"], loss(ours[0], 0) - early, early - plain
        told.append(words.prose(f"NF4, double, by step 500: {still:+.4f}, {still / was:.0%} of it, so {(was - still) / gained:.0%} of the "
                                f"{gained:.4f} nats gained until then are its repair.", "- "))
    return words.paragraphs(differences_table(runs, "weights", ("16 bits", "bits-none"), names), "\n".join(told))


FACTORS = {"r 32, alpha 64": "factor-rank", "rsLoRA": "factor-rslora", "no k_proj": "factor-targets", "dropout 0.1": "factor-dropout",
           "these four": "factor-all-but-bits", "approach 3: and LLM.int8()": "approach3"}


def factors(runs):
    return differences_table(runs, "changed", ("nothing, approach 1", "approach1"), FACTORS)


def clean(runs):
    """Rows left out against all rows, and what answers of one word were good for: on evaluation rows with such an answer and on others."""
    table = differences_table(runs, "rows", ("all", "approach1"), {"without them": "clean", "nor answers of one word": "clean-words"})
    found, control = seeds_of(runs, "clean-words"), rows_of(seeds_of(runs, "clean"))
    without, numbers = rows_of(found), found[0]["rows"].get("one_word", []) if found else []
    if control is None or without is None or not numbers:
        return table
    single, told = np.isin(np.arange(len(control["tokens"])), numbers), []
    for chosen, name in ((single, "answers of one word"), (~single, "others")):
        theirs, ours = ({key: values[chosen] for key, values in arrays.items()} for arrays in (control, without))
        value, span = compare.difference(against(theirs, [ours])[0]["loss_difference"], 1, ".4f")
        whole = " → ".join(f"{(arrays['correct'] == arrays['tokens']).sum():,}" for arrays in (theirs, ours))
        told.append(f"on the {chosen.sum():,} {name} {value} nats ({span}), {whole} of them right in every token")
    return words.paragraphs(table, words.prose("What the answers of one word alone change, the last line against the one above it: "
                                               f"{'; '.join(told)}."))


SCHEDULES = {"cosine to 0": "schedule-zero", "cosine, floor 3e-5": "schedule-floor-3e-5", "WSD, floor 1e-5": "schedule-wsd",
             "constant": "schedule-constant", "batch 16, then 48": "schedule-growing-batch",
             "clipped at the median": "schedule-adaptive-clip", "not clipped": "schedule-no-clip"}


def schedules(runs):
    return differences_table(runs, "schedule", ("cosine, floor 1e-5", "approach1"), SCHEDULES)


RATES = {"2e-4": "rate-2e-4", "5e-4": "rate-5e-4", "1e-3": "rate-1e-3", "2e-3": "rate-2e-3"}
AT_5E_4 = {"cosine to 0": "rate-5e-4-zero", "WSD, floor 5e-5": "rate-5e-4-wsd", "constant": "rate-5e-4-constant",
           "not clipped": "rate-5e-4-clip-off"}


def rates(runs):
    """Higher rates against approach 1's, and the schedules again at one of them."""
    return words.paragraphs(differences_table(runs, "rate, floor a tenth of it", ("1e-4, approach 1", "approach1"), RATES),
                            differences_table(runs, "schedule at 5e-4", ("cosine, floor 5e-5", "rate-5e-4"), AT_5E_4))


SHAPES = {"cosine to 0": ("schedule-zero", "rate-5e-4-zero"), "cosine, a higher floor": ("schedule-floor-3e-5",),
          "WSD": ("schedule-wsd", "rate-5e-4-wsd"), "constant": ("schedule-constant", "rate-5e-4-constant")}


def rate_area(run):
    """The learning rates of all of a run's steps, summed: how far Adam can carry a weight at most."""
    section = types.SimpleNamespace(**run["config"]["schedule"])
    steps = run["config"]["train"]["max_steps"]
    return sum(schedule.learning_rate(step, section, steps) for step in range(1, steps + 1))


def mean(of, group):
    """of(run), averaged over runs that differ in their seed."""
    return float(np.mean([of(run) for run in group]))


def cosines(runs, of):
    """(of(run), evaluation loss) of the cosines with a tenth as floor, by the former: arrays of equal length."""
    found = [group for group in (seeds_of(runs, name) for name in ("approach1", *RATES.values())) if group]
    points = sorted((mean(of, group), mean(loss, group)) for group in found)
    return np.array(points).reshape(-1, 2).T


def beside_cosines(places, losses, own):
    """The loss that a cosine would have at `own`, between the places (areas, or how far adapters moved) of those that were run, float64
    (n,) both: (straight in the place's logarithm, along monotone cubics through the same points: Fritsch and Carlson 1980); NaN beyond."""
    at, known = math.log(own), np.log(places)
    curve = scipy.interpolate.PchipInterpolator(known, losses)
    if own < places[0]:  # a little below the smallest: along the first piece
        slope = (losses[1] - losses[0]) / (known[1] - known[0])
        return (losses[0] + slope * (at - known[0]), float(curve(at))) if own > 0.9 * places[0] else (math.nan, math.nan)
    return (float(np.interp(at, known, losses)), float(curve(at))) if own <= places[-1] else (math.nan, math.nan)


def cosine_cells(runs, name, of, form, known):
    """of(run) of an experiment, its loss, that less the loss of a cosine alike in it (in two ways), and its name, as cells; None without.

    known: `cosines(runs, of)`.
    """
    group, (places, losses) = seeds_of(runs, name), known
    if not group or len(places) < 2 or not np.isfinite([mean(of, group), *places]).all():
        return None
    own, reached = mean(of, group), mean(loss, group)
    off = [figure(reached - there, "+.4f") for there in beside_cosines(places, losses, own)]
    return [f"{own:{form}}", f"{reached:.4f}", *off, asked_for(group)]


def area(runs):
    """The other shapes beside a cosine of the same rate area: its loss is read between those that were run, in two ways."""
    peak = lambda name: f"{seeds_of(runs, name)[0]['config']['schedule']['learning_rate']:g}"
    known = cosines(runs, rate_area)
    rows = [[label, peak(name), *cells] for label, names in SHAPES.items() for name in names
            if (cells := cosine_cells(runs, name, rate_area, ".3f", known))]
    head = ["shape", "peak", "rate area", "eval loss", "beside a cosine, straight", "smooth", "experiment"]
    return words.table(head, rows) if rows else f"({NOT_RUN}.)"


def distance(run):
    """How far a run moved its adapters: ||delta W|| / ||W||, mean of the modules, at its last evaluation; NaN where not recorded."""
    return next((line["adapters/delta_ratio"] for line in reversed(run["metrics"]) if "adapters/delta_ratio" in line), math.nan)


MOVED = {"rsLoRA": "factor-rslora", "r 32, alpha 64": "factor-rank", "WSD, floor 1e-5": "schedule-wsd", "constant": "schedule-constant",
         "batch 16, then 48": "schedule-growing-batch"}


def moved(runs):
    """What changed how far adapters move at approach 1's rate, beside a cosine at a rate with which they moved as far."""
    known = cosines(runs, distance)
    rows = [[label, *cells] for label, name in MOVED.items() if (cells := cosine_cells(runs, name, distance, ".4f", known))]
    head = ["approach 1 with", "ΔW/W", "eval loss", "beside a cosine, straight", "smooth", "experiment"]
    return words.table(head, rows) if rows else f"({NOT_RUN}.)"


def peers(runs):
    names = {"TRL, PEFT, bitsandbytes": "peer-trl", "the same, adapters in fp32": "peer-trl-fp32", "Unsloth": "peer-unsloth"}
    measured = {row["who"]: row for row in json.loads((PROJECT / "bench" / "results" / "h100.json").read_text()) if row["case"] == "E"}
    rows, spent, alone = [], {}, {}
    for label, who in (("rawlora", "rawlora"), ("TRL, PEFT, bitsandbytes", "trl"), ("Unsloth", "unsloth")):
        row = measured[who]
        middle, (low, high) = 1000 * row["step_seconds"], (1000 * value for value in row["step_seconds_quartiles"])
        alone[label] = f"{middle:.1f}"
        rows.append([label, f"{middle:.1f} ({low:.1f} to {high:.1f})", row["timed_steps"], f"{row['samples_per_second']:,.0f}",
                     f"{row['peak_memory_gib']:.1f}"])
    for label, name in {"rawlora": "ours-500", **names}.items():
        if found := seeds_of(runs, name)[:1]:
            about = found[0]["summary"]
            spent[label] = f"{figure(about.get('train_seconds'), '.0f')} ({figure(about.get('step_seconds'), '.0f', 1000)})"
    table = differences_table(runs, "trainer", ("rawlora", "ours-500"), names, {"s (ms a step)*": spent, "alone": alone})
    note = ("s (ms a step)*: seconds in the 500 steps of this run, of seed 0, and its median step, others beside it on the GPU, CUDA "
            "graphs recorded and kernels compiled in it. alone: ms, median step of case E, below.")
    head = ["alone on the GPU", "ms, median step (quartiles)", "steps", "samples/s", "peak GiB"]
    return words.paragraphs(table, words.prose(note) if spent else "", words.table(head, rows))


def paths(runs):
    """Runs with and without the fast paths, and the untrained model as both of them see it."""
    fast, slow, before = runs.get("fast-200-s0"), runs.get("slow-200-s0"), ""
    if fast and slow and (entry := against(rows_of([fast], 0), [rows_of([slow], 0)])[0]) and entry["loss_difference"]:
        value, span = compare.difference(entry["loss_difference"], 1, ".4f")
        before = words.prose(f"Before training the same rows come to {loss(fast, 0):.4f} with them and {loss(slow, 0):.4f} without, "
                             f"{value} ({span}).")
    return words.paragraphs(differences_table(runs, "200 steps of approach 1", ("fast paths on", "fast-200"), {"off": "slow-200"}), before)


def gsm8k(runs):
    curve, told = runs.get("gsm8k"), []
    for rate, name in (("1e-4", "gsm8k-early"), ("5e-4", "gsm8k-early-5e-4")):
        run = runs.get(name)
        if run is None:
            told.append(f"at {rate} {NOT_RUN} (`{name}`)")
            continue
        ended, planned = run["summary"]["steps"], run["config"].get("train", {}).get("max_steps")
        lowest, at = min((line["eval/loss"], line["step"]) for line in run["metrics"] if "eval/loss" in line)
        how = f"did not end before its last step, {ended:,}" if ended == planned else f"ended after step {ended:,}"
        after = [f"{line['eval/loss']:.4f}" for line in run["metrics"] if "eval/loss" in line and line["step"] > at]
        risen = f", {' and '.join(after)} after it" if after else ""
        told.append(f"at {rate} the run {how}, its lowest evaluation loss {lowest:.4f} at step {at:,}{risen} (`{name}`)")
    early, pair = f"Early stopping, patience 2 on evaluations every 100 steps: {'; '.join(told)}.", ("gsm8k-early", "gsm8k-early-5e-4")
    slow, fast = (rows_of([runs[name]]) if name in runs else None for name in pair)
    if slow is not None and fast is not None:
        value, span = compare.difference(against(slow, [fast])[0]["loss_difference"], 1, ".4f")
        early += f" The latter's end against the former's: {value} nats ({span})."
    evals = [line for line in curve["metrics"] if "eval/loss" in line] if curve else []
    rows = [[f"{line['step']:,}", f"{line['eval/loss']:.4f}", f"{line['eval/token_accuracy']:.4f}"] for line in evals]
    steps = words.table(["step", "eval loss", "token accuracy"], rows) if rows else ""
    return words.paragraphs(approaches(runs, ("gsm8k",)), steps, words.prose(early))


def early(runs):
    """Where `eval.patience` would have ended approach 2, read off its evaluations."""
    run = runs.get("approach2")
    if run is None:
        return f"Approach 2: {NOT_RUN}."
    evals = [(line["step"], line["eval/loss"]) for line in run["metrics"] if "eval/loss" in line]
    best = [int(np.argmin([value for _, value in evals[:count]])) for count in range(1, len(evals) + 1)]  # as of each evaluation
    told = []
    for patience in (1, 2):
        ended = next((place for place, at in enumerate(best) if place - at == patience), None)
        told.append(f"patience {patience} would not have ended it" if ended is None else
                        f"patience {patience} would have ended it after step {evals[ended][0]:,} "
                        f"with step {evals[best[ended]][0]:,} as the best")
    return words.prose(f"Approach 2's evaluations every {evals[1][0]:,} steps, {', '.join(f'{value:.4f}' for _, value in evals)}: "
                       f"{'; '.join(told)}.")


def generation(runs):
    kinds = {"untouched, 16 bits": "generation-before-bf16", "untouched, NF4": "generation-before", "approach 1": "generation-after"}
    rows = []
    for label, name in kinds.items():
        if name not in runs:
            rows.append([label, NOT_RUN, *[DASH] * 4])
            continue
        found = runs[name]["generation"]["commands"]
        hits = [sum(bool(row[key]) for row in found) for key in ("exact", "stopped")]
        spans = [verdict.binomial_interval(count, len(found), 0.95) for count in hits]
        shares = [f"{count / len(found):.1%} ({low:.1%} to {high:.1%})" for count, (low, high) in zip(hits, spans)]
        rows.append([label, len(found), *shares, f"{np.mean([row['overlap'] for row in found]):.3f}", f"`{name}`"])
    table = words.table(["model", "commands", "exactly right", "stopped", "overlap", "experiment"], rows)
    written = {label: {sample["prompt"]: sample for sample in runs[name]["generation"]["prompts"]}
               for label, name in kinds.items() if name in runs}
    told = lambda sample: (sample["text"].strip() or "(nothing)") + ("" if sample["stopped"] else " … (did not stop)")
    prompts = [line for line in (PROJECT / "bench" / "prompts.txt").read_text().splitlines() if line] if written else []
    blocks = [words.side_by_side(prompt, {label: told(samples[prompt]) for label, samples in written.items()}) for prompt in prompts]
    return words.paragraphs(table, *blocks)


def machine(runs):
    """How many experiments there are and how many were run."""
    import importlib.util
    spec = importlib.util.spec_from_file_location("findings", PROJECT / "bench" / "findings.py")
    findings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(findings)
    names = [experiment.name for experiment in findings.experiments()]
    missing = [name for name in names if name not in runs]
    text = f"{len(names) - len(missing)} of {len(names)} experiments have been run."
    deviation, freedom = seed_deviation(runs)
    if freedom:
        deviations = {name: float(np.std(values, ddof=1)) for name, values in several(runs).items()}
        widest, (rest, degrees) = max(deviations, key=deviations.get), seed_deviation(runs, (max(deviations, key=deviations.get),))
        others = f": {deviations[widest]:.4f} in `{widest}`, {rest:.4f} in all others" if degrees else ""
        text += f" Between seeds alone the last evaluation loss deviates by {deviation:.4f} nats ({freedom} degrees of freedom){others}."
    return words.prose(text + (f" Not run: {', '.join(missing)}." if missing and len(missing) < len(names) else ""))


def results(runs):
    """What mattered most, a sentence each, of what was run."""
    told, paired = [], lambda entry: compare.difference(entry["loss_difference"], 1, ".4f")
    failed = seeds_of(runs, "seed-failure")
    if failed and (entry := against(rows_of(failed[:1], 0), [rows_of(failed)])[0]):
        value, span = paired(entry)
        told.append(f"The failed run's settings, with gradients that are right ({asked_for(failed)}): evaluation loss "
                    f"{loss(failed[0], 0):.4f} → {spread(map(loss, failed))}, {value} ({span}).")
    for name in ("approach1", "approach2", "approach3", "gsm8k"):
        found = seeds_of(runs, name)
        if found:
            plain = rows_of(found[:1], "unquantised")
            against_plain = f" ({compare.loss_of(plain):.4f} untouched in 16 bits)" if plain else ""
            told.append(f"{asked_for(found)}: evaluation loss {loss(found[0], 0):.4f} → {spread(map(loss, found))}{against_plain}, "
                        f"token accuracy {accuracy(found[0], 0):.4f} → {spread(map(accuracy, found))}; minimum "
                        f"{outcome(found[0], 'minimum')}, optimal {outcome(found[0], 'optimal')}.")
    plain, ours, theirs = seeds_of(runs, "bits-none"), seeds_of(runs, "approach1"), seeds_of(runs, "peer-trl")
    if plain and ours:
        before, after = untrained(runs)["NF4, double"][1], against(rows_of(plain), [rows_of(ours)])[0]
        told.append(f"NF4 with double quantisation costs {paired(before)[0]} nats ({paired(before)[1]}) before training, "
                    f"{paired(after)[0]} ({paired(after)[1]}) after it, against 16 bits trained alike ({asked_for(plain)})."
                    if before else "")
    high = {label: seeds_of(runs, name) for label, name in RATES.items() if seeds_of(runs, name)}
    if ours and high:
        label = min(high, key=lambda label: compare.loss_of(rows_of(high[label])))
        value, span = paired(against(rows_of(ours), [rows_of(high[label])])[0])
        others, noise = {other: found for other, found in high.items() if other != label}, lambda found: (len(found), len(high[label]))
        gaps = against(rows_of(high[label]), [rows_of(found) for found in others.values()])
        alike = [f"{other} ({words.count(len(found), 'seed')})" for (other, found), gap in zip(others.items(), gaps)
                 if sense(gap["loss_difference"], seed_noise(*seed_deviation(runs), noise(found))) == "unclear"]
        told.append(f"Of {len(high)} higher rates in approach 1 {label} came out lowest ({asked_for(high[label])}): evaluation loss "
                    f"{spread(map(loss, high[label]))}, {value} nats ({span})"
                    f"{f'; {words.listed(alike)} cannot be told from it' if alike else ''}.")
    mine, in_fp32 = seeds_of(runs, "ours-500"), seeds_of(runs, "peer-trl-fp32")
    if mine and theirs:
        value, span = paired(against(rows_of(mine), [rows_of(theirs)])[0])
        same = ""
        if in_fp32:
            value_fp32, span_fp32 = paired(against(rows_of(mine), [rows_of(in_fp32)])[0])
            same = f"; {value_fp32} ({span_fp32}) with its adapters in fp32, as ours are"
        told.append(f"TRL, PEFT and bitsandbytes on the same rows in the same order ({asked_for(theirs)}): {value} nats ({span}) "
                    f"beside ours after 500 steps{same}.")
    return "\n".join(words.prose(sentence, "- ") for sentence in told if sentence) or "No experiment has been run yet."


def first_screen(runs):
    """README's three results: what the failed run was, what approach 1 comes to, what a peer makes of the same."""
    failed, cut, ours = runs.get("seed-failure-s0"), runs.get("cut-unguarded"), seeds_of(runs, "approach1")
    mine, theirs, told = seeds_of(runs, "ours-500"), seeds_of(runs, "peer-trl"), []
    if failed and cut:
        frozen = {f"{line['eval/loss']:.4f}" for line in cut["metrics"] if "eval/loss" in line}
        least, most = (figure(failed["summary"]["norm"][which], ".3g") for which in (0, 2))
        told.append(f"A failed run (500 steps, gradient norm 0.0, evaluation loss the same three times) again by its settings: loss "
                    f"{loss(failed, 0):.2f} → {loss(failed):.2f}, norms {least} to {most}. Again with the graph cut: norm "
                    f"{cut['summary']['norm'][2]:.1f}, evaluation loss {', '.join(sorted(frozen))} each time. Batch, rate and steps "
                    "alone do not make such a record; here such a run ends before its first step.")
    if ours:
        first, plain = ours[0], rows_of(ours[:1], "unquantised")
        alone = f" in {first['summary']['seconds']:.0f} s from command to exit" if first["summary"]["alone"] else ""
        untouched = f" ({compare.loss_of(plain):.2f} in 16 bits)" if plain else ""
        higher = seeds_of(runs, "rate-1e-3")
        faster = f"; at ten times its rate {spread(map(loss, higher), '.3f')} ({words.count(len(higher), 'seed')})" if higher else ""
        told.append(f"Approach 1, 2,000 steps on one H100{alone}: loss on pages never seen {loss(first, 0):.2f} untouched in 4 "
                    f"bits{untouched} → {spread(map(loss, ours), '.3f')}, token accuracy {accuracy(first, 0):.2f} → "
                    f"{spread(map(accuracy, ours), '.3f')}, {len(ours)} seeds{faster}.")
    in_fp32, unsloth = seeds_of(runs, "peer-trl-fp32"), seeds_of(runs, "peer-unsloth")
    if mine and theirs and in_fp32 and unsloth:
        value, span = compare.difference(against(rows_of(mine), [rows_of(theirs)])[0]["loss_difference"], 1, ".3f")
        told.append("The same rows in the same order, 500 steps: "
                    f"loss {spread(map(loss, mine), '.3f')} here ({len(mine)} seeds, one of each peer), "
                    f"{spread(map(loss, unsloth), '.3f')} by Unsloth, {spread(map(loss, in_fp32), '.3f')} by TRL with PEFT and "
                    f"bitsandbytes if its adapters are kept in fp32, and {spread(map(loss, theirs), '.3f')} ({value}, {span}) if they are "
                    "in bf16, to which it casts them by itself.")
    return "\n".join(words.prose(sentence, "- ") for sentence in told) or "No experiment has been run yet."


BLOCKS = {"state": machine, "results": results, "first-screen": first_screen, "said": said, "cures": cures, "approaches": approaches,
          "approach1": approach1, "bits-before": bits_before, "bits-after": bits_after, "factors": factors, "clean": clean,
          "schedules": schedules, "rates": rates,
          "area": area, "moved": moved, "early": early, "peers": peers, "gsm8k": gsm8k, "generation": generation, "paths": paths}


# ------------------------------------------------------------------------------------------------------------ pictures

def draw_curves(runs, path, names, near=False):
    """Evaluation loss by step (marks) over the training loss (thin) of seed 0 of each experiment. names: {label: experiment}. near: in a
    second panel the evaluations after step 0 alone, of runs that learnt."""
    import plots
    known = {label: seeds_of(runs, name)[0] for label, name in names.items() if seeds_of(runs, name) and seeds_of(runs, name)[0]["metrics"]}
    if not known:
        return False
    colors = [plots.TRAIN, plots.EVAL, "#3a8f5c", "#8e5bb5", "#b8860b", "#17808e", "#a3456f", "#555555"]
    with plots.sheet(path, columns=1 + near, height=4.2) as axes:
        for number, (label, run) in enumerate(known.items()):
            values = {tag: np.array([(line["step"], verdict.number(line[tag])) for line in run["metrics"] if tag in line]).reshape(-1, 2)
                      for tag in ("train/loss", "eval/loss")}
            how = dict(color=colors[number % 8], marker="os^vDPX*"[number % 8], linestyle=":", linewidth=1, markersize=5, label=label)
            axes[0].plot(*values["train/loss"].T, color=colors[number % 8], linewidth=0.8, alpha=0.4)
            axes[0].plot(*values["eval/loss"].T, **how)
            first, *later = values["eval/loss"]
            if near and later and later[-1][1] < first[1] - 0.1:
                axes[1].plot(*np.array(later).T, **how)
        for axis, title in zip(axes, ("evaluation (marks), training (thin)", "evaluation alone, after step 0")):
            axis.set(xlabel="step", ylabel="loss (nats a token)")
            axis.set_title(title)
    return True


def draw_differences(runs, path):
    """Every setting's loss difference from approach 1 with its interval; what seeds alone do as a band."""
    import plots
    names = {"int8": "bits-int8", "16 bits": "bits-none", "NF4, not double": "bits-single", **FACTORS, "rows cleaned": "clean",
             "nor answers of one word": "clean-words", **SCHEDULES,
             **{f"rate {rate}": name for rate, name in RATES.items()}, **{f"5e-4, {label}": name for label, name in AT_5E_4.items()}}
    base = seeds_of(runs, "approach1")
    known = {label: seeds_of(runs, name) for label, name in names.items() if seeds_of(runs, name)}
    if not base or not known:
        return False
    entries, deviation = against(rows_of(base), [rows_of(found) for found in known.values()]), seed_deviation(runs)
    with plots.sheet(path, height=0.9 + 0.28 * len(known)) as (axis,):
        for place, (label, entry) in enumerate(zip(known, entries)):
            gap = entry["loss_difference"]
            axis.plot([gap["low"], gap["high"]], [place, place], color=plots.TRAIN, linewidth=2)
            axis.plot(gap["value"], place, "o", color=plots.EVAL, markersize=5)
        if noise := seed_noise(*deviation, (1, len(base))):
            axis.axvspan(-noise, noise, color="#eeeeee", zorder=0, label="what another seed alone does (one run)")
        axis.axvline(0, color=plots.GREY, linewidth=0.8)
        axis.set_yticks(range(len(known)), known)
        axis.set_ylim(len(known) - 0.5, -0.5)
        axis.set_xlabel("evaluation loss less that of approach 1 (nats a token)")
    return True


def draw_area(runs, path):
    """Evaluation loss by rate area, a mark a run of 2,000 steps of 32; the cosines with a floor of a tenth joined by a line."""
    import plots
    areas, losses = cosines(runs, rate_area)
    if len(areas) < 2:
        return False
    peaks = sorted({run["config"]["schedule"]["learning_rate"] for name in ("approach1", *RATES.values()) for run in seeds_of(runs, name)})
    with plots.sheet(path, height=3.8) as (axis,):
        axis.plot(areas, losses, "o-", color=plots.TRAIN, markersize=5, label="cosine, a tenth as floor (with its peak rate)")
        for place, value, peak in zip(areas, losses, peaks):
            axis.annotate(f"{peak:g}", (place, value), xytext=(0, -13), textcoords="offset points", ha="right", fontsize=8,
                          color=plots.TRAIN)
        for mark, color, (label, names) in zip("v^sD", (plots.EVAL, "#3a8f5c", "#8e5bb5", "#b8860b"), SHAPES.items()):
            points = np.array([(rate_area(run), loss(run)) for name in names for run in seeds_of(runs, name)]).reshape(-1, 2)
            axis.plot(*points.T, mark, color=color, markersize=7, label=label)
        axis.margins(y=0.12)
        axis.set(xscale="log", xlabel="rate area: the rates of all steps, summed", ylabel="evaluation loss (nats a token)")
    return True


FAILURES = {"as it was": "seed-failure", "graph cut": "cut-unguarded", **CURES}
APPROACHES = {"approach 1": "approach1", "approach 2": "approach2", "approach 3": "approach3"}
PICTURES = {"failure": lambda runs, path: draw_curves(runs, path, FAILURES, near=True),
            "approaches": lambda runs, path: draw_curves(runs, path, APPROACHES), "differences": draw_differences, "area": draw_area}


def filled(page, runs, folder=None):
    """The page with every block made anew. folder: where pictures are written; None: none are."""
    for name in re.findall(r"<!-- made: ([\w-]+) -->", page):
        if name.startswith("picture-"):
            kind = name.removeprefix("picture-")
            file = f"findings-{kind}.png"
            drawn = PICTURES[kind](runs, folder / file) if folder else file in page
            text = f"![{kind}]({file})" if drawn else f"(Picture: {NOT_RUN}.)"
        elif name in BLOCKS:
            text = BLOCKS[name](runs)
        else:
            raise ValueError(f"there is no block called {name}; there are "
                             f"{', '.join([*BLOCKS, *('picture-' + kind for kind in PICTURES)])}")
        page = re.sub(rf"(<!-- made: {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{text}\n{m[2]}", page, count=1, flags=re.S)
    return page


def main(argv):
    _, flags, _ = settings.command_line(argv, {"from": "", "page": "", "check": False, "help": False})
    if flags["help"]:
        print(__doc__.strip())
        return 0
    runs, wrong = read(pathlib.Path(flags["from"] or PROJECT / "docs" / "findings")), 0
    for page in [pathlib.Path(flags["page"])] if flags["page"] else [PROJECT / "docs" / "FINDINGS.md", PROJECT / "README.md"]:
        text = page.read_text(encoding="utf-8")
        made = filled(text, runs, None if flags["check"] else page.parent)
        if flags["check"]:
            print(f"{page}: {'as the records say' if made == text else 'not what the records say; run python docs/make_findings.py'}")
            wrong += made != text
            continue
        page.write_text(made, encoding="utf-8")
        print(f"{page}: made from {len(runs)} experiments")
    return int(wrong > 0)


if __name__ == "__main__":
    settings.run_command(main)
