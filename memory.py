"""What fits: how many tokens a micro-batch holds and how many layers are recomputed, from a probe of the device before step 1.

The probe runs forward and backward passes of two small micro-batches, all layers recomputed and all but a few, and reads the
peak of the GPU's memory. That peak grows in a straight line with the tokens, so four readings tell it for every size between. Of the
choices that fit, the few that should be fastest are run on the longest rows, and the clock decides. A small model whose longest rows
fit with everything stored needs no probe. What the user set stays as set, and so does the plan of a run that goes on. Leaves out: the
host's memory (on a CPU the sizes are fixed), and graphs' own pools, which small models have.
"""

import json
import time

import torch

import console
import data
import graphs
import model
import quant
import ranks

MARGIN = 0.94            # of the memory is planned for: the allocator cannot use every gap
SIZES = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 10240, 12288, 16384)  # tokens; beyond, matrix products gain nothing
RECOMPUTED = 0.27        # a recomputed layer's extra time: its forward pass without the last product, of forward + backward
DEQUANTISED = 210        # tokens: a layer's weights are dequantised twice in the time in which about so many tokens are computed
SHORT = 120              # tokens: what matrix products lose at small sizes, in the same way
OFFLOADED = 0.01         # copies beside the products slow them a little
TRIED = 3                # choices that are timed, of sizes at least twice as large from one to the next
CLEARLY = 1.03           # times as fast as what should be fastest must another choice be timed to take its place: one pass scatters so much
WORTH_TRYING = 1.15      # times the cost of the cheapest, by the four figures above, which were measured on one kind of GPU


def plan(config, network, rows, before):
    """How windows are packed and which layers are recomputed; puts the network into that state. `before`: a saved run's plan, or {}.

    Returns {"max_tokens", "fits", "evaluates", "shrunk", "checkpoint_layers", "keep_dequantized", "offload", "host_embeddings",
    "graphs", "why_no_graphs", "why"}. "fits" is max_tokens, or what was left of it when memory ran out during the run ("shrunk" tells
    when); it is what windows are packed to. "evaluates" is the same for evaluations, which of a small model, whose launches take longer
    than its kernels, are packed to more: their passes store nothing.
    What the probe chose is tried on the longest rows, and chosen again with less memory where that does not fit. train.deterministic
    leaves out the clock, which does not choose alike each time.
    Raises ValueError with the remedy where nothing fits.
    """
    layers = len(network.get_decoder().layers)
    kept = any(weight.kept is not None for weight in quant.quantised(network))
    if network.device.type == "cuda" and config.memory.budget_gib:
        total = torch.cuda.get_device_properties(network.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, config.memory.budget_gib * 2**30 / total))
    max_tokens = config.memory.max_tokens or before.get("max_tokens")
    checkpoint_layers = before.get("checkpoint_layers")
    if config.memory.checkpoint_layers >= 0:
        checkpoint_layers = min(layers, config.memory.checkpoint_layers)
    on_host = config.memory.offload == "yes"
    chosen = {"max_tokens": max_tokens, "checkpoint_layers": checkpoint_layers,
              "keep_dequantized": kept and before.get("keep_dequantized", True),
              "offload": before.get("offload", on_host), "host_embeddings": before.get("host_embeddings", on_host)}
    tried = False  # on the longest rows
    if network.device.type != "cuda":
        chosen |= {"max_tokens": max_tokens or 2048, "checkpoint_layers": checkpoint_layers or 0,
                   "offload": False, "host_embeddings": False, "why": "fixed on a CPU"}
    elif max_tokens and checkpoint_layers is not None:
        chosen["why"] = "as set" if not before else "as the run began"
    else:
        found, tried = choose(config, network, rows, chosen)
        chosen |= found
    apply(network, chosen)
    why_not = ("memory.graphs is no" if config.memory.graphs == "no" else
               "train.deterministic is set" if config.train.deterministic else
               graphs.serves(network, chosen["checkpoint_layers"]))
    same = before.get("max_tokens") == chosen["max_tokens"] and "fits" in before
    if same:
        chosen |= {name: before[name] for name in ("fits", "evaluates", "shrunk")}
    else:
        larger = graphs.LARGEST if not (why_not or config.memory.max_tokens) else 0
        chosen |= {"fits": chosen["max_tokens"], "evaluates": max(chosen["max_tokens"], larger), "shrunk": []}
    if not tried and seconds_a_token(network, rows, chosen["fits"]) is None:
        lengths = rows.offsets[1:] - rows.offsets[:-1]
        raise ValueError("memory: a micro-batch of the longest rows does not fit on the GPU; lower memory.max_tokens "
                         f"(now {chosen['fits']:,}) or data.max_length (the longest row, {rows.names[int(lengths.argmax())]}, "
                         f"has {int(lengths.max()):,} tokens), or raise memory.checkpoint_layers (now {chosen['checkpoint_layers']})")
    return chosen | {"graphs": not why_not, "why_no_graphs": why_not}


