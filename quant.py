"""How a frozen weight is stored and used in 4, 8 or 16 bits.

    NF4Weight       bitsandbytes' NF4, block 64, optionally with quantised block scales (Dettmers et al. 2023, section 3)
    Int8Weight      int8 weights, one fp32 scale a row; activations stay in 16 bits
    LLMInt8Weight   LLM.int8(): int8 product, outlier columns in 16 bits (Dettmers et al. 2022, section 3)
    PlainWeight     no quantisation

Each keeps its storage as plain parameters without gradient, so that it can be moved, hashed and sharded, and knows two things:
`dequantize` (the weight as a matrix) and `matmul` (x W^T as this kind computes it). Gradients are model.py's business.
Leaves out: fp4, other block sizes, quantised optimizers. Of bitsandbytes it calls the quantise and dequantise operators only;
its Linear4bit loses gradients after an evaluation on some CPUs.
"""
import contextlib
import functools
import os
import platform

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import config as settings
import gpu_kernels

NF4_BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # block scales that share a scale, with double quantisation
MASKED = 1 << 34  # multiplications in 16 bits, some 50 us on an H100: what waiting for the GPU costs at least
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def dtype_for(model_config, device):
    """The name of the compute dtype that suits a torch device: bf16 where it computes in that, else fp16 on a GPU and fp32 on a CPU (but
    for llm_int8, which needs 16 bits)."""
    if has_bf16(device):
        return "bf16"
    return "fp16" if torch.device(device).type == "cuda" else "bf16" if model_config.quant == "llm_int8" else "fp32"


def settled(config, device):
    """`config` with a compute dtype that suits a torch device in place of "auto"."""
    return settings.settled(config, dtype_for(config.model, device))


@functools.cache
def has_bf16(device):
    """Whether a torch device multiplies matrices in bf16 by instructions of its own. A CPU without them takes 26 times as long as in fp32
    where it has AVX2, and as long as in fp32 where it has AVX-512 (docs/PERFORMANCE.md)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x86 = platform.machine().lower() in ("x86_64", "amd64")  # where the answer above is yes for any AVX-512
    return not x86 or torch.cpu._is_avx512_bf16_supported()


@functools.cache
def bitsandbytes():
    """The module bitsandbytes.functional, and torch.ops.bitsandbytes with it.

    On import it gives functions of its own to torch.compile, which loads 560 modules of a compiler that nothing here runs. Told so by
    torch's own switch, torch.compile hands them back as they are.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import bitsandbytes.functional as functional
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before
    return functional


class FrozenWeight(nn.Module):
    """A weight (out_features, in_features) that is never trained."""

    def __init__(self, shape):
        super().__init__()
        self.out_features, self.in_features = shape
        self.kept = None  # a dequantised copy, where memory allows one
        self.gather = None  # of sharded weights: a context manager in which the storage is whole

    def whole(self):
        """A context in which the storage can be read: it may be split over several ranks, all of which must come here."""
        return self.gather() if self.gather and isinstance(next(self.parameters()), DTensor) else contextlib.nullcontext()

    def store(self, **tensors):
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor.detach(), requires_grad=False))

    @property
    def device(self):
        return next(self.parameters()).device

    def keep(self, dtype):
        """Keep a dequantised copy (out, in) in `dtype`: later calls skip the dequantisation, the arithmetic stays the same."""
        self.kept = self.dequantize(dtype)

    def share(self, kept):
        """Take `kept`, equal to the copy kept so far, in its place: a part of a larger tensor."""
        self.kept = kept

    def dequantize(self, dtype, out=None):
        """The weight as (out_features, in_features) in `dtype`: the kept copy (not to be written to), or computed, into `out` where
        given."""
        if self.kept is not None and self.kept.dtype == dtype:
            return self.kept if out is None else out.copy_(self.kept)
        if out is None:
            out = torch.empty(self.out_features, self.in_features, device=self.device, dtype=dtype)
        with self.whole():
            self._dequantize(out)
        return out

    def matmul(self, x, dtype=None):
        """x W^T: (..., in_features) -> (..., out_features), in x's dtype or in a wider `dtype`: then sums are not rounded to 16 bits."""
        return product(x, self.dequantize(x.dtype).T, dtype or x.dtype)


def product(a, b, dtype):
    """a (..., n) b (n, m) in `dtype`: that of both, or a wider one, in which the products are summed and kept."""
    if dtype == a.dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a.reshape(-1, a.shape[-1]), b, out_dtype=dtype).view(*a.shape[:-1], -1)
    return a.to(dtype) @ b.to(dtype)


