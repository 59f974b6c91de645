"""The pictures of a report, from plain numbers: each function writes one PNG, or draws in one pair of axes.

A series is (steps, values): int64 (n,) and float64 (n,), NaN and infinities allowed. Scales follow the bulk of the points, and
what lies beyond is marked at the edge instead of flattening the rest. Leaves out: records and what the numbers mean (report.py),
which also runs it:

    python report.py runs/approach1
"""
import contextlib
import math

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

TRAIN, EVAL, ALARM, GREY = "#2f6db3", "#d1622b", "#c0392b", "#666666"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.titlelocation": "left",
         "axes.labelcolor": "#333333", "axes.grid": True, "grid.color": "#e8e8e8", "axes.axisbelow": True, "legend.frameon": False,
         "legend.fontsize": 9, "figure.dpi": 110, "savefig.dpi": 110}
HALO = [patheffects.withStroke(linewidth=3, foreground="white")]
MEDIANS = 1000  # points that a running median is worked out at; more cannot be told apart in a picture


@contextlib.contextmanager
def sheet(path, rows=1, columns=1, height=3.0):
    """A figure 9 inches wide: gives its axes in reading order, and writes it to `path` with one legend below all of them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.09, h_pad=0.07)
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        yield axes
        known = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
        if known:
            figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=4, columnspacing=1.4, handlelength=1.6)
        figure.savefig(path)


def running_median(values, width, at):
    """At each of the indices `at` the median of the finite ones among the `width` values around it, float64 (len(at),).

    Fewer at the ends: as many after a point as before it at the start, where a loss falls fast and later points would pull
    it down; only earlier ones at the end. NaN where most of them are not finite.
    """
    half, finite = width // 2, np.where(np.isfinite(values), values, np.nan)
    windows = (finite[max(0, i - half):i + min(half, max(i, 2)) + 1] for i in at)
    return np.array([np.median(kept) if 2 * len(kept := window[~np.isnan(window)]) >= len(window) else np.nan for window in windows])


def bounds(values):
    """(low, high) between which a scale shows the bulk of the finite values: all of them, unless a few lie far outside."""
    finite = np.sort(values[np.isfinite(values)])
    if not len(finite):
        return 0.0, 1.0
    outside = math.ceil(len(finite) / 100) if len(finite) >= 10 else 0
    low, high = finite[outside], finite[-1 - outside]
    reach = 0.5 * (high - low) or 0.1 * abs(high) or 1.0
    return max(finite[0], low - reach), min(finite[-1], high + reach)


def trim(axis, series, at_least=()):
    """Fit the vertical scale to the bulk of `series` and all of `at_least`; mark at the top how far the rest reaches."""
    steps, values = series
    low, high = bounds(values)
    low, high = min([low, *at_least]), max([high, *at_least])
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    axis.set_ylim(low - margin, high + margin)
    beyond = np.isfinite(values) & ((values > high) | (values < low))
    if beyond.any():
        marks(axis, steps[beyond], "^", ALARM, f"{beyond.sum():,} beyond the scale, up to {np.max(np.abs(values[beyond])):.3g}",
              height=0.985)


def marks(axis, steps, mark, color, label, height=0.02):
    """A mark at each of `steps`, at a share of the panel's height, whatever the scale."""
    axis.plot(steps, np.full(len(steps), height), mark, color=color, markersize=5, transform=axis.get_xaxis_transform(), clip_on=False,
              label=label)


def x_axis(axis, last, ticks=10):
    """Steps from 0 to `last`, whole numbers."""
    axis.set_xlim(-0.02 * max(1, last), 1.02 * max(1, last))
    axis.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.set_xlabel("step")


def draw_steps(axis, series, what):
    """Every step as a thin line with its running median; a short run as points."""
    steps, values = series
    if len(steps) < 20:
        axis.plot(steps, values, color=TRAIN, linewidth=1.2, marker=".", label=what)
        return
    width = max(9, min(101, len(steps) // 20)) | 1
    at = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MEDIANS)).astype(int))
    axis.plot(steps, values, color=TRAIN, alpha=0.35, linewidth=0.7, label=what)
    axis.plot(steps[at], running_median(values, width, at), color=TRAIN, linewidth=2, label=f"running median of {width}")


def draw_points(axis, series, label, best, form=".3f", few=0):
    """Evaluations as points; first and last carry their values, the best too where it lies apart from them, and up to `few` all of them."""
    steps, values = (part[np.isfinite(series[1])] for part in series)
    if not len(values):
        return
    axis.plot(steps, values, "o:", color=EVAL, linewidth=1, markersize=6, label=label)
    top, apart = values.tolist().index(best(values)), 0.2 * (steps[-1] - steps[0])
    between = [top] if steps[0] + apart < steps[top] < steps[-1] - apart else []
    labelled = range(len(values)) if len(values) <= few else sorted({0, *between, len(values) - 1})
    for i in labelled:
        side = "left" if i == 0 else "right" if i == len(values) - 1 and i else "center"
        axis.annotate(f"{values[i]:{form}}", (steps[i], values[i]), xytext=(0, 7), textcoords="offset points", ha=side, fontsize=9,
                      fontweight="bold", color=EVAL, path_effects=HALO)
    axis.margins(y=0.15)