def choose(config, network, rows, chosen):
    """(what is new in a plan begun as `chosen`, whether that was the last to run on the longest rows), from what fits the GPU.

    Raises ValueError where nothing fits.
    """
    max_tokens, checkpoint_layers = chosen["max_tokens"], chosen["checkpoint_layers"]
    window = config.samples_per_step
    if config.schedule.batch_points:
        window = max(window, *(samples for _, samples in config.schedule.batch_points), 1)
    lengths = rows.offsets[1:] - rows.offsets[:-1]
    sizes = [max_tokens] if max_tokens else sizes_for(int(window / ranks.RANKS * lengths.mean() * 1.3), int(lengths.max()))
    limit = room(network.device, config.memory.budget_gib)
    replayed = lambda layers: config.memory.graphs != "no" and not graphs.serves(network, layers)
    everything = {"max_tokens": sizes[-1], "checkpoint_layers": 0, "offload": False}
    if replayed(checkpoint_layers or 0) and stores(network, rows, chosen | everything, limit):
        return everything | {"why": f"{torch.cuda.max_memory_allocated() / 2**30:.1f} of {limit / 2**30:.1f} GiB taken"}, True
    found = probe(network, chosen["keep_dequantized"])
    for less in (1.0, 0.9, 0.8, 0.7):
        candidates = choices(found, sizes, checkpoint_layers, config.memory, limit * less)
        candidates = shortlist(candidates, limit * less, 1 if config.train.deterministic else TRIED)
        if replayed(candidates[0]["checkpoint_layers"]):
            candidates = candidates[:1]  # an eager pass would time launches, which a replay has not
        quickest = fastest(network, rows, chosen, json.loads(ranks.same(json.dumps(candidates))))
        chosen = chosen | (quickest or candidates[0])
        if quickest:
            return quickest, len(candidates) == 1  # of several, the last one may have been another
    return candidates[0], False


def apply(network, chosen):
    """Recompute, offload and give up copies as `chosen` says."""
    if not chosen["keep_dequantized"]:
        model.drop_dequantized(network)
    if chosen["host_embeddings"]:
        chosen["host_embeddings"] = model.embeddings_to_host(network)
    model.recompute(network, chosen["checkpoint_layers"], chosen["offload"] and chosen["checkpoint_layers"] > 0)


def stores(network, rows, chosen, limit):
    """Whether the longest rows, packed as `chosen` says, take at most `limit` bytes, on every rank. Puts the network into that state."""
    apply(network, chosen)
    fits = seconds_a_token(network, rows, chosen["max_tokens"]) is not None and torch.cuda.max_memory_allocated() <= limit
    return not any(ranks.most(not fits))


