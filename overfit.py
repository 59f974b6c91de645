"""--overfit N: the oldest sanity check of training code. Learn the first N rows by heart, or say why that cannot be done.

A model of millions of adapter weights can learn a few rows until their loss is next to nothing. Where it does not, something is
wrong that more rows and more steps will not cure: dead or wrong gradients, labels that do not belong to their inputs, a rate that
does nothing or too much, or rows that contradict each other. The last is told apart exactly: rows that begin alike and go on
differently leave a loss that no model can go below, and `floor` computes it. Leaves out: any statement about other rows.

    python train.py configs/approach1.json --overfit 8       in runs/approach1-overfit; exit code 0: learnt, 5: not

The rows are the first N of the training source (of a mixture, of its first source); they are the evaluation rows too, and the
run ends with the first evaluation that knows them. docs/PROOF.md has an example.
"""
import collections
import hashlib
import math
import statistics
import textwrap

import config as configuration
import record

NEAR = 0.1   # nats a token above the floor: each token of the answers has a probability of 0.9, so greedy decoding writes the rows down
RATE = 1e-3  # at least: with fewer tokens than weights there is nothing to be careful about, and a tenth of it takes ten times the steps
# alerts of what is wanted here, or told at the end
BY_HEART = ("growing gap", "evaluation worse than before training", "nothing left to learn", "plateau")
STEPS = 300  # at least, as long as the loss is not down


def begin(config, run, flags):
    """(config.Config, run folder) of --overfit, from those of the run that it checks and train.py's flags.

    Without --out the folder is the run's with "-overfit" behind it, and what an earlier check left there is replaced. Raises ValueError
    for a number that is none, and for flags that a check has no use for.
    """
    text, others = str(flags["overfit"]), [name for name in ("resume", "accept", "preflight") if flags[name]]
    if others:
        raise ValueError(f"--overfit is a check by itself, of some minutes; leave out --{others[0]}")
    if not text.isdecimal() or not int(text):
        raise ValueError(f"--overfit: must be a number of rows above 0, as in --overfit 8, got {text}")
    flags["overwrite"] = flags["overwrite"] or not flags["out"]
    return settings(config, int(text)), run if flags["out"] else run.with_name(run.name + "-overfit")


def settings(config, rows):
    """The config.Config under which `rows` rows are learnt by heart: those of `config`, but for how data, rate and record are handled.

    A step takes all rows; the rate is constant after ten steps of warm-up, and at least RATE; no dropout, no decay, no growing
    batches, no clipping that adapts; evaluated is every 20 steps, on the same rows; one checkpoint, the last. The proof stays on.
    """
    tree = config.to_dict()
    tree["data"] |= {"train": config.data.sources[0], "mixture": [], "first_rows": rows, "drop": [], "audit": "off",
                     "eval": config.data.eval or config.data.sources[0]}
    tree["train"] |= {"micro_batch_size": rows, "accumulation": 1, "weight_decay": 0.0,
                      "max_steps": max(STEPS, config.train.max_steps), "epochs": 0.0}
    rate = max(RATE, config.schedule.learning_rate)
    tree["schedule"] |= {"learning_rate": rate, "lr_min": 0.0, "lr_kind": "constant", "lr_warmup_steps": 10, "lr_decay_steps": 0,
                         "lr_points": [], "batch_points": [], "clip_percentile": 0.0}
    tree["lora"] |= {"dropout": 0.0}
    tree["eval"] |= {"every_steps": 20, "max_rows": 0, "samples": 0, "prompts": "", "patience": 0, "unquantised": "no"}
    tree["save"] |= {"every_steps": 0, "keep": 1}
    tree["log"] |= {"every_steps": 20, "report": False}
    tree["criteria"] |= {"enforce": "none"}
    tree["forecast"] |= {"acknowledge": sorted({*config.forecast.acknowledge, "many epochs"})}
    tree["alerts"] |= {"ignore": sorted({*config.alerts.ignore, *BY_HEART})}
    return configuration.from_dict(tree)


def floor(rows):
    """(lowest mean loss in nats that any model can have on a data.Rows, [(name, name), ...] of rows that contradict each other).

    A model sees what stands before a token and nothing else. So where the same tokens, from the start of a row, are followed by
    different supervised ones, the best it can do is give each its share: the entropy of what follows, summed over all such places.
    With data.supervise = all every row's beginning is such a place. Pairs are named once each, by the rows where they first differ.
    """
    following, first, pairs, supervised = collections.defaultdict(collections.Counter), {}, {}, 0
    for row in range(len(rows)):
        digest = hashlib.blake2b(digest_size=16)
        start, end = int(rows.offsets[row]), int(rows.offsets[row + 1])
        for place in range(start, end):
            token = int(rows.ids[place])
            if rows.supervised[place]:
                key = digest.digest()
                following[key][token] += 1
                supervised += 1
                known = first.setdefault(key, {})
                for other, owner in known.items():
                    if other != token:
                        pairs.setdefault((rows.names[owner], rows.names[row]), None)
                known.setdefault(token, row)
            digest.update(token.to_bytes(8, "little"))
    nats = sum(-count * math.log(count / counts.total()) for counts in following.values() if len(counts) > 1 for count in counts.values())
    return nats / max(1, supervised), [pair for pair in pairs if pair[0] != pair[1]]


