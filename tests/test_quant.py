"""Frozen weights: each kind of storage against its formula written out in float64, and against bitsandbytes' own layers.

The formulas here are this file's own (codes unpacked by hand, scales multiplied in float64), so that a mistake in quant.py or in
one of bitsandbytes' kernels cannot agree with itself.
"""
import os
import platform
import subprocess
import sys
import types

import pytest
import torch
from conftest import PROJECT, make_model

import config
import quant

WHOLE_BLOCKS = [64, 128, 576]  # input widths that are whole NF4 blocks
BROKEN_BLOCKS = [16, 48, 80, 208, 20, 33]  # those that are not: blocks run across rows; AVX-512 code of bitsandbytes is wrong for some of them


def settings(kind, double_quant=True, threshold=6.0):
    return types.SimpleNamespace(quant=kind, double_quant=double_quant, llm_int8_threshold=threshold)


def gaussian(out_features, in_features, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (0.05 * torch.randn(out_features, in_features, generator=generator)).to(dtype)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ------------------------------------------------------------------------------------------------------------------ NF4

def normal_quantiles():
    """NF4's 16 values from their definition (Dettmers et al. 2023, section 3): quantiles of N(0, 1), eight below 0, 0, seven above,
    scaled to [-1, 1]."""
    edge = 0.9677083
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((above, below, torch.zeros(1, dtype=torch.float64))).sort().values
    return values / values.max()


def nf4_formula(weight):
    """The matrix that an NF4Weight stands for, float64: unpacked a byte at a time, scales with their own second quantisation."""
    codes = torch.tensor([half for byte in weight.packed.reshape(-1).tolist() for half in (byte >> 4, byte & 15)])
    if weight.double_quant:
        of_code = weight.scale_codebook.double()[weight.scale_codes.long()]
        scales = of_code * weight.scale_scales.double().repeat_interleave(256)[:len(of_code)] + weight.scale_offset.double()
    else:
        scales = weight.scales.double()
    count = weight.out_features * weight.in_features
    return (normal_quantiles()[codes][:count] * scales.repeat_interleave(64)[:count]).reshape(weight.out_features, weight.in_features)


def test_nf4s_sixteen_values_are_quantiles_of_the_normal_distribution():
    assert quant.nf4_codebook().dtype == torch.float32
    assert (quant.nf4_codebook().double() - normal_quantiles()).abs().max() < 2e-7


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("width", WHOLE_BLOCKS + BROKEN_BLOCKS)
def test_nf4_dequantises_to_its_formula_at_every_width(width, double_quant):
    weight = quant.quantize(gaussian(24, width), settings("nf4", double_quant), torch.float32)
    expected = nf4_formula(weight)
    assert relative(weight.dequantize(torch.float32), expected) < 1e-6
    assert relative(quant.nf4_dequantize(weight.packed, weight.block_scales(), (24, width)), expected) < 1e-6
    for dtype, step in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        got = weight.dequantize(dtype)
        assert got.dtype == dtype and got.shape == (24, width)
        assert ((got.double() - expected).abs() <= 1.01 * step * expected.abs() + 1e-7).all()  # rounded once, to nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WHOLE_BLOCKS + BROKEN_BLOCKS)
def test_nf4_picks_the_nearest_code_so_that_its_error_on_gaussian_weights_is_nine_percent(width, dtype):
    original = gaussian(64, width, dtype=dtype)
    weight = quant.quantize(original, settings("nf4", double_quant=False), dtype)
    flat = original.double().reshape(-1)
    scales = torch.stack([block.abs().max() for block in flat.split(64)])
    assert torch.equal(weight.scales.double(), scales)
    scaled = flat / scales.repeat_interleave(64)[:len(flat)]
    best = (scaled[:, None] - normal_quantiles()).abs().min(dim=1).values
    taken = (scaled - nf4_formula(weight).reshape(-1) / scales.repeat_interleave(64)[:len(flat)]).abs()
    assert (taken - best).max() < 1e-6
    assert 0.07 < relative(weight.dequantize(torch.float32), original) < 0.11


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_storage_is_bitsandbytes_own_byte_for_byte(double_quant):
    import bitsandbytes.functional as bnb
    original = gaussian(96, 576, dtype=torch.bfloat16)
    weight = quant.quantize(original, settings("nf4", double_quant), torch.bfloat16)
    packed, state = bnb.quantize_4bit(original, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    assert torch.equal(weight.packed, packed)
    if double_quant:
        assert torch.equal(weight.scale_codes, state.absmax) and torch.equal(weight.scale_scales, state.state2.absmax)
        assert torch.equal(weight.scale_codebook, state.state2.code) and torch.equal(weight.scale_offset, state.offset)
    else:
        assert torch.equal(weight.scales, state.absmax)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = dtype
        assert torch.equal(weight.dequantize(dtype), bnb.dequantize_4bit(packed, state))


def test_nf4_takes_four_and_a_half_bits_a_weight_and_double_quantisation_saves_0_37_of_them():
    def bits(double_quant):
        weight = quant.quantize(gaussian(1024, 1024), settings("nf4", double_quant), torch.float32)
        return 8 * sum(p.numel() * p.dtype.itemsize for name, p in weight.named_parameters() if name != "scale_codebook") / 1024**2
    assert bits(False) == 4.5
    assert 0.37 < bits(False) - bits(True) < 0.375


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_of_a_weight_of_zeros_is_zeros(double_quant):
    weight = torch.cat((torch.zeros(32, 64), gaussian(32, 64)))
    frozen = quant.quantize(weight, settings("nf4", double_quant), torch.float32)
    assert torch.isfinite(frozen.dequantize(torch.float32)).all()
    assert frozen.dequantize(torch.float32)[:32].abs().max() == 0


# ----------------------------------------------------------------------------------------------------------------- int8

def test_int8_is_round_of_w_over_the_rows_scale_and_its_error_is_half_a_step_at_most():
    original = gaussian(40, 72)
    original[7] = 0
    original[8] *= 1e-3
    weight = quant.quantize(original, settings("int8"), torch.float32)
    scale = original.double().abs().amax(dim=1) / 127
    assert torch.allclose(weight.scale.double(), scale, rtol=1e-6, atol=0)
    assert weight.q.dtype == torch.int8 and weight.q.int().abs().max() == 127
    assert torch.equal(weight.dequantize(torch.float32)[7], torch.zeros(72))
    assert relative(weight.dequantize(torch.float32), weight.q.double() * scale[:, None]) < 1e-6
    assert ((weight.dequantize(torch.float32).double() - original.double()).abs() <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_in_16_bits_stays_within_that_types_rounding_of_its_formula(dtype):
    weight = quant.quantize(gaussian(40, 72), settings("int8"), dtype)
    expected = weight.q.double() * weight.scale.double()[:, None]
    got = weight.dequantize(dtype)
    assert got.dtype == dtype
    assert ((got.double() - expected).abs() <= 1.05 * torch.finfo(dtype).eps * expected.abs() + 1e-8).all()


# ----------------------------------------------------------------------------------------------------------- LLM.int8()

def activations(shape, dtype, outliers):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).clamp(-4, 4).to(dtype)
    for column in outliers:
        x[..., 2, column] = 20.0  # one token's value is enough to keep the column in 16 bits
    return x


def bitsandbytes_linear8(original, threshold=6.0):
    """bitsandbytes' layer with these weights. eval(): on a CPU its training mode multiplies by the dequantised weight instead."""
    import bitsandbytes as bnb
    layer = bnb.nn.Linear8bitLt(original.shape[1], original.shape[0], bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = bnb.nn.Int8Params(original.clone(), has_fp16_weights=False, requires_grad=False)
    return layer.to("cpu").eval()


@pytest.mark.parametrize("outliers", [[], [5], [0, 17, 63]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(9, 64), (1, 9, 64)])
def test_llm_int8_forward_is_bitsandbytes_own_bit_for_bit(shape, dtype, outliers):
    original = gaussian(48, 64, dtype=dtype)
    x = activations(shape, dtype, outliers)
    weight = quant.quantize(original, settings("llm_int8"), dtype)
    before, version = x.clone(), x._version
    got = weight.matmul(x)
    assert x._version == version, "autograd lets nobody write to what another layer's backward pass needs"
    with torch.no_grad():
        expected = bitsandbytes_linear8(original)(x.clone())
    assert got.dtype == dtype and got.shape == (*shape[:-1], 48)
    assert torch.equal(got, expected)
    assert torch.equal(x, before), "the activations were overwritten while outliers were taken out"


@pytest.mark.parametrize("outliers", [[], [0, 17]])
def test_llm_int8_forward_is_the_papers_formula(outliers):
    """Dettmers et al. 2022, equation 8: outlier columns in 16 bits plus row-wise int8 for the rest."""
    original = gaussian(48, 64, dtype=torch.bfloat16)
    x = activations((9, 64), torch.bfloat16, outliers)
    weight = quant.quantize(original, settings("llm_int8"), torch.bfloat16)
    w, x64 = original.double(), x.double()
    w_scale = w.abs().amax(dim=1, keepdim=True) / 127
    w_codes = (w / w_scale).round()
    regular = x64.clone()
    regular[:, outliers] = 0
    x_scale = regular.abs().amax(dim=1, keepdim=True) / 127
    x_codes = (regular / x_scale).round()
    expected = (x_codes @ w_codes.T) * x_scale * w_scale.T + x64[:, outliers] @ (w_codes * w_scale)[:, outliers].T
    assert relative(weight.matmul(x), expected) < 4e-3  # bf16 results: half a step is 2^-9
    if outliers:  # and the outliers matter: rounding them with the rest would be worse by half again
        rounded = quant.quantize(original, settings("llm_int8", threshold=1e4), torch.bfloat16).matmul(x)
        assert relative(rounded, x64 @ w.T) > 1.5 * relative(weight.matmul(x), x64 @ w.T)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("outliers", [[], [5], [0, 17, 63]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_llm_int8_with_columns_masked_is_llm_int8_with_columns_gathered(dtype, outliers, wide):
    """Small products on a GPU do not ask it which columns are outliers. The int8 parts are the same to the bit, the sums but for rounding."""
    weight = quant.quantize(gaussian(48, 64, dtype=dtype), settings("llm_int8"), dtype)
    x, out_dtype = activations((9, 64), dtype, outliers), torch.float32 if wide else dtype
    x[4] = 0
    before, gathered, masked = x.clone(), weight.gathered(x, out_dtype), weight.masked(x, out_dtype)
    assert masked.dtype == out_dtype and torch.equal(x, before) and not masked[4].any()
    if not outliers:
        assert torch.equal(masked, gathered)
    assert relative(masked, gathered) < torch.finfo(dtype).eps
    wrong = weight.masked(x.masked_fill(x.abs() >= 6, 0), out_dtype)
    assert not outliers or relative(wrong, gathered) > 0.1, "the outliers of this test are too small to matter"


def test_whether_llm_int8_waits_is_decided_by_size_and_only_on_a_gpu(monkeypatch):
    weight = quant.quantize(gaussian(48, 64, dtype=torch.bfloat16), settings("llm_int8"), torch.bfloat16)
    assert weight.waits(1)
    monkeypatch.setattr(quant.LLMInt8Weight, "device", torch.device("cuda"))
    most = quant.MASKED // (48 * 64)
    assert not weight.waits(most) and weight.waits(most + 1)


def test_llm_int8_threshold_decides_which_columns_stay_in_16_bits():
    original = gaussian(48, 64, dtype=torch.float16)
    x = activations((9, 64), torch.float16, [5])
    results = {threshold: quant.quantize(original, settings("llm_int8", threshold=threshold), torch.float16).matmul(x)
               for threshold in (6.0, 19.0, 21.0)}
    assert torch.equal(results[6.0], results[19.0]) and not torch.equal(results[6.0], results[21.0])
    with torch.no_grad():
        assert torch.equal(results[21.0], bitsandbytes_linear8(original, threshold=21.0)(x))


# ----------------------------------------------------------------------------------------------------- every kind alike

KINDS = [("nf4", True), ("nf4", False), ("int8", True), ("llm_int8", True), ("none", True)]


@pytest.mark.parametrize("kind, double_quant", KINDS)
def test_storage_is_made_of_parameters_without_gradient(kind, double_quant):
    weight = quant.quantize(gaussian(32, 64, dtype=torch.bfloat16), settings(kind, double_quant), torch.bfloat16)
    assert list(weight.parameters()) and not any(p.requires_grad for p in weight.parameters())
    assert (weight.out_features, weight.in_features) == (32, 64)


@pytest.mark.parametrize("kind, double_quant", KINDS)
def test_a_kept_copy_changes_no_bit_of_the_arithmetic(kind, double_quant):
    weight = quant.quantize(gaussian(32, 64, dtype=torch.bfloat16), settings(kind, double_quant), torch.bfloat16)
    x = activations((9, 64), torch.bfloat16, [3])
    product, matrix = weight.matmul(x), weight.dequantize(torch.bfloat16)
    weight.keep(torch.bfloat16)
    assert torch.equal(weight.matmul(x), product) and torch.equal(weight.dequantize(torch.bfloat16), matrix)
    assert weight.dequantize(torch.float32).dtype == torch.float32  # another dtype than the kept one is computed afresh


@pytest.mark.parametrize("kind, double_quant", [k for k in KINDS if k[0] != "llm_int8"])
@pytest.mark.parametrize("shape", [(64,), (9, 64), (2, 3, 64)])
def test_matmul_is_x_times_the_dequantised_weight_for_any_leading_shape(kind, double_quant, shape):
    weight = quant.quantize(gaussian(32, 64), settings(kind, double_quant), torch.float32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    got = weight.matmul(x)
    assert got.shape == (*shape[:-1], 32)
    assert relative(got, x.double() @ weight.dequantize(torch.float32).double().T) < 1e-6


def test_without_quantisation_the_weight_is_the_weight():
    original = gaussian(8, 16, dtype=torch.bfloat16)
    assert torch.equal(quant.quantize(original, settings("none"), torch.float64).dequantize(torch.float64), original.double())


# ---------------------------------------------------------------------------------------------------------- fingerprint

def named():
    return [("a", gaussian(5, 7, dtype=torch.bfloat16)), ("b", torch.arange(-40, 41, dtype=torch.int8)), ("c", gaussian(3, 3))]


def test_a_fingerprint_is_the_same_for_equal_tensors_whatever_their_strides():
    copies = [(name, tensor.T.contiguous().T.clone(memory_format=torch.contiguous_format)) if tensor.ndim == 2
              else (name, tensor.clone()) for name, tensor in named()]
    transposed = [(name, tensor.T.contiguous().T if tensor.ndim == 2 else tensor) for name, tensor in named()]
    assert quant.fingerprint(named()) == quant.fingerprint(copies) == quant.fingerprint(transposed)


def test_a_fingerprint_changes_with_any_bit_of_any_byte():
    original = quant.fingerprint(named())
    for index, (_, tensor) in enumerate(named()):
        for byte in range(tensor.numel() * tensor.dtype.itemsize):
            for bit in range(8):
                changed = named()
                changed[index][1].view(-1).view(torch.uint8)[byte] ^= 1 << bit
                assert quant.fingerprint(changed) != original, f"bit {bit} of byte {byte} of tensor {index}"


def test_a_fingerprint_changes_when_two_weights_change_their_sign():
    tensor = gaussian(4, 16)
    changed = tensor.clone()
    changed[1, 3] *= -1
    changed[2, 7] *= -1
    assert quant.fingerprint([("w", tensor)]) != quant.fingerprint([("w", changed)])


def test_a_fingerprint_changes_with_names_order_dtype_and_shape():
    base, flat = named(), named()[1][1]
    variants = [base, base[::-1], base[:2], [("A", base[0][1]), *base[1:]], [("b", base[0][1]), ("a", base[1][1]), base[2]],
                [base[0], ("b", flat.view(torch.uint8)), base[2]], [base[0], ("b", flat.view(9, 9)), base[2]]]
    assert len({quant.fingerprint(variant) for variant in variants}) == len(variants)


def test_a_fingerprint_changes_when_values_or_rows_change_places():
    tensor = gaussian(16, 16)
    variants = {quant.fingerprint([("w", tensor)])}
    for i in range(16):
        for j in range(i):
            order = list(range(16))
            order[i], order[j] = j, i
            variants |= {quant.fingerprint([("w", tensor[order])]), quant.fingerprint([("w", tensor[:, order])])}
    assert len(variants) == 1 + 2 * 120
    assert quant.fingerprint([("w", tensor.T)]) not in variants


# ------------------------------------------------------------------------------------------------------- compute dtype

@pytest.mark.parametrize("device, kind, has, name", [
    ("cpu", "nf4", True, "bf16"), ("cpu", "nf4", False, "fp32"), ("cpu", "llm_int8", False, "bf16"),
    ("cuda", "nf4", True, "bf16"), ("cuda", "nf4", False, "fp16")])
def test_auto_computes_in_bf16_only_where_the_device_has_it(monkeypatch, device, kind, has, name):
    monkeypatch.setattr(quant, "has_bf16", lambda device: has)
    asked = config.from_dict({"model": {"quant": kind}})
    assert config.settled(asked, quant.dtype_for(asked.model, device)).model.compute_dtype == name
    asked = config.from_dict({"model": {"quant": kind, "compute_dtype": "fp32" if kind == "nf4" else "fp16"}})
    assert config.settled(asked, quant.dtype_for(asked.model, device)) is asked


@pytest.mark.parametrize("machine, emulated, own, has", [("x86_64", True, True, True), ("x86_64", True, False, False),
                                                         ("aarch64", True, False, True), ("x86_64", False, True, False)])
def test_avx_512_without_bf16_counts_as_a_processor_without_it(monkeypatch, machine, emulated, own, has):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: emulated)  # true of any AVX-512
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: own)
    assert quant.has_bf16.__wrapped__("cpu") == has


@pytest.mark.parametrize("code", [
    "assert not quant.has_bf16('cpu')",
    "import model; network = model.load(config.from_dict({'model': {'path': sys.argv[1]}}), 'cpu'); assert network.dtype == torch.float32",
    "import model; network = model.load(config.from_dict({'model': {'path': sys.argv[1], 'compute_dtype': 'bf16'}}), 'cpu')",
    "import model; network = model.load(config.from_dict({'model': {'path': sys.argv[1], 'quant': 'llm_int8'}}), 'cpu')"])
def test_a_processor_with_avx2_alone_computes_in_fp32_and_says_what_bf16_would_cost(tmp_path, code):
    if platform.machine() != "x86_64":
        pytest.skip("oneDNN can be held to fewer instructions on x86-64")
    make_model(tmp_path)
    program = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); import torch, config, quant; {code}"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    emulated = "'bf16'" in code or "llm_int8" in code
    told = " ".join(done.stderr.split())
    assert ("emulates it" in told) == emulated
    assert ("--model.quant=int8" in told, "--model.compute_dtype=fp32" in told) == ("llm_int8" in code, "'bf16'" in code)
