"""Telemetry: figures of the adapters against plain formulas, and the noise scale against noise that is known."""
import json
import math

import pytest
import torch
from conftest import make_config, make_model

import lora_layers
import model
import quant
import telemetry


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(path)
    return path


def loaded(folder, kind, fast=True, b=0.02, dtype="bf16"):
    network = model.load(make_config(folder, kind, dtype, lora={"rslora": True}, memory={"fused": fast}), "cpu")
    with torch.no_grad():
        for i, (name, parameter) in enumerate(lora_layers.adapters(network).items()):
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * b)
    return network


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", ["none", "nf4", "int8", "llm_int8"])
def test_figures_of_each_module_equal_those_of_the_whole_matrices(folder, kind, fast):
    network = loaded(folder, kind, fast)
    values = telemetry.adapters(network, telemetry.measure_weights(network))
    table = json.loads(values["adapters/modules"])
    modules = telemetry.adapted(network)
    assert list(table) == list(modules) and "model.layers.1.mlp.down_proj" in table
    for name, (ratio, rank, step) in table.items():
        module = modules[name]
        W, dW = module.weight.dequantize(torch.bfloat16).double(), module.scaling * (module.lora_B.double() @ module.lora_A.double())
        singular = torch.linalg.svdvals(dW)[:module.r]
        share = singular / singular.sum()
        assert ratio == pytest.approx((dW.norm() / W.norm()).item(), rel=1e-3)
        assert rank == pytest.approx(math.exp(-(share * share.log()).sum().item()), rel=1e-3)
        assert (step is None) == (kind == "none")
        if step:
            assert step == pytest.approx(dW.square().mean().sqrt().item() / grid_step(module.weight), rel=1e-2)
    assert values["adapters/delta_ratio"] == pytest.approx(sum(row[0] for row in table.values()) / len(table), rel=1e-3)
    assert values["adapters/delta_ratio_max"] == pytest.approx(max(row[0] for row in table.values()), rel=1e-3)
    assert ("adapters/step_ratio" in values) == (kind != "none")
    assert all(type(value) in (float, str) for value in values.values())


def grid_step(weight):
    """The mean quantisation step by looking at every weight alone: half the distance between the values on either side of its own."""
    if isinstance(weight, quant.NF4Weight):
        levels, values = quant.nf4_codebook().double(), weight.dequantize(torch.float32).double().reshape(-1)
        scales = weight.block_scales().double().repeat_interleave(64)[:len(values)]
        code = ((values / scales)[:, None] - levels).abs().argmin(dim=1)
        low, high = levels[(code - 1).clamp_min(0)], levels[(code + 1).clamp_max(15)]
        return ((high - low) / torch.where((code == 0) | (code == 15), 1, 2) * scales).mean().item()
    W = weight.dequantize(torch.float32).double()
    scale = weight.scale if isinstance(weight, quant.Int8Weight) else weight.row_max / 127
    codes = W / scale.double()[:, None]
    assert (codes - codes.round()).abs().max() < 1e-3, "weights lie on whole multiples of the row's step"
    return scale.double().mean().item()


def test_an_adapter_that_never_moved_has_zeros_and_no_error(folder):
    network = loaded(folder, "nf4", b=0.0)
    values = telemetry.adapters(network, telemetry.measure_weights(network))
    assert values["adapters/delta_ratio"] == values["adapters/effective_rank"] == values["adapters/step_ratio"] == 0.0


def test_one_direction_has_an_effective_rank_of_one_and_equal_ones_have_all(folder):
    network = loaded(folder, "none", dtype="fp32")
    one, all_four = list(telemetry.adapted(network).values())[:2]
    with torch.no_grad():
        one.lora_B[:, 1:] = 0
        for module in (all_four,):
            module.lora_B.copy_(torch.linalg.qr(module.lora_B)[0])
            module.lora_A.copy_(torch.linalg.qr(module.lora_A.T)[0].T)
    _, ranks = telemetry.shape_of_updates(network)
    assert ranks[0].item() == pytest.approx(1, abs=1e-4) and ranks[1].item() == pytest.approx(4, rel=1e-5)


# -------------------------------------------------------------------------------------------------- gradient noise

def follow(rate, samples=8, n=400, pairs=300, spread=0.5, seed=0):
    """Noise scales of gradient descent on |theta|^2 / 2 from theta0, sample gradients theta + noise: the truth is n spread^2 / |theta|^2."""
    generator = torch.Generator().manual_seed(seed)
    theta, noise, last, truth = torch.full((n,), 0.1), telemetry.NoiseScale(), None, None
    for step in range(1, pairs * telemetry.NOISE_EVERY + 1):
        gradient = theta + torch.randn(n, generator=generator) * spread / math.sqrt(samples)
        seen = noise.observe(step, gradient, 1.0, samples)
        last = noise.update(seen.tolist()).get("train/noise_scale", last)
        theta = theta - rate * gradient
        yield last, noise, seen


def test_the_noise_scale_of_known_noise_is_found():
    """Numerator and denominator averaged over 300 pairs, each with equal weight; the truth is 400 x 0.25 / 4 = 25 samples."""
    signal, noise = [], []
    for _, _, seen in follow(rate=0.0):
        if len(seen):
            dot, first, second, b1, b2 = seen.tolist()
            signal.append(dot)
            noise.append((b1 * (first - dot) + b2 * (second - dot)) / 2)
    assert len(signal) == 300
    assert sum(signal) / 300 == pytest.approx(4.0, rel=0.03) and sum(noise) / 300 == pytest.approx(100.0, rel=0.03)


