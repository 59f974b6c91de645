"""The gradient proof: are the adapters' gradients alive, and are they those of the loss.

Alive is what others look at: a gradient that is neither zero nor infinite. It proves little, since a backward pass that leaves out
the frozen weights, doubles a factor or reads stale copies has healthy norms too. So `check` asks the loss itself: the weights are
moved a little along their gradient g and back, forward passes alone measure how far the loss goes with them, and that must be what
g foretells. How far "a little" is, and how exact "must be", is argued and measured in docs/PROOF.md.

What it cannot see: parts of a gradient that are missing without a trace in the rest (moving along what is left changes the loss by
just what is left; `dead` names whole matrices of that kind), an error in a part that carries less of |g|^2 than the tolerance
(`parts` repeats the proof for each kind of projection), and sums over more micro-batches than it is given.

    python proof.py configs/quickstart.json --model.quant=int8     the proof alone, for the model and rows of a configuration

How train.py uses it, in short (the docstrings say the rest):

    what = proof.due(config, step, first, max_steps, device)                      at each boundary, `first` being this process's first step
    batches = proof.sample(config, rows, samples_of_the_first_window, device)
    result = proof.check(network, forward_backward, batches, scaler["scale"], what, config.proof.seconds)
    say(result.text); recorder.write(step, result.values); if result.ok is False: save nothing, exit code 4

    matrix = proof.due_matrix(applied, looked_at)            behind a step; applied: moments["step"], those really taken
    if matrix and proof.telling(window):
        names = proof.dead(views(flat.grad, adapters), matrix); less proof.asleep(network, names)
"""
import itertools
import math
import re
import textwrap
import time
from dataclasses import dataclass, field

import numpy as np
import torch

import config as settings
import data
import graphs
import lora_layers
import model
import quant
import ranks

# half the relative change of the loss that is foretold for the first way that is tried, and the error that is allowed before anything
# is measured: of gradients that are themselves rounded. docs/PROOF.md argues for both.
FIRST_MOVE = {torch.float64: 1e-3, torch.float32: 3e-3, torch.float16: 0.06, torch.bfloat16: 0.12}
ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.03}
SURE = 4          # standard errors of the noise that are added to what is allowed
USELESS = 0.25    # a tolerance beyond this says nothing; the measurement is told as such and stops no run
# of the loss, at the nodes of a way: no powers of two, so that each backward pass rounds otherwise
SIZES = 0.71, 0.83, 0.59, 0.93, 0.67, 0.79
MAGNITUDE = ".lora_magnitude"  # of DoRA, in its name
SECONDS = 120     # for finding out which modules are wrong, once it is known that some are


@dataclass
class Result:
    ratio: float        # change of the loss measured / foretold by the gradient: 1 where it is right; nan where nothing could be measured
    tolerance: float    # how far from 1 the ratio may lie: what is allowed to the dtype, and SURE standard errors of this measurement
    ok: object          # True, False, or None: the measurement is too noisy to tell
    text: str           # for the console, wrapped
    dead: list = field(default_factory=list)    # adapter matrices with a zero or non-finite gradient, by PEFT's name
    wrong: list = field(default_factory=list)   # modules or kinds of projection whose gradient is not that of the loss
    parts: dict = field(default_factory=dict)   # {kind of projection: (ratio, tolerance, ok)}, where asked for
    loss: float = math.nan                      # mean over the supervised tokens of the batches, in nats
    seconds: float = 0.0

    @property
    def values(self):
        """What goes into the record: the figures, where there are any, and proof/outcome: "proved", "open", "wrong", "stale" or "dead",
        with the text."""
        told = " ".join(self.text.split()).removeprefix("gradients ")
        outcome = ("proved" if self.ok else "open" if self.ok is None else
                   next((word for word in ("DEAD", "STALE") if told.startswith(word)), "wrong").lower())
        figures = {"proof/ratio": self.ratio, "proof/tolerance": self.tolerance}
        if not told.startswith(f"{outcome}: "):
            told = f"{outcome}: {told.removeprefix(outcome.upper() + ': ')}"
        return {tag: value for tag, value in figures.items() if math.isfinite(value)} | {"proof/outcome": told}


# ------------------------------------------------------------------------------------------------------------- alive

