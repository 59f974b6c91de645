"""The network against independent references: transformers' logits a document at a time, PEFT's losses and adapter gradients,
bitsandbytes' Linear4bit, plain formulas in float64. Adapter matrices B are drawn at random: with B = 0 nothing about A is tested.

Relative errors are norms of differences over norms of the reference's, of each tensor by itself.
"""
import copy
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import attention
import config
import eval as evaluation
import fused
import lora_layers
import model
import quant
from conftest import COMMON, PROJECT, SHAPES, make_config, make_model, packed

EVERY_PROJECTION = list(config.PROJECTIONS)
LAYERS = ["plain", "fused", "long"]  # transformers' own layers with our projections, and the fast path as small and as large layers take it
LLAMA_SHAPED = ["llama", "mistral", "qwen2", "qwen3"]  # those that have a fast path
SHAPES_AND_LAYERS = [(kind, which) for kind in SHAPES for which in LAYERS
                     if which == "plain" or kind in LLAMA_SHAPED and (which, kind) != ("long", "mistral")]
PRECISE = {"fp32": 1e-5, "fp64": 1e-10}


def layers(which):
    return {"fused": which != "plain"}


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm()).item()


def draw(lengths, seed=1, share=0.5):
    """Random documents of these lengths (20 is longer than the windows of conftest.SHAPES) and random masks of supervised tokens."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(3, 320, (length,), generator=generator) for length in lengths]
    return documents, [torch.rand(length, generator=generator) < share for length in lengths]


DOCUMENTS, SUPERVISED = draw((20, 5, 13))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (folder, transformers' model in fp32), made when first asked for."""
    @functools.cache
    def get(kind):
        folder = tmp_path_factory.mktemp(kind)
        return folder, make_model(folder, kind)
    return get


@pytest.fixture(params=SHAPES_AND_LAYERS, ids=" ".join)
def shape(request, models, monkeypatch):
    """(folder, transformers' model in fp32, one of LAYERS) for each architecture and way through its layers."""
    kind, which = request.param
    monkeypatch.setattr(fused, "SHORT", 0 if which == "long" else fused.SHORT)
    return *models(kind), which


@pytest.fixture(params=list(SHAPES))
def each(request, models):
    """(folder, transformers' model in fp32) for each architecture."""
    return models(request.param)


def choose(*cases):
    """Run a test that asks for `shape` on these alone."""
    return pytest.mark.parametrize("shape", [case for case in SHAPES_AND_LAYERS if case[0] in cases], indirect=True, ids=" ".join)


def cast(network, dtype):
    """A copy of transformers' model with its parameters in `dtype`. Its rotary frequencies stay as they are: 16 bits would spoil them."""
    network = copy.deepcopy(network)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(quant.DTYPES[dtype])
    return network


def reference(network, dtype, ours):
    """transformers' own model in `dtype`. Its norms round float64 to fp32; where `ours` has its own norms, they must not."""
    network = cast(network, dtype)
    for layer in network.get_decoder().layers if dtype == "fp64" and ours.fused_layers else ():
        normed = [norm for norm in (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")) if norm]
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, *normed):
            norm.forward = lambda x, norm=norm: norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return network


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch):
    """transformers' eager attention rounds to fp32 before the softmax; a float64 reference must not."""
    softmax = F.softmax
    in_double = lambda x, *args, dtype=None, **rest: softmax(x, *args, dtype=None if x.dtype == torch.float64 else dtype, **rest)
    monkeypatch.setattr(torch.nn.functional, "softmax", in_double)


def randomise(network, peft=None, seed=5, scale=0.1):
    """Draw every adapter matrix at random, the same in PEFT's model of the same weights. Fails where the two have different adapters."""
    own, generator = lora_layers.adapters(network), torch.Generator().manual_seed(seed)
    theirs = {} if peft is None else {name.replace(".default", ""): parameter for name, parameter in peft.named_parameters()
                                      if "lora_" in name}
    assert peft is None or set(own) == set(theirs)
    with torch.no_grad():
        for name in sorted(own):
            value = scale * torch.randn(own[name].shape, generator=generator)
            own[name].copy_(value)
            if peft is not None:
                theirs[name].copy_(value)
    return own, theirs


def with_peft(network, autocast=False, **settings):
    """PEFT's model around a copy of `network`, adapters in its dtype; with autocast, as PEFT trains 16-bit models, in fp32."""
    from peft import LoraConfig, get_peft_model
    settings = {"r": 4, "lora_alpha": 8, "target_modules": EVERY_PROJECTION, **settings}
    return get_peft_model(copy.deepcopy(network), LoraConfig(task_type="CAUSAL_LM", **settings), autocast_adapter_dtype=autocast)


def clear(parameters):
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()  # in place: the gradient may be a part of a larger buffer


def our_gradients(network, batches, scale=1.0):
    """(summed loss, {name: gradient}) over micro-batches."""
    own, total = lora_layers.adapters(network), 0.0
    clear(own.values())
    for batch in batches:
        loss = model.summed_loss(network, batch)[0]
        (loss * scale).backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in own.items()}


def their_loss(network, documents, supervised):
    """Summed cross-entropy of supervised tokens, a document at a time, with transformers' logits."""
    total = 0.0
    for document, mask in zip(documents, supervised):
        logits = network(document[None]).logits[0]
        places = [i for i in range(1, len(document)) if mask[i]]
        if places:
            logits = logits[[i - 1 for i in places]]
            total = total + F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), document[places], reduction="sum")
    return total


def assert_same_as_peft(network, peft, limit, documents=DOCUMENTS, supervised=SUPERVISED):
    """Loss and every adapter gradient of `network` (packed) equal those of `peft` (a document at a time)."""
    own, theirs = randomise(network, peft)
    loss, gradients = our_gradients(network, [packed(documents, supervised)])
    expected = their_loss(peft, documents, supervised)
    expected.backward()
    assert abs(loss - expected.item()) <= limit * abs(expected.item())
    worst = {name: relative(gradients[name], theirs[name].grad) for name in own}
    assert all(theirs[name].grad.abs().max() > 0 for name in own)
    assert max(worst.values()) <= limit, max(worst, key=worst.get)