def learnt(loss, lowest):
    """Whether a mean loss says that the rows are known by heart. None: no loss yet."""
    return loss is not None and loss <= lowest + NEAR


def judge(lines, lowest, contradictions):
    """(exit code, text): 0 where the rows were learnt by heart (their loss is next to the lowest, or each of their tokens is put first
    at the end), else 5 with the likely reason and what to do.

    lines: the run's record as from record.read_metrics. lowest, contradictions: from `floor`.
    """
    losses = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    evals = [(line["step"], line["eval/loss"]) for line in lines if "eval/loss" in line]
    known = [(step, loss) for step, loss in evals + losses if math.isfinite(loss)]
    if not known or not losses and not learnt(known[0][1], lowest):
        return 5, wrap("overfit    no verdict: the record holds no step with a finite loss; see the messages above")
    start, best = min(known)[1], min(known, key=lambda pair: pair[1])
    finite = [loss for _, loss in losses if math.isfinite(loss)]
    target = f"{lowest + NEAR:.3f}" + (f" ({lowest:.3f} of it is what the rows themselves do not decide)" if lowest > 0.0005 else "")
    note = ""
    if contradictions:
        a, b = contradictions[0]
        note = (f" {len(contradictions)} pair{'s' * (len(contradictions) > 1)} of rows begin alike and go on differently, as {a} and {b} "
                f"do: no model can know both by heart. The lowest mean loss that these rows allow is {lowest:.3f}.")
    if learnt(best[1], lowest):
        return 0, wrap(f"overfit    LEARNT: loss {start:.3f} -> {best[1]:.3f} by step {best[0]:,}, at most {target} was asked.{note}")

    last = next((line for line in reversed(lines) if "eval/token_accuracy" in line), {})
    if last.get("eval/token_accuracy") == 1.0 and best[1] < 0.9 * start:
        return 0, wrap(f"overfit    LEARNT: at step {last['step']:,} the model puts every token of the rows first. Their loss came down "
                       f"from {start:.3f} to {best[1]:.3f}, not to the {target} that was asked: more steps may bring it there, "
                       f"or a frozen head can be no surer.{note}")

    steps, quarter = len(losses), max(1, len(finite) // 4)
    late, before = statistics.median(finite[-quarter:]), statistics.median(finite[-2 * quarter:-quarter] or finite[:quarter])
    norms = [line["train/grad_norm"] for line in lines if "train/grad_norm" in line]
    rates = [line["train/learning_rate"] for line in lines if "train/learning_rate" in line]
    clipped = [line["train/clipped"] for line in lines if "train/clipped" in line]
    skipped = sum(line.get("train/skipped", 0.0) for line in lines)
    rate = max(rates, default=0.0)
    if norms and not any(norms):
        why = "every gradient norm is exactly 0.0: nothing reaches the adapters. The gradient proof above says where"
    elif skipped > steps / 2:
        why = (f"{skipped:.0f} of {steps} steps were not applied, since their loss or gradient was not finite: "
               "see the rows named above, or compute in bf16")
    elif not rate:
        why = "the learning rate was 0 throughout: set schedule.learning_rate"
    elif late > 1.05 * start or late > best[1] + 0.5 and late > 0.5 * start:
        why = (f"the loss rose again, from {best[1]:.3f} at best to {late:.3f}: the rate of {rate:g} is too high for this model; "
               f"lower it: --schedule.learning_rate={rate / 5:g}")
    elif (late > 0.97 * start and clipped and sum(clipped) == len(clipped)
          and statistics.median(norms) > 100 * lines[-1].get("train/clip_threshold", math.inf)):
        why = "the loss stayed where it was, and every step was clipped to less than a hundredth: raise schedule.clip_norm"
    elif late > 0.97 * start:
        why = (f"the loss stayed where it was ({start:.3f}, and {late:.3f} at the end), at a rate of {rate:g}: either that is far too low, "
               "or what is trained is not what is evaluated; if the gradient proof passed, raise schedule.learning_rate tenfold")
    elif late < 0.95 * before:
        why = (f"the run was too short: the loss still fell, from {before:.3f} to {late:.3f} over its last quarters; "
               f"raise train.max_steps (now {steps:,}) or the rate (now {rate:g})")
    else:
        why = (f"the loss no longer fell, from {before:.3f} to {late:.3f} over its last quarters: raise lora.r or adapt more projections "
               "(lora.targets), and look at what is supervised with python data.py CONFIG --check: "
               "labels that do not belong to their inputs take as long as noise does")
    return 5, wrap(f"overfit    NOT LEARNT: loss {start:.3f} -> {best[1]:.3f} at best (step {best[0]:,}), where {target} was asked. "
                   f"Likely reason: {why}.{note}")


def conclude(run, rows):
    """Tell whether the rows of a finished check are known, and why not. Returns the exit code."""
    code, text = judge(record.read_metrics(run), *floor(rows))
    print(text)
    return code


def wrap(text):
    """Lines of 80 columns, the later ones under the eleventh."""
    return "\n".join(textwrap.wrap(text, 80, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False))