def dead(named_gradients, matrix=""):
    """Names of the gradients that are not finite or zero throughout, of those with `matrix` ("lora_A", "lora_B"; empty: all) in them.

    named_gradients: (name, tensor) pairs or a dict. Waits for the device once. For B after the first applied step; for A after the
    second: its first gradient is zero because B is (Hu et al. 2021, section 4.1). Not to be asked after a window that `telling`
    says nothing of, nor after a step that was skipped.
    """
    chosen = [(name, gradient) for name, gradient in dict(named_gradients).items() if f".{matrix}" in name]
    if not chosen:
        return []
    norms = torch.stack(torch._foreach_norm([gradient for _, gradient in chosen], math.inf)).tolist()
    return [name for (name, _), norm in zip(chosen, norms) if not (math.isfinite(norm) and norm > 0)]


def due_matrix(applied, proved):
    """Which matrix's gradients to look at after `applied` steps that were really taken: "lora_B" after one, "lora_A" after two, or "".

    proved: a set of those looked at already, to which the caller adds the answer.
    """
    return next((matrix for matrix, steps in (("lora_B", 1), ("lora_A", 2)) if applied >= steps and matrix not in proved), "")


def telling(window):
    """Whether a window's gradients can be expected to be non-zero: it supervises a token that has more than one before it.

    (Where there is one token only, attention has no choice, and queries and keys have no gradient.)
    """
    return any(bool((batch.position_ids[batch.rows] > 0).any()) for batch in window)


def asleep(network, names):
    """Those of `names` (lora_A matrices) whose B is still zero in the compute dtype: their gradient is zero, and rightly so.

    fp16 has nothing between 0 and 6e-8, so the first steps of a long warm-up may leave B there.
    """
    modules = {f"{lora_layers.PEFT_PREFIX}{name}.lora_A.weight": module for name, module in network.named_modules()
               if isinstance(module, lora_layers.AdaptedLinear) and module.r}
    network.adapter_memory.refresh()
    return [name for name in names if name in modules and not modules[name].working_B.any()]


# ------------------------------------------------------------------------------------------------------------ and true

def due(config, step, first, max_steps, device="cpu"):
    """What `check` has to prove at the boundary behind `step`: "" (nothing), "whole", "even" or "parts".

    first: the first step of this process, so first - 1 is the boundary before it. Proved is there (where B is 0 it sees nothing of A),
    behind the second step, and behind the first evaluation within the run.
    """
    if not config.proof.enabled:
        return ""
    every, second = config.eval.every_steps, min(first + 1, max_steps)
    evaluation = max_steps if every <= 0 else min(max_steps, first - 1 - (first - 1) % every + every)
    parts = config.proof.parts == "yes" or config.proof.parts == "auto" and torch.device(device).type != "cpu"
    return "parts" if step == second and parts else "even" if step in (second, evaluation) else "whole" if step == first - 1 else ""


def sample(config, rows, order, device="cpu"):
    """Micro-batches for `check` from the rows `order` of a data.Rows, one after another until they supervise proof.tokens tokens.

    proof.tokens 0: 64 on a CPU, 512 elsewhere. Rows that would make it more than 4 times as many tokens in all end it too; at
    least one row, and two micro-batches where there are two, so that adding up gradients is part of what is proved. A gradient is a
    sum over tokens that are all treated alike, so a few show whatever is wrong with how it is formed; more of them only lower the
    noise. Rows without a supervised token are passed over.
    """
    wanted = config.proof.tokens or (64 if torch.device(device).type == "cpu" else 512)
    chosen, total, supervised = [], 0, 0
    for row in dict.fromkeys(order):
        place = slice(rows.offsets[row], rows.offsets[row + 1])
        length, targets = place.stop - place.start, int(rows.supervised[place].sum())
        if chosen and (supervised >= wanted or total + length > 4 * wanted):
            break
        if targets:
            chosen, total, supervised = [*chosen, row], total + int(length), supervised + targets
    half = (len(chosen) + 1) // 2
    return [batch for part in (chosen[:half], chosen[half:]) for batch in data.pack(rows, part, max(total, 1))]


