"""The run: load, then for each step take a window of samples, forward, backward, clip, step, record, evaluate, save.

    python train.py configs/approach1.json             a run, in runs/approach1
    python train.py CONFIG --train.max_steps=20 --data.train=my.jsonl --out=FOLDER
    python train.py CONFIG --resume                    go on from the newest checkpoint
    python train.py CONFIG --resume=CHECKPOINT         go back to that one (with --out=NEW: go on in a new folder)
    python train.py CONFIG --resume --accept=NAME,...  go on though NAME changed
    python train.py CONFIG --overwrite                 replace an earlier run
    python train.py CONFIG --preflight                 only the forecast: what the run would see, need and take
    python train.py CONFIG --overfit 8                 learn the first 8 rows by heart, or say why not (overfit.py)
    python train.py --help                             every key and its default
    torchrun --standalone --nproc-per-node=2 train.py CONFIG    the same run on two GPUs (ranks.py)

A step consumes micro_batch_size x accumulation samples. Their loss is summed over all supervised tokens of the window
and divided once, so how the window is cut into micro-batches changes nothing but rounding (and which elements adapter
dropout hits). Nothing inside a step waits for a GPU: the host reads a step's figures while the next one runs. State is
saved between steps only. Exit codes: 0 done; 1 another rank was lost; 2 bad configuration or input; 3 refused by the
forecast; 4 stopped by an alert (steps that are not finite, dead or wrong gradients); 5 finished, but short of
criteria.enforce; 130 or 143 interrupted, with a checkpoint saved.
"""
import dataclasses
import gc
import hashlib
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import time

BEGAN = time.perf_counter()
# read when torch first asks for GPU memory: fewer gaps between tensors
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
gc.disable()  # imports make millions of objects and no garbage

import torch
from tqdm import tqdm

import alerts
import checkpoint
import clock
import config as settings
import console
import continuation
import data
import eval as evaluation
import forecast
import graphs
import lora_layers
import memory
import model
import overfit
import proof
import quant
import ranks
import record
import report
import schedule
import telemetry

gc.enable()
gc.freeze()  # these modules stay, so no later collection need go through them

PATIENCE = 10  # seconds that a window may go on after a signal; then it is given up, to be done by the resumed run


