"""Runs that are sick and runs that are well: what the tools say of each, beside what ought to be said.

    python bench/zoo.py                              every run, three seeds: some minutes on two cores
    python bench/zoo.py --seeds=1 --only=graph-cut,small-rank
    python bench/zoo.py --list                       the runs, and what counts as naming them rightly
    python bench/zoo.py --json=FILE --keep=FOLDER    figures for programs; the runs' own folders

Each run is train.main itself in this process, on a Llama of two layers that was taught for some seconds to copy words, and
now learns to answer with other words. A fault is put where it happens in life: into the rows, the configuration, or by
replacing a piece of model.py, data.py, tokens.py, eval.py or torch's optimizer while the run lasts; never into the record.
What was said is gathered from all that speaks by itself: the forecast (its warnings and refusals), the audit of rows, the
gradient proof, alerts while the run lasts, health.py's diagnosis of its record, refusals of input, and the verdict. A sick
run is named rightly if one of the names that fit its fault was said (one whose cause or remedy leads to it); a well one if
nothing above a note was said of it, and its verdict's minimum set did not fail.

Leaves out: GPUs, and whatever takes more than some hundred steps to show.
"""
import contextlib
import dataclasses
import io
import json
import logging

import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from unittest import mock

PROJECT = pathlib.Path(__file__).resolve().parent.parent
CONSONANTS, VOWELS = "bdfgklmnprst", "aeio"
WORDS = [a + b + c for a, b, c in zip(CONSONANTS * 2, (v for v in VOWELS for _ in CONSONANTS), (CONSONANTS[5:] + CONSONANTS[:5]) * 2)]  # 24
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SERIOUS = ("refuse", "fault", "warning")
SETTINGS = {
    "model": {"quant": "none", "compute_dtype": "fp32"}, "lora": {"r": 8, "alpha": 16.0}, "memory": {"max_tokens": 256},
    "train": {"micro_batch_size": 4, "accumulation": 4, "max_steps": 60},
    "schedule": {"learning_rate": 1e-2, "lr_min": 1e-3, "lr_warmup_steps": 4},
    "eval": {"every_steps": 15, "samples": 8, "max_new_tokens": 16, "unquantised": "no"},
    "save": {"every_steps": 0}, "log": {"every_steps": 20, "tensorboard": False, "report": False}, "data": {"cache": "off"},
}


# ------------------------------------------------------------------------------------------------- a model and its task

