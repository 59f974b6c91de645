"""Other kinds of adapters against PEFT's own: DoRA; and what LoRA+ comes to."""
import copy
import dataclasses
import functools
import json

import pytest
import torch
from conftest import make_config, make_model, packed
from safetensors.torch import load_file, save_file

import attention
import config
import data
import eval as evaluation
import export
import lora_layers
import model
import train

TARGETS = list(config.PROJECTIONS)
SHAPES = ["llama", "qwen2", "gemma2"]  # plain, with biases, of another block


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So little work is done sooner by one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm()).item()


def draw(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(3, 320, (length,), generator=generator) for length in lengths]
    return documents, [torch.rand(length, generator=generator) < 0.5 for length in lengths]


def with_peft(network, **settings):
    """PEFT's DoRA around a copy of transformers' `network`."""
    from peft import LoraConfig, get_peft_model
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": TARGETS, "use_dora": True, **settings}
    return get_peft_model(copy.deepcopy(network), LoraConfig(**settings), autocast_adapter_dtype=False)


def name_of(parameter):
    """PEFT's name of a parameter as it is saved."""
    return parameter.replace(".default.weight", ".weight" if "magnitude" not in parameter else "")


def randomise(network, peft, seed=5):
    """Draw every adapter matrix at random and stretch every magnitude, the same in PEFT's model."""
    theirs = {name_of(name): parameter for name, parameter in peft.named_parameters() if "lora_" in name}
    own, generator = lora_layers.adapters(network), torch.Generator().manual_seed(seed)
    assert set(own) == set(theirs)
    with torch.no_grad():
        for name in sorted(own):
            if "magnitude" in name:
                assert relative(own[name], theirs[name]) < 1e-6  # both start from the rows' own lengths
                value = own[name] * (1 + 0.2 * torch.randn(own[name].shape, generator=generator))
            else:
                value = 0.1 * torch.randn(own[name].shape, generator=generator)
            own[name].copy_(value)
            theirs[name].copy_(value)
    return own, theirs


def their_loss(peft, documents, supervised):
    total = 0.0
    for ids, mask in zip(documents, supervised):
        logits = peft(input_ids=ids[None]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits[mask[1:]], ids[1:][mask[1:]], reduction="sum")
    return total


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("variant", ["plain", "rslora", "some targets"])
def test_doras_loss_and_gradients_are_pefts(tmp_path, kind, variant):
    some = ["q_proj", "up_proj"]
    lora, theirs = {"plain": ({}, {}), "rslora": ({"rslora": True}, {"use_rslora": True}),
                    "some targets": ({"targets": some}, {"target_modules": some})}[variant]
    reference = make_model(tmp_path, kind)
    ours, peft = model.load(make_config(tmp_path, lora={"dora": True, **lora}), "cpu"), with_peft(reference, **theirs)
    assert ours.fused_layers == 0 and any("magnitude" in name for name in lora_layers.adapters(ours))
    own, others = randomise(ours, peft)
    documents, supervised = draw((20, 5, 13))
    loss = model.summed_loss(ours, packed(documents, supervised))[0]
    loss.backward()
    wanted = their_loss(peft.train(), documents, supervised)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name in own:
        assert relative(own[name].grad, others[name].grad) < 1e-4, name


def test_untrained_dora_changes_nothing(tmp_path):
    make_model(tmp_path)
    documents, supervised = draw((20, 5))
    settings = [make_config(tmp_path, quant=kind, lora={"dora": dora}) for kind in ("none", "nf4") for dora in (False, True)]
    losses = [model.summed_loss(model.load(each, "cpu"), packed(documents, supervised))[0].item() for each in settings]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[2] == pytest.approx(losses[3], rel=1e-6) and losses[0] != losses[2]


