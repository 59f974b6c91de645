"""A script of the project run in a process that is forked from one with the large modules imported: what bench/findings.py starts."""
import os
import pathlib
import runpy
import sys

PROJECT = pathlib.Path(__file__).resolve().parent.parent


def packages(site):
    """{"PYTHONPATH": ...} for a process that also finds packages in the folder `site`, behind those that everybody finds."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(site))))}


def run_script(words, to, log, environment):
    """Run words[0] as its command would, with the rest as arguments; it says what it says to the file `to`, or to `log`, where errors go.

    environment: {name: text} to be added. Where CUDA has begun, here or in the process that was forked (an import may do that), this one
    cannot use it, and a new process takes its place.
    """
    import torch
    os.environ.update(environment)
    os.chdir(PROJECT)
    for number, path in ((2, log), (1, to or log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if path == to else os.O_APPEND), 0o644), number)
    if torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork():  # the former is False in the child of a process where it is True
        os.execv(sys.executable, [sys.executable, *words])
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = list(words)
    runpy.run_path(str(PROJECT / words[0]), run_name="__main__")