def train(config, device, run, guard, resume, accept, preflight, by_heart=False):
    """Train as `config` says, in the run folder `run`. Returns the exit code.

    guard: the lock on the folder, None where there is no such folder yet: it is made when settings, data and model are
    accepted. resume: the checkpoint to go on from, or None. accept: names of differences to it that are accepted.
    preflight: end with the forecast. by_heart: --overfit, so evaluate on the training rows, and end once they are known. Every rank runs
    all of this; the first alone reads and writes the run folder.
    """
    ended = clock.Startup(BEGAN)
    ended("imports")

    # Rows, the checkpoint to go on from, and what can be foretold without the model.
    tokenizer = data.load_tokenizer(config.model.path, config.data.chat_template, config.model.revision)
    with ranks.one_first():
        rows, eval_rows = data.load(config, tokenizer)
    tokenizer_files = continuation.texts_of(tokenizer)
    eval_rows, lowest = (rows, overfit.floor(rows)[0]) if by_heart else (eval_rows, 0.0)
    prompts, end_ids = data.prompts(config, tokenizer), data.end_of_turn(tokenizer)
    ranks.begin_alike(continuation.of_every_rank(config, tokenizer, rows, eval_rows, prompts, device))
    saved = continuation.load_checkpoint(resume) if resume and ranks.FIRST else None
    source = other_run(resume, run)
    if source:  # the best checkpoint until here is the other run's; every rank is told this state
        saved["state"] |= {"best_step": None, "best_loss": None, "without_improvement": 0}
    before = json.loads(ranks.same(json.dumps(saved["state"] if saved else {})))
    began_in = str(before.get("origin", {}).get("model.compute_dtype"))  # what a run began in, it goes on in, also on another device
    config = settings.settled(config, began_in if began_in in quant.DTYPES else ranks.same(quant.dtype_for(config.model, device)))
    initial = continuation.load_initial(config) if config.lora.init_from and not before else None
    max_steps, total_samples = schedule.plan_steps(config, len(rows))
    facts = forecast.Facts.of(rows, eval_rows)
    outlook = forecast.forecast(config, facts)
    if forecast.refusals(outlook, config.forecast):
        return console.refuse(outlook, config)
    ended("rows")

    # The model, its adapters and their optimizer.
    unquantised = None if preflight or before and before["evaluated"] >= 0 else evaluation.evaluate_unquantised(config, device, eval_rows)
    ended("unquantised model")
    network = model.load(config, device)
    ended("model")
    evaluation.check_rows(network, rows, eval_rows, sampled=evaluation.longest_sample(prompts, config))
    untrained = evaluation.untrained_tokens(network, tokenizer, rows)
    adapters = lora_layers.adapters(network)
    if initial:
        lora_layers.set_adapters(adapters, initial, config.lora.init_from)
    flat = network.adapter_memory.flat  # every adapter matrix in one buffer, with one gradient
    rate = torch.tensor(0.0, device=device)
    optimizer, moments = make_optimizer(config, flat, rate)
    fp16 = config.model.compute_dtype == "fp16"
    scaler = {"scale": torch.tensor(65536.0 if fp16 else 1.0, device=device), "good_steps": torch.zeros((), device=device)}
    torch.manual_seed(continuation.seed_of(config.train.seed))  # dropout's generator; the data order and the adapters' start have their own

    # How windows are packed, and where the run stands.
    base_weights = quant.fingerprint(model.frozen(network))
    ended("fingerprint of weights")
    plan = memory.plan(config, network, rows, before.get("plan", {}))
    ended("memory plan")
    gc.collect()
    gc.freeze()  # what is loaded stays too: recording a graph collects, and would go through all of it each time
    state = {"step": 0, "samples": 0, "tokens": 0, "supervised_tokens": 0, "norms": [], "nonfinite": 0, "skipped": 0, "line": {},
             "evaluated": -1, "best_step": None, "best_loss": None, "without_improvement": 0, "noise": telemetry.NoiseScale().state()[0],
             "plan": plan, "origin": continuation.origin(config, tokenizer, rows, eval_rows, base_weights, plan), "accepted": []}
    if before:
        state = continuation.restore(saved, resume, accept, state, adapters, moments, scaler, device)
    if state["step"] > max_steps:
        raise ValueError(f"--resume: the checkpoint is of step {state['step']:,}, and the run as asked for ends with step {max_steps:,}; "
                         "raise train.max_steps (or train.epochs), or go on from an earlier one with --resume=RUN@step-…")
    digest = lambda: hashlib.sha256(flat.detach().cpu().numpy()).hexdigest()
    ranks.from_first([flat, *moments.values(), *scaler.values()])
    if ranks.RANKS > 1:
        ranks.begin_alike({"base weights": base_weights, "adapters": digest()})

    # When the run ends, and how.
    fatal, too_large = [], []  # alerts that end the run; a row that does not fit into memory even alone, told with its name
    must_stop = lambda: state["nonfinite"] == config.train.nonfinite_limit or bool(fatal)
    out_of_patience = lambda: 0 < config.eval.patience <= state["without_improvement"]
    stopped_early = lambda: out_of_patience() or by_heart and overfit.learnt(state["best_loss"], lowest)
    finished = lambda: stopped_early() or state["evaluated"] == max_steps  # which is the last thing that a run does
    conclude = lambda: overfit.conclude(run, rows) if by_heart else console.conclude(run, config, state, max_steps)
    concluded = lambda: int(ranks.same(str(conclude()) if ranks.FIRST else ""))
    if finished():
        if source:
            raise ValueError(f"--resume: {resume} is the end of its run, so there is nothing to go on with in {run}; raise "
                             "train.max_steps, or start from its adapter with --lora.init_from=")
        print(f"finished already: {resume} is the end of the run")
        return concluded()

    # A micro-batch's passes, rehearsed on the first window; then the forecast knows memory and time too.
    def forward_backward(batch, weight):
        """Add weight x the gradient of a micro-batch's summed loss to flat.grad, and return that loss."""
        batch_loss, _, _ = model.summed_loss(network, batch.to(device))
        (batch_loss * weight).backward()
        return batch_loss.detach()

    if plan["graphs"]:
        forward_backward = graphs.Replayed(network, forward_backward)
    next_window = schedule.window_samples(min(state["step"] + 1, max_steps), config, total_samples)
    first_samples = data.samples(rows, config.train.seed, *next_window)
    mine = data.share(rows, first_samples, plan["fits"], network.sharded)
    probed = json.loads(ranks.same(json.dumps(memory.rehearse(network, mine, forward_backward, config.memory.budget_gib))))
    ended("rehearsal")
    probed["step_seconds"] *= total_samples / max_steps / max(1, len(first_samples))
    facts = dataclasses.replace(facts, trainable=len(flat), memory=memory.parts(network, moments, probed), **probed)
    outlook = forecast.forecast(config, facts)
    if forecast.refusals(outlook, config.forecast):
        return console.refuse(outlook, config)
    if preflight:
        print(forecast.show_forecast(outlook))
        return 0

    # What the run writes and watches.
    due = lambda every, step: step in (0, max_steps) or every > 0 and step % every == 0
    owed = due(config.eval.every_steps, state["step"]) and state["evaluated"] != state["step"]  # the first one, or one that was interrupted
    interrupted, ending = catch_signals(), []  # ending: signals that every rank knows of, and acts on
    recorder = record.Nobody()
    if ranks.FIRST:
        guard = guard or claim(run)  # held until the process ends
        recorder = open_record(run, config, state, resume, source, owed, outlook)
        data.keep_dropped(rows, run)
    console.introduce(run, config, rows, network, state, outlook)
    if untrained:
        print(f"warning: {untrained}", file=sys.stderr)
    ended("record")
    weights, begun = telemetry.measure_weights(network), saved["tensors"].get("noise.safetensors", {}) if saved else {}
    noise = telemetry.NoiseScale()
    if ranks.FIRST:
        noise = telemetry.NoiseScale(state["noise"], {name: tensor.to(device) for name, tensor in begun.items()})
    watch, raised = alerts.Alerts(config, max_steps, len(rows)), {}  # raised: step -> its alerts
    for line in record.read_metrics(run) if resume and ranks.FIRST else ():
        watch.see(line)
    progress = tqdm(total=max_steps, initial=state["step"], unit="step", dynamic_ncols=True, disable=None if ranks.FIRST else True)

    # What happens at and behind a step, in functions that the loop below calls.
    def agree():
        """What one rank was told, or found, all of them act on: a signal, an alert that ends the run, a row that does not fit."""
        own = json.dumps([interrupted, fatal, too_large]) if interrupted or fatal or too_large else ""
        told = [json.loads(text) for text in ranks.words(own)]
        for place, known in enumerate((ending, fatal, too_large)):  # a signal that comes while the others are heard is for the next time
            known[:] = [what for of_rank in told for what in of_rank[place]]

    def attend(step, values):
        """Write figures of a step down, and raise the alerts that they call for."""
        recorder.write(step, values)
        found = watch.see({"step": step, **values}) if ranks.FIRST else []  # the figures are all ranks', the steps before a resume its own
        if found:
            raised[step] = [*raised.get(step, []), *found]
            recorder.write(step, {"alerts": alerts.as_text(raised[step])})
            recorder.text(step, "alerts", "\n\n".join(f"**{alert.severity}: {alert.name}** {alert.evidence} {alert.cause} {alert.remedy}"
                                                      for alert in raised[step]))
            for alert in found:
                console.say(console.tell(f"ALERT at step {step}: {alert.name} ({alert.severity})", alert))
        fatal.extend(alert.name for alert in watch.fatal(found))

    if owed and state["line"]:  # the step's line was not over; it is told of again
        attend(state["step"], {tag: record.NONFINITE.get(value, value) for tag, value in state["line"].items()})

    def look_for_dead(step, applied, finite):
        """Find adapter matrices without a gradient in the first steps: B's in the first that is applied, A's once B has moved.

        Returns what of it goes into the step's record.
        """
        matrix = proof.due_matrix(applied, alive)
        dead = proof.dead(continuation.views(flat.grad, adapters), matrix) if matrix and finite else []
        if matrix == "lora_A":  # where B is still zero, theirs is zero rightly
            dead = sorted(set(dead) - set(proof.asleep(network, dead)))
        alive.update({matrix} if matrix and finite else ())
        if not dead or not config.proof.enabled:
            return {}
        told = f"after step {step} {len(dead)} of the {matrix} have a gradient that is zero or not finite: {proof.some(dead)}"
        console.say(f"gradients  DEAD: {told}")
        fatal.append("dead gradients")
        return {"proof/outcome": f"dead: {told}"}

    def settle(done):
        """Read a step's figures off the device and write them down. A step that was not applied is told with its rows."""
        step, values = done["step"], done["values"]
        loss, grad_norm, finite, scale, *rest = done["figures"]()
        noise_sums, adapter_norms = rest[:done["noise_count"]], rest[done["noise_count"]:]
        seconds = clock.elapsed(*done["marks"])
        values |= {"train/loss": loss, "train/grad_norm": grad_norm, "train/clipped": float(grad_norm > values["train/clip_threshold"]),
                   "train/skipped": float(not finite), "train/seconds": seconds}
        values["train/tokens_per_second"] = values["train/tokens"] / seconds
        values |= {"train/peak_memory_gib": max(done["peak"], memory.peak(device)) / 2**30} | memory.reserved(device)
        values |= noise.update(noise_sums) | ({"train/loss_scale": scale} if fp16 else {})
        if finite:
            state["norms"] = [*state["norms"], [step, grad_norm]][-config.schedule.clip_window - 1:]
            state["nonfinite"] = 0
        else:
            state["skipped"] += 1
            empty = values["train/supervised_tokens"] == 0
            searching = fp16 and scale > 1 and math.isfinite(loss)  # such steps are how fp16 finds its loss scale
            state["nonfinite"] += not empty and not searching
            why = "no supervised token in its window" if empty else f"loss {loss}, gradient norm {grad_norm}"
            console.say(f"step {step} was not applied: {why}; rows {', '.join(rows.names[i] for i in done['samples'])}")
        if adapter_norms:
            for matrix in ("lora_A", "lora_B"):
                norms = [norm for name, norm in zip(adapters, adapter_norms) if f".{matrix}." in name]
                values[f"adapters/{matrix}_norm"] = sum(norms) / len(norms)
                recorder.histogram(step, f"adapters/{matrix}_norm", torch.tensor(norms))
        if step == first:
            ended.seconds["first step"] = seconds
            values |= {"startup/seconds": ended.total(), "startup/parts": json.dumps(ended.seconds)}
            console.say(ended.shown())
        attend(step, values)
        state["line"] = {tag: value if isinstance(value, str) or math.isfinite(value) else str(value) for tag, value in values.items()}
        progress.set_postfix(loss=f"{loss:.3f}", lr=f"{values['train/learning_rate']:.1e}",
                             tok_s=f"{values['train/tokens_per_second']:.0f}", refresh=False)
        progress.update(step - progress.n)
        if due(config.log.every_steps, step) or step == 1:
            left = (time.perf_counter() - began) / (state["step"] - first + 1) * (max_steps - state["step"])
            console.say(f"step {step}/{max_steps}  loss {loss:.4f}  norm {grad_norm:.3f}  rate {values['train/learning_rate']:.1e}  "
                        f"{values['train/tokens_per_second']:,.0f} tok/s  {console.duration(left)} left")

    def evaluate(step):
        """Evaluate and sample, write both down, and remember the best. What an interruption cuts short, the resumed run does."""
        figures, by_row = evaluation.evaluate(network, eval_rows, config.eval.max_rows, plan["evaluates"], interrupted)
        drawing = time.perf_counter()
        samples = figures and evaluation.generate(network, tokenizer, prompts, config.eval.max_new_tokens, end_ids, interrupted)
        if any(ranks.most(samples is None)):
            return
        sampled = time.perf_counter() - drawing
        plan["evaluates"] = -ranks.most(-figures["max_tokens"])[0]
        loss = figures["loss"]
        values = {f"eval/{name}": figures[name] for name in ("loss", "perplexity", "token_accuracy", "supervised_tokens", "seconds")}
        values["eval/adapter_digest"] = digest()[:12]
        keep = evaluation.keep if ranks.FIRST else lambda *_: None
        keep(run, f"step-{step:06d}", by_row, step, eval_rows, tokenizer, network)
        if unquantised and step == 0:
            values |= {f"eval/unquantised_{name}": unquantised[0][name] for name in ("loss", "token_accuracy")}
            keep(run, "unquantised", unquantised[1], 0, eval_rows, tokenizer, network)
        console.say(f"step {step}/{max_steps}  evaluation loss {loss:.4f}  perplexity {figures['perplexity']:.2f}  "
                    f"token accuracy {figures['token_accuracy']:.4f}")
        if samples:
            values |= {f"eval/{name}": value for name, value in evaluation.sample_figures(samples).items()}
            values |= {"eval/samples": json.dumps(samples), "eval/samples_seconds": sampled}
            recorder.text(step, "eval/samples", "\n\n".join(f"**{sample['prompt']}**\n\n{sample['text']}" for sample in samples))
            if step in (0, max_steps):
                console.say(f"samples {'before' if step == 0 else 'after'} training:\n{evaluation.show(samples)}\n")
        values |= telemetry.adapters(network, weights)
        attend(step, values)
        better = math.isfinite(loss) and (state["best_loss"] is None or loss < state["best_loss"] - config.eval.min_delta)
        if better:
            state.update(best_loss=loss, best_step=step or None)
        state.update(evaluated=step, without_improvement=0 if better else state["without_improvement"] + 1)

    def prove(step):
        """Compare the gradients with the loss itself, where that is due: they may be alive and wrong."""
        what = proof.due(config, step, first, max_steps, device)
        if not what or ending:
            return
        start, count = schedule.window_samples(min(step + 1, max_steps), config, total_samples)
        batches = proof.sample(config, rows, data.sample_stream(len(rows), config.train.seed, start, count), device)
        result = proof.check(network, forward_backward, batches, scaler["scale"], what, config.proof.seconds)
        console.say(result.text)
        if step >= first or owed:  # the line of an earlier step is closed
            recorder.write(step, result.values)
        if result.ok is False:
            fatal.append("dead gradients" if result.dead else "wrong gradients")

    def save(step):
        """A checkpoint of this step boundary, written by the first rank. Returns where it is."""
        ranks.check_same(digest(), "adapters")
        drawn = continuation.of_all_ranks(continuation.generators(device))
        if not ranks.FIRST:
            return None
        recorder.flush()
        by_name = {f"{name}.{moment}": view for moment in ("exp_avg", "exp_avg_sq")
                   for name, view in continuation.views(moments[moment], adapters)}
        tensors = {"adapter_model.safetensors": dict(adapters), "optimizer.safetensors": by_name | {"step": moments["step"]} | scaler,
                   "generators.safetensors": drawn}
        state["noise"], begun = noise.state()
        tensors |= {"noise.safetensors": begun} if begun else {}
        texts = {"adapter_config.json": lora_layers.peft_settings(config.lora, network, config.model.path),
                 "state.json": json.dumps(state, indent=1)}
        return checkpoint.save(run, step, tensors, texts | tokenizer_files, config.save.keep, state["best_step"])

    # Before the first step: the evaluation that is owed, and the gradients proved.
    first, pending, applied, alive = state["step"] + 1, [], 0, set()
    ended("telemetry")
    try:
        if owed:
            evaluate(state["step"])
            ended("evaluation")
        prove(state["step"])
        ended("gradient proof")
    except model.DoesNotFit as error:
        too_large.append(str(error))
    agree()
    leaving = bool(ending or too_large) or stopped_early() or must_stop()
    if leaving or owed and state["step"]:
        where = save(state["step"])

    # The loop: take a window, forward and backward, clip, step, record; evaluate, prove and save where due.
    began = time.perf_counter()
    for step in range(first, max_steps + 1) if not leaving else ():
        marks = [clock.mark(device)]
        start, count = schedule.window_samples(step, config, total_samples)
        samples = data.samples(rows, config.train.seed, start, count)
        window = data.share(rows, samples, plan["fits"], network.sharded)
        of_window = [sum(len(batch.targets) for batch in window), sum(len(batch.input_ids) for batch in window if batch.samples)]
        telling = len(alive) < 2 and proof.telling(window)
        supervised, tokens, telling = ranks.total(torch.tensor([*of_window, telling])).tolist()
        drawn = continuation.generators(device) if config.lora.dropout else {}

        loss, late = None, False
        while loss is None and not late:  # once, and again in smaller micro-batches where memory runs out: their sum is the same
            flat.grad.zero_()
            try:
                loss = torch.zeros((), device=device)
                for batch in window:
                    late = bool(interrupted) and not network.sharded and time.monotonic() - interrupted[0][1] > PATIENCE
                    if late:
                        break
                    loss += forward_backward(batch, scaler["scale"] / supervised) / supervised
            except (RuntimeError, MemoryError) as error:
                loss = None
                too_large += memory.shrink(plan, step, batch, rows, error, network.sharded)
            late = late or bool(too_large)
            if loss is None or late:
                continuation.set_generators(drawn, device)
                graphs.forget(forward_backward)
                model.release_memory()
                window = data.share(rows, samples, plan["fits"])
        late, least, peak = ranks.most(late, -plan["fits"], memory.peak(device) if ranks.RANKS > 1 else 0)
        if -least < plan["fits"]:
            memory.pack_smaller(plan, step, -least, "on another rank:")
        if late:  # the window is given up, and the step before it is where the run ends
            continuation.set_generators(drawn, device)
            while pending:
                settle(pending.pop(0))
            agree()
            where = save(state["step"])
            break

        ranks.total(flat.grad)
        ranks.total(loss)
        grad_norm = torch.linalg.vector_norm(flat.grad) / scaler["scale"]  # before clipping
        noise_sums = noise.observe(step, flat.grad, scaler["scale"], count)  # every ten steps, of two windows; else empty
        known = [norm for at, norm in state["norms"] if at < step - 1]  # the last step's norm may still be on its way
        threshold = schedule.clip_threshold(known, config.schedule)
        flat.grad.mul_(torch.clamp(threshold / (grad_norm + 1e-6), max=1.0) / scaler["scale"])
        finite = torch.isfinite(grad_norm) & torch.isfinite(loss) & bool(supervised)
        optimizer.found_inf = 1.0 - finite.float()  # where this is 1, AdamW leaves weights and moments as they are
        learning_rate = schedule.learning_rate(step, config.schedule, max_steps)
        rate.fill_(learning_rate)
        optimizer.step()
        if fp16 and supervised:
            rescale(scaler, finite)

        found_dead = {}
        if telling:  # the first steps: waiting for the device costs nothing yet
            applied += bool(finite)
            found_dead = look_for_dead(step, applied, finite)

        marks.append(clock.mark(device))
        figures = torch.cat((torch.stack((loss, grad_norm, finite, scaler["scale"])).float(), noise_sums.float()))
        if due(config.log.every_steps, step):
            figures = torch.cat((figures, torch.stack(torch._foreach_norm(list(adapters.values()))).float()))
        state |= {"step": step, "samples": start + count}
        state |= {"tokens": state["tokens"] + tokens, "supervised_tokens": state["supervised_tokens"] + supervised}
        values = {"train/learning_rate": learning_rate, "train/clip_threshold": threshold, "train/samples": count, "train/tokens": tokens,
                  "train/supervised_tokens": supervised, "train/epoch": (start + count) / len(rows)}
        values |= found_dead | ({"train/max_tokens": plan["fits"]} if plan["shrunk"] else {})
        pending.append({"step": step, "samples": samples, "marks": marks, "noise_count": len(noise_sums),
                        "figures": clock.to_host(figures), "values": values, "peak": peak})

        evaluation_due, save_due = due(config.eval.every_steps, step), due(config.save.every_steps, step)
        proof_due = proof.due(config, step, first, max_steps, device)
        agree()
        boundary = evaluation_due or save_due or bool(proof_due) or bool(ending) or bool(fatal)
        while len(pending) > (0 if boundary else 1) and state["nonfinite"] < config.train.nonfinite_limit:
            settle(pending.pop(0))  # of the step before, while a GPU is busy with this one
        agree()
        if must_stop():
            break
        if not boundary:
            continue
        try:
            if evaluation_due and not ending:
                evaluate(step)
            prove(step)
        except model.DoesNotFit as error:
            too_large.append(str(error))
        agree()
        if must_stop():
            break
        leaving = bool(ending or too_large) or stopped_early()
        if save_due or leaving or state["best_step"] == step:
            where = save(step)
        if leaving:
            break

    # The end: what to tell, and the exit code.
    progress.close()
    recorder.close()
    ranks.all_here()
    if must_stop():
        print(f"stopped: {state['nonfinite']} steps in a row were not finite, and none of them was applied; their rows are named above. "
              "Mend the rows or the settings, then go on from the last checkpoint with --resume." if not fatal else
              f"stopped after step {state['step']} by the alert: {', '.join(dict.fromkeys(fatal))}; see above for cause and remedy. "
              "alerts.stop says which alerts do that.")
        if config.log.report and ranks.FIRST:
            print(f"look     {report.write(run)[0]}")
        ranks.all_here()
        return 4
    if too_large and ranks.FIRST:
        raise ValueError(f"{too_large[0]}; the run stopped after step {state['step']}, saved {where}, and goes on with --resume")
    if too_large:
        return 2
    if not finished():
        print(f"interrupted after step {state['step']}; saved {where}" + ("" if by_heart else "; go on with --resume"))
        return 128 + ending[0][0]
    return concluded()


