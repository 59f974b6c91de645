"""How good a model is: loss, perplexity and token accuracy on rows, and what it writes for fixed prompts.

    python eval.py --ckpt runs/approach1            the newest checkpoint, on the run's own evaluation rows
    python eval.py --ckpt runs/approach1@best --data my.jsonl --prompts my.txt --json
    python eval.py --ckpt my-adapter                an adapter folder in PEFT's format
    python eval.py --model Qwen/Qwen3-8B --data my.jsonl --model.quant=int8
                                                    an untouched model
    python eval.py --ckpt runs/approach1@step-000500 --keep
                                                    and keep what each row came to in the run's folder, for verdict.py
                                                    and compare.py (training does so itself)
    python eval.py --ckpt runs/approach1 --untrained --keep [--model.quant=none]
                                                    the same of the run's model before training, in 16 bits if so asked
Any key of train.py --help can be given as --section.key=value.

The loss is the one of training (model.summed_loss): summed over supervised tokens and divided once, so it does not
depend on how rows are packed. Leaves out: benchmarks of other kinds, which lm-eval has, and sampling with temperature.
"""
import concurrent.futures
import dataclasses
import hashlib
import json
import math
import pathlib
import sys
import textwrap
import time

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

import attention
import cache
import checkpoint
import config as settings
import data
import generation
import graphs
import loading
import lora_layers
import model
import quant
import ranks
import record
import verdict


@torch.no_grad()
def evaluate(network, rows, max_rows, max_tokens, interrupted=()):
    """Loss and accuracy over the supervised tokens of data.Rows (the first max_rows of them; 0: all).

    Returns {"loss": nats a token, "perplexity", "token_accuracy": 0 ... 1, "supervised_tokens", "rows", "seconds", "max_tokens": what
    fitted} and, per row, float64 arrays {"nll": summed nats, "tokens", "correct"}; or (None, None) as soon as `interrupted` holds
    something.
    Logits exist for memory.loss_chunk tokens at a time; the host waits for the device once. Where memory runs out, the rows
    are evaluated again in micro-batches of half the size. Raises ValueError naming a row that does not fit alone.
    """
    began, was_training = time.perf_counter(), network.training
    interrupted = () if network.sharded else interrupted  # ranks that gather layers from each other go step by step together
    count = min(len(rows), max_rows or len(rows))
    network.eval()
    done, alone = False, ""  # alone: a row that does not even fit alone
    while not (done or alone or interrupted):
        totals = torch.zeros(3, count, dtype=torch.float64, device=network.device)  # nll, tokens, correct of each row
        try:
            for batch in data.share(rows, list(range(count)), max_tokens, network.sharded):
                if interrupted:
                    break
                batch = batch.to(network.device)
                _, nll, correct = model.summed_loss(network, batch)
                row = torch.tensor(batch.samples, device=network.device)[batch.document]
                totals.index_add_(1, row, torch.stack((nll.double(), torch.ones_like(nll).double(), correct.double())))
            done = True
        except (RuntimeError, MemoryError) as error:
            try:
                max_tokens = model.smaller(batch, rows, error, network.sharded)
            except model.DoesNotFit as told:
                alone = str(told)
        if not done:
            model.release_memory()
    network.train(was_training)
    alone = ranks.words(alone)
    if alone:
        raise model.DoesNotFit(alone[0])
    if any(ranks.most(bool(interrupted))):
        return None, None
    nll, tokens, correct = ranks.total(totals).cpu().numpy()
    by_row = {"nll": nll, "tokens": tokens, "correct": correct}
    return figures_of(by_row) | {"seconds": time.perf_counter() - began, "max_tokens": max_tokens}, by_row


def figures_of(by_row):
    """{"loss", "perplexity", "token_accuracy", "supervised_tokens", "rows"} of what each row came to."""
    tokens = by_row["tokens"].sum()
    loss = float(by_row["nll"].sum() / max(1, tokens))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "token_accuracy": float(by_row["correct"].sum() / max(1, tokens)),
            "supervised_tokens": int(tokens), "rows": len(by_row["nll"])}


