"""The gradient proof: silent on healthy gradients in every dtype and quantisation, and never on wrong ones. And --overfit.

Faults are injected where they happen in life: in the backward passes of model.py and fused.py, in the working copies, in the scale.
"""
import math
import types

import numpy as np
import pytest
import torch
from conftest import make_config, make_model, rows_of

import fused
import lora_layers
import model
import proof

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(path, num_hidden_layers=2, initializer_range=0.05)
    return path


ROWS = rows_of([9, 30, 17, 42, 5, 23, 28, 12])


def loaded(folder, quant="none", dtype="fp32", b=0.05, **settings):
    """(network, train.py's forward_backward) with B drawn at random, or B = 0."""
    network = model.load(make_config(folder, quant, dtype, **settings), "cpu")
    with torch.no_grad():
        for i, (name, parameter) in enumerate(lora_layers.adapters(network).items()):
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * b)

    def forward_backward(batch, weight):
        batch_loss, _, _ = model.summed_loss(network, batch.to("cpu"))
        (batch_loss * weight).backward()
        return batch_loss.detach()

    return network, forward_backward


def batches():
    return proof.sample(make_config("x", proof={"tokens": 96}), ROWS, range(8))


def checked(folder, *args, **settings):
    settings.setdefault("what", "whole")
    given = {name: settings.pop(name) for name in ("what", "scale") if name in settings}
    network, forward_backward = loaded(folder, *args, **settings)
    return proof.check(network, forward_backward, batches(), **given)


# ------------------------------------------------------------------------------------------------------------ healthy

@pytest.mark.parametrize("b", [0.0, 0.05])
@pytest.mark.parametrize("quant, dtype, exact, fast", [
    ("none", "fp64", 5e-6, True), ("none", "fp32", 1e-3, True), ("nf4", "fp32", 1e-3, False), ("nf4", "bf16", 0.05, True),
    ("int8", "bf16", 0.05, True), ("none", "bf16", 0.05, False), ("llm_int8", "bf16", 0.08, False), ("llm_int8", "fp16", 0.08, False),
    ("int8", "fp16", 0.03, True)])
def test_healthy_gradients_are_proved(folder, quant, dtype, exact, fast, b):
    result = checked(folder, quant, dtype, b, memory={"fused": fast}, scale=1024.0 if dtype == "fp16" else 1.0, what="even")
    assert result.ok and not result.dead and not result.wrong, result
    assert abs(result.ratio - 1) < exact and result.tolerance < 0.25, result


def test_each_kind_of_projection_is_proved_by_itself_where_asked_for(folder):
    result = checked(folder, what="parts")
    assert set(result.parts) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(ok and abs(ratio - 1) <= tolerance < 0.01 for ratio, tolerance, ok in result.parts.values()), result.parts
    assert "down_proj" in result.text and max(map(len, result.text.splitlines())) <= 80


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_masks_of_dropout_are_the_same_in_the_gradient_and_in_every_pass(folder, fast, dtype):
    network, forward_backward = loaded(folder, "none", dtype, lora={"dropout": 0.4}, memory={"fused": fast})
    result = proof.check(network, forward_backward, batches(), what="whole")
    assert result.ok and result.tolerance < 0.2, result
    masks = lambda: torch.cat([model.summed_loss(network, batch)[1] for batch in batches()])
    assert not torch.equal(masks(), masks()), "this network's loss does depend on masks"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dora_is_proved_with_the_lengths_of_rows_as_constants(folder, dtype):
    result = checked(folder, "nf4", dtype, lora={"dora": True})
    assert result.ok and abs(result.ratio - 1) < (1e-3 if dtype == "fp32" else 0.1), result


def test_nothing_is_changed_by_the_proof(folder):
    network, forward_backward = loaded(folder, "nf4", "bf16", lora={"dropout": 0.3})
    memory = network.adapter_memory
    memory.refresh()
    memory.flat.grad.normal_()
    torch.manual_seed(7)
    everything = lambda: [memory.flat.detach().clone(), memory.flat.grad.clone(), memory.working.clone(),
                          memory.kept.buffer.clone() if memory.kept else torch.zeros(1), torch.get_rng_state()]
    before = everything()
    assert proof.check(network, forward_backward, batches(), what="even").ok
    assert all(torch.equal(a, b) for a, b in zip(before, everything())) and network.training
    assert all(p.data_ptr() == memory.flat.data_ptr() + 4 * memory.places[p].start for p in lora_layers.adapters(network).values())


