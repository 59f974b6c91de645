"""What a trainer's record says: every format of every trainer as one plain Record.

Read are trainer_state.json (transformers' Trainer, TRL, Unsloth, axolotl, LLaMA-Factory), our metrics.jsonl, LLaMA-Factory's
trainer_log.jsonl, ms-swift's logging.jsonl, a saved console log of any of the Trainer's family, folders that hold one of these,
and TensorBoard events. JSON and text need the standard library alone. Leaves out: what the figures mean (health.py).
"""
import ast
import json
import math
import pathlib
import re
from dataclasses import dataclass, field

# What a value is called in a record of ours or of TensorBoard (section/name), of the Trainer, of other logs -> here.
NAMES = {"train/loss": "loss", "train/grad_norm": "grad_norm", "train/learning_rate": "rate", "train/epoch": "epoch",
         "train/samples": "samples", "train/clip_threshold": "clip", "train/supervised_tokens": "supervised",
         "train/loss_scale": "scale", "train/skipped": "skipped",
         "eval/loss": "eval_loss", "eval/adapter_digest": "digest", "eval/unquantised_loss": "unquantised_loss",
          "eval/stop_rate": "stop_rate", "eval/token_accuracy": "accuracy", "eval/repetition": "repetition",
          "eval/overlap": "overlap", "eval/samples": "written", "adapters/lora_A_norm": "lora_A norm",
         "adapters/lora_B_norm": "lora_B norm", "adapters/delta_ratio": "delta_ratio", "adapters/modules": "modules",
         "proof/ratio": "proof", "proof/tolerance": "proof_tolerance", "proof/outcome": "proof_outcome", "train/noise_scale": "noise_scale",
         "loss": "loss", "grad_norm": "grad_norm", "learning_rate": "rate", "lr": "rate", "epoch": "epoch", "eval_loss": "eval_loss"}
TEXTS = ("digest", "written", "modules", "proof_outcome")
STEPS = ("step", "current_steps", "global_step", "global_step/max_steps")  # ours and the Trainer's; LLaMA-Factory's; others'; ms-swift's
NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "infinity": math.inf, "-infinity": -math.inf}
ENDLESS = 1e9  # the Trainer writes 2^63 - 1 epochs where it does not know how many rows there are


@dataclass
class Record:
    kind: str              # what was read, in words
    steps: list            # [{"step": int, name: float or text, …}], steps rising, every other key optional
    planned_steps: int = 0  # 0: unknown
    rows: int = 0          # training rows; 0: unknown
    clip: float = 0.0      # gradient norm clipped at, where the steps do not hold it; 0: unknown
    initial: bool = False  # it started from an adapter, which moves the weights before training
    rewarded: bool = False  # reinforcement learning: the level of its loss means nothing
    doubts: list = field(default_factory=list)  # what the format itself leaves open, in sentences

    def series(self, name, finite=True):
        """[(step, value)] of the steps that hold `name`; only finite numbers unless told otherwise."""
        return [(line["step"], line[name]) for line in self.steps if name in line and (not finite or math.isfinite(line[name]))]


def number(value):
    """A number, also one written as text ('2.7335', 'nan', '5e-05'); None for anything else."""
    if isinstance(value, str):
        text = value.strip().lower()
        try:
            value = NONFINITE.get(text) or float(text)
        except ValueError:
            return None
    if type(value) is int and abs(value) > 1e300:
        return math.inf
    return value if type(value) in (int, float) else None


def plain(line):
    """One line of metrics under the names of here, the rest left out: {"step": 25, "train/loss": 2.3} -> {"step": 25, "loss": 2.3}."""
    found = {"step": line["step"]}
    for tag, value in line.items():
        name = NAMES.get(tag)
        if name:
            value = (value if isinstance(value, str) else None) if name in TEXTS else value if type(value) is float else number(value)
            if value is not None:
                found[name] = value
    return found


