"""Does it learn: what is wrong with a run while it runs.

    alerts = Alerts(config, max_steps, rows)
    raised = alerts.see(line)                   line: a step's metrics by their tags, {"step": 25, "train/loss": 2.31, ...}
    if alerts.fatal(raised): ...                stop with exit code 4

The rules are those of rules.py, over windows of bounded size: a step costs some hundredths of a millisecond, whatever came
before. An alert is raised once, and again when it got twice as bad, graver, or came back after it had cleared. On resume, feed
the old lines first and ignore what is returned. Thresholds: config section `alerts`; reasons: docs/HEALTH.md. Leaves out:
stopping the run (train.py does), the gradient proof itself, and the verdict.
"""
import json
import math
import statistics
from collections import deque

import logs
import rules
import schedule
from rules import finding

LONG = 100  # steps over which shares (of clipped steps, of steps not applied) are taken


class Alerts:
    """The state of a run's alerts. rows: training rows, for coverage; 0: unknown."""

    def __init__(self, config, max_steps, rows):
        self.alerts, self.max_steps, self.rows = config.alerts, max_steps, rows
        self.initial = bool(config.lora.init_from) or config.lora.init != "zero"
        self.ignored = {*config.alerts.ignore, *config.forecast.acknowledge}  # what the forecast told and was accepted is not told again
        stride = max(1, max_steps // 500)  # the planned sum of the rates, from 500 of them
        planned = [schedule.learning_rate(step, config.schedule, max_steps) for step in range(1, max_steps + 1, stride)]
        self.planned_area = stride * math.fsum(planned)
        self.active, self.step = {}, 0           # name -> (severity, level) of what was raised and did not clear
        self.zeros, self.zero_steps, self.nothing = 0, [], False
        self.bad = {"training loss": [0, 0], "gradient norm": [0, 0]}  # steps in a row, and in all
        self.zero_losses = 0
        self.searching, self.dropped, self.clipped, self.empty = (deque(maxlen=LONG) for _ in range(4))
        self.ever_clipped, self.noise_scales = False, deque(maxlen=20)
        self.spikes = {name: rules.Spikes(what, self.alerts) for name, what in (("loss", "training loss"), ("grad_norm", "gradient norm"))}
        self.recent, self.now, self.blocks = deque(maxlen=LONG), [], []
        self.size = max(10, max_steps // 50)     # steps a block: some fifty blocks a run
        self.area, self.area_before, self.top, self.peak, self.low, self.samples = 0.0, 0.0, 0.0, 0.0, 0, 0
        self.firsts, self.first, self.best, self.evals = [], None, None, deque(maxlen=20)
        self.norms = {}                          # "lora_A norm" -> [value, times in a row, sum of the rates at the first of them]

    def see(self, line):
        """The Findings that the line of one step raises; most steps raise none."""
        line = logs.plain(line)
        self.step, found = line["step"], []
        if "loss" in line or "grad_norm" in line:
            found += self.gradients(line)
            found += self.loss(line)
            found += self.rate(line)
        found += self.adapters(line)
        if "eval_loss" in line:
            found += self.evaluation(line)
        if "proof" in line or "proof_outcome" in line:
            found += self.judged(["wrong gradients"], rules.proved(line))
        return [one for one in found if one.name not in self.ignored]

    def fatal(self, findings):
        """Those of the `findings` that end the run (alerts.stop)."""
        return [one for one in findings if one.name in self.alerts.stop]

    def judged(self, names, findings, level=""):
        """Of the `findings` of rules that judge `names`, those to raise; a name without one clears. level: the figure of how bad it is."""
        raised, present = [], {}
        for alert in findings:
            present[alert.name] = alert
            severity, before = self.active.get(alert.name, ("unjudged", 0))
            now, graver = alert.figures.get(level, 0), rules.SEVERITIES.index(alert.severity) < rules.SEVERITIES.index(severity)
            if graver or now > 2 * before > 0:
                raised.append(alert)
                self.active[alert.name] = (alert.severity, now)
        for name in names:
            if name not in present:
                self.active.pop(name, None)
        return raised

    # ------------------------------------------------------------------------------------------------ every step

    def gradients(self, line):
        """Norms of zero, figures that are not finite, steps not applied, clipping, spikes of the norm."""
        norm, loss = line.get("grad_norm", math.nan), line.get("loss", math.nan)
        if line.get("supervised") == 0:  # nothing to learn in this window: not the gradient's fault
            self.empty.append(True)
            return self.judged([], rules.empty(list(self.empty), self.step), "steps")
        self.empty.append(False)
        searching = line.get("scale", 1) > 1 and math.isfinite(loss) and not math.isfinite(norm)  # how fp16 finds its loss scale
        found = []
        for what, value in (("training loss", line.get("loss", 0.0)), ("gradient norm", line.get("grad_norm", 0.0))):
            follows = what == "gradient norm" and "loss" in line and not math.isfinite(loss)  # then the loss is to be told of
            bad, row = not (math.isfinite(value) or searching or follows), self.bad[what]
            row[0], row[1] = row[0] + 1 if bad else 0, row[1] + bad
            if bad:
                severity = "fault" if row[0] >= self.alerts.nonfinite_steps else "warning"
                told = f"{value} at step {self.step:,}; {row[0]} such steps in a row, {row[1]:,} in all."
                found += self.judged([], [finding(severity, f"non-finite {what}", told, "non-finite", steps=row[1])], "steps")
        self.searching.append(searching)
        self.dropped.append(line.get("skipped", 0) > 0 and not searching)
        if self.dropped[-1]:
            found += self.not_applied()
        if sum(self.searching) > LONG // 4:
            share = f"{sum(self.searching)} of the last {LONG} steps overflowed in fp16, at a loss scale of {line.get('scale', 1):g}."
            found += self.judged([], [finding("warning", "steps not applied", share)])
        if not math.isfinite(norm):
            return found
        found += self.zero(norm, loss)
        limit = line.get("clip", math.inf)
        if 0 < limit < math.inf and norm > 0:
            found += self.clipping(norm / limit, limit)
        if norm > 0 and self.spikes["grad_norm"].add(self.step, norm):
            found += self.judged([], self.spikes["grad_norm"].found(), "spikes")
        return found

    def not_applied(self):
        count = sum(self.dropped)
        if count < max(3, len(self.dropped) // 10):
            return []
        told = f"{count} of the last {len(self.dropped)} steps; those of step {self.step:,} are not finite."
        return self.judged([], [finding("warning", "steps not applied", told)])

    def zero(self, norm, loss):
        """A norm of exactly 0.0: some in a row: dead; one between others: a window without a target; beside no loss: all is learnt."""
        if norm == 0 and (0 < abs(loss) < rules.ROTE or loss == 0 and self.nothing):
            told = f"At step {self.step:,} the loss is {loss:.2g} and the gradient 0.0."
            return self.judged([], [finding("note", "nothing left to learn", told)])
        if loss > rules.ROTE:
            self.nothing = loss < 0.05  # the loss came down to here, it did not begin there
        if norm == 0:
            self.zeros += 1
            if self.zeros < self.alerts.zero_norms:
                return []
            evidence = f"The gradient norm is exactly 0.0 in {self.zeros} steps in a row, up to step {self.step:,}."
            return self.judged([], [finding("fault", "dead gradients", evidence, from_step=self.step - self.zeros + 1)])
        found = self.judged(["dead gradients"], [])
        if 0 < self.zeros < self.alerts.zero_norms:
            self.zero_steps.append(self.step - 1)
            evidence = f"The gradient norm is exactly 0.0 at {rules.listed(self.zero_steps)}, and not around them."
            found += self.judged([], [finding("warning", "steps without gradient", evidence, steps=len(self.zero_steps))], "steps")
        self.zeros = 0
        return found

    def clipping(self, ratio, limit):
        self.clipped.append(ratio)
        self.ever_clipped |= ratio > 1
        if len(self.clipped) == LONG and self.step % 50 == 0:
            names = ["always clipped"] if statistics.median(self.clipped) < 1 else []
            early = self.ever_clipped or self.step < self.max_steps // 4  # never is told once a good part of the run has shown it
            told = rules.clipping(list(self.clipped), limit, self.alerts)
            return self.judged(names, [one for one in told if one.name != "never clipped" or not early])
        return []

    def loss(self, line):
        """Spikes, a loss of zero, and, a block of steps at a time, divergence and plateau."""
        loss = line.get("loss", math.nan)
        if not math.isfinite(loss) or line.get("supervised") == 0:
            return []
        found = []
        if loss > 0 and self.spikes["loss"].add(self.step, loss):
            found += self.judged([], self.spikes["loss"].found(), "spikes")
        self.zero_losses = self.zero_losses + 1 if loss == 0 and not self.nothing else 0
        if self.zero_losses >= 3:
            told = f"The training loss is exactly 0.0 in {self.zero_losses} steps in a row, up to step {self.step:,}."
            found += self.judged([], [finding("fault", "loss of zero", told)])
        if len(self.firsts) < 10:
            self.firsts.append(loss)
            if len(self.firsts) == 10:
                found += self.beginning()
        self.recent.append(loss)
        self.now.append(loss)
        if len(self.now) >= self.size or self.step == self.max_steps and len(self.now) >= 10:
            self.blocks.append(rules.block(self.step, self.now, rules.noise(list(self.recent))) + (self.area,))
            self.now = []
            found += self.course()
        return found

    def beginning(self):
        """The first ten losses against the evaluation before them, and against guessing."""
        first = statistics.median(self.firsts)
        found = self.judged([], rules.guessing(first, "The median of the first ten training losses", self.alerts))
        if self.evals and self.evals[0]["step"] == 0:
            found += self.judged([], rules.disagreement(first, self.evals[0]["loss"]))
        return found

    def course(self):
        """Where the loss goes, from the medians of blocks of steps.

        A plateau may end, so it is a note: two fifths of the run and a fifth of all its rate without a fall. A loss that stands where it
        began is a warning when the run is over.
        """
        found = []
        if len(self.blocks) > 2 and self.blocks[0][1] > 0:
            found += self.judged(["divergence"], rules.diverged([entry[:3] for entry in self.blocks], self.alerts))
        tail = [entry for entry in self.blocks if entry[0] > self.step - 0.4 * self.max_steps]
        if len(tail) > 5 and self.area - tail[0][3] > 0.2 * self.planned_area:
            half = len(tail) // 2
            old, new = statistics.median(entry[1] for entry in tail[:half]), statistics.median(entry[1] for entry in tail[half:])
            error = math.hypot(tail[0][2], tail[-1][2]) / math.sqrt(half)
            flat = old - new < error < 0.01 * abs(old) and old > 0.05  # a fall of 2 % would have shown
            told = f"From step {tail[0][0]:,} to {self.step:,} the loss went from {old:.4f} to {new:.4f} (standard error {error:.4f})."
            found += self.judged(["plateau"] if old - new > 6 * error else [], [finding("note", "plateau", told)] if flat else [])
        if self.step == self.max_steps and len(self.blocks) > 2:
            first, last = self.blocks[0], self.blocks[-1]
            error = math.hypot(first[2], last[2])
            went = rules.course(first[1], last[1], error)
            if went in ("stood", "rose") and "divergence" not in self.active:
                told = f"Median of the first {self.size} steps {first[1]:.4f}, of the last {last[1]:.4f} (standard error {error:.4f})."
                found += self.judged([], [finding("warning", "training loss flat" if went == "stood" else "divergence", told)])
        return found

    def rate(self, line):
        """Sums of the rates. Negligible ones are told after some in a row, where rows stay unseen or a tenth of the run is lost."""
        rate = line.get("rate", math.nan)
        self.samples += line.get("samples", 0)
        if not math.isfinite(rate):
            return []
        applied = not line.get("skipped", 0)
        self.area += rate * applied
        self.top, self.peak = max(self.top, rate), max(self.peak, rate)
        self.low = self.low + 1 if rate < self.alerts.negligible_rate * self.peak or rate == 0 else 0
        found = self.judged([], rules.too_high(self.peak))
        if "noise_scale" in line:
            found += self.noise(line["noise_scale"], line.get("samples", 0))
        if self.low != max(5, self.max_steps // 100):
            return found + (self.judged(["rate ends at nothing"], []) if self.low == 0 else [])
        covered, left = line.get("epoch", self.samples / self.rows if self.rows else 1.0), self.max_steps - self.step
        if covered >= 1 and left < 0.1 * self.max_steps:
            return found
        told = f"Below {self.alerts.negligible_rate:.0%} of its peak since step {self.step - self.low + 1:,}, with {left:,} steps to go"
        told += f" and {covered:.1%} of the rows seen at most." if covered < 1 else "."
        return found + self.judged([], [finding("warning", "rate ends at nothing", told)])

    def noise(self, scale, samples):
        """The critical batch (McCandlish et al. 2018, section 2.2): far below it a step is mostly noise, and a larger one costs little."""
        if math.isfinite(scale) and scale > 0:
            self.noise_scales.append(scale)
        if samples and len(self.noise_scales) >= 3 and statistics.median(self.noise_scales) > 10 * samples:
            told = f"The gradient noise scale is {statistics.median(self.noise_scales):,.0f} samples, and a step takes {samples:g}."
            return self.judged([], [finding("note", "noisy gradients", told)])
        return []

    # ------------------------------------------------------------------------------------------ at some steps only

    def adapters(self, line):
        """Norms of A and B that repeat to the last digit although rates were spent on them."""
        found = []
        for name in ("lora_A norm", "lora_B norm"):
            value = line.get(name)
            if value is None:
                continue
            known = self.norms.get(name)
            if known is None or known[0] != value:
                self.norms[name] = [value, 1, self.area]
                continue
            known[1] += 1
            if known[1] >= 3 and self.area - known[2] > rules.MOVES:
                told = f"The {name} is {value:g} in {known[1]} recorded steps in a row, up to step {self.step:,}."
                found += self.judged([], [finding("fault", "adapters never moved", told)])
        return found

    def evaluation(self, line):
        """Everything that an evaluation can tell, alone and beside the earlier ones."""
        entry = rules.evaluation_entry(line)
        if entry is None:
            told = f"{line['eval_loss']} at step {self.step:,}."
            return self.judged([], [finding("fault", "non-finite evaluation loss", told, "non-finite")])
        entry |= {"area": self.area - self.area_before, "top": self.top, "peak": self.peak or 1.0, "initial": self.initial}
        self.area_before, self.top = self.area, 0.0
        if self.recent:
            latest = list(self.recent)[-min(len(self.recent), max(10, self.size)):]
            entry |= dict(zip(("train", "error"), rules.block(0, latest, rules.noise(list(self.recent)))[1:]))
        self.evals.append(entry)
        if self.best is None or entry["loss"] < self.best["loss"]:
            self.best = entry
        first = self.first = self.first or entry
        evals = list(self.evals)
        kept = {one["step"]: one for one in (first, self.best, *evals)}
        whole = [kept[step] for step in sorted(kept)]
        found = self.judged(["non-finite evaluation loss"], [])
        found += self.judged(["evaluation frozen"], rules.frozen(evals, self.alerts))
        still = list(rules.unmoved(evals))
        moved = len(evals) > 1 and not still and ("digest" in entry or "delta_ratio" in entry) and entry["area"] > rules.MOVES
        found += self.judged(["adapters never moved"] if moved else [], still)
        found += self.judged(["evaluation worse than before training"], rules.worsened(whole, self.alerts), "rise")
        began = statistics.median(self.firsts) if len(self.firsts) == 10 else 0
        covered = line.get("epoch", self.samples / self.rows if self.rows else 2.0)
        found += self.judged([], rules.unfollowed(entry, first, began, covered))
        found += self.judged(["growing gap"], rules.gap(whole, self.alerts), "rise")
        if len(evals) == 1 and first is entry and entry["step"] == 0:
            self.spikes["loss"].expect(entry["loss"])
            found += self.judged([], rules.guessing(entry["loss"], "The evaluation loss before training", self.alerts))
            found += self.judged([], rules.damage(entry, self.alerts))
        if entry["step"] >= self.max_steps / 2:
            names = ["samples never stop", "samples repeat themselves", "samples do not follow the loss"]
            found += self.judged(names, rules.coherence(whole, self.alerts))
        return found


def as_text(findings):
    """Findings as the JSON text that the tag `alerts` of metrics.jsonl holds."""
    return json.dumps([{name: getattr(alert, name) for name in ("name", "severity", "evidence", "cause", "remedy")} for alert in findings])