def check(network, forward_backward, batches, scale=1.0, what="parts", seconds=math.inf):
    """Compare the gradients that training uses with the loss itself. Returns a Result; changes nothing.

    forward_backward(batch, weight): train.py's own, which adds weight x d loss / d adapters to network.adapter_memory.flat.grad and
    returns the summed loss; graphs.Replayed is called twice, so that a replay is what is checked, and its eager twin is taken where
    adapters have dropout, since padded masks would be others. batches: data.MicroBatch on the host, as from `sample`.
    scale: fp16's loss scale; lowered here until the gradients are finite. what: "whole", along the gradient; "even", also along the
    one in which each adapter matrix goes equally far; "parts", also for each kind of projection by itself. seconds: after so many no
    further direction is begun and none measured a second time, unless one looks wrong; what was left out is told.

    Weights, moments, generators and the working copies are as before when it returns, bit for bit, and flat.grad is what it was.
    Costs a forward and backward pass over the batches and 6 forward passes, then for each direction, three times at most, 2 forward
    passes and 2 to 6 forward and backward passes.
    """
    began, memory, device, even, parts = time.perf_counter(), network.adapter_memory, network.device, what != "whole", what == "parts"
    flat, supervised = memory.flat, sum(len(batch.targets) for batch in batches)
    if not supervised:
        return Result(math.nan, math.nan, None, "gradients  not proved: no supervised token to prove them on")
    names, adapters = zip(*lora_layers.adapters(network).items())
    places = {name: memory.places[parameter] for name, parameter in zip(names, adapters)}
    if any(module.dropout for module in network.modules() if isinstance(module, lora_layers.AdaptedLinear) and module.r):
        forward_backward = getattr(forward_backward, "eager", forward_backward)
    kept_gradient, theta = flat.grad.cpu() if flat.grad.is_cuda else flat.grad.clone(), flat.detach().clone()
    held = lora_layers.rows_held(network)  # DoRA's gradients are those of a loss in which the lengths of rows are constants
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), held:
        try:
            gradient_now = lambda factor: gradient_of(network, forward_backward, batches, factor * float(scale), supervised, again=True)[1]
            loss, gradient = gradient_of(network, forward_backward, batches, float(scale), supervised)
            gradients = {name: gradient[memory.places[parameter]].view_as(parameter) for name, parameter in zip(names, adapters)}
            measured = Measurement(network, batches, supervised, theta, gradient, gradient_now, began + seconds,
                                   replayed=hasattr(forward_backward, "eager"))
            result = judge(measured, loss, even, parts, places, gradients)
        finally:
            with torch.no_grad():
                flat.copy_(theta)
            flat.grad.copy_(kept_gradient)
            memory.refresh()
    result.seconds = time.perf_counter() - began
    return result


def gradient_of(network, forward_backward, batches, scale, supervised, again=False):
    """(mean loss, gradient of the mean loss in flat's dtype) by train.py's own function.

    At the largest of scale, scale/16, ... where it is finite. again: graphs are recorded already, and one pass is enough.
    """
    flat, replayed = network.adapter_memory.flat, hasattr(forward_backward, "eager")
    while True:
        weight = torch.tensor(scale / supervised, device=flat.device)
        for _ in range(2 if replayed and not again else 1):  # the first time, what is not recorded yet runs eagerly
            flat.grad.zero_()
            loss = torch.zeros((), device=flat.device, dtype=torch.float64)
            for i, batch in enumerate(batches):
                torch.manual_seed(i)
                loss += forward_backward(batch, weight)
        gradient = flat.grad / scale
        if scale <= 1 or agreed(bool(torch.isfinite(gradient).all())):
            return agreed(loss.item() / supervised), gradient
        scale = max(1.0, scale / 16)


def agreed(number):
    """The first rank's number, on every rank: each pass of a sharded network is made by all of them, so all must decide alike."""
    told = torch.tensor(number, dtype=torch.float64)
    ranks.from_first([told])
    return told.item()


