"""Time, and figures that arrive later: a GPU runs behind the host, which waits for it only where it must.

Leaves out: what is done with the figures (train.py).
"""
import importlib.util
import os
import textwrap
import time

import torch


class Startup:
    """Where the time before the first step goes: each call notes what has just ended."""

    def __init__(self, began):
        self.last, self.seconds = began, {}

    def __call__(self, name):
        now = time.perf_counter()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self.last, 3)
        self.last = now

    def total(self):
        return sum(self.seconds.values())

    def shown(self):
        """The parts as text for a console, and what would shorten them where Python compiles all that it imports at each start."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        text = f"{self.total():.1f} s from the command to the end of its first step: {parts}"
        if not os.path.exists(importlib.util.cache_from_source(torch.__file__)):
            text += ("; Python compiles its packages at each start, since it keeps no bytecode of them: with PYTHONDONTWRITEBYTECODE= "
                     "PYTHONPYCACHEPREFIX=FOLDER before the command it keeps it there")
        return textwrap.fill(text, 80, initial_indent="start-up  ", subsequent_indent=" " * 10)


def mark(device):
    """A point in time: on a GPU when it gets there, which may be later than now."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start, end):
    """Seconds between two marks."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def to_host(figures):
    """Start copying a small tensor to the host; returns a function that waits for it and gives its numbers."""
    if figures.device.type != "cuda":
        return figures.tolist
    copy = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    copy.copy_(figures, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return lambda: (arrived.synchronize(), copy.tolist())[1]
