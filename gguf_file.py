"""A merged model as one GGUF file, the form that llama.cpp and what is built on it read.

Llama-shaped models only: Llama and Mistral (without a sliding window), Qwen2, Qwen3, with byte-level BPE tokenizers whose
way of splitting text llama.cpp knows by name. Matrices as F16, BF16, F32 or Q8_0 (blocks of 32 with a scale each), vectors as
F32. Written one tensor at a time, then read back and compared with the merge: every tensor, every entry about the
tokenizer. Leaves out: SentencePiece tokenizers, other blocks than Q8_0 and other architectures; llama.cpp's own
converter makes those from a merged folder. Used by export.py.
"""
import json
import math

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from tqdm import tqdm

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
TYPES = {"fp16": ("F16", gguf.LlamaFileType.MOSTLY_F16), "bf16": ("BF16", gguf.LlamaFileType.MOSTLY_BF16), "fp32": ("F32", gguf.LlamaFileType.ALL_F32), "q8_0": ("Q8_0", gguf.LlamaFileType.MOSTLY_Q8_0)}
STORED = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "q8_0": torch.float32}  # what a matrix is merged in
NORMAL, CONTROL, USER_DEFINED, UNUSED = (int(gguf.TokenType[name]) for name in ("NORMAL", "CONTROL", "USER_DEFINED", "UNUSED"))

# How a tokenizer splits text before BPE -> the name that llama.cpp has for it
GPT2 = {"type": "ByteLevel", "use_regex": True}
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
ELSEWHERE = "merge into a folder (--merge) and try llama.cpp's own convert_hf_to_gguf.py on that"


def splitting(tokenizer):
    """llama.cpp's name for the way a fast tokenizer splits text. Raises ValueError for one that it would split otherwise."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    if tree["model"]["type"] != "BPE" or (tree.get("decoder") or {}).get("type") == "Metaspace" or not tree["pre_tokenizer"]:
        raise ValueError(f"--gguf: the tokenizer is {tree['model']['type']} without a byte-level split (SentencePiece's kind), which is not written here; {ELSEWHERE}")
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
        if not own_regex and len(before) == 1 and before[0]["type"] == "Split" and before[0]["behavior"] == "Isolated" and not before[0]["invert"]:
            name = SPLITS.get(before[0]["pattern"].get("Regex"))
            if name:
                return name
    raise ValueError(f"--gguf: llama.cpp has no name known here for the way this tokenizer splits text ({json.dumps(tree['pre_tokenizer'])[:300]}), and would make other tokens of it; {ELSEWHERE}")


def check(source, tokenizer):
    """Raises ValueError naming what of a model could not be written so that llama.cpp computes the same."""
    config = source.network.config
    rope, head = config.rope_parameters or {}, config.head_dim if getattr(config, "head_dim", None) else config.hidden_size // config.num_attention_heads
    refused = f"--gguf: {type(source.network).__name__} "
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"{refused}is not among the architectures written here ({', '.join(ARCHITECTURES)}); {ELSEWHERE}")
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"{refused}has the activation {config.hidden_act}, where llama.cpp computes silu; {ELSEWHERE}")
    if getattr(config, "sliding_window", None) and (config.model_type == "mistral" or getattr(config, "use_sliding_window", False)):
        raise ValueError(f"{refused}attends through a sliding window of {config.sliding_window}, which llama.cpp leaves out for it; {ELSEWHERE}")
    if rope.get("rope_type", "default") not in ("default", "llama3") or rope.get("rope_type") == "llama3" and config.model_type != "llama" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{refused}has the rotary embedding {json.dumps(rope)}; default and llama3 are written here; {ELSEWHERE}")
    names(source)
    splitting(tokenizer)
    return head


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
    """(GGUF's name, merged tensor fp32 on the CPU, its GGUF type, sums of export.fate or None), one at a time."""
    config, to = source.network.config, names(source)
    for name, shape in source.shapes.items():
        merged, sums = source.merged(name, STORED[bits] if len(shape) > 1 else torch.float32)
        merged = merged.float().cpu()
        part = name.rsplit(".", 2)[-2]
        if config.model_type in ("llama", "mistral") and part in ("q_proj", "k_proj"):
            merged = rows_in_pairs(merged, config.num_attention_heads if part == "q_proj" else config.num_key_value_heads)
        yield to[name], merged.contiguous(), kind_of(shape, bits), sums
    if (config.rope_parameters or {}).get("rope_type") == "llama3":  # by what each frequency is divided: transformers' own, once without scaling
        import copy
        plain = copy.deepcopy(config)
        plain.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
        rotary = type(source.network.get_decoder().rotary_emb)
        factors = rotary(plain).inv_freq / rotary(config).inv_freq
        yield "rope_freqs.weight", factors.float(), gguf.GGMLQuantizationType.F32, None


def settings(source, tokenizer, end_ids, bits, title):
    """[(key, value, GGUF's type of it)] of all that is no tensor."""
    config, kinds = source.network.config, gguf.GGUFValueType
    architecture, head = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]], check(source, tokenizer)
    entries = [("general.architecture", architecture, kinds.STRING), ("general.name", title, kinds.STRING), ("general.file_type", int(TYPES[bits][1]), kinds.UINT32),
               ("general.quantization_version", gguf.GGML_QUANT_VERSION, kinds.UINT32)]
    numbers = {"block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
               "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads, "attention.key_length": head, "attention.value_length": head,
               "rope.dimension_count": head, "vocab_size": config.vocab_size}
    entries += [(f"{architecture}.{name}", value, kinds.UINT32) for name, value in numbers.items()]
    entries += [(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps, kinds.FLOAT32), (f"{architecture}.rope.freq_base", config.rope_parameters["rope_theta"], kinds.FLOAT32)]
    return entries + tokenizer_settings(tokenizer, end_ids, config.vocab_size)


