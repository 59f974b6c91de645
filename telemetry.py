"""What the adapters have become, and how noisy their gradients are: figures for the record that cost a run next to nothing.

    ||dW|| / ||W||   how far each adapted weight has moved (Frobenius norms), dW = s B A (DoRA's magnitudes are left out)
    effective rank   over how many directions the move spreads: exp of the entropy of its singular values (Roy and Vetterli 2007)
    step ratio       rms of dW over the mean quantisation step of W: below about one half, rounding W + dW to W's own grid would lose
                     most of it, so such an adapter must not be merged into the quantised weight
    noise scale      how many samples a step would need before noise no longer drowns the gradient (McCandlish et al. 2018)

None of them reads a weight matrix in the loop: ||W|| and steps are measured once by `measure_weights`, all of dW is had from r x r
matrices. Leaves out: plots (report.py) and what to think of the figures (docs/PROOF.md).

How train.py uses it:

    weights = telemetry.measure_weights(network)                          once, after model.load
    recorder.write(step, telemetry.adapters(network, weights))            in evaluate(step)
    noise = telemetry.NoiseScale()                                        before the loop; NoiseScale(*what .state() returned) on resume
    seen = noise.observe(step, flat.grad, scaler["scale"], count)         in the loop, before clipping: a tensor of 0 or 5 numbers
    figures = torch.cat((figures, seen)), and in settle:
    values |= noise.update(numbers)                                       {} or {"train/noise_scale": samples}
"""
import json
import math

import torch

import lora_layers
import quant

NOISE_EVERY = 10   # steps from one pair of windows to the next: a rule that depends on the step alone, so that resuming keeps it
NOISE_MEMORY = 0.9  # of an average over pairs: some ten of them, a hundred steps
PAIR_AT = 4        # the pairs are steps 4 and 5, 14 and 15, ...: later than Adam's first steps, which are the longest


def adapted(network):
    """{module name: lora_layers.AdaptedLinear} of the modules that have an adapter."""
    return {name: module for name, module in network.named_modules() if isinstance(module, lora_layers.AdaptedLinear) and module.r}


# ----------------------------------------------------------------------------------------------------- adapters

@torch.no_grad()
def measure_weights(network):
    """{module name: (||W||_F, mean quantisation step or None)} of the adapted modules, one dequantised weight at a time.

    The mean step is over all weights: Int8 and LLM.int8(): the row's scale. NF4: the block's scale times half the distance between
    the two levels beside the weight's own (at either end: the distance to the one beside it). None where W is not quantised.
    """
    modules = adapted(network)
    dtype = network.adapter_memory.working.dtype
    wide = torch.promote_types(dtype, torch.float32)
    norms = [torch.linalg.vector_norm(module.weight.dequantize(dtype), dtype=wide).double() for module in modules.values()]
    steps = []
    for module in modules.values():
        with module.weight.whole():
            steps.append(quantisation_step(module.weight))
    there = torch.stack(norms + [step.double() for step in steps if step is not None]).tolist()  # the device is waited for once
    rest = iter(there[len(norms):])
    return {name: (norm, None if step is None else next(rest)) for name, norm, step in zip(modules, there, steps)}


