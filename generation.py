"""Greedy continuations of a batch of prompts: through transformers' own loop, or through one that replays a CUDA graph for each token.

A token of a small model is some thousand kernels of a few microseconds each, and launching them keeps the host busy far longer than
running them keeps the GPU. So where nothing waits for the GPU on the way, one token's forward pass and the choice of the next
token are recorded once and replayed: keys and values lie in a cache of fixed length, and which of its places are seen, the position
and who has ended stay on the device, where the host looks every few tokens. The graph is recorded anew in each call and its memory
given back behind it, since training follows. Leaves out: sampling, several ranks, and models whose layers remember
otherwise than by plain full attention, which all go through transformers' loop.
"""
import contextlib
import functools
import gc

import torch

import graphs
import quant
import ranks

LOOK = 8  # tokens from one look at who has ended, and whether the run is interrupted, to the next
STEP = 64  # the cache's length is a multiple of this: attention likes its mask's rows aligned, and lengths that it has met before


def serves(network, prompts):
    """'' if this network's tokens for so many prompts can and should be replayed, else why not, in words."""
    from transformers.cache_utils import DynamicCache, DynamicLayer
    if network.sharded or ranks.RANKS > 1:
        return "several ranks go from token to token together"
    if any(isinstance(module, quant.LLMInt8Weight) and module.waits(prompts) for module in network.modules()):
        return "LLM.int8() waits for the GPU"
    if network.get_input_embeddings().weight.device != network.device:
        return "embeddings are looked up on the host"
    layers = DynamicCache(config=network.config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return "its layers remember otherwise than by plain full attention"
    if not network._can_compile_fullgraph:
        return "transformers does not say that its forward pass goes one way whatever the values"
    if any("dynamic" in kind or kind == "longrope" for kind in rotations(network)):
        return "its rotary embedding waits to see how long the text is"
    if not network.graphs:
        return "memory.graphs is no"
    if torch.are_deterministic_algorithms_enabled():
        return "train.deterministic is set"
    return "" if network.device.type == "cuda" else "no GPU"


def rotations(network):
    """The kinds of rotary embedding in the network, as its configuration calls them."""
    found = [module.rope_type for module in network.modules() if hasattr(module, "rope_type")]
    return {kind for kinds in found for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])}


def by_transformers(network, ids, mask, max_new_tokens, end_ids, interrupted=()):
    """What transformers' own loop and cache write: lists of token ids, one a prompt and all of one length.

    ids, mask: int64 (prompts, width), padded on the left. Shorter than max_new_tokens where all prompts have ended or `interrupted` holds
    something; what follows a prompt's end is end_ids[0]. Draws no random numbers.
    """
    from transformers import GenerationConfig
    greedy = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end_ids, pad_token_id=end_ids[0], use_cache=True)
    stop = lambda ids, scores, **_: torch.full((len(ids),), bool(interrupted), device=ids.device)  # asked after each token
    written = network.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, stopping_criteria=[stop],
                               synced_gpus=network.sharded)
    return written[:, ids.shape[1]:].tolist()


@torch.no_grad()
def replayed(network, ids, mask, max_new_tokens, end_ids, interrupted=()):
    """What `by_transformers` writes, but where two tokens are as likely to within rounding; for networks that `serves` says '' to.

    The prompts go through the same forward pass as there; each token after the first through one of fixed shapes, of which the first
    runs eagerly and the others are replays. On a CPU all run eagerly. A few more columns may follow where all have ended.
    """
    from transformers import DynamicCache, StaticCache
    (count, width), device, dtype = ids.shape, ids.device, network.get_input_embeddings().weight.dtype
    forward = functools.partial(network, use_cache=True, logits_to_keep=1)
    begun = DynamicCache(config=network.config)
    logits = forward(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=begun).logits
    length = -(-(width + max_new_tokens) // STEP) * STEP
    cache = StaticCache(config=network.config, max_cache_len=length)
    for number, layer in enumerate(begun.layers):
        cache.update(layer.keys, layer.values, number)
        layer.keys = layer.values = None

    written = torch.full((count, length), end_ids[0], device=device)  # by place in the cache: the prompt's columns stay unused
    never = torch.finfo(dtype).min / 2  # finite, even times log2(e): a kernel may meet a stretch of keys that are all unseen
    seen = torch.full((count, 1, 1, length), never, device=device, dtype=dtype)  # added to the scores
    seen[..., :width].masked_fill_(mask[:, None, None].bool(), 0)
    token, place, position = written[:, :1].clone(), torch.full((1,), width, device=device), mask.sum(1, keepdim=True)
    ended, ends = torch.zeros(count, device=device, dtype=torch.bool), torch.tensor(end_ids, device=device)

    def choose(logits):
        token.copy_(logits[:, -1:].float().argmax(-1).masked_fill_(ended[:, None], end_ids[0]))
        written.index_copy_(1, place, token)
        ended.logical_or_((token == ends).any(1))

    def step():
        seen.index_fill_(3, place, 0)
        following = forward(input_ids=token, attention_mask=seen, position_ids=position, past_key_values=cache).logits
        place.add_(1)
        position.add_(1)
        choose(following)

    choose(logits)
    del logits
    done, advance = 1, step
    with graphs.beside(device) as stream, contextlib.ExitStack() as held:
        while done < max_new_tokens and not ((done - 1) % LOOK == 0 and (interrupted or ended.all())):
            if done == 2 and stream:  # the first step has compiled, and allocated once, what recording may not
                advance = held.enter_context(recorded(step, stream)).replay
            advance()
            done += 1
        return written[:, width:width + done].tolist()


@contextlib.contextmanager
def recorded(step, stream):
    """A CUDA graph of `step`, which has run on `stream` before; behind the block its memory is the device's again."""
    graph = torch.cuda.CUDAGraph()
    try:
        gc.disable()  # what would be collected while recording may be another graph
        try:
            with graphs.recording(graph, stream=stream, capture_error_mode="thread_local"):
                step()
        finally:
            gc.enable()
        yield graph
    finally:
        stream.synchronize()
        graph.reset()
        torch.cuda.empty_cache()
