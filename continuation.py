"""What a run goes on from: which settings and contents make its curve, and how a checkpoint's state is put back in its places.

A run that goes on is the same run only if what shapes its curve is the same: `origin` lists that, by name, and `restore` refuses
what changed unless it is accepted by name. Leaves out: how a checkpoint lies on the disk (checkpoint.py).
"""
import hashlib
import json
import pathlib
import tempfile

import numpy as np
import torch

import checkpoint
import lora_layers
import ranks
import record


def load_initial(config):
    """The matrices of the adapter that lora.init_from names. Raises ValueError where its scale or rank is not the configuration's."""
    folder = checkpoint.find(config.lora.init_from)
    lora, tensors, _ = lora_layers.read_adapter(folder)
    wrong = [f"--lora.{name}={json.dumps(getattr(lora, name))}" for name in ("r", "alpha", "rslora", "dora")
             if getattr(lora, name) != getattr(config.lora, name)]
    if wrong:
        raise ValueError(f"lora.init_from: the adapter in {folder} was trained with other settings; start from it with {' '.join(wrong)}")
    return tensors


def _count(value):
    return type(value) is int and 0 <= value < 2**53


def _number(value):
    return type(value) in (int, float)


def _figure(entry):
    """Whether a (tag, value) is what a step's line holds: a number, one that is not finite as text, or text that is told and not
    reckoned with."""
    tag, value = entry
    return _number(value) or isinstance(value, str) and (value in ("nan", "inf", "-inf") or not tag.startswith(("train/", "adapters/")))


def _noise(value):
    """Whether a saved noise scale is what telemetry.NoiseScale.state returns."""
    if not isinstance(value, list) or len(value) != 3 or not all(map(_number, value[:2])):
        return False
    return value[2] is None or isinstance(value[2], list) and len(value[2]) == 2 and all(map(_count, value[2]))


def _plan(value):
    """Whether a saved plan holds what memory.plan takes over from it in the types that it writes."""
    rules = {name: lambda v: _count(v) and v > 0 for name in ("max_tokens", "fits", "evaluates")} | {"checkpoint_layers": _count}
    rules |= {name: lambda v: type(v) is bool for name in ("keep_dequantized", "offload", "host_embeddings")}
    rules |= {"shrunk": lambda v: isinstance(v, list)}
    return isinstance(value, dict) and all(name in value and rule(value[name]) for name, rule in rules.items())


STATE = {  # what state.json must hold, by name
    **dict.fromkeys(("samples", "tokens", "supervised_tokens", "nonfinite", "skipped", "without_improvement"), _count),
    "norms": lambda v: isinstance(v, list) and all(isinstance(pair, list) and len(pair) == 2
                                                   and _count(pair[0]) and _number(pair[1]) for pair in v),
    "line": lambda v: isinstance(v, dict) and "step" not in v and all(map(_figure, v.items())),
    "accepted": lambda v: isinstance(v, list) and all(isinstance(entry, dict) and _count(entry.get("step")) and all(
        isinstance(change, dict) and {"was", "is"} <= change.keys() for name, change in entry.items() if name != "step") for entry in v),
    "evaluated": lambda v: v == -1 or _count(v),
    "best_step": lambda v: v is None or _count(v), "best_loss": lambda v: v is None or _number(v),
    "origin": lambda v: isinstance(v, dict), "plan": _plan, "noise": _noise}


def load_checkpoint(path):
    """A run's checkpoint (checkpoint.load), its state of the kinds that a run writes: its hashes prove who wrote it no more than that
    it is whole.

    Raises ValueError for what is wrong with it, and for an adapter that is no more than that.
    """
    saved = checkpoint.load(path)
    if saved["step"] is None:
        raise ValueError(f"{path}: is an adapter, not a run's checkpoint, so there is nothing to go on from; "
                         f"start a run from it with --lora.init_from={path}")
    for name, rule in STATE.items():
        if name not in saved["state"] or not rule(saved["state"][name]):
            raise ValueError(f"{path}/state.json: {name} is {json.dumps(saved['state'].get(name))[:100]}, which no run writes; "
                             "go on from another checkpoint with --resume=CHECKPOINT")
    for name in ("evaluated", "best_step"):
        if (saved["state"][name] or 0) > saved["step"]:
            raise ValueError(f"{path}/state.json: {name} is {saved['state'][name]}, after step {saved['step']} itself; "
                             "go on from another checkpoint with --resume=CHECKPOINT")
    for file, group in saved["tensors"].items():
        if any(tensor.is_complex() or tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1 for tensor in group.values()):
            raise ValueError(f"{path}/{file}: holds tensors of a dtype that no run writes; "
                             "go on from another checkpoint with --resume=CHECKPOINT")
    return saved


