"""Case F: forward and backward on a CPU beside PEFT + bitsandbytes, turn by turn in one process.

    python bench/cpu.py [--rounds=5] [--rows=4] [--length=256] [--model=models/SmolLM2-135M-Instruct] [--write=bench/results/cpu.json]

Both sides train the same NF4 model (double quantisation) with r 16 on all seven projections in bf16, on the same rows of random
tokens, every token supervised. PEFT's side is transformers' model with bitsandbytes' Linear4bit under PEFT's LoRA, in training mode
throughout. What counts is the ratio: the machine's own speed drifts. The optimizer step is left out on both sides.
"""
import json
import pathlib
import statistics
import sys
import time

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import torch  # noqa: E402

import config as settings  # noqa: E402
import model  # noqa: E402


def theirs(folder):
    """transformers + bitsandbytes Linear4bit + PEFT, in training mode."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    for name, module in list(network.named_modules()):
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            quantised = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4")
            quantised.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
            network.set_submodule(name, quantised.to("cpu"))
    network.requires_grad_(False)
    network.config.use_cache = False
    return get_peft_model(network, LoraConfig(r=16, lora_alpha=32, target_modules=list(settings.PROJECTIONS), task_type="CAUSAL_LM")).train()


def main(argv):
    import types
    options = {"rounds": "5", "rows": "4", "length": "256", "model": "models/SmolLM2-135M-Instruct"} | dict(arg[2:].split("=", 1) for arg in argv)
    rows, length, folder = int(options["rows"]), int(options["length"]), settings.find(options["model"])
    ours, peft = model.load(settings.from_dict({"model": {"path": folder}}), "cpu"), theirs(folder)
    ids = torch.randint(3, ours.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    starts = torch.arange(rows)[:, None] * length
    batch = types.SimpleNamespace(input_ids=ids.flatten(), position_ids=torch.arange(length).repeat(rows), cu_seqlens=(torch.arange(rows + 1) * length).int(), max_seqlen=length,
                                  rows=(starts + torch.arange(length - 1)).flatten(), targets=ids[:, 1:].flatten())

    def step_ours():
        loss = model.summed_loss(ours, batch)[0] / len(batch.targets)
        loss.backward()
        return loss.item()

    def step_theirs():
        loss = peft(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item()

    seconds, losses = {"rawlora": [], "peft": []}, {}
    for turn in range(int(options["rounds"]) + 1):  # the first is a warm-up
        for who, step in (("rawlora", step_ours), ("peft", step_theirs)):
            began = time.perf_counter()
            losses[who] = step()
            if turn:
                seconds[who].append(time.perf_counter() - began)
                print(f"{who:8} {seconds[who][-1]:.2f} s, {rows * length / seconds[who][-1]:.0f} tokens/s, loss {losses[who]:.4f}", flush=True)
    ratios = [b / a for a, b in zip(seconds["rawlora"], seconds["peft"])]
    print(f"rawlora is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds)")
    if "write" in options:
        table = [{"case": "F", "who": who, "tokens_per_second": round(rows * length / statistics.median(times)), "samples_per_second": round(rows / statistics.median(times), 2),
                  "step_seconds": [round(x, 3) for x in times], "settings": {"rows": rows, "length": length}, "ratio_to_peft": round(statistics.median(ratios), 2), "threads": torch.get_num_threads(), "torch": torch.__version__} for who, times in seconds.items()]
        pathlib.Path(options["write"]).write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
