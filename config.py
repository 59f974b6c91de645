"""What was asked for: every setting of a run, with its default, unit and rule.

A run is described by one JSON file with the sections below; any key can be given on the command line as
--section.key=value. Settings come from there and nowhere else: no environment variables, no globals. All errors are
collected and reported in one message before anything else happens. Leaves out: whether the settings can learn
(health.py), and whether files and models exist (data.py, model.py).

    python train.py --help              every key, its default and what it means
"""
import dataclasses
import json
import logging
import math
import os
import pathlib
import sys
import textwrap
import typing
from dataclasses import dataclass

PROJECT = pathlib.Path(__file__).resolve().parent
DROPS = ("duplicate", "near_duplicate", "leak", "unanswered", "empty", "one_word", "echo", "repetition", "encoding", "template_tokens")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


LARGEST = 16 << 20  # characters of a configuration
MOST_SAMPLES = 1 << 22  # a step


def key(default, help, choices=(), low=None, high=None, above=None):
    """A dataclass field with its help text and its rule: one of `choices`, low <= value <= high, value > above."""
    rule = dict(help=help, choices=choices, low=low, high=high, above=above)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=rule)
    return dataclasses.field(default=default, metadata=rule)


@dataclass(frozen=True)
class Model:
    path: str = key("models/SmolLM2-135M-Instruct", "model folder, or a name on the hub")
    revision: str = key("", "revision of a hub model; empty: its main branch")
    quant: str = key("nf4", "how frozen weights are kept; int8: weights only, llm_int8: activations too, none: 16 or 32 bits",
                     choices=("nf4", "int8", "llm_int8", "none"))
    double_quant: bool = key(True, "nf4: quantise the block scales too (0.37 bits a weight less)")
    llm_int8_threshold: float = key(6.0, "llm_int8: columns with an activation beyond this stay in 16 bits", above=0)
    compute_dtype: str = key("auto", "dtype of activations and matrix products; auto: bf16 where the device has it, "
                                     "else fp16 on a GPU and fp32 on a CPU (llm_int8: bf16)", choices=("auto", "bf16", "fp16", "fp32", "fp64"))
    attention: str = key("auto", "packed attention: varlen (GPU, 16 bits) or documents (one product a document, anywhere)",
                         choices=("auto", "varlen", "documents"))


@dataclass(frozen=True)
class Lora:
    r: int = key(16, "rank of the adapters", low=1)
    alpha: float = key(32.0, "the adapter's output is scaled by alpha/r (rslora: alpha/sqrt(r))", above=0, high=1e6)
    dropout: float = key(0.0, "probability that an element of an adapter's input is dropped", low=0.0, high=0.99)
    rslora: bool = key(False, "scale by alpha/sqrt(r), so that the scale of an update does not fall with the rank")
    dora: bool = key(False, "DoRA: adapt directions and train the lengths of the weights' rows beside them; "
                            "without the fast path, so slower")
    targets: list = key(list(PROJECTIONS), "projections that get an adapter, by the last part of their name; "
                                           "[\"all-linear\"]: all but the head")
    init: str = key("zero", "start; zero: B = 0; loftq: the best correction of that rank of what quantisation changed",
                    choices=("zero", "loftq"))
    init_from: str = key("", "start from this adapter folder (PEFT format) instead of B = 0")