def add_product(total, a, b, alpha=1.0):
    """total += alpha a b, for a (t, n) b (n, m) of total's dtype or of a narrower one: their products are summed in total's."""
    if total.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=alpha, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), alpha=alpha)


class PlainWeight(FrozenWeight):
    def __init__(self, weight):
        super().__init__(weight.shape)
        self.store(plain=weight)

    def _dequantize(self, out):
        out.copy_(self.plain)

    def keep(self, dtype):
        self.kept = self.plain.data

    def share(self, kept):
        self.kept = self.plain.data = kept


def quantised(network):
    """The frozen weights in a network that are kept in fewer bits than they are used in."""
    return [module for module in network.modules() if isinstance(module, FrozenWeight) and not isinstance(module, PlainWeight)]


def pieces(rows, size=256):
    """Slices over `rows` rows, a few at a time: an fp32 copy of a whole weight would be the largest thing in memory."""
    return [slice(start, start + size) for start in range(0, rows, size)]


class Int8Weight(FrozenWeight):
    """W = scale * q with q in [-127, 127] and scale = max|row| / 127. A row of zeros has scale 0."""

    def __init__(self, weight):
        super().__init__(weight.shape)
        scale = weight.abs().amax(dim=1).float() / 127
        divisor = scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        q = torch.empty(weight.shape, device=weight.device, dtype=torch.int8)
        for rows in pieces(self.out_features):
            q[rows] = torch.round(weight[rows].float() / divisor[rows]).to(torch.int8)
        self.store(q=q, scale=scale)  # (out, in) int8, (out,) fp32

    def _dequantize(self, out):
        if gpu_kernels.on_gpu(out):
            gpu_kernels.int8_dequantize(self.q, self.scale, out)
        else:
            for rows in pieces(self.out_features):
                out[rows] = self.q[rows] * self.scale[rows, None]


class LLMInt8Weight(FrozenWeight):
    """int8 weights (row-wise) times int8 activations (row-wise); activation columns beyond the threshold in 16 bits.

    Which columns are outliers is decided over all tokens of a micro-batch, so packed neighbours move each other by rounding.
    Gathering them waits for the GPU to say which they are; small products on a GPU take all columns instead, the others as zeros.
    """

    def __init__(self, weight, threshold):
        super().__init__(weight.shape)
        bitsandbytes()
        q, row_max, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight.half())
        self.store(q=q, row_max=row_max)  # (out, in) int8, (out,) fp32: W = q * row_max / 127
        self.threshold = threshold

    def _dequantize(self, out):
        scale = self.row_max / 127
        if gpu_kernels.on_gpu(out):
            gpu_kernels.int8_dequantize(self.q, scale, out)
        else:
            out.copy_(self.q.to(torch.float32) * scale[:, None])

    def waits(self, tokens):
        """Whether a product with so many tokens waits for the GPU: gathering columns is then less work than taking all."""
        return self.device.type != "cuda" or tokens * self.in_features * self.out_features > MASKED

    def matmul(self, x, dtype=None):
        x_td = x.reshape(-1, self.in_features)
        product_of = self.gathered if self.waits(len(x_td)) else self.masked
        return product_of(x_td, dtype or x.dtype).reshape(*x.shape[:-1], self.out_features)

    def gathered(self, x, dtype):
        """(t, in) -> (t, out) in `dtype`, as bitsandbytes does it."""
        # the operator takes outliers out of what it is given and puts them back, which autograd forbids in x
        half = x.to(torch.float16, copy=True)
        codes, row_max, outliers = torch.ops.bitsandbytes.int8_vectorwise_quant(half, threshold=self.threshold)
        return torch.ops.bitsandbytes.int8_mixed_scaled_mm(x.to(dtype), codes, self.q, row_max, self.row_max, outliers)[0]

    def masked(self, x, dtype):
        """The same without waiting: outlier columns are zeros in the int8 product, all others zeros in the product in x's dtype."""
        half = x.to(torch.float16)
        outliers = half.abs() >= self.threshold
        columns = outliers.any(dim=0)
        codes, row_max, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(half.masked_fill(outliers, 0))
        y = torch.ops.bitsandbytes.int8_scaled_mm(codes.masked_fill_(columns, 0), self.q, row_max, self.row_max, dtype=dtype)
        add_product(y, x.masked_fill(~columns, 0), self.dequantize(x.dtype).T)
        return y


