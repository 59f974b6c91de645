"""What ranks cost each other: the gradient's sum, a layer gathered, a word agreed on; and what follows for more of them.

    torchrun --standalone --nproc-per-node=2 bench/scaling.py [--write=bench/results/scaling.json]     measure, on GPUs or CPUs
    python bench/scaling.py --table=bench/results/scaling.json                                         what was measured, as a table
    python bench/scaling.py --computed=bench/results/h100.json [--measured=FILE or --inside=300] [--between=40]
                                                           what follows for 8 and 64 GPUs; GB/s a GPU inside and between hosts

Measured: median time of `--rounds` (20) rounds of an all-reduce of each model's adapter gradient (fp32, rank 16, all seven
projections), an all-gather of one quantised layer, and one exchange of a number between the hosts. Computed, and marked so: more
ranks, by the ring's formula (Patarasuk and Yuan 2009: each rank sends 2 (N - 1) / N of the bytes to sum, (N - 1) / N of
them to gather) with the bandwidth measured or given.
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
    """{"weights": of a layer, "gradient": bytes of the adapters' fp32 gradient, "layer": bytes of a layer in NF4, double quantisation}."""
    layers, width, mlp, kv, _ = MODELS[model]
    projections = [(width, width), (kv, width), (kv, width), (width, width), (mlp, width), (mlp, width), (width, mlp)]
    weights = sum(out * inside for out, inside in projections)
    return {"weights": weights, "layers": layers,
            "gradient": 4 * layers * sum(r * (out + inside) for out, inside in projections),
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

    found = {"ranks": ranks.RANKS, "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU, gloo",
             "gradient": {}, "layer": {}}
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


def table(path):
    """The measured figures as Markdown."""
    found = json.loads(pathlib.Path(path).read_text())
    lines = [f"Measured, {found['ranks']} x {found['device']}:", "",
             "| model | gradient, MB | its sum, ms | layer, MB | gathered in, ms |", "| --- | --- | --- | --- | --- |"]
    for model, gradient in found["gradient"].items():
        layer = found["layer"][model]
        lines.append(f"| {model} | {gradient['bytes'] / 1e6:.1f} | {gradient['seconds'] * 1e3:.2f} | "
                     f"{layer['bytes'] / 1e6:.1f} | {layer['seconds'] * 1e3:.2f} |")
    return "\n".join([*lines, "", f"A number agreed on between the hosts: {found['word'] * 1e3:.2f} ms."])


def measured_rate(path):
    """Bytes a second that each rank sent while the largest gradient was summed."""
    found = json.loads(pathlib.Path(path).read_text())
    largest, n = max(found["gradient"].values(), key=lambda entry: entry["bytes"]), found["ranks"]
    return 2 * (n - 1) / n * largest["bytes"] / largest["seconds"]


def shares(model, n, rate, tokens_per_second, window, micro_batch):
    """(replicated, sharded, seconds to sum a gradient, to gather a layer): what share of n single GPUs' speed n ranks reach, each way.

    rate: bytes a second of the slowest link; tokens_per_second: of one GPU; window, micro_batch: tokens of a rank in a step and in a
    micro-batch. Replicated: compute / (compute + sum). Sharded: each layer is gathered for a forward and for a backward pass of each
    micro-batch while the layer before it computes (a third of the time forward, two thirds backward and recomputed), so a pass takes the
    longer of the two.
    """
    size, compute = sizes(model), window / tokens_per_second
    summed, gathered = (factor * (n - 1) / n * size[what] / rate for what, factor in (("gradient", 2), ("layer", 1)))
    layer = micro_batch / tokens_per_second / size["layers"]
    stretched = (max(layer / 3, gathered) + max(2 * layer / 3, gathered)) / layer
    return compute / (compute + summed), compute / (compute * stretched + summed), summed, gathered


def computed(speeds, inside, between, hosts_of=8, micro_batch=8192, micro_batches=4):
    """What follows for 8 and 64 GPUs, as Markdown. speeds: bench/results/h100.json; inside, between: bytes a second in and between hosts.

    One GPU's rate is case A's for the 8B shape; another shape's is that times the ratio of their weights, and two thirds of it where every
    layer is recomputed: 4 and 6 operations a weight and token. That is so sharded, and at 70B replicated too, whose activations would take
    5 times the room of the 8B's (80 layers of twice the width for 32), more than a GPU has.
    """
    rows = json.loads(pathlib.Path(speeds).read_text())
    ours = next(row for row in rows if row["case"] == "A" and row["who"] == "rawlora" and row.get("gpus", 1) == 1)
    weights = {model: sizes(model)["weights"] * sizes(model)["layers"] + MODELS[model][1] * MODELS[model][4] for model in MODELS}
    lines = ["| model | GPUs | sum, ms | layer gathered, ms | tokens/s, replicated | of N GPUs alone | tokens/s, sharded | "
             "of N GPUs alone |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for model in ("8B", "70B"):
        alone = ours["tokens_per_second"] * weights["8B"] / weights[model]
        for n in (8, 64):
            rate = inside if n <= hosts_of else between
            recomputed = alone * 2 / 3
            replicated = alone if model == "8B" else recomputed
            whole, _, summed, gathered = shares(model, n, rate, replicated, micro_batch * micro_batches, micro_batch)
            split = shares(model, n, rate, recomputed, micro_batch * micro_batches, micro_batch)[1]
            lines.append(f"| {model} | {n} | {summed * 1e3:.1f} | {gathered * 1e3:.2f} | {n * replicated * whole:,.0f} | {whole:.1%} | "
                         f"{n * recomputed * split:,.0f} | {split:.1%} |")
    told = (f"at {inside / 1e9:.0f} GB/s inside a host of {hosts_of} and {between / 1e9:.0f} GB/s between hosts, for each GPU; "
            f"{micro_batches} micro-batches of {micro_batch:,} tokens a rank and step")
    return "\n".join([*lines, "", told])


def main(argv):
    options = dict(arg[2:].split("=", 1) for arg in argv)
    if "table" in options:
        print(table(options["table"]))
        return
    if "computed" in options:
        inside = measured_rate(options["measured"]) if "measured" in options else 1e9 * float(options.get("inside", 300))
        print(computed(options["computed"], inside, 1e9 * float(options.get("between", 40))))
        return
    found = measure(int(options.get("rounds", 20)))
    if found.pop("first"):
        print(json.dumps(found))
        if "write" in options:
            pathlib.Path(options["write"]).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