@dataclass(frozen=True)
class Data:
    train: str = key("data/python-docs-train.jsonl", "training rows: JSONL, JSON, CSV, Parquet, or a hub data set as NAME or NAME:SPLIT")
    eval: str = key("data/python-docs-eval.jsonl", "evaluation rows; empty: take eval_rows off the training rows")
    eval_rows: int = key(200, "rows held out of the training rows where data.eval is empty", low=1)
    max_length: int = key(2048, "longest row in tokens", low=8)
    too_long: str = key("truncate", "what happens to a longer row", choices=("truncate", "drop", "refuse"))
    bad_rows: str = key("refuse", "what happens when a row cannot be read", choices=("refuse", "skip"))
    supervise: str = key("assistant", "which tokens the loss counts: assistant turns, or all", choices=("assistant", "all"))
    mixture: list = key([], "several sources in place of data.train: [[source, weight], ...]; "
                            "a source's weight is its share of the samples")
    first_rows: int = key(0, "take the first so many rows of each training source and read no further "
                             "(a hub data set is then streamed); 0: all", low=0)
    drop: list = key([], "training rows to leave out, by what `python data.py CONFIG --check` finds: " + ", ".join(DROPS))
    audit: str = key("auto", "what a start looks for: auto: all, but near duplicates in files up to 16 MiB only",
                     choices=("auto", "full", "off"))
    cache: str = key("auto", "folder where tokens, and what the unquantised model is worth, are kept between starts; "
                             "auto: rawlora in $XDG_CACHE_HOME or ~/.cache; off: nowhere")
    near_duplicate: float = key(0.8, "rows are near duplicates from this Jaccard similarity of their 5-character shingles on, "
                                     "or one word apart", low=0.7, high=1.0)
    columns: list = key([], "rows with other column names: KEY=COLUMN, as in prompt=question,completion=answers.text.0")
    roles: list = key([], "turns with other role names: NAME=ROLE, as in bot=assistant")
    chat_template: str = key("", "file with a Jinja chat template, for tokenizers without one")

    @property
    def sources(self):
        """Names of the training rows' sources, in order."""
        return [source for source, _ in self.mixture] or [self.train]


@dataclass(frozen=True)
class Train:
    seed: int = key(0, "seed of the data order, the adapters' start and dropout", low=0, high=2**63 - 1)
    micro_batch_size: int = key(2, "samples a micro-batch; a step consumes micro_batch_size x accumulation samples, "
                                   "however they are packed", low=1)
    accumulation: int = key(16, "micro-batches a step", low=1)
    max_steps: int = key(2000, "optimizer steps; 0: as many as epochs asks for", low=0)
    epochs: float = key(0.0, "passes over the training rows, where max_steps is 0", low=0.0)
    weight_decay: float = key(0.0, "AdamW's decoupled weight decay, on both adapter matrices "
                                   "(there are no biases or norms among them)", low=0.0, high=1000.0)
    adam_beta1: float = key(0.9, "decay of AdamW's first moment", low=0.0, high=0.99999)
    adam_beta2: float = key(0.999, "decay of AdamW's second moment", low=0.0, high=0.9999999)
    adam_eps: float = key(1e-8, "AdamW's epsilon", low=1e-30, high=1.0)
    deterministic: bool = key(False, "GPU: the same bits again after a resume, by deterministic kernels alone and no CUDA graphs; "
                                     "slower (on a CPU runs repeat anyway)")
    rank_wait: int = key(600, "with several ranks, end the run when one of them has been waited for so many seconds", low=1)
    nonfinite_limit: int = key(3, "stop after this many non-finite steps in a row (none of them is applied)", low=1)


@dataclass(frozen=True)
class Schedule:
    learning_rate: float = key(2e-4, "peak learning rate", low=0.0, high=1000.0)
    lr_min: float = key(2e-5, "floor under the learning rate after its peak", low=0.0)
    lr_kind: str = key("cosine", "shape after the warm-up; wsd: constant, then linear decay; points: lr_points",
                       choices=("cosine", "linear", "constant", "wsd", "points"))
    lr_warmup_steps: int = key(200, "steps of linear warm-up, from learning_rate / lr_warmup_steps", low=0)
    lr_decay_steps: int = key(0, "wsd: length of the final decay in steps; 0: a fifth of the run", low=0)
    lr_points: list = key([], "points: [[step, factor], ...], straight lines between them, factor x learning_rate")
    batch_points: list = key([], "[[step, samples], ...]: samples a step from that step on, in place of micro_batch_size x accumulation")
    clip_norm: float = key(1.0, "largest gradient norm; a larger one is scaled down to it; 0: no clipping", low=0.0)
    clip_percentile: float = key(0.0, "adaptive clipping: clip at this percentile of recent norms, if below clip_norm; 0: off",
                                 low=0.0, high=100.0)
    clip_window: int = key(100, "adaptive clipping: how many recent norms", low=10)