def make_base(folder, seed, steps=200, stops=False):
    """A tokenizer of whole words, and a Llama of two layers that copies three words of four: sure of nothing, but no fool.

    It never saw what ends an answer, so that it has to learn to stop, unless it `stops`.
    """
    import torch
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>"]
    pieces = special + ["\n", "user", "assistant", *WORDS, *(" " + word for word in WORDS)]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex(r" ?[^ \n]+|\n"), "isolated"), decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>", unk_token="<unk>",
                                        chat_template=TEMPLATE)
    torch.manual_seed(seed)
    network = LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
        max_position_embeddings=256, initializer_range=0.08, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    dice = random.Random(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(steps):
        length, rows = dice.randint(3, 7), []
        for _ in range(24):
            words = dice.choices(WORDS, k=length)
            answer = [dice.choice(WORDS) if dice.random() < 0.25 else word for word in words]
            rows.append(tokenizer.apply_chat_template(chat(words, answer)["messages"], tokenize=True, return_dict=False))
        ids = torch.tensor(rows)
        labels = torch.full_like(ids, -100)
        answered = slice(-length - 2, -1 if stops else -2)  # never the line break behind <|im_end|>
        labels[:, answered] = ids[:, answered]
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20, (steps - step) / 40)
        network(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def chats(seed, count, wrong=0.0, least=3, most=5, copied=False):
    """Rows of the task: some words, answered by others in the same order, one fixed word for each (copied: by themselves).

    wrong: share of answered words drawn at random.
    """
    dice, taught = random.Random(seed), dict(zip(WORDS, WORDS if copied else random.Random(7).sample(WORDS, len(WORDS))))
    rows = []
    for _ in range(count):
        words = dice.choices(WORDS, k=dice.randint(least, most))
        rows.append(chat(words, [dice.choice(WORDS) if dice.random() < wrong else taught[word] for word in words]))
    return rows


def splits(seed, count=240, held=24, **how):
    """(training rows, evaluation rows) of the task, none of them in both."""
    rows = chats(seed, count, **how)
    known = {row["messages"][0]["content"] for row in rows}
    return rows, [row for row in chats(seed + 1000, 2 * held, **how) if row["messages"][0]["content"] not in known][:held]


def paired(rows):
    """Chats of two neighbours' turns."""
    return [{"messages": a["messages"] + b["messages"]} for a, b in zip(rows[::2], rows[1::2])]


def chat(words, answer):
    return {"messages": [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": " ".join(answer)}]}


# ---------------------------------------------------------------------------------------------------------- the faults
# Each is a context manager: the fault holds while the run lasts.

def replaced(*pieces):
    """A fault that replaces pieces of the project: (module or class, name, function of the real one that gives its replacement)."""
    @contextlib.contextmanager
    def fault():
        with contextlib.ExitStack() as stack:
            for owner, name, make in pieces:
                stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))
            yield
    return fault


def in_training(change):
    """For model.summed_loss: change(network, batch, loss) where gradients are wanted."""
    import torch

    def make(real):
        def summed_loss(network, batch):
            loss, nll, correct = real(network, batch)
            return (change(network, batch, loss) if torch.is_grad_enabled() else loss), nll, correct
        return summed_loss
    return make


def after_load(change):
    """For model.load: change(network) as soon as it is loaded."""
    def make(real):
        def load(config, device):
            network = real(config, device)
            change(network)
            return network
        return load
    return make


def cut_everything(real):
    """What enable_input_require_grads does in the wrong place: a graph that begins behind the last layer."""
    import torch
    return lambda network, batch: real(network, batch).detach().requires_grad_() if torch.is_grad_enabled() else real(network, batch)


def cut_below(network):
    def detach(layer, arguments, named):
        return (arguments[0].detach().requires_grad_(), *arguments[1:]), named
    network.get_decoder().layers[1].register_forward_pre_hook(detach, with_kwargs=True)


def never_refreshed(network):
    """Layers look at copies of the adapters, made by now, that nobody brings up to date any more."""
    assert network.fused_layers == len(network.get_decoder().layers), "the plain path has no copies"
    network.adapter_memory.refresh = lambda: None


def freeze_attention(network):
    for name, parameter in network.named_parameters():
        if "self_attn" in name:
            parameter.requires_grad_(False)


def start_at_random(real):
    """B drawn like A."""
    import torch
    def draw_adapters(network, seed):
        import lora_layers
        real(network, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in lora_layers.adapters(network).items():
                if ".lora_B." in name:
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-0.35, 0.35, generator=generator))
    return draw_adapters


def lost_after(evaluations):
    """Gradients through frozen weights are missing from the n-th evaluation on, as where a library repacks them for inference."""
    import eval as evaluation
    import lora_layers
    done = []

    def counting(real):
        def evaluate(*arguments):
            done.append(real(*arguments))
            return done[-1]
        return evaluate

    def backward(real):
        def wrong(ctx, grad):
            through, *rest = real(ctx, grad)
            return through if through is None else through * (len(done) < evaluations), *rest
        return staticmethod(wrong)

    return lambda: done.clear() or replaced((evaluation, "evaluate", counting), (lora_layers.FrozenMatmul, "backward", backward))()


def micro_batches(change, evaluated=True):
    """change(micro-batch) of every one that is packed; evaluated: those of evaluations too."""
    import data
    import eval as evaluation
    busy = []

    def pack(real):
        return lambda *arguments: [batch if busy and not evaluated else change(batch) for batch in real(*arguments)]

    def evaluate(real):
        def quietly(*arguments):
            busy.append(True)
            try:
                return real(*arguments)
            finally:
                busy.pop()
        return quietly

    return replaced((data, "pack", pack), (evaluation, "evaluate", evaluate))


