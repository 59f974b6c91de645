"""Train with TRL + PEFT + bitsandbytes, or with Unsloth, on our rows in our order with our settings, into a folder like a run's.

    python bench/peers.py trl configs/approach1.json --train.max_steps=500 --out=runs/peer-trl [--section.key=value ...]
    python bench/peers.py trl CONFIG --adapters=fp32 --out=FOLDER     its adapters kept in 32 bits, as ours are
    python bench/peers.py unsloth CONFIG --out=FOLDER
    python eval.py --ckpt=runs/peer-trl --keep          our evaluation of the adapter that it saved
    python compare.py runs/approach1-500 runs/peer-trl --at=500                 beside a run of ours, row by row

Tokens, labels, the order of samples, samples a step, rates of every step, rank, scale, targets, clipping, Adam's constants and bits
are ours, handed over ready-made; the loss, the model, the adapters' start (their own random numbers) and the loop are theirs. Both
pad a step's rows to the longest, in one micro-batch, which is faster for them than the 2 x 16 of approach 1 and gives the same sums;
TRL casts the adapters of a quantised model to bf16, and so Adam's moments; --adapters=fp32 casts them back before training. Needs trl,
or unsloth, which are no part of requirements.txt. The record holds loss, gradient norm, rate and seconds of every step. Leaves out:
LLM.int8, DoRA, mixtures, several GPUs.
"""
import collections
import importlib.metadata
import json
import os
import pathlib
import sys
import time

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_DISABLE_AUTO_UPDATES": "1", "UNSLOTH_COMPILE_LOCATION": "/tmp/unsloth_cache",
               "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
if "unsloth" in sys.argv[1:2]:  # it changes transformers as it is imported, so it wants to be first
    import unsloth

import torch
from safetensors.torch import load_file

import checkpoint
import config as settings
import data
import record
import schedule


def our_samples(config):
    """A datasets.Dataset of every sample of the run in its order: input_ids, and labels that are -100 where nothing is supervised."""
    from datasets import Dataset
    tokenizer = data.load_tokenizer(config.model.path, config.data.chat_template, config.model.revision)
    rows, _ = data.load(config, tokenizer)
    steps, total = schedule.plan_steps(config, len(rows))
    order = data.samples(rows, config.train.seed, 0, total)
    spans = [slice(rows.offsets[i], rows.offsets[i + 1]) for i in order]
    labels = [[int(token) if counts else -100 for token, counts in zip(rows.ids[span], rows.supervised[span])] for span in spans]
    return Dataset.from_dict({"input_ids": [rows.ids[span].tolist() for span in spans], "labels": labels}), tokenizer, steps, len(rows)


def load(peer, config, longest):
    """(the peer's quantised model, its tokenizer or None, PEFT's settings or None where the adapters are in the model already)."""
    lora, four = config.lora, config.model.quant == "nf4"
    if config.model.quant not in ("nf4", "none") or lora.dora or lora.init != "zero":
        raise ValueError("model.quant, lora.dora, lora.init: peers are measured with nf4 or none, without DoRA or LoftQ")
    adapters = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": lora.targets, "bias": "none",
                "use_rslora": lora.rslora}
    if peer == "unsloth":
        theirs, whole = unsloth.FastLanguageModel, {"max_seq_length": longest}
        network, tokenizer = theirs.from_pretrained(config.model.path, dtype=torch.bfloat16, load_in_4bit=four, **whole)
        network = theirs.get_peft_model(network, **adapters, **whole, use_gradient_checkpointing=False, random_state=config.train.seed)
        return network, tokenizer, None
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=config.model.double_quant,
                              bnb_4bit_compute_dtype=torch.bfloat16)
    network = AutoModelForCausalLM.from_pretrained(config.model.path, quantization_config=bits if four else None, dtype=torch.bfloat16,
                                                   device_map={"": 0 if torch.cuda.is_available() else "cpu"}, attn_implementation="sdpa")
    return network, None, LoraConfig(**adapters, task_type="CAUSAL_LM")


def adapter_dtypes(network):
    """{dtype of trainable parameters: how many there are}."""
    found = collections.Counter()
    for parameter in network.parameters():
        found[str(parameter.dtype).removeprefix("torch.")] += parameter.numel() if parameter.requires_grad else 0
    return {dtype: count for dtype, count in found.items() if count}