@dataclass(frozen=True)
class Eval:
    every_steps: int = key(500, "evaluate every so many steps, and before the first and after the last; 0: only then", low=0)
    max_rows: int = key(0, "evaluate on the first so many evaluation rows; 0: all", low=0)
    samples: int = key(8, "generation samples from the first evaluation rows", low=0)
    prompts: str = key("", "file of prompts to sample from instead: one a line, or JSONL with prompt or messages")
    max_new_tokens: int = key(64, "longest generation sample in tokens", low=1)
    unquantised: str = key("auto", "evaluate the untouched model in 16 bits before the run, to tell learning from making good "
                                   "what quantisation spoilt; auto: where it fits in memory", choices=("auto", "no"))
    patience: int = key(0, "early stopping: stop after this many evaluations without improvement; 0: off", low=0)
    min_delta: float = key(0.0, "early stopping: a smaller fall of eval loss is no improvement, in nats", low=0.0)


@dataclass(frozen=True)
class Save:
    every_steps: int = key(500, "save a checkpoint every so many steps, and after the last; 0: only then", low=0)
    keep: int = key(3, "newest checkpoints kept; the best one is kept beside them", low=1)


@dataclass(frozen=True)
class Memory:
    max_tokens: int = key(0, "tokens packed into one micro-batch at most; 0: chosen by trying what the device holds", low=0)
    checkpoint_layers: int = key(-1, "decoder layers whose activations are recomputed in the backward pass; "
                                     "-1: chosen by trying what the device holds", low=-1)
    budget_gib: float = key(0.0, "GPU memory that the run may take, in GiB; 0: all that is free", low=0.0)
    offload: str = key("auto", "keep recomputed layers' inputs, and the embedding table, in the host's memory; "
                               "auto: where that is what makes the run fit or faster", choices=("auto", "yes", "no"))
    loss_chunk: int = key(2048, "supervised tokens whose logits exist at one time", low=1)
    graphs: str = key("auto", "replay micro-batches, and the tokens of samples, as CUDA graphs: "
                              "auto where kernels are shorter than their launches", choices=("auto", "no"))
    fused: bool = key(True, "fast path for Llama-shaped layers; false: transformers' own layers, the slow twin")
    shard: bool = key(False, "split the frozen quantised weights over the ranks that torchrun started, "
                             "and gather a layer when it is needed: for models that no single GPU holds")
    keep_dequantized: str = key("auto", "keep copies of quantised weights in the compute dtype: faster, same arithmetic, more memory; "
                                        "auto: where a quarter of the free memory holds them and, on a GPU, "
                                        "no layer is set to be recomputed", choices=("auto", "yes", "no"))


@dataclass(frozen=True)
class Log:
    every_steps: int = key(25, "a console line and adapter histograms every so many steps; metrics.jsonl holds every step", low=1)
    tensorboard: bool = key(True, "write TensorBoard events beside metrics.jsonl")
    report: bool = key(True, "write report.md and its plots when the run ends")


FORECAST_WARNINGS = ("coverage below one epoch", "many epochs", "small rate area", "rate ends at nothing", "high rate", "long warm-up",
                     "few supervised tokens", "heavy truncation", "rows lost", "leaked rows", "duplicate rows", "duplicate evaluation rows",
                     "memory nearly full")
ALERTS = ("dead gradients", "steps without gradient", "steps not applied", "non-finite training loss", "non-finite gradient norm",
          "non-finite evaluation loss", "loss of zero", "nothing left to learn", "wrong gradients", "always clipped", "never clipped",
          "spikes of the training loss", "spikes of the gradient norm", "plateau", "training loss flat", "divergence",
          "loss above guessing", "training and evaluation disagree", "rate ends at nothing", "high rate", "adapters never moved",
          "adapters do not start at zero", "evaluation frozen", "evaluation worse than before training",
          "evaluation does not follow training", "growing gap", "damage by quantisation", "samples never stop",
          "samples repeat themselves", "samples do not follow the loss", "noisy gradients")


@dataclass(frozen=True)
class Forecast:
    strict: bool = key(False, "refuse a run for the warnings of its forecast too (exit code 3)")
    acknowledge: list = key([], "warnings of the forecast that are known and accepted, by name: shown, and no ground for refusing")


