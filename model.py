"""The network: a transformers architecture with frozen quantised weights, adapters, packed attention, and the loss.

transformers builds the architecture without memory; weights stream from safetensors one at a time and are quantised as they
arrive, so that loading never holds more than the quantised model and one tensor. Every projection becomes an AdaptedLinear
(lora_layers.py). Documents are packed one after another without padding: (tokens, ...) everywhere, no batch dimension.

Leaves out: mixture-of-experts weights, and whatever an architecture has that its packed loss does not show: refused by name.
"""
import contextlib
import functools
import gc
import math
import sys
import textwrap
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import attention
import fused
import gpu_kernels
import loading
import lora_layers
import quant
import ranks


# ------------------------------------------------------------------------------------------------------------- the loss

BLOCK = 16  # rows of logits that are worked on together on a CPU
HOST_ROWS = 256  # rows of logits that are alive there


def cross_entropy(logits, targets, softcap, with_grad):
    """The slow twin of gpu_kernels.cross_entropy, in fp32 at least: (nll (S,), correct bool (S,)) of logits (S, vocabulary).

    With `with_grad` the logits are overwritten by d sum(nll) / d logits. BLOCK rows at a time, so that what is made of them stays in
    a processor's cache.
    """
    scratch = logits.new_empty(min(BLOCK, len(logits)), logits.shape[1], dtype=torch.promote_types(logits.dtype, torch.float32))
    nll, correct = scratch.new_empty(len(logits)), torch.empty_like(targets, dtype=torch.bool)
    for start in range(0, len(logits), BLOCK):
        here = slice(start, start + BLOCK)
        real, index = targets[here, None] >= 0, targets[here, None].clamp_min(0)  # (rows, 1) each, as all below
        wide = scratch[:len(index)].copy_(logits[here])
        if softcap:
            capped = torch.tanh(wide / softcap)
            torch.mul(capped, softcap, out=wide)
        largest, best = wide.max(dim=-1, keepdim=True)
        correct[here, None] = (best == targets[here, None])
        behind = largest - wide.gather(1, index)
        total = wide.sub_(largest).exp_().sum(dim=-1, keepdim=True)
        nll[here, None] = torch.where(real, total.log() + behind, 0)
        if with_grad:  # softmax - one-hot, and the chain rule through the cap
            wide.mul_(real / total).scatter_add_(1, index, -real.to(wide.dtype))
            logits[here] = wide.mul_(1 - capped * capped) if softcap else wide
    return nll, correct


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of supervised positions, with never more than `chunk` rows of logits alive.

    The gradient of the hidden states is formed in the forward pass, beside the logits it needs, and scaled in the backward pass.
    Arguments: hidden (S, width), head (vocabulary, width), bias or None, targets int64 (S,) with -100 for "no target", softcap or None.
    Returns (sum fp32 scalar, nll fp32 (S,), correct bool (S,)), where nll is 0 and correct false without a target.
    """

    @staticmethod
    def forward(ctx, hidden, head, bias, targets, chunk, softcap):
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        chunk = chunk if hidden.is_cuda else min(chunk, HOST_ROWS)
        room, parts = hidden.new_empty(min(chunk, len(hidden)), len(head)), []
        for start in range(0, len(hidden), chunk):
            here = slice(start, start + chunk)
            h = hidden[here]
            logits = room[:len(h)]
            torch.mm(h, head.T, out=logits) if bias is None else torch.addmm(bias, h, head.T, out=logits)
            per_token = gpu_kernels.cross_entropy if gpu_kernels.on_gpu(logits) else cross_entropy
            parts.append(per_token(logits, targets[here], softcap, grad is not None))  # the logits become their gradient
            if grad is not None:
                torch.mm(logits, head, out=grad[here])
        nll, correct = (torch.cat(part) for part in zip(*parts)) if parts else (
            hidden.new_zeros(0).float(), hidden.new_zeros(0, dtype=torch.bool))
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(nll, correct)
        return nll.sum(), nll, correct

    @staticmethod
    def backward(ctx, grad_sum, *_):
        grad, = ctx.saved_tensors
        return grad * grad_sum.to(grad.dtype), None, None, None, None, None


def hidden_states(network, batch):
    """The last hidden states (T, width) of a packed data.MicroBatch on the network's device."""
    network.adapter_memory.refresh()
    given = {"input_ids": batch.input_ids[None]}
    if network.fused_layers and torch.is_grad_enabled():
        embedded = network.get_input_embeddings()(batch.input_ids[None])
        given = {"inputs_embeds": fused.Start.apply(embedded, torch.zeros((), device=embedded.device, requires_grad=True))}
    out = network.get_decoder()(**given, position_ids=batch.position_ids[None], use_cache=False,
                                cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, use_varlen=network.use_varlen)
    return out.last_hidden_state.squeeze(0)


