"""The fast path of Llama-shaped decoder layers: the arithmetic of model.AdaptedLinear with fewer passes over memory.

Projections that read the same input (q, k, v; gate, up) are one product with one dequantised scratch; norms, rotary embedding and
SwiGLU are one kernel each way; adapter gradients are summed straight into their fp32 buffers; silu(gate) * up is computed again in
the backward pass instead of stored. The plain path, transformers' own layer with AdaptedLinear, is the slow twin: `install` runs
both on every layer it takes over and leaves alone what does not agree. Leaves out: layers with other norms, activations or
normed queries, and LLM.int8(), whose outliers are chosen by waiting for the GPU; they train on the plain path.
"""
import functools

import torch

import kernels
import quant


SHORT = 2048  # inputs: up to here a kernel takes about as long as its launch


class Group:
    """AdaptedLinear modules that read the same input, adapters included, as one product over a longer inner dimension:

        y = x W^T + s drop(x) A^T B^T = [x | s drop(x) A^T] [W | B]^T

    with W stacked, and B block by block, over the modules. So x comes with room for the other columns behind each row, and [W | B]
    is kept or dequantised as one matrix. The A of all modules lie one after another in the flat buffer (model.adapters sees to that).
    """

    def __init__(self, modules, memory):
        self.modules = modules
        self.adapted = [module for module in modules if module.r]
        self.out_bounds, self.low_bounds, out, low = {}, {}, 0, 0
        for module in modules:
            self.out_bounds[module] = slice(out, out := out + module.out_features)
            self.low_bounds[module] = slice(low, low := low + module.r)
        self.out_features, self.in_features, self.ranks = out, modules[0].in_features, low
        self.width = self.in_features + -(-low // 8) * 8  # rows of both buffers start at 16 bytes, as matrix units want them
        self.scaling, self.dropout, self.training = modules[0].scaling, modules[0].dropout, lambda: modules[0].training
        self.kept = None  # [W | B] (out, width), where the copies of all modules' weights are kept
        if self.adapted:
            self.working_A, self.grad_A = memory.together([module.lora_A for module in self.adapted])

    def room(self, x):
        """(T, in) to write an input like x (T, ...) to, with the columns that `forward` fills lying behind each row."""
        return torch.empty(len(x), self.width, device=x.device, dtype=x.dtype)[:, :self.in_features]

    def behind(self, x):
        """[x | s drop(x) A^T] (T, width) for an x from `room`."""
        return x.data.as_strided((len(x), self.width), (self.width, 1))  # .data: autograd need not know that room behind x is written to

    def low(self, x):
        """s drop(x) A^T (T, ranks) for an x from `room`, once `forward` has filled it."""
        return self.behind(x)[:, self.in_features:self.in_features + self.ranks]

    def adapter_columns(self, rows, module):
        """Where a module's B (out, r) lies in its rows of [W | B]."""
        return rows[:, self.in_features:][:, self.low_bounds[module]]

    def weight(self, dtype, width):
        """W (out, in), or for the full width [W | B], in `dtype`: kept, or made in a scratch."""
        if self.kept is not None and self.kept.dtype == dtype:
            return self.kept[:, :width]
        scratch = torch.empty(self.out_features, width, device=self.modules[0].weight.device, dtype=dtype)
        if width > self.in_features and (len(self.modules) > 1 or width > self.in_features + self.ranks):
            scratch[:, self.in_features:].zero_()  # one module's outputs do not depend on another's A
        for module in self.modules:
            rows = scratch[self.out_bounds[module]]
            module.weight.dequantize(dtype, out=rows[:, :self.in_features])
            if width > self.in_features and module.r:
                self.adapter_columns(rows, module).copy_(module.working_B)
        return scratch

    def forward(self, x):
        """y (T, out) for an x from `room`; fills the columns behind it. Also the dropout's mask (T, in), or None."""
        mask, inner, whole = None, x, self.behind(x)
        whole[:, self.in_features + self.ranks:].zero_()
        if self.adapted:
            if self.dropout and self.training():
                inner, mask = torch.native_dropout(x, self.dropout, True)
            torch.addmm(self.low(x), inner, self.working_A.T, beta=0, alpha=self.scaling, out=self.low(x))
        y = whole @ self.weight(x.dtype, self.width).T
        for module in self.modules:
            if module.bias is not None:
                y[:, self.out_bounds[module]] += module.bias
        return y, mask

    def backward(self, grad, low, mask):
        """For grad (T, out) and low (T, ranks): d loss / d x (T, in), and d loss / d low (T, ranks). Adds to the gradients of all B."""
        if self.kept is not None and self.in_features <= SHORT:  # launches are dear: one product for both
            both = grad @ self.weight(grad.dtype, self.width)
            dx, d_low = both[:, :self.in_features], both[:, self.in_features:self.in_features + self.ranks]
        else:  # tiles are dear: the longer product would need another column of them
            dx, d_low = grad @ self.weight(grad.dtype, self.in_features), torch.empty_like(low, memory_format=torch.contiguous_format)
            for module in self.adapted:
                torch.mm(grad[:, self.out_bounds[module]], module.working_B, out=d_low[:, self.low_bounds[module]])
        for module in self.adapted:
            accumulate(module.lora_B.grad, grad[:, self.out_bounds[module]].T, low[:, self.low_bounds[module]], 1.0)
        if self.adapted and mask is None:
            torch.addmm(dx, d_low, self.working_A, alpha=self.scaling, out=dx)
        elif self.adapted:
            dx += (d_low @ self.working_A) * mask * (self.scaling / (1 - self.dropout))
        return dx, d_low

    def adapter_gradient(self, d_low, x, mask):
        """Add to the gradients of all A, for the input x (T, in) and d loss / d low (T, ranks)."""
        if self.adapted and mask is None:
            accumulate(self.grad_A, d_low.T, x, self.scaling)
        elif self.adapted:
            accumulate(self.grad_A, d_low.T, x * mask, self.scaling / (1 - self.dropout))


def accumulate(total, a, b, alpha):
    """total += alpha a b with `total` in fp32 and a, b in any dtype, without rounding the product to 16 bits where the GPU allows."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=alpha)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=alpha, out=total)
    else:
        total.add_((a @ b).to(total.dtype), alpha=alpha)


class Kept:
    """The kept [W | B] of all groups in one buffer, whose B are brought up to date by one gather and one scatter."""

    def __init__(self, groups, memory, dtype):
        first = memory.flat
        self.memory, sizes = memory, [group.out_features * group.width for group in groups]
        self.buffer = torch.zeros(sum(sizes), device=first.device, dtype=dtype)
        positions = torch.arange(len(first), device=first.device)
        sources, targets, start = [], [], 0
        for group, size in zip(groups, sizes):
            group.kept = self.buffer[start:start + size].view(group.out_features, group.width)
            places = torch.arange(start, start + size, device=first.device).view(group.out_features, group.width)
            for module in group.modules:
                rows = group.kept[group.out_bounds[module]]
                rows[:, :group.in_features] = module.weight.kept
                module.weight.share(rows[:, :group.in_features])
                if module.r:
                    sources.append(positions[memory.places[module.lora_B]])
                    targets.append(group.adapter_columns(places[group.out_bounds[module]], module).reshape(-1))
            start += size
        self.sources, self.targets = (torch.cat(parts) if parts else positions[:0] for parts in (sources, targets))

    def refresh(self):
        self.buffer.index_copy_(0, self.targets, self.memory.working.index_select(0, self.sources))


class Start(torch.autograd.Function):
    """h and a scalar that requires a gradient -> h, from which on autograd keeps a graph, though embeddings are frozen.

    The adapters' gradients go straight into their buffers, so autograd never sees the adapters. (It would remember on which
    stream it met each one first, and refuse to be recorded on another.)
    """

    @staticmethod
    def forward(ctx, h, anchor):
        return h.view_as(h)

    @staticmethod
    def backward(ctx, grad):
        return None, None


class AddNorm(torch.autograd.Function):
    """h, delta (T, D) or None -> (rms_norm(h + delta) in a room for `group`, h + delta): one kernel each way."""

    @staticmethod
    def forward(ctx, h, delta, weight, eps, group):
        x = group.room(h)
        h, rstd = kernels.add_rms_norm(h, delta, weight, eps, out=x)
        ctx.save_for_backward(h, weight, rstd)
        ctx.added = delta is not None
        return x, h

    @staticmethod
    def backward(ctx, grad_x, grad_h):
        h, weight, rstd = ctx.saved_tensors
        grad = kernels.rms_norm_backward(grad_x, h, weight, rstd, grad_h)
        return grad, grad if ctx.added else None, None, None, None


class QueriesKeysValues(torch.autograd.Function):
    """x (T, D) -> rotated q (T, heads, d) and k (T, key_value_heads, d), and v."""

    @staticmethod
    def forward(ctx, x, cos, sin, group, head_dim):
        y, mask = group.forward(x)
        q, k, v = (y[:, group.out_bounds[module]].unflatten(1, (-1, head_dim)) for module in group.modules)
        turned = y[:, :-v.shape[1] * head_dim].unflatten(1, (-1, head_dim))
        kernels.rotate(turned, cos, sin, out=turned)
        ctx.save_for_backward(x, mask, cos, sin)
        ctx.group, ctx.head_dim = group, head_dim
        return q, k, v

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_v):
        x, mask, cos, sin = ctx.saved_tensors
        group, grad = ctx.group, torch.empty(len(x), ctx.group.out_features, device=x.device, dtype=x.dtype)
        q, k, v = (grad[:, group.out_bounds[module]].unflatten(1, (-1, ctx.head_dim)) for module in group.modules)
        kernels.rotate(grad_q, cos, sin, out=q, inverse=True)
        kernels.rotate(grad_k, cos, sin, out=k, inverse=True)
        v.copy_(grad_v)
        dx, d_low = group.backward(grad, group.low(x), mask)
        group.adapter_gradient(d_low, x, mask)
        return dx, None, None, None, None


class Output(torch.autograd.Function):
    """x (T, heads, d) -> the projection (T, D) of a group of one."""

    @staticmethod
    def forward(ctx, x, group):
        flat = group.room(x)
        flat.unflatten(1, x.shape[1:]).copy_(x)
        y, mask = group.forward(flat)
        ctx.save_for_backward(flat, mask)
        ctx.group, ctx.heads = group, x.shape[1:]
        return y

    @staticmethod
    def backward(ctx, grad):
        x, mask = ctx.saved_tensors
        group = ctx.group
        dx, d_low = group.backward(grad, group.low(x), mask)
        group.adapter_gradient(d_low, x, mask)
        return dx.unflatten(1, ctx.heads), None


class GatedMLP(torch.autograd.Function):
    """x (T, D) -> down(silu(gate(x)) * up(x)) (T, D); keeps x, gate and up."""

    @staticmethod
    def forward(ctx, x, wide, down):
        gate_up, mask = wide.forward(x)
        act = kernels.swiglu(gate_up, out=down.room(x))
        y, down_mask = down.forward(act)
        ctx.save_for_backward(x, mask, gate_up, down.low(act).clone(), down_mask)
        ctx.wide, ctx.down = wide, down
        return y

    @staticmethod
    def backward(ctx, grad):
        x, mask, gate_up, down_low, down_mask = ctx.saved_tensors
        wide, down = ctx.wide, ctx.down
        d_act, d_low = down.backward(grad, down_low, down_mask)
        d_gate_up, act = kernels.swiglu_backward(d_act, gate_up)  # `act` again, for the adapter of `down`
        down.adapter_gradient(d_low, act, down_mask)
        dx, d_low = wide.backward(d_gate_up, wide.low(x), mask)
        wide.adapter_gradient(d_low, x, mask)
        return dx, None, None


class FusedLayer:
    """The forward pass of one Llama-shaped decoder layer over packed documents."""

    def __init__(self, layer, memory, attend):
        attention, mlp = layer.self_attn, layer.mlp
        self.layer, self.attend, self.plain = layer, attend, layer.forward
        self.window = attention.sliding_window if hasattr(attention, "sliding_window") else getattr(attention.config, "sliding_window", None)
        self.qkv = Group([attention.q_proj, attention.k_proj, attention.v_proj], memory)
        self.o, self.wide, self.down = Group([attention.o_proj], memory), Group([mlp.gate_proj, mlp.up_proj], memory), Group([mlp.down_proj], memory)
        self.groups = [self.qkv, self.o, self.wide, self.down]

    def __call__(self, hidden_states, position_embeddings=None, cu_seqlens=None, max_seqlen=None, use_varlen=False, **rest):
        """hidden_states (1, T, D) -> the same shape; without cu_seqlens (generation) the layer's own forward."""
        if cu_seqlens is None:
            return self.plain(hidden_states, position_embeddings=position_embeddings, **rest)
        attention, before, after = self.layer.self_attn, self.layer.input_layernorm, self.layer.post_attention_layernorm
        cos, sin = half_tables(position_embeddings)
        x, h = AddNorm.apply(hidden_states[0], None, before.weight, before.variance_epsilon, self.qkv)
        q, k, v = QueriesKeysValues.apply(x, cos, sin, self.qkv, attention.head_dim)
        mixed, _ = self.attend(attention, *(heads.transpose(0, 1)[None] for heads in (q, k, v)), scaling=attention.scaling, sliding_window=self.window,
                               cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, use_varlen=use_varlen)
        delta = Output.apply(mixed[0], self.o)
        x, h = AddNorm.apply(h, delta, after.weight, after.variance_epsilon, self.wide)
        return (h + GatedMLP.apply(x, self.wide, self.down))[None]


