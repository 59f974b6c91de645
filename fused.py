"""The fast path of Llama-shaped decoder layers: the arithmetic of model.AdaptedLinear with fewer passes over memory.

Projections that read the same input (q, k, v; gate, up) are one product with one dequantised scratch; norms, rotary embedding and
SwiGLU are one kernel each way; adapter gradients are summed straight into their fp32 buffers; silu(gate) * up is computed again in
the backward pass instead of stored. The plain path, transformers' own layer with AdaptedLinear, is the slow twin: `install` runs
both on every layer it takes over and leaves alone what does not agree. Leaves out: layers with other norms, activations or
normed queries, and LLM.int8(), whose outliers are chosen by waiting for the GPU; they train on the plain path.
"""
import torch

import kernels
import quant


class Group:
    """AdaptedLinear modules that read the same input, as one product: y (T, sum of outputs).

    Their adapter matrices A lie one after another in the flat buffer (model.adapters sees to that), so that x A^T of all is one
    product too, and its gradient another.
    """

    def __init__(self, modules):
        self.modules = modules
        self.adapted = [module for module in modules if module.r]
        self.bounds, self.low_bounds, out, low = {}, {}, 0, 0
        for module in modules:
            self.bounds[module] = slice(out, out := out + module.out_features)
            self.low_bounds[module] = slice(low, low := low + module.r)
        self.out_features, self.in_features, self.ranks = out, modules[0].in_features, low
        self.scaling, self.dropout = modules[0].scaling, modules[0].dropout
        self.kept = None

    def bind(self, memory):
        """Take views of all A in model.AdapterMemory: the working copy and the gradient, (sum of ranks, in) each."""
        if self.adapted:
            self.working_A, self.grad_A = memory.together([module.lora_A for module in self.adapted])

    def parameters(self):
        return [parameter for module in self.adapted for parameter in (module.lora_A, module.lora_B)]

    def keep(self):
        """Lay the kept copies of the weights side by side, where all are kept."""
        if all(module.weight.kept is not None for module in self.modules):
            self.kept = torch.cat([module.weight.kept for module in self.modules])
            for module in self.modules:
                module.weight.share(self.kept[self.bounds[module]])

    def weight(self, dtype):
        """(sum of outputs, in): the kept copy, or dequantised into a scratch."""
        if self.kept is not None and self.kept.dtype == dtype:
            return self.kept
        if len(self.modules) == 1:
            return self.modules[0].weight.dequantize(dtype)
        scratch = torch.empty(self.out_features, self.in_features, device=next(self.modules[0].weight.parameters()).device, dtype=dtype)
        for module in self.modules:
            module.weight.dequantize(dtype, out=scratch[self.bounds[module]])
        return scratch

    def forward(self, x):
        """x (T, in) -> (y (T, out), low = dropout(x) A^T (T, ranks), the dropout's mask or None)."""
        y = x @ self.weight(x.dtype).T
        mask = low = None
        for module in self.modules:
            if module.bias is not None:
                y[:, self.bounds[module]] += module.bias
        if self.adapted:
            if self.dropout and self.adapted[0].training:
                x, mask = torch.native_dropout(x, self.dropout, True)
            low = x @ self.working_A.T
            for module in self.adapted:
                part = y[:, self.bounds[module]]
                torch.addmm(part, low[:, self.low_bounds[module]], module.working_B.T, alpha=self.scaling, out=part)
        return y, low, mask

    def input_gradient(self, grad, low, mask, wanted=True):
        """For grad (T, out): (d loss / d x (T, in), d loss / d (dropout(x) A^T) (T, ranks)). Adds to the gradients of all B."""
        dx = grad @ self.weight(grad.dtype) if wanted else None
        if not self.adapted:
            return dx, None
        d_low = torch.empty_like(low)
        for module in self.adapted:
            part, low_bounds = grad[:, self.bounds[module]], self.low_bounds[module]
            torch.mm(part, module.working_B, out=d_low[:, low_bounds])
            accumulate(module.lora_B.grad, part.T, low[:, low_bounds], self.scaling)
        if wanted and mask is None:
            dx.addmm_(d_low, self.working_A, alpha=self.scaling)
        elif wanted:
            dx += (d_low @ self.working_A) * mask * (self.scaling / (1 - self.dropout))
        return dx, d_low

    def adapter_gradient(self, d_low, x, mask):
        """Add to the gradients of all A."""
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


class AddNorm(torch.autograd.Function):
    """h, delta (T, D) or None -> (rms_norm(h + delta), h + delta): one kernel each way for the end of a block and the norm of the next."""

    @staticmethod
    def forward(ctx, h, delta, weight, eps):
        x, h, rstd = kernels.add_rms_norm(h, delta, weight, eps)
        ctx.save_for_backward(h, weight, rstd)
        ctx.added = delta is not None
        return x, h

    @staticmethod
    def backward(ctx, grad_x, grad_h):
        grad = kernels.rms_norm_backward(grad_x, *ctx.saved_tensors, grad_h)
        return grad, grad if ctx.added else None, None, None


