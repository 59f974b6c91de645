"""How fast train.py is, on the cases that docs/PERFORMANCE.md names: its own loop, with record, alerts and telemetry on.

    python bench/speed.py A [B C D E ...] [--steps=25] [--gpus=1] [--work=/tmp/bench] [--gsm8k=FILE.npz] [--tldr=FILE.npz]
                          [--section.key=value ...]

    A   8B shape, 2048-token rows, 16 a step, within 60 GiB           B   the same within 8.1 GiB
    B12 the same within 12 GiB                                        C   the same in int8 within 14 GiB
    D   8B shape, GSM8K rows, 16 a step                               E   135M shape, tldr rows, 32 a step
    F   135M shape on a CPU, 256-token rows, 4 a step (for timings beside PEFT see bench/cpu.py)

Weights are random in the models' real shapes, made once under --work; D and E take token ids of real rows from .npz files (ids flat,
row offsets `off`, prompt lengths `prompt`). The first steps (compilation, graph recording) are reported apart; the others give
median, quartiles, tokens/s (real tokens, no padding), samples/s and the peak of GPU memory. One JSON line a case, added to the
list in --write=FILE where given. With --gpus=2 torchrun starts two ranks, which share windows of twice as many samples.

    python bench/speed.py A B --peers=trl,unsloth               in turn with other trainers (bench/peers_speed.py), on the same
                                                                weights and rows; --peers-site=FOLDER: packages that only they find
    python bench/speed.py --table=bench/results/h100.json,bench/results/cpu.json       the rows of such files as a Markdown table
"""
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "bench")]

import forked

SHAPES = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
               vocab_size=128256),
    "135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                 vocab_size=49152, tie_word_embeddings=True),
}
SUSTAINED, BANDWIDTH = 700e12, 3.0e12  # of an H100: bf16 products over 12 s (bench/pieces.py), and bytes copied a second
CASES = {  # shape, rows, samples a step, settings
    "A": ("8b", "random 2048", 16, {"memory.budget_gib": 60}),
    "B": ("8b", "random 2048", 16, {"memory.budget_gib": 8.1}),
    "B12": ("8b", "random 2048", 16, {"memory.budget_gib": 12}),
    "C": ("8b", "random 2048", 16, {"memory.budget_gib": 14, "model.quant": "int8"}),
    "D": ("8b", "gsm8k", 16, {}),
    "E": ("135m", "tldr", 32, {}),
    "F": ("135m", "random 256", 4, {"memory.max_tokens": 1024}),
}
GOALS = {"A": "17,500 (60)", "B": "12,000 (8.1)", "B12": "13,000 (12)", "C": "13,000 (14)", "D": "75", "E": "3,000", "F": "1.5 × peft"}


