"""The run: load, then for each step take a window of samples, forward, backward, clip, step, record, evaluate, save.

    python train.py configs/approach1.json [--section.key=value ...] [--out=FOLDER] [--resume[=CHECKPOINT]] [--overwrite]
    python train.py --help          every key with its default

A step consumes micro_batch_size x accumulation samples. Their loss is summed over all supervised tokens of the window and
divided once, so how the window is cut into micro-batches changes nothing but rounding. Nothing inside a step waits for the
GPU: the host reads a step's figures while the next one runs. Exit codes: 0 done; 2 bad configuration or input; 4 stopped
because steps were not finite; 130 or 143 interrupted, with a checkpoint saved.
"""
import hashlib
import json
import math
import pathlib
import shutil
import signal
import sys
import time

import torch
from tqdm import tqdm

import checkpoint
import config as settings
import data
import eval as evaluation
import model
import quant
import record
import schedule

FREE_TO_CHANGE = {"eval", "save", "log", "memory"}  # sections that a resumed run may change: they do not shape the training curve


def train(config, run, resume, accept):
    """Train as `config` says, in the run folder `run` (pathlib.Path). Returns the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = data.load_tokenizer(config.model.path, config.data.chat_template)
    train_records, eval_records = data.read_splits(config)
    rows, eval_rows = data.tokenize(train_records, tokenizer, config.data), data.tokenize(eval_records, tokenizer, config.data)
    prompts = data.prompts(config, tokenizer, eval_records)
    end_ids = data.end_of_turn(tokenizer)
    max_steps, total_samples = schedule.plan_steps(config, len(rows))

    network = model.load(config, device)
    adapters = model.adapters(network)
    flat = network.adapter_memory.flat  # every adapter matrix in one buffer, with one gradient
    rate = torch.tensor(0.0, device=device)
    optimizer = torch.optim.AdamW([flat], lr=rate, betas=(config.train.adam_beta1, config.train.adam_beta2), eps=config.train.adam_eps,
                                  weight_decay=config.train.weight_decay, fused=True, capturable=device.type == "cuda")
    optimizer.state[flat] = {"step": torch.zeros((), device=device), "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
    scaler = {"scale": torch.tensor(65536.0 if config.model.compute_dtype == "fp16" else 1.0, device=device), "good_steps": torch.zeros((), device=device)}

    torch.manual_seed(config.train.seed)  # dropout's generator; the data order and the adapters' start have their own
    state = {"step": 0, "samples": 0, "tokens": 0, "supervised_tokens": 0, "seconds": 0.0, "norms": [], "nonfinite": 0, "skipped": 0, "best_step": None, "best_loss": None,
             "evaluations_without_improvement": 0, "stopped_early": False, "accepted": [], "origin": origin(config, tokenizer, rows, eval_rows, network), "plan": memory_plan(config, network)}
    if resume:
        state = restore(checkpoint.load(resume), resume, accept, state, config, adapters, optimizer.state[flat], scaler, device)
    model.recompute(network, state["plan"]["checkpoint_layers"])
    recorder = open_record(run, config, state["step"] if resume else None)
    introduce(config, run, rows, eval_rows, network, state, max_steps, total_samples)
    rehearse(network, flat, rows, state["plan"]["max_tokens"])
    interrupted = catch_signals()
    progress = tqdm(total=max_steps, initial=state["step"], unit="step", dynamic_ncols=True, disable=None, smoothing=0.1)
    began = time.perf_counter()

    def settle(done):
        """Read the figures of a step off the GPU, and write them down."""
        loss, grad_norm, finite, scale = done["figures"]()
        seconds = elapsed(*done["clock"])
        values = done["values"] | {"train/loss": loss, "train/grad_norm": grad_norm, "train/clip_threshold": done["threshold"], "train/clipped": float(grad_norm > done["threshold"]),
                                   "train/tokens_per_second": done["values"]["train/tokens"] / seconds, "train/seconds": seconds, "train/peak_memory_gib": peak_memory(device) / 2**30}
        values |= {"train/loss_scale": scale} if config.model.compute_dtype == "fp16" else {}
        if finite:
            state["norms"] = [*state["norms"], [done["step"], grad_norm]][-config.schedule.clip_window:]
            state["nonfinite"] = 0
        else:
            values["train/skipped"] = 1.0
            state["skipped"] += 1
            empty, searching = not done["values"]["train/supervised_tokens"], config.model.compute_dtype == "fp16" and scale > 1.0  # fp16 finds its loss scale by such steps
            state["nonfinite"] += not empty and not searching
            why = "no supervised token in its window" if empty else f"loss {loss}, gradient norm {grad_norm}"
            say(f"step {done['step']} was not applied: {why}; rows " + ", ".join(rows.names[i] for i in done["samples"][:8]) + (" …" if len(done["samples"]) > 8 else ""))
        recorder.write(done["step"], values)
        progress.set_postfix(loss=f"{loss:.3f}", lr=f"{values['train/learning_rate']:.1e}", norm=f"{grad_norm:.2f}", tok_s=f"{values['train/tokens_per_second']:.0f}", refresh=False)
        progress.update(done["step"] - progress.n)
        if done["step"] % config.log.every_steps == 0 or done["step"] == 1:
            left = (time.perf_counter() - began) / (done["step"] - first + 1) * (max_steps - done["step"])
            say(f"step {done['step']}/{max_steps}  loss {loss:.4f}  grad norm {grad_norm:.3f}  rate {values['train/learning_rate']:.2e}  {values['train/tokens_per_second']:,.0f} tokens/s  {left / 60:.1f} min left")
            for name, part in (("lora_A", slice(0, None, 2)), ("lora_B", slice(1, None, 2))):
                norms = torch.stack(torch._foreach_norm(list(adapters.values())[part]))
                recorder.histogram(done["step"], f"adapters/{name}_norm", norms)
                recorder.write(done["step"], {f"adapters/{name}_norm": norms.mean().item()})

    def evaluate(step):
        """Evaluate, sample, write both down; returns the loss."""
        figures, _ = evaluation.evaluate(network, eval_rows, config.eval.max_rows, state["plan"]["max_tokens"])
        samples = evaluation.generate(network, tokenizer, prompts, config.eval.max_new_tokens, end_ids)
        recorder.write(step, {f"eval/{name}": figures[name] for name in ("loss", "perplexity", "token_accuracy", "supervised_tokens", "seconds")} | {"eval/adapter_digest": digest(flat)})
        say(f"evaluation at step {step}: loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.2f}, token accuracy {figures['token_accuracy']:.4f} ({figures['rows']:,} rows, {figures['seconds']:.1f} s)")
        if samples:
            recorder.write(step, {"eval/stop_rate": evaluation.stop_rate(samples)})
            recorder.text(step, "samples", "\n\n".join(f"**{sample['prompt']}**\n\n{sample['text']}" for sample in samples))
            with open(run / "samples.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "samples": samples}) + "\n")
            if step in (0, max_steps):
                say(f"samples {'before' if step == 0 else 'after'} training:{evaluation.show(samples)}\n")
        return figures["loss"]

    def save(step):
        """A checkpoint of this step boundary."""
        recorder.flush()
        moments = {f"{name}.{moment}": view for moment in ("exp_avg", "exp_avg_sq") for name, view in zip(adapters, views(optimizer.state[flat][moment], adapters.values()))}
        generators = {"torch": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else {})
        written = state | {"seconds": state["seconds"] + time.perf_counter() - began}
        return checkpoint.save(run, step, {"adapter_model.safetensors": dict(adapters), "optimizer.safetensors": moments | {"step": optimizer.state[flat]["step"]} | scaler, "generators.safetensors": generators},
                               {"adapter_config.json": model.peft_settings(config.lora, network, config.model.path), "state.json": json.dumps(written, indent=1)} | texts_of(tokenizer),
                               keep=config.save.keep, best_step=state["best_step"])

    if state["step"] == 0:
        state["best_loss"] = evaluate(0)
    first, stop, pending = state["step"] + 1, "", None
    for step in range(first, max_steps + 1) if not state["stopped_early"] else ():
        clock = [mark(device)]
        start, count = schedule.window_samples(step, config, total_samples)
        samples = data.sample_stream(len(rows), config.train.seed, start, count)
        window = [batch.to(device) for batch in data.pack(rows, samples, state["plan"]["max_tokens"])]
        supervised, tokens = sum(len(batch.targets) for batch in window), sum(len(batch.input_ids) for batch in window)

        flat.grad.zero_()
        loss = torch.zeros((), device=device)
        for batch in window:
            batch_loss, _, _ = model.summed_loss(network, batch)
            (batch_loss * (scaler["scale"] / supervised)).backward()
            loss += batch_loss.detach() / supervised

        grad_norm = torch.linalg.vector_norm(flat.grad) / scaler["scale"]  # before clipping
        threshold = schedule.clip_threshold([norm for at, norm in state["norms"] if at < step - 1], config.schedule)  # the last step's norm is still on its way
        flat.grad.mul_(torch.clamp(threshold / (grad_norm + 1e-6), max=1.0) / scaler["scale"])
        finite = torch.isfinite(grad_norm) & torch.isfinite(loss) & bool(supervised)
        optimizer.found_inf = 1.0 - finite.float()  # where this is 1, AdamW leaves weights and moments as they are
        learning_rate = schedule.learning_rate(step, config.schedule, max_steps)
        rate.fill_(learning_rate)
        optimizer.step()
        if config.model.compute_dtype == "fp16":
            rescale(scaler, finite)

        clock.append(mark(device))
        state |= {"step": step, "samples": start + count, "tokens": state["tokens"] + tokens, "supervised_tokens": state["supervised_tokens"] + supervised}
        previous, pending = pending, {
            "step": step, "samples": samples, "clock": clock, "threshold": threshold, "figures": to_host(torch.stack((loss.float(), grad_norm.float(), finite.float(), scaler["scale"]))),
            "values": {"train/learning_rate": learning_rate, "train/samples": count, "train/tokens": tokens, "train/supervised_tokens": supervised, "train/epoch": (start + count) / len(rows)}}
        if previous:
            settle(previous)  # the GPU is busy with this step meanwhile

        due = {name: step == max_steps or every and step % every == 0 for name, every in (("evaluate", config.eval.every_steps), ("save", config.save.every_steps))}
        if any(due.values()) or interrupted or state["nonfinite"] >= config.train.nonfinite_limit:
            settle(pending)
            pending = None
        if state["nonfinite"] >= config.train.nonfinite_limit:
            stop = f"{state['nonfinite']} steps in a row were not finite and were not applied; the last rows are named above"
            break
        if due["evaluate"] and not interrupted:
            eval_loss = evaluate(step)
            better = eval_loss < state["best_loss"] - config.eval.min_delta
            state["evaluations_without_improvement"] = 0 if better else state["evaluations_without_improvement"] + 1
            if better:
                state |= {"best_loss": eval_loss, "best_step": step}
                due["save"] = True
            state["stopped_early"] = 0 < config.eval.patience <= state["evaluations_without_improvement"]
        if due["save"] or interrupted or state["stopped_early"]:
            where = save(step)
        if interrupted or state["stopped_early"]:
            break

    progress.close()
    recorder.close()
    if stop:
        print(f"stopped: {stop}")
        return 4
    if interrupted and state["step"] < max_steps:
        print(f"interrupted after step {state['step']}; saved {where}; go on with --resume")
        return 128 + interrupted[0]
    finish(run, state, max_steps)
    return 0


# ------------------------------------------------------------------------------------------------------------ set-up

def origin(config, tokenizer, rows, eval_rows, network):
    """What a run came from, as digests and settings: compared when it is resumed."""
    shaping = {f"{section}.{name}": value for section, values in config.to_dict().items() if section not in FREE_TO_CHANGE for name, value in values.items()}
    for path in ("model.path", "data.train", "data.eval"):  # may move; their content may not change
        shaping.pop(path)
    sha = lambda text: hashlib.sha256(text.encode()).hexdigest()
    return {"settings": shaping, "training rows": rows.digest, "evaluation rows": eval_rows.digest, "tokenizer": sha(tokenizer.backend_tokenizer.to_str()),
            "chat template": sha(tokenizer.chat_template or ""), "base weights": quant.fingerprint(model.frozen(network))}


def memory_plan(config, network):
    """How windows are packed and which layers are recomputed: memory.max_tokens and memory.checkpoint_layers, or chosen from the device."""
    on_gpu = network.device.type == "cuda"
    max_tokens, layers = config.memory.max_tokens or (8192 if on_gpu else 2048), config.memory.checkpoint_layers
    if layers < 0:
        inputs = sum(module.in_features + module.out_features for module in network.modules() if isinstance(module, model.AdaptedLinear))
        activations = 2 * max_tokens * inputs * 2  # bytes: what the projections keep, twice for what lies between them
        layers = len(network.get_decoder().layers) if on_gpu and activations > 0.7 * model.free_memory(network.device) else 0
    return {"max_tokens": max_tokens, "checkpoint_layers": layers}


def restore(saved, path, accept, fresh, config, adapters, moments, scaler, device):
    """Put a loaded checkpoint's tensors in their places and return its state. Raises ValueError for what differs from then."""
    state, tensors = saved["state"], saved["tensors"]
    before, now = state["origin"], fresh["origin"]
    changed = [name for name in now if name != "settings" and before[name] != now[name]]
    changed += [name for name in now["settings"] if before["settings"].get(name) != now["settings"][name]]
    if "generators.safetensors" not in tensors or (device.type == "cuda") != ("cuda" in tensors["generators.safetensors"]):
        changed.append("generators")
    refused = [name for name in changed if name not in accept]
    if refused:
        details = "".join(f"\n  {name}" + (f": was {json.dumps(before['settings'].get(name))}, is {json.dumps(now['settings'][name])}" if name in now["settings"] else "") for name in refused)
        raise ValueError(f"{path}: the run cannot go on as it was, because these changed:{details}\nput them back, or accept the change by name: --accept=\"{','.join(refused)}\"")
    model.set_adapters(adapters, tensors["adapter_model.safetensors"], str(path))
    optimizer = tensors["optimizer.safetensors"]
    for moment in ("exp_avg", "exp_avg_sq"):
        for name, view in zip(adapters, views(moments[moment], adapters.values())):
            view.copy_(optimizer[f"{name}.{moment}"])
    moments["step"].copy_(optimizer["step"])
    for name, value in scaler.items():
        value.copy_(optimizer[name])
    if "generators" not in changed:
        torch.set_rng_state(tensors["generators.safetensors"]["torch"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(tensors["generators.safetensors"]["cuda"])
    plan = state["plan"] if config.memory.max_tokens == 0 else fresh["plan"]  # the packing decides the rounding: go on with the same
    return state | {"origin": now, "plan": plan, "accepted": state["accepted"] + [{"step": state["step"], "changed": changed}] * bool(changed)}


def views(flat, parameters):
    """The pieces of a flat tensor that belong to `parameters`, in their shapes."""
    pieces, start = [], 0
    for parameter in parameters:
        pieces.append(flat[start:start + parameter.numel()].view_as(parameter))
        start += parameter.numel()
    return pieces


def texts_of(tokenizer):
    """The tokenizer's own files {name: text}, template included, so that what is served later is what was trained."""
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in pathlib.Path(folder).iterdir() if path.suffix in (".json", ".jinja", ".txt")}


def open_record(run, config, resume_step):
    """The run folder with its settings and surroundings written down, and the recorder of what happens."""
    run.mkdir(parents=True, exist_ok=True)
    recorder = record.Recorder(run, config.log.tensorboard, resume_step)
    (run / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
    (run / "environment.json").write_text(json.dumps(record.environment(), indent=1))
    samples = run / "samples.jsonl"
    if samples.exists():  # what a resumed run will write again
        kept = [line for line in samples.read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= (resume_step or -1)]
        samples.write_text("".join(kept))
    recorder.hyperparameters({f"{section}.{name}": value for section, values in config.to_dict().items() for name, value in values.items()})
    return recorder


def introduce(config, run, rows, eval_rows, network, state, max_steps, total_samples):
    """What is about to happen, in a few lines."""
    share = rows.counts["supervised_tokens"] / max(1, rows.counts["tokens"])
    print(f"run        {run}" + (f", going on after step {state['step']}" if state["step"] else ""))
    print(f"rows       {len(rows):,} to train on, {rows.counts['tokens']:,} tokens, {share:.1%} supervised; {len(eval_rows):,} to evaluate on")
    for name, what in (("rows_skipped", "could not be read"), ("rows_truncated", "cut to data.max_length"), ("rows_lost", "lost to data.max_length"), ("rows_unsupervised", "without a supervised token")):
        if rows.counts[name]:
            print(f"           {rows.counts[name]:,} {what}")
    print(f"steps      {max_steps:,} of {config.samples_per_step} samples: {total_samples:,} samples, {total_samples / len(rows):.2f} epochs")
    print(f"rate       {config.schedule.lr_kind}, peak {config.schedule.learning_rate:g} after {config.schedule.lr_warmup_steps} steps, floor {config.schedule.lr_min:g}")
    print(f"network    {type(network).__name__}, {config.model.quant}, computing in {config.model.compute_dtype} on {network.device}, attention {'varlen' if network.use_varlen else 'by documents'}")
    for part, (dtypes, size) in model.memory_table(network).items():
        print(f"           {part}: {size / 2**20:,.0f} MiB ({', '.join(sorted(dtypes))})")
    print(f"packing    micro-batches of up to {state['plan']['max_tokens']:,} tokens, {state['plan']['checkpoint_layers']} of {len(network.get_decoder().layers)} layers recomputed", flush=True)


def rehearse(network, flat, rows, max_tokens):
    """Forward and backward over the longest rows, before step 1 and on a GPU: what does not fit fails now, not late in the run."""
    if network.device.type != "cuda":
        return
    lengths = rows.offsets[1:] - rows.offsets[:-1]
    longest, total = [], 0
    for i in lengths.argsort(kind="stable")[::-1].tolist():
        if longest and total + lengths[i] > max_tokens:
            break
        longest.append(i)
        total += lengths[i]
    with torch.random.fork_rng(devices=[network.device]):
        try:
            for batch in data.pack(rows, longest, max_tokens):
                model.summed_loss(network, batch.to(network.device))[0].backward()
        except torch.cuda.OutOfMemoryError:
            raise ValueError(f"memory: {total:,} tokens in one micro-batch do not fit on the GPU; lower memory.max_tokens (now {max_tokens}) or raise memory.checkpoint_layers") from None
    flat.grad.zero_()


# -------------------------------------------------------------------------------------------------- pieces of the loop

def rescale(scaler, finite):
    """fp16 loss scaling (Micikevicius et al. 2018, section 3.2): halve the scale after a non-finite step, double it after 2000 finite ones."""
    good = torch.where(finite, scaler["good_steps"] + 1, 0)
    doubled = torch.where(good >= 2000, scaler["scale"] * 2, scaler["scale"])
    scaler["scale"].copy_(torch.where(finite, doubled, torch.clamp(scaler["scale"] / 2, min=1.0)))
    scaler["good_steps"].copy_(torch.where(good >= 2000, 0, good))


def to_host(figures):
    """Start copying a small tensor to the host; returns a function that waits for it and gives its numbers."""
    if figures.device.type != "cuda":
        return figures.tolist
    copy = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    copy.copy_(figures, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return lambda: (arrived.synchronize(), copy.tolist())[1]


def mark(device):
    """A point in time: on a GPU when it gets there, which may be later than now."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start, end):
    """Seconds between two marks."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def digest(flat):
    """Twelve hexadecimal digits that change when any adapter weight does."""
    return hashlib.sha256(flat.detach().cpu().numpy().tobytes()).hexdigest()[:12]


def peak_memory(device):
    """Most bytes ever in use: of the GPU's memory, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(text):
    """A line to the console, above the progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def catch_signals():
    """A list that holds the number of SIGINT or SIGTERM once one arrives: the run ends at the next step boundary. A third one kills."""
    caught = []

    def note(number, frame):
        caught.append(number)
        if len(caught) > 2:
            sys.exit(128 + number)
        say(f"{signal.Signals(number).name}: the run saves and ends after this step")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught


def finish(run, state, max_steps):
    """The end of a run in a few lines: what changed, and where to look."""
    metrics = record.read_metrics(run)
    losses = [line["train/loss"] for line in metrics if math.isfinite(line.get("train/loss", math.nan))]
    evals = [line for line in metrics if "eval/loss" in line]
    edge = max(1, min(25, len(losses) // 4))
    middle = lambda values: sorted(values)[len(values) // 2]
    print(f"finished   {state['step']:,} of {max_steps:,} steps" + (", stopped early: the evaluation loss no longer fell" if state["stopped_early"] else "") + (f", {state['skipped']} steps not applied" if state["skipped"] else ""))
    print(f"train      loss {middle(losses[:edge]):.4f} -> {middle(losses[-edge:]):.4f} (medians of the first and last {edge} steps)")
    print(f"evaluation loss {evals[0]['eval/loss']:.4f} -> {evals[-1]['eval/loss']:.4f}, token accuracy {evals[0]['eval/token_accuracy']:.4f} -> {evals[-1]['eval/token_accuracy']:.4f}")
    print(f"look       tensorboard --logdir {run.parent}      python eval.py --ckpt {run}")


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__ + settings.describe())
        return 0
    words, flags, overrides = settings.command_line(argv, {"out": "", "resume": None, "accept": "", "overwrite": False})
    if len(words) != 1:
        raise ValueError(f"give one configuration, as in: python train.py configs/approach1.json (got {' '.join(words) or 'none'})")
    path = pathlib.Path(settings.find(words[0]))
    config = settings.read(path, overrides)
    config = settings.located(config)
    run = pathlib.Path(flags["out"] or f"runs/{path.stem}")
    guard = checkpoint.lock(run)  # held until the process ends
    there = (run / "checkpoints").is_dir() and any((run / "checkpoints").iterdir())
    resume = None
    if flags["resume"]:
        resume, problems = checkpoint.newest_valid(run) if flags["resume"] is True else (checkpoint.find(flags["resume"]), [])
        for problem in problems:
            print(f"warning: passed over a damaged checkpoint: {problem}", file=sys.stderr)
    elif there and not flags["overwrite"]:
        raise ValueError(f"{run}: holds the checkpoints of an earlier run; go on with --resume, choose another folder with --out=, or replace it with --overwrite")
    else:
        for old in [run / "checkpoints", run / "samples.jsonl", run / "metrics.jsonl", *run.glob("events.out.tfevents.*")]:
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    code = train(config, run, resume, flags["accept"].split(",") if flags["accept"] else [])
    guard.close()
    return code


if __name__ == "__main__":
    import logging
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports an optional package that is not used here
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(settings.complain(error))