def only(batch, kept):
    """The micro-batch with those of its targets that `kept` (bool (S,)) says."""
    return dataclasses.replace(batch, rows=batch.rows[kept], targets=batch.targets[kept], document=batch.document[kept])


def shifted(by):
    """Labels that are not the next token, but the one `by` further on: -1 is the token itself, as where nobody shifts them."""
    return lambda batch: dataclasses.replace(batch, targets=batch.input_ids[(batch.rows + 1 + by).clamp(max=len(batch.input_ids) - 1)])


def stale(real):
    """Evaluation, or generation, of the weights as they were before training."""
    import torch

    def wrapped(network, *arguments):
        flat = network.adapter_memory.flat
        if not hasattr(network, "as_loaded"):
            network.as_loaded = flat.detach().clone()
        now = flat.detach().clone()
        with torch.no_grad():
            flat.copy_(network.as_loaded)
        try:
            return real(network, *arguments)
        finally:
            with torch.no_grad():
                flat.copy_(now)
    return wrapped


def empty_handed(real):
    """An optimizer over copies of the parameters."""
    class AdamW(real):
        def __init__(self, parameters, **settings):
            super().__init__([parameter.detach().clone().requires_grad_() for parameter in parameters], **settings)
    return AdamW


def upwards(real):
    return lambda parameters, **settings: real(parameters, maximize=True, **settings)


def prompt_alone(batch):
    """The micro-batch with the tokens as targets that are none in it."""
    import torch
    places = torch.arange(len(batch.input_ids) - 1)
    inside = batch.position_ids[1:] > 0  # a row's first token is nobody's target
    kept = places[inside & ~torch.isin(places, batch.rows)]
    return dataclasses.replace(batch, rows=kept, targets=batch.input_ids[kept + 1],
                               document=torch.bucketize(kept, batch.cu_seqlens[1:], right=True))


def by_micro_batch(real):
    """A scheduler that is advanced once for each of 4 micro-batches. (The forecast computes the schedule that was meant.)"""
    def learning_rate(step, schedule, max_steps):
        training = any(name.endswith("train.py") for name in (sys._getframe(1).f_code.co_filename,))
        return real(min(max_steps, 4 * step), schedule, max_steps) if training else real(step, schedule, max_steps)
    return learning_rate


def exploding(network, batch, loss):
    """Row 5 overflows somewhere: its loss is hundreds of times what it should be."""
    return loss * (300.0 if 5 in batch.samples else 1.0)


def not_a_number(network, batch, loss):
    return loss * (float("nan") if 5 in batch.samples else 1.0)


def damaged(real):
    """Quantisation that returns other weights than it got."""
    import torch
    noisy = lambda tensor: tensor + tensor.std() * torch.randn_like(tensor)
    return lambda tensor, settings, dtype: real(tensor if settings.quant == "none" else noisy(tensor), settings, dtype)


def interrupt_at(step):
    """SIGTERM in the middle of a run, once."""
    import data
    done = []

    def samples(real):
        def wrapped(rows, seed, start, count):
            if start >= step * count and not done:
                done.append(os.kill(os.getpid(), signal.SIGTERM))
            return real(rows, seed, start, count)
        return wrapped

    return replaced((data, "samples", samples))


# ------------------------------------------------------------------------------------------------------------ the runs

@dataclass
class Run:
    name: str
    what: str                        # the fault, or the difficulty
    expected: tuple = ()             # names of which one must be said, as "tool: name"; none: a healthy run, of which nothing may be said
    options: tuple = ()              # for train.py
    fault: object = contextlib.nullcontext
    rows: object = None              # seed -> (training rows, evaluation rows)
    prepare: object = None           # folder, options -> more options; makes what the run needs