class QueriesKeysValues(torch.autograd.Function):
    """x (T, D) -> rotated q (T, heads, d) and k (T, key_value_heads, d), and v."""

    @staticmethod
    def forward(ctx, x, cos, sin, group, head_dim, *adapters):
        y, low, mask = group.forward(x)
        q, k, v = (y[:, group.bounds[module]].unflatten(1, (-1, head_dim)) for module in group.modules)
        turned = y[:, :q.shape[1] * head_dim + k.shape[1] * head_dim].unflatten(1, (-1, head_dim))
        kernels.rotate(turned, cos, sin, out=turned)
        ctx.save_for_backward(x, low, mask, cos, sin)
        ctx.group, ctx.head_dim = group, head_dim
        return q, k, v

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_v):
        x, low, mask, cos, sin = ctx.saved_tensors
        group, grad = ctx.group, torch.empty(len(x), ctx.group.out_features, device=x.device, dtype=x.dtype)
        q, k, v = (grad[:, group.bounds[module]].unflatten(1, (-1, ctx.head_dim)) for module in group.modules)
        kernels.rotate(grad_q, cos, sin, out=q, inverse=True)
        kernels.rotate(grad_k, cos, sin, out=k, inverse=True)
        v.copy_(grad_v)
        dx, d_low = group.input_gradient(grad, low, mask, wanted=ctx.needs_input_grad[0])
        group.adapter_gradient(d_low, x, mask)
        return dx, *[None] * (4 + len(group.parameters()))


class Output(torch.autograd.Function):
    """x (T, in) -> the projection of a group of one (T, D)."""

    @staticmethod
    def forward(ctx, x, group, *adapters):
        y, low, mask = group.forward(x)
        ctx.save_for_backward(x, low, mask)
        ctx.group = group
        return y

    @staticmethod
    def backward(ctx, grad):
        x, low, mask = ctx.saved_tensors
        dx, d_low = ctx.group.input_gradient(grad, low, mask)
        ctx.group.adapter_gradient(d_low, x, mask)
        return dx, None, *[None] * len(ctx.group.parameters())


class GatedMLP(torch.autograd.Function):
    """x (T, D) -> down(silu(gate(x)) * up(x)) (T, D); keeps x, gate and up."""

    @staticmethod
    def forward(ctx, x, wide, down, *adapters):
        gate_up, low, mask = wide.forward(x)
        act = kernels.swiglu(gate_up)
        y, down_low, down_mask = down.forward(act)
        ctx.save_for_backward(x, low, mask, gate_up, down_low, down_mask)
        ctx.wide, ctx.down = wide, down
        return y

    @staticmethod
    def backward(ctx, grad):
        x, low, mask, gate_up, down_low, down_mask = ctx.saved_tensors
        wide, down = ctx.wide, ctx.down
        d_act, d_low = down.input_gradient(grad, down_low, down_mask)
        d_gate_up, act = kernels.swiglu_backward(d_act, gate_up)
        down.adapter_gradient(d_low, act, down_mask)
        dx, d_low = wide.input_gradient(d_gate_up, low, mask)
        wide.adapter_gradient(d_low, x, mask)
        return dx, None, None, *[None] * (len(wide.parameters()) + len(down.parameters()))


class FusedLayer:
    """The forward pass of one Llama-shaped decoder layer over packed documents."""

    def __init__(self, layer, memory, attend):
        attention, mlp = layer.self_attn, layer.mlp
        self.layer, self.attend, self.plain = layer, attend, layer.forward
        self.window = attention.sliding_window if hasattr(attention, "sliding_window") else getattr(attention.config, "sliding_window", None)
        self.qkv = Group([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o, self.wide, self.down = Group([attention.o_proj]), Group([mlp.gate_proj, mlp.up_proj]), Group([mlp.down_proj])
        for group in (self.qkv, self.o, self.wide, self.down):
            group.bind(memory)
            group.keep()

    def __call__(self, hidden_states, position_embeddings=None, cu_seqlens=None, max_seqlen=None, use_varlen=False, **rest):
        """hidden_states (1, T, D) -> the same shape; without cu_seqlens (generation) the layer's own forward."""
        if cu_seqlens is None:
            return self.plain(hidden_states, position_embeddings=position_embeddings, **rest)
        attention, before, after = self.layer.self_attn, self.layer.input_layernorm, self.layer.post_attention_layernorm
        cos, sin = (table[0, :, :attention.head_dim // 2].contiguous() for table in position_embeddings)
        x, h = AddNorm.apply(hidden_states[0], None, before.weight, before.variance_epsilon)
        q, k, v = QueriesKeysValues.apply(x, cos, sin, self.qkv, attention.head_dim, *self.qkv.parameters())
        mixed, _ = self.attend(attention, *(heads.transpose(0, 1)[None] for heads in (q, k, v)), scaling=attention.scaling, sliding_window=self.window,
                               cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, use_varlen=use_varlen)
        x, h = AddNorm.apply(h, Output.apply(mixed[0].flatten(1), self.o, *self.o.parameters()), after.weight, after.variance_epsilon)
        return (h + GatedMLP.apply(x, self.wide, self.down, *self.wide.parameters(), *self.down.parameters()))[None]


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
    memory.refresh()
    taken = 0
    for layer in candidates:
        fast = FusedLayer(layer, memory, attend)
        slow_out, fast_out = (forward(h, position_embeddings=tables, attention_mask=None, **options) for forward in (layer.forward, fast))
        difference = (slow_out - fast_out).float().norm() / (slow_out - h).float().norm()
        if difference < (0.03 if dtype.itemsize == 2 else 1e-4):
            layer.forward = fast
            taken += 1
    return taken
