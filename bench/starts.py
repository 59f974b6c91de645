"""What an adapter's start wins back of what NF4 costs, before any training: nothing, LoftQ, PiSSA.

    python bench/starts.py [--model.path=MODEL] [--rows=40] [--data=FILE] [--ranks=16,64]

Loss on evaluation rows of the model unquantised, in NF4, and in NF4 with adapters that start at
    loftq        the best correction of W - Q(W) of that rank: what lora.init=loftq trains from
    loftq x 5    five turns of LoftQ's alternation, in which Q becomes Q(W - BA): another base (Li et al. 2023, algorithm 1)
    pissa        the largest singular vectors of W, and Q(W - BA) as the base (Meng et al. 2024, QPiSSA)
The last two are not in model.py: their base is no longer the quantised model, so no other program could load what they train.
"""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import config as settings  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import loading
import lora_layers
import model  # noqa: E402
import quant  # noqa: E402


def loaded(overrides, **sections):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = settings.located(settings.from_dict({"memory": {"keep_dequantized": "no"}, **sections}, overrides))
    config = quant.settled(config, device)
    return config, model.load(config, device)


@torch.no_grad()
def restart(config, network, largest, turns):
    """Set every adapter and its base anew: BA from W (`largest`) or from what quantising W - BA leaves, `turns` times."""
    files = loading.weight_files(loading.local_folder(config.model.path, config.model.revision))
    for name, module in network.named_modules():
        if isinstance(module, lora_layers.AdaptedLinear) and module.r:
            weight = loading.read_tensor(files[f"{name}.weight"], f"{name}.weight", module.lora_A.device)
            if largest:
                module.weight = quant.PlainWeight(torch.zeros_like(weight))  # so that all of W is to be approximated
                lora_layers.correct(module, weight)
            for _ in range(turns):
                rest = weight.float() - module.scaling * module.lora_B @ module.lora_A
                module.weight = quant.quantize(rest.to(weight.dtype), config.model, quant.DTYPES[config.model.compute_dtype])
                if not largest:
                    lora_layers.correct(module, weight)


def main(argv):
    words, flags, overrides = settings.command_line(argv, {"rows": "40", "data": "", "ranks": "16,64"})
    if words:
        raise ValueError(f"{words[0]}: unexpected; options are --rows, --data, --ranks and --section.key=value")
    overrides += [("data.eval", flags["data"])] if flags["data"] else []
    config, network = loaded(overrides, model={"quant": "none"}, lora={"r": 1})
    rows = data.load_evaluation(config, data.load_tokenizer(config.model.path))
    loss = lambda: evaluation.evaluate(network, rows, int(flags["rows"]), 2048)[0]["loss"]
    exact = loss()
    config, network = loaded(overrides, lora={"r": 1})
    quantised = loss()
    print(f"{'unquantised':<20}{exact:.4f}\n{'nf4':<20}{quantised:.4f}", flush=True)
    tell = lambda what: print(f"{what:<20}{(now := loss()):.4f}  wins back {(quantised - now) / (quantised - exact):.0%}", flush=True)
    for r in map(int, flags["ranks"].split(",")):
        config, network = loaded([*overrides, ("memory.fused", "false")], lora={"r": r, "alpha": 2.0 * r, "init": "loftq"})
        tell(f"loftq, rank {r}")
        restart(config, network, False, 4)
        tell(f"loftq x 5, rank {r}")
        restart(config, network, True, 1)
        tell(f"pissa, rank {r}")
    return 0


if __name__ == "__main__":
    settings.run_command(main)