def tokenizer_settings(tokenizer, end_ids, vocabulary):
    """The entries about the tokenizer: its tokens (unused ids named as llama.cpp's converter names them), merges, special ids, template."""
    kinds, tree = gguf.GGUFValueType, json.loads(tokenizer.backend_tokenizer.to_str())
    by_id, added = {i: token for token, i in tokenizer.get_vocab().items()}, tokenizer.added_tokens_decoder
    texts = [by_id.get(i, f"[PAD{i}]") for i in range(vocabulary)]
    types = [UNUSED if i not in by_id else NORMAL if i not in added else CONTROL if added[i].special else USER_DEFINED for i in range(vocabulary)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tree["model"]["merges"]]
    bos = tokenizer.bos_token_id
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in end_ids else end_ids[0]  # where the tokenizer's own ends nothing
    ids = {"bos": bos, "eos": eos, "eot": end_ids[0] if end_ids[0] != eos else None, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    entries = [("tokenizer.ggml.model", "gpt2", kinds.STRING), ("tokenizer.ggml.pre", splitting(tokenizer), kinds.STRING),
               ("tokenizer.ggml.tokens", texts, kinds.STRING), ("tokenizer.ggml.token_type", types, kinds.INT32), ("tokenizer.ggml.merges", merges, kinds.STRING)]
    entries += [(f"tokenizer.ggml.{name}_token_id", int(i), kinds.UINT32) for name, i in ids.items() if i is not None]
    entries += [("tokenizer.ggml.add_bos_token", bos is not None and tokenizer("x")["input_ids"][:1] == [bos], kinds.BOOL)]
    return entries + ([("tokenizer.chat_template", tokenizer.chat_template, kinds.STRING)] if tokenizer.chat_template else [])


def write(path, source, tokenizer, end_ids, bits, title):
    """Write the GGUF file, read it back and compare it. Returns what to tell people; raises ValueError where the two differ."""
    entries = settings(source, tokenizer, end_ids, bits, title)
    writer = gguf.GGUFWriter(path, entries[0][1])  # which writes general.architecture itself
    for key, value, kind in entries[1:]:
        if isinstance(value, list) and not value:
            continue  # an empty list has no type in GGUF
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY if isinstance(value, list) else kind, sub_type=kind if isinstance(value, list) else None)
    shapes = {name: (tuple(shape), kind_of(shape, bits)) for name, shape in zip(names(source).values(), source.shapes.values())}
    if (source.network.config.rope_parameters or {}).get("rope_type") == "llama3":
        shapes["rope_freqs.weight"] = ((entries_of(entries, "rope.dimension_count") // 2,), gguf.GGMLQuantizationType.F32)
    for name, (shape, kind) in shapes.items():
        stored = quant_shape_to_byte_shape(shape, kind)
        floats = {"F32": np.float32, "F16": np.float16}.get(kind.name)
        writer.add_tensor_info(name, shape if floats else stored, np.dtype(floats or np.uint8), math.prod(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor, kind, _ in tqdm(tensors(source, bits), total=len(shapes), desc="writing", unit="tensor", dynamic_ncols=True, disable=None):
        writer.write_tensor_data(quantize(tensor.numpy(), kind))
    writer.close()
    return compare(path, source, entries, bits)


def entries_of(entries, ending):
    return next(value for key, value, _ in entries if key.endswith(ending))


def compare(path, source, entries, bits):
    """Read the file back: every entry and every tensor against the merge, computed again. ValueError names the first that differs."""
    from export import fate, fate_figures
    reader = gguf.GGUFReader(path)
    for key, value, kind in entries:
        if isinstance(value, list) and not value:
            continue
        found = reader.fields[key].contents() if key in reader.fields else None
        wanted = float(np.float32(value)) if kind == gguf.GGUFValueType.FLOAT32 else value
        if found != wanted:
            raise ValueError(f"{path.name}: read back, {key} is {str(found)[:80]} where {str(wanted)[:80]} was written; nothing was kept")
    there = {tensor.name: tensor for tensor in reader.tensors}
    total, worst = torch.zeros(6, dtype=torch.float64), 0.0
    for name, tensor, kind, sums in tqdm(tensors(source, bits), total=len(there), desc="comparing", unit="tensor", dynamic_ncols=True, disable=None):
        stored = there.pop(name)
        back = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32)).reshape(tensor.shape)
        off = (back - tensor).abs()
        allowed = torch.zeros(())
        if kind.name == "Q8_0":  # half a step of max/127, and what 127 times the scale loses in fp16 (relative 2^-11, below 2^-14 absolute 2^-25)
            largest = tensor.reshape(-1, 32).abs().amax(1, keepdim=True)
            allowed = (largest * (0.5 / 127 + 2 ** -11) + 127 * 2 ** -25).mul(1.01).expand(-1, 32).reshape(tensor.shape)
        elif kind.name == "F16" and bits == "q8_0":
            allowed = tensor.abs() * 2 ** -11 + 2 ** -25
        if stored.tensor_type != kind or not bool((off <= allowed).all()):
            raise ValueError(f"{path.name}: read back, {name} differs from the merge by {(off - allowed).max():.3g} more than {kind.name} explains; nothing was kept")
        worst = max(worst, off.max().item())
        if sums is not None:
            total += sums
    if there:
        raise ValueError(f"{path.name}: read back, it holds {next(iter(there))}, which was not written; nothing was kept")
    bytes_, figures = path.stat().st_size, fate_figures(total)
    told = [f"gguf       {len(reader.tensors)} tensors as {TYPES[bits][0]} (vectors F32), {bytes_ / 2**30:.2f} GiB", f"tokenizer  {entries_of(entries, 'ggml.pre')}, {len(entries_of(entries, 'ggml.tokens')):,} tokens, {len(entries_of(entries, 'ggml.merges')):,} merges"]
    told += [f"update     {figures['size']:.2%} of the weights' size; {figures['survives']:.1%} of it survives rounding to {bits}"] if bits != "q8_0" else []
    return "\n".join([*told, f"read back  equal to the merge: largest difference {worst:.3g}"])
