"""Samples by replay: on the CPU its every step runs eagerly, and is held to transformers' own loop and to what a graph can record."""
import types

import pytest
import torch
from conftest import After, make_config, make_model
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import eval as evaluation
import generation
import graphs
import lora_layers
import model
import quant

END = 2
PROMPTS = [[5], [9, 4, 30], [1, 7, 7, 7, 4, 8, 9, 10, 11, 12, 13, 14], [17, 3, 3, 8]]
PLAIN = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {}}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """kind, settings -> a tiny network with B drawn at random, in evaluation mode."""
    folders, networks = {}, {}

    def load(kind="llama", quant="none", dtype="fp32", **sections):
        key = str((kind, quant, dtype, sections))
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            make_model(folders[kind], kind, initializer_range=0.1, **PLAIN.get(kind, {}))
        if key not in networks:
            network = networks[key] = model.load(make_config(folders[kind], quant, dtype, **sections), "cpu")
            draw(network, seed=1)
        return networks[key].eval()

    return load


@torch.no_grad()
def draw(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_layers.adapters(network).items():
        if ".lora_B." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def batch(prompts):
    width = max(map(len, prompts))
    padding = [width - len(ids) for ids in prompts]
    return (torch.tensor([[END] * left + ids for left, ids in zip(padding, prompts)]),
            torch.tensor([[0] * left + [1] * len(ids) for left, ids in zip(padding, prompts)]))


def both(network, prompts, count, ends=(END,)):
    """What transformers' loop writes and what ours does, of ours as many columns as there are of transformers'."""
    with attention.own_attention(network):
        theirs, ours = (write(network, *batch(prompts), count, list(ends)) for write in (generation.by_transformers, generation.replayed))
    assert all(len(theirs[0]) <= len(row) <= count for row in ours)
    return theirs, [row[:len(theirs[0])] for row in ours]


@pytest.mark.parametrize("kind", PLAIN)
def test_each_prompt_is_continued_as_transformers_own_loop_does(loaded, kind):
    network = loaded(kind)
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[:1], PROMPTS[2:3], [[7] * 60, [8]]):
        for count in (1, 2, 3, 20):
            theirs, ours = both(network, prompts, count)
            assert ours == theirs and len(ours) == len(prompts) and len(ours[0]) == count, (prompts, count)
    assert len({tuple(row) for row in both(network, PROMPTS, 20)[1]}) == len(PROMPTS)


def test_prompts_end_early_one_by_one_or_all_at_once(loaded):
    network = loaded()
    free, _ = both(network, PROMPTS, 40)
    for ends in ([free[0][3]], [free[1][0], free[2][5]], [row[0] for row in free], [row[9] for row in free], [row[8] for row in free]):
        theirs, ours = both(network, PROMPTS, 40, ends)
        assert ours == theirs and any(set(row) & set(ends) for row in ours)
    assert len(both(network, PROMPTS, 40, [row[0] for row in free])[0][0]) == 1, "nothing was left to write"
    with attention.own_attention(network):
        asked = generation.replayed(network, *batch(PROMPTS), 40, [row[9] for row in free])
    assert len(asked[0]) <= 10 + generation.LOOK, "the host looks now and then who has ended"


NO_COPIES = {"memory": {"keep_dequantized": "no"}}


@pytest.mark.parametrize("quant, sections", [("nf4", {}), ("nf4", NO_COPIES), ("int8", NO_COPIES), ("nf4", {"memory": {"fused": False}}),
                                             ("none", {"lora": {"dora": True, "dropout": 0.2}})])
def test_however_weights_and_adapters_are_kept(loaded, quant, sections):
    theirs, ours = both(loaded(quant=quant, **sections), PROMPTS, 20)
    assert ours == theirs


def test_changed_adapters_write_other_samples_at_once(loaded):
    network = loaded("qwen2")
    (first, ours), _ = both(network, PROMPTS, 20), draw(network, seed=2)
    second, again = both(network, PROMPTS, 20)
    draw(network, seed=1)
    assert ours == first and again == second and first != second


