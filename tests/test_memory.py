"""memory.py: which plan is taken, from readings that are given instead of measured; the probe itself runs in tests/test_gpu.py."""
import types

import pytest

import memory

GIB = 2**30
READINGS = {"layers": 32, "base": 6 * GIB, "input": 8192, "stored": (0.6 * GIB, 3.8e6), "recomputed": (0.6 * GIB, 0.45e6), "kept": 0, "table": GIB, "dequantised": True}


def chosen(limit_gib, sizes=(2048, 4096, 8192, 16384), layers=None, offload="auto", keep="auto", **changes):
    asked = types.SimpleNamespace(offload=offload, keep_dequantized=keep)
    return memory.best(memory.choices(READINGS | changes, sizes, layers, asked, limit_gib * GIB), limit_gib * GIB)


def peak(plan, found=READINGS):
    """The same straight line, written the other way round."""
    share = plan["checkpoint_layers"] / found["layers"]
    line = [stored * (1 - share) + recomputed * share for stored, recomputed in zip(found["stored"], found["recomputed"])]
    away = plan["max_tokens"] * found["input"] * max(0, plan["checkpoint_layers"] - 3) if plan["offload"] else 0
    return found["base"] + line[0] + line[1] * plan["max_tokens"] - away - found["table"] * plan["host_embeddings"] - found["kept"] * (not plan["keep_dequantized"])


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
    with pytest.raises(ValueError, match=r"memory: 5\.0 GiB are not enough: with 2,048 tokens a micro-batch and 32 layers recomputed the run would take 6\.\d GiB; .*memory\.budget_gib.*model\.quant"):
        chosen(5)


def test_micro_batches_hold_the_longest_row_and_little_more_than_a_window():
    assert memory.sizes_for(100, 64) == [1024]
    assert memory.sizes_for(5000, 64) == [1024, 1536, 2048, 3072, 4096, 6144]
    assert memory.sizes_for(5000, 5500) == [5500, 6144]
    assert memory.sizes_for(10**6, 64)[-1] == 16384
