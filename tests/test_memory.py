"""memory.py: which plan is taken, from readings that are given instead of measured; the probe itself runs in tests/test_gpu.py."""
import types

import numpy as np
import pytest
from conftest import make_model

import config as settings
import graphs
import memory

GIB = 2**30
READINGS = {"layers": 32, "base": 6 * GIB, "input": 8192, "stored": (0.6 * GIB, 3.8e6), "recomputed": (0.6 * GIB, 0.45e6), "kept": 0,
            "table": GIB, "dequantised": True}


def chosen(limit_gib, sizes=(2048, 4096, 8192, 16384), layers=None, offload="auto", keep="auto", **changes):
    return listed(limit_gib, sizes, layers, offload, keep, **changes)[0]


def listed(limit_gib, sizes=(1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384), layers=None, offload="auto", keep="auto",
           count=3, **changes):
    asked = types.SimpleNamespace(offload=offload, keep_dequantized=keep)
    return memory.shortlist(memory.choices(READINGS | changes, sizes, layers, asked, limit_gib * GIB), limit_gib * GIB, count)


def peak(plan, found=READINGS):
    """The same straight line, written the other way round."""
    share = plan["checkpoint_layers"] / found["layers"]
    line = [stored * (1 - share) + recomputed * share for stored, recomputed in zip(found["stored"], found["recomputed"])]
    away = plan["max_tokens"] * found["input"] * max(0, plan["checkpoint_layers"] - 3) if plan["offload"] else 0
    return (found["base"] + line[0] + line[1] * plan["max_tokens"] - away - found["table"] * plan["host_embeddings"]
            - found["kept"] * (not plan["keep_dequantized"]))


@pytest.mark.parametrize("limit", [7.5, 8, 10, 12, 16, 24, 40, 60, 100])
def test_what_is_chosen_fits_and_more_memory_is_never_slower(limit):
    plan = chosen(limit)
    assert peak(plan) <= limit * GIB
    assert chosen(limit * 1.5)["checkpoint_layers"] <= plan["checkpoint_layers"] or chosen(limit * 1.5)["max_tokens"] > plan["max_tokens"]


def test_nothing_is_recomputed_or_sent_to_the_host_where_everything_fits():
    plan = chosen(100)
    assert (plan["max_tokens"], plan["checkpoint_layers"], plan["offload"], plan["host_embeddings"]) == (16384, 0, False, False)


def test_what_the_user_set_stays_as_set():
    assert chosen(100, layers=7)["checkpoint_layers"] == 7
    assert chosen(100, sizes=[3000])["max_tokens"] == 3000
    assert not chosen(12, offload="no")["offload"]
    assert chosen(100, offload="yes")["host_embeddings"]


def test_kept_copies_are_given_up_before_layers_are_recomputed():
    plan = chosen(45, base=19 * GIB, kept=13 * GIB, sizes=[8192])
    assert not plan["keep_dequantized"] and plan["checkpoint_layers"] == 0
    assert chosen(60, base=19 * GIB, kept=13 * GIB, sizes=[8192])["keep_dequantized"]
    with pytest.raises(ValueError, match="GiB are not enough"):
        chosen(18, base=19 * GIB, kept=13 * GIB, keep="yes")


def test_what_fits_nowhere_is_told_with_what_it_would_take_and_the_remedies():
    with pytest.raises(ValueError, match=r"memory: 5\.0 GiB are not enough: with 2,048 tokens a micro-batch and 32 layers recomputed the "
                                         r"run would take 6\.\d GiB; .*memory\.budget_gib.*model\.quant"):
        chosen(5)


@pytest.mark.parametrize("limit", [8, 11.3, 12, 24, 60])
def test_what_is_timed_fits_and_differs_by_twice_the_size_at_least(limit):
    plans = listed(limit)
    sizes = sorted(plan["max_tokens"] for plan in plans)
    assert all(2 * a <= b for a, b in zip(sizes, sizes[1:])) and len({plan["host_embeddings"] for plan in plans}) == 1
    assert all(peak(plan) <= limit * GIB for plan in plans) and listed(limit, count=1) == plans[:1]


def test_the_clock_decides_between_choices_that_fit(monkeypatch):
    network = types.SimpleNamespace(device=types.SimpleNamespace(type="cpu"))
    plans = [{"max_tokens": size, "why": "probe"} for size in (2048, 4096, 8192)]
    took = {2048: 3e-4, 4096: 2e-4, 8192: None}  # None: did not fit after all
    monkeypatch.setattr(memory, "apply", lambda network, chosen: None)
    monkeypatch.setattr(memory, "seconds_a_token", lambda network, rows, max_tokens, passes: took[max_tokens])
    assert memory.fastest(network, None, {}, plans)["max_tokens"] == 4096
    assert memory.fastest(network, None, {}, plans[2:]) is None
    took[8192] = 1e-4
    fastest = memory.fastest(network, None, {}, plans)
    assert fastest["max_tokens"] == 8192
    took[2048] = 1.02e-4  # the first is what should be fastest: noise does not put another one in its place
    assert memory.fastest(network, None, {}, plans)["max_tokens"] == 2048
    took[2048] = 3e-4
    assert "2,048 tokens took 3.00 times as long; 4,096 tokens took 2.00 times as long" in fastest["why"]


