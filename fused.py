"""The fast path of Llama-shaped decoder layers: the arithmetic of lora_layers.AdaptedLinear with fewer passes over memory.

Projections that read the same input (q, k, v; gate, up) are one product with one dequantised scratch; norms, rotary embedding and
SwiGLU are one kernel each way; adapter gradients are summed straight into their fp32 buffers; silu(gate) * up is computed again in
the backward pass instead of stored. The plain path, transformers' own layer with AdaptedLinear, is the slow twin: `install` runs
both on every layer it takes over and leaves alone what does not agree. Leaves out: layers with other norms or activations,
DoRA, and LLM.int8(), whose outliers are chosen by waiting for the GPU; they train on the plain path.
"""
import functools

import torch

import gpu_kernels
import quant


SHORT = 2048  # inputs: up to here a kernel takes about as long as its launch


class Group:
    """AdaptedLinear modules that read the same input, adapters included, as one product over a longer inner dimension, each way:

        y = x W^T + s drop(x) A^T B^T = [x | s drop(x) A^T] [W | B]^T         d x = [d y | d y B] [W ; s A]   (without dropout)

    with W and A stacked, and B block by block, over the modules. So x and d y come with room for the other columns behind each row,
    and W is kept or dequantised with B beside it and s A below it. The A of all modules lie one after another in the flat buffer
    (lora_layers.adapters sees to that). Small layers, whose kernels take as long as their launches, get d x and d y B as one product.
    """

    def __init__(self, modules, memory):
        self.modules = modules
        self.adapted = [module for module in modules if module.r]
        self.out_bounds, self.low_bounds, out, low = {}, {}, 0, 0
        for module in modules:
            self.out_bounds[module] = slice(out, out := out + module.out_features)
            self.low_bounds[module] = slice(low, low := low + module.r)
        self.out_features, self.in_features, self.ranks = out, modules[0].in_features, low
        self.short = self.in_features <= SHORT
        self.width, self.height = self.in_features + self.room_for(low), self.out_features + self.room_for(low)
        self.scaling, self.dropout, self.training = modules[0].scaling, modules[0].dropout, lambda: modules[0].training
        self.kept = None  # [W | B; s A] (out + ranks, width), where the copies of all modules' weights are kept
        if self.adapted:
            self.working_A, self.grad_A = memory.together([module.lora_A for module in self.adapted])

    def room_for(self, ranks):
        """Columns behind a row: rows begin at 128 bytes, as matrix units like it, or at 16 where every column counts."""
        step = 8 if self.short else 64
        return -(-ranks // step) * step

    def room(self, x, width=None):
        """(T, in) to write an input like x (T, ...) to, with the columns that `forward` fills lying behind each row; or rows of `width`."""
        return torch.empty(len(x), width or self.width, device=x.device, dtype=x.dtype)[:, :self.in_features]

    def behind(self, x):
        """[x | s drop(x) A^T] (T, in + ranks) for an x from `room`."""
        # .data: autograd need not know that room behind x is written to
        return x.data.as_strided((len(x), self.in_features + self.ranks), (self.width, 1))

    def low(self, x):
        """s drop(x) A^T (T, ranks) for an x from `room`, once `forward` has filled it."""
        return self.behind(x)[:, self.in_features:]

    def grad_room(self, x):
        """(T, out) to write d y to, for an input x (T, in), with room behind each row."""
        return torch.empty(len(x), self.height, device=x.device, dtype=x.dtype)[:, :self.out_features]

    def grad_behind(self, grad):
        """[d y | room for d y B] (T, out + ranks) for d y (T, out): where it lies if it came from a grad_room, else in a copy."""
        if grad.stride() != (self.height, 1):  # rows so far apart are ours: nobody else's are
            grad = self.grad_room(grad).copy_(grad)
        return grad.as_strided((len(grad), self.out_features + self.ranks), (self.height, 1))

    def adapter_columns(self, rows, module):
        """Where a module's B (out, r) lies in its rows of [W | B]."""
        return rows[:, self.in_features:][:, self.low_bounds[module]]

    def weight(self, dtype, width, height):
        """W (out, in) in `dtype`, or with B beside it (width in + ranks) or s A below it (height out + ranks): kept, or made in a
        scratch."""
        if self.kept is not None and self.kept.dtype == dtype:
            return self.kept[:height, :width]
        scratch = torch.empty(height, self.width if width > self.in_features else width, device=self.modules[0].weight.device, dtype=dtype)
        if width > self.in_features and len(self.modules) > 1:
            scratch[:, self.in_features:].zero_()  # one module's outputs do not depend on another's A
        for module in self.modules:
            rows = scratch[self.out_bounds[module]]
            module.weight.dequantize(dtype, out=rows[:, :self.in_features])
            if width > self.in_features and module.r:
                self.adapter_columns(rows, module).copy_(module.working_B)
        if height > self.out_features:
            torch.mul(self.working_A, self.scaling, out=scratch[self.out_features:, :self.in_features])
        return scratch[:, :width]

    def forward(self, x):
        """y (T, out) for an x from `room`; fills the columns behind it. Also the dropout's mask (T, in), or None."""
        mask = self.fill(x)
        y = self.behind(x) @ self.weight(x.dtype, self.in_features + self.ranks, self.out_features).T
        for module in self.modules:
            if module.bias is not None:
                y[:, self.out_bounds[module]] += module.bias
        return y, mask

    def fill(self, x):
        """Write s drop(x) A^T behind x. Returns the dropout's mask (T, in), or None."""
        mask, inner = None, x
        if self.adapted:
            if self.dropout and self.training():
                inner, mask = torch.native_dropout(x, self.dropout, True)
            torch.addmm(self.low(x), inner, self.working_A.T, beta=0, alpha=self.scaling, out=self.low(x))
        return mask

    def backward(self, grad, low, mask, B_too=True):
        """For grad (T, out) and low (T, ranks): d loss / d x (T, in), and d loss / d low (T, ranks).

        Adds to the gradients of all B, unless told not to.
        """
        if self.short and self.kept is not None:  # launches are dear: one product for both
            both = grad @ self.weight(grad.dtype, self.width, self.out_features)  # whole rows, which attention wants to begin at 16 bytes
            dx, d_low = both[:, :self.in_features], both[:, self.in_features:self.in_features + self.ranks]
            if self.adapted and mask is None:
                torch.addmm(dx, d_low, self.working_A, alpha=self.scaling, out=dx)
        else:
            whole = self.grad_behind(grad)
            grad, d_low = whole[:, :self.out_features], whole[:, self.out_features:]
            for module in self.adapted:
                torch.mm(grad[:, self.out_bounds[module]], module.working_B, out=d_low[:, self.low_bounds[module]])
            inner = self.out_features + (self.ranks if mask is None else 0)
            dx = whole[:, :inner] @ self.weight(grad.dtype, self.in_features, inner)
        if self.adapted and mask is not None:
            dx += (d_low @ self.working_A) * mask * (self.scaling / (1 - self.dropout))
        for module in self.adapted if B_too else ():
            accumulate(module.lora_B.grad, grad[:, self.out_bounds[module]].T, low[:, self.low_bounds[module]], 1.0)
        return dx, d_low

    def adapter_gradient(self, d_low, x, mask):
        """Add to the gradients of all A, for the input x (T, in) and d loss / d low (T, ranks)."""
        if self.adapted and mask is None:
            accumulate(self.grad_A, d_low.T, x, self.scaling)
        elif self.adapted:
            accumulate(self.grad_A, d_low.T, x * mask, self.scaling / (1 - self.dropout))


def accumulate(total, a, b, alpha):
    """total += alpha a b with `total` in fp32 and a, b in any dtype, without rounding the product to 16 bits where the GPU allows."""
    if a.is_cuda or a.dtype == total.dtype:
        quant.add_product(total, a, b, alpha)
    else:
        total.add_((a @ b).to(total.dtype), alpha=alpha)


class Kept:
    """The kept [W | B; s A] of all groups in one buffer, whose A and B are brought up to date by one gather and one scatter."""

    def __init__(self, groups, memory, dtype):
        first = memory.flat
        heights = [group.out_features + group.ranks for group in groups]
        self.memory, sizes = memory, [height * group.width for group, height in zip(groups, heights)]
        self.buffer = torch.zeros(sum(sizes), device=first.device, dtype=dtype)
        positions, factors = torch.arange(len(first), device=first.device), torch.ones(len(first), device=first.device, dtype=dtype)
        sources, targets, start = [], [], 0
        for group, height, size in zip(groups, heights, sizes):
            group.kept = self.buffer[start:start + size].view(height, group.width)
            places = torch.arange(start, start + size, device=first.device).view(height, group.width)
            for module in group.modules:
                rows = group.kept[group.out_bounds[module]]
                rows[:, :group.in_features] = module.weight.kept
                module.weight.share(rows[:, :group.in_features])
                if module.r:
                    B, A = memory.places[module.lora_B], memory.places[module.lora_A]
                    sources += positions[B], positions[A]
                    factors[A] = group.scaling
                    below = places[group.out_features:, :group.in_features]
                    columns = group.adapter_columns(places[group.out_bounds[module]], module)
                    targets += columns.reshape(-1), below[group.low_bounds[module]].reshape(-1)
            start += size
        self.sources, self.targets = (torch.cat(parts) if parts else positions[:0] for parts in (sources, targets))
        self.factors = factors[self.sources]

    def refresh(self):
        self.buffer.index_copy_(0, self.targets, self.memory.working.index_select(0, self.sources).mul_(self.factors))


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
    """h, delta (T, D) or None -> (rms_norm(h + delta) in a room for `group`, h + delta): one kernel each way.

    before: the group that made the input, which its gradient then comes with room for; or None.
    """

    @staticmethod
    def forward(ctx, h, delta, weight, eps, group, before):
        x = group.room(h)
        h, rstd = gpu_kernels.add_rms_norm(h, delta, weight, eps, out=x)
        ctx.save_for_backward(h, weight, rstd)
        ctx.added = delta is not None
        ctx.before = before
        return x, h

    @staticmethod
    def backward(ctx, grad_x, grad_h):
        h, weight, rstd = ctx.saved_tensors
        out = ctx.before.grad_room(h) if ctx.before else torch.empty_like(h)
        grad = gpu_kernels.rms_norm_backward(grad_x, h, weight, rstd, grad_h, out)
        return grad, grad if ctx.added else None, None, None, None, None


class QueriesKeysValues(torch.autograd.Function):
    """x (T, D) -> rotated q (T, heads, d) and k (T, key_value_heads, d), and v.

    norms: ((weight (d,), eps) of the queries, of the keys), each head being normed before it is rotated; or None.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, group, head_dim, norms):
        y, mask = group.forward(x)
        q, k, v = (y[:, group.out_bounds[module]].unflatten(1, (-1, head_dim)) for module in group.modules)
        normed = (q, k) if norms else ()  # kept as they were
        if norms:
            q, k = (gpu_kernels.norm_rotate(heads, *norm, cos, sin, out=torch.empty(heads.shape, device=x.device, dtype=x.dtype))
                    for heads, norm in zip(normed, norms))
        else:
            turned = y[:, :-v.shape[1] * head_dim].unflatten(1, (-1, head_dim))
            gpu_kernels.rotate(turned, cos, sin, out=turned)
        ctx.save_for_backward(x, mask, cos, sin, *normed)
        ctx.group, ctx.head_dim, ctx.norms = group, head_dim, norms
        return q, k, v

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_v):
        x, mask, cos, sin, *normed = ctx.saved_tensors
        group, grad = ctx.group, ctx.group.grad_room(x)
        *turned, v = (grad[:, group.out_bounds[module]].unflatten(1, (-1, ctx.head_dim)) for module in group.modules)
        for number, (arrived, out) in enumerate(zip((grad_q, grad_k), turned)):
            if ctx.norms:
                gpu_kernels.norm_rotate_backward(arrived, normed[number], *ctx.norms[number], cos, sin, out=out)
            else:
                gpu_kernels.rotate(arrived, cos, sin, out=out, inverse=True)
        v.copy_(grad_v)
        dx, d_low = group.backward(grad, group.low(x), mask)
        group.adapter_gradient(d_low, x, mask)
        return dx, None, None, None, None, None


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
    """x (T, D) -> down(silu(gate(x)) * up(x)) (T, D); keeps x, gate and up.

    lows: a list that gets the narrow s act A^T of `down`, (T, r). A list that holds it already means that only the backward pass
    is wanted: the product of `down`, which no gradient needs, is left out, and the output is a placeholder.
    """

    @staticmethod
    def forward(ctx, x, wide, down, lows):
        gate_up, mask = wide.forward(x)
        y, down_mask, again = x.new_empty(()).expand(len(x), down.out_features), None, bool(lows)
        if not again or down.dropout and down.training():  # a dropout's mask is drawn again
            act = gpu_kernels.swiglu(gate_up, out=down.room(x))
            if again:
                down_mask = down.fill(act)
            else:
                y, down_mask = down.forward(act)
                lows.append(down.low(act).clone())
        ctx.save_for_backward(x, mask, gate_up, lows[0], down_mask)
        ctx.wide, ctx.down = wide, down
        return y

    @staticmethod
    def backward(ctx, grad):
        x, mask, gate_up, down_low, down_mask = ctx.saved_tensors
        wide, down = ctx.wide, ctx.down
        d_act, d_low = down.backward(grad, down_low, down_mask)
        d_gate_up, ranks = wide.grad_room(x), {module.r for module in (*wide.modules, *down.modules)}
        one_pass = mask is None and not wide.short and len(ranks) == 1 and 0 < max(ranks) <= 32
        if one_pass:
            gate, up, act = gpu_kernels.swiglu_backward_sums(d_act, gate_up, wide.low(x), d_low, out=d_gate_up)
            for module, total in zip(wide.modules, (gate, up)):
                module.lora_B.grad += total.T
            down.grad_A.add_(act, alpha=down.scaling)
        else:
            act = gpu_kernels.swiglu_backward(d_act, gate_up, out=d_gate_up)  # `act` again, for the adapter of `down`
            down.adapter_gradient(d_low, act, down_mask)
        dx, d_low = wide.backward(d_gate_up, wide.low(x), mask, B_too=not one_pass)
        wide.adapter_gradient(d_low, x, mask)
        return dx, None, None, None


class Recomputed(torch.autograd.Function):
    """A fused layer that keeps its input alone, and runs again in the backward pass (Chen et al. 2016), without what no gradient needs."""

    @staticmethod
    def forward(ctx, h, layer, options):
        ctx.layer, ctx.options, ctx.lows = layer, options, []
        ctx.generators = (torch.get_rng_state(), torch.cuda.get_rng_state() if h.is_cuda else None) if layer.qkv.dropout else None
        ctx.input = layer.store.put(layer, h) if layer.store else h
        between, y = layer.run(h, options, ctx.lows)
        return between + y

    @staticmethod
    def backward(ctx, grad):
        layer = ctx.layer
        h = (layer.store.get(ctx.input) if layer.store else ctx.input).detach().requires_grad_()
        with torch.random.fork_rng(devices=[h.device] if h.is_cuda else [], enabled=bool(ctx.generators)), torch.enable_grad():
            if ctx.generators:
                torch.set_rng_state(ctx.generators[0])
                if h.is_cuda:
                    torch.cuda.set_rng_state(ctx.generators[1])
            between, y = layer.run(h, ctx.options, ctx.lows)
        return *torch.autograd.grad((between, y), h, (grad, grad)), None, None


class HostStore:
    """Inputs of recomputed layers, kept in the host's memory between forward and backward pass: copies run beside the products.

    The backward pass asks for them in the opposite order, so while one layer works the next one's input is on its way.
    """

    def __init__(self, device):
        self.stream, self.pinned, self.order, self.coming, self.leaving = torch.cuda.Stream(device), {}, [], None, None

    def put(self, layer, h):
        """Start copying h (T, D) to the host. Returns the ticket that `get` takes."""
        if layer not in self.pinned or self.pinned[layer].numel() < h.numel():
            self.pinned[layer] = torch.empty(h.numel(), dtype=h.dtype, pin_memory=True)
        self.release()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.pinned[layer][:h.numel()].copy_(h.flatten(), non_blocking=True)
            self.leaving = h, self.stream.record_event()  # held here, so that its memory goes to nobody before it has been read
        ticket = layer, h.shape
        self.order.append(ticket)
        return ticket

    def release(self):
        """Let go of the input that left last. The wait is over long before it begins: a layer takes longer than a copy."""
        if self.leaving:
            torch.cuda.current_stream().wait_event(self.leaving[1])
            self.leaving = None

    def fetch(self, ticket):
        layer, shape = ticket
        h = torch.empty(shape, dtype=self.pinned[layer].dtype, device=self.stream.device)
        self.stream.wait_stream(torch.cuda.current_stream())  # what used this memory before
        with torch.cuda.stream(self.stream):
            h.view(-1).copy_(self.pinned[layer][:h.numel()], non_blocking=True)
            self.coming = ticket, h, self.stream.record_event()

    def get(self, ticket):
        """What `put` took, on the device; the one put before it is sent for."""
        self.release()
        del self.order[self.order.index(ticket) + 1:]  # a forward pass without a backward pass leaves tickets behind
        if not self.coming or self.coming[0] is not ticket:
            self.fetch(ticket)
        _, h, arrived = self.coming
        torch.cuda.current_stream().wait_event(arrived)
        self.coming = None
        self.order.pop()
        if self.order:
            self.fetch(self.order[-1])
        return h


class FusedLayer:
    """The forward pass of one Llama-shaped decoder layer over packed documents."""

    def __init__(self, layer, memory, attend):
        attention, mlp = layer.self_attn, layer.mlp
        self.layer, self.attend, self.plain = layer, attend, layer.forward
        self.window = None  # sliding window, as `install` saw it
        self.qkv = Group([attention.q_proj, attention.k_proj, attention.v_proj], memory)
        normed = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.norms = tuple((norm.weight, norm.variance_epsilon) for norm in normed) if all(normed) else None
        self.o = Group([attention.o_proj], memory)
        self.wide = Group([mlp.gate_proj, mlp.up_proj], memory)
        self.down = Group([mlp.down_proj], memory)
        self.groups = [self.qkv, self.o, self.wide, self.down]
        self.recomputed, self.store = False, None  # see model.recompute

    def __call__(self, hidden_states, position_embeddings=None, cu_seqlens=None, max_seqlen=None, use_varlen=False, **rest):
        """hidden_states (1, T, D) -> the same shape; without cu_seqlens (generation) the layer's own forward."""
        if cu_seqlens is None:
            return self.plain(hidden_states, position_embeddings=position_embeddings, **rest)
        h = hidden_states.squeeze(0)  # [0] would copy in the backward pass
        options = (*half_tables(position_embeddings), dict(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, use_varlen=use_varlen))
        if self.recomputed and torch.is_grad_enabled():
            return Recomputed.apply(h, self, options)[None]
        h, y = self.run(h, options, [])
        return (h + y)[None]

    def run(self, h, options, lows):
        """h (T, D) -> the residual stream after attention and what the MLP adds to it, (T, D) each. lows: see GatedMLP."""
        attention, before, after = self.layer.self_attn, self.layer.input_layernorm, self.layer.post_attention_layernorm
        cos, sin, documents = options
        # made by the layer before, whose `down` is like ours
        x, h = AddNorm.apply(h, None, before.weight, before.variance_epsilon, self.qkv, self.down)
        q, k, v = QueriesKeysValues.apply(x, cos, sin, self.qkv, attention.head_dim, self.norms)
        q, k, v = (heads.transpose(0, 1)[None] for heads in (q, k, v))
        mixed, _ = self.attend(attention, q, k, v, scaling=attention.scaling, sliding_window=self.window, **documents)
        delta = Output.apply(mixed.squeeze(0), self.o)
        x, h = AddNorm.apply(h, delta, after.weight, after.variance_epsilon, self.wide, self.o)
        return h, GatedMLP.apply(x, self.wide, self.down, lows)


@functools.lru_cache(maxsize=1)
def half_tables(position_embeddings):
    """cos and sin (T, d/2) of transformers' (1, T, d), whose halves are equal; once for all layers of a pass."""
    return tuple(table[0, :, :table.shape[-1] // 2].contiguous() for table in position_embeddings)


def fits(layer):
    """Whether a decoder layer has the parts of a Llama block, and no others but norms of single queries and keys."""
    names = lambda module: {name for name, _ in module.named_children()}
    if names(layer) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    normed = [module for name, module in layer.self_attn.named_children() if name in ("q_norm", "k_norm")]
    if len(normed) == 1 or any(not hasattr(norm, "variance_epsilon") or norm.weight.shape != (layer.self_attn.head_dim,)
                               for norm in normed):
        return False
    if names(layer.self_attn) - {"q_norm", "k_norm"} != {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return False
    if names(layer.mlp) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    linear = [module for part in (layer.self_attn, layer.mlp) for name, module in part.named_children() if name.endswith("_proj")]
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return (type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") and all(hasattr(norm, "variance_epsilon") for norm in norms)
            and not any(isinstance(module.weight, quant.LLMInt8Weight) or module.dora for module in linear))


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
    options = dict(position_ids=positions, cu_seqlens=torch.tensor([0, 11, 16], device=device, dtype=torch.int32),
                   max_seqlen=11, use_varlen=False)
    tables = decoder.rotary_emb(h, positions)
    taken = 0
    fast_layers = [FusedLayer(layer, memory, attend) for layer in candidates]
    if all(module.weight.kept is not None for fast in fast_layers for group in fast.groups for module in group.modules):
        memory.kept = Kept([group for fast in fast_layers for group in fast.groups], memory, dtype)
    memory.refresh()
    for layer, fast in zip(candidates, fast_layers):
        # not its forward: a sharded layer is gathered first
        slow_out = layer(h, position_embeddings=tables, attention_mask=None, **options)
        layer.forward, fast.window = fast, layer.self_attn.window
        fast_out = layer(h, position_embeddings=tables, attention_mask=None, **options)
        difference = (slow_out - fast_out).float().norm() / (slow_out - h).float().norm()
        if difference < (0.03 if dtype.itemsize == 2 else 1e-4):
            taken += 1
        else:
            layer.forward = fast.plain
    half_tables.cache_clear()
    return taken
