"""The quick start: its rows are many, distinct, the same every time and split by module; its model folder is what it says."""
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy
import pytest

from quickstart import model as quickstart_model
from quickstart import rows as quickstart_rows

PROJECT = pathlib.Path(quickstart_rows.__file__).resolve().parent.parent
MODEL = quickstart_model.OUT


def run_rows(*arguments, hash_seed="0", path=""):
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    return subprocess.run([sys.executable, str(PROJECT / "quickstart" / "rows.py"), *map(str, arguments)],
                          env=environment, capture_output=True, text=True)


def read(folder):
    return tuple([json.loads(line) for line in (folder / f"python-docs-{split}.jsonl").read_text(encoding="utf-8").splitlines()]
                 for split in ("train", "eval"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(training rows, evaluation rows), made in a process of its own: a test runner replaces hooks of sys, and so their documentation."""
    folder = tmp_path_factory.mktemp("rows")
    done = run_rows("--out", folder)
    assert done.returncode == 0 and not done.stderr, "every source file of the standard library can be parsed"
    assert sorted(p.name for p in folder.iterdir()) == ["python-docs-eval.jsonl", "python-docs-train.jsonl"]
    return read(folder)


def question(row):
    return row["messages"][0]["content"]


def answer(row):
    return row["messages"][1]["content"]


# ---------------------------------------------------------------- rows

def test_standard_library_alone_gives_5000_rows_and_about_300_to_evaluate(made):
    train, evaluation = made
    assert len(train) + len(evaluation) >= 5000
    assert 250 <= len(evaluation) <= 400


def test_rows_are_the_same_in_another_process_with_another_hash_seed(made, tmp_path):
    done = run_rows("--out", tmp_path, hash_seed="4711")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path) == made


def test_every_row_is_one_question_and_one_answer(made):
    for row in (*made[0], *made[1]):
        assert list(row) == ["messages"] and [list(turn) for turn in row["messages"]] == [["role", "content"]] * 2
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        for text in (question(row), answer(row)):
            assert text == text.strip() and text.isprintable() and 3 <= len(text) <= 700, row
            text.encode("utf-8")


def test_no_question_and_no_answer_occurs_twice(made):
    everything = [*made[0], *made[1]]
    assert len({question(row) for row in everything}) == len(everything)
    assert len({answer(row) for row in everything}) == len(everything)


def test_no_module_is_in_both_splits(made):
    train, evaluation = ({re.search(r"`(\w+)", question(row))[1] for row in rows} for rows in made)
    assert len(evaluation) >= 8, "evaluation rows come from many modules"
    assert not train & evaluation


def test_rows_ask_what_things_do_how_they_are_called_and_which_one_it_is(made):
    train, evaluation = made
    for rows in (train, evaluation):
        call = sum(question(row).startswith(("How is", "What is the signature", "Which arguments")) for row in rows)
        which = sum("described as:" in question(row) or "fits this description?" in question(row) for row in rows)
        assert min(call, which, len(rows) - call - which) > len(rows) / 8


def test_well_known_functions_are_documented_by_name(made):
    documented = {question(row) + " " + answer(row) for row in (*made[0], *made[1])}
    for call in ("`str.removeprefix(prefix, /)`", "`math.isclose(a, b, *, rel_tol=1e-09, abs_tol=0.0)`",
                 "`textwrap.fill(text, width=70, **kwargs)`", "`os.path.expanduser(path)`"):
        assert any(text.endswith(call) for text in documented), call


def test_no_python_source_is_executed_to_read_its_documentation(tmp_path):
    canary = tmp_path / "canary_package.py"
    canary.write_text('"""A package that must never be imported by anybody."""\nraise SystemExit("imported")\n')
    code = ("import sys; sys.path[:0] = sys.argv[1:]; import sysconfig; sysconfig.get_path('stdlib'); from quickstart import rows; import _pickle; "
            "import json; before = set(sys.modules); entries, unread = rows.collect(['canary_package']); assert entries and not unread; "
            "print(json.dumps([m for m in set(sys.modules) - before if str(getattr(sys.modules[m], '__file__', '')).endswith('.py')]))")
    done = subprocess.run([sys.executable, "-c", code, str(PROJECT), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # sysconfig reads the build's own settings from a generated file; anything else would be a module whose code was run.
    assert [name for name in json.loads(done.stdout) if not name.startswith("_sysconfigdata")] == []


def test_installed_packages_are_added_on_request_and_do_not_disturb_the_rest(made, tmp_path):
    package = tmp_path / "site" / "kettle"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""Boil water without watching it."""\n')
    (package / "whistle.py").write_text('def sound(pitch, *, loud=False):\n    """Make the noise that ends a quiet morning."""\n')
    (package / "broken.py").write_text("def (:\n")
    done = run_rows("--packages", "kettle", "--out", tmp_path / "out", path=str(tmp_path / "site"))
    assert done.returncode == 0 and "broken.py" in done.stderr
    train, evaluation = read(tmp_path / "out")
    assert {answer(row) for row in train + evaluation} - {answer(row) for row in (*made[0], *made[1])} == {
        "Boil water without watching it.", "Make the noise that ends a quiet morning.",
        "`kettle.whistle.sound(pitch, *, loud=False)`", "`kettle.whistle.sound`"}


def test_a_package_that_is_not_installed_is_refused_by_name_and_nothing_is_written(tmp_path):
    for name in ("no_such_package", "json.decoder"):
        done = run_rows("--packages", name, "--out", tmp_path)
        assert done.returncode == 2 and repr(name) in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_older_file_as_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    quickstart_rows.write(path, [{"messages": []}])
    with pytest.raises(TypeError):
        quickstart_rows.write(path, [{"messages": []}, {"messages": object()}])
    assert path.read_text() == '{"messages": []}\n'


SOURCE = '''
"""Tools for tea, in many words."""
import typing
if typing.TYPE_CHECKING:
    def pour(cup): "Fill the cup to its brim, slowly."
else:
    def pour(cup, slowly: bool = True): "This second definition of the name is not read."
def _hidden(): """Nobody should ever see this sentence."""
class Pot:
    """A vessel :class:`~tea.Vessel` that holds ``hot`` water."""
    def __init__(self, litres: float = 1.0): self.litres = litres
    @property
    def level(self):
        """How much water is left in the pot."""
    @staticmethod
    def brew(leaves, /, *minutes):
        """brew(leaves, *minutes)

        Turn leaves and water into tea"""
    @classmethod
    def named(cls, name="Earl"): """Make a pot that has a name of its own."""
'''


def test_entries_of_a_source_file_are_its_public_things_with_calls_and_first_paragraphs():
    entries = [(e.kind, e.name, e.signature, e.words) for e in quickstart_rows.from_source(SOURCE, "tea")]
    assert entries == [
        ("module", "tea", "", "Tools for tea, in many words."),
        ("function", "tea.pour", "tea.pour(cup)", "Fill the cup to its brim, slowly."),
        ("class", "tea.Pot", "tea.Pot(litres=1.0)", "A vessel `tea.Vessel` that holds `hot` water."),
        ("property", "tea.Pot.level", "", "How much water is left in the pot."),
        ("method", "tea.Pot.brew", "tea.Pot.brew(leaves, /, *minutes)", "Turn leaves and water into tea."),
        ("method", "tea.Pot.named", "tea.Pot.named(name='Earl')", "Make a pot that has a name of its own."),
    ]


@pytest.mark.parametrize("doc, words", [
    ("", ""), (None, ""), ("Too short.", ""), ("and the rest of a sentence somebody began", ""),
    (">>> 1 + 1 is an example and no description", ""),
    ("First line of it\n    and its second.\n\n    A second paragraph.", "First line of it and its second."),
    ("A sentence that is kept. " + "Words without an end " * 30, "A sentence that is kept."),
    ("One sentence without an end " * 30, ""),
])
def test_descriptions_are_whole_sentences_of_the_first_paragraph_or_nothing(doc, words):
    assert quickstart_rows.describe(doc) == words


# ---------------------------------------------------------------- the model folder

needs_model = pytest.mark.skipif(not (MODEL / "model.safetensors").is_file(), reason="models/SmolLM2-135M-Instruct is not there: make setup")


@pytest.fixture(scope="module")
def tokenizer():
    import transformers
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    import torch
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@needs_model
def test_eos_is_what_the_template_writes_after_an_assistant_turn(tokenizer):
    chat = [{"role": "user", "content": "Is tea a soup?"}, {"role": "assistant", "content": "No."}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False).input_ids
    prompt = tokenizer(tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True), add_special_tokens=False).input_ids
    said = tokenizer("No.", add_special_tokens=False).input_ids
    assert ids[:len(prompt) + len(said)] == prompt + said
    terminator = ids[len(prompt) + len(said)]
    assert tokenizer.decode([terminator]) == "<|im_end|>" and tokenizer.eos_token_id == terminator
    for name in ("config.json", "generation_config.json"):
        assert json.loads((MODEL / name).read_text())["eos_token_id"] == terminator, name


@needs_model
def test_encoding_adds_no_token_of_its_own_and_decoding_keeps_spaces(tokenizer):
    text = "Well , is it 12 o'clock ?"
    ids = tokenizer(text).input_ids
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


@needs_model
def test_end_of_turn_does_not_trust_the_tokenizers_eos(tokenizer):
    import copy
    wrong = copy.deepcopy(tokenizer)
    wrong.eos_token = "<|im_start|>"
    assert wrong.decode([quickstart_model.end_of_turn(wrong)]) == "<|im_end|>"
    wrong.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match="without a special token"):
        quickstart_model.end_of_turn(wrong)


