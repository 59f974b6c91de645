"""What ranks cost each other: the gradient's sum, a layer gathered, a word agreed on; and what follows for more of them.

    torchrun --standalone --nproc-per-node=2 bench/scaling.py [--write=bench/results/scaling.json]     measure, on GPUs or CPUs
    python bench/scaling.py --table=bench/results/scaling.json                                         docs/SCALING.md's tables

Measured: median time of `--rounds` (20) rounds of an all-reduce of each model's adapter gradient (fp32, rank 16, all seven
projections), an all-gather of one quantised layer, and one exchange of a number between the hosts. Computed, and marked so: the
same for more ranks, by the ring's formula (Patarasuk and Yuan 2009: each rank sends 2 (N - 1) / N of the bytes to sum, (N - 1) / N of
them to gather) with the bandwidth measured, or one given with --network=GB/s for the slowest link between hosts.
"""
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

MODELS = {  # layers, width, MLP width, key-value width, vocabulary
    "135M": (30, 576, 1536, 192, 49152),
    "8B": (32, 4096, 14336, 1024, 128256),
    "70B": (80, 8192, 28672, 1024, 128256),
}


def sizes(model, r=16):
    """{"weights": of a layer, "gradient": bytes of the adapters' fp32 gradient, "layer": bytes of a layer in NF4 with double quantisation}."""
    layers, width, mlp, kv, _ = MODELS[model]
    projections = [(width, width), (kv, width), (kv, width), (width, width), (mlp, width), (mlp, width), (width, mlp)]
    weights = sum(out * inside for out, inside in projections)
    return {"weights": weights, "layers": layers, "gradient": 4 * layers * sum(r * (out + inside) for out, inside in projections),
            "layer": int(weights * (0.5 + 1 / 64 + 4 / 64 / 256))}


def measure(rounds):
    """{"ranks", "device", "gradient", "layer": {model: {"bytes", "seconds"}}, "word": seconds}; every rank takes part."""
    import torch
    import torch.distributed as dist
    import ranks
    device = ranks.start(600)

    def median(action):
        times = []
        for _ in range(rounds + 3):
            ranks.most(0)
            began = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times[3:])

    found = {"ranks": ranks.RANKS, "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU, gloo", "gradient": {}, "layer": {}}
    for model in MODELS:
        gradient, layer = (sizes(model)[what] for what in ("gradient", "layer"))
        if device.type == "cpu" and model != "135M":
            continue
        total = torch.zeros(gradient // 4, device=device)
        found["gradient"][model] = {"bytes": gradient, "seconds": median(lambda: dist.all_reduce(total))}
        part = torch.zeros(layer // ranks.RANKS, device=device, dtype=torch.uint8)
        whole = torch.zeros(len(part) * ranks.RANKS, device=device, dtype=torch.uint8)
        found["layer"][model] = {"bytes": layer, "seconds": median(lambda: dist.all_gather_into_tensor(whole, part))}
        del total, part, whole
    found["word"] = median(lambda: ranks.most(1))
    found["first"] = ranks.FIRST
    ranks.finish()
    return found


def table(path, network):
    """The measured figures and what the formula makes of them, as Markdown. network: bytes a second between hosts, or None."""
    found = json.loads(pathlib.Path(path).read_text())
    n = found["ranks"]
    lines = [f"Measured, {n} x {found['device']}:", "", "| model | gradient, MB | its sum, ms | layer, MB | gathered in, ms |", "| --- | --- | --- | --- | --- |"]
    for model, gradient in found["gradient"].items():
        layer = found["layer"][model]
        lines.append(f"| {model} | {gradient['bytes'] / 1e6:.1f} | {gradient['seconds'] * 1e3:.2f} | {layer['bytes'] / 1e6:.1f} | {layer['seconds'] * 1e3:.2f} |")
    lines += ["", f"A number agreed on between the hosts: {found['word'] * 1e3:.2f} ms.", "", "Computed:", "",
              "| model | ranks | gradient's sum, ms | a layer gathered, ms | all layers twice, ms |", "| --- | --- | --- | --- | --- |"]
    largest = max(found["gradient"].values(), key=lambda entry: entry["bytes"])
    rate = network or 2 * (n - 1) / n * largest["bytes"] / largest["seconds"]
    for model in MODELS:
        for more in (8, 64):
            summed, gathered = (factor * (more - 1) / more * sizes(model)[what] / rate for what, factor in (("gradient", 2), ("layer", 1)))
            lines.append(f"| {model} | {more} | {summed * 1e3:.2f} | {gathered * 1e3:.2f} | {2 * sizes(model)['layers'] * gathered * 1e3:.0f} |")
    return "\n".join(lines + ["", f"at {rate / 1e9:.0f} GB/s" + (", given" if network else ", from the largest sum measured")])


def main(argv):
    options = dict(arg[2:].split("=", 1) for arg in argv)
    if "table" in options:
        print(table(options["table"], float(options["network"]) * 1e9 if "network" in options else None))
        return
    found = measure(int(options.get("rounds", 20)))
    if found.pop("first"):
        print(json.dumps(found))
        if "write" in options:
            pathlib.Path(options["write"]).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