class Measurement:
    """The loss of some micro-batches as the adapters move: how far it goes, by forward passes alone, and how far gradients say that
    it goes.

    gradient: of the mean loss at `theta`, for directions; gradient_now(factor): the same at the weights as they are, made with a loss
    that is `factor` times as large. A backward pass is linear in it, but for its rounding. deadline: by time.perf_counter(), see
    `check`. replayed: forward passes as one CUDA graph, where there is no dropout.
    """

    def __init__(self, network, batches, supervised, theta, gradient, gradient_now, deadline=math.inf, replayed=False):
        self.network, self.supervised, self.theta, self.deadline = network, supervised, theta, deadline
        self.gradient, self.gradient_now = gradient, gradient_now
        self.batches = [batch.to(network.device) for batch in batches]
        self.dtype = network.adapter_memory.working.dtype
        self.unrounded = {network.adapter_memory.places[parameter].start
                          for name, parameter in lora_layers.adapters(network).items() if MAGNITUDE in name}
        self.recorded = None
        if replayed:
            with torch.no_grad():
                self.recorded = graphs.Recorded(lambda: self.summed_loss(seeded=False), network.device)
        self.loss, self.spread, self.rounding = self.loss_now(), None, None

    def late(self):
        """Whether the time is over, by the first rank's clock."""
        return bool(agreed(time.perf_counter() > self.deadline))

    def summed_loss(self, seeded=True):
        """The loss of all supervised tokens together, fp64 (), on the device; dropout masks are always the same, where `seeded`."""
        total = torch.zeros((), device=self.network.device, dtype=torch.float64)
        for i, batch in enumerate(self.batches):
            if seeded:
                torch.manual_seed(i)
            total += model.summed_loss(self.network, batch)[1].double().sum()
        return total

    @torch.no_grad()
    def loss_now(self):
        """The mean loss of the supervised tokens at the weights as they are now, in nats."""
        total = self.recorded() if self.recorded else self.summed_loss()
        return agreed(total.item() / self.supervised)

    @torch.no_grad()
    def put(self, direction, step):
        """Move the weights to theta + step x factor x g in each (slice, factor) of a direction."""
        for place, factor in direction:
            torch.add(self.theta[place], self.gradient[place], alpha=step * factor, out=self.network.adapter_memory.flat.data[place])

    def foretold(self, gradient, way):
        """Half the change of the loss that a gradient foretells for a way [(slice, both ends' difference)]."""
        total = torch.zeros((), device=gradient.device, dtype=torch.float64)
        for place, whole in way:
            for g, part in zip(gradient[place].split(1 << 22), whole.split(1 << 22)):
                total += torch.dot(g.double(), part.double())
        return agreed(total.item() / 2)

    def walk(self, direction, step, allowed, most=4):
        """(half the change of the loss between theta - step g and theta + step g, what gradients foretell of it, by how much that may
        be wrong).

        The change is the integral of the gradient along the way, however the loss bends: by one Gauss node (the middle), two, and, as
        long as the last two differ by more than 2 x `allowed`, four, up to `most`. The last but one says how much the last may be wrong.
        The gradient at each node is made with a loss of another size, so that what is rounding in it is another at each. The network
        sees weights in the compute dtype (DoRA's magnitudes as they are), so the way is the one between the ends as rounded.
        """
        ends, losses, flat = [], [], self.network.adapter_memory.flat.data
        for sign in (1, -1):
            self.put(direction, sign * step)
            losses.append(self.loss_now())
            ends.append([flat[place].to(self.theta.dtype if place.start in self.unrounded else self.dtype, copy=True)
                         for place, _ in direction])
        way = [(place, plus.to(self.theta.dtype) - minus.to(self.theta.dtype)) for (place, _), plus, minus in zip(direction, *ends)]
        rules, sizes = [self.foretold(self.gradient, way)], itertools.cycle(SIZES)
        for nodes in [count for count in (2, 4, 8) if count <= most]:
            total = 0.0
            for node, weight in zip(*np.polynomial.legendre.leggauss(nodes)):
                self.put(direction, step * float(node))
                total += weight / 2 * self.foretold(self.gradient_now(next(sizes)), way)
            rules.append(total)
            if abs(rules[-1] - rules[-2]) <= 2 * allowed * abs(rules[-1]):
                break
        self.put(direction, 0.0)
        return (losses[0] - losses[1]) / 2, rules[-1], abs(rules[-1] - rules[-2])

    def ratio(self, direction, move, allowed, rounds=3, most=4):
        """(change of the loss measured / foretold, how uncertain that is, what is foretold, the way's length in relative loss) along a
        direction as in `put`; (nan, inf, 0, 0) if there is no telling.

        Uncertain it is by SURE standard errors of the loss's noise and by how much the integral may be wrong. The way is made longer where
        the first is larger and shorter where the second is, until they come to 2.5 times what is `allowed`, `rounds` times at most.
        """
        squared = agreed(sum(factor * self.gradient[place].double().square().sum().item() for place, factor in direction))
        best = math.nan, math.inf, 0.0, 0.0
        for attempt in range(rounds if squared > 0 else 0):
            if attempt and self.late():
                break
            change, foretold, bend = self.walk(direction, move * self.loss / squared, allowed, most)
            if not (math.isfinite(change) and foretold > bend):
                move /= 8
                continue
            ratio, noise, bend = change / foretold, SURE * self.noise() / foretold, bend / foretold
            doubt = noise + bend * abs(ratio)
            best = min(best, (ratio, doubt, foretold, move), key=lambda found: found[1] / max(1.0, abs(found[0])))
            if doubt <= 2.5 * allowed * max(1.0, abs(ratio)):
                break
            move *= min(4.0, max(0.25, (noise / max(bend, 1e-9)) ** (1 / 3)))
        return best

    def verdict(self, direction, move, allowed, ways=3):
        """(ratio, tolerance, ok) along a direction; ok None where it cannot be told.

        What is wrong must be wrong by more than its tolerance and than gradients are rounding, also on the shortest way on which the noise
        lets it be seen, on one that is longer by 1.3, and in what the longest has beyond the shortest: in a saturated network gradients are
        mostly rounding, and its loss is rough and has steps that no gradient knows of.
        """
        seen, surely = [], self.rounding or 0.0
        size = lambda ratio: max(1.0, abs(ratio))
        for way in range(ways):
            if way == 1:
                ratio, _, foretold, move = seen[0]
                # so much shorter, a way has noise of a quarter of what is wrong
                visible = 4 * SURE * self.noise() / (foretold * min(0.5, abs(ratio - 1)))
            factor = (1.0, min(0.6, max(1e-3, visible)) if seen else 1.0, 1.3)[way]
            ratio, doubt, foretold, length = self.ratio(direction, move * factor, allowed, *((1, 8) if seen else (3, 4)))
            tolerance = allowed * size(ratio) + doubt
            if not math.isfinite(ratio) or not tolerance <= USELESS * size(ratio):
                return ratio, tolerance, None
            if abs(ratio - 1) <= tolerance + surely:  # and where a way before did not fit, there is no telling
                return ratio, tolerance + surely, True if tolerance + surely <= USELESS and not seen else None
            seen.append((ratio, doubt, foretold, length))
            surely = self.irreproducible() * size(ratio)
        ratio, doubt, _, _ = seen[0]
        if len(seen) > 1:
            short, error, inner, _ = min(seen, key=lambda found: found[3])
            long, larger, outer, _ = max(seen, key=lambda found: found[3])
            excess = (long - 1) * outer - (short - 1) * inner
            if abs(excess) <= larger * outer + error * inner + (allowed * size(ratio) + surely) * (outer - inner):
                return ratio, allowed * size(ratio) + doubt, None
        return ratio, allowed * size(ratio) + doubt + surely, False

    def evenly(self, places):
        """The direction in which each adapter matrix goes equally far along its own gradient: in g itself a few large ones outvote
        the others."""
        norms = {name: self.gradient[place].double().norm().item() for name, place in places.items()}
        return [(place, 1 / norms[name]) for name, place in places.items() if norms[name] > 1e-6 * max(norms.values())]

    def noise(self):
        """Standard deviation of half a difference of the mean loss, in nats, through rounding that is another in every pass.

        From four pairs of passes with all weights moved a little at random, to and fro, so that no gradient is in it, and two degrees
        of freedom's worth of what is usual, 0.15 machine epsilons of the loss. Rounding is not independent from token to token
        (documents begin with the same words), so nothing but passes tells how much it is.
        """
        if self.spread is None:
            pairs = [(self.at_random(seed, 1) + self.at_random(seed, -1)) / 2 for seed in range(4)]
            middle, usual = sum(pairs) / len(pairs), (0.15 * torch.finfo(self.dtype).eps * self.loss) ** 2
            self.spread = math.sqrt((2 * usual + sum((pair - middle) ** 2 for pair in pairs)) / (2 + len(pairs) - 1))
        return self.spread

    @torch.no_grad()
    def at_random(self, seed, sign):
        """The loss at weights that lie a twelfth of a first move away in a random direction."""
        flat, norm = self.network.adapter_memory.flat, self.gradient.double().norm().item()
        draw = torch.randn(flat.shape, generator=torch.Generator(flat.device).manual_seed(seed), device=flat.device, dtype=flat.dtype)
        torch.add(self.theta, draw, alpha=sign * FIRST_MOVE[self.dtype] * self.loss / norm / math.sqrt(flat.numel()) / 12, out=flat.data)
        loss = self.loss_now()
        flat.copy_(self.theta)
        return loss

    @torch.no_grad()
    def reacts(self, direction):
        """Whether the loss moves when the weights in a direction [(slice, share)] grow and shrink by that share of themselves, beyond
        its noise and in proportion, and not by a step; where some of them are all zero there is no telling, and True."""
        flat, changes = self.network.adapter_memory.flat, []
        if not direction or not all(bool(self.theta[place].any()) for place, _ in direction):
            return True
        for part in (1.0, 0.5):
            losses = []
            for sign in (1, -1):
                for place, share in direction:
                    torch.mul(self.theta[place], 1 + sign * part * share, out=flat.data[place])
                losses.append(self.loss_now())
            changes.append((losses[0] - losses[1]) / 2)
        flat.copy_(self.theta)
        return abs(changes[1]) > SURE * self.noise() and 1.3 < changes[0] / changes[1] < 3

    @torch.no_grad()
    def irreproducible(self):
        """|g' - g| / |g|, the largest of three g' made with weights that differ in their last digits, from a loss of another size: how
        much of g is rounding. By Cauchy and Schwarz it foretells no change of the loss worse than by this share of |g|^2."""
        if self.rounding is None:
            flat, size, self.rounding = self.network.adapter_memory.flat, self.gradient.double().norm(), 0.0
            for seed in range(3):
                generator = torch.Generator(flat.device).manual_seed(seed)
                draw = torch.randn(flat.shape, generator=generator, device=flat.device, dtype=flat.dtype)
                torch.addcmul(self.theta, self.theta, draw, value=torch.finfo(self.dtype).eps, out=flat.data)
                with torch.enable_grad():
                    again = self.gradient_now(SIZES[seed])
                self.rounding = max(self.rounding, agreed(((again - self.gradient).double().norm() / size).item()))
            flat.copy_(self.theta)
        return self.rounding if math.isfinite(self.rounding) else math.inf