def test_a_loss_that_bends_within_the_way_is_followed_by_gradients_on_it(folder):
    """Where a straight line is off by a third, and was once taken for a wrong gradient."""
    network, forward_backward = loaded(folder, "none", "fp32", 0.1)
    flat, supervised = network.adapter_memory.flat, sum(len(batch.targets) for batch in batches())
    gradient_now = lambda size: proof.gradient_of(network, forward_backward, batches(), size, supervised)[1]
    measured = proof.Measurement(network, batches(), supervised, flat.detach().clone(), gradient_now(1.0), gradient_now)
    everything = [(slice(0, len(flat)), 1.0)]
    step = 0.06 * measured.loss / measured.gradient.double().square().sum().item()
    change, foretold, doubt = measured.walk(everything, step, 0.0)
    straight = 0.06 * measured.loss
    assert abs(change / straight - 1) > 0.1 and abs(change / foretold - 1) < 0.02 and abs(change - foretold) <= doubt


def test_a_saturated_network_is_neither_proved_nor_called_wrong(folder):
    """As a rate far too high leaves it: what its gradients are is rounding, and its loss has steps."""
    for size in (3.0, 30.0):
        result = checked(folder, "none", "fp32", size, what="even")
        assert result.ok is not False, result
    assert result.ok is None and result.values["proof/outcome"].startswith("open: "), result
    assert max(map(len, result.text.splitlines())) <= 80, result


def test_a_gradient_of_zero_is_no_dead_one_where_the_loss_does_not_move_either(folder):
    """q and k of a layer whose attention sees one thing only."""
    network, forward_backward = loaded(folder)
    memory, named = network.adapter_memory, lora_layers.adapters(network)
    places = [memory.places[parameter] for name, parameter in named.items() if "layers.0.self_attn.q_proj" in name]

    def without_queries(batch, weight):
        loss = forward_backward(batch, weight)
        for place in places:
            memory.flat.grad[place] = 0
        return loss

    assert proof.check(network, without_queries, batches(), what="whole").ok is False, "the loss moves, so these are dead"
    real = lora_layers.AdaptedLinear.forward
    query = network.get_decoder().layers[0].self_attn.q_proj
    network, forward_backward = loaded(folder, memory={"fused": False})
    memory, named = network.adapter_memory, lora_layers.adapters(network)
    query = network.get_decoder().layers[0].self_attn.q_proj
    query.forward = lambda x: real(query, x) * 0.0
    result = proof.check(network, forward_backward, batches(), what="whole")
    assert result.ok is None and "rightly" in result.text and not result.dead, result


@pytest.mark.parametrize("text, ok, outcome", [
    ("gradients  proved: all", True, "proved: all"),
    ("gradients  alive, not proved: too rough", None, "open: alive, not proved: too rough"),
    ("gradients  DEAD: 14 of 28", False, "dead: 14 of 28"), ("gradients  STALE: old", False, "stale: old"),
    ("gradients  WRONG in a part: k", False, "wrong: WRONG in a part: k")])
def test_the_record_holds_the_outcome_in_a_word(text, ok, outcome):
    assert proof.Result(math.nan, 0.1, ok, text).values == {"proof/tolerance": 0.1, "proof/outcome": outcome}


def test_an_fp16_scale_that_overflows_is_lowered_until_the_gradients_are_finite(folder):
    assert checked(folder, "none", "fp16", scale=2.0**40).ok


def test_rows_without_a_supervised_token_prove_nothing_and_stop_nothing(folder):
    rows = rows_of([9, 9])
    rows.supervised[:] = False
    network, forward_backward = loaded(folder)
    result = proof.check(network, forward_backward, proof.sample(make_config("x"), rows, [0, 1]))
    assert result.ok is None and math.isnan(result.ratio)