def train(peer, config, run, fp32=False):
    """Train, with a line of the record a step; the adapter lies in RUN/checkpoints/step-N, the settings in RUN/config.json.

    fp32: adapters are cast to 32 bits after the peer has made its trainer, before Adam's moments are made.
    """
    samples, tokenizer, steps, n_rows = our_samples(config)
    lengths = [len(ids) for ids in samples["input_ids"]]
    network, own, peft = load(peer, config, max(lengths))
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    gpu, count = torch.cuda.is_available(), config.samples_per_step
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").unlink(missing_ok=True)
    recorder, clock = record.Recorder(run, False, None), {}

    class Record(TrainerCallback):
        def on_step_begin(self, *_, **__):
            torch.cuda.synchronize() if gpu else None
            clock["began"] = time.perf_counter()

        def on_step_end(self, *_, **__):
            torch.cuda.synchronize() if gpu else None
            clock["took"] = time.perf_counter() - clock["began"]

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" not in (logs or {}):
                return
            step = state.global_step
            tokens, norm = sum(lengths[(step - 1) * count:step * count]), float(logs["grad_norm"])
            peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
            took, loss, rate = clock["took"], float(logs["loss"]), float(logs["learning_rate"])
            recorder.write(step, {"train/loss": loss, "train/grad_norm": norm, "train/learning_rate": rate,
                                  "train/clipped": float(0 < config.schedule.clip_norm < norm), "train/skipped": 0.0,
                                  "train/samples": count, "train/tokens": tokens, "train/epoch": step * count / n_rows,
                                  "train/seconds": took, "train/tokens_per_second": tokens / took, "train/peak_memory_gib": peak})
            if step % 25 == 0 or step == 1:
                print(f"step {step}/{steps}  loss {loss:.4f}  norm {norm:.3f}  rate {rate:.1e}  {took:.3f} s", flush=True)

    c = config.train
    given = SFTConfig(
        output_dir=str(run / "peer"), per_device_train_batch_size=count, gradient_accumulation_steps=1, max_steps=steps, bf16=True,
        use_cpu=not gpu, optim="adamw_torch_fused" if gpu else "adamw_torch",
        learning_rate=config.schedule.learning_rate, max_grad_norm=config.schedule.clip_norm, weight_decay=c.weight_decay,
        adam_beta1=c.adam_beta1, adam_beta2=c.adam_beta2, adam_epsilon=c.adam_eps, seed=c.seed,
        train_sampling_strategy="sequential", dataset_kwargs={"skip_prepare_dataset": True}, max_length=max(lengths), packing=False,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True)
    trainer = SFTTrainer(model=network, args=given, train_dataset=samples, processing_class=own or tokenizer, peft_config=peft,
                         callbacks=[Record()])

    def our_rates(num_training_steps, optimizer=None):
        factor = lambda done: schedule.learning_rate(min(done + 1, steps), config.schedule, steps) / config.schedule.learning_rate
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or trainer.optimizer, factor)
        return trainer.lr_scheduler

    trainer.create_scheduler = our_rates
    theirs = adapter_dtypes(trainer.model)
    for parameter in trainer.model.parameters() if fp32 else ():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    print(f"{peer}: adapters in {theirs}" + (f", trained in {adapter_dtypes(trainer.model)}" if fp32 else ""), flush=True)
    (run / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
    surroundings = record.environment()
    surroundings["packages"] |= {name: importlib.metadata.version(name) for name in {"trl", peer}}
    (run / "environment.json").write_text(json.dumps(surroundings, indent=1))
    began = time.perf_counter()
    trainer.train()
    print(f"{peer}: {steps} steps in {time.perf_counter() - began:.1f} s")
    recorder.close()
    trainer.model.save_pretrained(run / "peer")
    texts = {"adapter_config.json": (run / "peer" / "adapter_config.json").read_text(), "state.json": json.dumps({"step": steps})}
    checkpoint.save(run, steps, {"adapter_model.safetensors": load_file(run / "peer" / "adapter_model.safetensors")}, texts, 1)


def main(argv):
    names, flags, overrides = settings.command_line(argv, {"out": "", "adapters": "", "help": False})
    if flags["help"] or len(names) != 2 or names[0] not in ("trl", "unsloth"):
        print(__doc__.strip())
        return 0 if flags["help"] else 2
    if flags["adapters"] and (names[0], flags["adapters"]) != ("trl", "fp32"):
        raise ValueError(f"--adapters={flags['adapters']} with {names[0]}: there is --adapters=fp32, for trl")
    config = settings.settled(settings.located(settings.read(settings.find(names[1]), overrides)), "bf16")  # which peers compute in
    train(names[0], config, pathlib.Path(flags["out"] or f"runs/peer-{names[0]}"), bool(flags["adapters"]))
    return 0


if __name__ == "__main__":
    settings.run_command(main)