def judge(measured, loss, even, parts, places, gradients):
    """The Result of a Measurement. loss: of the training pass, where Measurement has that of a forward pass alone; gradients, places:
    by PEFT's name."""
    dtype, forward = measured.dtype, measured.loss
    move, allowed = FIRST_MOVE[dtype], ALLOWED[dtype]
    lacking = dead(gradients, "lora_B")
    silent = dead(gradients, "lora_A") if not lacking else []
    if silent:
        rightly = set(asleep(measured.network, silent))
        lacking = [name for name in silent if name not in rightly]
    norm = measured.gradient.double().norm().item()
    zero = [name for name in lacking if not gradients[name].any()]
    if (zero and zero == lacking and len(zero) < len(gradients) and math.isfinite(norm)
            and not measured.reacts([(places[name], 0.1) for name in zero if name in places])):
        return Result(math.nan, math.nan, None, wrap(
            f"gradients  not proved: {len(zero)} of {len(gradients)} adapter matrices have a gradient of exactly 0, perhaps rightly: they "
            "hold something, and the loss stays within its noise when they are moved by a tenth. Either the network is saturated there "
            f"(by too high a rate, say), or they do next to nothing: {some(zero)}."), loss=loss)
    if lacking or not math.isfinite(norm):
        all_of_them = len(lacking) == len([name for name in gradients if ".lora_B." in name])
        why = ("Nothing reaches the adapters: the graph is cut between the loss and all of them." if all_of_them else
               "The graph is cut behind them, or their layers do not run.")
        return Result(math.nan, math.nan, False, wrap(
            f"gradients  DEAD: {len(lacking)} of {len(gradients)} adapter matrices have a gradient that is zero or not finite: "
            f"{some(lacking)}. {why}"), lacking, wrong=[], loss=loss)
    whole = grouped(places, lambda name: "")[""]
    ratio, tolerance, ok = measured.verdict(whole, move, allowed)
    evenly = even and ok is not False and not measured.late() and measured.verdict(measured.evenly(places), move, allowed)
    if evenly and evenly[2] is False:
        ratio, tolerance, ok = evenly
    result = Result(ratio, tolerance, ok, "", loss=loss)
    apart = abs(loss - forward) > max({8: 1e-9, 4: 1e-4, 2: 0.02}[dtype.itemsize] * max(forward, 0.05), 2 * SURE * measured.noise())
    if ok and parts and not apart:
        for kind, direction in grouped(places, kind_of).items():
            if measured.late():
                break
            result.parts[kind] = measured.verdict(direction, move, allowed)
        result.wrong = [kind for kind, (_, _, fine) in result.parts.items() if fine is False]
    if ok is False:
        result.wrong, note = locate(measured, places, move, allowed)
    if apart:
        result.ok = False
        result.text = wrap(f"gradients  STALE: the training pass computes a loss of {loss:.5g}, a forward pass over the same rows "
                           f"with the same weights {forward:.5g}. "
                           "One of them works on old copies of the weights, or in another mode.")
    elif ok is False and abs(ratio) < tolerance:
        result.text = wrap(f"gradients  WRONG: the loss does not go with the adapters ({ratio:.3f} of what the gradient foretells, "
                           f"tolerance {tolerance:.3f}): "
                           f"the forward pass works on stale copies of them, or the gradient is not the loss's. {note}")
    elif ok is False:
        result.text = wrap(f"gradients  WRONG: along the gradient the loss changes {ratio:.3f} times as much as the gradient foretells, "
                           f"where 1 +- {tolerance:.3f} is right. {note}")
    elif result.wrong:
        result.ok = False
        listed = ", ".join(f"{kind} {result.parts[kind][0]:.3f} +- {result.parts[kind][1]:.3f}" for kind in result.wrong)
        result.text = wrap(f"gradients  WRONG in a part: the whole gradient foretells the loss ({ratio:.3f} +- {tolerance:.3f}), "
                           f"that of these projections does not: {listed}.")
    elif ok is None:
        rounding = measured.irreproducible()
        why = ("much of the gradients is rounding: made again from weights that differ in their last digits they differ by "
               f"{rounding:.1%}, as where a network is saturated (by too high a rate, say)"
               if rounding > max(0.05, allowed) else "the loss is too noisy here, or too rough, for this precision")
        measure = f"{ratio:.3f} +- {tolerance:.3f} of what they foretell." if math.isfinite(ratio) else "nothing that fits them."
        result.text = wrap(f"gradients  alive, not proved: {why}. Measured was {measure}")
    else:
        judged = [kind for kind, (_, _, fine) in result.parts.items() if fine]
        left = [kind for kind in grouped(places, kind_of) if kind not in result.parts] if parts else []
        result.text = wrap(f"gradients  proved: the loss changes {ratio:.4f} times as much as they foretell (1 +- {tolerance:.4f} is right)"
                           + (f"; so it does for each of {', '.join(judged)}" if judged else "")
                           + (f"; the time was over before {', '.join(left)} (proof.seconds)" if left else "") + ".")
    return result