def test_dora_over_nf4_is_pefts_over_the_dequantised_weights(tmp_path):
    reference = make_model(tmp_path)
    ours = model.load(make_config(tmp_path, quant="nf4", lora={"dora": True}), "cpu")
    with torch.no_grad():
        for name, module in ours.named_modules():
            if isinstance(module, lora_layers.AdaptedLinear):
                reference.get_submodule(name).weight.copy_(module.weight.dequantize(torch.float32))
    peft = with_peft(reference)
    randomise(ours, peft)
    documents, supervised = draw((20, 13))
    assert model.summed_loss(ours, packed(documents, supervised))[0].item() == pytest.approx(their_loss(peft, documents, supervised).item(), rel=1e-5)


def test_doras_dropout_is_pefts_draw_for_draw(tmp_path):
    """Of one module alone: in a network others draw in between."""
    reference = make_model(tmp_path)
    ours, peft = model.load(make_config(tmp_path, lora={"dora": True, "dropout": 0.5}), "cpu"), with_peft(reference, lora_dropout=0.5).train()
    randomise(ours, peft)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    outs = []
    for module in (ours.get_submodule("model.layers.1.self_attn.q_proj"), peft.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")):
        torch.manual_seed(3)
        outs.append(module(x))
    assert relative(*outs) < 1e-5 and relative(outs[0], ours.eval().get_submodule("model.layers.1.self_attn.q_proj")(x)) > 0.05


def test_peft_loads_our_dora_and_we_load_pefts(tmp_path):
    from peft import PeftModel
    reference = make_model(tmp_path / "base")
    settings = make_config(tmp_path / "base", lora={"dora": True})
    ours = model.load(settings, "cpu").eval()
    own, _ = randomise(ours, with_peft(reference))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "adapter_config.json").write_text(lora_layers.peft_settings(settings.lora, ours, settings.model.path))
    save_file({name: parameter.detach().clone() for name, parameter in own.items()}, tmp_path / "ours" / "adapter_model.safetensors")
    theirs = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "ours").eval()
    ids = draw((20,))[0][0][None]
    with torch.no_grad(), attention.own_attention(ours):
        assert relative(ours(input_ids=ids).logits, theirs(input_ids=ids).logits) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    lora, tensors, _ = lora_layers.read_adapter(tmp_path / "theirs")
    assert lora.dora and set(tensors) == set(own) and all(torch.equal(tensors[name], own[name]) for name in own)
    again = model.load(make_config(tmp_path / "base", lora=dataclasses.asdict(lora)), "cpu")
    lora_layers.set_adapters(lora_layers.adapters(again), tensors, "theirs")


def run_of(tiny_inputs, folder, **lora):
    tree = {"model": {"path": str(tiny_inputs / "model"), "quant": "nf4", "compute_dtype": "fp32"}, "lora": {"r": 4, "alpha": 8.0, **lora},
            "data": {"train": str(tiny_inputs / "train.jsonl"), "eval": str(tiny_inputs / "eval.jsonl")},
            "train": {"max_steps": 6, "micro_batch_size": 4, "accumulation": 1}, "schedule": {"learning_rate": 2e-2, "lr_warmup_steps": 0},
            "eval": {"samples": 0}, "log": {"tensorboard": False}}
    folder.mkdir()
    (folder / "c.json").write_text(json.dumps(tree))
    assert train.main([str(folder / "c.json"), f"--out={folder / 'run'}"]) == 0
    return folder / "run"


