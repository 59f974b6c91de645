"""A merged model as one GGUF file, the form that llama.cpp and what is built on it read.

Llama-shaped models only: Llama and Mistral (without a sliding window), Qwen2, Qwen3, with byte-level BPE tokenizers whose
way of splitting text llama.cpp knows by name. Matrices as F16, BF16, F32 or Q8_0 (blocks of 32 with a scale each), vectors as
F32. Written one tensor at a time, then read back and compared with the merge: every tensor, every entry about the
tokenizer. Leaves out: SentencePiece tokenizers, other blocks than Q8_0 and other architectures; llama.cpp's own
converter makes those from a merged folder. Used by export.py.
"""
import copy
import json
import math

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from tqdm import tqdm

LLAMA, QWEN2, QWEN3 = gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.QWEN2, gguf.MODEL_ARCH.QWEN3
ARCHITECTURES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}  # by transformers' model_type
TYPES = {"fp16": ("F16", gguf.LlamaFileType.MOSTLY_F16), "bf16": ("BF16", gguf.LlamaFileType.MOSTLY_BF16),
         "fp32": ("F32", gguf.LlamaFileType.ALL_F32), "q8_0": ("Q8_0", gguf.LlamaFileType.MOSTLY_Q8_0)}
STORED = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "q8_0": torch.float32}  # what a matrix is merged in
NORMAL, CONTROL, USER_DEFINED, UNUSED = (int(gguf.TokenType[name]) for name in ("NORMAL", "CONTROL", "USER_DEFINED", "UNUSED"))

# How a tokenizer splits text before BPE -> the name that llama.cpp has for it
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
ELSEWHERE = "merge into a folder (--merge) and try llama.cpp's own convert_hf_to_gguf.py on that"


def splitting(tokenizer):
    """llama.cpp's name for the way a fast tokenizer splits text. Raises ValueError for one that it would split otherwise."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    if tree["model"]["type"] != "BPE" or (tree.get("decoder") or {}).get("type") == "Metaspace" or not tree["pre_tokenizer"]:
        raise ValueError(f"--gguf: the tokenizer is {tree['model']['type']} without a byte-level split (SentencePiece's kind), which is "
                         f"not written here; {ELSEWHERE}")
    normalizers = (tree["normalizer"] or {"type": "Sequence", "normalizers": []})
    normalizers = [part["type"] for part in normalizers.get("normalizers", [normalizers])]
    steps = tree["pre_tokenizer"].get("pretokenizers", [tree["pre_tokenizer"]])
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    if set(normalizers) <= {"NFC"} and byte_level == steps[-1:] and not byte_level[0]["add_prefix_space"]:
        before, own_regex = steps[:-1], byte_level[0]["use_regex"]
        if not before and own_regex:
            return "gpt-2"
        if own_regex and [step["type"] for step in before] == ["Digits"] and before[0]["individual_digits"]:
            return "smollm"
        split = before[0] if not own_regex and [step["type"] for step in before] == ["Split"] else {"behavior": ""}
        if split["behavior"] == "Isolated" and not split["invert"] and split["pattern"].get("Regex") in SPLITS:
            return SPLITS[split["pattern"]["Regex"]]
    raise ValueError("--gguf: llama.cpp has no name known here for the way this tokenizer splits text "
                     f"({json.dumps(tree['pre_tokenizer'])[:300]}), and would make other tokens of it; {ELSEWHERE}")


def check(source, tokenizer):
    """Raises ValueError naming what of a model could not be written so that llama.cpp computes the same."""
    config = source.network.config
    rope, scaled = config.rope_parameters or {}, (config.rope_parameters or {}).get("rope_type", "default")
    refused = f"--gguf: {type(source.network).__name__} "
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"{refused}is not among the architectures written here ({', '.join(ARCHITECTURES)}); {ELSEWHERE}")
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"{refused}has the activation {config.hidden_act}, where llama.cpp computes silu; {ELSEWHERE}")
    if getattr(config, "sliding_window", None) and (config.model_type == "mistral" or getattr(config, "use_sliding_window", False)):
        raise ValueError(f"{refused}attends through a sliding window of {config.sliding_window}, which llama.cpp leaves out for it; "
                         f"{ELSEWHERE}")
    known = scaled == "default" or scaled == "llama3" and config.model_type == "llama"
    if not known or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{refused}has the rotary embedding {json.dumps(rope)}; default and llama3 are written here; {ELSEWHERE}")
    names(source)
    splitting(tokenizer)


def names(source):
    """{tensor's name in the model: its name in GGUF}. Raises ValueError for a tensor that the format does not know."""
    config = source.network.config
    known = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in source.shapes}
    unknown = [name for name, other in found.items() if other is None]
    if unknown:
        raise ValueError(f"--gguf: {unknown[0]} has no name in a {config.model_type} GGUF file ({len(unknown)} such); {ELSEWHERE}")
    return found