def locate(measured, places, move, allowed):
    """(modules whose gradient is wrong, a sentence): layer by layer from the loss backwards, then within the first wrong layer."""
    deadline, wrong_layers, tried = time.perf_counter() + SECONDS, [], 0
    layers = grouped(places, layer_of)
    for layer in reversed(layers):
        if agreed(time.perf_counter() > deadline):
            break
        tried += 1
        if measured.verdict(layers[layer], move, allowed, 1)[2] is False:
            wrong_layers.append(layer)
    if not wrong_layers:
        return [], "No layer is wrong by itself as far as can be measured."
    inside = {name: direction for name, direction in grouped(places, module_of).items() if layer_of(name + ".") == wrong_layers[0]}
    wrong = [name for name, direction in inside.items() if measured.verdict(direction, move, allowed, 1)[2] is False]
    where = (f"Seen from the loss, {wrong_layers[0]} is the first of {len(wrong_layers)} wrong layers"
             + (f" (of {tried} tried)" if tried < len(layers) else f" (of {len(layers)})"))
    if not wrong:
        return wrong_layers[:1], where + "."
    within = some([name.removeprefix(wrong_layers[0] + ".") for name in wrong])
    return wrong, where + f", there in {within}: look at the backward pass there and just behind it."


def module_of(name):
    """model.layers.0.mlp.up_proj of base_model.model.model.layers.0.mlp.up_proj.lora_A.weight."""
    bare = name.removeprefix(lora_layers.PEFT_PREFIX)
    return bare.rpartition(".lora_")[0] if ".lora_" in name else bare.rstrip(".")


