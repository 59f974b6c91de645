"""What to do with an adapter: merge it into a 16-bit model folder, hand it on alone, or write a GGUF file.

    python export.py --ckpt runs/approach1 --merge out          a folder that transformers loads
    python export.py --ckpt runs/approach1 --merge out --onto=original
                                       onto the weights as they were before they were quantised for training
    python export.py --ckpt runs/approach1 --adapter out        the adapter alone, in PEFT's format
    python export.py --ckpt runs/approach1 --gguf out.gguf      for llama.cpp (Llama, Mistral, Qwen2, Qwen3)
--ckpt is a run, a checkpoint, RUN@best or an adapter folder, as in eval.py. Options:
    --dtype=bf16 | fp16 | fp32         what to store; for --gguf alone also q8_0
    --data=FILE, --model=MODEL         other evaluation rows, another base model
    --tolerance=NATS                   how far the loss of a merge may lie from the adapter's (0.02 in 16 bits)
    --rounding=nearest                 bf16 without dither, as PEFT merges; a small update is lost in part
Any key of train.py --help can be given as --section.key=value.

A merge is compared before it gets its name: the loss on the evaluation rows through the adapter and through the merge,
and logits through transformers. Weights are read, merged and written one at a time. Everything is written into a hidden
folder beside the result and renamed at the end; so what has the result's name is whole. Exit codes: 0 done; 2 bad
input; 5 the merge differs too much, and was not kept. Leaves out: merging into 4 or 8 bits (it says what would be
lost), several adapters at once, and uploading.
"""
import contextlib
import fcntl
import gc
import json
import math
import os
import pathlib
import shutil
import sys
import tempfile
import zlib

import torch
from torch import nn
from tqdm import tqdm

import attention
import cache
import config as settings
import data
import eval as evaluation
import gguf_file
import loading
import lora_layers
import model
import quant
import ranks
import record
import trust

SHARD_BYTES = 5 << 30  # largest file of weights, but for a single larger tensor
COMPANION_BYTES = 64 << 20  # room for what lies beside weights: tokenizers take a few MiB
DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # in safetensors' headers
OF_4_BITS = ("nf4", "fp4", "int4", "4bit", "4", "q4_0", "q4_1", "q4_k_m", "q4_k_s")
LOGIT_ROWS, LOGIT_TOKENS = 4, 128  # how much of the evaluation rows logits are compared on
ALLOWED_NATS = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.02}  # largest difference in loss by default: what rounding explains
ALLOWED_LOGITS = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.1}  # the same of the logits, as a share of their norm


# ------------------------------------------------------------------------------------------------------------- merging

def fate(update, kept, base):
    """What became of an update when it was rounded into a weight, as sums float64 (6,) that add up over matrices.

    update, kept, base of one shape: what was to be added to the weight, what was, and the weight before. See `fate_figures`.
    """
    update, kept, base = update.double(), kept.double(), base.double()
    lost = (kept == 0) & (update != 0)
    count = torch.tensor(float(update.numel()), dtype=torch.float64, device=update.device)
    squares = update.square().sum(), base.square().sum(), (update * kept).sum(), (kept - update).square().sum()
    return torch.stack([*squares, lost.sum().double(), count]).cpu()


def fate_figures(sums):
    """{"size": ‖update‖/‖W‖, "survives": ⟨kept, update⟩/‖update‖², "noise": ‖kept - update‖/‖update‖, "lost": share left as it was}."""
    update, weight, along, error, lost, count = sums.tolist()
    update = update or 1.0  # an adapter that does nothing loses nothing
    lengths = {"size": math.sqrt(update / (weight or 1)), "noise": math.sqrt(error / update)}
    return lengths | {"survives": along / update, "lost": lost / (count or 1)}


