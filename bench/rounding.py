"""What rounding to bf16 alone does to an evaluation loss before training: the same rows through the same weights, rounded in several ways.

    python bench/rounding.py CONFIG [--section.key=value ...] [--rows=300] [--draws=4] [--device=cpu]

Lines: in fp32; in bf16 on the fast and on the plain path; and in fp32 with what each layer gives on rounded to bf16 up or down by
chance, several times: `apart`, by chances of their own in every row, and `alike`, by the same chances in all rows at the tokens with
which all rows begin (a chat template's first ones). Rounding is a function of its input, so what all rows share is rounded alike in
all of them, and its effect does not average out over rows: an interval from drawing rows does not hold it. Leaves out: the backward
pass.
"""
import dataclasses
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import config as settings
import data
import eval as evaluation
import model

MAX_TOKENS = 4096  # of a micro-batch


def shared_beginning(rows):
    """With how many tokens all rows begin alike."""
    starts, shortest = rows.offsets[:-1], int(np.diff(rows.offsets).min())
    beginnings = rows.ids[starts[:, None] + np.arange(shortest)]
    alike = (beginnings == beginnings[0]).all(0)
    return shortest if alike.all() else int(alike.argmin())


def rounded_by_chance(x, chances):
    """x fp32 -> fp32 values that bf16 holds, up with the probability that the dropped bits are (chances: int32, 0 to 65,535)."""
    return ((x.contiguous().view(torch.int32) + chances) & -65536).view(torch.float32)


def round_layers(network, seed, begins):
    """Hooks that round what each decoder layer gives on; its first `begins` tokens of a row alike in all rows."""
    apart = torch.Generator(network.device).manual_seed(seed)

    def round_output(number):
        def hook(module, given, named, out):
            hidden = out[0] if isinstance(out, tuple) else out
            chances = torch.randint(65536, hidden.shape, generator=apart, device=hidden.device, dtype=torch.int32)
            position, shared = named["position_ids"], torch.Generator(hidden.device).manual_seed(seed * 1000 + number)
            table = torch.randint(65536, (max(1, begins), hidden.shape[-1]), generator=shared, device=hidden.device, dtype=torch.int32)
            chances = torch.where((position < begins)[..., None], table[position.clamp(max=len(table) - 1)], chances)
            rounded = rounded_by_chance(hidden, chances)
            return (rounded, *out[1:]) if isinstance(out, tuple) else rounded
        return hook

    layers = network.get_decoder().layers
    return [layer.register_forward_hook(round_output(number), with_kwargs=True) for number, layer in enumerate(layers)]


def interval(by_row, reference):
    """(difference in nats a token, its 2.5 % and 97.5 % quantiles over rows drawn with replacement)."""
    gap, tokens = by_row["nll"] - reference["nll"], reference["tokens"]
    drawn = np.random.default_rng(0).integers(0, len(gap), (2000, len(gap)))
    return gap.sum() / tokens.sum(), *np.quantile(gap[drawn].sum(1) / tokens[drawn].sum(1), (0.025, 0.975))


def main(argv):
    own = {"rows": "300", "draws": "4", "device": "cuda" if torch.cuda.is_available() else "cpu"}
    paths, own, given = settings.command_line(argv, own)
    if len(paths) != 1 or not all(own[name].isdigit() for name in ("rows", "draws")):
        raise ValueError("needs one configuration, and whole numbers for --rows and --draws: "
                         "python bench/rounding.py configs/approach1.json --rows=300")
    config = settings.located(settings.read(paths[0], given))
    rows = data.load_evaluation(config, data.load_tokenizer(config.model.path))
    count, begins = min(int(own["rows"]), len(rows)), shared_beginning(rows)
    print(f"{count} rows, which all begin with the same {begins} tokens")

    def network_of(dtype, **section):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=dtype),
                                      memory=dataclasses.replace(config.memory, graphs="no", **section))
        return model.load(changed, torch.device(own["device"]))

    def told(name, by_row):
        print(f"{name:<24} {by_row['nll'].sum() / by_row['tokens'].sum():.4f}"
              + ("  {:+.4f} ({:+.4f} to {:+.4f})".format(*interval(by_row, exact)) if by_row is not exact else ""), flush=True)

    plain = network_of("fp32", fused=False)
    exact = evaluation.evaluate(plain, rows, count, MAX_TOKENS)[1]
    told("fp32", exact)
    for kind, shared in (("apart", 0), ("alike", begins)):
        for seed in range(1, int(own["draws"]) + 1):
            hooks = round_layers(plain, seed, shared)
            told(f"rounded {kind}, draw {seed}", evaluation.evaluate(plain, rows, count, MAX_TOKENS)[1])
            for hook in hooks:
                hook.remove()
    del plain
    for name, fused in (("bf16, fast path", True), ("bf16, plain path", False)):
        told(name, evaluation.evaluate(network_of("bf16", fused=fused), rows, count, MAX_TOKENS)[1])


if __name__ == "__main__":
    settings.run_command(main)