def summed_loss(network, batch):
    """(sum of -log p over the supervised tokens as a scalar, nll (S,), correct (S,)) of a packed data.MicroBatch.

    The one loss of training and evaluation; the caller divides by the number of supervised tokens of all it sums over.
    """
    hidden = hidden_states(network, batch).index_select(0, batch.rows)  # (S, width)
    head = network.get_output_embeddings()
    head_bias, softcap = getattr(head, "bias", None), getattr(network.config, "final_logit_softcapping", None)
    return ChunkedCrossEntropy.apply(hidden, head.weight, head_bias, batch.targets, network.loss_chunk, softcap)


# -------------------------------------------------------------------------------------------------------------- loading


def load(config, device):
    """The network of config.model on `device`, quantised, with untrained adapters, ready to train.

    A is drawn from train.seed and B = 0, or both are as lora.init says. Never holds more than the quantised model and one tensor.
    Raises ValueError naming what is missing, does not fit or is not known.
    """
    device, config = torch.device(device), quant.settled(config, device)
    dtype = quant.DTYPES[config.model.compute_dtype]
    if dtype == torch.bfloat16 and not quant.has_bf16(device):
        tell_of_emulation("GPU" if device.type == "cuda" else "CPU", quant.dtype_for(config.model, device))
    use_varlen = config.model.attention != "documents" and attention.varlen_works(device, dtype)
    if config.model.attention == "varlen" and not use_varlen:
        raise ValueError("model.attention: varlen needs a GPU of compute capability 8.0 or more and bf16 or fp16, "
                         f"got {device} and {config.model.compute_dtype}; choose auto")
    folder = loading.local_folder(config.model.path, config.model.revision)
    network = loading.architecture(folder, dtype)
    files = loading.weight_files(folder)
    expected = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    tied = set(network._tied_weights_keys or ()) if network.config.tie_word_embeddings else set()
    missing = sorted(set(expected) - set(files) - tied)
    if missing:
        if any(".experts." in name for name in missing):
            raise ValueError(f"model.path: {type(network).__name__} is a mixture of experts, whose weights are not quantised and "
                             "adapted here; give a dense model")
        raise ValueError(f"{folder}: {len(missing)} weights of {type(network).__name__} are not in its files under that name, the first is "
                         f"{missing[0]}; copy the folder again if it is not whole (weights that transformers renames as it loads are not "
                         "read here)")
    inject(network, config.lora, device, torch.float64 if dtype == torch.float64 else torch.float32)
    network.sharded = config.memory.shard and ranks.RANKS > 1
    layers = {}
    if network.sharded:
        decoder_layers = set(network.get_decoder().layers)
        layers = {f"{name}.": module for name, module in network.named_modules() if module in decoder_layers}
    awaited = {place: sum(name.startswith(place) for name in expected) for place in layers}
    for name in [name for name in files if name in expected and name not in tied]:  # in file order: each shard is read through once
        tensor = loading.read_tensor(files[name], name, device)
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{files[name]}: {name} has the shape {tuple(tensor.shape)}, {type(network).__name__} needs {expected[name]}")
        if tensor.dtype not in quant.DTYPES.values():
            raise ValueError(f"{files[name]}: {name} is stored as {tensor.dtype}; give the model with 16 or 32-bit weights, "
                             "it is quantised here")
        module_name, _, leaf = name.rpartition(".")
        module = network.get_submodule(module_name)
        if isinstance(module, lora_layers.AdaptedLinear) and leaf == "weight":
            module.weight = quant.quantize(tensor, config.model, dtype)
            if module.r and config.lora.init == "loftq":
                lora_layers.correct(module, tensor)
        else:
            setattr(module, leaf, nn.Parameter(tensor.to(dtype), requires_grad=False))
        del tensor
        for place in [place for place in layers if name.startswith(place)]:
            awaited[place] -= 1
            if not awaited[place]:  # the layer is whole: from here on each rank holds its part of it
                shard(layers[place], device)
    if network.sharded:
        shard(network.get_decoder(), device)
    network.tie_weights()
    network.to(device)  # buffers only: every parameter is there already
    network.requires_grad_(False)
    for parameter in lora_layers.adapters(network).values():
        parameter.requires_grad_(True)
    if config.lora.init == "zero":
        lora_layers.draw_adapters(network, config.train.seed)
    lora_layers.measure_rows(network)
    network.adapter_memory = lora_layers.AdapterMemory(network, dtype)
    keep_dequantized(network, config.memory, dtype)
    network.loss_chunk = config.memory.loss_chunk
    network.graphs = config.memory.graphs != "no"
    network.use_varlen = use_varlen
    attention.use_attention(network, attention.ATTENTION)
    network.train()
    network.fused_layers = 0
    compare_with_transformers(network)
    network.fused_layers = fused.install(network, network.adapter_memory, attention.packed_attention) if config.memory.fused else 0
    return network