def merge(base, lora_A, lora_B, magnitude, scaling, dtype, seed=None):
    """(W + scaling B A in `dtype`, the sums of `fate`): summed in fp32 (fp64 where W has it) and rounded once.

    base (out, in), lora_A (r, in), lora_B (out, r); magnitude None, or DoRA's (out,), to which the rows are stretched. With a seed,
    bf16 is rounded stochastically: an update is often smaller than half the distance of two bf16 numbers, and rounding to the
    nearest would drop it again and again; see `round_stochastically`.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    lora_A, lora_B = lora_A.to(base.device, wide), lora_B.to(base.device, wide)
    out, sums = torch.empty_like(base, dtype=dtype), torch.zeros(6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed or 0)
    dithered = seed is not None and dtype == torch.bfloat16
    for rows in quant.pieces(len(base), 1024):  # wide copies of a whole weight would be the largest thing in memory
        piece, update = base[rows].to(wide), scaling * (lora_B[rows] @ lora_A)
        if magnitude is not None:
            turned = piece + update
            update = turned * (magnitude[rows].to(turned) / torch.linalg.vector_norm(turned, dim=1))[:, None] - piece
        out[rows] = round_stochastically(piece + update, generator) if dithered else (piece + update).to(dtype)
        sums += fate(update, out[rows].to(wide) - piece, piece)
    return out, sums


def round_stochastically(values, generator):
    """bf16 of `values`, up or down with the odds that make it right on average (Gupta et al. 2015, section 3.1).

    bf16 is the upper half of fp32: a random lower half, added and cut off, carries over as often as the value lies above.
    """
    bits = values.float().contiguous().view(torch.int32)
    bits = bits + torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32).to(bits.device)
    return (bits & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class Source:
    """The weights of a base model with an adapter on them, to be read one at a time and in any order.

    shapes: {name: shape} of every parameter that a saved model holds, in the order of the base model's files.
    Raises ValueError where the adapter is not one for this model.
    """

    def __init__(self, config, adapter, original=False, stochastic=True):
        self.config, self.adapter, self.original, self.stochastic = config, adapter, original, stochastic
        self.compute, self.device = quant.DTYPES[config.model.compute_dtype], torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.folder = loading.local_folder(config.model.path, config.model.revision)
        self.network = loading.architecture(self.folder, self.compute)  # without memory
        tied = set(self.network._tied_weights_keys or ()) if self.network.config.tie_word_embeddings else set()
        shapes = {name: tuple(parameter.shape) for name, parameter in self.network.named_parameters()}
        self.files = loading.weight_files(self.folder)
        self.shapes = {name: shapes[name] for name in self.files if name in shapes and name not in tied}
        head, modules = self.network.get_output_embeddings(), self.network.named_modules()
        self.quantised = {f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear) and module is not head}
        self.scaling = config.lora.alpha / (math.sqrt(config.lora.r) if config.lora.rslora else config.lora.r)
        for name, tensor in adapter.items():
            module, _, matrix = name.removeprefix(lora_layers.PEFT_PREFIX).rpartition(".lora_")
            shape = self.shapes.get(f"{module}.weight")
            out, width = shape if f"{module}.weight" in self.quantised else (None, None)
            wanted = {"A.weight": (config.lora.r, width), "B.weight": (out, config.lora.r), "magnitude_vector": (out,)}
            if tuple(tensor.shape) != wanted.get(matrix):
                raise ValueError(f"{name} of shape {tuple(tensor.shape)} is no adapter for {type(self.network).__name__} in {self.folder}; "
                                 "it belongs to another model: name that with --model")

    def base(self, name):
        """The weight under the adapter: as training saw it (quantised and dequantised, in the compute dtype), or as it is stored."""
        tensor = loading.read_tensor(self.files[name], name, self.device)
        if self.original:
            return tensor
        if name in self.quantised:
            return quant.quantize(tensor, self.config.model, self.compute).dequantize(self.compute)
        return tensor.to(self.compute)

    def matrices(self, name):
        """(lora_A, lora_B, DoRA's magnitude or None) of a weight, or None where it has no adapter."""
        stem = lora_layers.PEFT_PREFIX + name.removesuffix(".weight")
        found = tuple(self.adapter.get(f"{stem}.{part}") for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))
        return found if found[0] is not None else None

    def merged(self, name, dtype):
        """(the weight with its adapter in `dtype`, the sums of `fate` or None). Raises ValueError where `dtype` cannot hold it."""
        base, matrices = self.base(name), self.matrices(name)
        seed = zlib.crc32(name.encode()) if self.stochastic else None
        out, sums = merge(base, *matrices, self.scaling, dtype, seed) if matrices else (base.to(dtype), None)
        if not torch.isfinite(out).all():
            raise ValueError(f"{name}: a value is not a finite number in {str(dtype).removeprefix('torch.')}; choose --dtype=bf16")
        return out, sums


