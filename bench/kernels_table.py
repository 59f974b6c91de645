"""Where a step's time goes, by kernel, and how near each is to what the GPU can do: a profile of two steps of train.py's own loop.

    python bench/kernels_table.py A [E ...] [--work=/tmp/bench] [--tldr=FILE.npz] [--write=FILE.json] [--section.key=value ...]
    python bench/kernels_table.py --table=bench/results/kernels.json          the tables again, from what --write kept

Matrix products are told apart by their shapes, T being a micro-batch's tokens: 2 m n k operations. Our own kernels move known numbers of
bytes a token or a weight (below). The roofline: 780 TFLOP/s of bf16 products as a short one reaches here, 3.0 TB/s of copies; --tflops=
and --tbs= give others. CUDA graphs hide operators, so the profile runs without them; the kernels are the same. Attention's operations
are those of the causal half, twice and a half again backward. Above 100 % of the roofline stands what finds a part of its numbers in the
GPU's cache. Kernels of less than half a percent are told as one line. Prints a Markdown table, most time first.
"""
import collections
import contextlib
import io
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import speed  # noqa: E402

FIRST, STEPS = 6, 2  # the steps that are profiled: kernels are compiled by then


def profiled(arguments):
    """([(name, input shapes, calls, GPU microseconds)], microseconds of all kernels) of STEPS steps of a run of train.py: operators with
    their shapes, and our own kernels, which no operator launches."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    import train
    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True)
    real, calls = train.schedule.window_samples, []

    def counted(step, *rest):
        if step == FIRST and step not in calls:
            torch.cuda.synchronize()
            profiler.start()
        if step == FIRST + STEPS and step not in calls:
            torch.cuda.synchronize()
            profiler.stop()
        calls.append(step)
        return real(step, *rest)

    train.schedule.window_samples = counted
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = train.main(arguments)
    train.schedule.window_samples = real
    if code:
        raise SystemExit(f"train.py ended with {code}\n{said.getvalue()[-3000:]}")
    found = []
    for event in profiler.key_averages(group_by_input_shape=True):
        # an operator, with what its kernels took; embeddings tell the micro-batches' lengths
        if event.key.startswith("aten::") and (event.self_device_time_total > 0 or event.key == "aten::embedding"):
            found.append((event.key, [shape for shape in event.input_shapes if shape], event.count, event.self_device_time_total))
    for event in profiler.key_averages():  # kernels that no operator launched: ours
        if event.device_type.name == "CUDA" and event.key.startswith("_"):
            found.append((event.key, [], event.count, event.self_device_time_total))
    total = sum(event.self_device_time_total for event in profiler.key_averages() if event.device_type.name == "CUDA")
    return found, total


def work_of(name, shapes, calls, shape, tokens):
    """(operations, bytes) of all calls of an operator or kernel, None where it is not known."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    if name in ("aten::mm", "aten::addmm", "aten::_addmm_activation"):
        matrices = [s for s in shapes if len(s) == 2]
        a, b = matrices[:2] if name == "aten::mm" else matrices[1:3]  # behind them may come what the result is written to
        return 2 * a[0] * a[1] * b[1] * calls, None
    if "attention" in name and shapes and len(shapes[0]) == 4:  # q, or its gradient: documents, heads, tokens, width of a head
        documents, heads, n, d = shapes[0]
        return 2 * documents * heads * n * n * d * calls * (2.5 if "backward" in name else 1), None
    moved = {"_add_rms_norm": 4 * width, "_rms_norm_backward": 5 * width, "_swiglu": 3 * inner, "_swiglu_backward": 5 * inner,
             "_swiglu_backward_sums": 5 * inner}
    layers = shape["num_hidden_layers"]
    if name in moved:
        passes = 2 * layers if "norm" in name else layers
        return None, 2 * moved[name] * tokens * passes  # two bytes a number
    return None, None


def rows_of(case, found, total, tokens, tflops, tbs):
    """[{"case", "kernel", "calls", "milliseconds", "share", "teraflop", "gigabytes", "roofline"}] a step, longest first, then the rest."""
    shape = speed.SHAPES[speed.CASES[case][0]]
    groups = collections.defaultdict(lambda: [0, 0.0, 0.0, 0.0])
    lengths = {shapes[1][-1] for name, shapes, *_ in found if name == "aten::embedding"}  # of the micro-batches
    for name, shapes, calls, spent in found:
        told = ["×".join("T" if n in lengths else str(n) for n in s) for s in shapes[:3] if len(s) > 1]
        label = name if name.startswith("_") else " ".join([name, *told])
        operations, moved = work_of(name, shapes, calls, shape, tokens * STEPS)
        for place, value in enumerate((calls, spent, operations or 0, moved or 0)):
            groups[label.strip()][place] += value
    rows, shown = [], 0.0
    for label, (calls, spent, operations, moved) in sorted(groups.items(), key=lambda item: -item[1][1]):
        if spent < 0.005 * total:
            continue
        shown += spent
        near = operations / spent / 1e6 / tflops if operations else moved / spent / 1e6 / tbs if moved else None
        rows.append({"case": case, "kernel": label, "calls": calls / STEPS, "milliseconds": round(spent / STEPS / 1e3, 3),
                     "share": round(spent / total, 4), "teraflop": round(operations / STEPS / 1e12, 4),
                     "gigabytes": round(moved / STEPS / 1e9, 2), "roofline": near and round(near, 3)})
    return rows + [{"case": case, "kernel": "the rest", "calls": None, "milliseconds": round((total - shown) / STEPS / 1e3, 3),
                    "share": round(1 - shown / total, 4), "teraflop": 0, "gigabytes": 0, "roofline": None}]


def table(rows):
    """Markdown of one case's rows."""
    lines = [f"Case {rows[0]['case']}: {sum(row['milliseconds'] for row in rows):.1f} ms of kernels a step", "",
             "| kernel | calls | ms | share | work | of the roofline |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        work = f"{row['teraflop']:.2f} TFLOP" if row["teraflop"] else f"{row['gigabytes']:.2f} GB" if row["gigabytes"] else "–"
        calls = "" if row["calls"] is None else f"{row['calls']:.0f}"
        near = f"{row['roofline']:.0%}" if row["roofline"] else "–"
        lines.append(f"| {row['kernel']} | {calls} | {row['milliseconds']:.2f} | {row['share']:.1%} | {work} | {near} |")
    return "\n".join(lines)


def main(argv):
    import record
    options = dict(arg[2:].split("=", 1) for arg in argv if arg.startswith("--") and "." not in arg.split("=")[0])
    if "table" in options:
        kept = json.loads(pathlib.Path(options["table"]).read_text())
        print("\n\n".join(table([row for row in kept if row["case"] == case]) for case in dict.fromkeys(row["case"] for row in kept)))
        return
    overrides = [arg for arg in argv if arg.startswith("--") and "." in arg.split("=")[0]] + ["--memory.graphs=no", "--proof.enabled=false"]
    npz = {name: options.get(name, f"{name}-train-ids.npz") for name in ("gsm8k", "tldr")}
    kept = []
    for case in (arg for arg in argv if not arg.startswith("--")):
        arguments, run, *_ = speed.prepare(case, FIRST + STEPS + 2, pathlib.Path(options.get("work", "/tmp/bench")), npz, overrides)
        found, total = profiled(arguments)
        tokens = record.read_metrics(run)[FIRST]["train/tokens"]
        rows = rows_of(case, found, total, tokens, float(options.get("tflops", 780)), float(options.get("tbs", 3.0)))
        print(table(rows), flush=True)
        kept += rows
    if "write" in options:
        pathlib.Path(options["write"]).write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