def fastest(network, rows, chosen, candidates):
    """The candidate, as from `shortlist`, that takes the least time a token on the longest rows; None where none of them fits."""
    timed = []
    for candidate in candidates:
        apply(network, chosen | candidate)
        seconds = seconds_a_token(network, rows, candidate["max_tokens"], passes=3 if len(candidates) > 1 else 1)
        taken = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB taken" if network.device.type == "cuda" else ""
        timed += [(seconds, candidate | {"why": f"{candidate['why']}, {taken}"})] if seconds is not None else []
    margin = lambda i: timed[i][0] * (CLEARLY if i else 1.0)
    which = int(ranks.same(str(min(range(len(timed)), key=margin, default=-1))))  # by the first rank's clock
    if not timed:
        return None
    least, best = timed[which]
    slower = [f"{other['max_tokens']:,} tokens took {took / least:.2f} times as long" for took, other in timed if other is not best]
    return best | {"why": "; ".join([best["why"], *slower])}


def seconds_a_token(network, rows, max_tokens, passes=1):
    """How long forward and backward pass over the longest rows take, the shortest of so many times; None where they do not fit on
    every rank.

    So what does not fit fails now, not late in the run. 0.0 on a CPU, where nothing is tried.
    """
    if network.device.type != "cuda":
        return 0.0
    lengths = rows.offsets[1:] - rows.offsets[:-1]
    longest, total = [], 0
    for i in lengths.argsort(kind="stable")[::-1].tolist():
        if longest and total + lengths[i] > max_tokens:
            break
        longest.append(i)
        total += lengths[i]
    took = []
    torch.cuda.reset_peak_memory_stats()
    try:
        with torch.random.fork_rng(devices=[network.device]):
            for _ in range(passes):
                began = time.perf_counter()
                for batch in data.pack(rows, longest, max_tokens):
                    model.summed_loss(network, batch.to(network.device))[0].backward()
                torch.cuda.synchronize()
                took.append(time.perf_counter() - began)
        seconds = min(took) / int(total)
    except torch.cuda.OutOfMemoryError:
        seconds = None
    network.adapter_memory.flat.grad.zero_()
    model.release_memory() if seconds is None else torch.cuda.empty_cache()
    return None if any(ranks.most(seconds is None)) else seconds


def shrink(plan, step, batch, rows, error, sharded):
    """Halve what is packed into a micro-batch, for the rest of the run, after `batch` raised `error`.

    Returns [], or, where a row does not even fit alone, [which]. Raises `error` where memory was not what it lacked.
    """
    try:
        fits = model.smaller(batch, rows, error, sharded)
    except model.DoesNotFit as alone:
        return [str(alone)]
    pack_smaller(plan, step, fits, f"over {len(batch.input_ids):,} tokens: again, and")
    return []


def pack_smaller(plan, step, fits, where):
    """Pack at most `fits` tokens into a micro-batch for the rest of the run, and say so."""
    console.say(f"step {step}: memory ran out {where} from now on, with at most {fits:,}")
    plan["shrunk"].append({"step": step, "from": plan["fits"], "to": fits})
    plan["fits"] = fits  # evaluations, which store nothing, find out by themselves what fits


