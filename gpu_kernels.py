"""GPU kernels that a profile proved worth it, each with its slow twin in plain torch as oracle.

Every public function here chooses: the Triton kernel on a GPU, the twin elsewhere. The twins are the definition; tests hold the
two together. (With TRITON_INTERPRET=1 in the environment Triton itself runs the kernels on a CPU, for tests.)
Leaves out: matrix products and attention, which cuBLAS and torch's own kernels do.
"""
import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def on_gpu(tensor):
    """Whether Triton kernels serve for this tensor."""
    return triton is not None and (tensor.is_cuda or INTERPRET)


# ------------------------------------------------------------------------------------------------- the slow twins

def rms_norm_twin(x, weight, eps):
    """(T, D) -> ((T, D) x / rms(x) * weight, fp32 (T,) 1 / rms): Zhang and Sennrich 2019, eq. 4, rounded as transformers' Llama does."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return weight * (wide * rstd[:, None]).to(x.dtype), rstd


def rms_norm_backward_twin(grad, x, weight, rstd, grad_residual):
    """d loss / d x (T, D) of rms_norm for a frozen weight, plus the gradient that reached x along the residual path."""
    wide = rstd.dtype
    g, x_hat = (grad * weight).to(wide), x.to(wide) * rstd[:, None]
    g.addcmul_(x_hat, (g * x_hat).mean(-1, keepdim=True), value=-1)
    return g.mul_(rstd[:, None]).add_(grad_residual).to(x.dtype)


def rotate_twin(heads, cos, sin):
    """Rotary embedding of (T, H, d) by cos, sin (T, d/2), halves as in Llama's code: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = heads.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(torch.promote_types(cos.dtype, heads.dtype)), sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(heads.dtype)


def norm_rotate_twin(heads, weight, eps, cos, sin):
    """rotate_twin of each head (T, H, d) over its own rms, times `weight` (d,): normed queries or keys, as in Qwen3."""
    return rotate_twin(rms_norm_twin(heads.reshape(-1, heads.shape[-1]), weight, eps)[0].view(heads.shape), cos, sin)


def norm_rotate_backward_twin(grad, heads, weight, eps, cos, sin):
    """d loss / d heads (T, H, d) for the gradient of norm_rotate's output and a frozen weight."""
    turned, x = rotate_twin(grad, cos, -sin).reshape(-1, grad.shape[-1]), heads.reshape(-1, heads.shape[-1])
    _, rstd = rms_norm_twin(x, weight, eps)
    return rms_norm_backward_twin(turned, x, weight, rstd, torch.zeros_like(x)).view(heads.shape)