def nothing(axis, text):
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=GREY)


def draw_loss(axis, train, evals, untouched=None, alerts=()):
    """Training loss with its running median, evaluations as labelled points, the untouched unquantised model as a line, steps without a
    finite loss and alerts as marks at the bottom."""
    steps, losses = train
    finite = np.isfinite(losses)
    if len(steps):
        draw_steps(axis, train, "training")
    draw_points(axis, evals, "evaluation", min, few=6)
    if untouched is not None:
        axis.axhline(untouched, color=GREY, linestyle="--", linewidth=1.2, label=f"untouched model, not quantised: {untouched:.3f}")
    trim(axis, train, [value for value in [*evals[1], untouched] if value is not None and math.isfinite(value)])
    if not finite.all():
        marks(axis, steps[~finite], "x", "black", "loss not finite")
    if len(alerts):
        marks(axis, alerts, "D", ALARM, "alert")
    axis.set_ylabel("loss (nats a token)")
    x_axis(axis, max([0, *steps, *evals[0]]))


def loss(path, title, train, evals, untouched=None, alerts=()):
    with sheet(path, height=4.2) as (axis,):
        draw_loss(axis, train, evals, untouched, alerts)
        axis.set_title(title)


def evaluation(path, perplexity, accuracy, samples, untouched=None):
    """Perplexity and token accuracy by step, and the shares measured on samples: {label: series}."""
    with sheet(path, columns=3 if samples else 2, height=3.3) as axes:
        draw_points(axes[0], perplexity, "with adapters", min, ".4g")
        draw_points(axes[1], accuracy, "with adapters", max)
        if untouched:
            axes[0].axhline(untouched[0], color=GREY, linestyle="--", linewidth=1.2, label="untouched model, not quantised")
            axes[1].axhline(untouched[1], color=GREY, linestyle="--", linewidth=1.2, label="untouched model, not quantised")
        titles = ("perplexity, evaluation rows", "token accuracy, evaluation rows", "generation samples")
        for axis, title, unit in zip(axes, titles, ("perplexity", "share of tokens put first", "share")):
            axis.set(title=title, ylabel=unit)
        for axis, (_, values) in zip(axes, (perplexity, accuracy)):
            if not np.isfinite(values).any():
                nothing(axis, "not in the record")
        values = perplexity[1][np.isfinite(perplexity[1]) & (perplexity[1] > 0)]
        if len(values) and values.max() > 20 * values.min():
            axes[0].set_yscale("log")
            axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for (label, (steps, shares)), color, mark in zip(samples.items(), (TRAIN, ALARM, "#3a8f5c"), "osv"):
            axes[2].plot(steps, shares, mark + "-", color=color, linewidth=1.2, markersize=5, label=label, alpha=0.9)
            axes[2].set_ylim(-0.05, 1.05)
        last = max([0, *perplexity[0], *accuracy[0]])
        for axis in axes:
            x_axis(axis, last, ticks=4)


def draw_norms(axis, norms, threshold):
    """Gradient norm before clipping, norms of exactly 0 as marks at the bottom, and the threshold with the share that it clipped."""
    steps, values = norms
    draw_steps(axis, norms, "norm before clipping")
    positive = values[np.isfinite(values) & (values > 0)]
    limits = dict(zip(threshold[0].tolist(), threshold[1].tolist()))
    limit = np.array([limits.get(step, math.nan) for step in steps.tolist()])
    both = np.isfinite(limit) & np.isfinite(values)
    if both.any():
        share = (values[both] > limit[both]).mean()
        axis.plot(steps[both], limit[both], color="black", linestyle="--", linewidth=1.1, marker="_" if both.sum() == 1 else None,
                  label=f"clipped above ({share:.0%} of the steps were)")
    if len(positive) and positive.max() > 20 * positive.min():
        axis.set_yscale("log")
    else:
        trim(axis, norms, [0.0, *limit[both]])
        axis.set_ylim(0, axis.get_ylim()[1] if len(positive) else 1)
    zeros = steps[values == 0]
    if len(zeros):
        marks(axis, zeros, "x", ALARM, f"exactly 0 ({len(zeros):,} steps)")


def steps(path, rates, norms, threshold):
    """Learning rate, and gradient norm with its clipping threshold, by step."""
    with sheet(path, columns=2, height=3.4) as (left, right):
        left.plot(*rates, color=TRAIN, marker="." if len(rates[0]) < 20 else None)
        left.set(title="learning rate", ylabel="learning rate")
        left.set_ylim(bottom=0)
        left.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.1e}".replace("e-0", "e-") if rate else "0"))
        right.set(title="gradient norm", ylabel="norm over all adapters")
        draw_norms(right, norms, threshold) if len(norms[0]) else nothing(right, "not in the record")
        for axis in (left, right):
            x_axis(axis, max([0, *rates[0], *norms[0]]), ticks=6)


