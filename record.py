"""What is written down as a run happens: metrics.jsonl is the truth, TensorBoard mirrors it.

One line of runs/NAME/metrics.jsonl is one step: a JSON object with `step` and the values by their TensorBoard tags
({"step": 25, "train/loss": 2.31, …}). A line is written whole, by one call, when its step is over; so a killed run leaves
whole lines and at most one unfinished at the end, and a resumed run cuts off what it is about to do again. JSON knows no
NaN or infinity: they stand as "nan", "inf" and "-inf". Leaves out: what the numbers mean (health.py, report.py), and
sending them anywhere.

    tensorboard --logdir runs
"""
import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shutil
import threading

TEXTS = ("alerts", "eval/adapter_digest", "eval/samples", "adapters/modules", "proof/outcome")  # tags that hold text
NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "datasets", "tokenizers", "tensorboard", "numpy")


def _line(data, where):
    """One line of metrics.jsonl as a dict, or a ValueError naming the line."""
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def strict(text):
        raise ValueError(f"{text} is not JSON; non-finite numbers stand as text")

    try:
        values = json.loads(data, object_pairs_hook=once, parse_constant=strict)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(values, dict) or type(values.get("step")) is not int or values["step"] < 0:
        raise ValueError(f"{where}: must be an object with a whole number as step, got {data[:100]!r}")
    for key, value in values.items():
        if type(value) not in (int, float, str):
            raise ValueError(f"{where}: {key} must be a number or text, got {json.dumps(value)[:100]}")
        textual = isinstance(value, str) and value not in NONFINITE
        if key.startswith(("alerts", "train/", "eval/", "adapters/", "proof/")) and (key in TEXTS) != textual:
            raise ValueError(f"{where}: {key} must be {'text' if key in TEXTS else 'a number'}, got {json.dumps(value)[:100]}")
        values[key] = NONFINITE.get(value, value) if isinstance(value, str) else value
    return values


def _whole_lines(path, problems=None):
    """[(bytes, values)] of the finished lines of a metrics file. An unfinished last line is what a kill leaves, and is not read."""
    lines = []
    for number, data in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            values = _line(data, f"{path}, line {number}")
            if lines and values["step"] <= lines[-1][1]["step"]:
                raise ValueError(f"{path}, line {number}: step {values['step']} after step {lines[-1][1]['step']}; "
                                 "steps must rise, each once")
            lines.append((data, values))
        except ValueError as error:
            if problems is None:
                raise
            problems.append(str(error))
    return lines