@dataclass(frozen=True)
class Alerts:
    stop: list = key(["dead gradients"], "alerts that end the run with exit code 4, by name")
    ignore: list = key([], "alerts that are not raised, by name")
    window: int = key(50, "steps that a step is compared with", low=10, high=1000)
    zero_norms: int = key(3, "dead gradients: steps in a row with a gradient norm of exactly 0.0", low=1)
    nonfinite_steps: int = key(3, "a fault after so many non-finite steps in a row, a warning before", low=1)
    spike_deviations: float = key(8.0, "spikes: robust standard deviations of the logarithm above the window's median", above=0)
    loss_spike: float = key(1.5, "spikes: so many times the window's median loss", above=1)
    norm_spike: float = key(3.0, "spikes: so many times the window's median gradient norm", above=1)
    clip_factor: float = key(100.0, "always clipped is a warning where the median norm is so many times the threshold, a note before",
                             above=1)
    negligible_rate: float = key(0.01, "rate ends at nothing: below this share of the highest rate so far", low=0.0, high=1.0)
    divergence: float = key(0.1, "divergence: the training loss rises by this share above its start", above=0)
    gap: float = key(0.01, "growing gap: the evaluation loss rises by this share above its lowest", above=0)
    worse: float = key(0.01, "evaluation worse than before training: by this share", above=0)
    guessing: float = key(12.5, "loss above guessing, in nats: evenly among 262,144 tokens would cost 12.5", above=0)
    quantisation_damage: float = key(1.5, "damage by quantisation, in nats of evaluation loss before training", above=0)
    repetition: float = key(0.5, "samples repeat themselves: this share of four-word sequences stood before", above=0, high=1.0)


@dataclass(frozen=True)
class Criteria:
    """What a run must reach to have succeeded: judged by verdict.py, explained in docs/VERDICT.md."""
    enforce: str = key("none", "exit code 5 where the finished run does not pass this set; optimal: and the minimum",
                       choices=("none", "minimum", "optimal"))
    baseline: str = key("unquantised", "falls and gains count from the untrained model in 16 or 32 bits, or from it as quantised, "
                        "whose repair then counts as learning", choices=("unquantised", "quantised"))
    confidence: float = key(0.95, "probability with which an interval holds the true value", low=0.5, high=0.99)
    milestone_step: int = key(500, "milestone: by this step", low=1)
    milestone_train_loss_drop: float = key(0.2, "milestone: the training loss fell by more than this, in nats; 0: not judged", low=0.0)
    minimum_train_loss_drop: float = key(0.5, "minimum: the training loss fell by more than this, in nats; 0: not judged", low=0.0)
    minimum_eval_loss_drop: float = key(0.2, "minimum: the evaluation loss fell by more than this, in nats; 0: not judged", low=0.0)
    minimum_token_accuracy_gain: float = key(5.0, "minimum: token accuracy on evaluation rows rose by more than this, in points; "
                                                  "0: not judged", low=0.0, high=100.0)
    minimum_gradient_norm: float = key(0.0, "minimum: every applied step's gradient norm, before clipping, lay above this", low=0.0)
    optimal_train_loss_drop: float = key(1.0, "optimal: the training loss fell by more than this, in nats; 0: not judged", low=0.0)
    optimal_perplexity: float = key(6.0, "optimal: perplexity on evaluation rows is below this; 0: not judged", low=0.0)
    optimal_coherent_share: float = key(0.5, "optimal: a larger share of the samples than this is coherent; 0: not judged",
                                        low=0.0, high=0.99)
    optimal_steady_parts: int = key(4, "optimal: the evaluation loss fell in each of so many equal parts of the run; 0: not judged",
                                    low=0, high=1000)
    coherent_repetition: float = key(0.2, "a sample is incoherent if a larger share of its 4-grams repeats an earlier one",
                                     low=0.0, high=1.0)
    coherent_overlap: float = key(0.1, "a sample is incoherent if its overlap with the reference (F1 of words) is smaller",
                                  low=0.0, high=1.0)


@dataclass(frozen=True)
class Proof:
    enabled: bool = key(True, "gradient proof: stop unless the gradients are those of the loss, before step 1, after step 2 "
                              "and after the first evaluation")
    tokens: int = key(0, "gradient proof: supervised tokens of the first rows that it measures the loss on; "
                         "0: 64 on a CPU, 512 on a GPU", low=0)
    parts: str = key("auto", "gradient proof: after step 2 repeat it for each kind of projection; auto: on a GPU",
                     choices=("auto", "yes", "no"))
    seconds: float = key(60.0, "gradient proof: time after which it begins nothing more, but for finding out what is wrong; "
                               "what was left out is told", above=0)