def make_model(shape, folder, device):
    """A model folder with random bf16 weights in a real shape, and a tokenizer whose words are w0, w1, ... by id."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
    if (folder / "tokenizer_config.json").exists():
        return
    settings = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=0,
                           rope_theta=500000.0)
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    network.save_pretrained(folder)
    del network
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, settings.vocab_size)}
    words = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)


def make_rows(kind, vocabulary, count, file, npz):
    """Write `count` JSONL rows: random words of one length, or real rows' token ids as words, prompt and answer apart."""
    import numpy as np
    with open(file, "w") as out:
        if kind.startswith("random"):
            length = int(kind.split()[1])
            ids = np.random.default_rng(1).integers(4, vocabulary, (count, length - 1))  # the end of text is one more
            for row in ids:
                out.write(json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n")
            return
        rows = np.load(npz[kind])
        ids, off, prompt = rows["ids"], rows["off"], rows["prompt"]
        for i in range(count):
            row = [f"w{max(4, token)}" for token in ids[off[i % (len(off) - 1)]:off[i % (len(off) - 1) + 1]]]
            cut = int(prompt[i % (len(off) - 1)])
            out.write(json.dumps({"prompt": " ".join(row[:cut]), "completion": " " + " ".join(row[cut:])}) + "\n")


def prepare(case, steps, work, npz, overrides, gpus=1):
    """Make what a case needs under `work`. Returns (train.py's arguments, its run folder, the rows file, samples a step, settings)."""
    import torch
    shape, kind, samples, settings = CASES[case]
    samples *= gpus
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, rows, run = work / f"model-{shape}", work / f"{case}.jsonl", work / f"run-{case}"
    work.mkdir(parents=True, exist_ok=True)
    make_model(shape, folder, device)
    make_rows(kind, SHAPES[shape]["vocab_size"], samples * steps, rows, npz)
    held_out = work / "eval.jsonl"
    held_out.write_text("".join(open(rows).readlines()[:4]))
    given = dict(override.lstrip("-").split("=", 1) for override in overrides)
    keys = {"model.path": folder, "data.train": rows, "data.eval": held_out, "data.max_length": 8192,
            "train.micro_batch_size": 1, "train.accumulation": samples, "train.max_steps": steps, "schedule.lr_warmup_steps": 2,
            "eval.samples": 0, "eval.unquantised": "no", "eval.every_steps": 0, "save.every_steps": 0, "log.every_steps": 25}
    keys |= settings | given
    base = work / "base.json"
    base.write_text("{}")
    arguments = [str(base), f"--out={run}", "--overwrite", *(f"--{key}={value}" for key, value in keys.items())]
    return arguments, run, rows, samples, settings | given


def measure(case, steps, work, npz, overrides, gpus=1):
    """Run train.py on one case in processes of its own, one a GPU; the window grows with them. Returns the row of results."""
    arguments, run, rows, samples, chosen = prepare(case, steps, work, npz, overrides, gpus)
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
    command = [sys.executable, *several, str(PROJECT / "train.py"), *arguments]
    began = time.perf_counter()
    with open(work / f"{case}.log", "w") as log:
        exit_code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if exit_code:
        raise SystemExit(f"{case}: train.py exited with {exit_code}\n{(work / f'{case}.log').read_text()[-3000:]}")
    import record
    metrics = record.read_metrics(run)
    lines = [line for line in metrics if "train/seconds" in line]
    seconds = [line["train/seconds"] for line in lines]
    timed = seconds[-max(1, min(len(seconds) - 5, 200)):]
    # a step, on average; train/tokens leaves out tokens that nothing is predicted from
    real_tokens = real_token_count(rows) / len(lines)
    quartiles = statistics.quantiles(timed, n=4) if len(timed) > 3 else [min(timed), 0, max(timed)]
    s = statistics.median(timed)
    environment = json.loads((run / "environment.json").read_text())
    plan = json.loads(max(run.glob("checkpoints/step-*/state.json")).read_text())["plan"]
    return {"case": case, "who": "rawlora", "gpus": gpus,
            "tokens_per_second": round(real_tokens / s), "samples_per_second": round(samples / s, 1),
            "supervised_tokens_per_second": round(statistics.mean(line["train/supervised_tokens"] for line in lines) / s),
            "step_seconds": round(s, 5), "step_seconds_quartiles": [round(quartiles[0], 5), round(quartiles[-1], 5)],
            "timed_steps": len(timed), "first_steps_seconds": [round(x, 2) for x in seconds[:3]],
            "peak_memory_gib": round(max(line["train/peak_memory_gib"] for line in lines), 2),
            "peak_reserved_gib": round(max((line.get("train/peak_reserved_memory_gib", 0.0) for line in lines)), 2),
            "process_seconds": round(time.perf_counter() - began, 1), "startup_seconds": json.loads(lines[0]["startup/parts"]),
            "evaluation_seconds": [line["eval/seconds"] for line in metrics if "eval/seconds" in line],
            "samples_seconds": [line["eval/samples_seconds"] for line in metrics if "eval/samples_seconds" in line],
            "settings": chosen, "plan": plan,
            "device": (environment["devices"] or [{"name": environment["cpu"]}])[0]["name"], "versions": environment["packages"]}


def real_token_count(rows):
    """Tokens of a rows file, the end of text included."""
    total = 0
    for line in open(rows):
        row = json.loads(line)
        total += len((row["text"] if "text" in row else row["prompt"] + row["completion"]).split()) + 1
    return total


def floor(row):
    """Tokens a second that a row of results cannot pass: its matrix products at SUSTAINED operations a second and nothing else but
    dequantisation at BANDWIDTH, neither waiting for the other's memory or launches.

    A token costs 4 operations a weight (forward, gradient of the input) of projections, and of the head where it is supervised; 6 a
    number of the adapters' matrices (both ways, and their own gradients); attention 7 times its context's mean length times the width of
    the heads (Dao et al. 2022: 2 products forward, 5 backward, half of them above the diagonal); a recomputed layer its forward pass
    again but for the last product. A micro-batch dequantises each weight twice, unless copies are kept.
    """
    shape, plan = SHAPES[CASES[row["case"]][0]], row["plan"]
    width, inner, layers, r = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"], 16
    heads = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    pairs = [(width, width + 2 * heads), (width, width), (width, 2 * inner), (inner, width)]  # q k v; o; gate, up; down
    weights, last = sum(a * b for a, b in pairs), inner * width
    adapters = r * (3 * width + width + 2 * heads + width + width + 2 * width + 2 * inner + inner + width)
    supervised = row["supervised_tokens_per_second"] / row["tokens_per_second"]
    context = row["tokens_per_second"] / row["samples_per_second"] / 2
    again = plan["checkpoint_layers"] / layers
    recomputed = again * (2 * (weights - last) + 2 * adapters + 4 * context * width)
    operations = (layers * (4 * weights + 6 * adapters + 14 * context * width + recomputed)
                  + 4 * supervised * width * shape["vocab_size"])
    bits = {"int8": 8}.get(row["settings"].get("model.quant"), 4.25)
    dequantised = 0 if plan["keep_dequantized"] else 2 * layers * weights * (bits / 8 + 2) / plan["max_tokens"]
    return 1 / (operations / SUSTAINED + dequantised / BANDWIDTH)


def table(paths):
    """The rows of results files as a Markdown table, in real tokens a second (samples for D and E): a line for each run of ours, with the
    rows of other trainers that follow it in the file, which ran in the same sitting; the fastest of each where there are several."""
    rows = [row for path in paths for row in json.loads(pathlib.Path(path).read_text())]
    others = [who for who in ("peft", "trl", "trl-liger", "unsloth") if any(row["who"] == who for row in rows)]
    names = ["case", "goal (GiB)", "rawlora", "median step, s (quartiles; steps)", "peak GiB, reserved", "of the floor",
             *(f"{who} (peak GiB)" for who in others), *(["× the best of them"] if others else [])]
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    starts = [i for i, row in enumerate(rows) if row["who"] == "rawlora"]
    for begin, end in sorted(zip(starts, [*starts[1:], len(rows)]), key=lambda place: rows[place[0]]["case"]):
        ours, beside = rows[begin], rows[begin + 1:end]
        unit = "samples_per_second" if ours["case"] in "DE" else "tokens_per_second"
        found = [max((row for row in beside if row["who"] == who), key=lambda row: row[unit], default=None) for who in others]
        low, high = ours["step_seconds_quartiles"]
        quant = ours["settings"].get("model.quant")
        another = f", {quant}" if quant and quant != CASES[ours["case"]][3].get("model.quant") else ""
        another += ", H200" if "H200" in ours["device"] else ""
        cells = [ours["case"] + another, GOALS.get(ours["case"], "–"), f"{ours[unit]:,.0f} {unit.split('_')[0]}/s",
                 f"{ours['step_seconds']:.4g} ({low:.4g}-{high:.4g}; {ours['timed_steps']})",
                 f"{ours['peak_memory_gib']:.1f}, {ours['peak_reserved_gib']:.1f}" if "peak_reserved_gib" in ours
                 else f"{ours['peak_memory_gib']:.1f}, –",
                 f"{ours['tokens_per_second'] / floor(ours):.0%}" if "plan" in ours else "–",
                 *(f"{row[unit]:,.0f} ({row['peak_memory_gib']:.1f})" if row else "–" for row in found)]
        theirs = max((row[unit] for row in found if row), default=0)
        lines.append("| " + " | ".join(cells + ([f"{ours[unit] / theirs:.2f}" if theirs else "–"] if others else [])) + " |")
    return "\n".join(lines)


def measure_peer(case, peer, work, npz, site):
    """A row of bench/peers_speed.py, in a process of its own that also finds packages in `site`; None, and why on stderr, if it fails."""
    command = [sys.executable, str(PROJECT / "bench/peers_speed.py"), peer, case, f"--work={work}",
               *(f"--{name}={file}" for name, file in npz.items())]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (forked.packages(site) if site else {}))
    found = [line for line in done.stdout.splitlines() if line.startswith('{"case"')]
    if not found:
        print(f"{case}: {peer} gave no answer: {done.stderr[-1500:]}", file=sys.stderr, flush=True)
    return json.loads(found[-1]) if found else None


def main(argv):
    options = dict(arg[2:].split("=", 1) for arg in argv if arg.startswith("--") and "=" in arg and "." not in arg.split("=")[0])
    if "table" in options:
        print(table(options["table"].split(",")))
        return
    overrides = [arg for arg in argv if arg.startswith("--") and "." in arg.split("=")[0]]
    npz = {"gsm8k": options.get("gsm8k", "gsm8k-train-ids.npz"), "tldr": options.get("tldr", "tldr-train-ids.npz")}
    steps, gpus, work = int(options.get("steps", 25)), int(options.get("gpus", 1)), options.get("work", "/tmp/bench")
    peers, site = [peer for peer in options.get("peers", "").split(",") if peer], options.get("peers-site")
    for case in (arg for arg in argv if not arg.startswith("--")):
        rows = [measure(case, steps, pathlib.Path(work), npz, overrides, gpus)]
        for row in (*rows, *(measure_peer(case, peer, work, npz, site) for peer in peers)):
            print(json.dumps(row), flush=True)
            if row and "write" in options:
                path = pathlib.Path(options["write"])
                path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else []) + [row], indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