@functools.cache
def tell_of_emulation(device, suits):
    """Say once that bf16 is emulated on a device ("CPU" or "GPU"), and the remedy. suits: see quant.dtype_for."""
    print(textwrap.fill(f"note: this {device} has no bf16 arithmetic and emulates it, which can take many times as long; " + (
        "LLM.int8() needs it: --model.quant=int8 does not" if suits == "bf16" else f"--model.compute_dtype={suits} is faster on it"), 80),
        file=sys.stderr)


def shard(module, device):
    """Split the frozen weights in `module` over the ranks (FSDP2: torch.distributed.fsdp.fully_shard), those of sharded modules in it aside.

    A layer is gathered when its forward or backward pass begins, the next one meanwhile, and split again behind it. Adapters, norms,
    embeddings and head stay whole on every rank, and so does what is smaller than a split would save.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    weights = [part for part in module.modules() if isinstance(part, quant.FrozenWeight)]
    split = {parameter for weight in weights for name, parameter in weight.named_parameters()
             if parameter.ndim and name != "scale_codebook"}
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # a layer returns a view; nothing writes into it
    with FrozenIntegers():
        fully_shard(module, mesh=init_device_mesh(device.type, (ranks.RANKS,)), ignored_params=set(module.parameters()) - split,
                    reshard_after_forward=True)

    @contextlib.contextmanager
    def gather():
        module.unshard()
        try:
            yield
        finally:
            module.reshard()

    for weight in weights:
        weight.gather = weight.gather or gather


class FrozenIntegers(torch.overrides.TorchFunctionMode):
    """Tensors of integers leave requires_grad_ as they are: torch 2.11 asks it of each part of a weight, to take it back at once."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.requires_grad_ and not args[0].is_floating_point():
            return args[0]
        return function(*args, **(kwargs or {}))


