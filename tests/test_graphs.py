"""What a micro-batch is padded to, so that a recorded graph serves it: sizes that hold it, and padding that adds nothing."""
import hypothesis
import numpy as np
import pytest
import torch
from conftest import make_config, make_model, rows_of
from hypothesis import strategies

import data
import graphs
import lora_layers
import model


@hypothesis.given(strategies.lists(strategies.integers(2, 700), min_size=1, max_size=40))
@hypothesis.settings(deadline=None, max_examples=60)
def test_sizes_hold_the_micro_batch_and_padding_is_documents_of_its_own(lengths):
    batch, = data.pack(rows_of(lengths), list(range(len(lengths))), 10**6)
    tokens, supervised, documents, longest = graphs.sizes_of(batch)
    fields = graphs.padded(batch, tokens, supervised, documents, longest)
    ends, was = fields["cu_seqlens"], batch.cu_seqlens
    assert [len(fields[name]) for name in ("input_ids", "position_ids", "rows", "targets", "cu_seqlens")] == [tokens, tokens, supervised, supervised, documents + 1]
    assert torch.equal(ends[:len(was)], was) and ends[-1] == tokens and 0 <= ends.diff().min() and ends.diff().max() <= longest
    assert torch.equal(fields["input_ids"][:len(batch.input_ids)], batch.input_ids) and (fields["targets"][len(batch.targets):] == -100).all()
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist()):
        assert fields["position_ids"][start:end].tolist() == list(range(end - start))


def test_few_sizes_serve_many_windows():
    """Windows of 32 rows that differ by what is drawn; in steps of 32 supervised positions and longest documents from 64 on there were 16."""
    generator = np.random.default_rng(0)
    windows = [rows_of(generator.integers(20, 105, 32).tolist(), seed, 0.2) for seed in range(200)]
    sizes = {graphs.sizes_of(batch) for rows in windows for batch in data.pack(rows, list(range(32)), 8192)}
    assert len(sizes) <= 10, sizes


@pytest.mark.parametrize("fused", [True, False])
def test_a_padded_micro_batch_has_the_loss_and_the_gradients_of_the_one_that_it_holds(tmp_path, fused):
    make_model(tmp_path, "llama")
    network = model.load(make_config(tmp_path, "none", "fp64", memory={"fused": fused}), "cpu")
    with torch.no_grad():
        for name, parameter in lora_layers.adapters(network).items():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    batch, = data.pack(rows_of([3, 40, 17, 64, 9, 2, 31]), list(range(7)), 512)
    tokens, supervised, documents, longest = graphs.sizes_of(batch)
    padded = graphs.Static(max_seqlen=longest, **graphs.padded(batch, tokens, supervised, documents, longest))
    found = []
    for one in (batch, padded):
        network.adapter_memory.flat.grad.zero_()
        loss = model.summed_loss(network, one)[0]
        loss.backward()
        found.append((loss.item(), network.adapter_memory.flat.grad.clone()))
    assert tokens > len(batch.input_ids) and supervised > len(batch.rows)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-12)
    assert (found[1][1] - found[0][1]).norm() <= 1e-10 * found[0][1].norm()