@torch.no_grad()
def generate(network, tokenizer, prompts, max_new_tokens, end_ids, interrupted=()):
    """Greedy continuations of data.prompts: [{"prompt", "reference", "text", "tokens", "stopped": ended by itself}, ...].

    All prompts in one left-padded batch, through transformers' own attention and cache. Draws no random numbers. None once
    `interrupted` holds something (asked every few tokens). Prompts that do not fit into memory together are continued in halves.
    """
    if not prompts:
        return []
    was_training = network.training
    network.eval()
    pad = end_ids[0]
    width = max(len(prompt["ids"]) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt["ids"])) + list(prompt["ids"]) for prompt in prompts], device=network.device)
    mask = torch.tensor([[0] * (width - len(prompt["ids"])) + [1] * len(prompt["ids"]) for prompt in prompts], device=network.device)
    interrupted = () if network.sharded else interrupted
    write = generation.by_transformers if generation.serves(network, len(prompts)) else generation.replayed
    fits = True
    try:
        with attention.own_attention(network):
            try:
                written = write(network, ids, mask, max_new_tokens, end_ids, interrupted)
            except graphs.NotRecordable as error:
                print(f"note: samples are written without CUDA graphs, which is slower ({error.__cause__})", file=sys.stderr)
                network.graphs = False
                written = generation.by_transformers(network, ids, mask, max_new_tokens, end_ids, interrupted)
    except (RuntimeError, MemoryError) as error:
        if len(prompts) == 1 and model.out_of_memory(error) and ranks.RANKS == 1:
            raise model.DoesNotFit(f"eval.samples, eval.prompts: the prompt {prompts[0]['prompt'][:60]!r} of {width:,} tokens does not fit "
                                   f"into memory with {max_new_tokens:,} more; lower eval.max_new_tokens, "
                                   "or give shorter prompts") from error
        if len(prompts) == 1 or not model.out_of_memory(error):
            raise
        fits = False
    network.train(was_training)
    if interrupted:
        return None
    if not fits:
        model.release_memory()
        middle = len(prompts) // 2
        halves = [generate(network, tokenizer, half, max_new_tokens, end_ids, interrupted)
                  for half in (prompts[:middle], prompts[middle:])]
        return None if None in halves else halves[0] + halves[1]
    samples = []
    for prompt, new in zip(prompts, written):
        stop = next((i for i, token in enumerate(new) if token in end_ids), None)
        samples.append({"prompt": prompt["prompt"], "reference": prompt["reference"],
                        "text": tokenizer.decode(new[:stop], skip_special_tokens=True),
                        "tokens": len(new) if stop is None else stop + 1, "stopped": stop is not None})
    return samples


def stop_rate(samples):
    """Share of generation samples that ended by themselves."""
    return sum(sample["stopped"] for sample in samples) / max(1, len(samples))


def sample_figures(samples):
    """Means over generation samples: {"stop_rate", "repetition": share of 4-grams that stood there before, "overlap": F1 of words with
    the references, absent without any}, each 0 ... 1 (verdict.repetition, verdict.overlap). {} without samples."""
    if not samples:
        return {}
    answered = [sample for sample in samples if sample["reference"]]
    figures = {"stop_rate": stop_rate(samples), "repetition": sum(verdict.repetition(sample["text"]) for sample in samples) / len(samples)}
    shared = [verdict.overlap(sample["text"], sample["reference"]) for sample in answered]
    return figures | ({"overlap": sum(shared) / len(shared)} if shared else {})


def keep(run, name, by_row, step, rows, tokenizer, network):
    """Write what each row came to (the second value of `evaluate`) to RUN/evaluations/NAME.safetensors; returns its path.

    With it goes what tells whether two such files can be compared: the rows, the tokenizer, and whose adapter it was.
    """
    sha = lambda content, digits: hashlib.sha256(content).hexdigest()[:digits]
    whose = {"step": str(step), "rows_digest": rows.digest, "tokenizer": sha(tokenizer.backend_tokenizer.to_str().encode(), 16),
             "adapter_digest": sha(network.adapter_memory.flat.detach().cpu().numpy(), 12)}
    return record.save_evaluation(run, name, by_row, whose)


def show(samples, width=80):
    """Generation samples as text for a console, wrapped to `width` columns."""
    lines = []
    for sample in samples:
        lines.append("")
        written = (sample["text"].strip() or "(nothing)") + ("" if sample["stopped"] else " … (did not stop)")
        for who, text in (("prompt", sample["prompt"]), ("model", written), ("reference", sample["reference"])):
            for line in text.strip().splitlines():
                lines += textwrap.wrap(line, width, initial_indent=f"  {who:<9}  ", subsequent_indent=" " * 13) or [""]
                who = ""
    return "\n".join(lines)


class NotFinite(Exception):
    """What rows came to (its argument) that is not to be kept."""