# ------------------------------------------------------------------------------------------------------------- faults

def drop_base(layers):
    """In place of FrozenMatmul.backward: nothing goes through the frozen weights of some calls, counted from the loss backwards."""
    real, calls = lora_layers.FrozenMatmul.backward, [0]

    def backward(ctx, grad_output):
        calls[0] += 1
        through, *rest = real(ctx, grad_output)
        return (torch.zeros_like(through) if calls[0] in layers and through is not None else through), *rest

    return backward


def fused_backward(change):
    """In place of fused.Group.backward: change(group, dx, d_low) -> (dx, d_low)."""
    real = fused.Group.backward

    def backward(self, *args, **kwargs):
        return change(self, *real(self, *args, **kwargs))

    return backward


@pytest.mark.parametrize("quant, dtype", [("none", "fp32"), ("nf4", "fp32")])
def test_gradients_that_leave_out_the_frozen_weights_are_wrong(folder, monkeypatch, quant, dtype):
    """What PEFT does over bitsandbytes on some CPUs after an evaluation: healthy norms, rising loss."""
    monkeypatch.setattr(lora_layers.FrozenMatmul, "backward", drop_base(range(10**6)))
    result = checked(folder, quant, dtype, memory={"fused": False})
    assert result.ok is False and not result.dead and "WRONG" in result.text, result
    assert max(map(len, result.text.splitlines())) <= 80


def test_in_the_fused_layers_too(folder, monkeypatch):
    monkeypatch.setattr(fused.Group, "backward", fused_backward(lambda group, dx, d_low: (d_low @ group.working_A * group.scaling, d_low)))
    assert checked(folder).ok is False


def test_at_b_zero_they_are_dead(folder, monkeypatch):
    monkeypatch.setattr(lora_layers.FrozenMatmul, "backward", drop_base(range(10**6)))
    result = checked(folder, b=0.0, memory={"fused": False})
    assert result.ok is False and "DEAD" in result.text
    assert {name.split(".")[-3] for name in result.dead} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}, result.dead


def test_one_layer_that_loses_its_gradient_is_found_by_name(folder, monkeypatch):
    """Layer 1's gate and up: what they pass on is missing from everything before them, and from nothing after."""
    def change(group, dx, d_low):
        return (torch.zeros_like(dx) if group is wide else dx), d_low

    network, forward_backward = loaded(folder)
    wide = network.get_decoder().layers[1].forward.wide
    monkeypatch.setattr(fused.Group, "backward", fused_backward(change))
    result = proof.check(network, forward_backward, batches())
    assert result.ok is False and "model.layers.1 is the first of 2 wrong layers" in " ".join(result.text.split()), result
    assert result.wrong and all(name.startswith("model.layers.1.self_attn") for name in result.wrong), result.wrong


@pytest.mark.parametrize("factor, dtype", [(2.0, "bf16"), (0.5, "fp32"), (-1.0, "fp32")])
def test_gradients_of_another_size_or_sign_are_wrong(folder, factor, dtype):
    """Added twice, without the adapters' scale, or the other way round."""
    network, forward_backward = loaded(folder, "none", dtype)
    result = proof.check(network, lambda batch, weight: forward_backward(batch, weight * factor), batches(), what="whole")
    assert result.ok is False and result.ratio == pytest.approx(1 / factor, rel=0.15), result


def test_where_the_time_is_over_what_was_left_out_is_told_and_what_is_wrong_is_found_all_the_same(folder):
    network, forward_backward = loaded(folder, "none", "fp32")
    asked = []
    gradients = lambda batch, weight: (asked.append(weight), forward_backward(batch, weight))[1]
    result, short = proof.check(network, gradients, batches(), seconds=0.0), len(asked)
    assert result.ok and not result.parts and "the time was over before q_proj, k_proj," in " ".join(result.text.split())
    assert proof.check(network, gradients, batches()).parts and len(asked) - short > 3 * short
    assert proof.check(network, lambda batch, weight: forward_backward(batch, weight * 2), batches(), seconds=0.0).ok is False


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("quant, settings", [("int8", {"memory": {"fused": False}}), ("llm_int8", {}), ("nf4", {"lora": {"dora": True}})])
def test_so_they_are_in_16_bits_in_layers_that_are_not_fused(folder, quant, settings, factor):
    network, forward_backward = loaded(folder, quant, "bf16", 0.001, **settings)
    result = proof.check(network, lambda batch, weight: forward_backward(batch, weight * factor), batches(), what="whole")
    assert network.fused_layers == 0 and result.ok is (factor == 1), result