@pytest.mark.parametrize("largest", [10**9, 2048])  # tokens that fit: all, or few, so that smaller sizes must do
def test_the_probe_reads_what_a_token_takes_beyond_the_chunk_of_logits(monkeypatch, tmp_path, largest):
    network = make_model(tmp_path, num_hidden_layers=6)
    network.loss_chunk, recomputed = 2048, []
    layers_bytes = lambda tokens: tokens * (1000 * 6 + 9000 * (6 - recomputed[-1]))
    logits = lambda tokens: 5000 * min(tokens, 2048)
    monkeypatch.setattr(memory.model, "recompute", lambda network, layers: recomputed.append(layers))
    needed = lambda network, tokens: 7_000_000 + layers_bytes(tokens) + logits(tokens) if tokens <= largest else None
    monkeypatch.setattr(memory, "peak_bytes", needed)
    monkeypatch.setattr(memory.torch.cuda, "memory_allocated", lambda: 7_000_000)
    found = memory.probe(network, False)
    per_token = 1000 * 6 if largest > 4096 else 1000 * 6 + 5000  # among small sizes logits still grow
    assert found["recomputed"][1] == per_token and found["stored"][1] == per_token + 9000 * 6
    assert found["recomputed"][0] == (5000 * 2048 if largest > 4096 else 0)
    monkeypatch.setattr(memory, "peak_bytes", lambda network, tokens: None)
    with pytest.raises(ValueError, match="2,048 tokens do not fit on the GPU"):
        memory.probe(network, False)


def test_micro_batches_hold_the_longest_row_and_little_more_than_a_window():
    assert memory.sizes_for(100, 64) == [1024]
    assert memory.sizes_for(5000, 64) == [1024, 1536, 2048, 3072, 4096, 6144]
    assert memory.sizes_for(5000, 5500) == [5500, 6144]
    assert memory.sizes_for(10**6, 64)[-1] == 16384


@pytest.fixture
def planned(monkeypatch):
    """memory.plan for a small network on a GPU that is not there; called with what the longest rows take, and settings of memory."""
    layers = [None] * 30
    network = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), get_decoder=lambda: types.SimpleNamespace(layers=layers),
                                    modules=lambda: [])
    rows = types.SimpleNamespace(offsets=np.arange(101) * 62, names=[str(i) for i in range(100)])
    monkeypatch.setattr(graphs, "serves", lambda network, layers: "some layers are recomputed" if layers else "")
    monkeypatch.setattr(memory, "apply", lambda network, chosen: None)
    monkeypatch.setattr(memory, "room", lambda device, budget_gib: 10 * GIB)

    def plan(taken_gib, before=None, fits=(True,), **asked):
        passes = []  # what ran on the longest rows; the first ones fit or not, and those after them as the last one

        def seconds_a_token(network, rows, tokens, **_):
            passes.append(tokens)
            return 1e-5 if fits[min(len(passes), len(fits)) - 1] else None

        monkeypatch.setattr(memory, "seconds_a_token", seconds_a_token)
        monkeypatch.setattr(memory.torch.cuda, "max_memory_allocated", lambda: taken_gib * GIB)
        return memory.plan(settings.from_dict({"memory": asked}), network, rows, before or {}), passes

    return plan


def test_a_small_model_that_fits_needs_no_probe_and_one_pass_over_the_longest_rows(planned, monkeypatch):
    monkeypatch.setattr(memory, "probe", lambda network, kept: pytest.fail("it was probed"))
    plan, passes = planned(9)
    assert plan["checkpoint_layers"] == 0 and plan["graphs"] and passes == [plan["max_tokens"]] and plan["why"] == "9.0 of 10.0 GiB taken"


def test_a_small_model_that_takes_more_than_there_is_is_probed(planned, monkeypatch):
    monkeypatch.setattr(memory, "probe", lambda network, kept: READINGS | {"layers": 30})
    plan, passes = planned(11)
    assert "expected" in plan["why"] and plan["checkpoint_layers"] > 0 and len(passes) > 1  # the first try, then what the probe chose


@pytest.mark.parametrize("asked", [{"fits": (False, True)}, {"graphs": "no"}, {"checkpoint_layers": 7}])
def test_a_small_model_is_probed_where_the_first_try_fails_or_would_not_be_the_plan(planned, monkeypatch, asked):
    monkeypatch.setattr(memory, "probe", lambda network, kept: READINGS | {"layers": 30})
    plan, _ = planned(9, **asked)
    assert "expected" in plan["why"] and plan["checkpoint_layers"] in ((7,) if "checkpoint_layers" in asked else range(1, 31))


def test_evaluations_of_a_small_model_are_packed_to_more_but_not_against_what_was_asked(planned, monkeypatch):
    assert planned(9)[0]["evaluates"] == graphs.LARGEST
    assert planned(9, max_tokens=2048)[0]["evaluates"] == 2048
    before = {"max_tokens": 1024, "checkpoint_layers": 0, "fits": 512, "evaluates": 512, "shrunk": [{}]}
    assert planned(9, before)[0]["evaluates"] == 512  # memory ran out before
    monkeypatch.setattr(graphs, "serves", lambda network, layers: "its kernels are longer than their launches")
    monkeypatch.setattr(memory, "probe", lambda network, kept: READINGS)
    plan, _ = planned(9)
    assert plan["evaluates"] == plan["fits"]