def origin(config, tokenizer, rows, eval_rows, base_weights, plan):
    """What shapes a run's curve, by name: settings as they are, content as digests. Compared when the run is resumed.

    Evaluating, judging, saving and logging do not shape it, nor does memory but for packing and kept copies; files may move, with
    their content.
    """
    sections = ("eval.", "save.", "log.", "forecast.", "alerts.", "proof.", "criteria.")
    free = ("memory.checkpoint_layers", "memory.budget_gib", "memory.offload", "model.path", "data.train", "data.eval",
            "data.chat_template", "data.mixture", "data.first_rows", "data.drop", "data.audit", "data.cache", "data.near_duplicate",
            "data.columns", "data.roles")
    shaping = {name: value for name, value in config.flat().items() if name not in free and not name.startswith(sections)}
    shaping |= {f"memory.{name}": plan[name] for name in ("max_tokens", "keep_dequantized")} | {"ranks": ranks.RANKS}
    return shaping | contents(tokenizer, rows, eval_rows) | {"base weights": base_weights[:16]}


def contents(tokenizer, rows, eval_rows):
    """{what: digest} of rows and tokenizer."""
    sha = lambda text: hashlib.sha256(text.encode()).hexdigest()
    digests = {"training rows": rows.digest, "evaluation rows": eval_rows.digest, "tokenizer": sha(tokenizer.backend_tokenizer.to_str()),
               "chat template": sha(tokenizer.chat_template or "")}
    return {name: digest[:16] for name, digest in digests.items()}


def of_every_rank(config, tokenizer, rows, eval_rows, prompts, device):
    """{what: value or digest} that every rank must have alike. Files may lie elsewhere on each host.

    The kind of device is among it: another kind sums in another order, and the ranks' adapters would drift apart.
    """
    places = ("model.path", "lora.init_from", "data.train", "data.eval", "data.mixture", "data.chat_template", "data.cache", "eval.prompts")
    asked = hashlib.sha256(json.dumps([list(map(int, prompt["ids"])) for prompt in prompts]).encode()).hexdigest()[:16]
    settings = {name: value for name, value in config.flat().items() if name not in places}
    return settings | contents(tokenizer, rows, eval_rows) | {"prompts": asked, "torch": torch.__version__,
                                                              "device": record.kind_of(device)}


def restore(saved, path, accept, fresh, adapters, moments, scaler, device):
    """Put a loaded checkpoint's tensors in their places and return its state. Raises ValueError naming what is not as it was then.

    The first rank alone has it (None elsewhere); the others are told the state, and their generators. Where the number of ranks
    changed, the split of windows did, and with it which elements dropout hits: generators begin anew.
    """
    if ranks.FIRST:
        state = put_back(saved, path, accept, fresh, adapters, moments, scaler, device)
    state = json.loads(ranks.same(json.dumps(state if ranks.FIRST else None)))
    if any({"ranks", "generators"} & set(entry) for entry in state["accepted"] if entry["step"] == state["step"]):
        torch.manual_seed(seed_of(state["origin"]["train.seed"], state["step"]))
        return state
    drawn = saved["tensors"]["generators.safetensors"] if ranks.FIRST else {}
    own = generators(device)
    for name, states in own.items():
        of_ranks = [drawn.get(named(name, rank), states).clone() for rank in range(ranks.RANKS)]
        ranks.from_first(of_ranks)
        own[name] = of_ranks[ranks.RANK]
    try:
        set_generators(own, device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}/generators.safetensors: is no state of these generators ({error})") from None
    return state