def test_doras_magnitudes_take_part_in_16_bits_too(folder):
    network, forward_backward = loaded(folder, "nf4", "bf16", lora={"dora": True})
    memory, named = network.adapter_memory, lora_layers.adapters(network)
    places = [memory.places[parameter] for name, parameter in named.items() if "magnitude" in name]

    def only_magnitudes(batch, weight, factor):
        loss = forward_backward(batch, weight)
        kept = [memory.flat.grad[place].clone() for place in places]
        memory.flat.grad.mul_(1e-3)  # so that what the loss does along the gradient is theirs
        for place, gradient in zip(places, kept):
            memory.flat.grad[place] = gradient * factor
        return loss

    supervised = sum(len(batch.targets) for batch in batches())
    gradient_now = lambda factor: lambda size: proof.gradient_of(
        network, lambda batch, weight: only_magnitudes(batch, weight, factor), batches()[:1], size, supervised)[1]
    with lora_layers.rows_held(network):
        for factor in (1.0, 2.0):
            measured = proof.Measurement(network, batches()[:1], supervised, memory.flat.detach().clone(), gradient_now(factor)(1.0),
                                         gradient_now(factor))
            direction = [(place, 1.0) for place in places]
            ratio, tolerance, ok = measured.verdict(direction, proof.FIRST_MOVE[torch.bfloat16], proof.ALLOWED[torch.bfloat16])
            assert ok is (factor == 1) and ratio == pytest.approx(1 / factor, rel=0.2), (factor, ratio, tolerance)


def test_micro_batches_that_overwrite_instead_of_adding_up_are_wrong(folder):
    network, forward_backward = loaded(folder)

    def overwriting(batch, weight):
        network.adapter_memory.flat.grad.zero_()
        return forward_backward(batch, weight)

    assert len(batches()) == 2 and proof.check(network, overwriting, batches(), what="whole").ok is False


@pytest.mark.parametrize("fast", [True, False])
def test_a_tenth_too_much_in_one_kind_of_projection_is_named(folder, monkeypatch, fast):
    network, forward_backward = loaded(folder, memory={"fused": fast})
    places = [network.adapter_memory.places[parameter] for name, parameter in lora_layers.adapters(network).items() if ".k_proj." in name]

    def tenth_too_much(batch, weight):
        loss = forward_backward(batch, weight)
        for place in places:
            network.adapter_memory.flat.grad[place] *= 1.1 ** 0.5  # called once for each of two micro-batches
        return loss

    result = proof.check(network, tenth_too_much, batches(), what="parts")
    assert result.ok is False and all("k_proj" in name for name in result.wrong) and result.wrong, result


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_forward_passes_on_stale_copies_are_wrong(folder, monkeypatch, dtype):
    network, forward_backward = loaded(folder, "nf4", dtype, memory={"keep_dequantized": "yes"})
    memory = network.adapter_memory
    memory.refresh()
    memory.working = memory.working.clone()  # in fp32 it is the weights themselves; a copy can be stale
    for module in network.modules():
        if isinstance(module, lora_layers.AdaptedLinear):
            module.working_B = memory.working[memory.places[module.lora_B]].view_as(module.lora_B)
    for layer in network.get_decoder().layers:
        for group in layer.forward.groups:
            group.working_A, group.grad_A = memory.together([module.lora_A for module in group.adapted])
    monkeypatch.setattr(memory, "refresh", lambda: None)
    result = proof.check(network, forward_backward, batches(), what="whole")
    assert result.ok is False and "stale" in result.text and abs(result.ratio) < 0.1, result