def to_record(kind, lines, **known):
    """A Record from dictionaries with `step` and names of any of the trainers; those of one step are merged, the later value stays.

    Several evaluation sets are written as eval_NAME_loss: the first that the record names is taken, always the same one.
    """
    lines, steps = list(lines), {}
    names = {name for line in lines for name in line}
    chosen = "eval_loss" if names & {"eval_loss", "eval/loss"} else ""
    for line in lines:
        merged = steps.setdefault(line["step"], {"step": line["step"]})
        for name, value in line.items():
            if not chosen and name not in NAMES and re.fullmatch("eval[_/].+_loss", name):
                chosen = name
            here = "eval_loss" if name == chosen else NAMES.get(name)
            value = (value if isinstance(value, str) else None) if here in TEXTS else number(value)
            if here and value is not None:
                merged[here] = value
    rewarded = bool(names & {"reward", "train/reward", "reward_std", "objective/rlhf_reward"})
    return Record(kind, [steps[step] for step in sorted(steps)], rewarded=rewarded, **known)


# ------------------------------------------------------------------------------------------------------------- readers

def read(path):
    """The Record at `path`: a file of one of the formats above, or a folder that holds one.

    ValueError says what could not be read and where. A record without steps is a record.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = within(path)
    if path.is_dir():
        return read_events(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); name a trainer_state.json, a metrics.jsonl or a run folder") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not text; name a trainer_state.json, a metrics.jsonl, or the folder of TensorBoard events") from None
    if path.suffix == ".jsonl":
        return read_lines(text, path)
    if path.suffix in (".log", ".txt", ".out"):
        return read_console(text, path)
    state = parse(text, path)
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list):
        raise ValueError(f"{path}: has no log_history list, so it is not a trainer_state.json; "
                         "the Trainer writes one into every checkpoint-* folder")
    planned, epochs = number(state.get("max_steps")) or 0, number(state.get("num_train_epochs")) or 0
    entries, planned = checked(history, f"{path}, log_history entry"), max(0, int(min(planned, 1e15)))
    record = to_record("transformers' trainer_state.json", entries, planned_steps=planned)
    if epochs > ENDLESS:
        for line in record.steps:
            line.pop("epoch", None)
        record.doubts.append("coverage: the rows came as a stream of unknown length, so the recorded epoch says nothing")
    return record


def within(folder):
    """The record inside a folder: a file, or the folder of the events. Checkpoints' copies are passed over for the newest one."""
    by_step = lambda file: (len(file.parent.name), file.parent.name)  # 500 before 1000
    checkpoints = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=by_step, reverse=True)
    first, last = ("metrics.jsonl", "trainer_state.json"), ("trainer_log.jsonl", "logging.jsonl")
    files = [*(folder / name for name in first), *checkpoints, *(folder / name for name in last)]
    found = [file for file in files if file.is_file()]
    events = sorted({file.parent for file in folder.rglob("events.out.tfevents.*")}, key=lambda place: (len(place.parts), str(place)))
    if not found and not events:
        raise ValueError(f"{folder}: holds neither metrics.jsonl nor trainer_state.json nor TensorBoard events; "
                         "name the file or folder that does")
    if not found and len(events) > 1 and events[0] != folder:
        raise ValueError(f"{folder}: holds the TensorBoard events of {len(events)} runs; name one of them, such as {events[-1]}")
    return found[0] if found else events[0]


def read_lines(text, path):
    """A JSONL file, one object a line. A kill leaves an unfinished last line, which is passed over."""
    lines = text.split("\n")
    if not lines[-1].rstrip().endswith("}"):
        lines.pop()
    entries = [parse(line, f"{path}, line {at}") for at, line in enumerate(lines, start=1) if line.strip()]
    kinds = {"trainer_log.jsonl": "LLaMA-Factory's trainer_log.jsonl", "logging.jsonl": "ms-swift's logging.jsonl"}
    ours = any("/" in name for entry in entries[:3] if isinstance(entry, dict) for name in entry if name in NAMES)
    if not ours:  # others end with lines of another kind: the paths of the best checkpoint, total times
        entries = [entry for entry in entries if not isinstance(entry, dict) or any(name in entry for name in STEPS)] or entries
    totals = [number(entry.get("total_steps")) for entry in entries if isinstance(entry, dict)]
    known = of_settings(settings_beside(path)) if ours else {}
    known["planned_steps"] = int(next((total for total in totals if total), 0)) or known.get("planned_steps", 0)
    return to_record(kinds.get(path.name, "metrics.jsonl"), checked(entries, f"{path}, entry"), **known)


