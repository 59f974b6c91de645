"""What leaves this project, read by those it is for: transformers, PEFT, lm-eval, the gguf package. And nothing half-written."""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types
import weakref

import pytest
import torch
from conftest import PROJECT, make_model, make_tokenizer
from safetensors.torch import load_file, save_file

import attention
import checkpoint
import data
import eval as evaluation
import export
import gguf_file
import lora_layers
import model
import quant
import train

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
UMASK = os.umask(0)
os.umask(UMASK)
FP32 = ["--model.quant=none", "--model.compute_dtype=fp32"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So little work is done sooner by one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_run(tiny_inputs, folder, **sections):
    """A run of six steps on tiny_inputs, fp32 and unquantised unless told otherwise, without what other tests prove."""
    tree = {"model": {"path": str(tiny_inputs / "model"), "quant": "none", "compute_dtype": "fp32"}, "lora": {"r": 4, "alpha": 8.0},
            "data": {"train": str(tiny_inputs / "train.jsonl"), "eval": str(tiny_inputs / "eval.jsonl")},
            "train": {"max_steps": 6, "micro_batch_size": 4, "accumulation": 1}, "schedule": {"learning_rate": 2e-2, "lr_warmup_steps": 0},
            "eval": {"samples": 2, "max_new_tokens": 6, "unquantised": "no"}, "save": {"every_steps": 3},
            "log": {"tensorboard": False, "report": False}, "proof": {"enabled": False}}
    folder.mkdir(parents=True)
    (folder / "c.json").write_text(json.dumps({name: tree.get(name, {}) | sections.get(name, {}) for name in {**tree, **sections}}), encoding="utf-8")
    assert train.main([str(folder / "c.json"), f"--out={folder / 'run'}"]) == 0
    return folder / "run"


def make_adapter(folder, kind="llama", **changes):
    """What export.py is told of a tiny model of transformers' `kind` and an adapter of PEFT's on it that nobody trained."""
    from peft import LoraConfig, get_peft_model
    network = make_model(folder / "model", kind, **changes)
    make_tokenizer(folder / "model")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = get_peft_model(network, lora)
    theirs.peft_config["default"].base_model_name_or_path = str(folder / "model")
    theirs.save_pretrained(folder / "adapter")
    return [f"--ckpt={folder / 'adapter'}", *FP32]


@pytest.fixture(scope="module")
def plain(tiny_inputs, tmp_path_factory):
    """A run without quantisation, in fp32."""
    return make_run(tiny_inputs, tmp_path_factory.mktemp("plain") / "p")


@pytest.fixture(scope="module")
def nf4(tiny_inputs, tmp_path_factory):
    """A run over NF4 weights, computing in fp32."""
    return make_run(tiny_inputs, tmp_path_factory.mktemp("nf4") / "p", model={"quant": "nf4"})


@pytest.fixture(scope="module")
def merged(plain, tmp_path_factory):
    """`plain` merged, in fp32."""
    out = tmp_path_factory.mktemp("merged") / "out"
    assert export.main([f"--ckpt={plain}", f"--merge={out}", "--dtype=fp32"]) == 0
    return out


def adapter_of(run):
    return lora_layers.read_adapter(checkpoint.newest_valid(run)[0])[1]


def weights_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def with_peft(base, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


def loss_of(capsys, *arguments):
    """eval.py's loss."""
    capsys.readouterr()
    assert evaluation.main([*arguments, "--eval.samples=0", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["loss"]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ------------------------------------------------------------------------------------------------------------- merging

def test_a_merge_in_fp32_is_pefts_own(plain, merged, tiny_inputs):
    theirs = with_peft(tiny_inputs / "model", checkpoint.newest_valid(plain)[0]).merge_and_unload().state_dict()
    ours = weights_of(merged)
    assert set(ours) == set(theirs) and max(relative(ours[name], theirs[name]) for name in ours) < 1e-6
    base = weights_of(tiny_inputs / "model")
    changed = {name for name in ours if not torch.equal(ours[name], base[name])}
    assert changed == {name for name in ours if "proj" in name}


def test_a_merge_onto_the_dequantised_base_is_bitsandbytes_dequantised_weights_and_the_update(nf4, tiny_inputs, tmp_path):
    import bitsandbytes.functional as bnb
    assert export.main([f"--ckpt={nf4}", f"--merge={tmp_path / 'out'}", "--dtype=fp32"]) == 0
    base, ours, adapter = weights_of(tiny_inputs / "model"), weights_of(tmp_path / "out"), adapter_of(nf4)
    for name in base:
        wanted = base[name]
        if "proj" in name:
            wanted = bnb.dequantize_4bit(*bnb.quantize_4bit(base[name], quant_type="nf4", compress_statistics=True))
            stem = "base_model.model." + name.removesuffix(".weight")
            wanted = wanted + 2.0 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
        assert relative(ours[name], wanted) < 1e-6, name


def test_the_loss_of_a_merge_is_the_adapters_by_eval_py(plain, nf4, merged, tiny_inputs, tmp_path, capsys):
    export.main([f"--ckpt={nf4}", f"--merge={tmp_path / 'nf4'}", "--dtype=fp32"])
    for run, out in ((plain, merged), (nf4, tmp_path / "nf4")):
        through_merge = loss_of(capsys, f"--model={out}", f"--data={tiny_inputs / 'eval.jsonl'}", *FP32)
        assert through_merge == pytest.approx(loss_of(capsys, f"--ckpt={run}"), abs=1e-5)
        assert abs(through_merge - loss_of(capsys, f"--model={tiny_inputs / 'model'}", f"--data={tiny_inputs / 'eval.jsonl'}", *FP32)) > 0.3


def test_onto_the_original_the_update_lies_on_unquantised_weights(nf4, tiny_inputs, tmp_path, capsys):
    assert export.main([f"--ckpt={nf4}", f"--merge={tmp_path / 'out'}", "--dtype=fp32", "--onto=original", "--tolerance=0.5"]) == 0
    said = capsys.readouterr().out
    theirs = with_peft(tiny_inputs / "model", checkpoint.newest_valid(nf4)[0]).merge_and_unload().state_dict()
    ours = weights_of(tmp_path / "out")
    assert max(relative(ours[name], theirs[name]) for name in ours) < 1e-6
    unquantised = loss_of(capsys, f"--ckpt={nf4}", *FP32)
    assert f"{unquantised:.4f}            through the adapter, unquantised" in said
    assert f"{unquantised:.4f}, +0.0000   through the merge" in said.replace("-0.0000", "+0.0000")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_16_bit_merge_holds_every_weight_in_16_bits_and_keeps_the_loss(nf4, tiny_inputs, tmp_path, capsys, dtype):
    assert export.main([f"--ckpt={nf4}", f"--merge={tmp_path / 'out'}", f"--dtype={dtype}"]) == 0
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {quant.DTYPES[dtype]}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(quant.DTYPES[dtype]).removeprefix("torch.")
    merge = [f"--model={tmp_path / 'out'}", "--model.quant=none", f"--model.compute_dtype={dtype}"]
    loss = loss_of(capsys, *merge, f"--data={tiny_inputs / 'eval.jsonl'}")
    assert loss == pytest.approx(loss_of(capsys, f"--ckpt={nf4}"), abs=0.02)


def test_shards_hold_the_same_weights_and_transformers_loads_them(plain, merged, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM
    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    assert export.main([f"--ckpt={plain}", f"--merge={tmp_path / 'out'}", "--dtype=fp32"]) == 0
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    single, sharded = weights_of(merged), weights_of(tmp_path / "out")
    assert set(single) == set(sharded) and all(torch.equal(single[name], sharded[name]) for name in single)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(single) and index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in single.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], single[name]) for name in single)


def test_no_weight_outlives_the_one_after_it(plain, tmp_path, monkeypatch):
    alive, most, real = [], [], export.Source.merged

    def merged(self, name, dtype):
        most.append(sum(reference() is not None for reference in alive))
        tensor, sums = real(self, name, dtype)
        alive.append(weakref.ref(tensor))
        return tensor, sums

    monkeypatch.setattr(export.Source, "merged", merged)
    config, adapter, _ = evaluation.configure(str(plain), "", [])
    export.write_weights(tmp_path, export.Source(config, adapter), torch.bfloat16)
    assert len(most) > 15 and max(most) <= 1


def test_a_tied_head_is_not_stored_and_loads_tied(tiny_inputs, tmp_path):
    from transformers import AutoModelForCausalLM
    arguments = make_adapter(tmp_path, tie_word_embeddings=True)
    assert export.main([*arguments, f"--data={tiny_inputs / 'eval.jsonl'}", f"--merge={tmp_path / 'out'}", "--dtype=fp32"]) == 0
    assert "lm_head.weight" not in weights_of(tmp_path / "out")
    network, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and network.lm_head.weight is network.model.embed_tokens.weight


# ------------------------------------------------------------------------------------------------------------ rounding

def test_stochastic_rounding_is_right_on_average_and_never_further_than_a_neighbour():
    generator = torch.Generator().manual_seed(0)
    values = torch.cat((torch.randn(500), torch.randn(500) * 1e-6, torch.randn(500) * 1e6, torch.zeros(1)))
    draws = torch.stack([export.round_stochastically(values, generator).float() for _ in range(400)])
    nearest = values.to(torch.bfloat16).float()
    step = 2.0 ** (torch.floor(torch.log2(values.abs().clamp_min(1e-30))) - 7)  # between bf16 neighbours
    assert ((draws - values).abs() < step).all() and ((draws.mean(0) - values).abs() < 5 * 0.5 * step / 20).all()
    assert torch.equal(export.round_stochastically(nearest, generator).float(), nearest)  # what bf16 holds is left as it is


def test_a_small_update_survives_stochastic_rounding_and_is_lost_to_the_nearest():
    torch.manual_seed(0)
    base, lora_A, lora_B = torch.randn(256, 256).bfloat16(), torch.randn(4, 256), 1e-3 * torch.randn(256, 4) / 2
    stochastic, nearest = (export.fate_figures(export.merge(base, lora_A, lora_B, None, 1.0, torch.bfloat16, seed)[1]) for seed in (1, None))
    assert nearest["survives"] < 0.6 and abs(stochastic["survives"] - 1) < 0.05
    assert nearest["size"] == stochastic["size"] == pytest.approx(1e-3, rel=0.1)
    fp32 = export.fate_figures(export.merge(base, lora_A, lora_B, None, 1.0, torch.float32, 1)[1])
    assert fp32["survives"] == pytest.approx(1, abs=1e-3) and fp32["noise"] < 1e-3


def test_the_same_export_twice_gives_the_same_bytes(nf4, tmp_path):
    for name in ("a", "b"):
        export.main([f"--ckpt={nf4}", f"--merge={tmp_path / name}", "--dtype=bf16"])
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_rounding_to_the_nearest_is_pefts_merge_of_bf16_weights(plain, tiny_inputs, tmp_path):
    export.main([f"--ckpt={plain}", f"--merge={tmp_path / 'out'}", "--dtype=bf16", "--rounding=nearest"])
    theirs = with_peft(tiny_inputs / "model", checkpoint.newest_valid(plain)[0]).merge_and_unload().state_dict()
    ours = weights_of(tmp_path / "out")
    different = sum((ours[name] != theirs[name].bfloat16()).sum().item() for name in ours)
    assert different <= 1e-4 * sum(tensor.numel() for tensor in ours.values())  # where fp32 sums in another order lie on both sides


def test_merging_into_4_bits_is_refused_with_what_would_be_lost(nf4, tmp_path):
    figures = r"\d+% of the update would survive, under noise of [\d.]+ times its size, and \d+% of the codes would stay"
    with pytest.raises(ValueError, match="4 bits would undo the training: " + figures) as told:
        export.main([f"--ckpt={nf4}", f"--merge={tmp_path / 'out'}", "--dtype=nf4"])
    config, adapter, _ = evaluation.configure(str(nf4), "", [])
    sized = lambda factor: {name: tensor * (factor if "lora_B" in name else 1) for name, tensor in adapter.items()}
    heavy, own, light = (export.lost_in_4_bits(export.Source(config, sized(factor))) for factor in (20, 1, 0.1))
    assert f"{own['lost']:.0%} of the codes" in str(told.value) and not (tmp_path / "out").exists()
    assert heavy["lost"] < own["lost"] < light["lost"] == 1.0
    assert heavy["survives"] > 0.8 > own["survives"]


def test_a_value_that_fp16_cannot_hold_is_refused_by_name(tiny_inputs, tmp_path):
    arguments = make_adapter(tmp_path)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][300, 5] = 1e5  # an id that no text has
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight: .*--dtype=bf16"):
        export.main([*arguments, f"--data={tiny_inputs / 'eval.jsonl'}", f"--merge={tmp_path / 'out'}", "--dtype=fp16"])
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


# ----------------------------------------------------------------------------------------------------------- comparing

def test_a_merge_that_lost_the_adapter_is_refused_and_not_kept(plain, tmp_path, monkeypatch, capsys):
    real = export.merge
    monkeypatch.setattr(export, "merge", lambda base, lora_A, lora_B, *rest: real(base, lora_A, 0 * lora_B, *rest))
    assert export.main([f"--ckpt={plain}", f"--merge={tmp_path / 'out'}", "--dtype=fp32"]) == 5
    said = capsys.readouterr()
    assert "written" not in said.out and "the loss differs by" in said.err and "the logits differ by" in said.err and not list(tmp_path.iterdir())


def test_one_wrong_module_is_found_by_its_logits(plain, tmp_path, monkeypatch, capsys):
    real = export.Source.merged

    def merged(self, name, dtype):
        tensor, sums = real(self, name, dtype)
        return (self.base(name).to(dtype) if name == "model.layers.0.mlp.down_proj.weight" else tensor), sums

    monkeypatch.setattr(export.Source, "merged", merged)
    assert export.main([f"--ckpt={plain}", f"--merge={tmp_path / 'out'}", "--dtype=fp32"]) == 5 and "the logits differ by" in capsys.readouterr().err


def test_the_difference_that_is_allowed_can_be_chosen(nf4, tmp_path, capsys):
    arguments = [f"--ckpt={nf4}", "--dtype=bf16"]
    assert export.main([*arguments, f"--merge={tmp_path / 'a'}", "--tolerance=0"]) == 5
    assert export.main([*arguments, f"--merge={tmp_path / 'b'}", "--tolerance=0.3"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


# ------------------------------------------------------------------------------------------- what lies beside the weights

def test_the_tokenizer_and_template_of_the_run_go_with_the_merge_though_the_base_has_others(tiny_inputs, tmp_path):
    shutil.copytree(tiny_inputs / "model", tmp_path / "model")
    (tmp_path / "own.jinja").write_text((tiny_inputs / "model" / "chat_template.jinja").read_text().replace("<|im_start|>", "<|im_start|>the "))
    run = make_run(tiny_inputs, tmp_path / "p", model={"path": str(tmp_path / "model")}, data={"chat_template": str(tmp_path / "own.jinja")})
    (tmp_path / "model" / "chat_template.jinja").write_text("another")
    export.main([f"--ckpt={run}", f"--merge={tmp_path / 'out'}", "--dtype=fp32"])
    tokenizer = data.load_tokenizer(tmp_path / "out")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>the user\nx<|im_end|>\n<|im_start|>the assistant\n"


def test_generation_settings_stop_where_training_taught_to_stop(tiny_inputs, tmp_path):
    arguments = make_adapter(tmp_path)
    theirs = {"eos_token_id": 7, "temperature": 0.6, "do_sample": True, "top_p": 0.9}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(theirs))
    export.main([*arguments, f"--data={tiny_inputs / 'eval.jsonl'}", f"--merge={tmp_path / 'out'}", "--dtype=fp32"])
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    end, = data.end_of_turn(data.load_tokenizer(tiny_inputs / "model"))
    assert settings["eos_token_id"] == [end, 7] and settings["pad_token_id"] is not None
    assert settings["temperature"] == 0.6 and settings["do_sample"] is True


def test_the_model_card_says_where_the_model_came_from_and_names_no_path(plain, merged, tiny_inputs, tmp_path):
    text = (merged / "README.md").read_text()
    for word in ("LoRA, rank 4", "train.jsonl", "eval.jsonl", "| steps | 6: 24 samples", "| schedule.learning_rate | 0.02 |",
                 "loss through the merge", "## Verdict\n\n**"):
        assert word in text, word
    assert json.loads((plain / "verdict.json").read_text())["outcome"] in text
    assert str(tiny_inputs) not in text and str(merged.parent) not in text and "lora.targets" not in text
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    (run / "verdict.json").unlink()
    export.main([f"--ckpt={run}", f"--adapter={tmp_path / 'without'}"])
    assert "## Verdict\n\nNone was recorded." in (tmp_path / "without" / "README.md").read_text()
    failed = {"set": "minimum", "name": "eval loss", "outcome": "FAIL", "threshold": -0.2, "measured": -0.10000001, "low": -0.2, "high": 0.0,
              "reason": "too few steps"}
    (run / "verdict.json").write_text(json.dumps({"outcome": "FAIL", "criteria": [failed]}))
    export.main([f"--ckpt={run}", f"--adapter={tmp_path / 'adapter'}"])
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "**FAIL**" in text and "| minimum eval loss | FAIL | -0.1 | -0.2 | too few steps |" in text


# ------------------------------------------------------------------------------------------------------------- adapters

def test_an_adapter_alone_is_the_checkpoints_bit_for_bit_and_peft_loads_it(plain, tiny_inputs, tmp_path):
    assert export.main([f"--ckpt={plain}", f"--adapter={tmp_path / 'out'}"]) == 0
    assert children(tmp_path / "out") == ["README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
                                          "tokenizer.json", "tokenizer_config.json"]
    saved, exported = adapter_of(plain), load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(saved) == set(exported) and all(torch.equal(saved[name], exported[name]) for name in saved)
    config, adapter, folder = evaluation.configure(str(tmp_path / "out"), "", [("model.quant", "none"), ("model.compute_dtype", "fp32")])
    network = model.load(config, "cpu").eval()
    lora_layers.set_adapters(lora_layers.adapters(network), adapter, str(folder))
    ids = torch.randint(3, 259, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), attention.own_attention(network):
        assert relative(network(input_ids=ids).logits, with_peft(tiny_inputs / "model", tmp_path / "out")(input_ids=ids).logits) < 1e-5


def test_the_base_model_of_an_exported_adapter_can_be_named(plain, tiny_inputs, tmp_path):
    shutil.copytree(tiny_inputs / "model", tmp_path / "elsewhere")
    export.main([f"--ckpt={plain}", f"--adapter={tmp_path / 'out'}", f"--model={tmp_path / 'elsewhere'}"])
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "elsewhere")


def test_runs_checkpoints_and_adapter_folders_of_peft_can_be_exported(plain, tiny_inputs, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    lora = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_inputs / "model"), lora)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = theirs.merge_and_unload().state_dict()
    of_rows = f"--data={tiny_inputs / 'eval.jsonl'}"
    assert export.main([f"--ckpt={tmp_path / 'theirs'}", f"--merge={tmp_path / 'a'}", "--dtype=fp32", *FP32, of_rows]) == 0
    ours = weights_of(tmp_path / "a")
    assert max(relative(ours[name], wanted[name]) for name in ours) < 1e-6
    last = checkpoint.newest_valid(plain)[0]
    for number, ckpt in enumerate((f"{plain}@best", f"{plain}@step-000003", str(last))):
        assert export.main([f"--ckpt={ckpt}", f"--adapter={tmp_path / str(number)}"]) == 0
    assert (tmp_path / "1" / "adapter_model.safetensors").read_bytes() != (tmp_path / "2" / "adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------- nothing half-written

def children(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_there_already_is_left_alone(plain, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for flag in ("merge", "adapter", "gguf"):
        for name in ("full", "file", "link"):
            with pytest.raises(ValueError, match=rf"--{flag}: .*{name} is there already"):
                export.main([f"--ckpt={plain}", f"--{flag}={tmp_path / name}"])
    assert children(tmp_path) == ["file", "full", "link"] and children(tmp_path / "full") == ["mine.txt"]
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert export.main([f"--ckpt={plain}", f"--adapter={tmp_path / 'empty'}"]) == 0 and "README.md" in children(tmp_path / "empty")


def killed_at(number, calls, arguments):
    """Run export.main in a forked process that kills itself at the number-th of `calls`; how it ended: 0, or -SIGKILL."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def counting(real):
            def call(*args, **rest):
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **rest)
            return call

        try:
            for module, name in calls:
                setattr(module, name, counting(getattr(module, name)))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(export.main(arguments))
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_killed_export_leaves_no_folder_that_looks_whole_and_the_next_one_clears_it_away(plain, tmp_path):
    calls = [(export.cache, "sync"), (os, "rename"), (os, "fsync"), (export, "write_adapter"), (shutil, "rmtree")]
    arguments = [f"--ckpt={plain}", f"--adapter={tmp_path / 'out'}"]
    killed = 0
    for number in range(1, 60):
        status = killed_at(number, calls, arguments)
        if (tmp_path / "out").exists():  # killed after it had its name, or not at all: then it is whole
            assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= set(children(tmp_path / "out"))
            assert set(lora_layers.read_adapter(tmp_path / "out")[1]) == set(adapter_of(plain))
            shutil.rmtree(tmp_path / "out")
        if status == 0:
            break
        assert status == -signal.SIGKILL and len(children(tmp_path)) <= 1
        killed += 1
    assert status == 0 and killed > 10 and children(tmp_path) == []


def test_a_merge_killed_while_writing_has_no_name_yet(plain, tmp_path):
    arguments = [f"--ckpt={plain}", f"--merge={tmp_path / 'out'}", "--dtype=fp32"]
    for name, number in (("merge", 9), ("write_companions", 1), ("through_merge", 1), ("publish", 1)):
        assert killed_at(number, [(export, name)], arguments) == -signal.SIGKILL
        assert not (tmp_path / "out").exists() and len(children(tmp_path)) == 1 and children(tmp_path)[0].startswith(".out.export-")
    assert export.main(arguments) == 0 and children(tmp_path) == ["out"]


def test_an_export_that_is_still_going_on_is_not_cleared_away(tmp_path):
    with export.unfinished(tmp_path / "out") as first, export.unfinished(tmp_path / "out") as second:
        assert first != second and first.is_dir() and second.is_dir()
    assert children(tmp_path) == []


def test_of_two_exports_of_one_name_the_second_to_end_changes_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "first").write_text("first")
    with export.unfinished(tmp_path / "out") as work, pytest.raises(OSError):
        export.publish(work, tmp_path / "out")
    (tmp_path / "out.gguf").write_text("first")
    with export.unfinished(tmp_path / "out.gguf") as work, pytest.raises(ValueError, match="left alone"):
        (work / "model.gguf").write_text("second")
        export.publish(work / "model.gguf", tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "first" and children(tmp_path / "out") == ["first"]


def test_too_little_room_is_told_before_anything_is_computed(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    monkeypatch.setattr(model, "load", lambda *args: pytest.fail("the model was loaded"))
    for arguments in ([f"--merge={tmp_path / 'new' / 'out'}"], [f"--gguf={tmp_path / 'out.gguf'}"], [f"--adapter={tmp_path / 'out'}"]):
        with pytest.raises(ValueError, match=r"needs 6\d MiB, 0 MiB are free"):
            export.main([f"--ckpt={plain}", *arguments])


@pytest.mark.parametrize("writer", ["the tokenizer", "the matrices"])
def test_a_disk_that_fills_while_an_adapter_is_written_is_one_message_and_leaves_nothing(plain, tmp_path, monkeypatch, writer):
    import transformers

    def full(self, *args, **rest):
        raise Exception("No space left on device (os error 28)") if writer == "the tokenizer" else OSError(28, "No space left on device")

    monkeypatch.setattr(*((transformers.PreTrainedTokenizerBase, "save_pretrained") if writer == "the tokenizer" else (pathlib.Path, "write_bytes")), full)
    with pytest.raises(OSError, match=r"out: could not be made \(.*No space left on device.*make room"):  # config.run_command makes one message of it
        export.main([f"--ckpt={plain}", f"--adapter={tmp_path / 'out'}"])
    assert children(tmp_path) == []


def test_every_file_of_an_export_can_be_read_by_others(plain, merged, tmp_path):
    assert export.main([f"--ckpt={plain}", f"--adapter={tmp_path / 'out'}"]) == 0
    files = [*(tmp_path / "out").iterdir(), *merged.iterdir()]
    assert len(files) > 10 and {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~UMASK}


# ------------------------------------------------------------------------------------------------------------ bad input

def test_what_is_wrong_is_told_before_the_model_is_loaded(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "load", lambda *args: pytest.fail("the model was loaded"))
    out, ckpt = f"--merge={tmp_path / 'out'}", f"--ckpt={plain}"
    for arguments, said in (([], "say what to export"), ([ckpt], "say what to export"), ([out], "say what to export"), (["runs/x"], "unexpected"),
                            (["--ckpt=nothing", out], "not a run folder"), ([ckpt, out, "--dtype=int8"], "--dtype: must be"),
                            ([ckpt, out, "--dtype=q8_0"], "--dtype: must be"), ([ckpt, out, "--onto=top"], "--onto: must be"),
                            ([ckpt, out, "--rounding=up"], "--rounding"), ([ckpt, out, "--tolerance=much"], "--tolerance: must be a number"),
                            ([ckpt, out, "--tolerance=-1"], "--tolerance"), ([ckpt, out, "--data=none.jsonl"], "none.jsonl: no such file"),
                            ([ckpt, out, "--lora.r=0"], "lora.r"), ([ckpt, out, "--nothing"], "unknown option"),
                            ([ckpt, out, f"--adapter={tmp_path / 'out'}"], "--adapter, --merge: .*out is .*out or lies in it; each needs"),
                            ([ckpt, out, f"--gguf={tmp_path / 'out' / 'm.gguf'}"], "--gguf, --merge: .*m.gguf is .*out or lies in it"),
                            ([ckpt, f"--merge={__file__}/out"], "--merge: .* cannot be made, since .*test_export.py is no folder")):
        with pytest.raises(ValueError, match=said):
            export.main(arguments)
    assert children(tmp_path) == []


def test_an_adapter_of_another_model_is_refused_by_name(plain, tiny_inputs, tmp_path):
    shutil.copytree(tiny_inputs / "model", tmp_path / "wider")
    make_model(tmp_path / "wider", hidden_size=128)
    for flag in ("merge", "gguf", "adapter"):
        with pytest.raises(ValueError, match=r"lora_[AB].weight of shape \(\d+, \d+\) is no adapter for LlamaForCausalLM"):
            export.main([f"--ckpt={plain}", f"--model={tmp_path / 'wider'}", f"--{flag}={tmp_path / 'out'}"])
    assert children(tmp_path) == ["wider"]


def test_the_command_tells_its_figures_in_80_columns(nf4, tmp_path, capfd):
    assert export.main(["--ckpt", str(nf4), "--merge", str(tmp_path / "out")]) == 0
    said = capfd.readouterr()
    for word in ("survives stochastic rounding to bf16", "untouched", "through the adapter", "through the merge", "logits", "written"):
        assert word in said.out
    lines = [line.replace(str(nf4.parent.parent), "").replace(str(tmp_path), "") for line in said.out.splitlines() if "base  " not in line]
    assert said.err == "" and max(map(len, lines)) <= 80


def test_the_command_exits_2_with_one_message():
    done = subprocess.run([sys.executable, PROJECT / "export.py", "--ckpt", "nothing", "--merge", "out"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1) and done.stderr.startswith("error: nothing: not a run folder")


# ----------------------------------------------------------------------------------------------------------------- GGUF

GGUF_MODELS = {
    "llama": ("llama", {}), "llama, tied": ("llama", {"tie_word_embeddings": True}), "llama, wide heads": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}), "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),  # the only width that this reader knows
}


@pytest.mark.parametrize("case", GGUF_MODELS)
def test_transformers_reads_the_gguf_file_as_the_merge(tmp_path, case):
    from transformers import AutoModelForCausalLM
    kind, changes = GGUF_MODELS[case]
    assert export.main([*make_adapter(tmp_path, kind, **changes), f"--gguf={tmp_path / 'out.gguf'}", "--dtype=fp32"]) == 0
    merge = with_peft(tmp_path / "model", tmp_path / "adapter").merge_and_unload()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32).eval()
    ids = torch.randint(3, 259, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(theirs(input_ids=ids).logits, merge(input_ids=ids).logits) < 1e-5


@pytest.fixture(scope="module")
def gguf_out(plain, tmp_path_factory):
    """`plain`, its tokenizer with a few merges, as a GGUF file with blocks of 8 bits: (file, its reader, the tokenizer's folder)."""
    import gguf
    folder = tmp_path_factory.mktemp("gguf")
    export.main([f"--ckpt={plain}", f"--adapter={folder / 'adapter'}"])
    path = folder / "adapter" / "tokenizer.json"
    tree = json.loads(path.read_text())
    for number, (left, right) in enumerate((("e", "d"), ("r", "ed"), ("\u0120", "b"), ("1", "2"))):
        tree["model"]["merges"].append([left, right])
        tree["model"]["vocab"][left + right] = 259 + number
    path.write_text(json.dumps(tree))
    arguments = [f"--ckpt={folder / 'adapter'}", f"--gguf={folder / 'out.gguf'}", "--dtype=q8_0", "--model.quant=none", "--model.compute_dtype=fp32"]
    assert export.main(arguments) == 0
    return folder / "out.gguf", gguf.GGUFReader(folder / "out.gguf"), folder / "adapter"


def test_8_bit_blocks_lie_within_half_a_step_of_the_merge_and_vectors_are_exact(gguf_out, merged):
    import gguf
    there, weights = {tensor.name: tensor for tensor in gguf_out[1].tensors}, weights_of(merged)
    assert len(there) == len(weights) == 21 and {tensor.tensor_type.name for tensor in there.values()} == {"Q8_0", "F32"}
    known = {"model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight", "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
             "model.norm.weight": "output_norm.weight"}
    for ours, theirs in known.items():
        back = torch.from_numpy(gguf.quants.dequantize(there[theirs].data, there[theirs].tensor_type).copy()).reshape(weights[ours].shape)
        step = weights[ours].reshape(-1, 32).abs().amax(1, keepdim=True) / 127
        assert ((back - weights[ours]).reshape(-1, 32).abs() <= 0.57 * step).all()
        assert torch.equal(back, weights[ours]) == (weights[ours].ndim == 1)


def test_the_tokenizer_in_the_gguf_file_is_the_one_beside_the_adapter(gguf_out):
    """A tokenizer made from the file's entries alone (transformers' reader wants a bos token, which this one has not) makes the same ids."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    out, reader, folder = gguf_out
    value = lambda key: reader.fields[key].contents()
    tokens, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in value("tokenizer.ggml.merges")]
    theirs, ours = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)), data.load_tokenizer(folder)
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, kinds) if kind == 3])
    text = "<|im_start|>user\nnaïve red blue 123 — don't\t<|im_end|>\n"
    assert theirs.encode(text).ids == ours(text)["input_ids"] and max(ours(text)["input_ids"]) > 258
    assert value("tokenizer.chat_template") == ours.chat_template and value("tokenizer.ggml.pre") == "gpt-2"
    assert value("tokenizer.ggml.eos_token_id") == ours.eos_token_id == data.end_of_turn(ours)[0] and value("tokenizer.ggml.add_bos_token") is False
    types = value("tokenizer.ggml.token_type")
    assert len(types) == len(tokens) == 320 and [types[i] for i in (0, 1, 5, 300)] == [3, 3, 1, 5] and tokens[300] == "[PAD300]"


def test_the_way_text_is_split_has_llama_cpps_name_or_is_refused(tiny_inputs):
    from tokenizers import Regex, normalizers, pre_tokenizers
    tokenizer = data.load_tokenizer(tiny_inputs / "model")
    llama3, qwen2 = list(gguf_file.SPLITS)
    byte_level = lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    split = lambda pattern: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(False)])
    digits = lambda single: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=single), byte_level(True)])
    for pre, name in ((byte_level(True), "gpt-2"), (digits(True), "smollm"), (split(llama3), "llama-bpe"), (split(qwen2), "qwen2")):
        tokenizer.backend_tokenizer.pre_tokenizer = pre
        assert gguf_file.splitting(tokenizer) == name
    for pre in (split(r"\w+"), digits(False), byte_level(False), pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Whitespace()):
        tokenizer.backend_tokenizer.pre_tokenizer = pre
        with pytest.raises(ValueError, match="llama.cpp has no name known here"):
            gguf_file.splitting(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer, tokenizer.backend_tokenizer.normalizer = byte_level(True), normalizers.Lowercase()
    with pytest.raises(ValueError, match="llama.cpp has no name known here"):
        gguf_file.splitting(tokenizer)


def test_rotary_frequencies_of_llama_3_are_divided_as_its_paper_code_does(tmp_path):
    import math

    import gguf
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}
    export.main([*make_adapter(tmp_path, head_dim=32, rope_parameters=rope), f"--gguf={tmp_path / 'out.gguf'}", "--dtype=fp32"])
    tensor = next(tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors if tensor.name == "rope_freqs.weight")
    wanted = []
    for i in range(16):
        wavelength = 2 * math.pi * 500000.0 ** (i / 16)
        smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
        wanted.append(1.0 if wavelength < 64 / 4 else 8.0 if wavelength > 64 else 1 / ((1 - smooth) / 8 + smooth))
    assert torch.allclose(torch.from_numpy(tensor.data.copy()), torch.tensor(wanted), rtol=1e-5) and len(set(wanted)) > 2


@pytest.mark.parametrize("kind, changes, said", [
    ("gemma2", {}, "is not among the architectures"), ("mistral", {}, "sliding window of 8"), ("llama", {"hidden_act": "gelu"}, "activation gelu"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rotary embedding")])
def test_what_llama_cpp_would_compute_otherwise_is_refused_by_name(tmp_path, kind, changes, said):
    arguments = make_adapter(tmp_path, kind, **changes)
    with pytest.raises(ValueError, match=f"--gguf: .*{said}"):
        export.main([*arguments, f"--gguf={tmp_path / 'out.gguf'}"])
    assert children(tmp_path) == ["adapter", "model"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "q8_0"])
def test_a_gguf_file_that_differs_from_the_merge_is_not_kept(plain, tmp_path, monkeypatch, dtype):
    real = gguf_file.quantize

    def damaged(array, kind):
        stored = real(array, kind).copy()
        if array.shape == (128, 64):
            stored.view("uint8").reshape(-1)[1001] ^= 0x20
        return stored

    monkeypatch.setattr(gguf_file, "quantize", damaged)
    with pytest.raises(ValueError, match=r"read back, blk.0.ffn_(gate|up).weight differs from the merge"):
        export.main([f"--ckpt={plain}", f"--gguf={tmp_path / 'out.gguf'}", f"--dtype={dtype}"])
    monkeypatch.setattr(gguf_file, "quantize", real)
    add = gguf_file.gguf.GGUFWriter.add_key_value
    another = lambda self, key, value, *rest, **more: add(self, key, value + 1 if key.endswith("eos_token_id") else value, *rest, **more)
    monkeypatch.setattr(gguf_file.gguf.GGUFWriter, "add_key_value", another)
    with pytest.raises(ValueError, match="tokenizer.ggml.eos_token_id is 3 where 2 was written"):
        export.main([f"--ckpt={plain}", f"--gguf={tmp_path / 'out.gguf'}", f"--dtype={dtype}"])
    assert children(tmp_path) == []


def test_a_gguf_export_killed_while_writing_has_no_name_yet(plain, tmp_path):
    arguments = [f"--ckpt={plain}", f"--gguf={tmp_path / 'out.gguf'}"]
    for calls, number in (([(gguf_file, "quantize")], 5), ([(gguf_file, "compare")], 1), ([(export, "publish")], 1)):
        assert killed_at(number, calls, arguments) == -signal.SIGKILL
        assert not (tmp_path / "out.gguf").exists() and len(children(tmp_path)) == 1
    assert export.main(arguments) == 0 and children(tmp_path) == ["out.gguf"]


# --------------------------------------------------------------------------------------------------------- real clients

def test_generate_and_the_pipeline_of_transformers_write_from_the_merge_what_the_adapter_writes(plain, merged):
    from transformers import pipeline
    config, adapter, folder = evaluation.configure(str(plain), "", [])
    tokenizer, network = data.load_tokenizer(merged), model.load(config, "cpu")
    lora_layers.set_adapters(lora_layers.adapters(network), adapter, str(folder))
    samples = evaluation.generate(network, tokenizer, data.prompts(config, tokenizer), 12, data.end_of_turn(tokenizer))
    writer = pipeline("text-generation", model=str(merged), device="cpu")
    for sample in samples:
        chat = [{"role": "user", "content": sample["prompt"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = writer.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1]:]
        assert tokenizer.decode(written, skip_special_tokens=True) == sample["text"] and (len(written) < 12) == sample["stopped"]
        answered = writer(chat, max_new_tokens=12, do_sample=False)[0]["generated_text"]
        assert answered[-1] == {"role": "assistant", "content": sample["text"]}
    assert len(samples) == 2 and any(sample["text"] for sample in samples)


TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}")


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_lm_eval_scores_base_adapter_and_merge_as_eval_py_does(tiny_inputs, tmp_path, capsys, kind):
    """A local task over the evaluation rows. The template ends a prompt without white space, which lm-eval would count to the answer."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    make_model(tmp_path / "model", initializer_range=0.1, vocab_size=259)  # as many as tokens: lm-eval cuts a base down to them under an adapter
    make_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    run = make_run(tiny_inputs, tmp_path / "p", model={"path": str(tmp_path / "model"), "quant": kind})
    assert export.main([f"--ckpt={run}", f"--merge={tmp_path / 'merge'}", f"--adapter={tmp_path / 'adapter'}", "--dtype=fp32"]) == 0
    tokenizer = data.load_tokenizer(tmp_path / "merge")
    with open(tmp_path / "rows.jsonl", "w") as file:
        for line in (tiny_inputs / "eval.jsonl").read_text().splitlines():
            chat = json.loads(line)["messages"]
            prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
            file.write(json.dumps({"prompt": prompt, "answer": tokenizer.apply_chat_template(chat, tokenize=False).removeprefix(prompt)}) + "\n")
    source = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    task = {"task": "rows", "dataset_path": "json", "dataset_kwargs": source, "test_split": "test", "output_type": "loglikelihood",
            "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}", "target_delimiter": "",
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]}
    rows = data.tokenize(data.read_rows(str(tiny_inputs / "eval.jsonl")), tokenizer, evaluation.settings.Data())

    def scored(**arguments):
        """Nats a supervised token, by lm-eval."""
        client = HFLM(device="cpu", dtype="float32", batch_size=2, **arguments)
        found = lm_eval.simple_evaluate(client, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0)
        return -sum(sample["filtered_resps"][0][0] for sample in found["samples"]["rows"]) / rows.supervised.sum()

    of_rows = f"--data={tiny_inputs / 'eval.jsonl'}"
    folder = lambda name: str(tmp_path / name)
    base, merge = scored(pretrained=folder("model")), scored(pretrained=folder("merge"))
    adapter = scored(pretrained=folder("model"), peft=folder("adapter"))
    assert base == pytest.approx(loss_of(capsys, f"--model={tmp_path / 'model'}", of_rows, *FP32), abs=1e-4)
    assert adapter == pytest.approx(loss_of(capsys, f"--ckpt={run}", *FP32), abs=1e-4)  # over unquantised weights, as PEFT loads them
    assert merge == pytest.approx(loss_of(capsys, f"--ckpt={run}"), abs=1e-4) and abs(base - merge) > 0.3
    assert (abs(adapter - merge) < 1e-4) == (kind == "none")