# ------------------------------------------------------------------------------------------------------------ set-up

def make_optimizer(config, flat, rate):
    """(fused AdamW over the one buffer `flat`, its state "step", "exp_avg" and "exp_avg_sq"). rate: a scalar tensor, read at each step."""
    train, device = config.train, flat.device
    optimizer = torch.optim.AdamW([flat], lr=rate, betas=(train.adam_beta1, train.adam_beta2), eps=train.adam_eps,
                                  weight_decay=train.weight_decay, fused=True, capturable=device.type == "cuda")
    moments = optimizer.state[flat]  # AdamW would make them at its first step, but a run that goes on fills them before
    moments |= {"step": torch.zeros((), device=device), "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
    return optimizer, moments


def be_deterministic():
    """On a GPU, the same bits in every run: sums in a fixed order everywhere, or an error. Before CUDA starts."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # which CUDA's library reads when it starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a guard against reading what was never written; it takes time
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward pass adds in whatever order threads arrive


def claim(run):
    """The lock on a run folder that was not there when the run was asked for.

    Raises ValueError where another process made a run in it since.
    """
    guard = checkpoint.lock(run)
    if any(run.glob("checkpoints/step-*")):
        raise ValueError(f"{run}: another process made a run in this folder while this one was loading; choose another with --out=, "
                         "or go on with --resume")
    return guard


def check_place(run):
    """Raises ValueError where a run folder cannot be made or written to: before the model is loaded, which may take minutes."""
    if "\0" in str(run):
        raise ValueError("--out: a folder's name holds no zero byte; name another")
    place = next(place for place in (run, *run.absolute().parents) if os.path.lexists(place))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "cannot be written to" if place.is_dir() else "leads nowhere" if place.is_symlink() else "is a file"
        raise ValueError(f"--out: {run} cannot hold a run, since {place} {what}; name another folder")


def other_run(resume, run):
    """The folder of the run that the checkpoint `resume` is of, where that is not `run`; None where it is, or there is no such run."""
    if not resume:
        return None
    source = resume.absolute().parents[1]
    return source if resume.parent.name == "checkpoints" and source.resolve() != run.resolve() else None


def open_record(run, config, state, resume, source, owed, outlook):
    """The recorder, and settings and surroundings written down. Where an evaluation is owed, its step's line is begun again.

    source: the folder of another run whose record until here belongs to this one too, or None.
    """
    if not resume:  # what lies there has no checkpoint to go on from, or is to be overwritten
        names = ("checkpoints", "evaluations", "metrics.jsonl", "continues.json", "verdict.json", "report.md", "plots")
        for old in [*(run / name for name in names), *run.glob("events.out.tfevents.*")]:
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    elif source:
        record.take_along(source, run, state["step"])
    written = {"config.json": config.to_dict(), "environment.json": record.environment() | {"ranks": ranks.RANKS},
               "forecast.json": forecast.as_json(outlook)}
    for name, tree in written.items():
        with record.writing(run / name, "make room and start again"):
            (run / f".{name}.tmp").write_text(json.dumps(tree, indent=1), encoding="utf-8")
            os.replace(run / f".{name}.tmp", run / name)
    recorder = record.Recorder(run, config.log.tensorboard, state["step"] - owed if resume else None)
    shaping = ("model.", "lora.", "train.", "schedule.")
    recorder.hyperparameters({name: value for name, value in config.flat().items() if name.startswith(shaping)})
    return recorder


# -------------------------------------------------------------------------------------------------- pieces of the loop

def rescale(scaler, finite):
    """fp16 loss scaling: halve the scale after a step that is not finite, double it after 2000 that are.

    Micikevicius et al. 2018, section 3.2.
    """
    good = torch.where(finite, scaler["good_steps"] + 1, 0)
    doubled = torch.where(good >= 2000, scaler["scale"] * 2, scaler["scale"])
    scaler["scale"].copy_(torch.where(finite, doubled, torch.clamp(scaler["scale"] / 2, min=1.0)))
    scaler["good_steps"].copy_(torch.where(good >= 2000, 0, good))


def catch_signals():
    """A list that holds (SIGINT or SIGTERM, when) once one arrives: the run ends at the next step boundary. A third one kills."""
    caught = []

    def note(number, frame):
        caught.append((number, time.monotonic()))
        if len(caught) > 2:
            sys.exit(128 + number)
        console.say(f"{signal.Signals(number).name}: the run saves and ends after this step; twice more, and it ends at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__ + settings.describe())
        return 0
    known = {"out": "", "resume": None, "accept": "", "overwrite": False, "preflight": False, "overfit": ""}
    words, flags, overrides = settings.command_line(argv, known)
    if len(words) != 1:
        raise ValueError(f"give one configuration, as in: python train.py configs/approach1.json (got {' '.join(words) or 'none'})")
    if flags["preflight"] and (flags["resume"] or flags["overwrite"] or flags["accept"]):
        raise ValueError("--preflight is the forecast of a new run; leave --resume, --accept and --overwrite out")
    if flags["resume"] and flags["overwrite"] or flags["accept"] and not flags["resume"]:
        raise ValueError("--overwrite starts anew and --resume goes on: give one of them; --accept goes with --resume")
    path = pathlib.Path(settings.find(words[0]))
    config = settings.located(settings.read(path, overrides))
    run = pathlib.Path(flags["out"] or f"runs/{path.stem}")
    if flags["overfit"]:
        config, run = overfit.begin(config, run, flags)
    if not flags["preflight"]:  # which writes nothing
        check_place(run)
    if config.train.deterministic and torch.cuda.is_available():
        be_deterministic()
    device = ranks.start(config.train.rank_wait)
    if config.memory.shard and ranks.RANKS == 1:
        raise ValueError("memory.shard: there is one rank, and nothing to split over; start several: "
                         f"torchrun --nproc-per-node=2 train.py {words[0]}")
    guard = checkpoint.lock(run) if run.is_dir() and not flags["preflight"] and ranks.FIRST else None
    resume, problems = None, []
    if flags["resume"] and ranks.FIRST:
        resume, problems = checkpoint.newest_valid(run) if flags["resume"] is True else (checkpoint.find(flags["resume"]), [])
        source = other_run(resume, run)
        if source and not flags["out"]:
            raise ValueError(f"--resume: {resume} is no checkpoint of {run}; give --out={source} to go back in its own run, or --out=NEW "
                             "to go on from it in a new folder")
        if source and any(run.glob("checkpoints/step-*")):
            raise ValueError(f"--resume: {resume} is a checkpoint of another run than {run}, whose record would be mixed with it; "
                             "name a new folder with --out=")
    elif ranks.FIRST and any(run.glob("checkpoints/step-*")) and not flags["overwrite"] and not flags["preflight"]:
        raise ValueError(f"{run}: holds the checkpoints of an earlier run; go on with --resume, choose another folder with --out=, "
                         "or replace it with --overwrite")
    for problem in problems:
        print(f"warning: passed over a damaged checkpoint: {problem}", file=sys.stderr)
    accept = flags["accept"].split(",") if flags["accept"] else []
    try:
        return train(config, device, run, guard, resume, accept, flags["preflight"], bool(flags["overfit"]))
    finally:
        gc.unfreeze()  # where another run follows in this process, the memory of this one is its own again


if __name__ == "__main__":
    settings.run_command(ranks.together(main))
