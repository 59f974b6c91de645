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


def batches(tokens=96):
    return proof.sample(ROWS, range(8), tokens)


def checked(folder, *args, **settings):
    given = {name: settings.pop(name) for name in ("parts", "scale") if name in settings}
    network, forward_backward = loaded(folder, *args, **settings)
    return proof.check(network, forward_backward, batches(), **given)


# ------------------------------------------------------------------------------------------------------------ healthy

@pytest.mark.parametrize("b", [0.0, 0.05])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("quant, dtype, exact", [("none", "fp64", 1e-6), ("none", "fp32", 2e-3), ("nf4", "fp32", 2e-3), ("nf4", "bf16", 0.05), ("int8", "bf16", 0.05), ("none", "bf16", 0.05),
                                                 ("llm_int8", "bf16", 0.1), ("int8", "fp16", 0.03)])
def test_healthy_gradients_are_proved(folder, quant, dtype, exact, fast, b):
    result = checked(folder, quant, dtype, b, memory={"fused": fast}, scale=1024.0 if dtype == "fp16" else 1.0)
    assert result.ok and not result.dead and not result.wrong, result
    assert abs(result.ratio - 1) < exact and result.tolerance < 0.25, result
    print(f"MARGIN {quant} {dtype} {fast} {b} {result.ratio - 1:+.2g} {result.tolerance:.2g} {result.seconds:.1f}")