class NF4Weight(FrozenWeight):
    """4-bit NormalFloat codes, two a byte, with one scale (largest magnitude) for each 64 consecutive weights.

    With double quantisation the scales, less their mean, are 8-bit codes with one scale for each 256 of them.
    """

    def __init__(self, weight, double_quant):
        super().__init__(weight.shape)
        bnb = bitsandbytes()
        packed, scales = torch.ops.bitsandbytes.quantize_4bit(weight.contiguous(), NF4_BLOCK, "nf4", torch.uint8)
        self.store(packed=packed)  # uint8 (out * in / 2, 1)
        self.double_quant = double_quant
        if double_quant:
            codebook = bnb.create_dynamic_map().to(weight.device)
            offset = scales.mean()
            codes, code_scales = torch.ops.bitsandbytes.quantize_blockwise(scales - offset, codebook, SCALE_BLOCK)
            self.store(scale_codes=codes, scale_codebook=codebook, scale_scales=code_scales, scale_offset=offset)
        else:
            self.store(scales=scales)  # fp32 (out * in / 64,)

    def block_scales(self):
        """The scales of the blocks, fp32 (out * in / 64,)."""
        if not self.double_quant:
            return self.scales
        operator = torch.ops.bitsandbytes.dequantize_blockwise
        return operator(self.scale_codes, self.scale_scales, self.scale_codebook, SCALE_BLOCK, torch.float32) + self.scale_offset

    def _dequantize(self, out):
        if self.in_features % NF4_BLOCK == 0 and gpu_kernels.on_gpu(out):
            gpu_kernels.nf4_dequantize(self, nf4_codebook(out.device), out)
        elif self.in_features % NF4_BLOCK and out.device.type == "cpu":
            # bitsandbytes' AVX-512 code returns wrong values for rows that are not whole blocks
            out.copy_(nf4_dequantize(self.packed, self.block_scales(), (self.out_features, self.in_features)))
        else:
            shape = self.out_features, self.in_features
            out.copy_(torch.ops.bitsandbytes.dequantize_4bit(self.packed, self.block_scales(), NF4_BLOCK, "nf4", shape, out.dtype))


@functools.cache
def nf4_codebook(device=torch.device("cpu")):
    """The 16 values of NF4, fp32 (16,): Dettmers et al. 2023, appendix E. Code 0 is -1, code 7 is 0, code 15 is 1."""
    return bitsandbytes().get_4bit_type("nf4", device=device)


def nf4_dequantize(packed, scales, shape):
    """NF4 by its formula alone, in plain torch: value = codebook[code] * scale of its block; the high half of a byte comes first.

    packed: uint8 (n/2, 1); scales: fp32 (n/64,); returns fp32 of `shape` (n elements, any width).
    """
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1)
    values = nf4_codebook(packed.device)[codes.long()]
    blocks = torch.arange(len(codes), device=packed.device) // NF4_BLOCK
    return (values * scales[blocks])[:shape.numel() if hasattr(shape, "numel") else shape[0] * shape[1]].reshape(shape)


def quantize(weight, model_config, compute_dtype):
    """A FrozenWeight of the kind that model_config.quant names, from a weight (out, in) in 16 or 32 bits on its final device."""
    kind = model_config.quant
    if kind == "none":
        return PlainWeight(weight.to(compute_dtype))
    if kind == "int8":
        return Int8Weight(weight)
    if kind == "llm_int8":
        return LLMInt8Weight(weight, model_config.llm_int8_threshold)
    return NF4Weight(weight, model_config.double_quant)


def fingerprint(tensors):
    """A hexadecimal digest of (name, tensor) pairs: names, dtypes, shapes and every byte, computed where the tensors lie.

    Each tensor's 32-bit words are summed with odd, position-dependent 64-bit weights modulo 2^64: it tells changed weights from equal
    ones, and is no defence against somebody who wants to fool it.
    """
    import hashlib
    digest = hashlib.sha256()
    for name, tensor in tensors:
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        words = nn.functional.pad(data, (0, -len(data) % 4)).view(torch.int32)
        total = torch.zeros((), dtype=torch.int64, device=data.device)
        for start in range(0, len(words), 1 << 24):
            part = words[start:start + (1 << 24)]
            places = torch.arange(start, start + len(part), device=data.device, dtype=torch.int64)
            total += (part * (places * 0x5851F42D4C957F2D | 1)).sum()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total.item()}\n".encode())
    return digest.hexdigest()
