"""What a run says on the console: what is about to happen, its alerts, how it ended. Eighty columns, above the progress bar."""
import json
import math
import sys
import textwrap

from tqdm import tqdm

import forecast
import ranks
import record
import report
import verdict


def introduce(run, config, rows, network, state, outlook):
    """What is about to happen: the forecast, and how it will be done."""
    plan = state["plan"]
    print(f"run       {run}" + (f", going on after step {state['step']:,}" if state["step"] else ""))
    if begun := record.continues(run):
        print(f"          begun in another folder: {begun}; the record until there is\n"
              "          in this one too, the best step is looked for anew")
    for accepted in state["accepted"]:
        for name in [name for name in accepted if name != "step"]:
            was, now = (json.dumps(accepted[name][which]) for which in ("was", "is"))
            print(textwrap.fill(f"accepted at step {accepted['step']}: {name} was {was}, is {now}", 80,
                                initial_indent=" " * 10, subsequent_indent=" " * 12))
    print(forecast.show_forecast(outlook))
    print("".join(f"{line}\n" for line in rows.remarks), end="")
    for count, what in (("turns_unsupervised", "answers are not supervised: the chat template hides what the model wrote"),
                        ("turns_hidden", "turns, tools or tool calls are not shown by the chat template")):
        if rows.counts[count]:
            print(f"\n{rows.counts[count]:,} {what}")
    print(f"network   {type(network).__name__}, {config.model.quant}, computing in {config.model.compute_dtype} on {network.device}\n"
          + (f"ranks     {ranks.RANKS:,} share each window{' and the frozen weights' * network.sharded}\n" if ranks.RANKS > 1 else "")
          + f"packing   up to {plan['max_tokens']:,} tokens a micro-batch, {plan['checkpoint_layers']} of "
          f"{len(network.get_decoder().layers)} layers recomputed"
          + (", their inputs on the host" if plan["offload"] else "") + (", embeddings on the host" if plan["host_embeddings"] else "")
          + "\n" + textwrap.fill(f"({plan['why']}); {network.fused_layers} layers fused, " + (
              "replayed as CUDA graphs" if plan["graphs"] else f"no CUDA graphs: {plan['why_no_graphs']}"),
              80, initial_indent=" " * 10, subsequent_indent=" " * 10) + "\n", flush=True)


def refuse(outlook, config):
    """Tell why the run does not begin. Returns the exit code."""
    print(forecast.show_forecast(outlook))
    print(f"\nrefused: {', '.join(found.name for found in forecast.refusals(outlook, config.forecast))}; nothing was written")
    return 3


def tell(heading, alert):
    """An alert as lines of 80 columns."""
    lines = [heading]
    for label, text in (("seen", alert.evidence), ("cause", alert.cause), ("remedy", alert.remedy)):
        lines += textwrap.wrap(text, 80, initial_indent=f"  {label:<8}", subsequent_indent=" " * 10, break_on_hyphens=False)
    return "\n".join(lines)


def say(text):
    """Lines to the console, above the progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def duration(seconds):
    """Seconds as a text of three figures at most."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def conclude(run, config, state, max_steps):
    """The end of a run: what changed, the verdict, the report, and where to look. Returns the exit code."""
    metrics = record.read_metrics(run)
    losses = [line["train/loss"] for line in metrics if math.isfinite(line.get("train/loss", math.nan))]
    evals = [line for line in metrics if "eval/loss" in line]
    edge = min(25, len(losses) // 4) or 1
    median = lambda values: sorted(values)[len(values) // 2] if values else math.nan
    enough = f" by {config.eval.min_delta:g} (eval.min_delta)" if config.eval.min_delta else ""
    print(f"finished   {state['step']:,} of {max_steps:,} steps" + (f", {state['skipped']} of them not applied" if state["skipped"] else "")
          + (f", stopped early: the evaluation loss no longer fell{enough}" if state["step"] < max_steps else ""))
    of = f"medians of the first and last {edge} steps" if edge > 1 else "the first and the last step"
    print(f"train      loss {median(losses[:edge]):.4f} -> {median(losses[-edge:]):.4f} ({of})")
    print("evaluation " + (", ".join(f"{what} {evals[0][tag]:.4f} -> {evals[-1][tag]:.4f}"
                                     for what, tag in (("loss", "eval/loss"), ("token accuracy", "eval/token_accuracy")))
                           if evals else f"none in {run / 'metrics.jsonl'}: lines of it were lost"))
    print(f"           best after step {state['best_step']}: {run}@best" if state["best_step"] else
          f"           no evaluation was better{enough} than the one before step 1")
    judged = verdict.of_run(run)
    with record.writing(f"{run}: the verdict"):
        verdict.write(run, judged)
    print(f"\n{verdict.shown(judged)}\n")
    if config.log.report:
        with record.writing(f"{run}: the report"):
            print(f"report     {report.write(run)[0]}")
    print(f"look       tensorboard --logdir {run.parent}\n           python eval.py --ckpt {run}")
    return verdict.exit_code(judged)