def layer_of(name):
    """The name up to the layer's number: model.layers.0; without a number the module's parent."""
    module = module_of(name)
    found = re.match(r"(.*?\.\d+)(\.|$)", module)
    return found[1] if found else module.rpartition(".")[0]


def kind_of(name):
    """up_proj of ...mlp.up_proj.lora_A.weight."""
    return module_of(name).rpartition(".")[2]


def grouped(places, key):
    """{key(name): [(slice, 1.0)]} of {name: slice}: directions for Measurement, neighbouring slices joined, but for DoRA's magnitudes."""
    groups, before = {}, ""
    for name, place in sorted(places.items(), key=lambda item: item[1].start):
        slices, apart, before = groups.setdefault(key(name), []), MAGNITUDE in name + before, name
        if slices and slices[-1][0].stop == place.start and not apart:
            slices[-1] = slice(slices[-1][0].start, place.stop), 1.0
        else:
            slices.append((place, 1.0))
    return groups


def some(names, shown=4):
    """The first few of some names, and how many more there are."""
    names = [module_of(name) if ".lora_" not in name else
             name.removeprefix(lora_layers.PEFT_PREFIX).removesuffix(".weight") for name in names]
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def wrap(text, width=80):
    """Text in lines of `width` columns, the later ones under the first one's second word (column 11)."""
    return "\n".join(textwrap.wrap(text, width, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False))


