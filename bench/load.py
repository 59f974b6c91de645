"""How fast a model is read and quantised, beside its files merely read, and how much memory that takes at most.

    python bench/load.py [8b nf4] [8b int8] ... [--work=/tmp/bench]

Shapes and random bf16 weights are those of bench/speed.py. For each pair the files are read by themselves and then loaded as train.py
loads them (model.load), first with their pages dropped from memory (Linux; a file system that lives in memory has none to drop), then
with them there. The peak is that of the GPU's allocator, up to the check of the architecture, which is timed apart; on a CPU only times
are measured. One JSON line a pair.
"""
import gc
import json
import os
import pathlib
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402

import config as settings  # noqa: E402
import loading  # noqa: E402
import model  # noqa: E402
import quant  # noqa: E402
import speed  # noqa: E402


def drop_pages(files):
    """Have the system forget what it keeps of `files`, written to disk first."""
    for file in files:
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(files):
    block, began = bytearray(16 * 2**20), time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(block):
                pass
    return time.perf_counter() - began


def loaded(chosen, device):
    """Load once: {"load": seconds up to the check of the architecture, "check": of it, "peak", "held": bytes on the GPU}."""
    found, check, gpu = {}, model.compare_with_transformers, device.type == "cuda"
    wait = torch.cuda.synchronize if gpu else lambda: None

    def timed_check(network):
        wait()
        found["load"] = time.perf_counter() - began
        if gpu:
            found.update(peak=torch.cuda.max_memory_allocated(), held=torch.cuda.memory_allocated())
        check(network)
        wait()
        found["check"] = time.perf_counter() - began - found["load"]

    if gpu:
        gc.collect()  # the model before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model.compare_with_transformers, began = timed_check, time.perf_counter()
    try:
        model.load(chosen, device)
    finally:
        model.compare_with_transformers = check
    return found


def main(argv):
    words, flags, overrides = settings.command_line(argv, {"work": "/tmp/bench"})
    device, work = torch.device("cuda" if torch.cuda.is_available() else "cpu"), pathlib.Path(flags["work"])
    quant.nf4_codebook()  # imports bitsandbytes: not a part of reading a model
    for shape, kind in zip(words[::2], words[1::2]) if words else [("8b", "nf4"), ("8b", "int8")]:
        folder = work / f"model-{shape}"
        work.mkdir(parents=True, exist_ok=True)
        speed.make_model(shape, folder, device)
        chosen = settings.from_dict({"model": {"path": str(folder), "quant": kind}, "memory": {"keep_dequantized": "no"}}, overrides)
        files = sorted(set(loading.weight_files(folder).values()))
        row = {"shape": shape, "quant": kind, "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
               "gb_on_disk": round(sum(file.stat().st_size for file in files) / 1e9, 2)}
        loaded(chosen, device)  # kernels compiled, libraries loaded
        for state, forget in (("dropped", drop_pages), ("cached", lambda files: None)):
            forget(files)
            row[f"{state}_read_seconds"] = round(seconds_to_read(files), 2)
            forget(files)
            found = loaded(chosen, device)
            row[f"{state}_load_seconds"] = round(found["load"], 2)
        row["check_seconds"] = round(found["check"], 2)
        found["largest"] = max(2 * parameter.numel() for parameter in loading.architecture(folder, torch.bfloat16).parameters())
        row |= {f"{name}_gib": round(found[name] / 2**30, 2) for name in ("peak", "held", "largest") if name in found}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