def kind_of(shape, bits):
    """The GGUF type of a tensor: vectors stay F32, and rows that are not whole blocks stay F16."""
    name = TYPES[bits][0] if len(shape) > 1 else "F32"
    return gguf.GGMLQuantizationType["F16" if name == "Q8_0" and shape[-1] % 32 else name]


def size(source, bits):
    """Bytes that the tensors will take, about."""
    return sum(math.prod(quant_shape_to_byte_shape(shape, kind_of(shape, bits))) for shape in source.shapes.values())


def rows_in_pairs(tensor, heads):
    """Rows of a query or key projection (or its bias) in the order that llama.cpp's rotary embedding wants.

    transformers turns row i of a head with row i + d/2, llama.cpp's Llama row 2 i with row 2 i + 1.
    """
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def tensors(source, bits):
    """(GGUF's name, merged tensor fp32 on the CPU, its GGUF type, what export.Source.merged tells of the update), one at a time."""
    config, to = source.network.config, names(source)
    for name, shape in source.shapes.items():
        merged, sums = source.merged(name, STORED[bits] if len(shape) > 1 else torch.float32)
        merged = merged.float().cpu()
        part = name.rsplit(".", 2)[-2]
        if config.model_type in ("llama", "mistral") and part in ("q_proj", "k_proj"):
            merged = rows_in_pairs(merged, config.num_attention_heads if part == "q_proj" else config.num_key_value_heads)
        yield to[name], merged.contiguous(), kind_of(shape, bits), sums
    if scales_frequencies(config):  # by what each frequency is divided: transformers' own, with scaling and without
        plain = copy.deepcopy(config)
        plain.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
        rotary = type(source.network.get_decoder().rotary_emb)
        yield "rope_freqs.weight", (rotary(plain).inv_freq / rotary(config).inv_freq).float(), gguf.GGMLQuantizationType.F32, None


def scales_frequencies(config):
    """Whether a model turns its rotary frequencies into others, as Llama 3 does."""
    return (config.rope_parameters or {}).get("rope_type", "default") != "default"