def read_metrics(run_folder, problems=None):
    """The steps of a run, oldest first: [{"step": int, tag: float, …}], NaN and infinities as floats.

    ValueError names a broken line; given a list of `problems`, such lines are left out and told there instead.
    """
    path = pathlib.Path(run_folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {run_folder} is not the folder of a run that has begun")
    return [values for _, values in _whole_lines(path, problems)]


@contextlib.contextmanager
def writing(what, remedy="make room and run again with --resume"):
    """Whatever the file system refuses inside, as an OSError that says what could not be written and what to do."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"{what} could not be written ({reason}); {remedy}") from error


def save_evaluation(run_folder, name, per_row, metadata):
    """Write what each evaluation row came to: evaluations/NAME.safetensors, whole or not at all. Returns its path.

    name: "step-000500", or "unquantised" for the untouched model in 16 or 32 bits. per_row: {"nll": summed nats, "tokens",
    "correct"}, float64 (rows,) each, one entry an evaluation row. metadata: {name: text}; which rows, tokenizer and adapter.
    """
    from safetensors.numpy import save
    folder = pathlib.Path(run_folder) / "evaluations"
    with writing(f"{folder / name}.safetensors"):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(save(per_row, metadata))
        os.replace(temporary, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def read_evaluations(run_folder, problems=None):
    """{step or "unquantised": ({"nll", "tokens", "correct"}, metadata)} of a run.

    ValueError names a file that is damaged; given a list of `problems`, such files are left out and told there instead.
    """
    from safetensors import SafetensorError, safe_open
    found = {}
    for path in sorted((pathlib.Path(run_folder) / "evaluations").glob("*.safetensors")):
        try:
            with safe_open(path, "np") as file:
                arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
            if set(arrays) != {"nll", "tokens", "correct"} or len({array.shape for array in arrays.values()}) > 1:
                raise ValueError(f"{path}: must hold nll, tokens and correct, one value a row each; "
                                 f"it holds {', '.join(arrays) or 'nothing'}")
        except (SafetensorError, ValueError) as error:
            told = error if isinstance(error, ValueError) else (
                f"{path}: not a whole safetensors file ({error}); delete it, and evaluate again with eval.py --keep")
            if problems is None:
                raise ValueError(str(told)) from None
            problems.append(str(told))
            continue
        found[int(path.stem[5:]) if path.stem.startswith("step-") and path.stem[5:].isdigit() else path.stem] = arrays, metadata
    return found


def take_along(source, run_folder, step):
    """Copy what the run in `source` recorded up to `step` to a run that goes on from there in another folder, which has no record yet.

    continues.json says so for good.
    """
    source, folder = pathlib.Path(source), pathlib.Path(run_folder)
    until = lambda path: not path.stem.startswith("step-") or path.stem[5:].isdigit() and int(path.stem[5:]) <= step
    names = [path.relative_to(source) for path in (source / "metrics.jsonl", *sorted(source.glob("evaluations/*.safetensors")))
             if path.is_file() and until(path)]
    for name in names:  # metrics.jsonl comes first: the Recorder cuts off what comes after the step
        with writing(folder / name, "make room and start again"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, folder / name)
    with writing(folder / "continues.json", "make room and start again"):
        (folder / "continues.json").write_text(json.dumps({"run": source.name, "step": step}), encoding="utf-8")


def continues(run_folder):
    """"NAME@step-000500" where a run goes on from another one's checkpoint in a folder of its own, else ""."""
    path = pathlib.Path(run_folder) / "continues.json"
    if not path.is_file():
        return ""
    origin = json.loads(path.read_text(encoding="utf-8"))
    return f"{origin['run']}@step-{origin['step']:06d}"


def _leave_to_next_call(args, hook=threading.excepthook):
    """TensorBoard's thread hands what it could not write to the next call, which tells it; a traceback before that tells nothing more."""
    if not issubclass(args.exc_type, OSError):
        hook(args)


class Nobody:
    """Stands where a Recorder would, and writes nothing: the record of all ranks is the first one's."""
    write = histogram = text = hyperparameters = flush = close = lambda *_: None


class Recorder:
    """Writes a run's metrics.jsonl and, if `tensorboard`, event files in the same folder.

    resume_step None: a new run, refused with ValueError where the folder already holds a recorded one. Otherwise the step
    of the checkpoint that the run goes on from: later steps are cut off in one rename, and purged in TensorBoard
    (-1 cuts off everything). Call flush() before saving a checkpoint, or a kill could lose the steps that it covers.
    """

    def __init__(self, run_folder, tensorboard, resume_step):
        folder = pathlib.Path(run_folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, path = folder, folder / "metrics.jsonl"
        lines = _whole_lines(path) if path.exists() else []
        if lines and resume_step is None:
            raise ValueError(f"{path}: holds {len(lines)} steps of an earlier run; "
                             "go on with --resume, or choose another folder with --out")
        last_step = -1 if resume_step is None else resume_step
        kept = b"".join(data + b"\n" for data, values in lines if values["step"] <= last_step)
        temporary = folder / ".metrics.jsonl.tmp"
        with open(temporary, "wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        self.step, self.values, self.last_step = None, {}, last_step
        self.events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed without
            threading.excepthook = _leave_to_next_call
            with writing(f"{folder}: TensorBoard's events"):
                self.events = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, step, values):
        """Add {tag: number or text} to the line of `step`. A later step ends the line; an earlier one is a mistake."""
        if step != self.step:
            self._end_line()
            assert step > self.last_step, f"step {step} was already recorded (the last is {self.last_step})"
            self.step = step
        for tag, value in values.items():
            assert tag != "step"
            self.values[tag] = value.item() if hasattr(value, "item") else value

    def _end_line(self):
        """One write of one whole line, then the same numbers to TensorBoard."""
        if self.step is None:
            return
        plain = {tag: str(value) if isinstance(value, float) and not math.isfinite(value) else value for tag, value in self.values.items()}
        data = (json.dumps({"step": self.step, **plain}, allow_nan=False) + "\n").encode("utf-8")
        with writing(f"{self.folder / 'metrics.jsonl'}: step {self.step}"):
            written = os.write(self.descriptor, data)
            if written < len(data):
                raise OSError(f"only {written} of {len(data)} bytes")
        if self.events:
            with writing(f"{self.folder}: TensorBoard's events of step {self.step}"):
                for tag, value in self.values.items():
                    if not isinstance(value, str):
                        self.events.add_scalar(tag, value, self.step)
        self.last_step, self.step, self.values = self.step, None, {}

    def histogram(self, step, tag, tensor):
        """The distribution of a tensor's finite values, in TensorBoard only."""
        values = tensor.detach().float().flatten().cpu()
        values = values[values.isfinite()]
        if self.events and len(values):
            with writing(f"{self.folder}: TensorBoard's events of step {step}"):
                self.events.add_histogram(tag, values, step)

    def text(self, step, tag, text):
        """A text (Markdown), in TensorBoard only."""
        if self.events:
            with writing(f"{self.folder}: TensorBoard's events of step {step}"):
                self.events.add_text(tag, text, step)

    def hyperparameters(self, flat):
        """{"lora.r": 16, …} for TensorBoard's HPARAMS page, in this run's own event file (add_hparams would make a second run of it)."""
        if self.events:
            from torch.utils.tensorboard.summary import hparams
            plain = {key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value) for key, value in flat.items()}
            for summary in hparams(plain, {"train/loss": 0.0, "eval/loss": 0.0}):
                self.events.file_writer.add_summary(summary)

    def flush(self):
        """End the step's line and put everything on the disk."""
        self._end_line()
        with writing(f"{self.folder}: the record"):
            os.fsync(self.descriptor)
            if self.events:
                self.events.flush()

    def close(self):
        """flush(), then release the files. The Recorder cannot be used afterwards."""
        self.flush()
        os.close(self.descriptor)
        if self.events:
            with writing(f"{self.folder}: TensorBoard's events"):
                self.events.close()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model():
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def kind_of(device):
    """What a torch device computes with, in words: the GPU's name, or the processor's kind and its widest instructions."""
    import torch
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def environment():
    """What a run ran on, for environment.json: versions, device, processor.

    No paths, no names of users or hosts, no environment variables.
    """
    import torch
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "devices": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