def zoo():
    """Every run, sick ones first."""
    import data
    import eval as evaluation
    import lora_layers
    import model
    import quant
    import schedule
    import tokens
    import torch

    plain, noproof = "--memory.fused=false", "--proof.enabled=false"
    dead, wrong = ("proof: dead gradients", "alert: dead gradients"), ("proof: wrong gradients",)

    def template(folder, text):
        (folder / "template.jinja").write_text(text)
        return [f"--data.chat_template={folder / 'template.jinja'}"]

    def repeated(seed):
        rows, held = splits(seed, 120)
        return rows + rows, held

    def leaked(seed):
        rows = chats(seed, 240)
        return rows, rows[:24]

    def one_held_out(seed):
        rows, held = splits(seed)
        return rows, held[:1] * 24

    def able(folder, seed):
        return [f"--model.path={folder.parent / f'able-{seed}'}"]

    def copies(seed, wrong=0.0):
        return chats(seed, 240, wrong, copied=True), splits(seed, copied=True)[1]

    sick = [
        Run("graph-cut", "the graph begins behind the last layer", dead, (), replaced((model, "hidden_states", cut_everything))),
        Run("graph-cut-unproved", "the same, with the gradient proof turned off", ("alert: dead gradients",), (noproof,),
            replaced((model, "hidden_states", cut_everything))),
        Run("lower-layer-cut", "the graph begins between the layers", dead, (plain,), replaced((model, "load", after_load(cut_below)))),
        Run("attention-frozen", "adapters of the attention have requires_grad=False", dead, (plain,),
            replaced((model, "load", after_load(freeze_attention)))),
        Run("base-gradient-lost", "gradients through frozen weights are missing from the first evaluation on", wrong + dead, (plain,),
            lost_after(1)),
        Run("base-gradient-lost-later", "the same, from the evaluation at step 15 on", wrong, (plain,), lost_after(2)),
        Run("stale-copies", "the forward pass works on adapters as they were when the run began", wrong,
            ("--model.compute_dtype=bf16",), replaced((model, "load", after_load(never_refreshed)))),
        Run("accumulation-not-normalised", "losses of 4 micro-batches are added, not averaged", wrong, (),
            replaced((model, "summed_loss", in_training(lambda n, b, loss: loss * 4)))),
        Run("accumulation-unproved", "the same, with the gradient proof turned off", ("alert: training and evaluation disagree",),
            (noproof,), replaced((model, "summed_loss", in_training(lambda n, b, loss: loss * 4)))),
        Run("optimizer-empty", "the optimizer holds copies of the adapters", ("alert: adapters never moved", "alert: evaluation frozen"),
            (), replaced((torch.optim, "AdamW", empty_handed))),
        Run("evaluation-stale", "evaluations and samples are made with the weights as loaded", ("alert: evaluation frozen",), (),
            replaced((evaluation, "evaluate", stale), (evaluation, "generate", stale))),
        Run("B-not-zero", "B is drawn at random, like A", ("alert: adapters do not start at zero",), (),
            replaced((lora_layers, "draw_adapters", start_at_random))),
        Run("labels-masked", "no token of any row is supervised", ("forecast: nothing supervised", "input: refused"), (),
            replaced((tokens, "_supervise", lambda real: lambda *a: (lambda inside, last: (inside & False, last))(*real(*a))))),
        Run("labels-masked-in-batches", "the labels of every micro-batch are masked, those of evaluations too",
            ("alert: steps not applied",), (noproof,), micro_batches(lambda batch: only(batch, batch.targets < 0))),
        Run("answers-cut-off", "rows are cut where the answer begins", ("forecast: nothing supervised", "input: refused"),
            ("--data.max_length=11",)),
        Run("half-cut", "most rows lose the end of their answer", ("forecast: heavy truncation",), ("--data.max_length=17",)),
        Run("labels-not-shifted", "each label is the token itself, in training and evaluation", ("alert: samples do not follow the loss",),
            (), micro_batches(shifted(-1))),
        Run("labels-shifted-twice", "each label is the token after the next, in training and evaluation",
            ("alert: samples do not follow the loss", "alert: samples never stop"), ("--train.max_steps=120",), micro_batches(shifted(1))),
        Run("labels-shifted-in-training", "the same, in training alone",
            ("alert: evaluation does not follow training", "alert: evaluation worse than before training"),
            (), micro_batches(shifted(1), evaluated=False), rows=lambda seed: splits(seed, 480)),
        Run("prompts-learnt", "the labels are those of the prompt, in training and evaluation; the answer is masked",
            ("alert: samples do not follow the loss",), ("--eval.samples=16",), micro_batches(prompt_alone)),
        Run("optimizer-ascends", "the optimizer goes up the gradient",
            ("alert: divergence", "alert: evaluation worse than before training"), (), replaced((torch.optim, "AdamW", upwards))),
        Run("random-labels", "answers that have nothing to do with their questions, for a model that could answer",
            ("alert: growing gap", "alert: evaluation worse than before training"), (), rows=lambda seed: copies(seed, wrong=1.0),
            prepare=able),
        Run("rate-too-high", "the rate x 1000", ("forecast: high rate", "alert: divergence", "alert: high rate"),
            ("--schedule.learning_rate=5.0",)),
        Run("rate-too-low", "the rate / 1000", ("forecast: small rate area",), ("--schedule.learning_rate=5e-6", "--schedule.lr_min=5e-7")),
        Run("rate-dies-early", "the rate falls to 0 after a quarter", ("forecast: rate ends at nothing", "alert: rate ends at nothing"),
            ("--schedule.lr_kind=points", "--schedule.lr_points=[[1,1],[15,1],[16,0]]", "--schedule.lr_min=0")),
        Run("scheduler-too-fast", "the scheduler is advanced by every micro-batch, and its floor is 0", ("alert: rate ends at nothing",),
            ("--schedule.lr_min=0",), replaced((schedule, "learning_rate", by_micro_batch))),
        Run("warm-up-too-long", "the warm-up is longer than the run", ("forecast: warm-up as long as the run",),
            ("--schedule.lr_warmup_steps=100",)),
        Run("clipped-to-nothing", "gradients are clipped at 1e-6", ("alert: always clipped",),
            ("--schedule.clip_norm=1e-6", "--train.max_steps=100", "--train.accumulation=1")),
        Run("few-rows-seen", "the run ends after a quarter of its rows", ("forecast: coverage below one epoch",),
            ("--train.micro_batch_size=2",), rows=lambda seed: splits(seed, 900)),
        Run("no-terminator", "the chat template has nothing that ends a turn", ("input: refused",), (),
            prepare=lambda folder, seed: template(folder, TEMPLATE.replace("<|im_end|>", ""))),
        Run("terminator-masked", "what ends an answer is the padding token too, and masked by its id", ("alert: samples never stop",), (),
            micro_batches(lambda batch: only(batch, batch.targets != 2))),
        Run("generation-template", "samples are asked for without the opening of the answer",
            ("alert: samples do not follow the loss", "alert: samples never stop", "alert: samples repeat themselves"), (),
            replaced((data, "prompts", lambda real: lambda *a: [prompt | {"ids": prompt["ids"][:-5]} for prompt in real(*a)]))),
        Run("evaluated-on-training-rows", "the evaluation rows are training rows", ("forecast: leaked rows",), (),
            rows=leaked),
        Run("evaluation-rows-repeated", "the evaluation rows are one row 24 times", ("forecast: duplicate evaluation rows",), (),
            rows=one_held_out),
        Run("half-duplicates", "every row stands there twice", ("forecast: duplicate rows",), (), rows=repeated),
        Run("learnt-by-heart", "12 rows with half their answers at random, for 20 passes", ("alert: growing gap",),
            ("--train.accumulation=1", "--eval.every_steps=10"), rows=lambda seed: (chats(seed, 12, wrong=0.5), splits(seed, 12)[1])),
        Run("exploding-row", "the loss of one row is 300 times too large",
            ("alert: spikes of the training loss", "alert: spikes of the gradient norm"), (noproof,),
            replaced((model, "summed_loss", in_training(exploding))), rows=lambda seed: splits(seed, 80)),
        Run("row-not-finite", "the loss of one row is not a number", ("alert: non-finite training loss",), (noproof,),
            replaced((model, "summed_loss", in_training(not_a_number))), rows=lambda seed: splits(seed, 60)),
        Run("damaged-weights", "quantisation returns other weights than it got", ("alert: damage by quantisation",),
            ("--model.quant=int8", "--eval.unquantised=auto"), replaced((quant, "quantize", damaged)), rows=copies, prepare=able),
    ]

    def half_a_run(folder, seed):
        return ["--resume"]

    healthy = [
        Run("plain", "no difficulty"),
        Run("tiny-data", "32 rows, 15 passes", options=("--lora.dropout=0.1", "--train.accumulation=2"),
            rows=lambda seed: splits(seed, 32)),
        Run("noisy-loss", "single rows a step, a quarter of all answered words at random",
            options=("--train.micro_batch_size=1", "--train.max_steps=120"),
            rows=lambda seed: splits(seed, wrong=0.25)),
        Run("plateau-then-progress", "a base that cannot copy yet: the loss stands at what guessing gives, and then falls",
            prepare=lambda folder, seed: ["--model.path=" + str(folder.parent / f"raw-{seed}")],
            options=("--train.max_steps=150", "--lora.r=16", "--lora.alpha=32")),
        Run("large-batch", "64 rows a step",
            options=("--train.micro_batch_size=64", "--train.accumulation=1", "--train.max_steps=30", "--memory.max_tokens=4096"),
            rows=lambda seed: splits(seed, 600)),
        Run("high-dropout", "half of every adapter's input dropped", options=("--lora.dropout=0.5",)),
        Run("small-rank", "rank 1 on two projections",
            options=("--lora.r=1", "--lora.alpha=2", "--lora.targets=v_proj,down_proj", "--schedule.learning_rate=1e-2")),
        Run("resumed", "interrupted by SIGTERM after a third, and resumed", fault=None),
        Run("long-warm-up", "half of the steps warm up", options=("--schedule.lr_warmup_steps=30",)),
        Run("ragged-rows", "answers of 2 to 9 words",
            rows=lambda seed: splits(seed, least=2, most=9),
            options=("--eval.max_new_tokens=40",)),
        Run("always-clipped", "every step clipped at a fifth of its norm",
            options=("--schedule.clip_norm=0.2", "--train.max_steps=100", "--train.accumulation=1")),
        Run("growing-batch", "2 rows a step, then 4, then 12", options=("--schedule.batch_points=[[1,2],[20,4],[40,12]]",)),
        Run("nf4", "4 bits, computing in bf16", options=("--model.quant=nf4", "--model.compute_dtype=bf16", "--eval.unquantised=auto")),
        Run("learnt-and-flat", "five times as many steps as the task takes", options=("--train.max_steps=300", "--eval.every_steps=50"),
            rows=lambda seed: splits(seed, 900)),
        Run("two-turns", "chats of two questions and two answers", rows=lambda seed: [paired(rows) for rows in splits(seed, 480, 48)]),
        Run("plain-layers-and-dora", "DoRA over int8 weights, computing in bf16, on layers that are not fused",
            options=("--lora.dora=true", "--model.quant=int8", "--model.compute_dtype=bf16")),
        Run("early-stopping", "stopped by its evaluations",
            options=("--eval.patience=1", "--eval.every_steps=10", "--schedule.learning_rate=1e-2"),
            rows=lambda seed: splits(seed, 60)),
    ]
    return sick, healthy