def rehearse(network, window, forward_backward, budget_gib):
    """Run the first window once for its time, changing nothing. Returns forecast.Facts' {"step_seconds", "peak_bytes", "available_bytes"}.

    window: micro-batches; forward_backward: train.py's own. Graphs are recorded first, which takes two more runs. The peak is that since
    the longest rows were tried on a GPU, and of the whole process on a CPU.
    """
    device, flat = network.device, network.adapter_memory.flat
    weight = torch.tensor(0.0, device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for _ in range(3 if isinstance(forward_backward, graphs.Replayed) else 1):
            began = time.perf_counter()
            for batch in window:
                forward_backward(batch, weight)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
    flat.grad.zero_()
    if device.type == "cuda":
        return {"step_seconds": seconds, "peak_bytes": peak(device), "available_bytes": int(room(device, budget_gib) / MARGIN)}
    return {"step_seconds": seconds, "peak_bytes": peak(device), "available_bytes": peak(device) + model.free_memory(device)}


def parts(network, moments, probed):
    """{part: bytes} of the network, the optimizer and, on a GPU, what the probed step took beside them."""
    parts = {f"{part} ({', '.join(sorted(dtypes))})": size for part, (dtypes, size) in model.memory_table(network).items()}
    parts["optimizer and gradients (float32)"] = sum(tensor.nbytes for tensor in moments.values()) + network.adapter_memory.flat.grad.nbytes
    if network.device.type == "cuda":
        parts["activations"] = max(0, probed["peak_bytes"] - sum(parts.values()))
    return parts


def peak(device):
    """Most bytes ever in use: of the GPU's memory, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reserved(device):
    """{"train/peak_reserved_memory_gib"}: what torch held of the GPU at most, gaps and spare blocks included; {} on a CPU."""
    return {"train/peak_reserved_memory_gib": torch.cuda.max_memory_reserved() / 2**30} if device.type == "cuda" else {}


def room(device, budget_gib):
    """Bytes that tensors of this process may take in all, those that are there included."""
    free, total = torch.cuda.mem_get_info(device)
    usable = free + torch.cuda.memory_reserved(device)
    return min(usable, budget_gib * 2**30 or usable) * MARGIN


def sizes_for(window_tokens, longest):
    """Micro-batch sizes worth thinking about for windows of about so many tokens, each holding the longest row at least."""
    useful = [size for size in SIZES if size < window_tokens] + [size for size in SIZES if size >= window_tokens][:1]
    return sorted({max(size, longest) for size in useful})


def probe(network, kept):
    """{"base": bytes that are there, "stored", "recomputed": (bytes at no token, bytes a token) of the peak above, ...}, measured.

    The sizes lie beyond the head's chunk of logits (memory.loss_chunk), from where on only the layers' part grows.
    """
    layers = len(network.get_decoder().layers)
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    found = {"layers": layers, "base": base, "input": network.config.hidden_size * network.get_input_embeddings().weight.itemsize}
    lines, few = {}, min(4, layers)
    for stored in (0, few):  # storing a few layers tells what storing all would take, which need not fit
        model.recompute(network, layers - stored)
        peak_bytes(network, 256)  # compiles, and fills what is cached
        for tokens in (min(max(network.loss_chunk, 1024), 4096), 1024):  # where memory is short, smaller ones must do
            small, large = peak_bytes(network, tokens), peak_bytes(network, 2 * tokens)
            if any(ranks.most(large is None)):
                continue
            slope = max(0, (large - small) / tokens)
            lines[stored] = max(0.0, small - base - tokens * slope), slope
            break
        else:
            raise ValueError("memory: 2,048 tokens do not fit on the GPU, though every layer but a few is recomputed; "
                             "quantise to fewer bits (model.quant), take a smaller model, or free the GPU")
    found["recomputed"] = lines[0]
    found["stored"] = tuple(max(none, none + (some - none) * layers / few) for none, some in zip(lines[0], lines[few]))
    weights = quant.quantised(network)
    itemsize = network.get_input_embeddings().weight.itemsize
    found["kept"] = sum(weight.in_features * weight.out_features for weight in weights) * itemsize if kept else 0
    table = network.get_input_embeddings().weight
    found["table"] = table.numel() * itemsize if table is not network.get_output_embeddings().weight else 0
    found["dequantised"] = bool(weights)
    return found


def peak_bytes(network, tokens):
    """The peak of allocated memory in a forward and backward pass of so many tokens in documents of 1,024, all supervised; None where
    they do not fit."""
    flat, device, length = network.adapter_memory.flat, network.device, min(tokens, 1024)
    ids = torch.arange(tokens) % min(1000, len(network.get_input_embeddings().weight))
    starts = torch.tensor([*range(0, tokens, length), tokens], dtype=torch.int32)
    rows = torch.arange(tokens - 1)
    batch = data.MicroBatch(input_ids=ids, position_ids=torch.arange(tokens) % length, cu_seqlens=starts, max_seqlen=length,
                            rows=rows, targets=ids[1:], document=rows // length, samples=list(range(len(starts) - 1)))
    torch.cuda.reset_peak_memory_stats()
    try:
        with torch.random.fork_rng(devices=[device]):
            model.summed_loss(network, batch.to(device))[0].backward()
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        flat.grad.zero_()
    return torch.cuda.max_memory_allocated()


def choices(found, sizes, checkpoint_layers, asked, limit):
    """Every combination that might serve, as dicts with "bytes" and relative "cost" a token; pure arithmetic on `found` (see probe)."""
    layers, (c0, s0), (c1, s1) = found["layers"], found["stored"], found["recomputed"]
    for tokens in sizes:
        for kept in (True, False) if found["kept"] and asked.keep_dequantized == "auto" else (bool(found["kept"]),):
            for offload in {"auto": (False, True), "yes": (True,), "no": (False,)}[asked.offload]:
                base = found["base"] - (0 if kept else found["kept"]) - offload * found["table"]
                more = [count for count in range(layers + 1) if checkpoint_layers in (None, count)]
                for count in more:
                    share = count / layers
                    size = base + c0 + (c1 - c0) * share + tokens * (s0 + (s1 - s0) * share)
                    if offload and count:
                        size -= (tokens * found["input"]) * max(0, count - 3)  # a few are on their way at any time
                    dequantised = 0 if kept or not found["dequantised"] else DEQUANTISED * (1 + 0.5 * share)
                    cost = (1 + RECOMPUTED * share) * (1 + dequantised / tokens + SHORT / tokens) * (1 + OFFLOADED * offload)
                    yield {"max_tokens": tokens, "checkpoint_layers": count, "keep_dequantized": kept,
                           "offload": offload and count > 0, "host_embeddings": offload, "bytes": size, "cost": cost}
                    if size <= limit:
                        break  # more recomputation would only be slower


def shortlist(candidates, limit, count=TRIED):
    """The cheapest candidate that fits `limit` bytes, and up to `count` in all that come near it with other sizes, the cheapest first.

    They keep copies and embeddings where the cheapest does. ValueError where nothing fits, with what the smallest would take.
    """
    candidates = list(candidates)
    fitting = [candidate for candidate in candidates if candidate["bytes"] <= limit]
    if not fitting:
        least = min(candidates, key=lambda candidate: candidate["bytes"])
        raise ValueError(f"memory: {limit / 2**30:.1f} GiB are not enough: with {least['max_tokens']:,} tokens a micro-batch and "
                         f"{least['checkpoint_layers']} layers recomputed the run would take {least['bytes'] / 2**30:.1f} GiB; "
                         "give it more memory (memory.budget_gib), shorter rows (data.max_length), fewer bits (model.quant) "
                         "or a smaller model")
    fitting.sort(key=lambda candidate: (candidate["cost"], candidate["bytes"]))
    alike = lambda a, b: all(a[name] == b[name] for name in ("keep_dequantized", "host_embeddings"))  # the others cannot be gone back on
    apart = lambda a, b: max(a["max_tokens"], b["max_tokens"]) >= 2 * min(a["max_tokens"], b["max_tokens"])
    chosen = fitting[:1]
    for candidate in fitting:
        near = candidate["cost"] <= WORTH_TRYING * chosen[0]["cost"] and alike(candidate, chosen[0])
        if len(chosen) < count and near and all(apart(candidate, other) for other in chosen):
            chosen.append(candidate)
    return [{name: value for name, value in candidate.items() if name not in ("bytes", "cost")}
            | {"why": f"probe: {candidate['bytes'] / 2**30:.1f} of {limit / 2**30:.1f} GiB expected"} for candidate in chosen]
