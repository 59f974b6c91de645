"""The short form of bench/zoo.py: some of its sick and healthy runs, one seed; docs/HEALTH.md has the matrix of all."""
import importlib.util

import pytest
import torch
from conftest import PROJECT

spec = importlib.util.spec_from_file_location("zoo", PROJECT / "bench" / "zoo.py")
zoo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zoo)
RUNS = {run.name: run for kind in zoo.zoo() for run in kind}
FEW = ("graph-cut-unproved", "attention-frozen", "base-gradient-lost-later", "stale-copies", "optimizer-empty", "evaluation-stale", "B-not-zero",
       "terminator-masked", "plain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads, path = torch.get_num_threads(), tmp_path_factory.mktemp("zoo")
    torch.set_num_threads(1)
    zoo.make_base(path / "base-0", 0)
    yield path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", FEW)
def test_a_run_is_called_what_it_is(name, folder):
    result = zoo.one(RUNS[name], folder, 0)
    assert result["right"], (result["expected"], result["said"])


def test_a_fault_ends_with_its_run(folder):
    """What a fault replaces is in its place again, so that runs in one process do not infect each other."""
    import data
    import eval as evaluation
    import lora_layers
    import model
    import quant
    import schedule
    import tokens
    modules = (data, evaluation, model, quant, schedule, tokens, torch.optim)
    everything = lambda: {(owner.__name__, name): value for owner in modules for name, value in vars(owner).items()} | {
        "backward": lora_layers.FrozenMatmul.backward}
    before = everything()
    for run in RUNS.values():
        if run.fault is not None:
            with run.fault():
                pass
    assert all(everything()[name] is value for name, value in before.items())


def test_a_sick_run_needs_a_name_that_fits_and_a_healthy_one_silence():
    sick, healthy = zoo.Run("a", "", ("alert: x",)), zoo.Run("b", "")
    assert zoo.judge(sick, {"alert: x": "warning"}) and not zoo.judge(sick, {"alert: x": "note"})
    assert not zoo.judge(sick, {"alert: y": "fault"}) and not zoo.judge(sick, {})
    assert zoo.judge(healthy, {"alert: y": "note"})
    assert not zoo.judge(healthy, {"alert: y": "warning"}) and not zoo.judge(healthy, {"input: refused": "refuse"})


def test_every_kind_that_was_asked_for_is_there():
    sick, healthy = zoo.zoo()
    assert len(sick) >= 16 and all(run.expected for run in sick) and len(healthy) >= 8 and not any(run.expected for run in healthy)
    assert len({run.name for run in sick + healthy}) == len(sick + healthy)