# --------------------------------------------------------------------------------------------------- running, judging

def bases(folder, seed):
    """Make the models that runs of this seed start from."""
    make_base(folder / f"base-{seed}", seed)
    make_base(folder / f"raw-{seed}", seed, steps=12)
    make_base(folder / f"able-{seed}", seed, stops=True)


def settings(run, folder, seed):
    """Write rows and configuration of a run into `folder`; returns the arguments for train.main."""
    train_rows, eval_rows = run.rows(seed) if run.rows else splits(seed)
    for name, rows in (("train", train_rows), ("eval", eval_rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree = json.loads(json.dumps(SETTINGS))
    tree["model"]["path"] = str(folder.parent / f"base-{seed}")
    tree["data"] |= {name: str(folder / f"{name}.jsonl") for name in ("train", "eval")}
    tree["train"]["seed"] = seed
    (folder / "run.json").write_text(json.dumps(tree))
    return [str(folder / "run.json"), f"--out={folder / 'run'}", *run.options, *(run.prepare(folder, seed) if run.prepare else ())]


def begin(arguments, fault=contextlib.nullcontext):
    """(exit code, what was printed) of train.main with a fault in place."""
    import torch
    import train
    handlers, told = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}, io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(io.StringIO()), fault():
        try:
            code = train.main(arguments)
        except ValueError as error:  # as config.run_command prints it
            code = 2
            print(f"error: {error}")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(1)
    return code, told.getvalue()


def said(code, printed, run):
    """What was said of a run, as {"tool: name": severity}."""
    import health
    import logs
    found = {"input: refused": "refuse"} if code == 2 else {}
    for word, name in re.findall(r"^(REFUSED|WARNING): (.+)$", printed, re.MULTILINE):
        found[f"forecast: {name}"] = "refuse" if word == "REFUSED" else "warning"
    for names in re.findall(r"^audit     (.+)$", printed, re.MULTILINE):
        found |= {f"audit: {name}": "note" for name in re.findall(r"[\d,]+ (\w+)", names)}
    for word in re.findall(r"^gradients  (DEAD|WRONG|STALE)", printed, re.MULTILINE):
        found[f"proof: {'dead' if word == 'DEAD' else 'wrong'} gradients"] = "fault"
    for name, severity in re.findall(r"^ALERT at step [\d,]+: (.+) \((\w+)\)$", printed, re.MULTILINE):
        found[f"alert: {name}"] = severity
    if (run / "metrics.jsonl").exists():
        found |= {f"diagnosis: {one.name}": one.severity for one in health.diagnose(logs.read(str(run))) if one.severity != "unjudged"}
    if (run / "verdict.json").exists():
        verdict = json.loads((run / "verdict.json").read_text())
        judged = [criterion for criterion in verdict["criteria"] if criterion["set"] in ("milestone", "minimum")]
        failed = [criterion["name"] for criterion in judged if criterion["outcome"] == "FAIL"]
        found["verdict: " + ("FAIL" if failed else verdict["outcome"])] = "warning" if failed else "note"
    return found


def judge(run, found):
    """Whether a run was named rightly: a sick one by a name that fits, above a note, a healthy one by nothing above a note."""
    serious = {name for name, severity in found.items() if severity in SERIOUS}
    return bool(serious & set(run.expected)) if run.expected else not serious


def one(run, folder, seed):
    """Make a run and judge it: a dict of plain values."""
    began = time.process_time()
    folder = folder / f"{run.name}-{seed}"
    folder.mkdir()
    arguments = settings(run, folder, seed)
    if run.fault is None:  # the one that is interrupted
        code, printed = begin(arguments, interrupt_at(20))
        assert code == 143, printed
        code, more = begin([*arguments, "--resume"])
        printed += more
    else:
        code, printed = begin(arguments, run.fault)
    (folder / "printed.txt").write_text(printed, encoding="utf-8")
    found = said(code, printed, folder / "run")
    return {"name": run.name, "seed": seed, "sick": bool(run.expected), "what": run.what, "expected": list(run.expected), "said": found,
            "exit": code, "right": judge(run, found), "seconds": round(time.process_time() - began, 2)}


def table(results):
    """The confusion matrix, and a line for each run."""
    lines = []
    for name in dict.fromkeys(result["name"] for result in results):
        same = [result for result in results if result["name"] == name]
        right = sum(result["right"] for result in same)
        serious = {key for result in same for key, severity in result["said"].items() if severity in SERIOUS}
        fitting = [key for key in same[0]["expected"] if key in serious]
        others = sorted({key for key in serious if not key.startswith("diagnosis")} - set(fitting))
        lines.append(f"{'right' if right == len(same) else 'WRONG':<6}{right}/{len(same)}  {name}")
        lines.append(f"             {same[0]['what']}")
        if same[0]["sick"]:
            lines.append(f"             named: {', '.join(fitting) or 'not as ' + ' or '.join(same[0]['expected'])}")
        if others:
            lines.append(f"             {'also said' if same[0]['sick'] else 'said'}: {', '.join(others)}")
    sick, healthy = ([result for result in results if result["sick"] is kind] for kind in (True, False))
    silent = [result for result in sick if not any(severity in SERIOUS for severity in result["said"].values())]
    named = sum(result["right"] for result in sick)
    alarmed = sum(not result["right"] for result in healthy)
    lines += ["", f"{'':<16}{'named rightly':>14}{'named otherwise':>17}{'nothing said':>14}",
              f"{f'sick ({len(sick)})':<16}{named:>14}{len(sick) - named - len(silent):>17}{len(silent):>14}",
              f"{f'healthy ({len(healthy)})':<16}{'':>14}{alarmed:>17}{len(healthy) - alarmed:>14}"]
    return "\n".join(lines)


def prepare_process():
    """Imports, and one thread: what is done once."""
    sys.path.insert(0, str(PROJECT))
    os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    import transformers
    import train  # noqa: F401
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)