def fully_supervised(documents):
    """A packed micro-batch of documents, int64 (n,) each, in which every token but a document's first is supervised."""
    import types
    lengths, device = [len(document) for document in documents], documents[0].device
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return types.SimpleNamespace(
        input_ids=torch.cat(documents), position_ids=torch.cat([torch.arange(n, device=device) for n in lengths]),
        cu_seqlens=ends.to(device, torch.int32), max_seqlen=max(lengths), targets=torch.cat([document[1:] for document in documents]),
        rows=torch.cat([torch.arange(start, start + n - 1, device=device) for start, n in zip(ends.tolist(), lengths)]))


def compare_with_transformers(network):
    """Refuse an architecture in which documents cross when packed, or whose packed loss is not that of its own logits.

    What the first two tokens of a second document come to may depend on nothing but themselves: the gradient to every other embedding is
    exactly zero, in any dtype. What does not cross (scales of the logits, positions, dropout that belongs to the architecture) shows in
    the losses, packed as in training and through transformers' own forward pass: they may differ by rounding, which is told from the rest
    by the spread of the losses over the tokens. In 16 bits SmolLM2-135M differs by 0.035 of it (llm_int8, where packed neighbours choose
    the outliers: 0.13), the wrong architectures of the tests by 0.15 and more.
    """
    name, device, table = type(network).__name__, network.device, network.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    first, second, third, fourth = (torch.randint(0, len(table.weight), (n,), generator=generator).to(device) for n in (29, 19, 4, 3))
    adapted, embedded = [module for module in network.modules() if isinstance(module, lora_layers.AdaptedLinear)], []
    try:
        for module in adapted:  # so that dropout, if any is found, is the architecture's
            module.eval()
        with torch.no_grad():
            packed = summed_loss(network, fully_supervised([first, second]))[1].double()
        hook = table.register_forward_hook(lambda module, ids, out: embedded.append(out.requires_grad_()))
        try:
            hidden = hidden_states(network, fully_supervised([third, fourth]))
        finally:
            hook.remove()
        chosen = hidden[4:6] * torch.randn(2, hidden.shape[1], generator=generator).to(hidden)
        crossing = torch.autograd.grad(chosen.sum(), embedded[0], materialize_grads=True)[0].squeeze(0).abs().sum(dim=-1)  # (T,)
        padded = nn.utils.rnn.pad_sequence([first, second], batch_first=True)  # what is padded lies behind, where no document looks
        with torch.no_grad(), attention.own_attention(network):
            logits = network.eval()(input_ids=padded, use_cache=False).logits.double()
        own = torch.cat([F.cross_entropy(one[:len(d) - 1], d[1:], reduction="none") for one, d in zip(logits, (first, second))])
    except (TypeError, AttributeError, RuntimeError, IndexError, ValueError) as error:
        if out_of_memory(error):
            raise
        why = str(error) if "packed attention" in str(error) else f"its code is not made for them ({type(error).__name__}: {error})"
        raise ValueError(f"model.path: {name} cannot be trained on packed documents here: {why}") from error
    finally:
        network.train()
    if not own.isfinite().all():
        raise ValueError(f"model.path: the loss of this {name} is not finite, computed by transformers in {hidden.dtype}, on random "
                         "tokens: its weights hold what is no number, or are too large for that dtype (bf16 holds larger ones than fp16)")
    crossing[4:6] = 0
    if crossing.any():
        raise ValueError(f"model.path: {name} cannot be trained here: packed documents change each other in it "
                         f"(of {len(crossing) - 2} places that a token must not depend on, it does on {int(crossing.count_nonzero())})")
    apart, spread = (packed - own).abs(), own.std().item() + 1e-6 * own.mean().item()  # no spread: a head that says the same of everything
    difference = max(part.median().item() for part in apart.split([28, 18])) / spread
    quantised_activations = any(isinstance(module.weight, quant.LLMInt8Weight) for module in adapted)
    allowed = 1e-3 if hidden.dtype.itemsize > 2 else 0.25 if quantised_activations else 0.1
    if not difference < allowed:
        own_dropout = {key: value for key, value in network.config.to_dict().items()
                       if ("dropout" in key or "pdrop" in key) and type(value) is float and value > 0}
        remedy = f"; set {', '.join(own_dropout)} to 0 in its config.json: dropout of its own is not taken over" if own_dropout else ""
        raise ValueError(f"model.path: {name} cannot be trained here: the loss of packed documents is not the one of transformers' own "
                         f"forward pass (they differ by {difference:.2g} of its spread), so something in this architecture is not "
                         f"known to rawlora{remedy}")


