"""Model folders, templates and adapters made by a stranger: refused with one message, a canary untouched, time and memory bounded."""
import hashlib
import json
import os
import pathlib
import pickle
import shutil
import time
import tracemalloc

import pytest
import safetensors.torch
import torch
from conftest import CHATML, make_config, make_model, make_tokenizer, settings_of

import checkpoint
import config
import continuation
import data
import model
import sources
import tokens
import train
import trust


@pytest.fixture
def folder(tmp_path):
    """A good model folder, to be made bad."""
    make_model(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def refused(folder, *words):
    """Loading tokenizer and model raises one ValueError with these words, within seconds and without taking memory."""
    began = time.monotonic()
    tracemalloc.start()
    with pytest.raises(ValueError) as caught:
        data.load_tokenizer(str(folder))
        model.load(make_config(folder), "cpu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for word in words:
        assert word in str(caught.value), caught.value
    assert time.monotonic() - began < 30 and peak < 300 << 20


class Bomb:
    """Unpickling one creates the file that it names."""
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def test_pickles_in_a_model_folder_are_never_opened(folder, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "canary"))
    pickle.loads(bomb).close()
    (tmp_path / "canary").unlink()  # the bomb works
    names = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pt", "tokenizer.model", "vocab.pkl", "added_tokens.bin",
             "adapter_model.bin", "model.ckpt")
    for name in names:
        (folder / name).write_bytes(bomb)
    data.load_tokenizer(str(folder))
    model.load(make_config(folder), "cpu")
    (folder / "model.safetensors").write_bytes(bomb)
    refused(folder, "model.safetensors")
    (folder / "model.safetensors").unlink()
    refused(folder, "neither model.safetensors nor its index")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "anything.txt"])
def test_a_link_that_leads_out_of_the_folder_is_refused_and_one_within_it_or_a_hubs_cache_is_not(folder, tmp_path, name):
    secret = tmp_path / "secret"
    shutil.copy(folder / name, secret) if (folder / name).exists() else secret.write_text("secret")
    inside = folder / f"real-{name}"
    shutil.copy(secret, inside)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(inside.name)
    model.load(make_config(folder), "cpu")
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    refused(folder, name, "a link that leads out of the model folder")
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    shutil.copytree(folder, snapshot, symlinks=True)
    blobs.mkdir()
    (snapshot / name).unlink()
    secret.rename(blobs / "f00")
    (snapshot / name).symlink_to("../../blobs/f00")
    trust.check_folder(snapshot)


def test_a_template_in_the_folder_of_templates_is_checked_like_any_file_and_the_default_one_is_used(folder, tmp_path, tiny_inputs, capsys):
    """transformers reads additional_chat_templates/ too: a link in it would put what it leads to into every checkpoint."""
    place, secret = folder / "additional_chat_templates", tmp_path / "secret"
    place.mkdir()
    (place / "rag.jinja").write_text("rag")
    tokenizer = data.load_tokenizer(str(folder))
    assert tokenizer.chat_template == CHATML and "(default, rag) the default one is used" in capsys.readouterr().err
    settings = settings_of(tiny_inputs, tmp_path / "tiny.json")
    options = [f"--model.path={folder}", f"--out={tmp_path / 'run'}", "--train.max_steps=1", "--schedule.lr_warmup_steps=0"]
    assert train.main([str(settings), *options]) == 0
    assert (tmp_path / "run/checkpoints/step-000001/chat_template.jinja").read_text() == CHATML
    (place / "rag.jinja").unlink()
    (place / "rag.jinja").symlink_to(secret)
    secret.write_text("secret")
    refused(folder, "rag.jinja", "a link that leads out of the model folder")
    (place / "rag.jinja").unlink()
    (place / "rag.jinja").write_text("rag")
    (folder / "chat_template.jinja").unlink()
    refused(folder, "data.chat_template: the model brings several chat templates (rag) and none called default")