def head_width(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def settings(source, tokenizer, end_ids, bits, title):
    """[(key, value, GGUF's type of it)] of all that is no tensor."""
    config, kinds = source.network.config, gguf.GGUFValueType
    architecture, head = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]], head_width(config)
    entries = [("general.architecture", architecture, kinds.STRING), ("general.name", title, kinds.STRING),
               ("general.file_type", int(TYPES[bits][1]), kinds.UINT32),
               ("general.quantization_version", gguf.GGML_QUANT_VERSION, kinds.UINT32)]
    whole = {"block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
             "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
             "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
             "attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head, "vocab_size": config.vocab_size}
    real = {"attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_parameters["rope_theta"]}
    entries += [(f"{architecture}.{name}", value, kinds.UINT32) for name, value in whole.items()]
    entries += [(f"{architecture}.{name}", value, kinds.FLOAT32) for name, value in real.items()]
    return entries + tokenizer_settings(tokenizer, end_ids, config.vocab_size)


def tokenizer_settings(tokenizer, end_ids, vocabulary):
    """The entries about the tokenizer: its tokens (unused ids named as llama.cpp's converter names them), merges, special ids, template."""
    kinds, tree = gguf.GGUFValueType, json.loads(tokenizer.backend_tokenizer.to_str())
    by_id, added = {i: token for token, i in tokenizer.get_vocab().items()}, tokenizer.added_tokens_decoder
    texts = [by_id.get(i, f"[PAD{i}]") for i in range(vocabulary)]
    added_type = lambda i: CONTROL if added[i].special else USER_DEFINED
    types = [UNUSED if i not in by_id else added_type(i) if i in added else NORMAL for i in range(vocabulary)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tree["model"]["merges"]]
    bos = tokenizer.bos_token_id
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in end_ids else end_ids[0]  # where the tokenizer's own ends nothing
    ids = {"bos": bos, "eos": eos, "eot": end_ids[0] if end_ids[0] != eos else None, "unknown": tokenizer.unk_token_id,
           "padding": tokenizer.pad_token_id}
    entries = [("tokenizer.ggml.model", "gpt2", kinds.STRING), ("tokenizer.ggml.pre", splitting(tokenizer), kinds.STRING),
               ("tokenizer.ggml.tokens", texts, kinds.STRING), ("tokenizer.ggml.token_type", types, kinds.INT32),
               ("tokenizer.ggml.merges", merges, kinds.STRING)]
    entries += [(f"tokenizer.ggml.{name}_token_id", int(i), kinds.UINT32) for name, i in ids.items() if i is not None]
    entries += [("tokenizer.ggml.add_bos_token", bos is not None and tokenizer("x")["input_ids"][:1] == [bos], kinds.BOOL)]
    return entries + ([("tokenizer.chat_template", tokenizer.chat_template, kinds.STRING)] if tokenizer.chat_template else [])


def write(path, source, tokenizer, end_ids, bits, title):
    """Write the GGUF file, read it back and compare it.

    Returns (entries, number of tensors, sum of what Source.merged told, largest difference to the merge). ValueError where more
    differs than the type explains.
    """
    entries = settings(source, tokenizer, end_ids, bits, title)
    writer = gguf.GGUFWriter(path, entries[0][1])  # which writes general.architecture itself
    for key, value, kind in entries[1:]:
        if isinstance(value, list) and value:
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=kind)
        elif not isinstance(value, list):  # an empty list has no type in GGUF
            writer.add_key_value(key, value, kind)
    config = source.network.config
    shapes = {name: (tuple(shape), kind_of(shape, bits)) for name, shape in zip(names(source).values(), source.shapes.values())}
    if scales_frequencies(config):
        shapes["rope_freqs.weight"] = ((head_width(config) // 2,), gguf.GGMLQuantizationType.F32)
    for name, (shape, kind) in shapes.items():
        stored = quant_shape_to_byte_shape(shape, kind)
        floats = {"F32": np.float32, "F16": np.float16}.get(kind.name)
        writer.add_tensor_info(name, shape if floats else stored, np.dtype(floats or np.uint8), math.prod(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    progress = tqdm(tensors(source, bits), total=len(shapes), desc="writing", unit="tensor", dynamic_ncols=True, disable=None)
    for _, tensor, kind, _ in progress:
        writer.write_tensor_data(quantize(tensor.numpy(), kind))
    writer.close()
    return entries, len(shapes), *compare(path, source, entries, bits)


def compare(path, source, entries, bits):
    """Read the file back: every entry, and every tensor against the merge, computed again. ValueError names the first that differs.

    Returns (sum of what Source.merged told, largest difference).
    """
    reader = gguf.GGUFReader(path)
    for key, value, kind in entries:
        found = reader.fields[key].contents() if key in reader.fields else []
        wanted = float(np.float32(value)) if kind == gguf.GGUFValueType.FLOAT32 else value
        if found != wanted:
            raise ValueError(f"{path.name}: read back, {key} is {str(found)[:80]} where {str(wanted)[:80]} was written; nothing was kept")
    there = {tensor.name: tensor for tensor in reader.tensors}
    told, worst = [], 0.0
    progress = tqdm(tensors(source, bits), total=len(there), desc="comparing", unit="tensor", dynamic_ncols=True, disable=None)
    for name, tensor, kind, sums in progress:
        stored = there.pop(name)
        back = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32)).reshape(tensor.shape)
        off = (back - tensor).abs()
        beyond = (off - explained(tensor, kind, bits)).max().item()
        if stored.tensor_type != kind or not beyond <= 0:
            raise ValueError(f"{path.name}: read back, {name} differs from the merge by {beyond:.3g} more than {kind.name} explains; "
                             "nothing was kept")
        worst = max(worst, off.max().item())
        told += [sums] if sums is not None else []
    if there:
        raise ValueError(f"{path.name}: read back, it holds {next(iter(there))}, which was not written; nothing was kept")
    return sum(told), worst


def explained(tensor, kind, bits):
    """How far a stored value may lie from the merge's: nothing, but where the merge was rounded on writing."""
    if kind.name == "Q8_0":  # half a step of max/127, and what 127 times the scale loses in fp16: 2^-11 of it, or 2^-25 where it is small
        largest = tensor.reshape(-1, 32).abs().amax(1, keepdim=True)
        return (largest * (0.5 / 127 + 2 ** -11) + 127 * 2 ** -25).mul(1.01).expand(-1, 32).reshape(tensor.shape)
    if kind.name == "F16" and bits == "q8_0":
        return tensor.abs() * 2 ** -11 + 2 ** -25
    return torch.zeros(())