def inject(network, lora, device, adapter_dtype):
    """Put an lora_layers.AdaptedLinear in the place of every linear layer but the head, with an adapter where lora.targets names it.

    A target is a module's name or the end of it after a dot, as in PEFT. Raises ValueError for a target that matches nothing.
    """
    head = network.get_output_embeddings()
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear) and module is not head}
    if not linear:
        raise ValueError(f"model.path: {type(network).__name__} has no linear projections to quantise and adapt, "
                         "so it cannot be trained here")
    everything = lora.targets == ["all-linear"]
    for target in () if everything else lora.targets:
        if not any(("." + name).endswith("." + target) for name in linear):
            there = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"lora.targets: {target!r} matches no projection of {type(network).__name__}; it has {', '.join(there)}")
    widest = max(max(module.in_features, module.out_features) for module in linear.values())
    if lora.r > widest:
        raise ValueError(f"lora.r: {lora.r:,} is beyond the width of every projection of {type(network).__name__} "
                         f"(at most {widest:,}), and an update has no higher rank than that; lower it")
    scaling = lora.alpha / (math.sqrt(lora.r) if lora.rslora else lora.r)
    for name, module in linear.items():
        adapted = everything or any(("." + name).endswith("." + target) for target in lora.targets)
        network.set_submodule(name, lora_layers.AdaptedLinear(
            module.in_features, module.out_features, module.bias, lora.r if adapted else 0, scaling, lora.dropout, device,
            adapter_dtype, lora.dora))


def free_memory(device):
    """Bytes of memory that are free on the device (a GPU's own, or the machine's)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def keep_dequantized(network, memory, dtype):
    """Keep dequantised copies of all quantised weights: asked for, or (auto) where nothing need be recomputed and they take a quarter
    of the free memory at most."""
    if network.sharded:  # a copy would be whole on every rank
        return
    for module in network.modules():
        if isinstance(module, quant.PlainWeight):
            module.keep(dtype)
    weights = quant.quantised(network)
    size = sum(weight.in_features * weight.out_features * dtype.itemsize for weight in weights)
    free = free_memory(network.device)
    if network.device.type == "cuda" and memory.budget_gib:
        free = min(free, memory.budget_gib * 2**30 - torch.cuda.memory_allocated(network.device))
    fits = not any(ranks.most(size >= free / 4))
    nothing_recomputed = memory.checkpoint_layers <= 0 or network.device.type == "cpu"
    if memory.keep_dequantized == "yes" or memory.keep_dequantized == "auto" and nothing_recomputed and fits:
        for weight in weights:
            weight.keep(dtype)


class DoesNotFit(ValueError):
    """A row that does not fit into memory even alone."""


def out_of_memory(error):
    """Whether an error says that memory ran out, the GPU's or the host's."""
    host_is_full = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or host_is_full


def release_memory():
    """Give back what an attempt left that ran out of memory. Call when its error is no longer held: the error keeps its tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller(batch, rows, error, sharded=False):
    """Tokens for the next attempt after `batch` raised `error`: half of its own. Raises `error` itself where that is no lack of memory.

    Raises DoesNotFit with the row's name and length where the micro-batch holds one row and cannot be made smaller.
    """
    if not out_of_memory(error):
        raise error
    if sharded:
        raise ValueError(f"memory ran out over {len(batch.input_ids):,} tokens, and a rank whose weights are sharded cannot try again "
                         "alone; lower memory.max_tokens, or raise memory.checkpoint_layers; the newest checkpoint is whole") from error
    if len(batch.samples) == 1:
        row = batch.samples[0]
        size = int(rows.offsets[row + 1] - rows.offsets[row])
        raise DoesNotFit(f"{rows.names[row]}: this row of {size:,} tokens does not fit into memory even alone; "
                         "lower data.max_length, or raise memory.checkpoint_layers") from error
    return len(batch.input_ids) // 2