@dataclass(frozen=True)
class Config:
    model: Model = Model()
    lora: Lora = Lora()
    data: Data = Data()
    train: Train = Train()
    schedule: Schedule = Schedule()
    eval: Eval = Eval()
    save: Save = Save()
    memory: Memory = Memory()
    log: Log = Log()
    forecast: Forecast = Forecast()
    alerts: Alerts = Alerts()
    criteria: Criteria = Criteria()
    proof: Proof = Proof()

    def to_dict(self):
        """The resolved settings as plain JSON-ready dictionaries; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    def flat(self):
        """{"section.key": value} of every setting."""
        return {f"{section}.{name}": value for section, values in self.to_dict().items() for name, value in values.items()}

    @property
    def samples_per_step(self):
        """Samples an optimizer step consumes where no schedule.batch_points apply."""
        return self.train.micro_batch_size * self.train.accumulation


SECTIONS = {field.name: type(field.default) for field in dataclasses.fields(Config)}


def _typed(value, kind, text):
    """`value` as type `kind`, or a ValueError. From the command line (`text`), numbers and lists arrive as JSON text."""
    if text and kind is not str:
        if kind is list and not value.lstrip().startswith("["):
            return [part.strip() for part in value.split(",")]
        try:
            value = json.loads(value)
        except ValueError:
            pass
    if kind is float and type(value) is int:
        value = float(value) if abs(value) <= sys.float_info.max else math.inf
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}
        raise ValueError(f"must be {names[kind]}, got {json.dumps(value)}")
    if kind is str and "\0" in value:
        raise ValueError(f"must hold no zero byte, got {json.dumps(value)}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"must be a finite number, got {value}")
    if kind is int and abs(value) > sys.maxsize:  # beyond what counting rows, tokens and steps can take
        raise ValueError(f"must be a whole number of 64 bits, got {value}")
    return value


def _in_bounds(value, rule):
    if rule["choices"] and value not in rule["choices"]:
        raise ValueError(f"must be one of {', '.join(rule['choices'])}, got {json.dumps(value)}")
    for name, bad, sign in (("low", lambda v, b: v < b, ">="), ("high", lambda v, b: v > b, "<="), ("above", lambda v, b: v <= b, ">")):
        if rule[name] is not None and bad(value, rule[name]):
            raise ValueError(f"must be {sign} {rule[name]}, got {value}")


def _points(name, points, errors, what, kinds, low):
    """A schedule given as points: [[step, value], ...], steps whole and rising, values finite, of `kinds` and >= low."""
    good = all(isinstance(p, list) and len(p) == 2 and type(p[0]) is int and type(p[1]) in kinds and math.isfinite(p[1]) for p in points)
    if not good:
        errors.append(f"{name}: must be a list of [step, {what}] pairs, got {json.dumps(points)}")
    elif [p[0] for p in points] != sorted({p[0] for p in points}) or points and points[0][0] < 0:
        errors.append(f"{name}: steps must be >= 0 and rise from point to point, got {[p[0] for p in points]}")
    elif any(p[1] < low for p in points):
        errors.append(f"{name}: {what} must be >= {low}, got {json.dumps(points)}")


def _contradictions(c, errors):
    """Settings that are each fine and together make no sense. Appends 'key: what is wrong; remedy' lines to `errors`."""
    if (c.train.max_steps > 0) == (c.train.epochs > 0):
        errors.append("train.max_steps, train.epochs: exactly one must be above 0; set the other to 0")
    if c.schedule.lr_min > c.schedule.learning_rate:
        errors.append(f"schedule.lr_min, schedule.learning_rate: the floor {c.schedule.lr_min:g} lies above "
                      f"the peak {c.schedule.learning_rate:g}; lower the floor")
    if c.schedule.lr_kind == "points" and not c.schedule.lr_points:
        errors.append("schedule.lr_points, schedule.lr_kind: the kind is points, so give at least one [step, factor]")
    if c.schedule.lr_points and c.schedule.lr_kind != "points":
        errors.append("schedule.lr_points, schedule.lr_kind: points are only read where the kind is points "
                      f"(it is {c.schedule.lr_kind}); set that or remove them")
    if c.schedule.lr_decay_steps and c.schedule.lr_kind != "wsd":
        errors.append("schedule.lr_decay_steps, schedule.lr_kind: only read where the kind is wsd "
                      f"(it is {c.schedule.lr_kind}); set that or 0")
    if c.samples_per_step > MOST_SAMPLES:
        errors.append(f"train.micro_batch_size, train.accumulation: a step of {c.samples_per_step:,} samples is beyond "
                      f"what one can hold ({MOST_SAMPLES:,}); lower them")
    if any(isinstance(p, list) and len(p) == 2 and type(p[1]) is int and p[1] > MOST_SAMPLES for p in c.schedule.batch_points):
        errors.append(f"schedule.batch_points: a step takes at most {MOST_SAMPLES:,} samples, got {json.dumps(c.schedule.batch_points)}")
    _points("schedule.lr_points", c.schedule.lr_points, errors, "factor", (int, float), 0)
    _points("schedule.batch_points", c.schedule.batch_points, errors, "whole number of samples", (int,), 1)
    if c.schedule.clip_percentile and not c.schedule.clip_norm:
        errors.append("schedule.clip_percentile, schedule.clip_norm: a percentile needs clip_norm above 0 as its upper bound")
    if c.eval.patience and not c.eval.every_steps:
        errors.append("eval.patience, eval.every_steps: early stopping needs evaluations during the run; "
                      "set every_steps above 0, or patience to 0")
    if c.lora.init == "loftq" and (c.model.quant == "none" or c.lora.init_from):
        other, why = (("lora.init_from", "an adapter to start from leaves nothing to initialise; give one of the two")
                      if c.lora.init_from else ("model.quant", "nothing is quantised; set zero"))
        errors.append(f"lora.init, {other}: loftq corrects quantisation, and {why}")
    if c.model.quant != "none" and c.model.compute_dtype == "fp64":
        errors.append(f"model.compute_dtype, model.quant: fp64 is for unquantised weights, not {c.model.quant}; "
                      "set model.quant to none or choose bf16")
    if c.model.quant == "llm_int8" and c.model.compute_dtype == "fp32":
        errors.append("model.compute_dtype, model.quant: llm_int8 computes in 16 bits; choose bf16 or fp16")
    if c.model.attention == "varlen" and c.model.compute_dtype not in ("auto", "bf16", "fp16"):
        errors.append(f"model.attention, model.compute_dtype: varlen works in bf16 and fp16, not {c.model.compute_dtype}; "
                      "choose documents or auto")
    if c.memory.shard and c.memory.keep_dequantized == "yes":
        errors.append("memory.shard, memory.keep_dequantized: a kept copy would be whole on every rank, which sharding is to spare; "
                      "set keep_dequantized to auto, or shard to false")
    if not c.lora.targets or not all(isinstance(t, str) and t for t in c.lora.targets):
        errors.append(f"lora.targets: must be a list of projection names, got {json.dumps(c.lora.targets)}")
    elif len(set(c.lora.targets)) < len(c.lora.targets):
        errors.append(f"lora.targets: a name stands twice in {json.dumps(c.lora.targets)}")
    elif "all-linear" in c.lora.targets and len(c.lora.targets) > 1:
        errors.append("lora.targets: all-linear stands alone or not at all")
    for name in c.lora.targets:
        if str(name).rpartition(".")[2] in ("embed_tokens", "lm_head"):
            errors.append(f"lora.targets: {name} cannot be adapted: embeddings and head stay frozen, "
                          "so that the vocabulary stays the base model's; remove it")
    for name, given, known in (("forecast.acknowledge", c.forecast.acknowledge, FORECAST_WARNINGS), ("alerts.stop", c.alerts.stop, ALERTS),
                               ("alerts.ignore", c.alerts.ignore, ALERTS)):
        errors += [f"{name}: there is no {json.dumps(rule)}; there are {', '.join(known)}" for rule in given if rule not in known]
    if c.data.mixture and not all(isinstance(m, list) and len(m) == 2 and isinstance(m[0], str) and m[0]
                                  and type(m[1]) in (int, float) and 0 < m[1] < math.inf for m in c.data.mixture):
        errors.append(f"data.mixture: must be a list of [source, weight above 0], got {json.dumps(c.data.mixture)}")
    elif len({m[0] for m in c.data.mixture}) < len(c.data.mixture):
        errors.append(f"data.mixture: a source stands twice in {json.dumps(c.data.mixture)}; keep one and add up its weights")
    elif c.data.mixture and c.data.train != Data.train:
        errors.append("data.mixture, data.train: the mixture stands in place of data.train; remove one of them")
    for name in c.data.drop:
        if name not in DROPS:
            errors.append(f"data.drop: there is no check called {json.dumps(name)}; there are {', '.join(DROPS)}")
    if not c.data.train:
        errors.append("data.train: name a file or a hub data set")
    if not c.model.path:
        errors.append("model.path: name a folder or a hub model")


def from_dict(tree, overrides=(), origin="configuration", errors=()):
    """A Config from nested dictionaries and ("section.key", "text") overrides.

    Raises ValueError with every error at once (after the `errors` already found), one a line, each naming its key and
    what would be right.
    """
    errors, sections = list(errors), {}
    if not isinstance(tree, dict):
        raise ValueError(f"{origin}: must be a JSON object with the sections {', '.join(SECTIONS)}, got {type(tree).__name__}")
    given = {}  # (section, key) -> (value, came as text)
    for section, values in tree.items():
        if section not in SECTIONS:
            errors.append(f"{section}: unknown section; there are {', '.join(SECTIONS)}")
        elif not isinstance(values, dict):
            errors.append(f"{section}: must be an object of keys, got {json.dumps(values)}")
        else:
            given.update({(section, name): (value, False) for name, value in values.items()})
    for dotted, value in overrides:
        if [key for key, _ in overrides].count(dotted) > 1:
            errors.append(f"--{dotted}: given twice on the command line; keep one")
        given[tuple(dotted.split(".", 1))] = (value, True)
    for section, kind in SECTIONS.items():
        fields, values = {f.name: f for f in dataclasses.fields(kind)}, {}
        types = typing.get_type_hints(kind)
        for (where, name), (value, text) in given.items():
            if where != section:
                continue
            if name not in fields:
                near = [f"{s}.{n}" for s, k in SECTIONS.items() for n in (f.name for f in dataclasses.fields(k)) if n == name]
                errors.append(f"{section}.{name}: unknown key; "
                              + (f"did you mean {near[0]}?" if near else f"{section} has {', '.join(fields)}"))
                continue
            try:
                values[name] = _typed(value, types[name], text)
                _in_bounds(values[name], fields[name].metadata)
            except ValueError as error:
                errors.append(f"{section}.{name}: {error}")
        sections[section] = values
    for where, name in given:
        if where not in SECTIONS and where not in tree:
            errors.append(f"--{where}.{name}: unknown section; there are {', '.join(SECTIONS)}")
    config = Config(**{section: kind(**sections[section]) for section, kind in SECTIONS.items()})
    contradictions, wrong = [], {line.split(":")[0] for line in errors}  # a key that is wrong by itself is told once
    _contradictions(config, contradictions)
    errors += [line for line in contradictions if not wrong & set(line.split(":")[0].split(", "))]
    if errors:
        errors = list(dict.fromkeys(errors))
        raise ValueError(f"{origin}: {len(errors)} error{'s' * (len(errors) > 1)}\n" + "\n".join("  " + e for e in errors))
    return config


def read(path, overrides=()):
    """The Config of a JSON file. Raises ValueError naming the file, and the line where the JSON breaks."""
    path, twice = pathlib.Path(path), []

    def collect(pairs):
        names = [name for name, _ in pairs]
        twice.extend(f"{name}: stands twice in one object; keep one" for name in dict.fromkeys(names) if names.count(name) > 1)
        return dict(pairs)

    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(LARGEST)
        if len(text) == LARGEST:
            raise ValueError(f"it has {LARGEST:,} characters or more, which no configuration has")
        tree = json.loads(text, object_pairs_hook=collect)
    except OSError as error:
        raise ValueError(f"{path}: cannot read the configuration ({error.strerror}); "
                         f"the ones that come with rawlora are in {PROJECT / 'configs'}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, bottomless nesting
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    return from_dict(tree, overrides, str(path), twice)


def find(name):
    """A path from a configuration: as given, or, where that does not exist, beside the program. Hub names pass through."""
    path = pathlib.Path(name).expanduser()
    if not path.exists() and not path.is_absolute() and (PROJECT / path).exists():
        return str(PROJECT / path)
    return str(path) if path.exists() else name


def located(config):
    """The configuration with its model and data paths found (see `find`)."""
    tree = config.to_dict()
    for section, name in (("model", "path"), ("lora", "init_from"), ("data", "train"), ("data", "eval"),
                          ("data", "chat_template"), ("eval", "prompts")):
        tree[section][name] = find(tree[section][name]) if tree[section][name] else ""
    tree["data"]["mixture"] = [[find(source), weight] for source, weight in config.data.mixture]
    tree["data"]["train"] = Data.train if config.data.mixture else tree["data"]["train"]
    return from_dict(tree)


def settled(config, dtype):
    """The configuration with model.compute_dtype "auto" settled as `dtype`, one of its other choices."""
    if config.model.compute_dtype != "auto":
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=dtype))


def is_hub_name(name):
    """Whether a path that does not exist can be meant as OWNER/NAME on the hub: two parts, and no folder here with the first one's name."""
    parts = pathlib.PurePath(name).parts
    return (len(parts) == 2 and name == "/".join(parts) and parts[0] not in (".", "..", "~")
            and not pathlib.Path(parts[0]).exists() and not (PROJECT / parts[0]).exists())