def test_what_is_reported_is_of_the_right_size():
    values = [value for value, *_ in follow(rate=0.0) if value]
    middle = sorted(values[500:])[len(values[500:]) // 2]
    assert middle == pytest.approx(25, rel=0.15) and min(values[500:]) > 12 and max(values[500:]) < 50


def test_windows_of_different_sizes_give_the_same_noise_scale():
    generator, noise, last = torch.Generator().manual_seed(1), telemetry.NoiseScale(), None
    theta, totals = torch.full((400,), 0.1), torch.zeros(2)
    for step in range(1, 3001):
        samples = 4 if step % 2 else 32
        seen = noise.observe(step, theta + torch.randn(400, generator=generator) * 0.5 / math.sqrt(samples), 1.0, samples).tolist()
        noise.update(seen)
        if seen:
            dot, first, second, b1, b2 = seen
            totals += torch.tensor([(b1 * (first - dot) + b2 * (second - dot)) / 2, dot])
    assert (totals[0] / totals[1]).item() == pytest.approx(25, rel=0.05)


def test_a_loss_scale_changes_nothing():
    one, two, gradient = telemetry.NoiseScale(), telemetry.NoiseScale(), [torch.randn(50, generator=torch.Generator().manual_seed(i)) + 1 for i in range(2)]
    results = []
    for noise, scale in ((one, 1.0), (two, torch.tensor(1024.0))):
        noise.observe(telemetry.PAIR_AT, gradient[0] * scale, scale, 8)
        results.append(noise.update(noise.observe(telemetry.PAIR_AT + 1, gradient[1] * scale, scale, 8).tolist())["train/noise_scale"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_a_broken_pair_is_passed_over():
    noise, g = telemetry.NoiseScale(), torch.ones(9)
    assert noise.update(noise.observe(telemetry.PAIR_AT + 1, g, 1.0, 8).tolist()) == {}, "a run resumed between the two"
    noise.observe(telemetry.PAIR_AT, g, 1.0, 8)
    assert noise.update(noise.observe(telemetry.PAIR_AT + 1, g * math.nan, 1.0, 8).tolist()) == {}, "a gradient that is not finite"
    noise.observe(telemetry.PAIR_AT, g, 1.0, 8)
    assert noise.update(noise.observe(telemetry.PAIR_AT + 1, g * 0, 1.0, 8).tolist()) == {}, "a window without a supervised token"
    assert (noise.signal, noise.noise) == (0.0, 0.0) and noise.earlier is None
    noise.observe(telemetry.PAIR_AT, g, 1.0, 8)
    assert noise.update(noise.observe(telemetry.PAIR_AT + 1, -g, 1.0, 8).tolist()) == {}, "no signal above noise"


@pytest.mark.parametrize("stop", [4, 5, 9, 14, 15, 20])
def test_an_average_that_goes_on_from_its_state_is_the_one_that_was_never_interrupted(stop):
    whole, gradients = telemetry.NoiseScale(), [torch.randn(50, generator=torch.Generator().manual_seed(i)) + 1 for i in range(26)]
    part, seen = telemetry.NoiseScale(), ([], [])
    for step in range(1, 26):
        for noise, told in ((whole, seen[0]), (part, seen[1])):
            told.append(noise.update(noise.observe(step, gradients[step], 1.0, 8).tolist()))
        if step == stop:
            figures, begun = part.state()
            assert set(begun) == ({"earlier"} if step in (4, 14) else set())
            part = telemetry.NoiseScale(json.loads(json.dumps(figures)), {name: tensor.clone() for name, tensor in begun.items()})
    assert seen[0] == seen[1] and sum(map(bool, seen[0])) == 3


def test_the_gradient_is_not_touched():
    noise, g = telemetry.NoiseScale(), torch.randn(99)
    before = g.clone()
    for step in range(1, 12):
        noise.observe(step, g, torch.tensor(2.0), 8)
    assert torch.equal(g, before)


def test_one_step_of_movement_biases_the_signal_by_the_rate_times_the_curvature_and_no_more():
    """On |theta|^2 / 2 the expected g1 . g2 is |theta|^2 - rate (|theta|^2 + tr(S) / b), and so it is measured."""
    generator, rate, total = torch.Generator().manual_seed(2), 0.02, 0.0
    for _ in range(3000):
        noise, theta = telemetry.NoiseScale(), torch.full((400,), 0.1)
        gradients = []
        for _ in range(2):
            gradients.append(theta + torch.randn(400, generator=generator) * 0.5 / math.sqrt(8))
            theta = theta - rate * gradients[-1]
        noise.observe(telemetry.PAIR_AT, gradients[0], 1.0, 8)
        total += noise.observe(telemetry.PAIR_AT + 1, gradients[1], 1.0, 8)[0].item() / 3000
    assert total == pytest.approx(4 - rate * (4 + 100 / 8), rel=0.015)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_adapters_that_are_no_numbers_are_measured_as_such_and_leave_the_others_alone(tmp_path, bad):
    """A diverged run ends by its alert, not in the middle of its own measurement."""
    make_model(tmp_path)
    network = model.load(make_config(tmp_path), "cpu")
    with torch.no_grad():
        for parameter in lora_layers.adapters(network).values():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
        before = torch.stack(telemetry.shape_of_updates(network))
        network.get_submodule("model.layers.0.mlp.up_proj").lora_B[3, 1] = bad
    after = torch.stack(telemetry.shape_of_updates(network))
    spoilt = list(telemetry.adapted(network)).index("model.layers.0.mlp.up_proj")
    others = [i for i in range(after.shape[1]) if i != spoilt]
    assert after[:, spoilt].isnan().all() and torch.equal(after[:, others], before[:, others])
    assert telemetry.adapters(network, telemetry.measure_weights(network))["adapters/modules"]
