"""Attention over documents that lie one after another without padding: each sees itself alone, and looks back only.

torch's own kernels do the work: variable-length attention on a GPU, a plain batch where all documents have one length, one product a
batch of documents elsewhere. Leaves out: whatever else an architecture asks of attention, which is refused by name.
"""
import contextlib
import functools
import importlib.util
import inspect
import math

import torch
from torch import nn
from torch.nn import functional as F

import quant

ATTENTION = "rawlora_packed"  # our name in transformers' registry of attention functions
BY_HAND = 512  # tokens: documents up to here are looked at by hand on a CPU with bf16, where torch's own kernel takes twice as long
QUERIES = 64  # of a document that are looked at together, where attention is done by hand


def packed_attention(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
                     is_causal=None, cu_seqlens=None, max_seqlen=None, use_varlen=False, **rest):
    """Causal attention in which each document sees itself alone, in the form that transformers' attention registry calls.

    query (1, heads, T, d), key and value (1, key_value_heads, T, d), cu_seqlens int32 (documents + 1,) -> (1, T, heads, d), None.
    sliding_window = W lets a token see itself and the W - 1 before it. softcap caps scores at c tanh(score / c).
    Raises ValueError for anything else that an architecture asks for.
    """
    if is_causal is False:
        raise ValueError(f"{type(module).__name__} asks packed attention to look ahead: this architecture cannot be trained here")
    harmless = "position_ids", "use_cache", "output_attentions", "cache_position"
    asked = [name for name, value in rest.items() if value is not None and value is not False and name not in harmless]
    if asked or attention_mask is not None or dropout:
        what = ", ".join(asked) or ("a mask of its own" if attention_mask is not None else "attention dropout")
        remedy = ("this architecture cannot be trained here" if asked or attention_mask is not None else
                  "set it to 0 in the model's config.json")
        raise ValueError(f"{type(module).__name__} asks packed attention for {what}, which it does not know: {remedy}")
    module.window = sliding_window  # what this layer asks for, which its configuration does not tell; see fused.install
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))  # (T, heads, d); t[0] would copy in the backward pass
    documents = len(cu_seqlens) - 1
    if q.is_cuda and documents * max_seqlen == len(q) and not sliding_window and not softcap:
        # all of one length: a plain batch, for which there are faster kernels
        from torch.nn.attention import SDPBackend, sdpa_kernel
        batch = [t.unflatten(0, (documents, max_seqlen)).transpose(1, 2) for t in (q, k, v)]  # (documents, heads, n, d)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            mixed = F.scaled_dot_product_attention(*batch, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
            return mixed.transpose(1, 2).flatten(0, 1)[None], None
    if use_varlen and not softcap:
        window = (sliding_window - 1 if sliding_window else -1, 0)
        return varlen()(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scaling, window_size=window)[None], None
    return attention_by_documents(q, k, v, cu_seqlens.tolist(), scaling, sliding_window, softcap)[None], None


@functools.cache
def varlen():
    """torch's variable-length attention, told to let key-value heads serve several query heads where its version must be told."""
    from torch.nn.attention.varlen import varlen_attn
    takes = inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in takes else varlen_attn


def attention_by_documents(q, k, v, bounds, scaling, sliding_window, softcap):
    """Causal attention within documents bounds[i]:bounds[i + 1], anywhere: q (T, heads, d), k, v (T, key_value_heads, d) -> (T, heads, d).

    Documents of about one length are padded into a batch: what is padded lies behind, where causal attention never looks.
    """
    lengths = [end - start for start, end in zip(bounds, bounds[1:])]
    if len(set(lengths)) == 1:
        batch = (t.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2) for t in (q, k, v))
        return causal_attention(*batch, scaling, sliding_window, softcap).transpose(1, 2).flatten(0, 1)
    pieces, batch = [None] * len(lengths), []
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for position, i in enumerate(by_length):
        batch.append(i)
        following = by_length[position + 1:position + 2]
        if following and lengths[following[0]] * 5 >= lengths[batch[0]] * 4:
            continue
        padded = (nn.utils.rnn.pad_sequence([t[bounds[i]:bounds[i + 1]] for i in batch], batch_first=True).transpose(1, 2)
                  for t in (q, k, v))
        for i, out in zip(batch, causal_attention(*padded, scaling, sliding_window, softcap).transpose(1, 2)):
            pieces[i] = out[:lengths[i]]
        batch = []
    return torch.cat(pieces)