@needs_model
def test_embedding_and_head_are_one_tensor_stored_once(model):
    import safetensors
    assert json.loads((MODEL / "config.json").read_text())["tie_word_embeddings"] is True
    with safetensors.safe_open(MODEL / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def q4_1(blocks, rows):
    """Q4_1 by its definition: 20 bytes hold 32 weights d * q + m, with fp16 d and m and q in low nibbles first, then high ones."""
    blocks = blocks.reshape(-1, 20)
    scale, offset = blocks[:, :4].copy().view(numpy.float16).astype(numpy.float64).T[..., None]
    codes = numpy.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (scale * codes + offset).reshape(rows, -1)


@needs_model
def test_weights_are_those_of_the_gguf_file_rounded_to_bf16():
    import gguf
    import safetensors
    try:
        packaged = quickstart_model.packaged_gguf()
    except ValueError as error:
        pytest.skip(str(error))
    packed = {tensor.name: tensor for tensor in gguf.GGUFReader(str(packaged)).tensors}
    with safetensors.safe_open(MODEL / "model.safetensors", "pt") as file:
        for theirs, ours in (("blk.3.ffn_up", "layers.3.mlp.up_proj"), ("blk.29.attn_k", "layers.29.self_attn.k_proj")):
            stored = file.get_tensor(f"model.{ours}.weight").double().numpy()
            tensor = packed[theirs + ".weight"]
            assert tensor.tensor_type.name == "Q4_1"
            exact = q4_1(numpy.asarray(tensor.data), len(stored))
            if "attn" in theirs:  # GGUF keeps the two halves of each head's rotated pairs interleaved
                exact = exact.reshape(3, 32, 2, -1).swapaxes(1, 2).reshape(exact.shape)
            assert numpy.abs(stored - exact).max() <= numpy.abs(exact).max() * 2 ** -8
            assert numpy.abs(stored - exact).max() > 0, "bf16 does round"


@needs_model
def test_model_answers_a_question_and_stops_by_itself(model, tokenizer):
    import torch
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        ids = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    assert "Paris" in tokenizer.decode(ids)
    assert len(ids) < 32 and ids[-1] == tokenizer.eos_token_id


def test_a_package_without_its_model_file_is_refused_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / quickstart_model.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, quickstart_model.PACKAGE, raising=False)
    with pytest.raises(ValueError, match="must hold one GGUF file"):
        quickstart_model.packaged_gguf()
    (package / "tiny.gguf").write_bytes(b"GGUF")
    assert quickstart_model.packaged_gguf() == package / "tiny.gguf"


