"""Hostile and broken input found by searching: whatever is in a configuration, a row, a tensor file or a manifest, the answer is work or
one ValueError that says what is wrong (which the commands print, with exit code 2), never another exception and never a hang."""
import contextlib
import io
import json
import pathlib
import sys

import hypothesis
import pytest
import safetensors.torch
import torch
from conftest import make_model, make_tokenizer
from hypothesis import given
from hypothesis import strategies as some

import checkpoint
import config
import data
import loading
import record
import schedule
import trust

bounded = hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None,
                              suppress_health_check=list(hypothesis.HealthCheck))
SCALARS = some.one_of(some.none(), some.booleans(), some.integers(-2**70, 2**70), some.integers(-3, 40), some.floats(),
                      some.text(max_size=12),
                      some.sampled_from(["auto", "nf4", "cosine", "user", "assistant", "1e-4", "\udc00", "../..", "a" * 3000]))
JSON = some.recursive(
    SCALARS, lambda inner: some.one_of(some.lists(inner, max_size=4), some.dictionaries(some.text(max_size=8), inner, max_size=4)),
    max_leaves=8)


def one_clear_message(error):
    """A message of its own words: not empty, not a bare KeyError's, of bounded length."""
    text = str(error)
    assert 10 < len(text) < 20_000 and "Traceback" not in text and "object at 0x" not in text, text


@contextlib.contextmanager
def works_or_is_refused():
    try:
        yield
    except ValueError as error:
        one_clear_message(error)


# ------------------------------------------------------------------------------------------------------- configuration

KEYS = some.sampled_from(sorted(config.Config().flat()))
SECTIONS = some.dictionaries(some.one_of(some.sampled_from(sorted(config.SECTIONS)), some.text(max_size=6)),
                             some.one_of(JSON, some.dictionaries(KEYS.map(lambda key: key.split(".")[1]), JSON, max_size=4)), max_size=4)


@bounded
@given(some.one_of(SECTIONS, JSON),
       some.lists(some.tuples(some.one_of(KEYS, some.text(min_size=1, max_size=9).map(lambda t: f"model.{t}")),
                              some.one_of(JSON.map(json.dumps), some.text(max_size=9))), max_size=3))
def test_any_configuration_is_accepted_whole_or_refused_in_one_message(tree, overrides):
    with works_or_is_refused():
        accepted = config.from_dict(tree, overrides)
        assert config.from_dict(json.loads(json.dumps(accepted.to_dict()))) == accepted
        for step in (1, 2, 1000):
            assert schedule.learning_rate(step, accepted.schedule, 1000) >= 0


@bounded
@given(some.binary(max_size=200), SECTIONS, some.integers(0, 400), some.binary(max_size=3))
def test_any_configuration_file_is_read_or_refused_in_one_message(tmp_path_factory, noise, tree, at, patch):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    text = json.dumps(tree).encode()
    for content in (noise, text[:at] + patch + text[at:]):
        path.write_bytes(content)
        with works_or_is_refused():
            config.read(path)


@bounded
@given(some.lists(some.one_of(some.text(max_size=12), KEYS.map(lambda key: f"--{key}"),
                              some.tuples(KEYS, JSON.map(json.dumps)).map("--{0[0]}={0[1]}".format),
                              some.sampled_from(["--out", "--resume", "--out=", "--help", "-x", "--"])), max_size=4))
def test_any_command_line_is_understood_or_refused_in_one_message(arguments):
    with works_or_is_refused():
        _, _, overrides = config.command_line(arguments, {"out": "", "resume": None, "overwrite": False})
        config.from_dict({}, overrides, "command line")


@pytest.mark.parametrize("arguments", [
    ["configs/approach1.json", "--lora.r=\udcff"], ["\udcff"], ["configs/approach1.json", "--train.seed=" + "9" * 5000],
    ["configs/approach1.json", "--lora.targets=[[[["], ["a\0b"], ["/dev/zero"],
    ["configs/approach1.json", "--train.accumulation=1000000000"],
    ["configs/approach1.json", "--schedule.batch_points=[[1,1000000000000]]"],
    ["configs/approach1.json", "--data.train=\0", "--model.path=x"], ["configs/approach1.json", "--model.path=\0"]])
def test_a_command_prints_one_error_and_exits_2_whatever_it_is_given(arguments, monkeypatch, capsys):
    import train
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(buffer := io.BytesIO(), encoding="utf-8", errors="backslashreplace"))
    with pytest.raises(SystemExit) as end:
        config.run_command(train.main)
    sys.stderr.flush()
    assert end.value.code == 2 and buffer.getvalue().startswith(b"error: ") and b"Traceback" not in buffer.getvalue()


