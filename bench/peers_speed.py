"""How fast other trainers are on the cases of bench/speed.py: TRL with PEFT and bitsandbytes, the same with Liger kernels, Unsloth.

    python bench/peers_speed.py PEER CASE [--steps=22] [--micro-batch=4] [--checkpointing=yes] [--work=/tmp/bench]
                                          [--gsm8k=FILE.npz] [--tldr=FILE.npz]

PEER is trl, trl-liger or unsloth; none of them is a requirement of rawlora, so install what is to be measured. Same weights, rows,
rank, targets, optimizer and clipping as in bench/speed.py; a step consumes the case's samples. Each optimizer step is timed between
two synchronisations; the first two are not counted. Tokens are real ones, no padding. Prints one JSON line.

`bench/speed.py CASE --peers=trl,unsloth` runs this in turn with rawlora, in the same sitting; SETTINGS below is what each was best with.
"""
import json
import os
import pathlib
import statistics
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import speed  # noqa: E402

PEERS = ("trl", "trl-liger", "unsloth")
SETTINGS = {  # case -> (micro-batch, gradient checkpointing) of each peer that has an answer there
    "A": {"unsloth": (4, False)},
    "B": {"trl": (4, True), "trl-liger": (4, True), "unsloth": (4, True)},
    "C": {"trl": (4, True)},
    "D": {"trl": (16, False), "unsloth": (16, False)},
    "E": {"trl": (32, False), "trl-liger": (32, False), "unsloth": (32, False)},
}
STEPS = {"E": 62}  # whose steps are the shortest and scatter the most
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows_of(file):
    """[(token ids, labels)] of a rows file of bench/speed.py: the prompt is not supervised, and the end of text is one more token."""
    rows = []
    for line in open(file):
        row = json.loads(line)
        prompt, answer = (row.get(name, "").split() for name in ("prompt", "completion"))
        words = row["text"].split() if "text" in row else prompt + answer
        ids = [int(word[1:]) for word in words] + [2]
        rows.append((ids, [-100] * len(prompt) + ids[len(prompt):]))
    return rows


def load(peer, folder, quant, checkpointing, longest):
    """(model, tokenizer, PEFT's settings or None where the model has its adapters already)."""
    import torch
    if peer == "unsloth":
        from unsloth import FastLanguageModel
        model, tokenizer = FastLanguageModel.from_pretrained(str(folder), max_seq_length=longest, dtype=torch.bfloat16,
                                                             load_in_4bit=quant == "nf4", load_in_8bit=quant == "int8")
        model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, lora_dropout=0, target_modules=TARGETS, bias="none",
                                                 random_state=0, max_seq_length=longest,
                                                 use_gradient_checkpointing="unsloth" if checkpointing else False)
        return model, tokenizer, None
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    settings = BitsAndBytesConfig(**four) if quant == "nf4" else BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16, device_map={"": 0},
                                                 attn_implementation="sdpa")
    adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, bias="none", task_type="CAUSAL_LM")
    return model, AutoTokenizer.from_pretrained(folder), adapter


def measure(peer, case, steps, micro_batch, checkpointing, work, npz):
    """Train `steps` optimizer steps of a case with another trainer; returns a row like bench/speed.py's."""
    if peer == "unsloth":
        import unsloth  # noqa: F401  (it must come before the libraries that it changes)
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    shape, kind, samples, settings = speed.CASES[case]
    folder, file = work / f"model-{shape}", work / f"{case}-{peer}.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    speed.make_model(shape, folder, "cuda")
    speed.make_rows(kind, speed.SHAPES[shape]["vocab_size"], samples * steps, file, npz)
    rows = rows_of(file)
    longest = max(len(ids) for ids, _ in rows)
    quant = settings.get("model.quant", "nf4")
    model, tokenizer, adapter = load(peer, folder, quant, checkpointing, longest)
    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    settings = SFTConfig(
        output_dir=str(work / "peer"), per_device_train_batch_size=micro_batch, gradient_accumulation_steps=samples // micro_batch,
        max_steps=steps, learning_rate=1e-4, bf16=True, gradient_checkpointing=checkpointing, logging_steps=1, save_strategy="no",
        report_to=[], max_length=longest, packing=False, optim="adamw_torch_fused", warmup_steps=0, lr_scheduler_type="constant",
        max_grad_norm=1.0, dataset_kwargs={"skip_prepare_dataset": True}, use_liger_kernel=peer == "trl-liger", disable_tqdm=True)
    dataset = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows])
    trainer = SFTTrainer(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter,
                         callbacks=[Clock()])
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    timed = seconds[2:]
    s, quartiles = statistics.median(timed), statistics.quantiles(timed, n=4)
    import importlib.metadata
    packages = ("torch", "transformers", "peft", "bitsandbytes", "trl", *(["unsloth"] if peer == "unsloth" else []))
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"case": case, "who": peer, "gpus": 1,
            "tokens_per_second": round(sum(len(ids) for ids, _ in rows) / steps / s), "samples_per_second": round(samples / s, 1),
            "step_seconds": round(s, 5), "step_seconds_quartiles": [round(quartiles[0], 5), round(quartiles[-1], 5)],
            "timed_steps": len(timed), "first_steps_seconds": [round(x, 2) for x in seconds[:2]],
            "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "settings": {"micro_batch": micro_batch, "checkpointing": checkpointing, "quant": quant},
            "device": torch.cuda.get_device_name(), "versions": versions}


def main(argv):
    words = [arg for arg in argv if not arg.startswith("--")]
    options = dict(arg[2:].split("=", 1) for arg in argv if arg.startswith("--"))
    if len(words) != 2 or words[0] not in PEERS or words[1] not in speed.CASES:
        raise SystemExit(__doc__)
    peer, case = words
    best = SETTINGS.get(case, {}).get(peer, (4, True))
    micro_batch = int(options.get("micro-batch", best[0]))
    checkpointing = options["checkpointing"] == "yes" if "checkpointing" in options else best[1]
    npz = {name: options.get(name, f"{name}-train-ids.npz") for name in ("gsm8k", "tldr")}
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                      UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_DISABLE_AUTO_UPDATES="1")
    steps, work = int(options.get("steps", STEPS.get(case, 22))), pathlib.Path(options.get("work", "/tmp/bench"))
    print(json.dumps(measure(peer, case, steps, micro_batch, checkpointing, work, npz)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
