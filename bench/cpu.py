"""Case F: forward and backward on a CPU beside PEFT + bitsandbytes, turn by turn in one process.

    python bench/cpu.py [--rounds=20] [--rows=4] [--length=256] [--model=models/SmolLM2-135M-Instruct] [--profile=yes]
                        [--write=bench/results/cpu.json] [--beside=fp32]

Both sides train the same NF4 model (double quantisation) with r 16 on all seven projections in bf16, on the same rows of random
tokens, every token supervised. PEFT's side is transformers' model with bitsandbytes' Linear4bit under PEFT's LoRA, in training mode
throughout. What counts is the ratio: the machine's own speed drifts. The optimizer step is left out on both sides. Peak memory is that
of a side's weights and of what a step of its own takes, begun when all that is free was given back (Linux, glibc). --beside=fp32 puts
our own model in fp32 in PEFT's place.
"""
import ctypes
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
import record  # noqa: E402


def theirs(folder):
    """transformers + bitsandbytes Linear4bit + PEFT, in training mode."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    for name, module in list(network.named_modules()):
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            kind = {"compress_statistics": True, "quant_type": "nf4"}
            quantised = bnb.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None, torch.bfloat16, **kind)
            quantised.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, **kind)
            network.set_submodule(name, quantised.to("cpu"))
    network.requires_grad_(False)
    network.config.use_cache = False
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=list(settings.PROJECTIONS), task_type="CAUSAL_LM")
    return get_peft_model(network, lora).train()


def process_bytes(key):
    """VmRSS or VmHWM of this process in bytes, 0 where there is no /proc."""
    status = pathlib.Path("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key)) if status.exists() else 0


def step_bytes(step):
    """What `step` takes at its peak beyond what the process holds: what is free is given back before, so that it counts when it is taken
    again. 0 where there is no /proc."""
    if not process_bytes("VmRSS"):
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak until here
    before = process_bytes("VmRSS")
    step()
    return process_bytes("VmHWM") - before


def profile(step):
    """Run `step` once and print what takes its time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        step()
    print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=30))


def main(argv):
    import types
    options = {"rounds": "20", "rows": "4", "length": "256", "model": "models/SmolLM2-135M-Instruct", "profile": "", "beside": "peft"}
    options |= dict(arg[2:].split("=", 1) for arg in argv)
    rows, length, folder, other = int(options["rows"]), int(options["length"]), settings.find(options["model"]), options["beside"]
    own = lambda dtype: model.load(settings.from_dict({"model": {"path": folder, "compute_dtype": dtype}}), "cpu")
    networks = {"rawlora": own("bf16"), other: theirs(folder) if other == "peft" else own(other)}
    ids = torch.randint(3, networks["rawlora"].config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    starts = torch.arange(rows)[:, None] * length
    batch = types.SimpleNamespace(input_ids=ids.flatten(), position_ids=torch.arange(length).repeat(rows),
                                  cu_seqlens=(torch.arange(rows + 1) * length).int(), max_seqlen=length, rows=(starts + torch.arange(length - 1)).flatten(),
                                  targets=ids[:, 1:].flatten())

    def step(who):
        network = networks[who]
        loss = network(input_ids=ids, labels=ids).loss if who == "peft" else model.summed_loss(network, batch)[0] / len(batch.targets)
        loss.backward()
        return loss.item()

    seconds, losses = {who: [] for who in networks}, {}
    for turn in range(int(options["rounds"]) + 1):  # the first is a warm-up
        for who in networks:
            began = time.perf_counter()
            losses[who] = step(who)
            if turn:
                seconds[who].append(time.perf_counter() - began)
                rate = rows * length / seconds[who][-1]
                print(f"{who:8} {seconds[who][-1]:.2f} s, {rate:.0f} tokens/s, loss {losses[who]:.4f}", flush=True)
    if options["profile"]:
        profile(lambda: step("rawlora"))
    ratios = [b / a for a, b in zip(*seconds.values())]
    print(f"rawlora is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds)")
    if "write" in options:
        environment, table = record.environment(), []
        for who, times in seconds.items():
            quartiles, median = statistics.quantiles(times, n=4), statistics.median(times)
            network, taken = networks[who], step_bytes(lambda: step(who))
            held = network.get_memory_footprint() if who == "peft" else sum(size for _, size in model.memory_table(network).values())
            table.append({"case": "F", "who": who,
                          "tokens_per_second": round(rows * length / median), "samples_per_second": round(rows / median, 2),
                          "step_seconds": round(median, 3), "step_seconds_quartiles": [round(quartiles[0], 3), round(quartiles[-1], 3)],
                          "timed_steps": len(times),
                          f"ratio_to_{other}": [round(x, 2) for x in (min(ratios), statistics.median(ratios), max(ratios))],
                          "peak_memory_gib": round((held + taken) / 2**30, 2), "loss": round(losses[who], 4),
                          "settings": {"rows": rows, "length": length, "quant": "nf4", "threads": torch.get_num_threads()},
                          "device": environment["cpu"], "versions": environment["packages"]})
        pathlib.Path(options["write"]).write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