def fake_convert(gguf, folder):
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())
    (folder / "config.json").write_text("{}")


def killed_convert(gguf, folder):
    fake_convert(gguf, folder)
    raise KeyboardInterrupt


def test_a_killed_conversion_leaves_nothing_whole_and_the_next_one_sweeps_it(tmp_path, monkeypatch):
    source, folder = tmp_path / "tiny.gguf", tmp_path / "models" / "tiny"
    source.write_bytes(b"weights")
    monkeypatch.setattr(quickstart_model, "convert", killed_convert)
    with pytest.raises(KeyboardInterrupt):
        quickstart_model.make(source, folder)
    assert not folder.exists() and not quickstart_model.is_complete(folder) and len(list(folder.parent.iterdir())) == 1
    monkeypatch.setattr(quickstart_model, "convert", fake_convert)
    assert quickstart_model.make(source, folder) is True
    assert list(folder.parent.iterdir()) == [folder] and quickstart_model.is_complete(folder)


def test_a_complete_folder_is_left_alone_and_a_damaged_one_made_anew(tmp_path, monkeypatch):
    source, folder = tmp_path / "tiny.gguf", tmp_path / "tiny"
    source.write_bytes(b"weights")
    monkeypatch.setattr(quickstart_model, "convert", fake_convert)
    assert quickstart_model.make(source, folder) is True
    monkeypatch.setattr(quickstart_model, "convert", killed_convert)
    assert quickstart_model.make(source, folder) is False
    monkeypatch.setattr(quickstart_model, "convert", fake_convert)
    for damage in (lambda: (folder / "model.safetensors").write_bytes(b"wei"), lambda: (folder / "config.json").unlink()):
        damage()
        assert quickstart_model.make(source, folder) is True
        assert (folder / "model.safetensors").read_bytes() == b"weights" and quickstart_model.is_complete(folder)


def test_a_folder_of_somebody_elses_and_a_missing_file_are_refused(tmp_path):
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("chapter 1")
    source = tmp_path / "tiny.gguf"
    with pytest.raises(ValueError, match="no file"):
        quickstart_model.make(source, folder)
    source.write_bytes(b"weights")
    with pytest.raises(ValueError, match="did not make"):
        quickstart_model.make(source, folder)
    assert (folder / "thesis.txt").read_text() == "chapter 1"