def quantisation_step(weight):
    """Mean quantisation step of a quant.FrozenWeight as a scalar tensor, as `measure_weights` defines it; None without quantisation."""
    if isinstance(weight, quant.Int8Weight):
        return weight.scale.mean()
    if isinstance(weight, quant.LLMInt8Weight):
        return weight.row_max.mean() / 127
    if not isinstance(weight, quant.NF4Weight):
        return None
    levels = quant.nf4_codebook(weight.packed.device)
    gaps = torch.cat((levels[1:2] - levels[:1], (levels[2:] - levels[:-2]) / 2, levels[-1:] - levels[-2:-1]))  # (16,)
    of_byte = (gaps[:, None] + gaps[None, :]).reshape(-1)  # of the two codes in a byte
    packed, scales = weight.packed.reshape(-1), weight.block_scales()
    total = torch.zeros((), device=weight.packed.device, dtype=torch.float64)
    half = quant.NF4_BLOCK // 2  # bytes a block
    for start in range(0, len(packed), half << 16):
        part = of_byte[packed[start:start + (half << 16)].int()]
        part = torch.nn.functional.pad(part, (0, -len(part) % half)).view(-1, half).sum(dim=1)
        total += torch.dot(part.double(), scales[start // half:start // half + len(part)].double())
    return total / (weight.out_features * weight.in_features)


@torch.no_grad()
def shape_of_updates(network):
    """(||dW||_F, effective rank of dW), float64 (modules,) each, in the order of `adapted`, dW = s B A.

    dW's singular values are those of the r x r product of the triangular factors of B and A^T. The effective rank is exp of the
    entropy of the singular values divided by their sum (Roy and Vetterli 2007, section 2): between 1 and r, and 0 for dW = 0. Both are
    NaN where a matrix is not finite.
    Modules of one shape are done together, on the device, in fp32 or better.
    """
    modules, groups = list(adapted(network).values()), {}
    for i, module in enumerate(modules):
        groups.setdefault((module.lora_B.shape, module.lora_A.shape), []).append(i)
    norms, ranks = torch.zeros(2, len(modules), dtype=torch.float64, device=network.device)
    for members in groups.values():
        B, A = (torch.stack([getattr(modules[i], matrix) for i in members]) for matrix in ("lora_B", "lora_A"))  # (m, out, r), (m, r, in)
        whole = torch.isfinite(A).all(dim=(1, 2)) & torch.isfinite(B).all(dim=(1, 2))  # svdvals raises where one is not
        B, A = (torch.where(whole[:, None, None], matrix, 0) for matrix in (B, A))
        inner = torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.mT, mode="r").R.mT
        scalings = torch.tensor([[modules[i].scaling] for i in members], device=inner.device, dtype=torch.float64)
        values = torch.linalg.svdvals(inner.double()) * scalings
        share = values / values.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        place = torch.tensor(members, device=norms.device)
        norms[place] = torch.where(whole, values.norm(dim=1), math.nan)
        ranks[place] = torch.where(whole, torch.where(values[:, 0] > 0, torch.exp(torch.special.entr(share).sum(dim=1)), 0.0), math.nan)
    return norms, ranks


def adapters(network, weights):
    """What goes into the record at an evaluation: {tag: number or text}; the device is waited for once.

    weights: from `measure_weights`. adapters/delta_ratio and _max: mean and largest ||dW|| / ||W||; adapters/effective_rank: mean;
    adapters/step_ratio: mean of rms(dW) / mean quantisation step, absent where nothing is quantised; adapters/modules: JSON text
    {module: [||dW|| / ||W||, effective rank, step ratio or null]}, four digits each.
    """
    modules = adapted(network)
    norms, ranks = torch.stack(shape_of_updates(network)).tolist()
    table = {}
    for (name, module), norm, rank in zip(modules.items(), norms, ranks):
        size, step = weights[name]
        rms = norm / math.sqrt(module.out_features * module.in_features)
        table[name] = [norm / size if size else math.nan, rank, rms / step if step else None]
    ratios, ranks, steps = ([row[i] for row in table.values() if row[i] is not None] for i in range(3))
    mean = lambda values: sum(values) / len(values)
    values = {"adapters/delta_ratio": mean(ratios), "adapters/delta_ratio_max": max(ratios), "adapters/effective_rank": mean(ranks)}
    values |= {"adapters/step_ratio": mean(steps)} if steps else {}
    short = lambda value: None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
    return values | {"adapters/modules": json.dumps({name: [short(value) for value in row] for name, row in table.items()})}


# -------------------------------------------------------------------------------------------------- gradient noise

class NoiseScale:
    """The simple noise scale tr(S) / |G|^2 in samples (McCandlish et al. 2018, section 2.2), from the gradients of pairs of
    neighbouring windows.

    A window is often one packed micro-batch, so there are no smaller gradients in it to compare (appendix A.1 of the paper). Two windows
    in a row, with b1 and b2 samples and the gradients g1 and g2 of their mean losses, serve as the two halves of a larger one:
        |G|^2 is estimated by g1 . g2 and tr(S) by the mean of b1 (|g1|^2 - g1 . g2) and b2 (|g2|^2 - g1 . g2),
    which for b1 = b2 are the paper's estimates with B_small = b and B_big = 2 b. Both are averaged over pairs by themselves, exponentially,
    before they are divided. Unbiased but for one step's movement: g2 is taken after the step that followed g1 and went against it, which
    makes g1 . g2 smaller by about the rate x curvature x |g1|^2 (and nothing at a rate of 0). Samples are weighted by their supervised
    tokens, as in the loss. Costs a 16-bit copy of the gradient for one step in ten.
    """

    def __init__(self, figures=(0.0, 0.0, None), begun=None):
        """figures, begun: what `state` returned, to go on from there (begun on the gradient's device)."""
        self.signal, self.noise, pair = figures
        self.earlier = (pair[0], begun["earlier"], pair[1]) if pair else None

    def state(self):
        """What a resumed run goes on from: [signal, noise, [step, samples] of a pair begun, or None], {"earlier": its gradient} or {}."""
        step, gradient, samples = self.earlier or (0, None, 0)
        return [self.signal, self.noise, [step, samples] if self.earlier else None], {"earlier": gradient} if self.earlier else {}

    @torch.no_grad()
    def observe(self, step, gradient, scale, samples):
        """Call with each step's gradient before clipping: (n,), times the loss scale `scale` (a tensor or 1.0), of a window of `samples`.

        Returns a tensor (5,) on the gradient's device behind the second step of a pair, for `update`, else one (0,). Waits for nothing.
        """
        nothing = gradient.new_zeros(0)
        if step % NOISE_EVERY == PAIR_AT:
            self.earlier = step, (gradient / scale).to(torch.bfloat16), samples
        elif self.earlier:
            before, first, b1 = self.earlier
            self.earlier = None
            if before == step - 1:
                sums = torch.zeros(3, device=gradient.device, dtype=torch.float64)
                for g1, g2 in zip(first.split(1 << 22), gradient.split(1 << 22)):
                    g1, g2 = g1.to(gradient.dtype), g2 / scale
                    sums += torch.stack((torch.dot(g1, g2), torch.dot(g1, g1), torch.dot(g2, g2)))
                return torch.cat((sums.to(gradient.dtype), gradient.new_tensor([b1, samples])))
        return nothing

    def update(self, numbers):
        """{} or {"train/noise_scale": samples}, from what `observe` returned, as a list. A pair with a non-finite gradient is passed over.

        Empty too as long as the average of g1 . g2 is not above 0: the signal cannot be told from nothing yet.
        """
        if len(numbers) == 0 or not all(map(math.isfinite, numbers)) or 0 in numbers[1:]:
            return {}
        dot, first, second, b1, b2 = numbers
        self.signal = NOISE_MEMORY * self.signal + dot
        self.noise = NOISE_MEMORY * self.noise + (b1 * (first - dot) + b2 * (second - dot)) / 2
        return {"train/noise_scale": max(0.0, self.noise) / self.signal} if self.signal > 0 else {}