def test_a_dora_run_learns_and_its_merge_and_its_adapter_are_exported_whole(tiny_inputs, tmp_path, capsys):
    run = run_of(tiny_inputs, tmp_path / "p", dora=True)
    losses = [line["eval/loss"] for line in train.record.read_metrics(run) if "eval/loss" in line]
    assert losses[-1] < losses[0] - 0.3
    capsys.readouterr()
    assert evaluation.main([f"--ckpt={run}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert export.main([f"--ckpt={run}", f"--merge={tmp_path / 'merge'}", f"--adapter={tmp_path / 'adapter'}", "--dtype=fp32"]) == 0
    assert "DoRA, rank 4" in (tmp_path / "merge" / "README.md").read_text()
    assert any("magnitude" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_the_gradient_proof_holds_for_dora_with_its_rows_held_and_finds_a_wrong_gradient_all_the_same(tiny_inputs):
    import proof
    settings = make_config(tiny_inputs / "model", lora={"dora": True}, data={"train": str(tiny_inputs / "train.jsonl")})
    network = model.load(settings, "cpu")
    with torch.no_grad():
        for name, parameter in lora_layers.adapters(network).items():
            parameter.mul_(1.1) if "magnitude" in name else parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    rows = data.tokenize(data.read_rows(settings.data.train), data.load_tokenizer(tiny_inputs / "model"), settings.data)
    batches = data.pack(rows, list(range(12)), 2048)

    def forward_backward(batch, weight, wrong=1.0):
        loss = model.summed_loss(network, batch)[0]
        (loss * weight).backward()
        for name, parameter in lora_layers.adapters(network).items():
            parameter.grad.mul_(wrong if "layers.1.mlp" in name else 1.0)
        return loss.detach()

    right, wrong = (proof.check(network, functools.partial(forward_backward, wrong=factor), batches) for factor in (1.0, 2.0))
    assert right.ok is True and wrong.ok is False
    with lora_layers.rows_held(network):
        held = model.summed_loss(network, batches[0])[0].item()
    assert held == pytest.approx(model.summed_loss(network, batches[0])[0].item(), rel=1e-6)  # and let go again after it
    assert all(module.held is None for module in network.modules() if isinstance(module, lora_layers.AdaptedLinear))


def test_merged_dora_is_pefts_merge(tiny_inputs, tmp_path):
    reference = make_model(tmp_path / "model", vocab_size=320)
    import conftest
    conftest.make_tokenizer(tmp_path / "model")
    peft = with_peft(reference)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter * 1.3 if "magnitude" in name else 0.1 * torch.randn(parameter.shape, generator=generator))
    peft.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    peft.save_pretrained(tmp_path / "adapter")
    precise = ["--dtype=fp32", "--model.quant=none", "--model.compute_dtype=fp32", f"--data={tiny_inputs / 'eval.jsonl'}"]
    assert export.main([f"--ckpt={tmp_path / 'adapter'}", f"--merge={tmp_path / 'out'}", *precise]) == 0
    wanted, ours = peft.merge_and_unload().state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    assert max(relative(ours[name], wanted[name]) for name in ours) < 1e-6


def test_starting_from_an_adapter_of_another_kind_is_refused_with_the_setting_it_needs(tiny_inputs, tmp_path):
    adapter = run_of(tiny_inputs, tmp_path / "p", dora=True) / "checkpoints" / "step-000006"
    with pytest.raises(ValueError, match=r"trained with other settings; start from it with --lora\.dora=true"):
        run_of(tiny_inputs, tmp_path / "q", init_from=str(adapter))


@pytest.mark.parametrize("alpha, rslora", [(4.0, False), (8.0, False), (8.0, True)])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loftq_starts_at_pefts_decomposition_of_what_quantisation_changed(tmp_path, kind, alpha, rslora):
    from peft.utils.loftq_utils import _low_rank_decomposition
    reference = make_model(tmp_path)
    started = lambda init: model.load(make_config(tmp_path, quant=kind, lora={"alpha": alpha, "rslora": rslora, "init": init}), "cpu")
    plain, corrected = started("zero"), started("loftq")
    for name, module in corrected.named_modules():
        if isinstance(module, lora_layers.AdaptedLinear):
            weight, quantised = reference.get_submodule(name).weight.detach(), module.weight.dequantize(torch.float32)
            assert torch.equal(quantised, plain.get_submodule(name).weight.dequantize(torch.float32))  # the base stays what it was
            theirs = _low_rank_decomposition(weight - quantised, reduced_rank=4)
            ours = module.scaling * module.lora_B @ module.lora_A
            assert relative(ours, theirs["L"] @ theirs["R"]) < 1e-4
            if alpha == 4.0:  # PEFT does not divide by the scale: its matrices are ours where that is 1, but for signs
                assert relative(module.lora_A.abs(), theirs["R"].abs()) < 1e-3 and relative(module.lora_B.abs(), theirs["L"].abs()) < 1e-3


def test_loftq_brings_the_network_nearer_to_the_unquantised_one(tmp_path):
    make_model(tmp_path)
    documents, supervised = draw((20, 13, 20, 20))
    batch = packed(documents, supervised)
    nll = lambda kind, **lora: model.summed_loss(model.load(make_config(tmp_path, quant=kind, lora=lora), "cpu"), batch)[1]
    exact, zero, small, large = nll("none"), nll("nf4"), nll("nf4", init="loftq"), nll("nf4", init="loftq", r=32, alpha=32.0)
    assert (large - exact).norm() < 0.7 * (zero - exact).norm() and (small - exact).norm() < (zero - exact).norm()


def test_loftq_and_dora_go_together_and_peft_loads_the_run(tiny_inputs, tmp_path, capsys):
    run = run_of(tiny_inputs, tmp_path / "p", dora=True, init="loftq")
    capsys.readouterr()
    assert evaluation.main([f"--ckpt={run}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(train.record.read_metrics(run)[-1]["eval/loss"], rel=1e-6)
    with pytest.raises(ValueError, match="began as a correction of quantisation"):
        export.main([f"--ckpt={run}", f"--merge={tmp_path / 'out'}", "--onto=original"])
    assert export.main([f"--ckpt={run}", f"--merge={tmp_path / 'out'}", "--dtype=fp32"]) == 0
    saved = json.loads((run / "checkpoints" / "step-000006" / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True  # nothing for PEFT to initialise
    with pytest.raises(ValueError, match="did not start at B = 0"):
        evaluation.main([f"--ckpt={run}", "--untrained", "--keep"])


def test_loftq_without_quantisation_beside_an_adapter_or_with_too_large_a_rank_is_refused(tmp_path):
    make_model(tmp_path)
    for sections, said in (({"lora": {"init": "loftq"}}, "nothing is quantised"), ({"lora": {"init": "pissa"}}, "must be one of zero, loftq"),
                           ({"quant": "nf4", "lora": {"init": "loftq", "init_from": "x"}}, "give one of the two")):
        with pytest.raises(ValueError, match=said):
            make_config(tmp_path, **sections)
    with pytest.raises(ValueError, match=r"lora.init: loftq needs a rank of 32 at most for a projection of shape \(32, 64\), lora.r is 40"):
        model.load(make_config(tmp_path, quant="nf4", lora={"init": "loftq", "r": 40}), "cpu")


def test_lora_plus_is_a_larger_alpha(tmp_path):
    """PEFT's LoRA+ with ratio 16 and alpha 8, and LoRA with alpha 128: the same losses step by step, B 16 times smaller.

    Adam's steps do not depend on the size of a gradient, so a rate 16 times higher for B is a scale 16 times larger in front of it.
    """
    from peft.optimizers import create_loraplus_optimizer
    reference = make_model(tmp_path).double()
    documents, supervised = draw((20, 5, 13))
    batch = packed(documents, supervised)
    ours = model.load(make_config(tmp_path, dtype="fp64", lora={"alpha": 128.0}), "cpu")
    peft = with_peft(reference, use_dora=False).double()
    own, others = lora_layers.adapters(ours), {name_of(name): parameter for name, parameter in peft.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name in own:
            others[name].copy_(own[name])
    plus = create_loraplus_optimizer(peft, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, eps=1e-30, weight_decay=0.0)
    plain = torch.optim.AdamW([ours.adapter_memory.flat], lr=1e-3, eps=1e-30, weight_decay=0.0)
    losses = []
    for step in range(6):
        ours.adapter_memory.flat.grad.zero_()
        plus.zero_grad()
        mine, wanted = model.summed_loss(ours, batch)[0], their_loss(peft, documents, supervised)
        losses.append((mine.item(), wanted.item()))
        mine.backward()
        wanted.backward()
        plain.step()
        plus.step()
    assert losses[0][0] - losses[-1][0] > 1 and all(mine == pytest.approx(wanted, rel=1e-6) for mine, wanted in losses)
    for name in own:
        assert relative(own[name] * (16 if "lora_B" in name else 1), others[name]) < 1e-5, name