def work(job):
    """A job of a child process: (function's name, arguments)."""
    runs = {run.name: run for kind in zoo() for run in kind}
    what, folder, *rest = job
    return bases(pathlib.Path(folder), *rest) if what == "bases" else one(runs[what], pathlib.Path(folder), *rest)


def main(argv):
    import argparse
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="names, with commas between them")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--json", default="")
    parser.add_argument("--keep", default="", help="an empty folder for the runs, which are otherwise removed")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args(argv)
    began = time.perf_counter()
    prepare_process()
    runs = [run for kind in zoo() for run in kind]
    if given.list:
        for run in runs:
            print(f"{run.name:<28}{run.what}\n{'':<28}{' or '.join(run.expected) or 'nothing'}")
        return 0
    wanted = given.only.split(",") if given.only else [run.name for run in runs]
    unknown = sorted(set(wanted) - {run.name for run in runs})
    if unknown:
        raise SystemExit(f"there is no run called {', '.join(unknown)}; --list shows them")
    import concurrent.futures
    import multiprocessing
    with tempfile.TemporaryDirectory(prefix="rawlora-zoo-") as temporary:
        folder = pathlib.Path(given.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ProcessPoolExecutor(given.jobs, multiprocessing.get_context("fork")) as pool:
            list(pool.map(work, [("bases", str(folder), seed) for seed in range(given.seeds)]))
            jobs = [(name, str(folder), seed) for name in wanted for seed in range(given.seeds)]
            results = []
            for result in pool.map(work, jobs):
                results.append(result)
                told = f"{'right' if result['right'] else 'WRONG'}  {result['name']} {result['seed']}  {result['seconds']} s"
                print(told, file=sys.stderr, flush=True)
    print(table(results))
    seconds, worked = round(time.perf_counter() - began), round(sum(result["seconds"] for result in results))
    print(f"\n{len(results)} runs, {worked} seconds of processor time, {seconds} seconds in all")
    if given.json:
        text = json.dumps({"seconds": seconds, "processor_seconds": worked, "runs": results}, indent=1)
        pathlib.Path(given.json).write_text(text + "\n", encoding="utf-8")
    return 0 if all(result["right"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