def settings_beside(path):
    """The settings of the config.json beside a metrics.jsonl of ours as {"section.key": value}; none where it cannot be read."""
    try:
        tree = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        return {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}
    except (OSError, ValueError, AttributeError):
        return {}  # a record by itself is enough


def of_settings(settings):
    """What a Record takes from the settings {"section.key": value} of a run of ours."""
    steps, start = settings.get("train.max_steps"), settings.get("lora.init", "zero")
    return {"planned_steps": steps if type(steps) is int and steps > 0 else 0,
            "initial": bool(settings.get("lora.init_from")) or start != "zero"}


def read_console(text, path):
    """A saved console log: the dictionaries that the Trainer prints, each at the step that the training's progress bar before it names.

    The bars of loading and tokenising have their name before them ("Map:  50%|"), and an evaluation's is shorter. A bar that is drawn less
    often than losses are printed names a step twice: each later loss is then taken for one of the step after. Without a progress bar the
    dictionaries are counted, and a step is one of them.
    """
    step, total, last, entries = 0, 0, 0, []
    bar = r"\d+%\|[^|\r\n]*\| *(\d+)/(\d+) \["
    for match in re.finditer(rf"{bar}|{{'[^{{}}\n]*}}", text):
        if match[1]:
            named = re.search(r"[^\]\s]: *$", text[max(0, match.start() - 80):match.start()])
            if not named and int(match[2]) >= total:
                step, total = int(match[1]), int(match[2])
            continue
        try:
            values = ast.literal_eval(re.sub(r"\b(nan|-?inf)\b(?!')", r"'\1'", match[0]))
        except (ValueError, SyntaxError):
            continue
        if isinstance(values, dict) and {"loss", "eval_loss", "grad_norm"} & set(values):
            last = max(step, last + ("loss" in values))
            entries.append({"step": last, **values})
    if not entries:
        raise ValueError(f"{path}: holds no line such as {{'loss': 2.1, 'grad_norm': 0.7, …}}, which the Trainer prints; "
                         "name a file that does")
    record = to_record("a console log", entries, planned_steps=total)
    if not total:
        record.doubts.append("steps: the log has no progress bar, so its lines are counted, and sums over steps count lines")
    return record


def parse(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); was the file cut off or edited?") from None


def checked(entries, where):
    """`entries` with a whole number >= 0 as step, whatever they call it; ValueError for one that has none."""
    for at, entry in enumerate(entries, start=1):
        name = next((name for name in STEPS if name in entry), "step") if isinstance(entry, dict) else None
        step = entry.get(name) if name else None
        if isinstance(step, str):  # '5', or ms-swift's '5/100'
            step = step.partition("/")[0].strip()
            step = int(step) if step.isdecimal() and len(step) < 16 else None
        if type(step) is float and step.is_integer():
            step = int(step)
        if type(step) is not int or step < 0:
            raise ValueError(f"{where} {at}: must be an object with a whole number as step, got {json.dumps(entry)[:60]}")
        entry["step"] = step
    return entries


def read_events(folder):
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow, and the only need for a package
    except ImportError:
        raise ValueError(f"{folder}: TensorBoard events need the package tensorboard; install it, or name a trainer_state.json "
                         "or metrics.jsonl") from None
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag in NAMES or re.fullmatch("eval/.+_loss", tag)]
    return to_record("TensorBoard events", [{"step": event.step, tag: event.value} for tag in tags for event in events.Scalars(tag)])
