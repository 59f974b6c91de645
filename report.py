"""What a run's record says, as a page: RUN/report.md with RUN/curves.png.

    python report.py runs/approach1                          report.md and curves.png in that folder
    python report.py runs/approach1 --picture loss.png       only a picture of the loss

Reads metrics.jsonl, config.json and environment.json, and nothing else: it can be made of a run that is still going, was
interrupted, or lies on another machine. First and last figures are medians over several steps, since single steps are
noise. Leaves out: whether the run did well (it states figures, no verdict), and comparing runs.
"""
import html
import json
import math
import pathlib
import re

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects

import config as settings
import record

TRAIN, EVAL, GREY = "#2f6db3", "#d1622b", "#666666"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.labelcolor": "#333333",
         "axes.grid": True, "grid.color": "#e8e8e8", "axes.axisbelow": True, "legend.frameon": False, "figure.dpi": 130}
ALWAYS = ("model.path", "model.quant", "model.compute_dtype", "lora.r", "lora.alpha", "lora.dropout", "lora.targets", "data.train", "data.eval", "train.seed", "train.micro_batch_size",
          "train.accumulation", "train.max_steps", "schedule.learning_rate", "schedule.lr_min", "schedule.lr_kind", "schedule.lr_warmup_steps", "schedule.clip_norm")