class Letters:
    """A tokenizer's decode."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def samples(network, count=12, interrupted=()):
    asked = [{"prompt": "", "reference": "", "ids": ids} for ids in PROMPTS]
    return evaluation.generate(network, Letters(), asked, count, [END], interrupted)


def test_evaluation_takes_the_replay_where_it_serves_and_training_does_not_notice(loaded, monkeypatch):
    network = loaded(quant="nf4", lora={"dropout": 0.3})
    expected = samples(network)
    monkeypatch.setattr(network, "generate", lambda **_: pytest.fail("transformers' loop ran"))
    monkeypatch.setattr(generation, "serves", lambda network, prompts: "")
    network.train()
    flat, state = network.adapter_memory.flat, torch.get_rng_state()
    flat.grad.fill_(0.5)
    before = flat.detach().clone()
    assert samples(network) == expected
    assert network.training and torch.equal(torch.get_rng_state(), state) and torch.equal(flat, before) and (flat.grad == 0.5).all()
    assert network.config._attn_implementation == attention.ATTENTION


def test_an_interruption_is_seen_within_a_few_tokens(loaded, monkeypatch):
    network, tokens = loaded(), []
    monkeypatch.setattr(generation, "serves", lambda network, prompts: "")
    hook = network.register_forward_pre_hook(lambda *_: tokens.append(1))
    assert samples(network, 200, After(3)) is None and len(tokens) == 1 + 3 * generation.LOOK and generation.LOOK <= 8
    assert samples(network, 200, [15]) is None and len(tokens) == 2 + 3 * generation.LOOK
    hook.remove()


def test_samples_that_do_not_fit_together_are_replayed_in_halves(loaded, monkeypatch):
    network = loaded()
    expected, sizes, real = samples(network), [], generation.replayed

    def lacking(network, ids, *rest):
        sizes.append(len(ids))
        return real(network, ids, *rest) if len(ids) < 2 else torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(generation, "serves", lambda network, prompts: "")
    monkeypatch.setattr(generation, "replayed", lacking)
    assert samples(network) == expected and sizes == [4, 2, 1, 1, 2, 1, 1]


class Seen(TorchDispatchMode):
    """Writes down each operation with all that a graph would keep of it: shapes, dtypes and numbers, a list for each forward pass."""

    def __init__(self, network):
        super().__init__()
        self.passes = []
        network.register_forward_pre_hook(lambda *_: self.passes.append([]))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if self.passes:
            told = lambda x: (x.dtype, tuple(x.shape), x.stride()) if isinstance(x, torch.Tensor) else x
            self.passes[-1].append((str(operation), str(torch.utils._pytree.tree_map(told, (args, kwargs)))))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind, quant, sections", [
    *((kind, "none", {}) for kind in PLAIN), ("llama", "nf4", {**NO_COPIES, "lora": {"dropout": 0.1}}), ("llama", "int8", {}),
    ("llama", "none", {"lora": {"dora": True}})])
def test_each_token_takes_the_same_operations_and_none_whose_result_the_host_reads(loaded, kind, quant, sections):
    """So that what was recorded for one token is right for all."""
    network = loaded(kind, quant, "bf16", **sections)
    with attention.own_attention(network), Seen(network) as seen:
        generation.replayed(network, *batch(PROMPTS), generation.LOOK + 1, [END])
    _, first, *others = seen.passes
    assert first[-1][0] == "aten.index_fill_.int_Scalar", "each step begins ahead of its forward pass"
    others[-1] = [*others[-1][:len(first) - 1], first[-1]]  # behind the last, the tokens are read instead
    assert len(others) == generation.LOOK - 1 and all(other == first for other in others)
    waits = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal", "bincount")
    assert not [name for name, _ in first if any(name.startswith(f"aten.{wait}.") for wait in waits)]
    assert any(name.startswith("aten._local_scalar_dense") for name, _ in seen.passes[0]), "the host looks who has ended, and is seen to"


class OnOneDevice(TorchDispatchMode):
    """Where nothing has values (the meta device): notes operations that touch the host's memory, and answers no to what is asked."""

    def __init__(self, network):
        super().__init__()
        self.passes, self.found = 0, []
        network.register_forward_pre_hook(self.begin)

    def begin(self, *_):
        self.passes += 1

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        asked = "_local_scalar_dense" in str(operation)
        out = False if asked else operation(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if self.passes > 1 and (asked or any(x.device.type != "meta" for x in tensors)):
            self.found.append(str(operation))
        return out


@pytest.mark.parametrize("kind", PLAIN)
def test_no_token_but_the_first_touches_the_hosts_memory(tmp_path, kind):
    """What comes from there, or goes there, cannot be recorded."""
    make_model(tmp_path, kind, **PLAIN[kind])
    network = model.load(make_config(tmp_path, dtype="bf16", memory={"fused": False}), "cpu").eval().to("meta")
    for module in network.modules():
        if isinstance(module, quant.FrozenWeight):
            module.keep(torch.bfloat16)
    with attention.own_attention(network), OnOneDevice(network) as device, pytest.raises(NotImplementedError, match="no data"):
        generation.replayed(network, *(x.to("meta") for x in batch(PROMPTS)), generation.LOOK, [END])
    assert device.passes == generation.LOOK and not device.found, "and only the tokens themselves had to be copied, at the end"


def test_what_cannot_be_recorded_is_told_by_what_it_is(loaded, tmp_path, monkeypatch):
    assert generation.serves(loaded(), 4) == "no GPU", "nothing else is against it"
    assert generation.serves(loaded(quant="nf4", lora={"dora": True}), 4) == "no GPU"
    for kind in ("gemma2", "gemma3_text"):
        assert "plain full attention" in generation.serves(loaded(kind), 4)
    assert "LLM.int8()" in generation.serves(loaded(quant="llm_int8", dtype="bf16"), 4)
    assert "memory.graphs" in generation.serves(loaded(memory={"graphs": "no"}), 4)
    growing = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    cases = ("window", {"sliding_window": 8}, "plain full attention"), ("growing", {"rope_parameters": growing}, "how long")
    for folder, changes, said in cases:
        make_model(tmp_path / folder, "mistral", **{"sliding_window": None} | changes)
        assert said in generation.serves(model.load(make_config(tmp_path / folder), "cpu"), 4)
    network = loaded()
    elsewhere = model.HostEmbedding(network.get_input_embeddings().weight, network.device)
    elsewhere.weight = elsewhere.weight.to("meta")
    monkeypatch.setattr(network, "get_input_embeddings", lambda: elsewhere)
    assert "looked up on the host" in generation.serves(network, 4)
    monkeypatch.undo()
    for name, value, said in (("sharded", True, "several ranks"), ("_can_compile_fullgraph", False, "whatever the values")):
        monkeypatch.setattr(network, name, value)
        assert said in generation.serves(network, 4)
        monkeypatch.undo()
    monkeypatch.setattr(generation.ranks, "RANKS", 2)
    assert "several ranks" in generation.serves(network, 4)
    monkeypatch.undo()
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in generation.serves(network, 4)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("inside, at_the_end, raised, told", [
    (RuntimeError("operation not permitted when stream is capturing"), RuntimeError("capture was invalidated\nmore"), graphs.NotRecordable, "invalidated); give --memory.graphs=no"),
    (None, RuntimeError("the capture cannot end"), graphs.NotRecordable, "cannot end"),
    (RuntimeError("an illegal memory access"), None, RuntimeError, "illegal memory access"),
    (torch.OutOfMemoryError("no memory"), RuntimeError("capture was invalidated"), torch.OutOfMemoryError, "no memory"),
    (torch.OutOfMemoryError("no memory"), None, torch.OutOfMemoryError, "no memory"), (KeyError("ours"), None, KeyError, "ours")])
def test_a_recording_that_fails_tells_the_way_out_and_lack_of_memory_as_such(monkeypatch, inside, at_the_end, raised, told):
    class Recording:
        def __init__(self, graph, **options):
            assert options == {"stream": 3}

        def __enter__(self):
            return None

        def __exit__(self, *error):
            if at_the_end:
                raise at_the_end

    monkeypatch.setattr(torch.cuda, "graph", Recording)
    with pytest.raises(raised) as caught, graphs.recording(object(), stream=3):
        if inside:
            raise inside
    assert told in str(caught.value)


def test_samples_that_cannot_be_recorded_are_written_all_the_same_with_a_note(loaded, monkeypatch, capsys):
    network, prompts = loaded(), [{"ids": ids, "prompt": str(ids), "reference": ""} for ids in PROMPTS]
    letters = types.SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    expected = evaluation.generate(network, letters, prompts, 6, [END])
    asked = []

    def cannot(*given):
        asked.append(given)
        raise graphs.NotRecordable("give --memory.graphs=no") from RuntimeError("not while capturing")

    monkeypatch.setattr(generation, "serves", lambda network, prompts: "" if network.graphs else "no")
    monkeypatch.setattr(generation, "replayed", cannot)
    monkeypatch.setattr(network, "graphs", True)
    assert [evaluation.generate(network, letters, prompts, 6, [END]) for _ in range(2)] == [expected] * 2
    assert len(asked) == 1 and capsys.readouterr().err.count("without CUDA graphs, which is slower (not while capturing)") == 1