def test_a_training_pass_on_stale_weights_is_wrong_though_its_gradients_are_those_of_its_own_loss(folder):
    """A replayed graph that reads old weights, say."""
    network, forward_backward = loaded(folder)
    flat = network.adapter_memory.flat

    def on_old_weights(batch, weight):
        now = flat.detach().clone()
        with torch.no_grad():
            flat.copy_(now * 0.9)
        loss = forward_backward(batch, weight)
        with torch.no_grad():
            flat.copy_(now)
        return loss

    result = proof.check(network, on_old_weights, batches(), what="whole")
    assert result.ok is False and "STALE" in result.text, result


def test_a_cut_graph_is_dead_before_the_first_step(folder, monkeypatch):
    network, _ = loaded(folder, b=0.0)
    result = proof.check(network, lambda batch, weight: model.summed_loss(network, batch)[0].detach(), batches())
    assert result.ok is False and len(result.dead) == 14 and all("lora_B" in name for name in result.dead) and "DEAD" in result.text, result
    assert max(map(len, result.text.splitlines())) <= 80


# ------------------------------------------------------------------------------------------------------ alive, and when

def test_dead_gradients_are_named():
    named = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.zeros(3, 2),
             "b.lora_A.weight": torch.tensor([[math.nan, 1.0]]), "b.lora_B.weight": torch.full((2, 2), 1e-40)}
    assert proof.dead(named) == ["a.lora_B.weight", "b.lora_A.weight"]
    assert proof.dead(list(named.items()), "lora_A") == ["b.lora_A.weight"] and proof.dead({}, "lora_A") == []


def test_b_is_looked_at_after_the_first_applied_step_and_a_after_the_second():
    assert [proof.due_matrix(applied, set()) for applied in range(3)] == ["", "lora_B", "lora_B"]
    assert [proof.due_matrix(applied, {"lora_B"}) for applied in range(3)] == ["", "", "lora_A"]
    assert proof.due_matrix(9, {"lora_B", "lora_A"}) == ""


def test_a_window_of_first_tokens_tells_nothing():
    batch = lambda rows: types.SimpleNamespace(position_ids=torch.tensor([0, 1, 0, 1]), rows=torch.tensor(rows, dtype=torch.int64))
    assert not proof.telling([batch([0, 2])]) and not proof.telling([batch([])]) and not proof.telling([])
    assert proof.telling([batch([0]), batch([3])])


def test_a_sleeping_b_excuses_its_a(folder):
    network, forward_backward = loaded(folder, "none", "fp16", b=1e-9)
    names = [name for name in lora_layers.adapters(network) if ".lora_A." in name]
    assert proof.asleep(network, names) == names
    assert proof.asleep(loaded(folder, "none", "bf16", b=1e-9)[0], names) == []


@pytest.mark.parametrize("every, first, max_steps, due", [
    (4, 1, 20, {0: "whole", 2: "parts", 4: "even"}), (0, 1, 20, {0: "whole", 2: "parts", 20: "even"}),
    (4, 9, 20, {8: "whole", 10: "parts", 12: "even"}),
    (4, 7, 20, {6: "whole", 8: "parts"}), (500, 1, 1, {0: "whole", 1: "parts"}), (500, 1, 2, {0: "whole", 2: "parts"})])
def test_when_it_is_due(every, first, max_steps, due):
    config = make_config("x", eval={"every_steps": every}, proof={"parts": "yes"})
    assert {step: what for step in range(first - 1, max_steps + 1) if (what := proof.due(config, step, first, max_steps))} == due
    assert not any(proof.due(make_config("x", proof={"enabled": False}), step, first, max_steps) for step in range(max_steps + 1))
    assert proof.due(make_config("x"), 2, 1, 20, "cpu") == "even" and proof.due(make_config("x"), 2, 1, 20, "cuda") == "parts"


def test_rows_are_taken_until_they_supervise_enough():
    config = make_config("x", proof={"tokens": 20})
    taken = proof.sample(config, ROWS, range(8))
    assert len(taken) == 2 and 20 <= sum(len(batch.targets) for batch in taken) < 20 + 42
    assert sorted(r for batch in taken for r in batch.samples) == [0, 1, 2]
    assert [batch.samples for batch in proof.sample(config, ROWS, [3, 3, 3])] == [[3]]