def evaluate_unquantised(config, device, eval_rows):
    """(figures, by row) of the untouched model in 16 or 32 bits, as eval.evaluate gives them; None where it is not asked for or does
    not fit.

    What training gains is told against it too: making good what quantisation spoilt is not yet learning. What rows came to is kept
    between starts beside the tokens (data.cache), since the same model, rows and code give the same figures.
    """
    if config.eval.unquantised == "no" or config.model.quant == "none":
        return None
    config = quant.settled(config, device)
    wider = quant.DTYPES[config.model.compute_dtype].itemsize / 2  # than the 16 bits in which models are stored as a rule
    if config.eval.unquantised == "auto" and any(ranks.most(1.3 * wider * loading.stored_bytes(config) > model.free_memory(device))):
        print("note: the unquantised model does not fit beside what is in memory, so it is not evaluated; "
              "eval.unquantised=no leaves it out without a word")
        return None
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, quant="none"),
                                lora=dataclasses.replace(config.lora, dora=False, init="zero", init_from=""))

    def build(folder):
        network = model.load(plain, device)
        check_rows(network, eval_rows)
        max_tokens = config.memory.max_tokens or (8192 if device.type == "cuda" else 2048)
        _, by_row = evaluate(network, eval_rows, config.eval.max_rows, max_tokens)
        del network
        model.release_memory()
        if not np.isfinite(by_row["nll"]).all():
            raise NotFinite(by_row)
        save_file(by_row, folder / "by_row.safetensors")
        return {}

    place = cache.folder(config.data.cache) if ranks.RANKS == 1 else None  # ranks evaluate together, whatever each finds
    try:
        by_row = cache.entry(place, place and cache.key(unquantised_shaped_by(config, device, eval_rows)), build,
                             lambda folder: load_file(folder / "by_row.safetensors"))
    except NotFinite as found:
        by_row = found.args[0]
    return figures_of(by_row), by_row


_code = cache.code(("attention.py", "eval.py", "fused.py", "gpu_kernels.py", "loading.py", "lora_layers.py", "model.py", "quant.py"))


def unquantised_shaped_by(config, device, eval_rows):
    """What evaluate_unquantised's rows come to follows from this, JSON-ready, with the SHA-256 of every file of the model and of our code.

    The adapters do not shape it: at B = 0 they add exactly nothing.
    """
    import transformers
    folder = loading.local_folder(config.model.path, config.model.revision)
    files = [folder / "config.json", *sorted(set(loading.weight_files(folder).values()))]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        digests = list(threads.map(cache.sha256, files))
    return ["unquantised", _code, digests, eval_rows.digest, config.eval.max_rows, config.model.compute_dtype, config.model.attention,
            dataclasses.asdict(config.memory), config.train.deterministic, record.kind_of(device), torch.__version__, torch.version.cuda,
            transformers.__version__]


def check_rows(network, *data_sets, sampled=0):
    """Raises ValueError where rows hold token ids, or are of a length, that the network has no embedding or no fixed position for.

    sampled: tokens of the longest sample, its prompt included. Rotary positions of the kinds "dynamic" and "longrope" change with the
    longest document of a micro-batch beyond a length, so packed rows beyond it would change each other.
    """
    table = network.get_input_embeddings()
    known, largest = len(table.weight), max(int(rows.ids.max()) for rows in data_sets)
    if largest >= known:
        raise ValueError(f"model.path: the tokenizer gives the token id {largest}, but the model embeds ids below {known}; "
                         "the two do not belong together, or a chat template uses tokens that were added later: "
                         "give the tokenizer that came with the model")
    kinds = [getattr(module, "rope_type", None) for module in network.modules()]
    kinds = {one for kind in kinds if kind for one in (kind.values() if isinstance(kind, dict) else [kind])} & {"dynamic", "longrope"}
    learnt = any(isinstance(module, torch.nn.Embedding) and module is not table for module in network.modules())
    ropes = getattr(network.config, "rope_parameters", None) or {}
    limits = [getattr(network.config, "max_position_embeddings", None)]
    limits += [rope.get("original_max_position_embeddings") for rope in (ropes, *ropes.values()) if kinds and isinstance(rope, dict)]
    limit = min((limit for limit in limits if limit), default=math.inf)
    for rows in data_sets if kinds or learnt else ():
        lengths = np.diff(rows.offsets)
        longest = int(lengths.argmax())
        if lengths[longest] > limit:
            why = (f"from there on the positions of this model ({' and '.join(sorted(kinds))}) change with what is packed beside a row"
                   if kinds else "this model has no more positions")
            raise ValueError(f"{rows.names[longest]}: has {lengths[longest]:,} tokens, more than {limit:,}, and {why}; "
                             f"set data.max_length to {limit:,} at most")
    if learnt and sampled > limit:
        raise ValueError(f"eval.max_new_tokens: samples of up to {sampled:,} tokens, with their prompts, are longer than the model's "
                         f"{limit:,} positions; lower it, or give shorter prompts (eval.prompts)")


