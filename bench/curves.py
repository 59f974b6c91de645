"""What a token costs, against the length of rows, the rank and the size of the model: train.py's own loop, a few steps a point.

    python bench/curves.py length rank model [--steps=8] [--work=/tmp/bench] [--write=bench/results/curves.json]
    python bench/curves.py --plot=bench/results/curves.json           docs/cost.png, one line a question

length: 512 to 32,768 tokens a row, 32,768 a step, the 135M shape; rank: 8 to 128, the 8B shape, 2,048-token rows; model: 135M, 360M,
1.7B and 8B, 2,048-token rows; --only=135,360: those points alone. NF4, all seven projections, settings as train.py chooses them. A
point is the median step of those after the third, in microseconds a token, with its peak of memory. All in one process, so that what
is imported is imported once.
"""
import contextlib
import gc
import io
import json
import pathlib
import statistics
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import speed  # noqa: E402

speed.SHAPES |= {
    "360m": dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5,
                 vocab_size=49152, tie_word_embeddings=True),
    "1.7b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32,
                 vocab_size=49152, tie_word_embeddings=True),
}
SHORT = "random 2048"
QUESTIONS = {  # question -> [(value, shape, rows, samples a step, settings)]
    "length": [(n, "135m", f"random {n}", 32768 // n, {}) for n in (512, 1024, 2048, 4096, 8192, 16384, 32768)],
    "rank": [(r, "8b", SHORT, 8, {"lora.r": r, "lora.alpha": 2.0 * r}) for r in (8, 16, 32, 64, 128)],
    "model": [(millions, shape, SHORT, 8, {}) for millions, shape in ((135, "135m"), (360, "360m"), (1700, "1.7b"), (8000, "8b"))],
}


def point(question, value, shape, rows, samples, settings, steps, work, overrides):
    """One run of train.py; returns {"question", "value", "microseconds_per_token", "peak_memory_gib", ...}."""
    import torch

    import record
    import train
    name = f"{question}-{value}"
    plain = {"data.max_length": 40960, "log.tensorboard": "false", "log.report": "false", "data.audit": "off"}
    speed.CASES[name] = (shape, rows, samples, plain | settings)
    arguments, run, file, _, chosen = speed.prepare(name, steps, work, {}, overrides)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = train.main(arguments)
    if code:
        raise SystemExit(f"{name}: train.py ended with {code}\n{said.getvalue()[-3000:]}")
    lines = [line for line in record.read_metrics(run) if "train/seconds" in line]
    seconds = statistics.median(line["train/seconds"] for line in lines[3:])
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    cost = 1e6 * seconds * len(lines) / speed.real_token_count(file)
    return {"question": question, "value": value, "microseconds_per_token": round(cost, 3),
            "peak_memory_gib": round(max(line["train/peak_memory_gib"] for line in lines), 2), "timed_steps": len(lines) - 3,
            "settings": {key: str(entry) for key, entry in chosen.items()},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "torch": torch.__version__}


def plot(path):
    """docs/cost.png: microseconds a token against each question's value, a panel for each question that was run."""
    import plots
    points = json.loads(pathlib.Path(path).read_text())
    labels = {"length": "tokens a row (135M)", "rank": "rank (8B)", "model": "million weights"}
    asked = [question for question in labels if any(entry["question"] == question for entry in points)]
    with plots.sheet(HERE.parent / "docs" / "cost.png", columns=len(asked), height=3.2) as axes:
        for axis, question in zip(axes, asked):
            mine = {entry["value"]: entry["microseconds_per_token"] for entry in points if entry["question"] == question}
            if question == "model":  # the 8B of this question is rank 16 of the other one, the same run
                mine |= {8000: entry["microseconds_per_token"] for entry in points if (entry["question"], entry["value"]) == ("rank", 16)}
            mine = sorted(mine.items())
            axis.plot(*zip(*mine), marker="o", color=plots.TRAIN)
            axis.set_xscale("log", base=2)
            axis.set_xticks([value for value, _ in mine], [f"{value:,}" for value, _ in mine], rotation=30)
            axis.minorticks_off()
            if question == "model":
                axis.set_yscale("log")
            else:
                axis.set_ylim(0, 1.08 * max(cost for _, cost in mine))
            axis.set(xlabel=labels[question], ylabel="µs a token")


def main(argv):
    options = dict(arg[2:].split("=", 1) for arg in argv if arg.startswith("--") and "." not in arg.split("=")[0])
    if "plot" in options:
        plot(options["plot"])
        return
    overrides = [arg for arg in argv if arg.startswith("--") and "." in arg.split("=")[0]]
    for question in (arg for arg in argv if not arg.startswith("--")):
        for value, *how in QUESTIONS[question]:
            if options.get("only") and str(value) not in options["only"].split(","):
                continue
            found = point(question, value, *how, int(options.get("steps", 8)), pathlib.Path(options.get("work", "/tmp/bench")), overrides)
            print(json.dumps(found), flush=True)
            if "write" in options:
                path = pathlib.Path(options["write"])
                path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else []) + [found], indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