def recompute(network, layers, offload=False):
    """Recompute the activations of the first `layers` decoder layers, and no others, in the backward pass instead of storing them.

    Non-reentrant checkpointing (Chen et al. 2016): the gradients are the same, and frozen embeddings do not cut the graph. Fused layers
    have their own, which leaves out what no gradient needs and, with `offload`, keeps the layers' inputs in the host's memory.
    """
    store = fused.HostStore(network.device) if offload else None
    for number, layer in enumerate(network.get_decoder().layers):
        if isinstance(layer.forward, fused.FusedLayer):
            layer.forward.recomputed, layer.forward.store = number < layers, store
            continue
        plain = layer.__dict__.pop("stored", layer.forward)
        layer.forward = plain
        if number < layers:
            layer.stored = plain
            layer.forward = lambda *args, plain=plain, **kwargs: (
                checkpoint(plain, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else plain(*args, **kwargs))


class HostEmbedding(nn.Module):
    """An embedding whose table lies in the host's memory: looked up there, and only the rows that are asked for are sent.

    The table is no parameter, so that the network's device stays the one that it computes on.
    """

    def __init__(self, weight, device):
        super().__init__()
        self.weight, self.device = weight.detach().cpu(), device

    def forward(self, ids):
        """ids int64, any shape and device -> rows on the network's device."""
        return self.weight[ids.cpu()].to(self.device, non_blocking=True)


def embeddings_to_host(network):
    """Move the embedding table to the host where it is no head too; that much of the device's memory becomes free.

    Returns whether it lies there.
    """
    table, head = network.get_input_embeddings(), network.get_output_embeddings()
    if isinstance(table, HostEmbedding):
        return True
    if type(table) is not nn.Embedding or head.weight is table.weight:  # another kind scales or pads what it looks up
        return False
    network.set_input_embeddings(HostEmbedding(table.weight, network.device))
    return True


def drop_dequantized(network):
    """Give up the kept copies of quantised weights: they are dequantised at each use from now on."""
    network.adapter_memory.kept = None
    for layer in network.get_decoder().layers:
        for group in layer.forward.groups if isinstance(layer.forward, fused.FusedLayer) else ():
            group.kept = None
    for weight in quant.quantised(network):
        weight.kept = None


# ------------------------------------------------------------------------------------------------------------- adapters


def frozen(network):
    """(name, tensor) of everything that never trains: quantised storage, embeddings, norms, head. For quant.fingerprint."""
    return [(name, parameter) for name, parameter in network.named_parameters() if not parameter.requires_grad]


def memory_table(network):
    """{part: (dtypes, bytes)} of what the network holds: frozen projections, kept copies, adapters, embeddings and head, the rest."""
    parts = {}
    def count(part, tensor):
        tensor = tensor.to_local() if isinstance(tensor, quant.DTensor) else tensor
        dtypes, size = parts.get(part, (set(), 0))
        parts[part] = (dtypes | {str(tensor.dtype).removeprefix("torch.")}, size + tensor.numel() * tensor.dtype.itemsize)
    embeddings = {id(network.get_input_embeddings().weight), id(network.get_output_embeddings().weight)}
    storage = {id(parameter) for module in network.modules() if isinstance(module, quant.FrozenWeight) for parameter in module.parameters()}
    for parameter in network.parameters():
        part = ("adapters" if parameter.requires_grad else "embeddings and head" if id(parameter) in embeddings else
                "projections" if id(parameter) in storage else "norms and biases")
        count(part, parameter)
    for weight in quant.quantised(network):
        if weight.kept is not None:
            count("dequantised copies", weight.kept)
    return parts
