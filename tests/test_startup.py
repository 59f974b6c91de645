"""What a start imports before its first step, where everything is cached: each module is read, and without bytecode compiled, at every start."""
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from conftest import PROJECT, settings_of

import clock

WARM_START = """
import gc, json, sys
import clock, train
collecting = gc.isenabled() and gc.get_freeze_count() > 100_000
told = clock.Startup.total  # called when the first step is over
def total(ended):
    print("LOADED", json.dumps([sorted(sys.modules), collecting]))
    return told(ended)
clock.Startup.total = total
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def loaded(tiny_inputs, tmp_path_factory):
    """(modules that a start of a tiny NF4 run had loaded when its first step was over, whether garbage is collected once all is imported)."""
    folder = tmp_path_factory.mktemp("startup")
    settings = settings_of(tiny_inputs, folder / "tiny.json")
    command = [str(settings), "--overwrite", f"--out={folder / 'run'}", f"--data.cache={folder / 'cache'}", "--train.max_steps=1",
               "--schedule.lr_warmup_steps=0", "--log.report=true", "--eval.unquantised=auto", "--proof.enabled=true"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the first one fills the cache
        done = subprocess.run([sys.executable, "-c", WARM_START, *command], capture_output=True, text=True, cwd=PROJECT, env=environment)
        assert done.returncode == 0, done.stderr
    modules, collecting = json.loads(done.stdout.partition("LOADED ")[2].splitlines()[0])
    return set(modules), collecting


@pytest.mark.parametrize("module", ["datasets", "matplotlib.figure", "peft", "pyarrow.parquet", "datasketch", "gguf"])
def test_a_warm_start_does_not_import_what_only_other_commands_or_the_end_of_a_run_need(loaded, module):
    assert module not in loaded[0]


@pytest.mark.parametrize("module", ["torch._inductor.compile_fx", "torch._dynamo.repro.after_dynamo", "functorch.compile", "networkx"])
def test_bitsandbytes_comes_without_torchs_compiler(loaded, module):
    assert "bitsandbytes.functional" in loaded[0] and module not in loaded[0]


def test_cached_tokens_are_read_without_pandas(tmp_path):
    """In a process of its own: scikit-learn, where it is installed, has transformers import pandas too."""
    script = f"""
import pathlib, sys, numpy, cache
ids, mask, lengths = numpy.arange(5, dtype=numpy.int32), numpy.array([0, 1, 0, 0, 1], bool), numpy.array([2, 3])
path = pathlib.Path({str(tmp_path)!r}) / "tokens.arrow"
if sys.argv[1] == "write":
    cache.write_tokens(path, [(ids, mask, lengths, ["a", "b"])])
else:
    found = cache.read_tokens(path)
    assert [list(part) for part in found] == [list(ids), [0, 2, 5], list(mask), ["a", "b"]], found
    assert found[0].dtype == numpy.int32 and found[2].dtype == bool and "pandas" not in sys.modules
"""
    for what in ("write", "read"):
        done = subprocess.run([sys.executable, "-c", script, what], capture_output=True, text=True, cwd=PROJECT)
        assert done.returncode == 0, done.stderr


def test_garbage_is_collected_again_once_everything_is_imported(loaded):
    assert loaded[1]


def test_a_python_that_keeps_no_bytecode_is_told_of_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    ended = clock.Startup(time.perf_counter())
    ended("imports")
    told = ended.shown()
    assert "compiles its packages at each start" in told and "PYTHONPYCACHEPREFIX=FOLDER" in told
    assert all(len(line) <= 80 for line in told.splitlines())
    kept = pathlib.Path(importlib.util.cache_from_source(torch.__file__))
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert "bytecode" not in ended.shown()