@functools.lru_cache(maxsize=1)
def half_tables(position_embeddings):
    """cos and sin (T, d/2) of transformers' (1, T, d), whose halves are equal; once for all layers of a pass."""
    return tuple(table[0, :, :table.shape[-1] // 2].contiguous() for table in position_embeddings)


def fits(layer):
    """Whether a decoder layer has the parts of a Llama block, and no others."""
    names = lambda module: {name for name, _ in module.named_children()}
    if names(layer) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    if names(layer.self_attn) != {"q_proj", "k_proj", "v_proj", "o_proj"} or names(layer.mlp) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    linear = [module for part in (layer.self_attn, layer.mlp) for name, module in part.named_children() if name.endswith("_proj")]
    return type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") and all(hasattr(norm, "variance_epsilon") for norm in (layer.input_layernorm, layer.post_attention_layernorm)) \
        and not any(isinstance(module.weight, quant.LLMInt8Weight) for module in linear)


@torch.no_grad()
def install(network, memory, attend):
    """Give every Llama-shaped layer of the network its fast path. Returns how many have one.

    Each is run beside the layer's own forward first, on two short documents, and left alone where the two differ.
    """
    decoder = network.get_decoder()
    candidates = [layer for layer in getattr(decoder, "layers", ()) if fits(layer)]
    if not candidates:
        return 0
    width, dtype, device = network.config.hidden_size, network.get_input_embeddings().weight.dtype, network.device
    positions = torch.tensor([[*range(11), *range(5)]], device=device)
    h = torch.randn(1, 16, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    options = dict(position_ids=positions, cu_seqlens=torch.tensor([0, 11, 16], device=device, dtype=torch.int32), max_seqlen=11, use_varlen=False)
    tables = decoder.rotary_emb(h, positions)
    taken = 0
    fast_layers = [FusedLayer(layer, memory, attend) for layer in candidates]
    if all(module.weight.kept is not None for fast in fast_layers for group in fast.groups for module in group.modules):
        memory.kept = Kept([group for fast in fast_layers for group in fast.groups], memory, dtype)
    memory.refresh()
    for layer, fast in zip(candidates, fast_layers):
        slow_out, fast_out = (forward(h, position_embeddings=tables, attention_mask=None, **options) for forward in (layer.forward, fast))
        difference = (slow_out - fast_out).float().norm() / (slow_out - h).float().norm()
        if difference < (0.03 if dtype.itemsize == 2 else 1e-4):
            layer.forward = fast
            taken += 1
    half_tables.cache_clear()
    return taken