def causal_attention(q, k, v, scaling, sliding_window=None, softcap=None):
    """q (documents, heads, n, d), k and v (documents, key_value_heads, n, d) -> (documents, heads, n, d)."""
    n, shared = q.shape[2], q.shape[1] // k.shape[1]  # heads that look at one head's keys and values
    window = sliding_window if sliding_window and sliding_window < n else 0
    by_hand = not softcap and q.device.type == "cpu" and q.dtype == torch.bfloat16 and n <= BY_HAND and quant.has_bf16("cpu")
    mask = None
    if window or softcap or by_hand:
        behind = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)[None, :]  # how far back a key lies
        mask = (behind >= 0) & (behind < (window or n))
    if by_hand:
        return ByHand.apply(q, k, v, torch.zeros(n, n, dtype=q.dtype).masked_fill_(~mask, -math.inf), scaling)
    k, v = (t.repeat_interleave(shared, dim=1) if shared > 1 else t for t in (k, v))
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)
    scores = scores.masked_fill_(~mask, -math.inf)
    return scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v


class ByHand(torch.autograd.Function):
    """softmax(scaling q k^T + hidden) v, for q (documents, heads, n, d), k and v (documents, key_value_heads, n, d) in 16 bits.

    hidden (n, n): 0 where a query sees a key, -inf elsewhere, behind the query always. Fewer passes over the scores: `hidden` is what
    their product begins with, and QUERIES queries at a time look no further than the last of them sees. Queries of heads that share
    their keys lie below each other, so that no key or value is copied for each. -> like q.
    """

    @staticmethod
    def forward(ctx, q, k, v, hidden, scaling):
        (documents, heads, n, d), shared = q.shape, q.shape[1] // k.shape[1]
        out = q.new_empty(documents, n, heads, v.shape[3]).transpose(1, 2)
        scaled = torch.mul(q, scaling, out=q.new_empty(q.shape)).view(-1, shared, n, d)
        keys, values = (t.reshape(-1, n, t.shape[3]) for t in (k, v))
        places = [slice(start, min(start + QUERIES, n)) for start in range(0, n, QUERIES)]
        weights = []  # (documents key_value_heads, shared queries, keys) each
        for here in places:
            seen = slice(0, here.stop)
            scores = torch.baddbmm(hidden[here, seen].repeat(shared, 1), scaled[:, :, here].flatten(1, 2), keys[:, seen].mT)
            weights.append(scores.softmax(dim=-1))
            out[:, :, here] = (weights[-1] @ values[:, seen]).view(documents, heads, -1, v.shape[3])
        ctx.save_for_backward(scaled, keys, values, *weights)
        ctx.places, ctx.documents, ctx.scaling = places, documents, scaling
        return out

    @staticmethod
    def backward(ctx, grad):
        scaled, keys, values, *weights = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(t) for t in (scaled, keys, values))
        grad = grad.reshape(*scaled.shape[:3], -1)
        for here, p in reversed([*zip(ctx.places, weights)]):  # the last queries see all keys
            seen, first = slice(0, here.stop), here is ctx.places[-1]
            g, q = (t[:, :, here].flatten(1, 2) for t in (grad, scaled))
            d_scores = torch._softmax_backward_data(g @ values[:, seen].mT, p, -1, p.dtype)
            for total, weight, rows in ((dv, p, g), (dk, d_scores, q)):
                torch.baddbmm(total[:, seen], weight.mT, rows, beta=0 if first else 1, out=total[:, seen])
            dq[:, :, here] = (d_scores @ keys[:, seen]).view_as(dq[:, :, here])
        dq = dq.mul_(ctx.scaling).flatten(0, 1)
        return *(t.unflatten(0, (ctx.documents, -1)) for t in (dq, dk, dv)), None, None


def varlen_works(device, dtype):
    """Whether torch's variable-length attention can serve here: a GPU, 16 bits, and a torch that has it."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def use_attention(network, name):
    """Send the network's attention through `name` of transformers' registry."""
    from transformers import AttentionInterface
    AttentionInterface.register(ATTENTION, packed_attention)
    network.config._attn_implementation = name


@contextlib.contextmanager
def own_attention(network):
    """transformers' own attention and batches inside the block (generation, comparisons), our packed documents again after it.

    "eager" where scores have a soft cap, which torch's fused attention would leave out without a word.
    """
    use_attention(network, "eager" if getattr(network.config, "attn_logit_softcapping", None) else "sdpa")
    try:
        yield
    finally:
        use_attention(network, ATTENTION)