def test_a_lack_of_memory_anywhere_is_one_message_and_another_error_is_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        config.run_command(lambda argv: torch.empty(1 << 60, dtype=torch.uint8))
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: memory ran out (")
    with pytest.raises(RuntimeError, match="another"):
        config.run_command(lambda argv: (_ for _ in ()).throw(RuntimeError("another")))


# ---------------------------------------------------------------------------------------------------------------- rows

TURN = some.dictionaries(some.sampled_from(["role", "content", "from", "value", "tool_calls", "name"]),
                         some.one_of(some.sampled_from(["user", "assistant", "human", "gpt", "hi", ""]), JSON), max_size=3)
ROW = some.dictionaries(some.sampled_from(["messages", "conversations", "instruction", "input", "output", "prompt", "completion",
                                           "text", "system", "tools", "id"]),
                        some.one_of(some.lists(TURN, max_size=4), some.text(max_size=20), JSON), max_size=4)
GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return data.load_tokenizer(str(folder))


@bounded
@given(some.lists(some.one_of(ROW, JSON), min_size=1, max_size=3))
def test_any_row_is_tokenised_or_refused_with_its_name(tokenizer, rows):
    records = [("good.jsonl:1", GOOD), *((f"rows.jsonl:{n}", row) for n, row in enumerate(rows, 1))]
    try:
        data.tokenize(records, tokenizer, config.Data())
    except ValueError as error:
        one_clear_message(error)
        assert str(error).startswith("rows.jsonl:"), error
    kept = data.tokenize(records, tokenizer, config.Data(bad_rows="skip"))
    assert kept.counts["rows_read"] == len(records) == len(kept) + len(kept.skipped) + kept.counts["rows_lost"]
    assert kept.names[0] == "good.jsonl:1" and not kept.supervised[kept.offsets[:-1]].any()


@bounded
@given(some.sampled_from(["jsonl", "json", "csv", "parquet", "jsonl.gz"]), some.one_of(
    some.binary(max_size=120),
    some.lists(some.one_of(ROW, JSON), max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    some.lists(ROW, max_size=3).map(lambda rows: json.dumps(rows).encode()),
    some.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_file_of_rows_is_read_or_refused_with_its_name(tmp_path_factory, tokenizer, kind, content):
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{kind}"
    path.write_bytes(content)
    for how in ("refuse", "skip"):
        with works_or_is_refused():
            rows = data.read_rows(str(path), how)
            data.tokenize(rows, tokenizer, config.Data(bad_rows=how))


# ---------------------------------------------------------------------------------------- tensor files, manifests, records

@pytest.fixture(scope="module")
def tensor_file():
    return safetensors.torch.save({"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(3, dtype=torch.bfloat16)},
                                  metadata={"format": "pt"})


SNIPPETS = [b"-1", b'"', b"}", b"99999999999999999999", b"F64", b"[", b"1e9", b"null", b"\xff"]
EDITS = some.lists(some.tuples(some.integers(0, 300), some.one_of(some.binary(max_size=4), some.sampled_from(SNIPPETS)),
                               some.integers(0, 4)), min_size=1, max_size=3)


def edited(content, edits):
    for at, patch, dropped in edits:
        at = min(at, len(content))
        content = content[:at] + patch + content[at + dropped:]
    return content


@bounded
@given(EDITS, some.booleans())
def test_any_tensor_file_is_read_alike_by_us_and_the_library_or_refused(tmp_path_factory, tensor_file, edits, keep_length):
    content = edited(tensor_file[8:], edits) if keep_length else edited(tensor_file, edits)
    if keep_length:  # the header grows or shrinks with the edit, so that what lies behind it is reached
        length = int.from_bytes(tensor_file[:8], "little") + len(content) - len(tensor_file) + 8
        content = max(0, length).to_bytes(8, "little") + content
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(content)
    with works_or_is_refused():
        shapes = trust.tensor_shapes(path)
        for name in shapes:
            assert tuple(loading.read_tensor(path, name, "cpu").shape) == shapes[name]
    with works_or_is_refused():
        for name, tensor in checkpoint._tensors(content, path).items():
            assert checkpoint.TENSOR_NAME.fullmatch(name) and tensor.numel() < 1 << 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A good checkpoint: its folder and the content of its manifest and state."""
    tensors = {"adapter_model.safetensors": {"a": torch.ones(2)}}
    folder = checkpoint.save(tmp_path_factory.mktemp("run"), 5, tensors, {"adapter_config.json": "{}", "state.json": '{"step": 5}'}, 1)
    return folder, {name: (folder / name).read_bytes() for name in ("manifest.json", "state.json")}


@bounded
@given(some.sampled_from(["manifest.json", "state.json"]), EDITS, JSON)
def test_any_manifest_or_state_is_whole_or_refused(saved, name, edits, tree):
    folder, good = saved
    manifest = json.loads(good["manifest.json"])
    for content in (edited(good[name], edits), json.dumps(tree).encode(), json.dumps(manifest | {"files": tree}).encode(),
                    json.dumps(manifest | {"step": tree}).encode(),
                    json.dumps(manifest | {"files": manifest["files"] | {"state.json": tree}}).encode()):
        (folder / name).write_bytes(content)
        try:
            with works_or_is_refused():
                assert checkpoint.load(folder)["step"] == 5
            with works_or_is_refused():
                checkpoint.find(folder)
        finally:
            (folder / name).write_bytes(good[name])


@bounded
@given(EDITS, some.binary(max_size=60))
def test_any_record_is_read_or_refused_with_its_line(tmp_path_factory, edits, noise):
    run = tmp_path_factory.mktemp("record")
    lines = b'{"step": 0, "eval/loss": 4.5}\n{"step": 1, "train/loss": "nan", "train/grad_norm": 1.5}\n{"step": 2, "train/loss": 3.25}\n'
    for content in (edited(lines, edits), lines + noise, noise):
        (run / "metrics.jsonl").write_bytes(content)
        try:
            steps = [line["step"] for line in record.read_metrics(run)]
            assert steps == sorted(set(steps))
        except ValueError as error:
            one_clear_message(error)
            assert "metrics.jsonl, line " in str(error)


# -------------------------------------------------------------------------------------------------------- model folders

@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder, json.loads((folder / "config.json").read_text())


@hypothesis.settings(bounded, max_examples=60)
@given(some.data())
def test_any_model_configuration_builds_a_model_or_is_refused(model_folder, draw):
    folder, good = model_folder
    name = draw.draw(some.sampled_from(sorted(good)))
    (folder / "config.json").write_text(json.dumps(good | {name: draw.draw(JSON)}))
    with works_or_is_refused():
        trust.check_folder(folder)
        network = loading.architecture(pathlib.Path(folder), torch.float32)
        assert sum(parameter.numel() for parameter in network.parameters()) < 1 << 50