def heat(axis, grid, columns, rows, title, unit, form):
    """One value a module: rows are projections, columns layers. Grey where there is no such module, red where the value is 0."""
    positive = grid[np.isfinite(grid) & (grid > 0)]
    wide = len(positive) and positive.max() > 30 * positive.min()
    high = positive.max() if len(positive) else 1.0
    scale = LogNorm(positive.min(), max(high, 1.001 * positive.min())) if wide else Normalize(0, high)
    colors = matplotlib.colormaps["YlGnBu"].with_extremes(bad="#d9d9d9")
    image = axis.imshow(np.where(grid == 0, np.nan, grid), aspect="auto", cmap=colors, norm=scale, interpolation="nearest")
    for row, column in zip(*np.nonzero(grid == 0)):
        axis.add_patch(matplotlib.patches.Rectangle((column - 0.5, row - 0.5), 1, 1, color=ALARM, linewidth=0))
    every = max(1, math.ceil(len(columns) / 32))
    axis.set_xticks(range(0, len(columns), every), [str(layer) for layer in columns[::every]], fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set(title=title, xlabel="layer")
    bar = axis.figure.colorbar(image, ax=axis, pad=0.01, fraction=0.03, label=unit)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))
    bar.ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    bar.outline.set_visible(False)


def adapters(path, ratio, rank, step_ratio, layers, projections, step):
    """Two heat maps: how far each weight was moved, and over how many directions. ratio, rank: float64 (projections, layers); NaN: no such
    module. step_ratio is not drawn."""
    with sheet(path, rows=2, height=2 * max(2.0, 1.1 + 0.24 * len(projections))) as axes:
        red = "; red: exactly 0" if (ratio == 0).any() else ""
        title = f"size of the update against its weight, after step {step:,}{red}"
        heat(axes[0], 100 * ratio, layers, projections, title, "‖ΔW‖ / ‖W‖ (%)", "{:.2g}")
        heat(axes[1], rank, layers, projections, "effective rank of the update", "directions", "{:.3g}")


def coverage(path, seen, planned=None):
    """Passes over the training rows as a bar, one box an epoch; what was planned beyond it is hatched."""
    with sheet(path, height=1.35) as (axis,):
        end = max(1, math.ceil(round(max(seen, planned or 0), 3)))
        axis.barh(0, end, color="#f1f1f1", edgecolor="#bbbbbb", linewidth=0.8)
        if planned and planned > 1.005 * seen:
            axis.barh(0, planned, color="none", edgecolor=TRAIN, hatch="////", linewidth=0.8)
        axis.barh(0, seen, color=TRAIN)
        for epoch in range(1, end if end <= 60 else 0):
            axis.axvline(epoch, color="#bbbbbb" if epoch > seen else "white", linewidth=0.8)
        title = f"{seen:.1%} of the training rows were seen" if seen < 0.9995 else f"{seen:.2f} passes over the training rows"
        title += f", {planned:.2f} passes were planned (hatched)" if planned and planned > 1.005 * seen else ""
        axis.set(yticks=[], xlim=(0, 1.002 * end), xlabel="passes over the training rows (epochs)", title=title)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=end > 5, steps=[1, 2, 2.5, 5, 10]))
        axis.grid(False)
        axis.spines["left"].set_visible(False)


def noise(path, scale, batch):
    """Gradient noise scale and the samples of a step, both in samples, by step."""
    with sheet(path, height=3.3) as (axis,):
        axis.plot(*scale, ".", color=EVAL, markersize=5, alpha=0.6 if len(scale[0]) > 50 else 1.0, label="gradient noise scale")
        if len(scale[0]) >= 20:
            at = np.arange(len(scale[0]))
            smooth = running_median(scale[1], max(9, len(at) // 10) | 1, at)
            axis.plot(scale[0], smooth, color=EVAL, linewidth=2, label="its running median")
        axis.plot(*batch, color=TRAIN, linewidth=1.6, drawstyle="steps-post", label="samples a step")
        axis.set(title="gradient noise scale and batch size", ylabel="samples", yscale="log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}" if f"{value:e}"[0] in "25" else ""))
        x_axis(axis, max([0, *scale[0], *batch[0]]))


def resources(path, speed, memory, capacity=None, where="process"):
    """Tokens a second and peak memory by step; capacity: of the GPU, in GiB."""
    with sheet(path, columns=2, height=3.3) as (left, right):
        draw_steps(left, speed, "a step") if len(speed[0]) else nothing(left, "not in the record")
        trim(left, speed, [0.0])
        left.set_ylim(bottom=0)
        left.set(title="speed", ylabel="tokens a second")
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        right.plot(*memory, color=TRAIN, marker="." if len(memory[0]) < 20 else None, label="most so far")
        if capacity:
            right.axhline(capacity, color="black", linestyle="--", linewidth=1.1, label=f"the GPU has {capacity:g} GiB")
        right.set(title=f"memory of the {where}", ylabel="peak memory (GiB)")
        right.set_ylim(0, 1.1 * max([0.01, capacity or 0, *memory[1][np.isfinite(memory[1])]]))
        for axis in (left, right):
            x_axis(axis, max([0, *speed[0], *memory[0]]), ticks=6)