def longest_sample(prompts, config):
    """Tokens of the longest sample that `generate` may write, its prompt included; 0 without prompts."""
    return max((len(prompt["ids"]) + config.eval.max_new_tokens for prompt in prompts), default=0)


@torch.no_grad()
def untrained_tokens(network, tokenizer, rows):
    """A sentence where `rows` use special tokens that the base model was never trained on, else "". Adapters leave embeddings as they are.

    Their rows of the embedding table tell: next to zero, or (as weight decay and the softmax move all such rows alike; Land and
    Bartolo 2024, section 2) the same as another token's but for 1 part in 2000 of the cosine. Looks at the first 1,000 rows. A token left
    at random initial values is not found.
    """
    table = network.get_input_embeddings().weight
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    used = sorted(special.intersection(rows.ids[:rows.offsets[min(len(rows), 1000)]].tolist()))
    if not used:
        return ""
    theirs, lengths, closest = table[used].float(), [], torch.full((len(used),), -1.0, device=table.device)
    for start in range(0, len(table), 8192):
        part = table[start:start + 8192].float()
        lengths.append(part.norm(dim=1))
        cosines = part @ theirs.T / (lengths[-1][:, None] * theirs.norm(dim=1)).clamp_min(1e-30)  # (rows, used)
        for column, token in enumerate(used):
            if start <= token < start + len(part):
                cosines[token - start, column] = -1.0  # itself
        closest = torch.maximum(closest, cosines.amax(dim=0))
    usual = torch.cat(lengths).median()
    found = [token for token, length, cosine in zip(used, theirs.norm(dim=1), closest) if length < 0.05 * usual or cosine > 0.9995]
    if not found:
        return ""
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in found[:5])
    return (f"model.path: the rows use {names}, which the base model seems never to have been trained on (an embedding next to zero, "
            "or the same as another token's), and an adapter leaves embeddings as they are; take a model that knows its template, "
            "or another template (data.chat_template=FILE)")