def lost_in_4_bits(source):
    """What of the update would survive a merge into NF4, over all adapted weights: `fate_figures`, "lost" the share of codes that stay."""
    wide, total, same = torch.promote_types(source.compute, torch.float32), torch.zeros(6, dtype=torch.float64), 0
    adapted = [name for name in source.shapes if source.matrices(name)]
    for name in tqdm(adapted, desc="what 4 bits would lose", unit="weight", dynamic_ncols=True, disable=None):
        base = source.base(name)
        exact = merge(base, *source.matrices(name), source.scaling, wide)[0]
        before, after = (quant.NF4Weight(weight.to(source.compute), source.config.model.double_quant) for weight in (base, exact))
        total += fate(exact - base.to(wide), after.dequantize(wide) - before.dequantize(wide), before.dequantize(wide))
        changed = before.packed ^ after.packed  # two codes a byte
        same += ((changed >> 4 == 0).sum() + (changed & 15 == 0).sum()).item()
    return fate_figures(total) | {"lost": same / total[-1].item()}


def write_weights(folder, source, dtype):
    """Write every merged weight into `folder` as safetensors, sharded, never holding more than one. Returns {name: sums of `fate`}.

    The format needs no library to write: 8 bytes with the header's length, the header (JSON: dtype, shape and place of each
    tensor), the tensors. The library has only whole files in memory to offer.
    """
    sizes, shards, fates, where = {name: math.prod(shape) * dtype.itemsize for name, shape in source.shapes.items()}, [[]], {}, {}
    for name in sizes:
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + sizes[name] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    with tqdm(total=len(sizes), desc="merging", unit="weight", dynamic_ncols=True, disable=None) as progress:
        for number, names in enumerate(shards, start=1):
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            header, start = {"__metadata__": {"format": "pt"}}, 0
            for name in names:
                place = [start, start := start + sizes[name]]
                header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(source.shapes[name]), "data_offsets": place}
                where[name] = file_name
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            with open(folder / file_name, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for name in names:
                    tensor, sums = source.merged(name, dtype)
                    fates |= {name: sums} if sums is not None else {}
                    file.write(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
                    progress.update()
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return fates


# ----------------------------------------------------------------------------------------------------------- comparing

def documents(rows):
    """The rows on which logits are compared: a few, each cut short, as id tensors."""
    places = [(rows.offsets[r], min(rows.offsets[r + 1], rows.offsets[r] + LOGIT_TOKENS)) for r in range(min(LOGIT_ROWS, len(rows)))]
    return [torch.tensor(rows.ids[start:end].tolist()) for start, end in places]


@torch.no_grad()
def logits_of(network, rows):
    """Logits fp32 (places, vocabulary) on the CPU, less their mean at each place, which no probability depends on."""
    forward = lambda ids: network(input_ids=ids[None].to(network.device), use_cache=False).logits[0].float().cpu()
    logits = torch.cat([forward(ids) for ids in documents(rows)])
    return logits - logits.mean(dim=-1, keepdim=True)


def free():
    """Give back the memory of networks that are no longer used: their layers refer to one another."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def through_adapter(config, adapter, origin, rows, max_tokens):
    """(loss of the untouched model, loss with the adapter, logits with it) of a configuration's network."""
    free()
    network = model.load(config, "cuda" if torch.cuda.is_available() else "cpu")
    evaluation.check_rows(network, rows)
    untouched = evaluation.evaluate(network, rows, config.eval.max_rows, max_tokens)[0]["loss"]
    lora_layers.set_adapters(lora_layers.adapters(network), adapter, origin)
    loss = evaluation.evaluate(network, rows, config.eval.max_rows, max_tokens)[0]["loss"]
    network.adapter_memory.refresh()
    network.eval()
    with attention.own_attention(network):
        return untouched, loss, logits_of(network, rows)


def through_merge(folder, dtype, config, rows, max_tokens):
    """(loss, logits) of a merged folder: the loss by eval.py's own code, the logits by transformers alone."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    free()
    tree = {"model": {"path": str(folder), "quant": "none", "compute_dtype": dtype}, "lora": {"r": 1, "targets": ["all-linear"]},
            "memory": config.to_dict()["memory"]}
    network = model.load(settings.from_dict(tree), "cuda" if torch.cuda.is_available() else "cpu")  # with an adapter that does nothing
    loss = evaluation.evaluate(network, rows, config.eval.max_rows, max_tokens)[0]["loss"]
    device = network.device
    del network
    free()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, attn_implementation="eager")
    return loss, logits_of(theirs.to(device).eval(), rows)


def logit_difference(ours, theirs):
    """(‖difference‖/‖ours‖, share of places where both put the same token first)."""
    return ((ours - theirs).norm() / ours.norm()).item(), (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()


# ------------------------------------------------------------------------------------------------------------- writing

@contextlib.contextmanager
def unfinished(out):
    """A hidden folder beside `out` to write in; it goes when the block ends. What a killed export left there goes first.

    An OSError in the block, which mostly does not name a file, is raised again with `out` and the remedy.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{out.name}.export-*"):
        with contextlib.suppress(BlockingIOError), open_locked(left):
            shutil.rmtree(left)
    work = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.export-", dir=out.parent))
    work.chmod(0o755)  # mkdtemp's folders are closed to everyone else
    try:
        with open_locked(work):
            yield work
    except OSError as error:
        raise OSError(f"{out}: could not be made ({error}), and nothing was kept; if the disk is full, make room or name another "
                      "place") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def open_locked(folder):
    """Hold a folder's lock; BlockingIOError where another process, which must be alive, holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def publish(work, out):
    """Give a finished file or folder its name, once it is on the disk."""
    for path in [*work.rglob("*"), work]:
        cache.sync(path)
    if work.is_file() and os.path.lexists(out):  # renaming a file would replace it; a folder with something in it is refused by itself
        raise ValueError(f"{out}: came into being in the meantime; it was left alone, name another")
    os.rename(work, out)
    cache.sync(out.parent)


def vacant(flag, out):
    """`out` as a path, if nothing is lost by writing there. Raises ValueError where something is there already."""
    path = pathlib.Path(out)
    if path.is_symlink() or path.is_file() or path.is_dir() and (flag == "gguf" or any(path.iterdir())):
        full = " and not empty" if path.is_dir() and flag != "gguf" else ""
        raise ValueError(f"--{flag}: {out} is there already{full}; name a new one, or move it away first")
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise ValueError(f"--{flag}: {out} cannot be made, since {above} is no folder; name another place")
    return path


def apart(outs):
    """Raises ValueError where two of the results {flag: path} would have the same place, or one lie in another."""
    for flag, out in outs.items():
        for other, place in outs.items():
            if flag != other and place.resolve() in (out.resolve(), *out.resolve().parents):
                raise ValueError(f"--{flag}, --{other}: {out} is {place} or lies in it; each needs a place of its own")


def room(folder, needed, what):
    """Raises ValueError where the disk has too little room for `needed` bytes and COMPANION_BYTES."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free, needed = shutil.disk_usage(there).free, needed + COMPANION_BYTES
    if free < needed:
        raise ValueError(f"{folder}: {what} needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free there; "
                         "make room or name another place")


def write_companions(folder, source, tokenizer, end_ids, dtype):
    """What a model folder has beside weights: config, tokenizer, template, generation settings that stop where training taught to stop."""
    tree = trust.read_json(source.folder / "config.json")
    for name in ("_name_or_path", "transformers_version"):
        tree.pop(name, None)
    tree |= {"architectures": [type(source.network).__name__], "dtype": str(dtype).removeprefix("torch.")}
    if "torch_dtype" in tree:
        tree["torch_dtype"] = tree["dtype"]
    stored = source.folder / "generation_config.json"
    own = {name: tree[name] for name in ("bos_token_id", "pad_token_id") if name in tree}
    generation = trust.read_json(stored) if stored.is_file() else own
    before = generation.get("eos_token_id", tree.get("eos_token_id"))
    stops = list(dict.fromkeys([*end_ids, *(before if isinstance(before, list) else [before] if before is not None else [])]))
    generation["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    if generation.get("pad_token_id") is None:
        generation["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    generation.pop("transformers_version", None)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(folder, tokenizer)
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder, tokenizer):
    """The tokenizer's files, template included. Raises OSError where they cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # of a full disk, say, the library underneath makes a plain Exception
        raise OSError(f"{folder}: the tokenizer cannot be written ({error})") from error


def write_adapter(folder, checkpoint_folder, config, adapter, tokenizer):
    """An adapter folder: PEFT's two files as they were saved (the base model's name as config has it), tokenizer and template."""
    from safetensors.torch import save
    tree = trust.read_json(checkpoint_folder / "adapter_config.json")
    tree["base_model_name_or_path"] = config.model.path
    write_tokenizer(folder, tokenizer)
    tensors = {name: tensor.contiguous() for name, tensor in adapter.items()}
    # save_file makes a file that its owner alone can read, and has an error of its own for a full disk
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(tree, indent=1), encoding="utf-8")
    _, back, _ = lora_layers.read_adapter(folder)
    if back.keys() != adapter.keys() or not all(torch.equal(back[name], adapter[name]) for name in adapter):
        raise ValueError(f"{folder / 'adapter_model.safetensors'}: read back, its matrices are not the checkpoint's; check the disk")


# --------------------------------------------------------------------------------------------------------- the command

def run_of(folder):
    """The run that a checkpoint folder belongs to, or None."""
    is_run = lambda parent: (parent / "config.json").is_file() and (parent / "checkpoints").is_dir()
    return next((parent for parent in folder.absolute().parents[:2] if is_run(parent)), None)


def shown(name):
    """A model's or file's name for others to read: a hub name as it is, of a path its last part."""
    return name if settings.is_hub_name(name) else pathlib.Path(name).name


def kind_of(lora):
    """A kind of adapter in words: 'LoRA, rank 16, alpha 32'."""
    return f"{'DoRA' if lora.dora else 'LoRA'}, rank {lora.r}, alpha {lora.alpha:g}{', rsLoRA' if lora.rslora else ''}"


def table(pairs):
    """Lines of a Markdown table without a head."""
    return ["| | |", "| --- | --- |", *(f"| {what} | {text} |" for what, text in pairs), ""]


def card(title, config, folder, facts):
    """README.md of what is exported: what it is, from which data and settings, what was measured, and the run's verdict. No paths.

    facts: [(what, text)] about this export.
    """
    run, defaults = run_of(folder), settings.Config().flat()
    config = settings.read(run / "config.json") if run else config
    lines = ["---", "library_name: " + ("peft" if title == "adapter" else "transformers"), "pipeline_tag: text-generation"]
    lines += [f"base_model: {config.model.path}"] if settings.is_hub_name(config.model.path) else []
    lines += ["---", f"# {title.capitalize()} of {shown(config.model.path)}", ""]
    lines += ["Trained with rawlora. The licence is for you to state; the base model's holds besides.", ""]
    lines += [*table(facts), "## Data and training", ""]
    if run:
        state = trust.read_json(folder / "state.json")
        evaluated = [line for line in record.read_metrics(run) if "eval/loss" in line and line["step"] <= state["step"]]
        evaluation_rows = shown(config.data.eval) if config.data.eval else "held out of the training rows"
        digest = lambda which: state["origin"].get(which, "unknown")
        pairs = [("training rows", f"{', '.join(map(shown, config.data.sources))}, digest {digest('training rows')}"),
                 ("evaluation rows", f"{evaluation_rows}, digest {digest('evaluation rows')}"),
                 ("steps", f"{state['step']:,}: {state['samples']:,} samples, {state['supervised_tokens']:,} supervised tokens")]
        at = lambda line: f"{line['eval/loss']:.4f} after step {line['step']}"
        lines += table(pairs + [("evaluation loss", f"{at(evaluated[0])}, {at(evaluated[-1])}")] * bool(evaluated))
    else:
        lines += ["Not known: the adapter came without the record of its run.", ""]
    paths = ("model.path", "lora.init_from", "data.train", "data.eval", "data.chat_template", "data.cache", "eval.prompts")
    without_paths = {"data.mixture": lambda mixture: [[shown(source), weight] for source, weight in mixture]} | dict.fromkeys(paths, shown)
    always = ("model.quant", "lora.r", "lora.alpha", "schedule.learning_rate")
    told = {name: value for name, value in config.flat().items() if value != defaults[name] or name in always}
    told = {name: without_paths[name](value) if value and name in without_paths else value for name, value in told.items()}
    lines += ["## Settings", "", "Those that differ from the defaults, and a few that do not:", ""]
    lines += table((name, json.dumps(value)) for name, value in told.items()) + ["## Verdict", ""]
    if run and (run / "verdict.json").is_file():
        verdict = trust.read_json(run / "verdict.json")
        lines += [f"**{verdict['outcome']}**", "",
                  "| criterion | outcome | measured | threshold | reason |", "| --- | --- | --- | --- | --- |"]
        for criterion in verdict["criteria"]:
            told = [f"{criterion.get('set', '')} {criterion['name']}", *map(criterion.get, ("outcome", "measured", "threshold", "reason"))]
            shortened = ("" if text is None else f"{text:.4g}" if isinstance(text, float) else str(text) for text in told)
            lines += ["| " + " | ".join(shortened) + " |"]
    else:
        lines += ["None was recorded."]
    return "\n".join(lines) + "\n"


def update_told(source, fates, dtype, bits):
    """Lines on what became of the update. fates: what `write_weights` returned."""
    total, each = fate_figures(sum(fates.values())), {name: fate_figures(sums)["survives"] for name, sums in fates.items()}
    least = min(each, key=each.get)
    rounding = f"{'stochastic ' * (source.stochastic and dtype == torch.bfloat16)}rounding to {bits}"
    return [f"{total['size']:.2%} of the weights' size, over {len(fates)} matrices",
            f"{total['survives']:.1%} of it survives {rounding},", f"least {each[least]:.1%}, of {least.removesuffix('.weight')}",
            f"rounding noise {total['noise']:.0%} of its size; {total['lost']:.0%} of the weights unchanged"]


def refused(source, bits, tolerance, loss, reference, trained, off):
    """Why a merge is not what was trained, with the remedy, or "". off: the logits' difference; the losses are nats a token."""
    allowed = ALLOWED_LOGITS[bits] * max(1, tolerance / ALLOWED_NATS[bits])
    wrong = [text for text, fine in ((f"the loss differs by {loss - reference:+.4f} nats", abs(loss - reference) <= tolerance),
                                     (f"the loss is {loss - trained:.4f} nats above the trained one", loss - trained <= tolerance),
                                     (f"the logits differ by {off:.1%}", off <= allowed)) if not fine]
    remedy = "try --dtype=fp32, or serve the adapter beside its base (--adapter)"
    remedy = "merge onto the dequantised base" if source.original else remedy
    return (f"the merge is not what was trained: {'; '.join(wrong)} (allowed: {tolerance:g} nats). Nothing was kept; {remedy}, "
            "or allow more with --tolerance=NATS") if wrong else ""


def merge_into(out, source, folder, tokenizer, end_ids, rows, dtype, tolerance):
    """Write, compare and publish a merged model folder. folder: the adapter's. Returns the exit code."""
    config, adapter, bits = source.config, source.adapter, next(bits for bits, kind in quant.DTYPES.items() if kind == dtype)
    needed = sum(math.prod(shape) for shape in source.shapes.values()) * dtype.itemsize
    room(out.parent, needed, "the merged model")
    max_tokens = config.memory.max_tokens or (16384 if source.device.type == "cuda" else 2048)
    kind = "unquantised" if config.model.quant == "none" else f"{config.model.quant}, dequantised"
    onto = "as it is stored, unquantised" if source.original else f"as it was in training: {kind}"
    print(f"adapter    {folder}\nbase       {config.model.path}\n           {onto}", flush=True)

    untouched, trained, logits = through_adapter(config, adapter, str(folder), rows, max_tokens)
    losses = [(f"{untouched:.4f}", "untouched"), (f"{trained:.4f}", "through the adapter")]
    reference = trained
    if source.original and config.model.quant != "none":
        tree = config.to_dict()
        tree["model"]["quant"] = "none"
        _, reference, logits = through_adapter(settings.from_dict(tree), adapter, str(folder), rows, max_tokens)
        losses += [(f"{reference:.4f}", "through the adapter, unquantised")]

    with unfinished(out) as work:
        fates = write_weights(work, source, dtype)
        write_companions(work, source, tokenizer, end_ids, dtype)
        written = data.load_tokenizer(work)
        if (written.backend_tokenizer.to_str(), written.chat_template) != (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template):
            raise ValueError(f"{out}: the tokenizer, saved and loaded again, is another; nothing was kept")
        loss, theirs = through_merge(work, bits, config, rows, max_tokens)
        losses += [(f"{loss:.4f}, {loss - reference:+.4f}", "through the merge")]
        off, first = logit_difference(logits, theirs)

        update = update_told(source, fates, dtype, bits)
        count = min(len(rows), config.eval.max_rows or len(rows))
        of = [config.data.eval] if config.data.eval else config.data.sources
        counted = f"{'' if count == len(rows) else f'the first {count:,} of '}{len(rows):,} of {', '.join(map(shown, of))}"
        compared = f"differ by {off:.2%} over {len(logits)} places; the same token first at {first:.1%}"
        size = f"{len(source.shapes)} in {bits}, {needed / 2**30:.2f} GiB"
        for what, told in (("weights", [size]), ("update", update), ("rows", [counted]),
                           ("loss", [f"{value:<17} {how}" for value, how in losses]), ("logits", [compared])):
            print(f"{what:<10} " + "\n           ".join(told), flush=True)
        if why := refused(source, bits, tolerance, loss, reference, trained, off):
            print(f"error: {why}", file=sys.stderr)
            return 5
        facts = [("adapter", f"{kind_of(config.lora)}, merged into the weights"), ("base", onto), ("stored in", bits),
                 ("update", "; ".join(line.rstrip(",") for line in update)), ("evaluation rows", counted),
                 *((f"loss {how}", value) for value, how in losses), ("logits, merge and adapter", compared)]
        (work / "README.md").write_text(card("merged model", config, folder, facts), encoding="utf-8")
        publish(work, out)
    print(f"written    {out}")
    return 0


def export_adapter(out, source, folder, tokenizer):
    """Write and publish an adapter folder."""
    room(out.parent, sum(tensor.nbytes for tensor in source.adapter.values()), "the adapter")
    with unfinished(out) as work:
        write_adapter(work, folder, source.config, source.adapter, tokenizer)
        facts = [("adapter", f"{kind_of(source.config.lora)}, in PEFT's format"), ("trained over", f"{source.config.model.quant} weights")]
        (work / "README.md").write_text(card("adapter", source.config, folder, facts), encoding="utf-8")
        publish(work, out)
    print(f"adapter    {len(source.adapter)} matrices, the checkpoint's bit for bit\nwritten    {out}")


def export_gguf(out, source, tokenizer, end_ids, bits):
    """Write, compare and publish a GGUF file."""
    room(out.parent, gguf_file.size(source, bits), "the GGUF file")
    with unfinished(out) as work:
        entries, tensors, sums, worst = gguf_file.write(work / "model.gguf", source, tokenizer, end_ids, bits, out.stem)
        counts = {key: len(value) for key, value, _ in entries if isinstance(value, list)}
        size = (work / "model.gguf").stat().st_size
        print(f"gguf       {tensors} tensors as {gguf_file.TYPES[bits][0]}, vectors as F32, {size / 2**30:.2f} GiB\n"
              f"tokenizer  {gguf_file.splitting(tokenizer)}, {counts['tokenizer.ggml.tokens']:,} tokens, "
              f"{counts['tokenizer.ggml.merges']:,} merges")
        if bits != "q8_0":
            figures = fate_figures(sums)
            print(f"update     {figures['size']:.2%} of the weights' size; {figures['survives']:.1%} survives rounding to {bits}")
        print(f"read back  equal to the merge, but for at most {worst:.3g}" if worst else "read back  equal to the merge")
        publish(work / "model.gguf", out)
    print(f"written    {out}")


def wanted_dtype(word, config, flags):
    """The dtype to write in: bf16, fp16, fp32, or "q8_0" for GGUF. Raises ValueError for others."""
    own = config.model.compute_dtype if config.model.compute_dtype in ("bf16", "fp16") else "bf16"
    word = {"": own, "f16": "fp16", "f32": "fp32", "q8": "q8_0"}.get(word.lower(), word.lower())
    if word not in ("bf16", "fp16", "fp32", "q8_0") or word == "q8_0" and (flags["merge"] or not flags["gguf"]):
        raise ValueError(f"--dtype: must be bf16, fp16, fp32, or q8_0 for --gguf alone, got {word}; a merged model has 16 bits or more, "
                         "so that rounding does not eat what was trained")
    return word


def wanted_tolerance(word):
    """A number of nats. Raises ValueError for anything else."""
    try:
        tolerance = float(word)
    except ValueError:
        tolerance = math.nan
    if not tolerance >= 0:
        raise ValueError(f"--tolerance: must be a number of nats a token, 0 or more, got {word}")
    return tolerance


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    ranks.alone("export.py")
    known = ("ckpt", "model", "data", "merge", "adapter", "gguf", "onto", "dtype", "rounding", "tolerance")
    words, flags, overrides = settings.command_line(argv, dict.fromkeys(known, ""))
    if words:
        raise ValueError(f"{words[0]}: unexpected; as in: python export.py --ckpt runs/approach1 --merge out")
    if not flags["ckpt"] or not (flags["merge"] or flags["adapter"] or flags["gguf"]):
        raise ValueError("say what to export and how: --ckpt=RUN_OR_CHECKPOINT, and --merge=FOLDER, --adapter=FOLDER or --gguf=FILE")
    if flags["onto"] not in ("", "dequantised", "dequantized", "original"):
        raise ValueError(f"--onto: must be dequantised (as in training) or original (as it is stored), got {flags['onto']}")
    if flags["rounding"] not in ("", "stochastic", "nearest"):
        raise ValueError(f"--rounding: must be stochastic or nearest, got {flags['rounding']}")
    outs = {flag: vacant(flag, flags[flag]) for flag in ("adapter", "merge", "gguf") if flags[flag]}
    apart(outs)
    overrides += [("data.eval", flags["data"])] if flags["data"] else []
    config, adapter, folder = evaluation.configure(flags["ckpt"], flags["model"], overrides)
    run = run_of(folder)
    if flags["onto"] == "original" and run and settings.read(run / "config.json").lora.init == "loftq":
        raise ValueError(f"--onto=original: the adapter of {run} began as a correction of quantisation (lora.init=loftq), which "
                         "unquantised weights do not need; leave --onto out")
    source = Source(config, adapter, flags["onto"] == "original", flags["rounding"] != "nearest")
    if flags["dtype"].lower() in OF_4_BITS:
        lost = lost_in_4_bits(source)
        raise ValueError(f"--dtype={flags['dtype']}: merging into 4 bits would undo the training: {lost['survives']:.0%} of the update "
                         f"would survive, under noise of {lost['noise']:.1f} times its size, and {lost['lost']:.0%} of the codes "
                         "would stay as they are. Merge into bf16; or serve 4 bits as in training, "
                         "the adapter (--adapter) beside the base")
    bits = wanted_dtype(flags["dtype"], config, flags)
    tolerance = wanted_tolerance(flags["tolerance"] or ALLOWED_NATS.get(bits, 0.02))
    own = (folder / "tokenizer.json").is_file()  # what was trained with, if the checkpoint has it
    place, revision = (folder, "") if own else (config.model.path, config.model.revision)
    tokenizer = data.load_tokenizer(place, config.data.chat_template, revision)
    end_ids = data.end_of_turn(tokenizer)
    if "gguf" in outs:
        gguf_file.check(source, tokenizer)
    if "merge" in outs:
        rows = data.load_evaluation(config, tokenizer)
    if "adapter" in outs:
        export_adapter(outs["adapter"], source, folder, tokenizer)
    code = merge_into(outs["merge"], source, folder, tokenizer, end_ids, rows, quant.DTYPES[bits], tolerance) if "merge" in outs else 0
    if "gguf" in outs and not code:
        export_gguf(outs["gguf"], source, tokenizer, end_ids, bits)
    return code


if __name__ == "__main__":
    settings.run_command(main)