def read_run(run):
    """(metrics, settings by "section.key", environment) of a run folder. Raises ValueError naming the file that cannot be read."""
    metrics, trees = record.read_metrics(run), []
    if not metrics:
        raise ValueError(f"{run}: metrics.jsonl holds no finished step yet, so there is nothing to report; wait for the first one")
    for path in (pathlib.Path(run) / "config.json", pathlib.Path(run) / "environment.json"):
        try:
            trees.append(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON ({error}); the run wrote it, restore it or remove it") from None
    return metrics, {f"{section}.{key}": value for section, values in trees[0].items() for key, value in values.items()}, trees[1]


def series(metrics, tag):
    """(steps, values) of the lines that hold `tag`, NaN and infinities among them: int64 (n,) and float64 (n,)."""
    points = [(line["step"], line[tag]) for line in metrics if tag in line]
    return np.array([step for step, _ in points], np.int64), np.array([value for _, value in points], np.float64)


def median(values):
    """Median of the finite ones; NaN if there is none."""
    finite = np.asarray(values)[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def running_median(values, width):
    """At each point the median of the `width` points around it, float64 (n,). Fewer at the ends: as many after a point as before it
    at the start, where a loss falls fast and later points would pull it down; only earlier ones at the end."""
    half = width // 2
    return np.array([median(values[max(0, i - half):i + min(half, max(i, 2)) + 1]) for i in range(len(values))])


def edge(values):
    """How many points at each end a first or last median is taken over: 25, or a quarter of a short run."""
    return min(25, len(values) // 4) or 1


# ------------------------------------------------------------------------------------------------------------ pictures

def draw_loss(axis, metrics):
    """Training loss as a thin line with its running median, evaluations as labelled points, steps without a finite loss as marks below."""
    steps, losses = series(metrics, "train/loss")
    finite = np.isfinite(losses)
    draw_steps(axis, steps, losses, "training")
    if not finite.all():
        axis.plot(steps[~finite], np.full((~finite).sum(), 0.02), "x", color="black", markersize=5, transform=axis.get_xaxis_transform(), label="loss not finite")
    draw_points(axis, *series(metrics, "eval/loss"), "evaluation", min)
    axis.set(xlabel="step", ylabel="loss (nats a token)")
    if axis.has_data():
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.2, columnspacing=1.2, handlelength=1.5, fontsize=9)  # beside the title, over no point


def draw_steps(axis, steps, values, what):
    """Every step as a thin line with its running median; a short run as points."""
    if len(steps) < 20:
        axis.plot(steps, values, color=TRAIN, linewidth=1.2, marker=".", label=what)
        return
    width = max(9, min(101, len(steps) // 20)) | 1
    axis.plot(steps, values, color=TRAIN, alpha=0.3, linewidth=0.7, label=what)
    axis.plot(steps, running_median(values, width), color=TRAIN, linewidth=2, label=f"median of {width} steps")


def draw_points(axis, steps, values, label, best):
    """Evaluations as points; first, last and best carry their values, and so do all where they are few."""
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):
        return
    axis.plot(steps, values, "o:", color=EVAL, linewidth=1, markersize=6, label=label)
    labelled = range(len(values)) if len(values) <= 6 else sorted({0, values.tolist().index(best(values)), len(values) - 1})
    for i in labelled:
        axis.annotate(f"{values[i]:.3f}", (steps[i], values[i]), xytext=(0, 7), textcoords="offset points", ha="left" if i == 0 else "center", fontsize=9, fontweight="bold", color=EVAL,
                      path_effects=[patheffects.withStroke(linewidth=3, foreground="white")])
    axis.margins(y=0.12)


def draw_norms(axis, metrics):
    """Gradient norm before clipping, with the threshold it was clipped at."""
    (steps, norms), (_, threshold) = series(metrics, "train/grad_norm"), series(metrics, "train/clip_threshold")
    draw_steps(axis, steps, norms, "norm")
    if np.isfinite(threshold).any():
        axis.plot(steps, np.where(np.isfinite(threshold), threshold, np.nan), color="black", linestyle="--", linewidth=1, marker="_" if len(steps) == 1 else None, label="clipped above")
    if len(steps):
        axis.legend(loc="best", fontsize=9)
    positive = norms[np.isfinite(norms)]
    if len(positive) and positive.min() > 0 and positive.max() > 20 * positive.min():
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)


def draw(metrics, title, path, loss_only=False):
    """Write curves.png, or only its loss, to `path`."""
    with plt.rc_context(STYLE):
        if loss_only:
            figure, loss = plt.subplots(figsize=(8, 4), layout="constrained")
        else:
            figure, axes = plt.subplot_mosaic([["loss"] * 3, ["accuracy", "rate", "norm"]], figsize=(11, 7.2), height_ratios=[1.5, 1], layout="constrained")
            loss = axes["loss"]
            draw_points(axes["accuracy"], *series(metrics, "eval/token_accuracy"), "evaluation", max)
            draw_norms(axes["norm"], metrics)
            steps, rates = series(metrics, "train/learning_rate")
            axes["rate"].plot(steps, rates, color=TRAIN, marker="." if len(steps) < 20 else None)
            axes["rate"].set_ylim(bottom=0)
            axes["rate"].yaxis.set_major_formatter(lambda rate, _: f"{rate:.1e}".replace("e-0", "e-") if rate else "0")
            for name, heading in (("accuracy", "token accuracy, evaluation"), ("rate", "learning rate"), ("norm", "gradient norm before clipping")):
                axes[name].set(title=heading, xlabel="step")
            if not axes["accuracy"].has_data():
                axes["accuracy"].text(0.5, 0.5, "no evaluation recorded", transform=axes["accuracy"].transAxes, ha="center", color=GREY)
        draw_loss(loss, metrics)
        loss.set_title(title)
        for axis in figure.axes:
            axis.set_xlim(-0.03 * max(1, metrics[-1]["step"]), 1.03 * max(1, metrics[-1]["step"]))
            axis.xaxis.get_major_locator().set_params(integer=True)
        figure.savefig(path)
        plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------- text

def short(name):
    """A file or model name without the folders of the machine it lay on."""
    return "/".join(pathlib.PurePath(name).parts[-2:]) if name else "none"


def title_of(config, metrics):
    model = [pathlib.PurePath(config["model.path"]).name, config["model.quant"]] if config else ["model not recorded"]
    return ", ".join([*model, f"{metrics[-1]['step']:,} step" + "s" * (metrics[-1]["step"] != 1)])


def cell(text, longest=500):
    """Text a model wrote as one table cell: cut, and nothing in it taken for Markdown or HTML."""
    text = html.escape(text.strip()[:longest] + (" …" if len(text.strip()) > longest else ""), quote=False)
    return re.sub(r"([\\`*_\[\]~$#])", r"\\\1", text).replace("|", "&#124;").replace("\r", "").replace("\n", "<br>") or "(nothing)"


def table(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def remarks(metrics, config):
    """What the record shows of the run's end and of its gaps, as sentences."""
    steps, losses = series(metrics, "train/loss")
    eval_steps, eval_losses = series(metrics, "eval/loss")
    last, planned, epochs = metrics[-1]["step"], config.get("train.max_steps", 0), config.get("train.epochs", 0)
    passed = series(metrics, "train/epoch")[1]
    if planned:
        yield f"{last:,} of {planned:,} planned steps are recorded." + ("" if last >= planned else " The run is not at its end: it goes on, was interrupted, or stopped early.")
    elif epochs and len(passed):
        yield f"{passed[-1]:.2f} of {epochs:g} planned epochs are recorded, in {last:,} steps."
    else:
        yield f"{last:,} steps are recorded; how many were planned is not."
    if len(steps) < last:
        yield f"{last - len(steps):,} of these steps have no line in the record."
    if len(steps) < 8:
        yield f"{len(steps)} training steps are too few to say whether the loss falls." if len(steps) != 1 else "One training step says nothing about whether the loss falls."
    if not np.isfinite(losses).all():
        bad = steps[~np.isfinite(losses)]
        yield f"The training loss is not finite in {len(bad):,} of {len(steps):,} steps ({', '.join(map(str, bad[:5]))}{', …' if len(bad) > 5 else ''}); medians leave them out."
    skipped = int(np.nansum(series(metrics, "train/skipped")[1]))
    if skipped:
        yield f"{skipped:,} steps were not applied, so the weights did not move there."
    zero = steps[series(metrics, "train/grad_norm")[1] == 0] if "train/grad_norm" in metrics[-1] else []
    if len(zero):
        yield f"The gradient norm is exactly 0 in {len(zero):,} steps: nothing was learnt there."
    if not len(eval_steps):
        yield "There is no evaluation in the record, so it cannot say how the model does on rows that it was not trained on."
    elif not np.isfinite(eval_losses).all():
        yield f"The evaluation loss is not finite after step {', '.join(map(str, eval_steps[~np.isfinite(eval_losses)]))}."
    elif len(eval_steps) == 1:
        yield f"There is one evaluation, after step {eval_steps[0]}: it can be read, but nothing changed between two of them."


def first_and_last(metrics):
    """Rows of the table of figures: what, first, last, change, best."""
    rows = []
    for tag, what, form in (("train/loss", "training loss, nats a token", ".4f"), ("train/grad_norm", "gradient norm", ".3f"), ("train/tokens_per_second", "tokens a second", ",.0f")):
        values = series(metrics, tag)[1]
        if len(values):
            n = edge(values)
            first, last = median(values[:n]), median(values[-n:])
            window = f"median of {n} steps" if n > 1 else "single steps"
            rows.append([f"{what} ({window})", f"{first:{form}}", f"{last:{form}}", f"{last - first:+{form}}" if len(values) > 1 else "–", ""])
    for tag, what, best in (("eval/loss", "evaluation loss, nats a token", min), ("eval/perplexity", "perplexity", min), ("eval/token_accuracy", "token accuracy", max), ("eval/stop_rate", "share of samples that stop by themselves", max)):
        steps, values = series(metrics, tag)
        if len(values):
            at = lambda i: f"{values[i]:.4f} (step {steps[i]:,})"
            finite = [i for i in range(len(values)) if math.isfinite(values[i])]
            rows.append([what, at(0), at(-1), f"{values[-1] - values[0]:+.4f}" if len(values) > 1 else "–", at(best(finite, key=lambda i: values[i])) if finite else "–"])
    return rows


def resources(metrics, environment):
    """Rows of the table of time, tokens, memory and machine."""
    total = lambda tag: np.nansum(series(metrics, tag)[1])
    gpu, peak = environment.get("devices", []), series(metrics, "train/peak_memory_gib")[1]
    rows = [["time in steps", f"{total('train/seconds'):,.1f} s"], ["time in evaluations, without samples", f"{total('eval/seconds'):,.1f} s"],
            ["tokens trained on", f"{total('train/tokens'):,.0f}, of them supervised {total('train/supervised_tokens'):,.0f}"]]
    if np.isfinite(peak).any():
        rows.append(["most memory in use", f"{np.nanmax(peak):.2f} GiB of " + ("the GPU" if gpu else "the process (no GPU)")])
    if environment:
        rows.append(["machine", ", ".join([f"{d['name']} ({d['memory_gib']} GiB)" for d in gpu] + [f"{environment.get('cpu', 'CPU')}, {environment.get('cores', '?')} cores"])])
        rows.append(["software", ", ".join([f"Python {environment.get('python', '?')}"] + [f"{name} {version}" for name, version in environment.get("packages", {}).items() if version])])
    return rows


def samples_table(metrics):
    """What the model wrote for the same prompts at the first and at the last recorded sampling."""
    written = [(line["step"], json.loads(line["eval/samples"])) for line in metrics if "eval/samples" in line]
    if not written:
        return "No samples are in the record."
    (first, before), (last, after) = written[0], written[-1]
    after = {sample["prompt"]: sample for sample in after}
    text = lambda sample: cell(sample["text"]) + ("" if sample["stopped"] else " *(did not stop)*") if sample else "–"
    if first == last:
        return f"Samples were taken once, after step {first:,}.\n\n" + table(["prompt", f"after step {first:,}", "reference"], [[cell(s["prompt"]), text(s), cell(s["reference"])] for s in before])
    return table(["prompt", f"after step {first:,}", f"after step {last:,}", "reference"], [[cell(s["prompt"]), text(s), text(after.get(s["prompt"])), cell(s["reference"])] for s in before])


def settings_table(config):
    """The settings that say what the run was, and every other one that is not at its default."""
    defaults = settings.Config().flat()
    shown = {key: short(value) if key.endswith((".path", ".train", ".eval", ".chat_template", ".prompts", ".init_from")) else json.dumps(value).strip('"') for key, value in config.items()}
    return table(["key", "value"], [[f"`{key}`", f"`{shown[key]}`"] for key, value in config.items() if key in ALWAYS or defaults.get(key) != value])


def page(run, metrics, config, environment):
    """The report as Markdown."""
    return "\n\n".join([
        f"# {pathlib.Path(run).resolve().name}", "\n".join(f"- {remark}" for remark in remarks(metrics, config)), "![loss, token accuracy, learning rate and gradient norm by step](curves.png)",
        "## Figures", table(["what", "first", "last", "change", "best"], first_and_last(metrics)),
        "## Samples, greedy", samples_table(metrics),
        "## Time and memory", table(["what", "value"], resources(metrics, environment)),
        "## Settings", settings_table(config) if config else "config.json is not there, so the settings are not known.",
        f"Made of `metrics.jsonl` by `python report.py {short(run)}`."]) + "\n"


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    words, flags, overrides = settings.command_line(argv, {"picture": ""})
    if len(words) != 1 or overrides:
        raise ValueError("give one run folder, as in: python report.py runs/approach1 [--picture FILE.png]")
    run = pathlib.Path(words[0])
    metrics, config, environment = read_run(run)
    if flags["picture"]:
        draw(metrics, title_of(config, metrics), flags["picture"], loss_only=True)
        print(flags["picture"])
        return 0
    text = page(run, metrics, config, environment)
    draw(metrics, title_of(config, metrics), run / "curves.png")
    (run / "report.md").write_text(text, encoding="utf-8")
    print(f"{run / 'report.md'}\n{run / 'curves.png'}")
    return 0


if __name__ == "__main__":
    settings.run_command(main)
