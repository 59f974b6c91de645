"""What only a GPU can show: each fast path against its slow twin there, with B drawn at random. Skipped without one.

Also runs where TRITON_INTERPRET=1 lets Triton interpret the kernels on a CPU (the kernel tests alone, in fp32).
"""
import json
import math

import pytest
import torch
from conftest import After, free_port, make_config, make_model, rows_of

import attention
import data
import generation
import gpu_kernels
import graphs
import lora_layers
import model
import proof
import quant
import telemetry

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
kernel = pytest.mark.skipif(not (torch.cuda.is_available() or gpu_kernels.triton and gpu_kernels.INTERPRET),
                            reason="needs a GPU, or Triton with TRITON_INTERPRET=1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if torch.cuda.is_available() else (torch.float32,)
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def distance(ours, reference):
    """||ours - reference|| / ||reference||, in float64."""
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_kernels_equal_their_twins_with_rows_that_lie_apart(dtype):
    h, delta, weight, grad, residual = (draw(37, 96, dtype=dtype), draw(37, 96, dtype=dtype), draw(96, dtype=dtype),
                                        draw(37, 104, dtype=dtype)[:, :96], draw(37, 96, dtype=dtype))
    room = torch.full((37, 104), math.nan, device=DEVICE, dtype=dtype)
    total, rstd = gpu_kernels.add_rms_norm(h, delta, weight, 1e-5, out=room[:, :96])
    x, expected_rstd = gpu_kernels.rms_norm_twin(h + delta, weight, 1e-5)
    assert torch.equal(total, h + delta) and distance(room[:, :96], x) < CLOSE[dtype] and distance(rstd, expected_rstd) < 1e-5
    assert room[:, 96:].isnan().all(), "the columns behind are not the norm's to write"
    assert distance(gpu_kernels.rms_norm_backward(grad, total, weight, rstd, residual, torch.empty_like(total)),
                    gpu_kernels.rms_norm_backward_twin(grad, total, weight, expected_rstd, residual)) < CLOSE[dtype]


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rotation_kernel_equals_its_twin_and_its_inverse_undoes_it(dtype):
    packed, cos, sin = draw(21, 5 * 16 + 8, dtype=dtype), draw(21, 8, dtype=dtype), draw(21, 8, dtype=dtype)
    heads = packed[:, :48].unflatten(1, (3, 16))
    assert distance(gpu_kernels.rotate(heads, cos, sin), gpu_kernels.rotate_twin(heads.float(), cos.float(), sin.float())) < CLOSE[dtype]
    angle = draw(21, 8)
    turned = gpu_kernels.rotate(heads.float(), angle.cos(), angle.sin())
    assert distance(gpu_kernels.rotate(turned, angle.cos(), angle.sin(), inverse=True), heads) < 1e-6
    kept = packed[:, 48:].clone()
    gpu_kernels.rotate(heads, cos, sin, out=heads)
    assert torch.equal(packed[:, 48:], kept), "the values behind the rotated heads stay"


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 20])  # 20: heads whose halves are no power of two
def test_the_kernels_of_normed_heads_equal_their_twins(dtype, d):
    packed, cos, sin, weight = (draw(21, 5 * d + 8, dtype=dtype), draw(21, d // 2, dtype=dtype), draw(21, d // 2, dtype=dtype),
                                draw(d, dtype=dtype))
    heads, grad, room = (packed[:, :3 * d].unflatten(1, (3, d)), draw(21, 3, d, dtype=dtype),
                         torch.full((21, 4 * d), math.nan, device=DEVICE, dtype=dtype))
    out = room[:, :3 * d].unflatten(1, (3, d))
    gpu_kernels.norm_rotate(heads, weight, 1e-5, cos, sin, out=out)
    assert distance(out, gpu_kernels.norm_rotate_twin(heads.double(), weight.double(), 1e-5, cos.double(), sin.double())) < 2 * CLOSE[dtype]
    gpu_kernels.norm_rotate_backward(grad, heads, weight, 1e-5, cos, sin, out=out)
    expected = gpu_kernels.norm_rotate_backward_twin(grad.double(), heads.double(), weight.double(), 1e-5, cos.double(), sin.double())
    assert distance(out, expected) < 2 * CLOSE[dtype] and room[:, 3 * d:].isnan().all()
    x = heads.double().cpu().requires_grad_()
    gpu_kernels.norm_rotate_twin(x, weight.double().cpu(), 1e-5, cos.double().cpu(), sin.double().cpu()).backward(grad.double().cpu())
    assert distance(expected.cpu(), x.grad) < 1e-12, "the twin's backward pass is the derivative of its forward pass"
    assert distance(gpu_kernels.rotate(heads, cos, sin), gpu_kernels.rotate_twin(heads.float(), cos.float(), sin.float())) < CLOSE[dtype]


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_kernels_equal_their_twins(dtype):
    gate_up, room, grad = draw(9, 2 * 1100, dtype=dtype), torch.zeros(9, 1104, device=DEVICE, dtype=dtype), draw(9, 1104, dtype=dtype)
    gpu_kernels.swiglu(gate_up, out=room[:, :1100])
    assert distance(room[:, :1100], gpu_kernels.swiglu_twin(gate_up)) < CLOSE[dtype] and not room[:, 1100:].any()
    expected, act = gpu_kernels.swiglu_backward_twin(grad[:, :1100].clone(), gate_up)
    ours = torch.empty(len(gate_up), 2 * 1100 + 64, device=DEVICE, dtype=gate_up.dtype)[:, :2 * 1100]
    ours_act = gpu_kernels.swiglu_backward(grad[:, :1100], gate_up, ours)
    assert distance(ours, expected) < CLOSE[dtype] and distance(ours_act, act) < CLOSE[dtype]


@kernel
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cross_entropy_kernel_equals_torch(dtype, softcap):
    logits, targets = draw(11, 5003, dtype=dtype) * 2, torch.randint(0, 5003, (11,), device=DEVICE)
    targets[3] = -100
    exact = logits.double().requires_grad_()
    capped = torch.tanh(exact / softcap) * softcap if softcap else exact
    loss = torch.nn.functional.cross_entropy(capped, targets, reduction="sum", ignore_index=-100)
    loss.backward()
    nll, correct = gpu_kernels.cross_entropy(logits, targets, softcap, with_grad=True)
    assert nll.sum().item() == pytest.approx(loss.item(), rel=1e-5) and nll[3] == 0
    assert torch.equal(correct, capped.argmax(-1) == targets) and distance(logits, exact.grad) < CLOSE[dtype]
    assert not logits[3].any(), "a position without a target moves nothing"


@kernel
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_nf4_kernel_equals_the_formula_and_bitsandbytes(double_quant):
    weight = quant.NF4Weight(draw(130, 192), double_quant)
    room = torch.zeros(130, 200, device=DEVICE)
    gpu_kernels.nf4_dequantize(weight, quant.nf4_codebook(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")),
                               room[:, :192])
    assert (distance(room[:, :192], quant.nf4_dequantize(weight.packed, weight.block_scales(), (130, 192))) < 1e-6
            and not room[:, 192:].any())
    reference = torch.ops.bitsandbytes.dequantize_4bit(weight.packed, weight.block_scales(), 64, "nf4", (130, 192), torch.float32)
    assert distance(room[:, :192], reference) < 1e-6


@kernel
def test_the_int8_kernel_equals_the_formula():
    weight, room = quant.Int8Weight(draw(130, 192)), torch.zeros(130, 200, device=DEVICE)
    gpu_kernels.int8_dequantize(weight.q, weight.scale, room[:, :192])
    assert torch.equal(room[:, :192], weight.q * weight.scale[:, None]) and not room[:, 192:].any()


@gpu
@pytest.mark.parametrize("outliers", [[], [0, 17, 191]])
def test_llm_int8_on_a_gpu_masks_small_products_and_gathers_large_ones(monkeypatch, outliers):
    weight = quant.LLMInt8Weight(draw(130, 192).to("cuda", torch.bfloat16), 6.0)
    x = draw(40, 192).to("cuda", torch.bfloat16)
    x[3, outliers] = 20.0
    torch.cuda.synchronize()
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")  # raises where the host waits
        try:
            masked = weight.matmul(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(quant, "MASKED", 0)
    gathered = weight.matmul(x)
    assert distance(masked, gathered) < 2 * torch.finfo(torch.bfloat16).eps
    assert distance(masked, x.float() @ weight.dequantize(torch.float32).T) < 0.02


def gradients(network, batches, forward=None):
    """(summed loss, flat gradient) of micro-batches, through `forward(batch, weight)` or eagerly."""
    flat, weight, total = network.adapter_memory.flat, torch.tensor(0.01, device=network.device), 0.0
    flat.grad.zero_()
    for batch in batches:
        if forward:
            total += forward(batch, weight).item()
        else:
            loss = model.summed_loss(network, batch.to(network.device))[0]
            (loss * weight).backward()
            total += loss.item()
    return total, flat.grad.clone()


def random_b(network):
    with torch.no_grad():
        for name, parameter in lora_layers.adapters(network).items():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return network


RAGGED = [3, 40, 17, 64, 9, 2, 31]


@gpu
@pytest.mark.parametrize("kept", ["yes", "no"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_fused_layers_on_a_gpu_equal_plain_ones(tmp_path, architecture, kind, kept):
    make_model(tmp_path, architecture, num_hidden_layers=3)
    results = {}
    for dtype in ("fp32", "bf16"):
        for fused in (True, False):
            network = random_b(model.load(make_config(tmp_path, kind, dtype, memory={"fused": fused, "keep_dequantized": kept}), "cuda"))
            assert network.fused_layers == (3 if fused else 0)
            loss, gradient = gradients(network, data.pack(rows_of(RAGGED), list(range(7)), 128))
            results[dtype, fused] = loss, {name: p.grad.clone() for name, p in lora_layers.adapters(network).items()}
    exact_loss, exact = results["fp32", False]
    assert (results["fp32", True][0] == pytest.approx(exact_loss, rel=1e-5)
            and results["bf16", True][0] == pytest.approx(results["bf16", False][0], rel=1e-2))
    for name, gradient in exact.items():
        assert distance(results["fp32", True][1][name], gradient) < 1e-5, name
        cosine = lambda which: torch.cosine_similarity(results["bf16", which][1][name].flatten(), gradient.flatten(), dim=0).item()
        assert cosine(True) > min(0.999, cosine(False) - 1e-3), (
            f"{name}: {cosine(True)} fused, {cosine(False)} plain, both in bf16 beside fp32")


@gpu
@pytest.mark.parametrize("lengths", [RAGGED, [32] * 4])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_varlen_and_batched_attention_equal_attention_by_documents(tmp_path, architecture, lengths):
    make_model(tmp_path, architecture)
    losses, grads = {}, {}
    for attention in ("varlen", "documents"):
        network = random_b(model.load(make_config(tmp_path, "none", "bf16", model={"attention": attention}), "cuda"))
        losses[attention], grads[attention] = gradients(network, data.pack(rows_of(lengths), list(range(len(lengths))), 256))
    assert losses["varlen"] == pytest.approx(losses["documents"], rel=3e-3)
    assert torch.cosine_similarity(grads["varlen"], grads["documents"], dim=0) > 0.999


@gpu
def test_neighbours_do_not_move_a_document_through_varlen_attention(tmp_path):
    make_model(tmp_path, "llama")
    network = model.load(make_config(tmp_path, "nf4", "bf16"), "cuda")
    rows = rows_of(RAGGED)
    batch, = data.pack(rows, list(range(7)), 256)
    first = model.summed_loss(network, batch.to("cuda"))[1]
    batch.input_ids[:int(batch.cu_seqlens[1])] = 7  # another first document
    second = model.summed_loss(network, batch.to("cuda"))[1]
    others = (batch.document > 0).to("cuda")
    assert torch.equal(first[others], second[others]) and not torch.equal(first[~others], second[~others])


@gpu
@pytest.mark.parametrize("architecture, kind, fused", [
    ("llama", "nf4", True), ("llama", "int8", True), ("llama", "none", True), ("llama", "llm_int8", True), ("llama", "nf4", False),
    ("mistral", "nf4", True), ("qwen3", "int8", False), ("gemma3_text", "nf4", True)])
def test_replayed_graphs_give_the_gradients_of_the_eager_pass(tmp_path, architecture, kind, fused):
    make_model(tmp_path, architecture, num_hidden_layers=3)
    network = random_b(model.load(make_config(tmp_path, kind, "bf16", memory={"fused": fused}), "cuda"))
    assert network.fused_layers == (3 if fused and kind != "llm_int8" and architecture != "gemma3_text" else 0)

    def eager(batch, weight):
        loss = model.summed_loss(network, batch.to("cuda"))[0]
        (loss * weight).backward()
        return loss.detach()

    assert not graphs.serves(network, 0)
    replayed = graphs.Replayed(network, eager)
    for seed in range(6):  # the same bucket again and again, with other documents in it
        lengths = [10 + (seed * 7 + i * 5) % 40 for i in range(6)]
        batches = data.pack(rows_of(lengths, seed), list(range(6)), 512)
        loss, expected = gradients(network, batches)
        again, gradient = gradients(network, batches, replayed)
        assert again == pytest.approx(loss, rel=1e-3) and gradient.isfinite().all()
        assert torch.cosine_similarity(gradient, expected, dim=0) > 0.9995
        assert gradient.norm().item() == pytest.approx(expected.norm().item(), rel=1e-2)
    assert 1 <= len(replayed.graphs) < 6


@gpu
def test_dropout_draws_anew_at_every_replay(tmp_path):
    make_model(tmp_path, "llama")
    network = random_b(model.load(make_config(tmp_path, "nf4", "bf16", lora={"dropout": 0.3}), "cuda"))

    def eager(batch, weight):
        loss = model.summed_loss(network, batch.to("cuda"))[0]
        (loss * weight).backward()
        return loss.detach()

    replayed = graphs.Replayed(network, eager)
    batches = data.pack(rows_of(RAGGED), list(range(7)), 512)
    losses = [gradients(network, batches, replayed)[0] for _ in range(5)]
    assert len(set(losses)) == 5 and len(replayed.graphs) == 1


def continued(network, write, count=24):
    """What `write` of generation.py makes of a few prompts of different lengths: lists of ids, cut behind the first end, which is 2."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt in PROMPTS], device="cuda")
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS], device="cuda")
    with attention.own_attention(network):
        rows = write(network.eval(), ids, mask, count, [2])
    network.train()
    assert len(rows) == len(PROMPTS) and all(len(row) <= count for row in rows)
    return [row[:row.index(2) + 1] if 2 in row else row for row in rows]


PROMPTS = [[5], [9, 4, 30], [7] * 70, [1, 7, 7, 7, 4, 8, 9, 10, 11, 12, 13, 14], [17, 3, 3, 8]]


@torch.no_grad()
def shortfall(network, rows):
    """By how much a token of `rows` misses the largest logit of its place at most, as a share of the logits' spread: 0 where all are
    greedy."""
    worst = 0.0
    with attention.own_attention(network):
        for prompt, row in zip(PROMPTS, rows):
            logits = network.eval()(input_ids=torch.tensor([prompt + row], device="cuda")).logits[0, len(prompt) - 1:-1].float()
            chosen = logits.gather(1, torch.tensor(row, device="cuda")[:, None])[:, 0]
            worst = max(worst, ((logits.amax(1) - chosen) / (logits.amax(1) - logits.amin(1))).max().item())
    network.train()
    return worst


@gpu
@pytest.mark.parametrize("architecture, kind, sections", [
    ("llama", "nf4", {}), ("llama", "nf4", {"memory": {"keep_dequantized": "no"}}),
    ("llama", "int8", {"memory": {"keep_dequantized": "no"}}),
    ("llama", "none", {"lora": {"dora": True}}), ("qwen2", "nf4", {}), ("qwen3", "none", {})])
def test_replayed_samples_are_those_of_transformers_own_loop(tmp_path, architecture, kind, sections):
    make_model(tmp_path, architecture, num_hidden_layers=3, initializer_range=0.1)
    network = random_b(model.load(make_config(tmp_path, kind, "fp32", **sections), "cuda"))
    assert not generation.serves(network, 4)
    expected = continued(network, generation.by_transformers)
    for count in (24, 24, 9, 2, 1):
        assert continued(network, generation.replayed, count) == [row[:count] for row in expected]
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


@gpu
@pytest.mark.parametrize("kind, dtype, sections", [
    ("nf4", "bf16", {}), ("nf4", "fp16", {"memory": {"keep_dequantized": "no"}}), ("int8", "bf16", {}),
    ("none", "bf16", {"lora": {"dora": True}})])
def test_replayed_samples_are_greedy_in_16_bits(tmp_path, kind, dtype, sections):
    """To within rounding: where two tokens are about as likely, either loop may take the other one."""
    make_model(tmp_path, "llama", num_hidden_layers=3, initializer_range=0.1)
    network = random_b(model.load(make_config(tmp_path, kind, dtype, **sections), "cuda"))
    rows = continued(network, generation.replayed)
    misses = {write.__name__: shortfall(network, continued(network, write)) for write in (generation.by_transformers, generation.replayed)}
    print(kind, dtype, misses, "same rows", sum(a == b for a, b in zip(rows, continued(network, generation.by_transformers))),
          "of", len(rows))
    assert max(misses.values()) < 0.02 and shortfall(network, [[3] * len(row) for row in rows]) > 0.1


@gpu
def test_samples_are_the_changed_adapters_and_leave_training_and_its_graphs_alone(tmp_path):
    make_model(tmp_path, "llama", num_hidden_layers=3, initializer_range=0.1)
    network, forward_backward, batches = provable(tmp_path, replayed=True)
    flat = network.adapter_memory.flat
    expected = [gradients(network, batches, forward_backward)[1] for _ in range(2)][1]  # recorded, then replayed
    everything = lambda: [flat.detach().clone(), flat.grad.clone(), torch.get_rng_state(), torch.cuda.get_rng_state()]
    before = everything()
    first = continued(network, generation.replayed)
    assert all(torch.equal(a, b) for a, b in zip(before, everything())) and forward_backward.graphs
    again = gradients(network, batches, forward_backward)[1]
    assert torch.cosine_similarity(again, expected, dim=0) > 0.9999
    with torch.no_grad():
        old = flat.clone()
        flat.add_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(3)).to("cuda"), alpha=0.1)
    second = continued(network, generation.replayed)
    assert first != second and shortfall(network, second) < 0.02 < shortfall(network, first)
    with torch.no_grad():
        flat.copy_(old)
    assert shortfall(network, continued(network, generation.replayed)) < 0.02 < shortfall(network, second)
    again = gradients(network, batches, forward_backward)[1]
    assert torch.cosine_similarity(again, expected, dim=0) > 0.9999


@gpu
def test_the_memory_of_recorded_samples_is_given_back(tmp_path):
    make_model(tmp_path, "llama", num_hidden_layers=3)
    network = random_b(model.load(make_config(tmp_path, "nf4", "bf16"), "cuda"))
    held = []
    for _ in range(4):
        continued(network, generation.replayed)
        model.release_memory()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[3] == held[2] == held[1], held


@gpu
def test_an_evaluation_replays_its_samples_and_is_interrupted_between_them(tmp_path, monkeypatch):
    import types
    import eval as evaluation
    make_model(tmp_path, "llama", num_hidden_layers=3, initializer_range=0.1)
    network = random_b(model.load(make_config(tmp_path, "nf4", "bf16", lora={"dropout": 0.3}), "cuda"))
    letters = types.SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    asked = [{"prompt": "", "reference": "", "ids": ids} for ids in PROMPTS]
    monkeypatch.setattr(network, "generate", lambda **_: pytest.fail("transformers' loop ran"))
    samples, again = (evaluation.generate(network, letters, asked, 24, [2]) for _ in range(2))
    assert samples == again and network.training and network.config._attn_implementation == attention.ATTENTION

    assert evaluation.generate(network, letters, asked, 200, [2], After(2)) is None and network.training
    assert evaluation.generate(network, letters, asked, 24, [2]) == samples
    eight_bits = model.load(make_config(tmp_path, "llm_int8", "bf16"), "cuda")
    assert not generation.serves(eight_bits, 4)
    monkeypatch.setattr(quant, "MASKED", 0)
    assert "LLM.int8()" in generation.serves(eight_bits, 4)


@gpu
def test_samples_that_do_not_fit_while_they_are_recorded_are_written_in_halves(tmp_path, monkeypatch):
    import types
    import eval as evaluation
    make_model(tmp_path, "llama", num_hidden_layers=3, initializer_range=0.1)
    network = random_b(model.load(make_config(tmp_path, "nf4", "fp32"), "cuda"))
    letters = types.SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    asked = [{"prompt": "", "reference": "", "ids": ids} for ids in PROMPTS]
    expected, hungry = evaluation.generate(network, letters, asked, 24, [2]), []

    def lacking(module, arguments):
        if torch.cuda.is_current_stream_capturing() and not hungry:
            hungry.append(1)
            torch.empty(1 << 60, dtype=torch.uint8, device="cuda")

    hook = network.get_output_embeddings().register_forward_pre_hook(lacking)
    assert evaluation.generate(network, letters, asked, 24, [2]) == expected and hungry
    hook.remove()


@gpu
def test_padding_to_a_bucket_adds_nothing():
    batch, = data.pack(rows_of(RAGGED), list(range(7)), 512)
    fields = graphs.padded(batch, 192, 128, 32, 64)
    assert [len(fields[name]) for name in ("input_ids", "rows", "cu_seqlens")] == [192, 128, 33]
    assert fields["cu_seqlens"][-1] == 192 and (fields["cu_seqlens"].diff() >= 0).all() and fields["cu_seqlens"].diff().max() <= 64
    assert (fields["targets"][len(batch.targets):] == -100).all()


@gpu
@pytest.mark.parametrize("kind, options", [
    ("nf4", ()), ("llm_int8", ("--lora.dropout=0.1",)), ("nf4", ("--memory.checkpoint_layers=2", "--lora.dropout=0.1")),
    ("int8", ("--model.compute_dtype=fp16",))])
def test_a_run_on_a_gpu_learns_and_goes_on_after_a_stop(tiny_inputs, tmp_path, kind, options):
    import train
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({}))
    where = [f"--model.path={tiny_inputs / 'model'}", f"--data.train={tiny_inputs / 'train.jsonl'}",
             f"--data.eval={tiny_inputs / 'eval.jsonl'}"]
    common = [str(settings), f"--out={tmp_path / 'run'}", *where, f"--model.quant={kind}", "--train.micro_batch_size=4",
              "--train.accumulation=2", "--schedule.learning_rate=3e-3", "--schedule.lr_min=1e-4", "--schedule.lr_warmup_steps=2",
              "--data.audit=off", "--eval.every_steps=10", "--eval.samples=2", "--eval.max_new_tokens=4", "--save.every_steps=10",
              *options]
    assert train.main([*common, "--train.max_steps=20"]) == 0
    import record
    losses = [line["train/loss"] for line in record.read_metrics(tmp_path / "run") if "train/loss" in line]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5]) - 0.5
    assert train.main([*common, "--train.max_steps=30", "--resume", "--accept=train.max_steps"]) == 0
    assert [line["step"] for line in record.read_metrics(tmp_path / "run")] == list(range(31))


class Exchanging(int):
    """A number of ranks for which all is exchanged even where it is one: NCCL takes one process a GPU, and the GPU at hand may be one."""
    __hash__ = int.__hash__
    __gt__ = lambda self, other: True
    __eq__ = lambda self, other: False
    __ne__ = lambda self, other: True


@pytest.mark.parametrize("options", [[], ["--memory.shard=true"],
                                     ["--memory.shard=true", "--model.quant=int8", "--memory.checkpoint_layers=1"]],
                         ids=["replicated", "sharded", "sharded int8, recomputed"])
def test_one_rank_that_exchanges_all_through_torch_distributed_trains_as_one_alone(tiny_inputs, tmp_path, monkeypatch, options):
    """Over NCCL on a GPU, over gloo elsewhere. Losses in fp32; sharded weights are gathered, and other kernels run on them."""
    import ranks
    import record
    import train
    exact = ["--model.compute_dtype=fp32", "--lora.dropout=0"]
    assert train.main([*tiny_run(tiny_inputs, tmp_path, "alone"), *exact, *[option for option in options if "shard" not in option]]) == 0
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(ranks, "RANKS", Exchanging(1))
    sent, real = [], torch.distributed.all_reduce
    monkeypatch.setattr(torch.distributed, "all_reduce",
                        lambda tensor, *rest, **named: (sent.append(tensor.device.type), real(tensor, *rest, **named))[1])
    try:
        assert train.main([*tiny_run(tiny_inputs, tmp_path, "exchanging", *exact, *options)]) == 0
    finally:
        ranks.finish()
    assert DEVICE in sent and "cpu" in sent
    ours, alone = ([line for line in record.read_metrics(tmp_path / name) if "train/loss" in line] for name in ("exchanging", "alone"))
    assert len(ours) == len(alone) == 16
    for tag in ("train/loss", "train/grad_norm"):
        assert [line[tag] for line in ours] == pytest.approx([line[tag] for line in alone], rel=1e-4)


class Killed(BaseException):
    pass


def tiny_run(tiny_inputs, tmp_path, name, *options):
    """train.main's arguments for a run of 16 steps in tmp_path/name."""
    from conftest import settings_of
    return [str(settings_of(tiny_inputs, tmp_path / "tiny.json")), f"--out={tmp_path / name}", "--train.max_steps=16",
            "--save.every_steps=4", "--train.accumulation=4", *options]


@gpu
@pytest.mark.parametrize("options", [
    ("--model.quant=nf4", "--lora.dropout=0.1"),
    ("--model.quant=int8", "--lora.dropout=0.1", "--memory.checkpoint_layers=1", "--schedule.clip_percentile=40"),
    ("--model.quant=none", "--model.compute_dtype=fp32"), ("--model.quant=llm_int8", "--lora.dropout=0.1"),
    ("--model.quant=nf4", "--model.compute_dtype=fp16"),
], ids=lambda options: options[0][14:])
def test_a_deterministic_run_that_was_killed_has_the_same_curve_bit_for_bit(tiny_inputs, tmp_path, monkeypatch, options):
    import gc
    from conftest import differences
    import train
    options = [*options, "--train.deterministic=true"]
    try:
        assert train.main(tiny_run(tiny_inputs, tmp_path, "whole", *options)) == 0
        for begin in (40, 48, 90):
            real = data.sample_stream

            def stream(rows, seed, start, count):
                if start >= begin:
                    raise Killed
                return real(rows, seed, start, count)

            monkeypatch.setattr(data, "sample_stream", stream)
            with pytest.raises(Killed):
                train.main(tiny_run(tiny_inputs, tmp_path, "run", *options, *["--resume"] * (begin > 40)))
            monkeypatch.undo()
            gc.collect()  # frees the lock, as the end of a process would
        assert train.main(tiny_run(tiny_inputs, tmp_path, "run", *options, "--resume")) == 0
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_mem_efficient_sdp(True)
    assert differences(tmp_path / "run", tmp_path / "whole") == []


@gpu
def test_a_process_killed_on_a_gpu_goes_on_to_the_same_end(tiny_inputs, tmp_path):
    import pathlib
    import subprocess
    import sys
    import time
    from conftest import PROJECT, differences
    options = ["--train.deterministic=true", "--lora.dropout=0.1"]

    def command(name, *more):
        arguments = tiny_run(tiny_inputs, tmp_path, name, *options, *more)
        return [sys.executable, str(PROJECT / "train.py"), *[argument.replace("max_steps=16", "max_steps=400") for argument in arguments]]

    subprocess.run(command("whole"), check=True, capture_output=True)
    process, record = subprocess.Popen(command("run"), stdout=subprocess.DEVNULL), pathlib.Path(tmp_path / "run/metrics.jsonl")
    while not record.exists() or record.read_bytes().count(b"\n") < 150:
        time.sleep(0.01)
        assert process.poll() is None, "ended before it could be killed"
    process.kill()
    process.wait()
    subprocess.run(command("run", "--resume"), check=True, capture_output=True)
    assert differences(tmp_path / "run", tmp_path / "whole") == []


@gpu
@pytest.mark.parametrize("options, tolerance", [(("--model.quant=none", "--model.compute_dtype=fp32"), 1e-4),
                                                (("--model.quant=nf4",), 3e-2)], ids=["fp32", "nf4 with graphs"])
def test_where_a_gpus_memory_runs_out_the_window_is_done_again_in_smaller_pieces(tiny_inputs, tmp_path, monkeypatch, options, tolerance):
    import record
    import train
    assert train.main(tiny_run(tiny_inputs, tmp_path, "whole", *options, "--memory.max_tokens=128")) == 0
    real, state = graphs.Replayed.__call__ if "nf4" in options[0] else model.summed_loss, {"armed": False}
    stream = data.sample_stream

    def lacking(*given):
        if state["armed"]:
            state["armed"] = False
            torch.empty(1 << 46, dtype=torch.uint8, device="cuda")
        return real(*given)

    def arm(rows, seed, start, count):
        state["armed"] = start == 32
        return stream(rows, seed, start, count)

    monkeypatch.setattr(data, "sample_stream", arm)
    monkeypatch.setattr(*((graphs.Replayed, "__call__") if "nf4" in options[0] else (model, "summed_loss")), lacking)
    assert train.main(tiny_run(tiny_inputs, tmp_path, "run", *options, "--memory.max_tokens=128")) == 0
    ours, theirs = ([line["train/loss"] for line in record.read_metrics(tmp_path / name) if "train/loss" in line]
                    for name in ("run", "whole"))
    assert ours == pytest.approx(theirs, rel=tolerance)
    import checkpoint
    plan = checkpoint.load(checkpoint.newest_valid(tmp_path / "run")[0])["state"]["plan"]
    assert [shrunk["step"] for shrunk in plan["shrunk"]] == [5] and plan["fits"] < 128


@gpu
def test_what_does_not_fit_on_a_gpu_is_told_before_step_1_with_the_longest_row(tiny_inputs, tmp_path, monkeypatch):
    import train
    rows = (tiny_inputs / "train.jsonl").read_text().splitlines()
    rows[16] = json.dumps({"messages": [{"role": "user", "content": "?" * 120}, {"role": "assistant", "content": "long " * 15}]})
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    real = model.summed_loss

    def lacking(network, batch):
        if len(batch.input_ids) > 150:
            torch.empty(1 << 46, dtype=torch.uint8, device="cuda")
        return real(network, batch)

    monkeypatch.setattr(model, "summed_loss", lacking)
    with pytest.raises(ValueError, match=r"the longest row, .*rows.jsonl:17, has 2\d\d tokens"):
        train.main(tiny_run(tiny_inputs, tmp_path, "run", f"--data.train={tmp_path / 'rows.jsonl'}", "--memory.max_tokens=96",
                            "--memory.checkpoint_layers=0"))
    assert not (tmp_path / "run").exists()


@gpu
@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_dora_on_a_gpu_is_dora_on_a_cpu_and_no_graphs_are_made_of_it(tmp_path, kind):
    make_model(tmp_path, "llama")
    settings, results = make_config(tmp_path, kind, "fp32", {"dora": True}), {}
    for device in ("cpu", "cuda"):
        network = random_b(model.load(settings, device))
        assert network.fused_layers == 0 and (device == "cpu" or "DoRA" in graphs.serves(network, 0) or not network.use_varlen)
        with torch.no_grad():
            for name, parameter in lora_layers.adapters(network).items():
                if "magnitude" in name:
                    parameter.mul_(1.2)
        loss, _ = gradients(network, data.pack(rows_of(RAGGED), list(range(7)), 256))
        results[device] = loss, {name: parameter.grad.cpu() for name, parameter in lora_layers.adapters(network).items()}
    assert results["cuda"][0] == pytest.approx(results["cpu"][0], rel=1e-4)
    for name, gradient in results["cpu"][1].items():
        assert distance(results["cuda"][1][name], gradient) < 1e-3, name


@gpu
def test_loftqs_start_is_the_same_on_a_gpu(tmp_path):
    make_model(tmp_path, "llama")
    settings = make_config(tmp_path, "nf4", "fp32", {"init": "loftq"})
    for ours, reference in zip(model.load(settings, "cuda").modules(), model.load(settings, "cpu").modules()):
        if isinstance(ours, lora_layers.AdaptedLinear):
            assert distance((ours.lora_B @ ours.lora_A).cpu(), reference.lora_B @ reference.lora_A) < 1e-2


@gpu
def test_a_run_is_exported_from_a_gpu(tiny_inputs, tmp_path):
    from transformers import AutoModelForCausalLM

    import export
    import train
    from conftest import settings_of
    assert train.main([str(settings_of(tiny_inputs, tmp_path / "c.json")), f"--out={tmp_path / 'run'}"]) == 0
    assert export.main([f"--ckpt={tmp_path / 'run'}", f"--merge={tmp_path / 'merge'}"]) == 0
    assert export.main([f"--ckpt={tmp_path / 'run'}", f"--gguf={tmp_path / 'out.gguf'}", "--dtype=q8_0"]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "merge")


def provable(folder, kind="nf4", dtype="bf16", replayed=False, **sections):
    """(network, forward_backward as train.py has it, micro-batches), with B at random."""
    network = random_b(model.load(make_config(folder, kind, dtype, **sections), "cuda"))

    def forward_backward(batch, weight):
        loss = model.summed_loss(network, batch.to("cuda"))[0]
        (loss * weight).backward()
        return loss.detach()

    batches = proof.sample(make_config("x"), rows_of([30] * 40, supervised_share=0.9), range(40), "cuda")
    return network, graphs.Replayed(network, forward_backward) if replayed else forward_backward, batches


@gpu
@pytest.mark.parametrize("kind, dtype", [("nf4", "bf16"), ("int8", "bf16"), ("llm_int8", "bf16"), ("none", "bf16"),
                                         ("nf4", "fp16"), ("nf4", "fp32")])
def test_healthy_gradients_are_proved_on_a_gpu(tmp_path, kind, dtype):
    make_model(tmp_path, "llama", initializer_range=0.05)
    network, forward_backward, batches = provable(tmp_path, kind, dtype)
    result = proof.check(network, forward_backward, batches, 1024.0 if dtype == "fp16" else 1.0, "parts")
    assert result.ok and abs(result.ratio - 1) < 0.1, result
    print(kind, dtype, result)


@gpu
def test_replayed_gradients_are_proved_and_all_is_as_it_was(tmp_path):
    make_model(tmp_path, "llama", initializer_range=0.05)
    network, forward_backward, batches = provable(tmp_path, replayed=True)
    memory = network.adapter_memory
    memory.refresh()
    everything = lambda: [memory.flat.detach().clone(), memory.flat.grad.clone(), memory.working.clone(), torch.get_rng_state(),
                          torch.cuda.get_rng_state()]
    before = everything()
    result = proof.check(network, forward_backward, batches, 1.0, "even")
    assert result.ok and forward_backward.graphs, result
    assert all(torch.equal(a, b) for a, b in zip(before, everything()))
    for _ in range(2):  # what was recorded is still right
        again = [gradients(network, batches, forward)[1] for forward in (forward_backward, None)]
        assert torch.cosine_similarity(*again, dim=0) > 0.999


@gpu
@pytest.mark.parametrize("kind, dtype", [("nf4", "bf16"), ("int8", "fp16"), ("none", "bf16")])
def test_losses_by_a_graph_are_those_of_the_passes_it_replays(tmp_path, kind, dtype):
    make_model(tmp_path, "llama", initializer_range=0.05)
    network, _, batches = provable(tmp_path, kind, dtype)
    flat, supervised = network.adapter_memory.flat, sum(len(batch.targets) for batch in batches)
    measured = [proof.Measurement(network, batches, supervised, flat.detach().clone(), None, None, replayed=replayed)
                for replayed in (False, True)]
    seen = set()
    for factor in (1.0, 3.0, 0.5):
        with torch.no_grad():
            flat.mul_(factor)
        eager, replayed = (one.loss_now() for one in measured)
        assert eager == replayed
        seen.add(eager)
    assert len(seen) == 3


@gpu
def test_a_replayed_graph_of_old_weights_is_found(tmp_path):
    make_model(tmp_path, "llama", initializer_range=0.05)
    network, forward_backward, batches = provable(tmp_path, replayed=True)
    memory = network.adapter_memory
    real, memory.refresh = memory.refresh, lambda: None  # recorded without bringing the working copy up to date
    real()
    for batch in batches:
        forward_backward(batch, torch.tensor(1.0, device="cuda"))
    memory.refresh = real
    old = memory.working.clone()
    with torch.no_grad():
        memory.flat.mul_(3)

    class Stale:
        eager = forward_backward.eager

        def __call__(self, batch, weight):
            memory.working.copy_(old)
            if memory.kept:
                memory.kept.refresh()
            return forward_backward(batch, weight)

    result = proof.check(network, Stale(), batches, 1.0, "whole")
    assert result.ok is False, result


@gpu
def test_doubled_gradients_are_wrong_on_a_gpu_and_masks_of_dropout_are_held_fixed(tmp_path):
    make_model(tmp_path, "llama", initializer_range=0.05)
    network, forward_backward, batches = provable(tmp_path, lora={"dropout": 0.2}, replayed=True)
    assert proof.check(network, forward_backward, batches, 1.0, "whole").ok
    doubled = proof.check(network, lambda batch, weight: forward_backward.eager(batch, weight * 2), batches, 1.0, "whole")
    assert doubled.ok is False and abs(doubled.ratio - 0.5) < 0.05, doubled


@gpu
@pytest.mark.parametrize("kind", ["nf4", "int8", "llm_int8"])
def test_figures_of_adapters_are_the_same_on_a_gpu(tmp_path, kind):
    make_model(tmp_path, "llama")
    tables = []
    for device in ("cpu", "cuda"):
        network = random_b(model.load(make_config(tmp_path, kind, "bf16"), device))
        tables.append(json.loads(telemetry.adapters(network, telemetry.measure_weights(network))["adapters/modules"]))
    for name, row in tables[0].items():
        assert tables[1][name] == pytest.approx(row, rel=1e-2), name
    noise = telemetry.NoiseScale()
    noise.observe(telemetry.PAIR_AT, torch.ones(9, device="cuda"), torch.tensor(2.0, device="cuda"), 8)
    assert noise.observe(telemetry.PAIR_AT + 1, torch.ones(9, device="cuda"), torch.tensor(2.0, device="cuda"),
                         8).tolist() == pytest.approx([2.25, 2.25, 2.25, 8, 8])