def configure(ckpt, model_path, overrides):
    """(configuration, adapter's tensors or None, its folder) of a run, a checkpoint, an adapter, or a model alone (None, None).

    A run's own configuration is taken where there is one; an adapter alone brings its LoRA settings and its base model's name.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if model_path:
        overrides = [("model.path", model_path), *overrides]
    if not ckpt:
        config = settings.located(settings.from_dict({}, overrides, "command line"))
        return quant.settled(config, device), None, None
    folder = checkpoint.find(ckpt)
    lora, tensors, base = lora_layers.read_adapter(folder)
    run = next((parent for parent in folder.absolute().parents[:2]
                if (parent / "config.json").is_file() and (parent / "checkpoints").is_dir()), None)
    tree = verdict.settings_of(run) if run else {"model": {"path": base}}
    tree["lora"] = {"r": lora.r, "alpha": lora.alpha, "dropout": lora.dropout, "rslora": lora.rslora, "dora": lora.dora,
                    "targets": lora.targets}
    config = settings.located(settings.from_dict(tree, overrides, str(run / "config.json") if run else "command line"))
    return quant.settled(config, device), tensors, folder


def kept_as(folder, untrained, overrides):
    """(run folder, step, name) that --keep writes a checkpoint's evaluation under.

    Raises ValueError where it would not be the run's own.
    """
    run = folder.absolute().parents[1] if folder else None
    if not run or not (run / "config.json").is_file() or not folder.name.startswith("step-"):
        raise ValueError(f"--keep: {folder or 'a model'} is not a run's checkpoint, so there is no run to keep its figures in; name one "
                         "with --ckpt=runs/NAME@step-000500")
    allowed = ("memory.", "eval.samples", "eval.max_new_tokens", "eval.prompts") + ("model.quant",) * untrained
    wrong = [f"--{key}={value}" for key, value in overrides if not key.startswith(allowed) or key == "model.quant" and value != "none"]
    if wrong:
        raise ValueError(f"--keep: {' '.join(wrong)} would make it another evaluation than the run's own; leave that or --keep out")
    tree = verdict.settings_of(run)
    if untrained and (tree.get("lora", {}).get("init_from") or tree.get("lora", {}).get("init", "zero") != "zero"):
        raise ValueError(f"--untrained: {run} did not start at B = 0 (lora.init, lora.init_from), so its untrained model is not what "
                         "it was measured against; evaluate it without --keep")
    unquantised = untrained and dict(overrides).get("model.quant") == "none"
    step = 0 if untrained else int(folder.name[5:])
    return run, step, "unquantised" if unquantised else f"step-{step:06d}"


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    ranks.alone("eval.py")
    texts, switches = dict.fromkeys(("ckpt", "model", "data", "prompts"), ""), dict.fromkeys(("json", "keep", "untrained"), False)
    words, flags, overrides = settings.command_line(argv, texts | switches)
    if words:
        raise ValueError(f"{words[0]}: unexpected; name a run or checkpoint with --ckpt")
    if not flags["ckpt"] and not flags["model"]:
        raise ValueError("name what to evaluate: --ckpt=RUN_OR_CHECKPOINT, or --model=MODEL alone for an untouched one")
    overrides += [(key, flags[flag]) for key, flag in (("data.eval", "data"), ("eval.prompts", "prompts")) if flags[flag]]
    if flags["untrained"] and not flags["ckpt"]:
        raise ValueError("--untrained: means a run's model before training; name the run with --ckpt")
    config, adapter, folder = configure(flags["ckpt"], flags["model"], overrides)
    place = kept_as(folder, flags["untrained"], overrides) if flags["keep"] else None
    adapter = None if flags["untrained"] else adapter
    tokenizer = data.load_tokenizer(config.model.path, config.data.chat_template, config.model.revision)
    rows, prompts, end_ids = data.load_evaluation(config, tokenizer), data.prompts(config, tokenizer), data.end_of_turn(tokenizer)

    network = model.load(config, "cuda" if torch.cuda.is_available() else "cpu")  # adapters at B = 0: the untouched model
    check_rows(network, rows, sampled=longest_sample(prompts, config))
    if adapter:
        lora_layers.set_adapters(lora_layers.adapters(network), adapter, str(folder))
    max_tokens = config.memory.max_tokens or (16384 if network.device.type == "cuda" else 2048)
    figures, by_row = evaluate(network, rows, config.eval.max_rows, max_tokens)
    kept = keep(place[0], place[2], by_row, place[1], rows, tokenizer, network) if place else None
    samples = generate(network, tokenizer, prompts, config.eval.max_new_tokens, end_ids)

    name = ", ".join(pathlib.Path(source).name for source in ([config.data.eval] if config.data.eval else config.data.sources))
    if flags["json"]:
        strict = {key: value if math.isfinite(value) else None for key, value in figures.items()}  # JSON has no NaN
        about = {"adapter": str(folder) if adapter else None, "model": config.model.path, "quant": config.model.quant,
                 "compute_dtype": config.model.compute_dtype, "data": name}
        print(json.dumps(about | strict | {"stop_rate": None, **sample_figures(samples), "samples": samples}, indent=1))
        return 0
    some = "" if figures["rows"] == len(rows) else f"the first {figures['rows']:,} of "
    print(f"adapter         {'none, before training' if flags['untrained'] else folder or 'none'}\nmodel           {config.model.path}")
    print(f"                {config.model.quant}, computing in {config.model.compute_dtype} on {network.device}")
    print(f"rows            {some}{len(rows):,} of {name}")
    print(f"loss            {figures['loss']:.4f} nats a token, over {figures['supervised_tokens']:,} supervised tokens")
    print(f"perplexity      {figures['perplexity']:.3f}\ntoken accuracy  {figures['token_accuracy']:.4f}\n"
          f"time            {figures['seconds']:.1f} s")
    if samples:
        told = sample_figures(samples)
        print(f"stop rate       {told['stop_rate']:.2f} of {len(samples)} samples, greedy, up to {config.eval.max_new_tokens} tokens")
        print(f"repetition      {told['repetition']:.2f} of their 4-grams of words stood there before")
        print(f"overlap         {told['overlap']:.2f} with the references (F1 of words)\n" * ("overlap" in told), end="")
        print(show(samples))
    if kept:
        print(f"\nkept            {kept}")
    return 0


if __name__ == "__main__":
    settings.run_command(main)