@pytest.mark.parametrize("changes, said", [({"note": "\udc00"}, "the tokenizer cannot be written down again"),
                                           ({"model_max_length": [1]}, "no tokenizer could be loaded")])
def test_a_tokenizer_that_no_checkpoint_could_hold_is_refused_before_training(folder, tmp_path, tiny_inputs, changes, said):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=said):
        train.main([str(settings_of(tiny_inputs, tmp_path / "tiny.json")), f"--model.path={folder}", f"--out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def shards(folder, **names):
    """Index files naming shards as given, beside the one true file."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "a.safetensors" for name in tensors} | names}))


@pytest.mark.parametrize("shard", ["../outside.safetensors", "{outside}", "link.safetensors", "..", "sub/x.safetensors", "a.bin", 7,
                                   ["a.safetensors"]])
def test_a_shard_elsewhere_is_refused_by_its_name(folder, tmp_path, shard):
    outside = tmp_path / "outside.safetensors"
    safetensors.torch.save_file({"lm_head.weight": torch.zeros(320, 64)}, outside)
    (folder / "link.safetensors").symlink_to(outside)
    if shard != "link.safetensors":
        (folder / "link.safetensors").unlink()
    shards(folder, **{"lm_head.weight": shard.replace("{outside}", str(outside)) if isinstance(shard, str) else shard})
    refused(folder, "link.safetensors" if shard == "link.safetensors" else "model.safetensors.index.json")


def header(text, body=b"", length=None):
    content = text.encode()
    return (len(content) if length is None else length).to_bytes(8, "little") + content + body


ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize("content, word", [
    (header("{}", length=1 << 62), "header claims"), (header(" " * (33 << 20) + "{}"), "header claims"), (b"\0", "header claims"),
    (header("[" * 100_000), "not valid JSON"), (header(f'{{"a":{ONE},"a":{ONE}}}', bytes(4)), "'a' stands twice"),
    (header(f'{{"a":{ONE}}}', bytes(3)), "'a'"), (header(f'{{"a":{ONE}}}', bytes(9)), "cut short or changed"),
    (header('{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}', bytes(4)), "'a'"),
    (header('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)), "'a'"),
    (header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', bytes(4)), "'a'"), (header('{"a":7}'), "'a'"),
    (header("[]"), "JSON object"),
    (header(f'{{"../../../canary":{ONE}}}', bytes(4)), "the folder's files hold 1 tensors")])
def test_a_hostile_weight_file_is_refused_before_a_tensor_is_read(folder, tmp_path, content, word):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, word)
    assert not (tmp_path / "canary").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("changes, word", [
    ({"auto_map": {"AutoConfig": "evil.Evil"}}, "auto_map"), ({"text_config": {"auto_map": {}}}, "auto_map"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers"), ({"num_hidden_layers": -1}, "model"), ({"hidden_size": 10**9}, "hidden_size"),
    ({"head_dim": 1 << 30}, "head_dim"), ({"vocab_size": 1e300}, "vocab_size"), ({"hidden_size": "64"}, "model"),
    ({"num_attention_heads": 0}, "model"), ({"num_key_value_heads": 3}, "model"), ({"rope_theta": float("nan")}, "rope_theta"),
    ({"hidden_act": "os.system"}, "model"), ({"quantization_config": []}, "model"), ({"sliding_window": "16"}, "sliding_window"),
    ({"sliding_window": {}}, "sliding_window"), ({"text_config": {"sliding_window": []}}, "sliding_window"),
    ({"model_type": ["llama"]}, "model"), ({"vocab_size": 640}, "model.safetensors")])
def test_a_hostile_configuration_is_refused_before_it_takes_memory(folder, changes, word):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(folder, word)


@pytest.mark.parametrize("text", ['{"model_type": "llama", "model_type": "gpt2"}', "[1]", "{", "\udcff", "[" * 100_000])
def test_a_configuration_that_is_not_one_object_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, "config.json")


def test_an_enormous_json_file_is_refused_before_it_is_read(folder):
    os.truncate(folder / "tokenizer.json", trust.LARGEST_JSON + 1)
    refused(folder, "tokenizer.json", "needs more than")


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
GROW = "{% set ns = namespace(text='x') %}{% for a in range(60) %}{% set ns.text = ns.text ~ ns.text %}{% endfor %}{{ ns.text }}"


@pytest.mark.parametrize("template, said", [
    (LOOP, "did not end within"), (GROW, "needed more than"), ("{{ 'x' * 3000000 }}", "wrote more than"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", None), ("{{ 10 ** (10 ** 10) }}", "did not end within")])
def test_a_template_that_does_not_end_is_killed_in_a_process_of_its_own(folder, monkeypatch, template, said):
    real, children = os.fork, []
    monkeypatch.setattr(os, "fork", lambda: (children.append(real()), children[-1])[1])
    # what ends by itself has time to, on a busy machine too
    monkeypatch.setattr(trust, "SECONDS", 1 if said == "did not end within" else 30)
    trust._try.cache_clear()  # a template is tried once a process
    (folder / "chat_template.jinja").write_text(template)
    began = time.monotonic()
    if said is not None:
        refused(folder, f"the chat template that came with the model {said}")
    else:  # it ends by itself, in an error, which the first row tells
        with pytest.raises(ValueError, match="the chat template refuses this chat"):
            data.end_of_turn(data.load_tokenizer(str(folder)))
    assert time.monotonic() - began < trust.SECONDS + 30
    assert children, "it was not tried in a process of its own"
    for child in children:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)  # nobody is left behind, not even as a zombie


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__init__.__globals__ }}", "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}", "{{ cycler.__init__.__globals__.os.system('touch canary') }}", "{{ raise_exception.__globals__ }}"])
def test_a_template_reaches_neither_files_nor_python(folder, tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    (folder / "chat_template.jinja").write_text(template + CHATML)
    try:
        tokenizer = data.load_tokenizer(str(folder))
        text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        assert "<class" not in text and pathlib.Path("/etc/hostname").read_text().strip() not in text and "builtins" not in text
    except Exception as error:
        refusals = ("ValueError", "SecurityError", "TemplateNotFound", "TemplateRuntimeError", "UndefinedError", "TypeError")
        assert type(error).__name__ in refusals, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_template_is_tried_once_a_process_and_a_good_one_passes(folder, monkeypatch):
    data.load_tokenizer(str(folder))
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("tried again"))
    data.load_tokenizer(str(folder))


def test_an_adapter_by_a_stranger_is_checked_like_weights(folder, tmp_path, tiny_inputs):
    settings = settings_of(tiny_inputs, tmp_path / "tiny.json")
    arguments = lambda name, *more: [str(settings), f"--out={tmp_path / name}", "--train.max_steps=1", "--schedule.lr_warmup_steps=0",
                                     *more]
    assert train.main(arguments("run")) == 0
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(tmp_path / "run/checkpoints/step-000001" / name, adapter)
    assert train.main(arguments("second", f"--lora.init_from={adapter}")) == 0
    good = (adapter / "adapter_model.safetensors").read_bytes()
    for content, word in ((header("{}", length=1 << 62), "header claims"),
                          (header(f'{{"a":{ONE},"a":{ONE}}}', bytes(4)), "stands twice"), (good[:-9], "cut short|entry of"),
                          (header(f'{{"../a":{ONE}}}', bytes(4)), "in the file but not in the model|targets")):
        (adapter / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=word):
            train.main(arguments("third", f"--lora.init_from={adapter}"))
    (adapter / "adapter_model.safetensors").write_bytes(good)
    for text, word in (('{"r": 4, "r": 8}', "stands twice"), ("[]", "JSON object"), ("{}", "adapter_config.json"),
                       ('{"r": "four", "lora_alpha": 8, "lora_dropout": 0}', "adapter_config.json"),
                       ('{"r": 4, "lora_alpha": {}, "lora_dropout": 0}', "adapter_config.json"),
                       ('{"r": 99999999999, "lora_alpha": 8, "lora_dropout": 0.0}', "lora.init_from|lora.r")):
        (adapter / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=word):
            train.main(arguments("third", f"--lora.init_from={adapter}"))
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("row", [
    {"text": "word " * 2_000_000},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 2_000_000}]},
], ids=["text", "chat"])
def test_a_row_of_ten_megabytes_is_named_or_listed_before_it_is_encoded(folder, tmp_path, row):
    rows = tmp_path / "rows.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows.write_text("".join(json.dumps(each) + "\n" for each in (good, row, good)))
    tokenizer, began = data.load_tokenizer(str(folder)), time.monotonic()
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"rows.jsonl:2: has 10,000,\d\d\d characters, more than 4,000,000: .*split it"):
        data.tokenize(data.read_rows(str(rows)), tokenizer, config.Data())
    kept = data.tokenize(data.read_rows(str(rows)), tokenizer, config.Data(bad_rows="skip"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(kept) == 2 and [message.split(": ")[0].rpartition("/")[2] for message in kept.skipped] == ["rows.jsonl:2"]
    assert peak < 400 << 20 and time.monotonic() - began < 60


def test_a_line_that_does_not_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_LINE", 1000)
    (tmp_path / "rows.jsonl").write_text('{"text": "' + "a" * 9000 + '"}\n{"text": "' + "b" * 987 + '"}\n{"text": "c"}\n' + "d" * 1000)
    found = [(name.rpartition(":")[2], str(record)[:25]) for name, record in data.read_rows(str(tmp_path / "rows.jsonl"), "skip")]
    assert found == [("1", "has more than 1,000 bytes"), ("2", str({"text": "b" * 987})[:25]), ("3", "{'text': 'c'}"),
                     ("4", "has more than 1,000 bytes")]
    with pytest.raises(ValueError, match=r"rows.jsonl:1: has more than 1,000 bytes, .*split it"):
        data.read_rows(str(tmp_path / "rows.jsonl"))


def test_a_chat_of_so_many_turns_that_to_find_the_answers_would_take_hours_is_refused(folder):
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")] * 20_000
    tokenizer, began = data.load_tokenizer(str(folder)), time.monotonic()
    with pytest.raises(ValueError, match=r"rows:1: has 40,000 turns in [\d,]+ characters: .*split it"):
        data.tokenize([("rows:1", {"messages": turns})], tokenizer, config.Data())
    assert time.monotonic() - began < 30


def test_long_rows_are_encoded_a_few_at_a_time_and_are_the_same_rows(folder, monkeypatch):
    words = ["word " * (40 + n) for n in range(40)]
    records = [(f"rows:{n}", {"text": text} if n % 7 else {"text": 3}) for n, text in enumerate(words)]
    tokenizer, settings, sizes, real = data.load_tokenizer(str(folder)), config.Data(bad_rows="skip", max_length=256), [], tokens._encode
    whole = data.tokenize(records, tokenizer, settings)
    monkeypatch.setattr(tokens, "_encode", lambda texts, tokenizer: (sizes.append(sum(map(len, texts))), real(texts, tokenizer))[1])
    monkeypatch.setattr(tokens, "CHUNK_TEXT", 1000)
    pieces = data.tokenize(records, tokenizer, settings)
    assert len(sizes) > 5 and max(sizes) <= 1000
    for what in ("digest", "counts", "skipped", "names", "too_long"):
        assert getattr(pieces, what) == getattr(whole, what)
    assert whole.counts["rows_truncated"] and whole.too_long and whole.skipped


@pytest.mark.parametrize("option, said", [
    ("--data.chat_template=/dev/zero", "characters or more"), ("--eval.prompts=/dev/zero", "bytes or more"),
    ("--data.train={folder}/endless.jsonl", "is not a kind of file"),
    ("--lora.r=1000000000", "beyond the width of every projection")])
def test_settings_that_ask_for_what_has_no_end_are_refused_before_it_takes_memory(tiny_inputs, tmp_path, option, said):
    (tmp_path / "endless.jsonl").symlink_to("/dev/zero")
    tracemalloc.start()
    with pytest.raises(ValueError, match=said):
        settings = settings_of(tiny_inputs, tmp_path / "tiny.json")
        train.main([str(settings), f"--out={tmp_path / 'run'}", option.replace("{folder}", str(tmp_path))])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 << 20 and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def stopped(tiny_inputs, tmp_path_factory):
    """(settings, run folder) of a run of 4 steps, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped")
    settings = settings_of(tiny_inputs, folder / "tiny.json")
    assert train.main([str(settings), f"--out={folder / 'run'}", "--train.max_steps=4", "--save.every_steps=2",
                       "--schedule.lr_warmup_steps=0", "--eval.every_steps=0"]) == 0
    return settings, folder / "run"


def reseal(folder, step):
    """A manifest that agrees with whatever lies in the folder: what somebody hostile would write."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
             for path in folder.iterdir() if path.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"format": checkpoint.FORMAT, "step": step, "files": files}))


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HOSTILE = [("state.json", {"norms": [[1, "x"]]}), ("state.json", {"norms": 7}), ("state.json", {"evaluated": "4"}),
           ("state.json", {"plan": []}), ("state.json", {"plan": {"max_tokens": -1}}),
           ("state.json", {"plan": {"max_tokens": "9" * 99}}), ("state.json", {"samples": -1}), ("state.json", {"samples": None}),
           ("state.json", {"line": {"train/loss": []}}), ("state.json", {"line": {"train/loss": "low"}}),
           ("state.json", {"line": {"step": 3}}), ("state.json", {"best_step": 3, "best_loss": 1.0}), ("state.json", {"evaluated": 3}),
           ("state.json", {"plan": {"max_tokens": 9}}), ("state.json", {"origin": []}),
           ("state.json", {"origin": {"model.compute_dtype": ["bf16"]}}),
           ("state.json", {"accepted": [3]}), ("state.json", {"best_loss": "low"}), ("state.json", {"without_improvement": 1e300}),
           ("optimizer.safetensors", lambda tensors: without(tensors, "step")),
           ("optimizer.safetensors", lambda tensors: tensors | {f"{A}.exp_avg": torch.zeros(3)}),
           ("optimizer.safetensors", lambda tensors: tensors | {"extra": torch.zeros(3)}),
           ("optimizer.safetensors", lambda tensors: tensors | {"step": torch.zeros(3)}),
           ("generators.safetensors", lambda tensors: {"torch": torch.zeros(7, dtype=torch.uint8)}),
           ("generators.safetensors", lambda tensors: {"torch": torch.zeros(5056)}),
           ("adapter_model.safetensors", lambda tensors: tensors | {A: torch.zeros(4, 63)}),
           ("adapter_model.safetensors", lambda tensors: without(tensors, A)),
           ("adapter_model.safetensors", lambda tensors: tensors | {A: tensors[A].to(torch.complex64)})]


@pytest.mark.parametrize("file, change", HOSTILE)
def test_a_checkpoint_of_strange_content_is_refused_by_its_file_though_its_hashes_are_right(stopped, tmp_path, file, change):
    settings, run = stopped
    folder = tmp_path / "step-000002"
    shutil.copytree(run / "checkpoints/step-000002", folder)
    if file == "state.json":
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    else:
        changed = change(safetensors.torch.load_file(folder / file))
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in changed.items()}, folder / file)
    reseal(folder, 2)
    with pytest.raises(ValueError) as caught:
        continuation.load_checkpoint(folder)
        train.main([str(settings), f"--out={tmp_path / 'run'}", f"--resume={folder}", "--train.max_steps=4",
                    "--schedule.lr_warmup_steps=0", "--eval.every_steps=0"])
    assert str(folder) in str(caught.value) and not (tmp_path / "run").exists()