def swiglu_twin(gate_up, out=None):
    """(T, 2I) -> (T, I): silu(gate) * up (Shazeer 2020, section 2), in `out`, where given."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.mul(torch.nn.functional.silu(gate), up, out=out)


def swiglu_backward_twin(grad, gate_up, out=None):
    """((T, 2I) d loss / d gate_up, (T, I) silu(gate) * up again) for the gradient (T, I) of swiglu's output; the first in `out`, where
    given."""
    out, width = torch.empty_like(gate_up) if out is None else out, grad.shape[1]
    gate, up = gate_up.chunk(2, dim=-1)
    silu = torch.nn.functional.silu(gate)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=out[:, :width])
    torch.mul(grad, silu, out=out[:, width:])
    return out, silu.mul_(up)


def swiglu_backward_sums_twin(grad, gate_up, low, d_low):
    """(d gate_up, (3, r, I)): the slow twin of swiglu_backward_sums."""
    r = d_low.shape[1]
    d_gate_up, act = swiglu_backward_twin(grad, gate_up)
    d_gate, d_up = d_gate_up.chunk(2, dim=1)
    return d_gate_up, torch.stack((low[:, :r].T @ d_gate, low[:, r:].T @ d_up, d_low.T @ act))


# ------------------------------------------------------------------------------------------------------- the kernels

if triton is not None:
    @triton.jit
    def _add_rms_norm(h, delta, total, weight, out, out_row, rstd, width, eps, ADD: tl.constexpr, WIDTH: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, WIDTH)
        inside = columns < width
        values = tl.load(h + row * width + columns, mask=inside, other=0)
        if ADD:
            values += tl.load(delta + row * width + columns, mask=inside, other=0)
            tl.store(total + row * width + columns, values, mask=inside)
        values = values.to(tl.float32)
        r = 1 / tl.sqrt(tl.sum(values * values) / width + eps)
        tl.store(rstd + row, r)
        normed = (values * r).to(out.dtype.element_ty)
        tl.store(out + row * out_row + columns, normed * tl.load(weight + columns, mask=inside, other=0), mask=inside)

    @triton.jit
    def _rms_norm_backward(grad, grad_row, x, weight, rstd, grad_residual, residual_row, out, out_row, width, WIDTH: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, WIDTH)
        inside = columns < width
        at = row * width + columns
        g = (tl.load(grad + row * grad_row + columns, mask=inside, other=0)
             * tl.load(weight + columns, mask=inside, other=0)).to(tl.float32)
        r = tl.load(rstd + row)
        x_hat = tl.load(x + at, mask=inside, other=0).to(tl.float32) * r
        dx = (r * (g - x_hat * (tl.sum(g * x_hat) / width))
              + tl.load(grad_residual + row * residual_row + columns, mask=inside, other=0).to(tl.float32))
        tl.store(out + row * out_row + columns, dx.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _rotate(source, source_row, source_head, target, target_row, target_head, cos, sin, weight, eps, heads,
                HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, SIGN: tl.constexpr, NORM: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, HEADS)[:, None]
        column = tl.arange(0, WIDTH)[None, :]
        inside = (head < heads) & (column < HALF)
        c = tl.load(cos + row * HALF + column, mask=column < HALF, other=0).to(tl.float32)
        s = SIGN * tl.load(sin + row * HALF + column, mask=column < HALF, other=0).to(tl.float32)
        first = source + row * source_row + head * source_head + column
        a = tl.load(first, mask=inside, other=0).to(tl.float32)
        b = tl.load(first + HALF, mask=inside, other=0).to(tl.float32)
        if NORM:
            r = 1 / tl.sqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
            kind = target.dtype.element_ty  # rounded where transformers rounds
            a = ((a * r).to(kind) * tl.load(weight + column, mask=column < HALF, other=0)).to(tl.float32)
            b = ((b * r).to(kind) * tl.load(weight + HALF + column, mask=column < HALF, other=0)).to(tl.float32)
        out = target + row * target_row + head * target_head + column
        tl.store(out, (a * c - b * s).to(target.dtype.element_ty), mask=inside)
        tl.store(out + HALF, (b * c + a * s).to(target.dtype.element_ty), mask=inside)

    @triton.jit
    def _norm_rotate_backward(grad, grad_row, grad_head, source, source_row, source_head, target, target_row, target_head, cos, sin,
                              weight, eps, heads, HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, HEADS)[:, None]
        column = tl.arange(0, WIDTH)[None, :]
        inside = (head < heads) & (column < HALF)
        c = tl.load(cos + row * HALF + column, mask=column < HALF, other=0).to(tl.float32)
        s = tl.load(sin + row * HALF + column, mask=column < HALF, other=0).to(tl.float32)
        arrived = grad + row * grad_row + head * grad_head + column
        ga = tl.load(arrived, mask=inside, other=0).to(tl.float32)
        gb = tl.load(arrived + HALF, mask=inside, other=0).to(tl.float32)
        wa = tl.load(weight + column, mask=column < HALF, other=0).to(tl.float32)
        wb = tl.load(weight + HALF + column, mask=column < HALF, other=0).to(tl.float32)
        ga, gb = (ga * c + gb * s) * wa, (gb * c - ga * s) * wb  # turned back, and through the weight
        first = source + row * source_row + head * source_head + column
        a = tl.load(first, mask=inside, other=0).to(tl.float32)
        b = tl.load(first + HALF, mask=inside, other=0).to(tl.float32)
        r = 1 / tl.sqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
        a, b = a * r, b * r
        along = ((tl.sum(ga * a, axis=1) + tl.sum(gb * b, axis=1)) / (2 * HALF))[:, None]
        out = target + row * target_row + head * target_head + column
        tl.store(out, (r * (ga - a * along)).to(target.dtype.element_ty), mask=inside)
        tl.store(out + HALF, (r * (gb - b * along)).to(target.dtype.element_ty), mask=inside)

    @triton.jit
    def _swiglu(gate_up, out, out_row, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0)
        tl.store(out + row * out_row + column, (gate * tl.sigmoid(gate)).to(out.dtype.element_ty) * up, mask=inside)

    @triton.jit
    def _swiglu_backward(grad, grad_row, gate_up, grad_gate_up, out_row, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(grad + row * grad_row + column, mask=inside, other=0).to(tl.float32)
        gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        kind = grad_gate_up.dtype.element_ty
        tl.store(grad_gate_up + row * out_row + column, (g * up * (sigmoid + silu * (1 - sigmoid))).to(kind), mask=inside)
        tl.store(grad_gate_up + row * out_row + width + column, (g * silu).to(kind), mask=inside)
        tl.store(grad + row * grad_row + column, (silu * up).to(kind), mask=inside)

    @triton.jit
    def _swiglu_backward_sums(grad, grad_row, gate_up, low, low_row, d_low, d_low_row, out, out_row, sums, tokens, width, part,
                              RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        there = column < width
        r = tl.arange(0, RANKS)
        real = r < RANK
        gate_sum = tl.zeros((RANKS, COLUMNS), tl.float32)
        up_sum = tl.zeros((RANKS, COLUMNS), tl.float32)
        down_sum = tl.zeros((RANKS, COLUMNS), tl.float32)
        kind = out.dtype.element_ty
        first = tl.program_id(1) * part
        for start in range(first, tl.minimum(first + part, tokens), ROWS):
            row = start + tl.arange(0, ROWS).to(tl.int64)
            inside = (row < tokens)[:, None] & there[None, :]
            narrow = real[:, None] & (row < tokens)[None, :]
            at = row[:, None] * (2 * width) + column[None, :]
            gate = tl.load(gate_up + at, mask=inside, other=0).to(tl.float32)
            up = tl.load(gate_up + at + width, mask=inside, other=0).to(tl.float32)
            g = tl.load(grad + row[:, None] * grad_row + column[None, :], mask=inside, other=0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            d_gate = (g * up * (sigmoid + silu * (1 - sigmoid))).to(kind)
            d_up = (g * silu).to(kind)
            target = out + row[:, None] * out_row + column[None, :]
            tl.store(target, d_gate, mask=inside)
            tl.store(target + width, d_up, mask=inside)
            low_gate = tl.load(low + row[None, :] * low_row + r[:, None], mask=narrow, other=0)  # (r, rows): transposed as it is read
            low_up = tl.load(low + row[None, :] * low_row + RANK + r[:, None], mask=narrow, other=0)
            low_down = tl.load(d_low + row[None, :] * d_low_row + r[:, None], mask=narrow, other=0)
            gate_sum += tl.dot(low_gate, d_gate, input_precision="ieee")
            up_sum += tl.dot(low_up, d_up, input_precision="ieee")
            down_sum += tl.dot(low_down, (silu * up).to(kind), input_precision="ieee")
        at = sums + tl.program_id(1) * 3 * RANK * width + r[:, None] * width + column[None, :]
        inside = real[:, None] & there[None, :]
        tl.store(at, gate_sum, mask=inside)
        tl.store(at + RANK * width, up_sum, mask=inside)
        tl.store(at + 2 * RANK * width, down_sum, mask=inside)

    @triton.jit
    def _nf4(packed, codebook, codes, code_scales, scale_codebook, offset, scales, out, out_row, width, total,
             NESTED: tl.constexpr, BLOCKS: tl.constexpr):
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # of 64 weights in 32 bytes
        real = block * 64 < total
        if NESTED:
            code = tl.load(codes + block, mask=real, other=0).to(tl.int32)
            scale = tl.load(scale_codebook + code) * tl.load(code_scales + block // 256, mask=real, other=0) + tl.load(offset)
        else:
            scale = tl.load(scales + block, mask=real, other=0)
        byte = tl.load(packed + block[:, None] * 32 + tl.arange(0, 32)[None, :], mask=real[:, None], other=0).to(tl.int32)
        high = tl.load(codebook + (byte >> 4)) * scale[:, None]
        low = tl.load(codebook + (byte & 15)) * scale[:, None]
        both = tl.interleave(high, low).to(out.dtype.element_ty)
        first = block * 64
        at = (first // width) * out_row + first % width
        tl.store(out + at[:, None] + tl.arange(0, 64)[None, :], both, mask=real[:, None])

    @triton.jit
    def _int8(q, scale, out, out_row, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        kind = out.dtype.element_ty
        tl.store(out + row * out_row + column, (tl.load(q + row * width + column, mask=inside, other=0).to(tl.float32)
                                                * tl.load(scale + row)).to(kind), mask=inside)

    @triton.jit
    def _cross_entropy(logits, row_stride, targets, nll, correct, softcap, width: tl.constexpr,
                       CAP: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        line = logits + row * row_stride
        target = tl.load(targets + row)
        largest, total, best, best_at = -float("inf"), 0.0, -float("inf"), 0
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(line + column, mask=column < width, other=-float("inf")).to(tl.float32)
            if CAP:
                z = tl.where(column < width, softcap * (2 * tl.sigmoid(2 * z / softcap) - 1), -float("inf"))
            top = tl.max(z)
            at = start + tl.argmax(z, 0)
            best_at = tl.where(top > best, at, best_at)
            best = tl.maximum(best, top)
            higher = tl.maximum(largest, top)
            total = total * tl.exp(largest - higher) + tl.sum(tl.exp(z - higher))
            largest = higher
        log_z = largest + tl.log(total)
        real = target >= 0
        chosen = tl.load(line + tl.maximum(target, 0)).to(tl.float32)
        if CAP:
            chosen = softcap * (2 * tl.sigmoid(2 * chosen / softcap) - 1)
        tl.store(nll + row, tl.where(real, log_z - chosen, 0.0))
        tl.store(correct + row, (best_at == target) & real)
        if GRAD:
            for start in range(0, width, BLOCK):
                column = start + tl.arange(0, BLOCK)
                z = tl.load(line + column, mask=column < width, other=-float("inf")).to(tl.float32)
                slope = 1.0
                if CAP:
                    tanh = 2 * tl.sigmoid(2 * z / softcap) - 1
                    z = softcap * tanh
                    slope = 1 - tanh * tanh
                d = (tl.exp(z - log_z) - tl.where(column == target, 1.0, 0.0)) * slope
                tl.store(line + column, tl.where(real, d, 0.0).to(logits.dtype.element_ty), mask=column < width)


# ------------------------------------------------------------------------------------- what the rest of the project calls

def add_rms_norm(h, delta, weight, eps, out):
    """Writes rms_norm(h + delta) to `out` and returns (h + delta, fp32 1 / rms); h, delta (T, D), delta None: nothing to add.

    See rms_norm_twin.
    """
    if not on_gpu(h):
        h = h if delta is None else h + delta
        x, rstd = rms_norm_twin(h, weight, eps)
        out.copy_(x)
        return h, rstd
    rstd, width = torch.empty(len(h), device=h.device, dtype=torch.float32), triton.next_power_of_2(h.shape[1])
    total = h if delta is None else torch.empty_like(h)
    _add_rms_norm[(len(h),)](h, delta, total, weight, out, out.stride(0), rstd, h.shape[1], eps, delta is not None, width,
                             num_warps=warps(width))
    return total, rstd


def rms_norm_backward(grad, x, weight, rstd, grad_residual, out):
    """See rms_norm_backward_twin; into `out`. Rows of grad, grad_residual and out may lie apart."""
    if not on_gpu(x):
        return out.copy_(rms_norm_backward_twin(grad, x, weight, rstd, grad_residual))
    width = triton.next_power_of_2(x.shape[1])
    _rms_norm_backward[(len(x),)](grad, grad.stride(0), x, weight, rstd, grad_residual, grad_residual.stride(0), out, out.stride(0),
                                  x.shape[1], width, num_warps=warps(width))
    return out


def warps(width):
    return 4 if width <= 2048 else 8 if width <= 8192 else 16


def rotate(heads, cos, sin, out=None, inverse=False):
    """Rotary embedding of (T, H, d), any strides over T and H, by cos and sin (T, d/2); into `out`, which may be `heads` itself."""
    if out is None:
        out = torch.empty(heads.shape, device=heads.device, dtype=heads.dtype)
    if not on_gpu(heads):
        return out.copy_(rotate_twin(heads, cos, -sin if inverse else sin))
    launch_rotate(heads, cos, sin, out, -1 if inverse else 1, None, 0.0)
    return out


def norm_rotate(heads, weight, eps, cos, sin, out):
    """See norm_rotate_twin; heads (T, H, d) and `out` with any strides over T and H."""
    if not on_gpu(heads):
        return out.copy_(norm_rotate_twin(heads, weight, eps, cos, sin))
    launch_rotate(heads, cos, sin, out, 1, weight, eps)
    return out


def launch_rotate(heads, cos, sin, out, sign, weight, eps):
    T, H, d = heads.shape
    _rotate[(T,)](heads, heads.stride(0), heads.stride(1), out, out.stride(0), out.stride(1), cos, sin, weight, eps, H,
                  d // 2, triton.next_power_of_2(d // 2), triton.next_power_of_2(H), sign, weight is not None)


def norm_rotate_backward(grad, heads, weight, eps, cos, sin, out):
    """See norm_rotate_backward_twin; grad, heads and `out` (T, H, d) with any strides over T and H."""
    if not on_gpu(heads):
        return out.copy_(norm_rotate_backward_twin(grad, heads, weight, eps, cos, sin))
    T, H, d = heads.shape
    _norm_rotate_backward[(T,)](grad, grad.stride(0), grad.stride(1), heads, heads.stride(0), heads.stride(1),
                                out, out.stride(0), out.stride(1), cos, sin, weight, eps, H,
                                d // 2, triton.next_power_of_2(d // 2), triton.next_power_of_2(H))
    return out


def swiglu(gate_up, out):
    """See swiglu_twin; into `out`, whose rows may lie apart."""
    if not on_gpu(gate_up):
        return swiglu_twin(gate_up, out)
    T, width = out.shape
    _swiglu[(T, triton.cdiv(width, 1024))](gate_up, out, out.stride(0), width, 1024)
    return out


def swiglu_backward(grad, gate_up, out):
    """Writes d gate_up to `out` and returns silu(gate) * up, in the place of `grad`. Rows of grad and out may lie apart.

    See swiglu_backward_twin.
    """
    if not on_gpu(gate_up):
        return swiglu_backward_twin(grad, gate_up, out)[1]
    T, width = grad.shape
    _swiglu_backward[(T, triton.cdiv(width, 1024))](grad, grad.stride(0), gate_up, out, out.stride(0), width, 1024)
    return grad


def swiglu_backward_sums(grad, gate_up, low, d_low, out, tiles=(32, 64, 4, 3, 7)):
    """SwiGLU's backward pass and, from the same read of its tiles, the adapter gradients that are sums over tokens.

    grad (T, I): d loss / d act; gate_up (T, 2I); low (T, 2r): s x A^T of gate and up; d_low (T, r): d loss / d low of down; rows of
    all may lie apart. Writes d gate_up to `out` (T, 2I) and returns fp32 (3, r, I): low_gate^T d_gate, low_up^T d_up, d_low^T act.
    Sums are made in a fixed order, so the same input gives the same bits. See swiglu_backward_sums_twin.
    """
    if not on_gpu(gate_up):
        d_gate_up, sums = swiglu_backward_sums_twin(grad, gate_up, low, d_low)
        out.copy_(d_gate_up)
        return sums
    rows, columns, num_warps, stages, parts = tiles
    (T, I), r = grad.shape, d_low.shape[1]
    part = triton.cdiv(triton.cdiv(T, parts), rows) * rows
    parts = triton.cdiv(T, part)
    sums = torch.empty(parts, 3, r, I, device=grad.device)
    _swiglu_backward_sums[(triton.cdiv(I, columns), parts)](
        grad, grad.stride(0), gate_up, low, low.stride(0), d_low, d_low.stride(0), out, out.stride(0), sums, T, I, part,
        r, max(16, triton.next_power_of_2(r)), rows, columns, num_warps=num_warps, num_stages=stages)
    return sums.sum(0)


def nf4_dequantize(weight, codebook, out):
    """Dequantise a quant.NF4Weight into `out` (out_features, in_features), whose rows may lie apart: block scales and values in one pass.

    in_features must be a multiple of 64, so that no block spans two rows.
    """
    total, blocks = out.numel(), 64
    nested = ([weight.scale_codes, weight.scale_scales, weight.scale_codebook, weight.scale_offset] if weight.double_quant
              else [weight.scales] * 4)
    _nf4[(triton.cdiv(total, 64 * blocks),)](
        weight.packed, codebook, *nested, nested[0] if weight.double_quant else weight.scales,
        out, out.stride(0), out.shape[1], total, weight.double_quant, blocks)
    return out


def int8_dequantize(q, scale, out):
    """Writes q (out, in) int8 times scale (out,) fp32 to `out` (out, in), whose rows may lie apart."""
    _int8[(out.shape[0], triton.cdiv(out.shape[1], 1024))](q, scale, out, out.stride(0), out.shape[1], 1024)
    return out


def cross_entropy(logits, targets, softcap, with_grad):
    """(nll fp32 (S,), correct bool (S,)) of logits (S, vocabulary) in 16 or 32 bits against targets int64 (S,), -100: none.

    With `with_grad` the logits are overwritten by d sum(nll) / d logits. Two passes over the logits and nothing beside them.
    """
    S, width = logits.shape
    nll, correct = torch.empty(S, device=logits.device), torch.empty(S, device=logits.device, dtype=torch.bool)
    _cross_entropy[(S,)](logits, logits.stride(0), targets, nll, correct, softcap or 1.0, width, bool(softcap), with_grad, 4096,
                         num_warps=8)
    return nll, correct