def command_line(argv, flags):
    """Split a command line into positional words, `flags` and --section.key=value overrides.

    flags: {"name": default}; one with default "" takes a text (--name=text or --name text), one with default False takes
    none, and one with default None may take one (--name is then True, --name=text the text).
    Returns (words, {flag: value}, [(key, text)]). Raises ValueError for an option that is none of these.
    """
    words, found, overrides, rest = [], dict(flags), [], list(argv)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg[2:].partition("=")
        if not arg.startswith("-"):
            words.append(arg)
        elif name in flags and arg.startswith("--"):
            if flags[name] is False and equals:
                raise ValueError(f"--{name} takes no value, got {arg}")
            if flags[name] == "" and not equals and rest and not rest[0].startswith("--"):
                equals, value = " ", rest.pop(0)
            if not value and (equals or flags[name] == ""):
                raise ValueError(f"--{name} needs a value: --{name}=…")
            found[name] = value if equals else True
        elif "." in name and arg.startswith("--"):
            if not equals:
                raise ValueError(f"{arg}: needs a value: {arg}=…")
            overrides.append((name, value))
        else:
            options = ", ".join("--" + flag for flag in flags)
            raise ValueError(f"{arg}: unknown option; there are {options} and --section.key=value")
    return words, found, overrides


def run_command(main):
    """Run a command's main(argv) and exit with its code. What is wrong with its input is told in one message, exit code 2."""
    for library in ("bitsandbytes", "transformers", "datasets", "huggingface_hub"):  # they report on what is not used here
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # whoever read the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        sys.exit(141)
    except (ValueError, OSError) as error:
        nameless = isinstance(error, OSError) and error.errno and not error.filename and error.strerror == os.strerror(error.errno)
        where = "; it names no file: look at the folders of the run, of data.cache and of temporary files (TMPDIR)" * bool(nameless)
        print(f"error: {error}{where}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        reason = str(error).split("\n")[0][:200] or "of the host"
        print(f"error: memory ran out ({reason}); give it more, fewer bits (model.quant), a lower lora.r, shorter "
              "rows (data.max_length) or a smaller model; what was saved is whole", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def describe():
    """Every key with its default, choices and meaning, for --help: at most 80 columns wide, but for long defaults."""
    lines = []
    for section, kind in SECTIONS.items():
        lines.append(f"\n{section}")
        for f in dataclasses.fields(kind):
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            choices = f"; {' | '.join(f.metadata['choices'])}" if f.metadata["choices"] else ""
            shown = default if isinstance(default, str) else json.dumps(default)
            if isinstance(default, list) and default:
                shown = ",".join(default)
            lines.append(f"  --{section}.{f.name}={shown}")
            lines += textwrap.wrap(f.metadata["help"] + choices, 80, initial_indent=" " * 6, subsequent_indent=" " * 6,
                                   break_on_hyphens=False)
    return "\n".join(lines)