def put_back(saved, path, accept, fresh, adapters, moments, scaler, device):
    """Adapter and optimizer of a loaded checkpoint into their places; returns its state. Raises ValueError as `restore`."""
    state, tensors = saved["state"], saved["tensors"]
    before = {"ranks": 1} | state["origin"] | {"generators": sorted(tensors.get("generators.safetensors", ()))}
    now = fresh["origin"] | {"generators": sorted(named(name, rank) for name in generators(device) for rank in range(before["ranks"]))}
    changed = {name: {"was": before.get(name), "is": value} for name, value in now.items() if before.get(name) != value}
    refused = [name for name in changed if name not in accept]
    if refused:
        details = "".join(f"\n  {name}: was {json.dumps(changed[name]['was'])}, is {json.dumps(changed[name]['is'])}" for name in refused)
        raise ValueError(f"{path}: the run cannot go on as it was, because this changed:{details}\n"
                         f"Put it back, or accept by name that the run is another from here on: --accept=\"{','.join(changed)}\"")
    optimizer = tensors.get("optimizer.safetensors", {})
    expected = {name: tensor.shape for name, tensor in {"step": moments["step"], **scaler}.items()}
    expected |= {f"{name}.{moment}": parameter.shape for name, parameter in adapters.items() for moment in ("exp_avg", "exp_avg_sq")}
    different = sorted(name for name in expected.keys() | optimizer.keys()
                       if name not in optimizer or optimizer[name].shape != expected.get(name))
    if different:
        raise ValueError(f"{path}/optimizer.safetensors: {different[0]} is missing, of another shape, "
                         f"or nothing that this optimizer keeps ({len(different)} such)")
    begun, of_step = tensors.get("noise.safetensors", {}), state["noise"][2]
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in begun.items()}
    if shapes != ({"earlier": (torch.bfloat16, moments["exp_avg"].shape)} if of_step else {}):
        raise ValueError(f"{path}/noise.safetensors: holds {shapes}, which does not go with noise {state['noise']} in state.json; "
                         "go on from another checkpoint with --resume=CHECKPOINT")
    lora_layers.set_adapters(adapters, tensors["adapter_model.safetensors"], str(path))
    for moment in ("exp_avg", "exp_avg_sq"):
        for name, view in views(moments[moment], adapters):
            view.copy_(optimizer[f"{name}.{moment}"])
    moments["step"].copy_(optimizer["step"])
    for name, value in scaler.items():
        value.copy_(optimizer[name])
    accepted = state["accepted"] + [{"step": state["step"], **changed}] * bool(changed)
    return state | {"origin": fresh["origin"], "plan": fresh["plan"], "accepted": accepted}


def generators(device):
    """The states of the generators that dropout draws from."""
    return {"torch": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else {})


def named(name, rank):
    """What a generator of a rank is called in a checkpoint."""
    return f"{name}.{rank}" if rank else name


def of_all_ranks(states):
    """`generators` of all ranks, {name: state}, on every rank."""
    return {named(name, rank): state for name in states for rank, state in enumerate(ranks.gathered(states[name]))}


def seed_of(seed, *key):
    """The seed of this rank's dropout: the first rank's is `seed` itself where there is no key."""
    return seed if ranks.FIRST and not key else int(np.random.SeedSequence([seed, ranks.RANK, *key]).generate_state(1)[0])


def set_generators(states, device):
    """Put the generators back into `states` of `generators`; {} leaves them as they are."""
    if states:
        torch.set_rng_state(states["torch"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"])


def views(flat, adapters):
    """(name, piece of a flat tensor in the parameter's shape) for each of `adapters`, laid out as in lora_layers.AdapterMemory."""
    pieces = flat.split([parameter.numel() for parameter in adapters.values()])
    return [(name, piece.view_as(parameter)) for (name, parameter), piece in zip(adapters.items(), pieces)]


def texts_of(tokenizer):
    """The tokenizer's own files {name: text}, template included, so that what is served later is what was trained.

    Raises ValueError for a tokenizer that no checkpoint could hold: before training, where nothing is lost by it.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError: text that is none came with the model
            raise ValueError(f"model.path: the tokenizer cannot be written down again ({error}); mend its tokenizer_config.json") from error
        texts = {path.name: path.read_text(encoding="utf-8") for path in pathlib.Path(folder).iterdir()
                 if path.suffix in (".json", ".jinja", ".txt")}
    for name, text in texts.items():
        if len(text.encode()) > checkpoint.LARGEST_TEXT:
            raise ValueError(f"model.path: the tokenizer's {name} would have {len(text.encode()):,} bytes, and a checkpoint holds texts "
                             f"of up to {checkpoint.LARGEST_TEXT:,}; give a model with a smaller vocabulary")
    return texts