def main(argv):
    if not argv or "--help" in argv:
        print(__doc__)
        return 0
    ranks.alone("proof.py")
    words, _, overrides = settings.command_line(argv, {})
    if len(words) != 1:
        raise ValueError(f"give one configuration, as in: python proof.py configs/quickstart.json (got {' '.join(words) or 'none'})")
    config = settings.located(settings.read(settings.find(words[0]), overrides))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = quant.settled(config, device)
    tokenizer = data.load_tokenizer(config.model.path, config.data.chat_template, config.model.revision)
    rows = data.tokenize(data.read_splits(config)[0], tokenizer, config.data)
    network, codes = model.load(config, device), set()

    def forward_backward(batch, weight):
        loss = model.summed_loss(network, batch.to(device))[0]
        (loss * weight).backward()
        return loss.detach()

    print(f"network    {type(network).__name__}, {config.model.quant}, computing in {config.model.compute_dtype} on {device.type}, "
          f"{network.fused_layers} layers fused")
    parts = "even" if config.proof.parts == "no" else "parts"
    for where, size, what in (("B = 0", 0.0, "even"), ("B drawn at random", 1e-3, parts)):
        generator = torch.Generator().manual_seed(config.train.seed)
        with torch.no_grad():
            for name, parameter in lora_layers.adapters(network).items():
                if ".lora_B." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        batches = sample(config, rows, data.sample_stream(len(rows), config.train.seed, 0, len(rows)), device)
        result = check(network, forward_backward, batches, 65536.0 if config.model.compute_dtype == "fp16" else 1.0, what)
        supervised, tokens = sum(len(batch.targets) for batch in batches), sum(len(batch.input_ids) for batch in batches)
        print(f"\n{where}: {supervised} supervised tokens of {tokens}, loss {result.loss:.4f}, {result.seconds:.1f} s\n{result.text}")
        for name, (ratio, tolerance, ok) in result.parts.items():
            print(f"           {name:<12} {ratio:.4f} +- {tolerance:.4f}{'' if ok else '  WRONG' if ok is False else '  cannot be told'}")
        codes.add(4 if result.ok is False else 0)
    return max(codes)


if __name__ == "__main__":
    settings.run_command(main)
