"""The gradient proof: silent on healthy gradients in every dtype and quantisation, and never on wrong ones. And --overfit.

Faults are injected where they happen in life: in the backward passes of model.py and fused.py, in the working copies, in the scale.
"""
import contextlib
import math
import types

import numpy as np
import pytest
import torch
from conftest import make_config, make_model

import data
import fused
import model
import proof

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(path, num_hidden_layers=3, initializer_range=0.05)
    return path


def rows_of(lengths, seed=0, supervised_share=0.5):
    """data.Rows of random tokens in the given lengths."""
    generator = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    supervised = generator.random(offsets[-1]) < supervised_share
    supervised[offsets[:-1]] = False
    supervised[offsets[1:] - 1] = True
    return data.Rows(generator.integers(3, 320, offsets[-1]).astype(np.int32), offsets, supervised, [str(i) for i in range(len(lengths))], {}, "")


ROWS = rows_of([9, 30, 17, 42, 5, 23, 28, 12])


def loaded(folder, quant="none", dtype="fp32", b=0.05, **settings):
    """(network, train.py's forward_backward) with B drawn at random, or B = 0."""
    network = model.load(make_config(folder, quant, dtype, **settings), "cpu")
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.adapters(network).items()):
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
    settings.setdefault("what", "even")
    given = {name: settings.pop(name) for name in ("what", "scale") if name in settings}
    network, forward_backward = loaded(folder, *args, **settings)
    return proof.check(network, forward_backward, batches(), **given)


# ------------------------------------------------------------------------------------------------------------ healthy

@pytest.mark.parametrize("b", [0.0, 0.05])
@pytest.mark.parametrize("quant, dtype, exact, fast", [("none", "fp64", 5e-6, True), ("none", "fp32", 1e-3, True), ("nf4", "fp32", 1e-3, False), ("nf4", "bf16", 0.05, True), ("int8", "bf16", 0.05, True),
                                                       ("none", "bf16", 0.05, False), ("llm_int8", "bf16", 0.08, False), ("int8", "fp16", 0.03, True)])
def test_healthy_gradients_are_proved(folder, quant, dtype, exact, fast, b):
    result = checked(folder, quant, dtype, b, memory={"fused": fast}, scale=1024.0 if dtype == "fp16" else 1.0, what="even")
    assert result.ok and not result.dead and not result.wrong, result
    assert abs(result.ratio - 1) < exact and result.tolerance < 0.25, result
    print("MARGIN", quant, dtype, fast, b, f"{result.ratio - 1:+.2g} {result.tolerance:.2g} {result.seconds:.1f}")


def test_each_kind_of_projection_is_proved_by_itself_where_asked_for(folder):
    result = checked(folder, what="parts")
    assert set(result.parts) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(ok and abs(ratio - 1) <= tolerance < 0.01 for ratio, tolerance, ok in result.parts.values()), result.parts
    assert "down_proj" in result.text and max(map(len, result.text.splitlines())) <= 80


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_masks_of_dropout_are_the_same_in_the_gradient_and_in_every_pass(folder, fast, dtype):
    network, forward_backward = loaded(folder, "none", dtype, lora={"dropout": 0.4}, memory={"fused": fast})
    result = proof.check(network, forward_backward, batches())
    assert result.ok and result.tolerance < 0.1, result
    masks = lambda: torch.cat([model.summed_loss(network, batch)[1] for batch in batches()])
    assert not torch.equal(masks(), masks()), "this network's loss does depend on masks"


def test_nothing_is_changed_by_the_proof(folder):
    network, forward_backward = loaded(folder, "nf4", "bf16", lora={"dropout": 0.3})
    memory = network.adapter_memory
    memory.refresh()
    memory.flat.grad.normal_()
    torch.manual_seed(7)
    everything = lambda: [memory.flat.detach().clone(), memory.flat.grad.clone(), memory.working.clone(), memory.kept.buffer.clone() if memory.kept else torch.zeros(1), torch.get_rng_state()]
    before = everything()
    assert proof.check(network, forward_backward, batches(), what="parts").ok
    assert all(torch.equal(a, b) for a, b in zip(before, everything())) and network.training
    assert all(p.data_ptr() == memory.flat.data_ptr() + 4 * memory.places[p].start for p in model.adapters(network).values())


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
    real, calls = model.FrozenMatmul.backward, [0]

    def backward(ctx, grad_output):
        calls[0] += 1
        return (torch.zeros_like(real(ctx, grad_output)[0]) if calls[0] in layers else real(ctx, grad_output)[0]), None

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
    monkeypatch.setattr(model.FrozenMatmul, "backward", drop_base(range(10**6)))
    result = checked(folder, quant, dtype, memory={"fused": False})
    assert result.ok is False and not result.dead and "WRONG" in result.text, result
    assert max(map(len, result.text.splitlines())) <= 80


def test_in_the_fused_layers_too(folder, monkeypatch):
    monkeypatch.setattr(fused.Group, "backward", fused_backward(lambda group, dx, d_low: (d_low @ group.working_A * group.scaling, d_low)))
    assert checked(folder).ok is False


def test_at_b_zero_they_are_dead(folder, monkeypatch):
    monkeypatch.setattr(model.FrozenMatmul, "backward", drop_base(range(10**6)))
    result = checked(folder, b=0.0, memory={"fused": False})
    assert result.ok is False and "DEAD" in result.text and len(result.dead) == 3 * 5 + 0, result.dead  # o, gate, up, ...: see below


def test_one_layer_that_loses_its_gradient_is_found_by_name(folder, monkeypatch):
    """Layer 1's gate and up: what they pass on is missing from everything before them, and from nothing after."""
    def change(group, dx, d_low):
        return (torch.zeros_like(dx) if group is wide else dx), d_low

    network, forward_backward = loaded(folder)
    wide = network.get_decoder().layers[1].forward.wide
    monkeypatch.setattr(fused.Group, "backward", fused_backward(change))
    result = proof.check(network, forward_backward, batches())
    assert result.ok is False and "2 wrong layers" in result.text or "layers.1" in result.text, result
    assert result.wrong and all(name.startswith("model.layers.1.self_attn") for name in result.wrong), result.wrong