def logits_of(network, documents):
    """Our packed logits (tokens, vocabulary), soft-capped where the model says so."""
    with torch.no_grad():
        batch = packed(documents, [torch.ones(len(d), dtype=torch.bool) for d in documents])
        logits = network.get_output_embeddings()(model.hidden_states(network, batch))
    cap = getattr(network.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def their_logits(network, documents):
    with torch.no_grad():
        return torch.cat([network(document[None]).logits[0] for document in documents])


# ------------------------------------------------------------------------------------------- parity, without quantisation

@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_packed_logits_are_transformers_logits_of_each_document(shape, dtype):
    folder, original, which = shape
    network = model.load(make_config(folder, dtype=dtype, memory=layers(which)), "cpu")
    assert relative(logits_of(network, DOCUMENTS), their_logits(reference(original, dtype, network), DOCUMENTS)) < PRECISE[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_loss_and_every_adapter_gradient_are_pefts(shape, dtype):
    folder, original, which = shape
    network = model.load(make_config(folder, dtype=dtype, memory=layers(which)), "cpu")
    assert_same_as_peft(network, with_peft(reference(original, dtype, network)), PRECISE[dtype])


def test_documents_are_longer_than_the_windows_so_that_windows_are_tested():
    assert max(len(d) for d in DOCUMENTS) > 2 * max(shape.get("sliding_window") or 0 for shape in SHAPES.values())


VARIANTS = {  # our lora settings, PEFT's
    "alpha": ({"alpha": 3.5}, {"lora_alpha": 3.5}),
    "rslora": ({"rslora": True, "alpha": 6}, {"use_rslora": True, "lora_alpha": 6}),
    "rank 1": ({"r": 1}, {"r": 1}),
    "rank above width": ({"r": 80}, {"r": 80}),
    "all-linear": ({"targets": ["all-linear"]}, {"target_modules": "all-linear"}),
    "q and v": ({"targets": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
    "down alone": ({"targets": ["down_proj"]}, {"target_modules": ["down_proj"]}),
    "approach 3": ({"targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "rslora": True},
                   {"target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "use_rslora": True}),
    "longer names": ({"targets": ["self_attn.k_proj", "layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"]},
                     {"target_modules": ["self_attn.k_proj", "layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"]}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@choose("qwen2", "gemma3_text")
def test_rank_alpha_rslora_and_targets_mean_what_they_mean_in_peft(shape, variant):
    folder, original, which = shape
    ours, theirs = VARIANTS[variant]
    network = model.load(make_config(folder, dtype="fp64", lora=ours, memory=layers(which)), "cpu")
    assert_same_as_peft(network, with_peft(reference(original, "fp64", network), **theirs), 1e-10)


@pytest.mark.parametrize("which", LAYERS[:2])
@pytest.mark.parametrize("changes", [
    dict(attention_bias=True, mlp_bias=True), dict(num_key_value_heads=1), dict(num_key_value_heads=4), dict(head_dim=32),
    dict(tie_word_embeddings=True),
    dict(rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 16}),
], ids=["biases everywhere", "one key-value head", "no shared heads", "wide heads", "tied head", "llama 3 rotary scaling"])
def test_the_ways_in_which_llamas_differ_are_honoured(tmp_path, changes, which):
    original = make_model(tmp_path, "llama", **changes)
    network = model.load(make_config(tmp_path, dtype="fp64", memory=layers(which)), "cpu")
    assert relative(logits_of(network, DOCUMENTS), their_logits(reference(original, "fp64", network), DOCUMENTS)) < 1e-10
    assert_same_as_peft(network, with_peft(reference(original, "fp64", network)), 1e-10)


def test_biases_of_qwen2_take_part(models):
    folder, _ = models("qwen2")
    network = model.load(make_config(folder, memory=layers("plain")), "cpu")
    before = logits_of(network, DOCUMENTS)
    biases = [module.bias for module in network.modules() if isinstance(module, lora_layers.AdaptedLinear) and module.bias is not None]
    assert len(biases) == 6 and not any(bias.requires_grad for bias in biases)  # q, k, v of two layers
    with torch.no_grad():
        for bias in biases:
            bias.zero_()
    assert relative(logits_of(network, DOCUMENTS), before) > 1e-2


def test_new_adapters_are_drawn_as_peft_draws_them_and_change_nothing_yet(tmp_path):
    original = make_model(tmp_path, "llama")
    first, again, other = (lora_layers.adapters(model.load(make_config(tmp_path, lora={"r": 64}, train={"seed": seed}), "cpu"))
                           for seed in (3, 3, 4))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        if ".lora_A." in name:  # kaiming_uniform with a = sqrt(5): uniform within 1 / sqrt(in)
            bound = 1 / math.sqrt(parameter.shape[1])
            assert not torch.equal(parameter, other[name])
            assert 0.98 * bound < parameter.abs().max() <= bound and abs(parameter.std().item() - bound / math.sqrt(3)) < 0.03 * bound
        else:
            assert parameter.abs().max() == 0
    with_adapters = model.load(make_config(tmp_path), "cpu")
    assert relative(logits_of(with_adapters, DOCUMENTS), their_logits(original, DOCUMENTS)) < 1e-5


# ---------------------------------------------------------------------------------------------- parity, with quantisation

def dequantised(weight, kind, double_quant=True):
    """What a quantised weight stands for, fp32, by bitsandbytes' functions or the formula: not by quant.py."""
    import bitsandbytes.functional as bnb
    if kind == "int8":
        scale = weight.double().abs().amax(dim=1, keepdim=True) / 127
        return ((weight.double() / scale).round() * scale).float()
    packed_codes, state = bnb.quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    state.dtype = torch.float32
    if weight.shape[1] % 64 == 0:
        return bnb.dequantize_4bit(packed_codes, state)
    # not with bitsandbytes' kernel, which is wrong at these widths
    scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if double_quant else state.absmax
    codes = torch.stack((packed_codes >> 4, packed_codes & 15), dim=-1).reshape(-1).long()
    values = bnb.get_4bit_type("nf4", device="cpu")[codes] * scales.repeat_interleave(64)[:len(codes)]
    return values[:weight.numel()].reshape(weight.shape)


def over_dequantised(network, kind, double_quant=True):
    """A copy of transformers' model whose projections hold dequantised weights."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear) and module is not network.get_output_embeddings():
            module.weight.data = dequantised(module.weight.data, kind, double_quant).to(module.weight.dtype)
    return network


QUANTISED = [("nf4", True), ("nf4", False), ("int8", True)]


@pytest.mark.parametrize("kind, double_quant", QUANTISED, ids=["nf4 twice", "nf4", "int8"])
def test_quantised_training_is_peft_over_the_dequantised_weights(shape, kind, double_quant):
    folder, original, which = shape
    ours = model.load(make_config(folder, kind, model={"double_quant": double_quant}, memory=layers(which)), "cpu")
    theirs = over_dequantised(original, kind, double_quant)
    assert relative(logits_of(ours, DOCUMENTS), their_logits(theirs, DOCUMENTS)) < 1e-5
    assert relative(logits_of(ours, DOCUMENTS), their_logits(original, DOCUMENTS)) > 1e-3  # and it is quantised
    assert_same_as_peft(ours, with_peft(theirs), 1e-5)


@pytest.mark.parametrize("keep", ["yes", "no"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_trains_rightly_at_widths_that_are_not_whole_blocks(tmp_path, double_quant, keep):
    network = make_model(tmp_path, "llama", hidden_size=48, intermediate_size=80)
    ours = model.load(make_config(tmp_path, "nf4", model={"double_quant": double_quant}, memory={"keep_dequantized": keep}), "cpu")
    assert_same_as_peft(ours, with_peft(over_dequantised(network, "nf4", double_quant)), 1e-5)


def with_linear4bit(network, double_quant):
    """A copy of transformers' model in bf16 on bitsandbytes' Linear4bit, in training mode and never in another: an evaluation would
    take its gradients away."""
    import bitsandbytes as bnb
    network = copy.deepcopy(network).train()
    for name, module in list(network.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not network.get_output_embeddings():
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=module.bias is not None,
                                      compute_dtype=torch.bfloat16, compress_statistics=double_quant, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, compress_statistics=double_quant, quant_type="nf4")
            layer.bias = module.bias
            network.set_submodule(name, layer.to("cpu"))
    return network


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_in_bf16_is_no_further_from_exact_arithmetic_than_peft_on_linear4bit(shape, double_quant, tmp_path):
    """The measure of "bf16 noise" is PEFT's own distance from float64 arithmetic on the same 4-bit weights."""
    folder, original, which = shape
    stored = cast(original, "bf16")
    stored.save_pretrained(tmp_path)
    exact = with_peft(cast(over_dequantised(cast(stored, "fp32"), "nf4", double_quant), "fp64"))
    theirs = with_peft(with_linear4bit(stored, double_quant), autocast=True)
    ours = model.load(make_config(tmp_path, "nf4", "bf16", model={"double_quant": double_quant}, memory=layers(which)), "cpu")
    _, exact_adapters = randomise(ours, exact, scale=0.05)
    _, their_adapters = randomise(ours, theirs, scale=0.05)
    loss, gradients = our_gradients(ours, [packed(DOCUMENTS, SUPERVISED)])
    exact_loss, loss_of_theirs = their_loss(exact, DOCUMENTS, SUPERVISED), their_loss(theirs, DOCUMENTS, SUPERVISED)
    exact_loss.backward(), loss_of_theirs.backward()
    assert theirs.training and all(module.training for module in theirs.modules())
    whole = lambda by_name: torch.cat([by_name[name].double().reshape(-1) for name in sorted(gradients)])
    exact_whole, their_whole = (whole({name: p.grad for name, p in adapters.items()}) for adapters in (exact_adapters, their_adapters))
    our_error, their_error = relative(whole(gradients), exact_whole), relative(their_whole, exact_whole)
    print(f"{ours.config.model_type} {which}: gradient {our_error:.2e}, theirs {their_error:.2e}; "
          f"loss {abs(loss / exact_loss.item() - 1):.1e}, theirs {abs(loss_of_theirs.item() / exact_loss.item() - 1):.1e}")
    assert their_error < 0.05, "the reference itself is not to be trusted"
    assert our_error < 1.5 * their_error
    assert abs(loss - exact_loss.item()) < 5e-3 * exact_loss.item()
    for name in gradients:
        assert F.cosine_similarity(gradients[name].double().reshape(-1), exact_adapters[name].grad.double().reshape(-1), dim=0) > 0.98, name


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
@choose("llama", "gemma2")
def test_gradients_are_the_same_after_an_evaluation(shape, kind):
    """In bitsandbytes' own layer an evaluation silently takes gradients away."""
    folder, original, which = shape
    network = model.load(make_config(folder, kind, "bf16", memory=layers(which)), "cpu")
    randomise(network)
    before = our_gradients(network, [packed(DOCUMENTS, SUPERVISED)])
    network.eval()
    logits_of(network, DOCUMENTS)
    network.train()
    after = our_gradients(network, [packed(DOCUMENTS, SUPERVISED)])
    assert before[0] == after[0] and all(torch.equal(before[1][name], after[1][name]) for name in before[1])


@pytest.mark.parametrize("which", LAYERS[:2])
@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_the_gradient_predicts_the_change_of_the_loss(tmp_path, kind, which):
    """Two forward passes along the gradient: the check that a healthy norm cannot fake."""
    make_model(tmp_path, "llama")
    network = model.load(make_config(tmp_path, kind, memory=layers(which)), "cpu")
    own, _ = randomise(network)
    batch = packed(DOCUMENTS, SUPERVISED)
    _, gradients = our_gradients(network, [batch])
    squared = sum(gradient.double().square().sum().item() for gradient in gradients.values())
    step, losses = 3e-4 / math.sqrt(squared), []
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.add_(gradients[name], alpha=sign * step)
            losses.append(model.summed_loss(network, batch)[1].double().sum().item())
    assert abs((losses[0] - losses[1]) / (2 * step * squared) - 1) < 2e-3


def test_a_window_in_the_configuration_of_an_architecture_without_one_is_no_window(tmp_path):
    """Llama's own layers attend to everything whatever sliding_window says, and so does the fast path; Mistral's attend through it."""
    document = torch.arange(3, 60)
    for kind, same in (("llama", True), ("mistral", False)):
        make_model(tmp_path / kind, kind, sliding_window=None)
        batch, losses = packed([document], [torch.ones(57, dtype=torch.bool)]), []
        for window in (None, 16):
            settings = json.loads((tmp_path / kind / "config.json").read_text()) | {"sliding_window": window}
            (tmp_path / kind / "config.json").write_text(json.dumps(settings))
            network = model.load(make_config(tmp_path / kind), "cpu")
            assert network.fused_layers == 2
            losses.append(model.summed_loss(network, batch)[0].item())
        assert (losses[0] == losses[1]) == same


def kept_and_not(tmp_path, kind, dtype, fused):
    """[(loss, {name: gradient})] with kept dequantised copies and without."""
    results = []
    for keep in ("yes", "no"):
        network = model.load(make_config(tmp_path, kind, dtype, memory={"keep_dequantized": keep, "fused": fused}), "cpu")
        assert all((module.kept is not None) == (keep == "yes") for module in network.modules() if isinstance(module, quant.FrozenWeight))
        randomise(network)
        results.append(our_gradients(network, [packed(DOCUMENTS, SUPERVISED)]))
    return results


def test_kept_copies_change_no_bit_of_loss_and_gradients_of_plain_layers(tmp_path):
    make_model(tmp_path, "llama")
    for kind, dtype in (("nf4", "bf16"), ("int8", "bf16"), ("llm_int8", "bf16"), ("nf4", "fp32")):
        with_copies, without = kept_and_not(tmp_path, kind, dtype, fused=False)
        assert with_copies[0] == without[0]
        assert all(torch.equal(with_copies[1][name], without[1][name]) for name in without[1])


def test_kept_copies_change_fused_layers_by_rounding_alone(tmp_path):
    """Their backward pass forms two products as one where copies are kept."""
    make_model(tmp_path, "llama")
    for kind in ("nf4", "int8"):
        with_copies, without = kept_and_not(tmp_path, kind, "fp32", fused=True)
        assert with_copies[0] == pytest.approx(without[0], rel=1e-6)
        assert all((with_copies[1][name] - without[1][name]).norm() <= 1e-5 * without[1][name].norm() for name in without[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outliers", [[], [1, 40]])
def test_llm_int8_backward_is_the_dequantised_weights_and_bitsandbytes_own(dtype, outliers):
    import bitsandbytes as bnb
    weight = (0.05 * torch.randn(48, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[3, outliers] = 20.0
    grad = torch.randn(9, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    frozen = quant.quantize(weight, make_config("x", "llm_int8", "bf16").model, dtype)
    ours = x.clone().requires_grad_()
    lora_layers.FrozenMatmul.apply(ours, frozen).backward(grad)
    scale = weight.double().abs().amax(dim=1, keepdim=True) / 127
    exact = grad.double() @ ((weight.double() / scale).round() * scale)
    assert relative(ours.grad, exact) < 2 * torch.finfo(dtype).eps
    layer = bnb.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(weight.clone(), has_fp16_weights=False, requires_grad=False)
    theirs = x.clone().requires_grad_()
    layer.to("cpu")(theirs).backward(grad)
    assert relative(ours.grad, theirs.grad) < 2 * torch.finfo(dtype).eps


def test_frozen_matmul_has_the_right_derivative():
    frozen = quant.PlainWeight(torch.randn(5, 7, dtype=torch.float64))
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lora_layers.FrozenMatmul.apply(x, frozen), x)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["none", "nf4", "int8", "llm_int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_far_below_the_last_digit_of_the_product_is_not_lost(kind, dtype, dora):
    """Its mean over many outputs comes through the rounding. Added to a product that is rounded already, none of it would."""
    module = lora_layers.AdaptedLinear(128, 256, r=4, dora=dora)
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    module.weight = quant.quantize(weight, make_config("x", kind, "bf16").model, dtype)
    x = torch.randn(200, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        module.lora_A.normal_(generator=torch.Generator().manual_seed(2))
        lengths = module.row_lengths(dtype)
        if dora:
            module.lora_magnitude_vector.copy_(lengths)
        before = module(x)
        module.lora_B.normal_(generator=torch.Generator().manual_seed(3)).mul_(torch.finfo(dtype).eps / 16)
        module.held = lengths
        after, update = module(x), (x.double() @ module.lora_A.to(dtype).double().T) @ module.lora_B.to(dtype).double().T
        assert (update.abs() < torch.finfo(dtype).eps / 4 * before.abs().double()).double().mean() > 0.7
        came = lambda change, meant: (change.double() * meant).sum() / meant.square().sum()
        assert came(after - before, update) == pytest.approx(1, abs=0.05)
        if dora:
            module.lora_magnitude_vector.mul_(1 + torch.finfo(dtype).eps / 8)
            assert came(module(x) - after, before.double() * torch.finfo(dtype).eps / 8) == pytest.approx(1, abs=0.15)


# -------------------------------------------------------------------------------------------------------------- packing

@pytest.mark.parametrize("kind, dtype", [("none", "fp32"), ("none", "bf16"), ("nf4", "bf16"), ("int8", "bf16"), ("int8", "fp16")])
def test_changing_a_document_leaves_the_next_ones_logits_alone(shape, kind, dtype):
    folder, original, which = shape
    network = model.load(make_config(folder, kind, dtype, memory=layers(which)), "cpu")
    randomise(network)
    other = draw((20,), seed=9)[0]
    before, after = (logits_of(network, [*first, *DOCUMENTS[1:]]) for first in ([DOCUMENTS[0]], other))
    assert torch.equal(before[20:], after[20:])  # the shapes are the same, so every bit is
    assert relative(after[:20], before[:20]) > 0.1
    shorter = logits_of(network, [other[0][:7], *DOCUMENTS[1:]])  # other shapes may round otherwise
    assert relative(shorter[7:], before[20:]) < {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}[dtype]


def test_a_token_sees_those_before_it_and_none_after(shape):
    folder, original, which = shape
    network = model.load(make_config(folder, memory=layers(which)), "cpu")
    before = logits_of(network, DOCUMENTS)
    for place in (3, 12, 22, 30):
        ids = torch.cat(DOCUMENTS)
        ids[place] = (ids[place] + 7) % 300 + 3
        moved = (logits_of(network, list(ids.split([20, 5, 13]))) - before).abs().amax(dim=1)
        assert moved[:place].max() == 0
        end = next(end for end in (20, 25, 38) if place < end)
        assert (moved[place:min(end, place + 8)] > 0).all() and (moved[end:] == 0).all()


@pytest.mark.parametrize("threshold", [6.0, 2.0])
def test_llm_int8_moves_a_neighbour_by_rounding_only(tmp_path, threshold):
    """Outlier columns are chosen over the micro-batch, so a packed neighbour may change which columns are rounded, within int8's own
    error."""
    network = make_model(tmp_path, "llama")
    exact = their_logits(network, DOCUMENTS)[20:]
    ours = model.load(make_config(tmp_path, "llm_int8", "bf16", model={"llm_int8_threshold": threshold}), "cpu")
    alone = logits_of(ours, DOCUMENTS[1:])
    with_neighbours = [logits_of(ours, [*draw((20,), seed=seed)[0], *DOCUMENTS[1:]])[20:] for seed in range(4)]
    own_error = relative(alone, exact)
    moves = [relative(logits, alone) for logits in with_neighbours]
    print(f"threshold {threshold}: int8's own error {own_error:.3f}, moves {max(moves):.3f}")
    assert max(moves) < 0.05 and max(moves) < own_error
    if threshold == 2.0:
        assert max(moves) > 0, "no column changed sides: this threshold tests nothing"


WINDOW, WINDOW_SUPERVISED = draw((20, 5, 13, 17, 1, 11, 24, 8), seed=3, share=0.15)  # ragged, most labels masked
WINDOW_SUPERVISED[3][:] = False  # a row without any
SPLITS = {"8 x 1": 1, "4 x 2": 2, "2 x 4": 4, "1 x 8": 8}


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_the_way_a_window_is_cut_into_micro_batches_changes_no_gradient(shape, dtype):
    folder, original, which = shape
    network = model.load(make_config(folder, dtype=dtype, memory=layers(which)), "cpu")
    randomise(network)
    count = sum(int(mask[1:].sum()) for mask in WINDOW_SUPERVISED)
    results = {}
    for name, size in SPLITS.items():
        batches = [packed(WINDOW[i:i + size], WINDOW_SUPERVISED[i:i + size]) for i in range(0, 8, size)]
        assert sum(len(batch.targets) for batch in batches) == count < 0.2 * sum(map(len, WINDOW))
        results[name] = our_gradients(network, batches, scale=1 / count)
    for name in SPLITS:
        assert abs(results[name][0] / results["1 x 8"][0] - 1) < PRECISE[dtype]
        assert max(relative(results[name][1][p], results["1 x 8"][1][p]) for p in results[name][1]) < PRECISE[dtype]


@pytest.mark.parametrize("which", LAYERS[:2])
def test_a_micro_batch_without_supervised_tokens_has_loss_0_and_adds_no_gradient(tmp_path, which):
    make_model(tmp_path, "llama")
    network = model.load(make_config(tmp_path, memory=layers(which)), "cpu")
    randomise(network)
    loss, gradients = our_gradients(network, [packed(DOCUMENTS, [torch.zeros(len(d), dtype=torch.bool) for d in DOCUMENTS])])
    assert loss == 0 and all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_attention_refuses_by_name_what_it_does_not_know():
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    ends = dict(cu_seqlens=torch.tensor([0, 6], dtype=torch.int32), max_seqlen=6, scaling=0.3)
    module = torch.nn.Linear(1, 1)
    out = attention.packed_attention(module, q, k, v, None, **ends, position_ids=None, use_cache=False, sinks=None)[0]
    assert out.shape == (1, 6, 4, 8)
    for asked, named in ((dict(s_aux=torch.ones(4)), "s_aux"), (dict(alibi=1.0), "alibi"), (dict(dropout=0.1), "dropout")):
        with pytest.raises(ValueError, match=named):
            attention.packed_attention(module, q, k, v, None, **ends, **asked)
    with pytest.raises(ValueError, match="mask"):
        attention.packed_attention(module, q, k, v, torch.zeros(6, 6), **ends)


def test_varlen_attention_is_refused_where_it_does_not_work(tmp_path):
    make_model(tmp_path, "llama")
    with pytest.raises(ValueError, match="model.attention: varlen needs a GPU"):
        model.load(make_config(tmp_path, "none", "bf16", model={"attention": "varlen"}), "cpu")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
@pytest.mark.parametrize("bounds", [[0, 9, 11, 19, 20], [0, 10, 20], [0, 20]])  # two of about one length, so padded; of one length; alone
def test_attention_by_documents_is_its_formula_in_float64(bounds, window, softcap):
    heads, kv_heads, d = 4, 2, 8
    q, k, v = (torch.randn(20, h, d, dtype=torch.float64, generator=torch.Generator().manual_seed(h)) for h in (heads, kv_heads, kv_heads))
    got = attention.attention_by_documents(q, k, v, bounds, 0.4, window, softcap)
    for head in range(heads):
        for i in range(20):
            start = max(bound for bound in bounds if bound <= i)
            seen = range(max(start, i - (window or 20) + 1), i + 1)
            scores = torch.stack([0.4 * q[i, head] @ k[j, head // 2] for j in seen])
            weights = (softcap * torch.tanh(scores / softcap) if softcap else scores).softmax(0)
            assert torch.allclose(got[i, head], sum(w * v[j, head // 2] for w, j in zip(weights, seen)), atol=1e-12)


# ------------------------------------------------------------------------------------------------ recomputation, dropout

@pytest.mark.parametrize("kind, dtype, dropout", [("none", "fp32", 0.0), ("nf4", "bf16", 0.3)])
def test_recomputing_activations_changes_no_bit_of_the_gradients(shape, kind, dtype, dropout):
    folder, original, which = shape
    results = []
    for count in (0, 1, 99):
        network = model.load(make_config(folder, kind, dtype, lora={"dropout": dropout}, memory=layers(which)), "cpu")
        randomise(network)
        model.recompute(network, count)
        torch.manual_seed(7)
        results.append(our_gradients(network, [packed(DOCUMENTS, SUPERVISED), packed(DOCUMENTS[:2], SUPERVISED[:2])]))
    for loss, gradients in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(gradients[name], results[0][1][name]) for name in gradients)


def test_recomputing_runs_the_chosen_layers_twice_and_keeps_less(tmp_path):
    make_model(tmp_path, "llama", num_hidden_layers=3)
    for count in (0, 2, 3):
        network = model.load(make_config(tmp_path, memory=layers("plain")), "cpu")
        model.recompute(network, count)
        runs, kept = [0, 0, 0], [0]
        for i, layer in enumerate(network.get_decoder().layers):
            layer.mlp.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))

        def keep(tensor):
            kept[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.summed_loss(network, packed(DOCUMENTS, SUPERVISED))[0]
        loss.backward()
        assert runs == [2] * count + [1] * (3 - count)
        assert count == 0 or kept[0] < least
        least = kept[0]
        with torch.no_grad():  # an evaluation recomputes nothing
            model.summed_loss(network, packed(DOCUMENTS, SUPERVISED))
        assert runs == [3] * count + [2] * (3 - count)


def test_dropout_is_pefts_draw_for_draw(tmp_path):
    original = make_model(tmp_path, "llama")
    network = model.load(make_config(tmp_path, dtype="fp64", lora={"dropout": 0.4}, memory=layers("plain")), "cpu")
    peft = with_peft(reference(original, "fp64", network), lora_dropout=0.4).train()
    _, theirs = randomise(network, peft)
    torch.manual_seed(11)
    loss, gradients = our_gradients(network, [packed(DOCUMENTS[:1], SUPERVISED[:1])])
    torch.manual_seed(11)
    expected = their_loss(peft, DOCUMENTS[:1], SUPERVISED[:1])
    expected.backward()
    assert abs(loss / expected.item() - 1) < 1e-10
    assert max(relative(gradients[name], theirs[name].grad) for name in gradients) < 1e-10


@pytest.mark.parametrize("which", LAYERS[:2])
def test_dropout_acts_in_training_alone_and_keeps_the_adapters_mean_output(tmp_path, which):
    make_model(tmp_path, "llama", num_hidden_layers=1)
    wet, dry = (model.load(make_config(tmp_path, lora={"dropout": p, "targets": ["down_proj"]}, memory=layers(which)), "cpu")
                for p in (0.5, 0.0))
    randomise(wet), randomise(dry)
    last = lambda network: model.hidden_states(network, packed(DOCUMENTS, SUPERVISED)).detach()
    torch.manual_seed(0)
    assert not torch.equal(last(wet), last(wet)) and torch.equal(last(dry), last(dry))
    outputs = []
    for network in (wet, dry):  # before the final norm, the output is linear in what dropout multiplies
        caught = []
        hook = network.get_decoder().norm.register_forward_pre_hook(lambda _, args: caught.append(args[0].detach().double()))
        for _ in range(400):
            last(network)
        hook.remove()
        outputs.append((torch.stack(caught).mean(0), caught[0]))
    spread = (outputs[0][1] - outputs[1][0]).norm()
    assert (outputs[0][0] - outputs[1][0]).norm() < 0.1 * spread  # 1 / sqrt(400) = 0.05
    wet.eval()
    assert torch.equal(last(wet), last(dry.eval()))


# ------------------------------------------------------------------------------------------------------------- the loss

def loss_case(rows=11, vocabulary=23, width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden, head, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
                          for shape in ((rows, width), (vocabulary, width), (vocabulary,)))
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[[2, 7]] = -100
    return hidden.requires_grad_(), head, bias, targets


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_cross_entropy_by_blocks_is_torchs_own(softcap):
    count = 2 * model.BLOCK + 5  # rows: blocks that are full and one that is not, in chunks that split them
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((count, 7), (31, 7)))
    targets = torch.randint(0, 31, (count,), generator=generator)
    targets[3] = targets[-1] = -100
    results = []
    for blocks in (True, False):
        h = hidden.clone().requires_grad_()
        if blocks:
            total, nll, correct = model.ChunkedCrossEntropy.apply(h, head, None, targets, model.BLOCK + 3, softcap)
        else:
            logits = h @ head.T
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            nll = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
            total, correct = nll.sum(), (logits.argmax(-1) == targets) & (targets >= 0)
        (3 * total).backward()
        results.append((total.detach(), nll.detach(), h.grad, correct))
    (*ours, same), (*theirs, expected) = results
    assert all(relative(a, b) < 1e-12 for a, b in zip(ours, theirs)) and torch.equal(same, expected)


@pytest.mark.parametrize("n", [5, 64, 65, 200, 300, 513])  # queries are looked at 64 at a time, and by torch's own kernel beyond 512
@pytest.mark.parametrize("window", [None, 3, 150])
def test_attention_by_hand_is_the_masked_softmax_in_16_bits(monkeypatch, n, window):
    monkeypatch.setattr(attention.quant, "has_bf16", lambda device: True)
    generator = torch.Generator().manual_seed(n)
    q, k, v, weight = (torch.randn(2, heads, n, width, generator=generator, dtype=torch.float64).bfloat16()
                       for heads, width in ((6, 16), (2, 16), (2, 24), (6, 24)))
    behind = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    hidden = (behind < 0) | (behind >= (window or n))

    def reference(q, k, v):
        scores = q @ k.repeat_interleave(3, 1).transpose(2, 3) * 0.25
        return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v.repeat_interleave(3, 1)

    found, expected = [], []
    for results, attend, dtype in ((found, lambda q, k, v: attention.causal_attention(q, k, v, 0.25, window), torch.bfloat16),
                                   (expected, reference, torch.float64)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = attend(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs))  # heads lie within tokens, as in a network
        (out * weight.to(dtype)).sum().backward()
        results += [out.detach(), *(t.grad for t in inputs)]
    for ours, exact in zip(found, expected):
        assert relative(ours, exact) < 1e-2


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 100])
def test_the_chunked_loss_is_cross_entropy_in_float64(chunk, softcap, with_bias):
    hidden, head, bias, targets = loss_case()
    bias = bias if with_bias else None
    total, nll, correct = model.ChunkedCrossEntropy.apply(hidden, head, bias, targets, chunk, softcap)
    got, = torch.autograd.grad(3.0 * total, hidden)
    logits = F.linear(hidden, head, bias)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(nll, expected.detach(), rtol=1e-12, atol=1e-12) and nll[2] == nll[7] == 0
    assert torch.allclose(total, expected.sum(), rtol=1e-12)
    assert relative(got, torch.autograd.grad(3.0 * expected.sum(), hidden)[0]) < 1e-12
    assert got[2].abs().max() == 0
    assert torch.equal(correct, logits.argmax(-1) == targets)
    assert not nll.requires_grad and not correct.requires_grad


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_chunked_loss_passes_gradcheck(softcap, with_bias):
    hidden, head, bias, targets = loss_case()
    loss = lambda h: model.ChunkedCrossEntropy.apply(h, head, bias if with_bias else None, targets, 4, softcap)[0]
    assert torch.autograd.gradcheck(loss, hidden)


def test_the_loss_of_no_rows_and_of_no_targets_is_0():
    hidden, head, _, targets = loss_case()
    for h, t in ((hidden[:0], targets[:0]), (hidden, torch.full_like(targets, -100))):
        total, nll, correct = model.ChunkedCrossEntropy.apply(h, head, None, t, 4, None)
        assert total == 0 and len(nll) == len(correct) == len(t) and not correct.any()
        assert torch.autograd.grad(total, h)[0].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_loss_itself_is_computed_in_fp32(dtype):
    hidden, head, _, targets = loss_case(rows=64, vocabulary=500, width=16, dtype=dtype)
    total, nll, _ = model.ChunkedCrossEntropy.apply(hidden, head, None, targets, 10, None)
    assert total.dtype == nll.dtype == torch.float32
    logits = (hidden @ head.T).double()  # the product is rounded to 16 bits, nothing after it
    expected = F.cross_entropy(logits, targets, reduction="none").detach()
    assert relative(nll, expected) < 1e-6
    wide = hidden.detach().double().requires_grad_()
    exact = torch.autograd.grad(F.cross_entropy(F.linear(wide, head.double()), targets, reduction="sum"), wide)[0]
    assert relative(torch.autograd.grad(total, hidden)[0], exact) < 2 * torch.finfo(dtype).eps


def test_logits_never_exist_for_more_rows_than_a_chunk():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    hidden, head, _, targets = loss_case(rows=40, vocabulary=1000)
    with Largest() as seen:
        total = model.ChunkedCrossEntropy.apply(hidden, head.requires_grad_(False), None, targets, 7, 2.0)[0]
        total.backward()
    assert seen.size == 1000 * 7


def test_the_loss_of_a_network_does_not_depend_on_the_chunk(each):
    folder, _ = each
    results = []
    for chunk in (1, 5, 1024):
        network = model.load(make_config(folder, dtype="fp64", memory={"loss_chunk": chunk}), "cpu")
        randomise(network)
        results.append(our_gradients(network, [packed(DOCUMENTS, SUPERVISED)]))
    for loss, gradients in results[1:]:
        assert abs(loss / results[0][0] - 1) < 1e-12
        assert max(relative(gradients[name], results[0][1][name]) for name in gradients) < 1e-10


# -------------------------------------------------------------------------------------------------------------- loading

def rewrite(folder, change):
    """Apply `change` to the tensors of a model folder's one safetensors file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


def shard(folder):
    """Cut a folder's weights into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


def test_sharded_weights_are_the_same_weights(each, tmp_path):
    _, network = each
    network.save_pretrained(tmp_path)
    shard(tmp_path)
    ours = model.load(make_config(tmp_path), "cpu")
    assert relative(logits_of(ours, DOCUMENTS), their_logits(network, DOCUMENTS)) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding_and_an_untied_one_is_its_own(tmp_path, tied):
    network = make_model(tmp_path, "llama", tie_word_embeddings=tied)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    ours = model.load(make_config(tmp_path), "cpu")
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied
    assert relative(logits_of(ours, DOCUMENTS), their_logits(network, DOCUMENTS)) < 1e-5


def test_a_tied_head_that_is_stored_as_well_is_still_tied(tmp_path):
    network = make_model(tmp_path, "llama", tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    ours = model.load(make_config(tmp_path), "cpu")
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert relative(logits_of(ours, DOCUMENTS), their_logits(network, DOCUMENTS)) < 1e-5


def test_nothing_but_adapters_wants_a_gradient_and_nothing_is_left_on_the_meta_device(each):
    folder, _ = each
    network = model.load(make_config(folder, "nf4", "bf16"), "cpu")
    own = {id(parameter) for parameter in lora_layers.adapters(network).values()}
    for name, parameter in [*network.named_parameters(), *network.named_buffers()]:
        assert parameter.device.type == "cpu", name
        assert parameter.requires_grad == (id(parameter) in own), name
    frozen = model.frozen(network)
    assert {id(parameter) for _, parameter in frozen} | own == {id(parameter) for parameter in network.parameters()}
    assert all(parameter.dtype == torch.float32 for parameter in lora_layers.adapters(network).values())
    embeddings = network.get_input_embeddings().weight, network.get_output_embeddings().weight
    assert all(weight.dtype == torch.bfloat16 for weight in embeddings)  # nothing large is upcast


def test_a_training_step_changes_adapters_and_no_byte_of_what_is_frozen(tmp_path):
    make_model(tmp_path, "llama")
    for kind in ("nf4", "int8", "llm_int8", "none"):
        network = model.load(make_config(tmp_path, kind, "bf16"), "cpu")
        randomise(network)
        before, own = quant.fingerprint(model.frozen(network)), quant.fingerprint(lora_layers.adapters(network).items())
        our_gradients(network, [packed(DOCUMENTS, SUPERVISED)])
        with torch.no_grad():
            for parameter in lora_layers.adapters(network).values():
                parameter -= 0.1 * parameter.grad
        model.summed_loss(network, packed(DOCUMENTS, SUPERVISED))[0].backward()
        assert quant.fingerprint(model.frozen(network)) == before
        assert quant.fingerprint(lora_layers.adapters(network).items()) != own


def test_the_memory_table_counts_every_byte_once(tmp_path):
    make_model(tmp_path, "llama", tie_word_embeddings=True)
    network = model.load(make_config(tmp_path, "nf4", "bf16", memory={"keep_dequantized": "no"}), "cpu")
    table = model.memory_table(network)
    assert sum(size for _, size in table.values()) == sum(p.numel() * p.dtype.itemsize for p in network.parameters())
    assert table["embeddings and head"] == ({"bfloat16"}, 320 * 64 * 2)
    assert table["adapters"][1] == 4 * sum(p.numel() for p in lora_layers.adapters(network).values())
    copied = model.load(make_config(tmp_path, "nf4", "bf16", memory={"keep_dequantized": "yes"}), "cpu")
    kept = model.memory_table(copied)["dequantised copies"]
    adapted = [module for module in network.modules() if isinstance(module, lora_layers.AdaptedLinear)]
    assert kept == ({"bfloat16"}, 2 * sum(m.in_features * m.out_features for m in adapted))


def refused(folder, *words, **changes):
    with pytest.raises(ValueError) as caught:
        model.load(make_config(folder, **changes), "cpu")
    for word in words:
        assert word in str(caught.value), f"{word!r} is not named in: {caught.value}"


def test_what_cannot_be_loaded_is_refused_by_name(tmp_path):
    def fresh(name):
        folder = tmp_path / name
        make_model(folder, "llama")
        return folder

    refused("no/such/folder", "model.path", "no/such/folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json", "model.path")

    folder = fresh("missing tensor")
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, "model.layers.1.mlp.up_proj.weight", str(folder))

    folder = fresh("wrong shape")
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 64)}))
    refused(folder, "model.layers.0.self_attn.k_proj.weight", "(16, 64)", "(32, 64)", "model.safetensors")

    folder = fresh("stored as integers")
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}))
    refused(folder, "model.norm.weight", "int8")

    folder = fresh("bin alone")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "safetensors", ".bin", str(folder))

    folder = fresh("code in the folder")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    refused(folder, "auto_map", "config.json")

    folder = fresh("already quantised")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, "gptq", "quantised", "16-bit")

    folder = fresh("unknown architecture")
    edit_config(folder, model_type="frobnicator")
    refused(folder, "frobnicator", "config.json")

    folder = fresh("not a language model")
    edit_config(folder, model_type="clip", architectures=["CLIPModel"])
    refused(folder, "config.json", "causal language model")

    folder = fresh("no such target")
    refused(folder, "lora.targets", "'w_pack'", "q_proj", lora={"targets": ["q_proj", "w_pack"]})
    refused(folder, "lora.targets", "'proj'", lora={"targets": ["proj"]})  # the end of a name, not a part of it


@pytest.mark.parametrize("bad", ["../model-00001-of-00002.safetensors", "sub/../../x.safetensors", "/etc/hostname", "", "gone.safetensors"])
def test_a_shard_outside_the_folder_or_missing_is_refused(tmp_path, bad):
    folder = tmp_path / "model"
    make_model(folder, "llama")
    files = shard(folder)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    files[sorted(files)[0]] = bad
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    refused(folder, "model.safetensors.index.json", repr(bad))


def test_a_weight_file_that_is_cut_short_is_refused_by_name(tmp_path):
    make_model(tmp_path, "llama")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(tmp_path, "model.safetensors")


def test_an_index_that_names_the_wrong_shard_is_refused_by_name(tmp_path):
    make_model(tmp_path, "llama")
    files = shard(tmp_path)
    first, second = sorted(files)[:2]
    files[first], files[second] = files[second], files[first]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    refused(tmp_path, ".safetensors", "cannot read")


def test_an_index_without_a_weight_map_is_refused_by_name(tmp_path):
    make_model(tmp_path, "llama")
    shard(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path, "model.safetensors.index.json", "weight_map")


def test_a_network_without_a_linear_layer_is_refused_by_name(tmp_path):
    foreign(tmp_path, "gpt2", n_embd=64, n_head=4, n_layer=2)
    refused(tmp_path, "GPT2", lora={"targets": ["all-linear"]})


def test_architectures_that_cannot_be_trained_here_are_refused_by_name(tmp_path):
    experts = dict(num_local_experts=4, num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2)
    for kind, word in (("mixtral", "experts"), ("qwen3_moe", "experts"), ("bloom", "bloom.*attention"), ("mamba", "mamba.*attention")):
        from transformers import AutoConfig, AutoModelForCausalLM
        settings = AutoConfig.for_model(kind, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, n_head=4, n_layer=2, vocab_size=320,
                                        state_size=4, **(experts if "mix" in kind or "moe" in kind else {}))
        folder = tmp_path / kind
        AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
        with pytest.raises(ValueError, match=word):
            network = model.load(make_config(folder, lora={"targets": ["all-linear"]}), "cpu")
            model.summed_loss(network, packed(DOCUMENTS, SUPERVISED))


def foreign(folder, kind, **changes):
    """Save a tiny model of any transformers architecture, weights large enough to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    settings = AutoConfig.for_model(kind, **{**COMMON, **changes})
    network = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.mul_(3 if parameter.ndim > 1 and "embed" not in name else 1)
    network.save_pretrained(folder)
    return network


RIGHT_OR_REFUSED = {
    "phi3": {}, "olmo2": {}, "olmo3": {}, "smollm3": {}, "glm4": {}, "starcoder2": {"residual_dropout": 0.0}, "ernie4_5": {},
    "gemma": {"head_dim": 32}, "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25}, "cohere2": {"logit_scale": 0.25, "head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.1}, "stablelm": {}, "nemotron": {}, "helium": {"head_dim": 16},
}
@pytest.mark.parametrize("kind", RIGHT_OR_REFUSED)
def test_an_architecture_trains_rightly_or_is_refused_by_name(tmp_path, kind):
    """Whatever else transformers has: its packed loss is the one of its own logits, or a ValueError says why not; never a wrong number."""
    network = foreign(tmp_path, kind, **RIGHT_OR_REFUSED[kind])
    expected = their_loss(network, DOCUMENTS, SUPERVISED).item()
    try:
        ours = model.load(make_config(tmp_path, lora={"targets": ["all-linear"]}), "cpu")
        loss = model.summed_loss(ours, packed(DOCUMENTS, SUPERVISED))[0].item()
    except ValueError as error:
        assert len(str(error)) > 40 and kind[:4] in str(error).lower(), f"refused, but not by name: {error}"
        return
    assert abs(loss / expected - 1) < 1e-5


WRONG = {  # what packing would cross, or a loss that would not be the model's own, and the word of the refusal
    "granite": ({"logits_scaling": 3.0}, "spread"), "cohere": ({"logit_scale": 0.25}, "spread"),
    "phi": ({"resid_pdrop": 0.1}, "set resid_pdrop to 0"),
    "opt": ({"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.1}, "set dropout to 0"),
    "seed_oss": ({"attention_dropout": 0.1}, "attention dropout.*config.json"),
    "lfm2": ({"layer_types": ["conv", "full_attention"], "block_ff_dim": 128}, "change each other"),
    "falcon_h1": ({"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}, "change each other"),
    "bamba": ({"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}, "change each other"),
}


@pytest.mark.parametrize("dtype, quantised", [("fp32", "none"), ("bf16", "nf4"), ("bf16", "llm_int8")])
@pytest.mark.parametrize("kind", WRONG)
def test_a_loss_that_is_not_the_models_own_is_refused_in_any_precision(tmp_path, kind, dtype, quantised):
    """16 bits round by more than some of these are wrong by: what crosses is told by gradients that are exactly zero or not."""
    changes, words = WRONG[kind]
    foreign(tmp_path, kind, **changes)
    with pytest.raises(ValueError, match=words):
        model.load(make_config(tmp_path, quantised, dtype, lora={"targets": ["all-linear"]}), "cpu")


def test_a_model_whose_loss_is_no_number_is_told_from_one_that_is_wrong(tmp_path):
    make_model(tmp_path, "llama")
    rewrite(tmp_path, lambda tensors: tensors["model.norm.weight"].fill_(math.nan))
    refused(tmp_path, "LlamaForCausalLM", "is not finite")


def test_models_of_pictures_sound_or_with_an_encoder_are_refused_in_one_line(tmp_path):
    from transformers import AutoConfig, BartForConditionalGeneration
    small = dict(d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
                 encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=320)
    BartForConditionalGeneration(AutoConfig.for_model("bart", **small)).save_pretrained(tmp_path / "bart")
    make_model(tmp_path / "vlm", "llama")
    edit_config(tmp_path / "vlm", model_type="llava", vision_config={"hidden_size": 64})
    make_model(tmp_path / "vit", "llama")
    edit_config(tmp_path / "vit", model_type="vit")
    for name, words in (("bart", "an encoder with a decoder"), ("vlm", "reads pictures or sound"),
                        ("vit", "transformers has none of this type")):
        with pytest.raises(ValueError, match=words) as told:
            model.load(make_config(tmp_path / name), "cpu")
        assert len(str(told.value)) < 300 + len(str(tmp_path)) and "\n" not in str(told.value)


# The child loads a tiny model first, so that imports and their memory are behind it, has the kernel forget its peak (5 written to
# /proc/self/clear_refs), loads the model in question and reads VmHWM: the peak of all resident pages, those of the mapped weight
# file included. MALLOC_MMAP_THRESHOLD_ makes glibc give each freed tensor back at once: pages that its heap keeps for later are
# not held by us, and how many they are depends on the order of frees. The comparisons that follow loading are left out: they run
# a forward pass, with a pass's own working memory.
PEAK = """
import gc, sys
sys.path[:0] = [{project!r}, {tests!r}]
import conftest, torch
torch.set_num_threads(1)
import model

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def settings(folder):
    return conftest.make_config(folder, {kind!r}, {dtype!r}, memory={{"keep_dequantized": "no", "fused": False}})
model.compare_with_transformers = lambda network: None

model.load(settings({tiny!r}), "cpu")
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
assert status("VmHWM") - before < 2**20, "the kernel did not forget the peak"
network = model.load(settings({large!r}), "cpu")
print("measured", status("VmHWM") - before, sum(size for _, size in model.memory_table(network).values()))
"""
SMALL = 8 * 2**20  # modules, the meta model, generator of A, safetensors' headers, one tensor's temporaries in quantisation


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """{stored dtype: (folder, bytes of the largest tensor)} of a Llama of 105 MiB in fp32; its largest tensor, the embedding, is read
    first."""
    folders = {}
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path_factory.mktemp("large")
        make_model(folder, "llama", dtype, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
                   num_key_value_heads=8, vocab_size=16000, tie_word_embeddings=True)
        folders[dtype] = (folder, 16000 * 512 * dtype.itemsize)
    yield folders
    import shutil
    for folder, _ in folders.values():
        shutil.rmtree(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("kind, stored", [("nf4", torch.float32), ("int8", torch.bfloat16), ("llm_int8", torch.float32)],
                         ids=["nf4 from fp32", "int8 from bf16", "llm_int8 from fp32"])
def test_loading_never_holds_more_than_the_quantised_model_and_one_tensor(large, tmp_path, kind, stored):
    make_model(tmp_path, "llama")
    folder, largest = large[stored]
    script = PEAK.format(project=str(PROJECT), tests=str(PROJECT / "tests"), kind=kind, dtype="bf16", tiny=str(tmp_path), large=str(folder))
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                           env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"})
    assert child.returncode == 0, child.stderr
    peak, size = map(int, child.stdout.split("measured")[1].split())
    print(f"{kind}, stored as {stored}: peak {peak / 2**20:.1f} MiB, model {size / 2**20:.1f}, largest tensor {largest / 2**20:.1f}")
    assert size < peak + SMALL, "the peak cannot lie under what is held in the end"
    assert peak <= size + largest + SMALL


# ------------------------------------------------------------------------------------------------------------- adapters

ADAPTERS = {  # our lora settings, PEFT's, architecture
    "plain": ({}, {}, "llama"),
    "rslora, odd alpha": ({"rslora": True, "alpha": 6.5, "r": 3}, {"use_rslora": True, "lora_alpha": 6.5, "r": 3}, "gemma3_text"),
    "dropout": ({"dropout": 0.25}, {"lora_dropout": 0.25}, "mistral"),
    "two targets": ({"targets": ["v_proj", "down_proj"]}, {"target_modules": ["v_proj", "down_proj"]}, "qwen2"),
    "all-linear": ({"targets": ["all-linear"]}, {"target_modules": "all-linear"}, "qwen3"),
    "tied head": ({}, {}, "gemma2"),
}


def save_ours(network, settings, folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(lora_layers.peft_settings(settings.lora, network, settings.model.path))
    tensors = {name: parameter.detach().clone() for name, parameter in lora_layers.adapters(network).items()}
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("case", ADAPTERS)
def test_peft_loads_what_we_save_with_the_same_logits(models, tmp_path, case):
    from peft import PeftModel
    folder, network = models(ADAPTERS[case][2])
    settings = make_config(folder, lora=ADAPTERS[case][0])
    ours = model.load(settings, "cpu").eval()
    randomise(ours)
    save_ours(ours, settings, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(copy.deepcopy(network), tmp_path / "adapter").eval()
    assert sum("lora_" in name for name, _ in theirs.named_parameters()) == len(lora_layers.adapters(ours))
    assert relative(logits_of(ours, DOCUMENTS), their_logits(theirs, DOCUMENTS)) < 1e-5
    assert relative(their_logits(network, DOCUMENTS), their_logits(theirs, DOCUMENTS)) > 1e-2  # and the adapter does something


@pytest.mark.parametrize("case", ADAPTERS)
def test_what_peft_saves_we_load_with_the_same_logits(models, tmp_path, case):
    folder, network = models(ADAPTERS[case][2])
    theirs = with_peft(network, **ADAPTERS[case][1]).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.peft_config["default"].base_model_name_or_path = str(folder)
    theirs.save_pretrained(tmp_path)
    lora, tensors, base = lora_layers.read_adapter(tmp_path)
    assert base == str(folder)
    ours = model.load(make_config(folder, lora=dataclasses.asdict(lora)), "cpu").eval()
    lora_layers.set_adapters(lora_layers.adapters(ours), tensors, str(tmp_path))
    assert relative(logits_of(ours, DOCUMENTS), their_logits(theirs, DOCUMENTS)) < 1e-5
    settings = make_config(folder, lora=dataclasses.asdict(lora))
    save_ours(ours, settings, tmp_path / "again")  # what we loaded we save again, unchanged
    again, same, _ = lora_layers.read_adapter(tmp_path / "again")
    assert again == lora and all(torch.equal(tensors[name], same[name]) for name in tensors)


def test_adapters_that_cannot_be_honoured_are_refused_by_name(tmp_path):
    from peft import LoraConfig, get_peft_model
    network = make_model(tmp_path / "base", "llama")
    q = dict(target_modules=["q_proj"])
    cases = {
        "modules_to_save": dict(q, modules_to_save=["lm_head"]),
        "rank_pattern": dict(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
        "alpha_pattern": dict(target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 2}),
        "bias": dict(q, bias="lora_only"), "lora_bias": dict(q, lora_bias=True), "init_lora_weights": dict(q, init_lora_weights="pissa"),
        "layers_to_transform": dict(q, layers_to_transform=[1]),
        "trainable_token_indices": dict(q, trainable_token_indices={"embed_tokens": [3, 4]}),
    }
    for name, settings in cases.items():
        folder = tmp_path / name
        get_peft_model(copy.deepcopy(network), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings)).save_pretrained(folder)
        with pytest.raises(ValueError, match=rf"adapter_config.json: {name} = "):
            lora_layers.read_adapter(folder)
    from peft import IA3Config
    other = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(copy.deepcopy(network), other).save_pretrained(tmp_path / "other kind")
    with pytest.raises(ValueError, match="(?i)ia3"):
        lora_layers.read_adapter(tmp_path / "other kind")


def test_an_adapter_on_embeddings_or_head_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model
    network = make_model(tmp_path / "base", "llama")
    for target in ("embed_tokens", "lm_head"):
        wide = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", target])
        get_peft_model(copy.deepcopy(network), wide).save_pretrained(tmp_path / target)
        with pytest.raises(ValueError, match=target):
            lora, tensors, _ = lora_layers.read_adapter(tmp_path / target)
            ours = model.load(make_config(tmp_path / "base", lora=dataclasses.asdict(lora)), "cpu")
            lora_layers.set_adapters(lora_layers.adapters(ours), tensors, target)


def test_adapter_files_that_are_missing_or_belong_elsewhere_are_refused_by_name(tmp_path):
    make_model(tmp_path / "base", "llama")
    settings = make_config(tmp_path / "base")
    network = model.load(settings, "cpu")
    own = lora_layers.adapters(network)
    save_ours(network, settings, tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        kept = (tmp_path / "adapter" / name).read_bytes()
        (tmp_path / "adapter" / name).unlink()
        with pytest.raises(ValueError, match=name):
            lora_layers.read_adapter(tmp_path / "adapter")
        (tmp_path / "adapter" / name).write_bytes(kept)
    _, tensors, _ = lora_layers.read_adapter(tmp_path / "adapter")
    before, first = {name: p.clone() for name, p in own.items()}, sorted(tensors)[0]
    strange = "base_model.model.x.lora_A.weight"
    for change in (lambda t: t.pop(first), lambda t: t.update({strange: torch.zeros(4, 64)}),
                   lambda t: t.update({first: torch.zeros(8, 64)})):
        wrong = dict(tensors)
        change(wrong)
        with pytest.raises(ValueError, match="some/file: base_model.model"):
            lora_layers.set_adapters(own, wrong, "some/file")
    assert all(torch.equal(before[name], own[name]) for name in own)


def test_adapters_and_their_gradients_are_parts_of_one_buffer_and_stay_so(each):
    folder, _ = each
    for which in LAYERS[:2]:
        network = model.load(make_config(folder, "nf4", "bf16", memory=layers(which)), "cpu")
        own, flat = lora_layers.adapters(network), network.adapter_memory.flat
        randomise(network)
        assert flat.is_leaf and flat.dtype == torch.float32 and flat.numel() == sum(p.numel() for p in own.values())

        def check():
            places = set()
            for parameter in own.values():
                for part, whole in ((parameter, flat), (parameter.grad, flat.grad)):
                    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                    assert part.is_contiguous() and part.data_ptr() % part.dtype.itemsize == 0
                assert parameter.storage_offset() == parameter.grad.storage_offset()
                places |= set(range(parameter.storage_offset(), parameter.storage_offset() + parameter.numel()))
            assert places == set(range(flat.numel()))  # every element once

        check()
        for _ in range(2):
            model.summed_loss(network, packed(DOCUMENTS, SUPERVISED))[0].backward()
            check()
        assert all(parameter.grad.abs().max() > 0 for parameter in own.values())
        once = flat.grad.clone()
        flat.grad.zero_()
        assert all(parameter.grad.abs().max() == 0 for parameter in own.values())
        model.summed_loss(network, packed(DOCUMENTS, SUPERVISED))[0].backward()
        assert torch.allclose(2 * flat.grad, once, rtol=1e-5)  # gradients add up over micro-batches
        before = model.summed_loss(network, packed(DOCUMENTS, SUPERVISED))[0].item()
        torch.optim.SGD([flat], lr=1e-3).step()  # the optimizer sees one tensor; the network sees what it did
        check()
        assert model.summed_loss(network, packed(DOCUMENTS, SUPERVISED))[0].item() < before


# --------------------------------------------------------------------------------------- every kind in every dtype, alive

ALIVE = ([(kind, dtype) for kind in ("nf4", "int8") for dtype in ("bf16", "fp16", "fp32")] + [("llm_int8", "bf16"), ("llm_int8", "fp16")]
         + [("none", dtype) for dtype in ("bf16", "fp16", "fp32", "fp64")])


class Letters:
    """A tokenizer's decode, for evaluation.generate."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def written(network, prompts, length=12, end=(2,)):
    asked = [{"prompt": "", "reference": "", "ids": prompt} for prompt in prompts]
    return evaluation.generate(network, Letters(), asked, length, list(end))


@pytest.mark.parametrize("architecture, kind, dtype",
                         [(architecture, *alive) for architecture in ("llama", "gemma3_text") for alive in ALIVE]
                         + [(kind, "nf4", "bf16") for kind in ("mistral", "qwen2", "qwen3", "gemma2")])
def test_forward_backward_and_generation_work_and_are_finite(models, architecture, kind, dtype):
    folder, _ = models(architecture)
    network = model.load(make_config(folder, kind, dtype, lora={"dropout": 0.1}), "cpu")
    randomise(network)
    loss, gradients = our_gradients(network, [packed(DOCUMENTS, SUPERVISED)])
    assert math.isfinite(loss) and 0 < loss / sum(int(m[1:].sum()) for m in SUPERVISED) < 3 * math.log(320)
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients.values())
    before = [parameter.clone() for parameter in lora_layers.adapters(network).values()]
    state = torch.get_rng_state()
    samples = written(network, [[1, 5, 9], [1, 7, 7, 7, 4, 8, 9, 10, 11, 12, 13]])
    assert torch.equal(torch.get_rng_state(), state) and network.training  # sampling greedily is no part of the run's randomness
    assert all(1 <= sample["tokens"] <= 12 for sample in samples)
    after = our_gradients(network, [packed(DOCUMENTS, SUPERVISED)])
    assert math.isfinite(after[0]) and all(torch.equal(a, b) for a, b in zip(before, lora_layers.adapters(network).values()))


@pytest.mark.parametrize("kind, dtype", [("llm_int8", "fp32"), ("nf4", "fp64"), ("int8", "fp64")])
def test_kinds_that_do_not_go_with_a_dtype_are_refused_before_anything_loads(tmp_path, kind, dtype):
    with pytest.raises(ValueError, match="compute_dtype"):
        make_config(tmp_path, kind, dtype)


@pytest.mark.parametrize("kind", SHAPES)
def test_generation_writes_what_transformers_writes_for_each_prompt_alone(models, kind):
    folder, network = models(kind)
    peft = with_peft(network).eval()
    prompts = [[5], [9, 4, 30], [1, 7, 7, 7, 4, 8, 9, 10, 11, 12, 13, 14]]  # the last is longer than the windows
    for which in LAYERS[:2]:
        ours = model.load(make_config(folder, memory=layers(which)), "cpu")
        randomise(ours, peft, scale=0.2)
        for prompt, sample in zip(prompts, written(ours, prompts)):
            theirs = peft.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                   do_sample=False, max_new_tokens=12, eos_token_id=2, pad_token_id=0)[0, len(prompt):].tolist()
            stop = theirs.index(2) if 2 in theirs else None
            assert sample["text"] == Letters().decode(theirs[:stop]) and sample["stopped"] == (stop is not None)


def test_generation_does_not_disturb_training(each):
    folder, _ = each
    for which in LAYERS[:2]:
        network = model.load(make_config(folder, "nf4", "bf16", memory=layers(which)), "cpu")
        randomise(network)
        before = our_gradients(network, [packed(DOCUMENTS, SUPERVISED)])
        written(network, [[5], [9, 4, 30]])
        after = our_gradients(network, [packed(DOCUMENTS, SUPERVISED)])
        assert before[0] == after[0] and all(torch.equal(before[1][name], after[1][name]) for name in before[1])
