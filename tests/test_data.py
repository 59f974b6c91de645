"""Which tokens are supervised, which rows are refused, and what packing keeps. The tokenizer is made here: bytes, and a few special tokens."""
import csv
import gzip
import json
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import config
import data
import tokens

ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASKED
CALLING = CHATML.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or () %}{{ (c.function or c).name }}(){% endfor %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
          "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
THINKING = ("{% for m in messages %}<|im_start|>{{ m.role }}\n"  # as Qwen3: only the last turn keeps its thoughts
            "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning or '' }}</think>{% endif %}"
            "{{ m.content }}<|im_end|>\n{% endfor %}") + ASKED
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Peru?"}, {"role": "assistant", "content": "Lima."}]


def make_tokenizer(template=CHATML, eos="<|im_end|>", bos=None, adds_bos=False, merges=(), stretched=(), reaching=(), extra=()):
    """Byte-level BPE: a token a byte, the `merges` on top, the special tokens first; `stretched` ones take in the
    space behind them, `reaching` ones the space before."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *extra] + letters + ["".join(pair) for pair in merges])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = lambda text: AddedToken(text, special=True, normalized=False, rstrip=text in stretched, lstrip=text in reaching)
    tokenizer.add_special_tokens(list(map(added, [*SPECIAL, *extra])))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, chat_template=template)


def settings_of(**changes):
    return config.from_dict({"data": changes}).data


def tokenized(rows, tokenizer=None, **changes):
    return data.tokenize([(f"rows.jsonl:{i}", row) for i, row in enumerate(rows, 1)], tokenizer or make_tokenizer(), settings_of(**changes))


def ids_of(rows, r):
    return rows.ids[rows.offsets[r]:rows.offsets[r + 1]].tolist()


def spans_of(rows, r, tokenizer):
    """The decoded runs of supervised tokens of row r: what a reader of the mask sees."""
    spans, previous = [], False
    for token, supervised in zip(ids_of(rows, r), rows.supervised[rows.offsets[r]:rows.offsets[r + 1]]):
        if supervised:
            spans = spans if previous else spans + [[]]
            spans[-1].append(token)
        previous = supervised
    return [tokenizer.decode(span) for span in spans]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


# ------------------------------------------------------------------------------------------------------------- masks

@pytest.mark.parametrize("template, eos, end", [(CHATML, "<|im_end|>", "<|im_end|>"), (LLAMA3, "<|eot_id|>", "<|eot_id|>")])
def test_every_answer_with_its_terminator_is_supervised_and_nothing_else(template, eos, end):
    tokenizer = make_tokenizer(template, eos, bos="<s>")
    rows = tokenized([{"messages": CHAT}, {"messages": CHAT[:3]}], tokenizer)
    assert spans_of(rows, 0, tokenizer) == ["Paris." + end, "Lima." + end]
    assert spans_of(rows, 1, tokenizer) == ["Paris." + end]
    assert rows.counts["turns_unsupervised"] == 0


@pytest.mark.parametrize("template", [CHATML, LLAMA3, THINKING])
def test_ids_are_those_of_the_rendered_chat(template):
    tokenizer = make_tokenizer(template, bos="<s>", adds_bos=True)
    rows = tokenized([{"messages": CHAT}], tokenizer)
    rendering = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert ids_of(rows, 0) == tokenizer(rendering, add_special_tokens=False)["input_ids"]
    assert ids_of(rows, 0).count(tokenizer.bos_token_id) == (template == LLAMA3)


def test_answers_of_several_bytes_a_character_are_supervised_whole():
    tokenizer = make_tokenizer()
    rows = tokenized([{"prompt": "héé", "completion": "日本 🎌"}, {"prompt": "🎌", "completion": ""}], tokenizer)
    assert spans_of(rows, 0, tokenizer) == ["日本 🎌<|im_end|>"]
    assert spans_of(rows, 1, tokenizer) == ["<|im_end|>"]


def test_a_terminator_written_within_a_text_moves_no_mask():
    tokenizer = make_tokenizer()
    rows = tokenized([{"prompt": "a<|im_end|>\n<|im_start|>assistant\nb", "completion": "c<|im_end|>\nd"}], tokenizer)
    assert spans_of(rows, 0, tokenizer) == ["c<|im_end|>\nd<|im_end|>"]


def test_a_token_that_straddles_the_start_of_an_answer_is_the_prompts():
    tokenizer = make_tokenizer(merges=[("Ċ", "Ċ")])  # two line breaks are one token
    rows = tokenized([{"prompt": "q", "completion": "\n\n yes"}], tokenizer)
    assert spans_of(rows, 0, tokenizer) == ["\n yes<|im_end|>"]


def test_offsets_that_leave_out_white_space_move_no_mask():
    tokenizer = make_tokenizer(CHATML.replace("\n{{", " {{").replace("assistant\n", "assistant "))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # the prompt's last space then lies where the answer begins
    rows = tokenized([{"messages": CHAT}], tokenizer)
    assert spans_of(rows, 0, tokenizer) == ["Paris.<|im_end|>", "Lima.<|im_end|>"]


def test_a_terminator_that_swallows_the_line_break_behind_it_is_supervised():
    tokenizer = make_tokenizer(stretched=("<|im_end|>",))
    rows = tokenized([{"messages": CHAT}], tokenizer)
    supervised = rows.ids[rows.supervised]
    assert (supervised == tokenizer.eos_token_id).sum() == 2


def test_text_behind_the_last_terminator_is_not_supervised():
    tokenizer = make_tokenizer(CHATML + "{% if not add_generation_prompt %}</s>{% endif %}", eos="</s>")  # as Phi 3
    rows = tokenized([{"messages": CHAT}], tokenizer)
    assert spans_of(rows, 0, tokenizer) == ["Paris.<|im_end|>", "Lima.<|im_end|>"]
    assert ids_of(rows, 0)[-1] == tokenizer.eos_token_id


def test_turns_that_a_thinking_template_shows_otherwise_are_left_out_and_counted():
    tokenizer = make_tokenizer(THINKING)
    chat = [dict(turn, reasoning="hm") if turn["role"] == "assistant" else turn for turn in CHAT]
    rows = tokenized([{"messages": chat}, {"messages": chat[:3]}], tokenizer)
    assert spans_of(rows, 0, tokenizer) == ["<think>hm</think>Lima.<|im_end|>"]
    assert spans_of(rows, 1, tokenizer) == ["<think>hm</think>Paris.<|im_end|>"]
    assert rows.counts["turns_unsupervised"] == 1
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*which tokens to supervise"):
        tokenized([{"messages": chat[:4]}], tokenizer)
    assert tokenized([{"messages": chat[:4]}], tokenizer, supervise="all").counts["rows"] == 1


def test_an_opening_assistant_turn_has_no_prompt_and_is_not_supervised():
    tokenizer = make_tokenizer()
    rows = tokenized([{"messages": [{"role": "assistant", "content": "Hello."}] + CHAT[1:3]}], tokenizer)
    assert spans_of(rows, 0, tokenizer) == ["Paris.<|im_end|>"]
    assert rows.counts["turns_unsupervised"] == 1


def test_supervise_all_leaves_out_only_first_tokens():
    rows = tokenized([{"messages": CHAT}, {"text": "free"}], supervise="all")
    assert np.flatnonzero(~rows.supervised).tolist() == rows.offsets[:-1].tolist()


def test_no_first_token_is_ever_supervised():
    tokenizer = make_tokenizer(template=None, eos="</s>")
    rows = tokenized([{"text": "ab"}, {"prompt": "", "completion": "c"}], tokenizer)
    assert spans_of(rows, 0, tokenizer) == ["b</s>"] and spans_of(rows, 1, tokenizer) == ["</s>"]


def test_tool_turns_and_tools_reach_the_template_and_nulls_do_not():
    template = "{% if tools %}{{ tools[0].name }}|{% endif %}{% for m in messages %}{% if m.name is defined %}!{% endif %}{% endfor %}" + CALLING
    tokenizer = make_tokenizer(template)
    called = [{"role": "assistant", "content": None, "tool_calls": [{"name": "map"}]}, {"role": "tool", "content": "Paris", "name": None}]
    chat = [CHAT[1], *called, CHAT[2]]
    rows = tokenized([{"messages": chat, "tools": [{"name": "map"}]}], tokenizer)
    assert tokenizer.decode(ids_of(rows, 0)).startswith("map|<|im_start|>user")
    assert spans_of(rows, 0, tokenizer) == ["map()<|im_end|>", "Paris.<|im_end|>"] and rows.counts["turns_hidden"] == 0


@pytest.mark.parametrize("calls", [5, "map()", [1], [{}], [{"function": {}}], [{"function": {"name": 5}}], {"name": "map"}])
def test_tool_calls_without_a_name_are_refused_since_they_would_teach_to_say_nothing(calls):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: messages, turn 2: tool_calls must be a list of calls"):
        tokenized([{"messages": [CHAT[1], {"role": "assistant", "content": "", "tool_calls": calls}]}], make_tokenizer(CALLING))


def test_a_template_that_refuses_even_two_words_is_named_with_its_key():
    with pytest.raises(ValueError, match=r"^data.chat_template: tried on a chat of two words, .*no systems.*give another template"):
        tokenized([{"messages": CHAT}], make_tokenizer("{{ raise_exception('no systems') }}"))


def test_what_a_template_does_not_show_is_counted_and_an_answer_without_its_tool_calls_teaches_nothing():
    called = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "map"}}]}, {"role": "tool", "content": "dry"}]
    row = {"messages": [CHAT[1], *called, CHAT[2]], "tools": [{"type": "function", "function": {"name": "map"}}]}
    rows = tokenized([row, {"messages": CHAT}], make_tokenizer())
    assert spans_of(rows, 0, make_tokenizer()) == ["Paris.<|im_end|>"]  # and no empty answer
    assert (rows.counts["turns_unsupervised"], rows.counts["turns_hidden"]) == (1, 2)  # the call, and the tool
    deaf = make_tokenizer(CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"))
    assert tokenized([row], deaf).counts["turns_hidden"] == 3
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*shows no assistant turn"):
        tokenized([{"messages": [CHAT[1], called[0]]}], make_tokenizer())


# ----------------------------------------------------------------------------------------------------- tokens that end

def test_end_of_turn_comes_from_the_template_not_from_the_named_eos():
    name = SPECIAL.index
    assert data.end_of_turn(make_tokenizer()) == [name("<|im_end|>")]
    assert data.end_of_turn(make_tokenizer(eos="<|im_start|>")) == [name("<|im_end|>")]  # what the packaged GGUF file says
    assert data.end_of_turn(make_tokenizer(LLAMA3, eos="</s>", bos="<s>")) == [name("<|eot_id|>"), name("</s>")]
    assert data.end_of_turn(make_tokenizer(template=None, eos="</s>")) == [name("</s>")]


def test_text_ends_with_one_eos_and_begins_with_bos_where_the_tokenizer_adds_it():
    rows = tokenized([{"text": "ab"}, {"text": "<s>ab</s>"}], make_tokenizer(LLAMA3, eos="</s>", bos="<s>", adds_bos=True))
    first = [SPECIAL.index("<s>"), *make_tokenizer()("ab")["input_ids"], SPECIAL.index("</s>")]
    assert ids_of(rows, 0) == ids_of(rows, 1) == first
    assert ids_of(tokenized([{"text": "ab"}], make_tokenizer(LLAMA3, eos="</s>", bos="<s>")), 0) == first[1:]


def test_a_second_bos_is_refused_by_row():
    tokenizer = make_tokenizer("{{ bos_token }}" + LLAMA3, bos="<s>")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: begins with two BOS"):
        tokenized([{"messages": CHAT}], tokenizer)


@pytest.mark.parametrize("template, eos, remedy", [
    (None, None, "neither a chat template nor an eos token.*chat_template=FILE"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "</s>", "no special token behind the answer"),
    ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", None, "no special token behind the answer.*eos_token"),
    ("{{ messages[0].content }}</s>", "</s>", "no special token behind the answer"),
    ("{{ raise_exception('no chats here') }}", "</s>", "refuses this chat.*no chats here"),
    ("{% for", "</s>", "refuses this chat.*TemplateSyntaxError"),
])
def test_a_tokenizer_that_could_not_end_a_turn_is_refused(template, eos, remedy):
    with pytest.raises(ValueError, match=remedy):
        tokenized([{"messages": CHAT}], make_tokenizer(template, eos))


def test_a_chat_without_a_template_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*no chat template.*data\.chat_template=FILE"):
        tokenized([{"messages": CHAT}], make_tokenizer(template=None))


def test_an_end_that_is_not_encoded_as_its_token_is_refused_by_row():
    tokenizer = make_tokenizer(extra=["!<|im_end|>"])  # swallows the terminator of an answer that ends with an exclamation mark
    pair = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b!"}]
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the end of an assistant turn, '<\|im_end\|>', is not encoded"):
        tokenized(pair, tokenizer)
    assert tokenized(pair, tokenizer, bad_rows="skip").digest == tokenized(pair[:1], tokenizer).digest
    assert tokenized(pair, tokenizer, supervise="all").counts["rows"] == 2
    # it begins before the empty answer, with the prompt's line break
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the end of an assistant turn"):
        tokenized([{"prompt": "a", "completion": ""}], make_tokenizer(reaching=["<|im_end|>"]))


def test_a_turn_that_ends_otherwise_than_turns_do_is_left_out_and_counted():
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", "{{ '</s>' if m.tool_calls else '<|im_end|>' }}"))
    called = [{"role": "assistant", "content": "Let me look.", "tool_calls": [{"name": "map"}]}, {"role": "tool", "content": "x"}]
    rows = tokenized([{"messages": [CHAT[1], *called, CHAT[2]]}], tokenizer)
    assert spans_of(rows, 0, tokenizer) == ["Paris.<|im_end|>"] and rows.counts["turns_unsupervised"] == 1


# ------------------------------------------------------------------------------------------------------------- formats

EQUAL_ROWS = [  # the same chat, said in six ways
    {"messages": CHAT[1:3]},
    {"conversations": [{"from": "human", "value": "Capital of France?"}, {"from": "gpt", "value": "Paris."}]},
    {"instruction": "Capital of France?", "input": "", "output": "Paris.", "text": "what Alpaca's rows hold beside"},
    {"prompt": "Capital of France?", "completion": "Paris."},
    {"prompt": CHAT[1:2], "completion": CHAT[2:3]},
    {"prompt": CHAT[1:2], "completion": "Paris.", "id": 7},
]


def test_all_kinds_of_rows_say_the_same_chat():
    rows = tokenized(EQUAL_ROWS)
    assert len({tuple(ids_of(rows, r)) for r in range(6)}) == 1
    assert {tuple(spans_of(rows, r, make_tokenizer())) for r in range(6)} == {("Paris.<|im_end|>",)}
    assert rows.names == [f"rows.jsonl:{i}" for i in range(1, 7)]


def test_alpacas_input_stands_behind_its_instruction_and_system_texts_come_first():
    tokenizer = make_tokenizer()
    rows = tokenized([{"system": "Be brief.", "instruction": "Add.", "input": "1 2", "output": "3"},
                      {"system": "Be brief.", "conversations": EQUAL_ROWS[1]["conversations"]}], tokenizer)
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert tokenizer.decode(ids_of(rows, 0)) == system + "<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    assert tokenizer.decode(ids_of(rows, 1)) == tokenizer.apply_chat_template(CHAT[:3], tokenize=False)


def test_earlier_answers_in_a_prompt_of_messages_are_not_supervised():
    rows = tokenized([{"prompt": CHAT[:4], "completion": CHAT[4:]}])
    assert spans_of(rows, 0, make_tokenizer()) == ["Lima.<|im_end|>"]


def test_without_a_template_prompts_and_answers_are_joined_as_text():
    tokenizer = make_tokenizer(template=None, eos="</s>")
    rows = tokenized([{"prompt": "1+1=", "completion": "2"}, {"instruction": "Add.", "input": "1 1", "output": "2"}], tokenizer)
    assert [tokenizer.decode(ids_of(rows, r)) for r in range(2)] == ["1+1=2</s>", "Add.\n\n1 1\n\n2</s>"]
    assert [spans_of(rows, r, tokenizer) for r in range(2)] == [["2</s>"], ["2</s>"]]


TEXTS = [{"prompt": 'say "hi",\nplease', "completion": "hi, there\u2028friend"}, {"prompt": "é;", "completion": " 7"},
         {"prompt": "NA", "completion": "null"}]


def save_as(path, rows):
    name = path.name.removesuffix(".gz")
    if name.endswith(".csv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        content = path.read_bytes()
    elif name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        content = path.read_bytes()
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        content = ("\ufeff" + ("[" + ",\n".join(lines) + "]" if name == "list.json" else "\r\n".join(lines) + "\n\n")).encode()
    return write(path, gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("name, where", [("a.jsonl", ["1", "2", "3"]), ("lines.json", ["1", "2", "3"]), ("list.json", ["row 1", "row 2", "row 3"]),
                                         ("a.csv", ["2", "4", "5"]), ("a.parquet", ["row 1", "row 2", "row 3"]), ("a.jsonl.gz", ["1", "2", "3"]),
                                         ("a.csv.gz", ["2", "4", "5"]), ("A.JSONL", ["1", "2", "3"])])
def test_every_kind_of_file_gives_the_same_rows_with_their_places(tmp_path, name, where):
    source = save_as(tmp_path / name, TEXTS)
    assert data.read_rows(source) == [(f"{source}:{place}", row) for place, row in zip(where, TEXTS)]


def test_chats_in_parquet_survive_its_null_columns(tmp_path):
    chats = [{"messages": CHAT}, {"messages": [dict(turn, name="x") for turn in CHAT[:3]]}]
    rows = data.read_rows(save_as(tmp_path / "a.parquet", chats))
    read = data.tokenize(rows, make_tokenizer(), settings_of())
    assert read.digest == tokenized(chats).digest


def test_a_field_longer_than_the_csv_modules_limit_is_read(tmp_path):
    source = save_as(tmp_path / "a.csv", [{"text": "long " * 100_000}])
    assert len(data.read_rows(source)[0][1]["text"]) == 500_000


def test_a_hub_data_set_is_asked_for_its_split(monkeypatch):
    import datasets
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or [{"text": "a"}])
    assert data.read_rows("someone/rows") == [("someone/rows:row 1", {"text": "a"})]
    assert data.read_rows("someone/rows:test[:5]") == [("someone/rows:test[:5]:row 1", {"text": "a"})]
    assert asked == [("someone/rows", "train"), ("someone/rows", "test[:5]")]


# ----------------------------------------------------------------------------------------------------------- bad input

GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", GOOD + b'{"text": "bro\n', r"a\.jsonl:2: not valid JSON .*data\.bad_rows=skip"),
    ("a.jsonl", GOOD + b'{"text": "\xff"}\n', r"a\.jsonl:2: not JSON in UTF-8"),
    ("a.jsonl", GOOD + b"[" * 100_000, r"a\.jsonl:2: not JSON"),
    ("a.jsonl", b"", r"a\.jsonl: holds no rows"),
    ("a.jsonl", b"\xef\xbb\xbf\n \n", r"a\.jsonl: holds no rows"),
    ("a.jsonl", '{"text": "x"}'.encode("utf-16"), r"a\.jsonl:1: not JSON in UTF-8"),
    ("a.json", b"[]", r"a\.json: holds no rows"),
    ("a.json", b'[{"text": "x"},\n{"text": }]', r"a\.json:2: not valid JSON"),
    ("a.json", b'[{"text":\n"\xff"}]', r"a\.json:2: not UTF-8 \(byte 0xff\)"),
    ("a.csv", b"prompt,completion\n", r"a\.csv: holds no rows"),
    ("a.csv", b"", r"a\.csv: holds no rows"),
    ("a.csv", b"prompt,completion\na,b\nc\n", r"a\.csv:3: 1 fields where the header has 2"),
    ("a.csv", b'prompt,completion\na,b\nc,"d\ne\n', r"a\.csv:3: not valid CSV"),
    ("a.csv", b"prompt;completion\na;b\n", r"a\.csv:1: the columns seem to be set apart by ';'; save the file with commas"),
    ("a.json", b'{"data": [\n{"text": "a"}]}', r"a\.json:1: begins as one object over several lines; .*list"),
    ("a.csv", b"text,text\na,b\n", r"a\.csv:1: a column name stands twice"),
    ("a.csv", b"text\na\n\xe9\n", r"a\.csv:3: not UTF-8"),
    ("a.parquet", b"PAR1 no", r"a\.parquet: not a Parquet file"),
    ("a.jsonl.gz", b"not zipped", r"a\.jsonl\.gz: cannot be read"),
    ("a.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-12], r"a\.jsonl\.gz: cannot be read"),
    ("a.xml", b"<a/>", r"a\.xml: is not a kind of file .*\.jsonl, \.json, \.csv, \.parquet"),
])
def test_a_file_that_cannot_be_read_is_refused_with_its_line(tmp_path, name, content, message):
    source = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        data.read_rows(source)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file; .*make setup"):
        data.read_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="is not a kind of file"):
        data.read_rows(str(tmp_path))
    with pytest.raises(ValueError, match="someone/none: neither a file nor a hub data set .*NAME:SPLIT"):
        data.read_rows("someone/none")


BAD_ROWS = [
    (None, "must be an object with keys, got null"),
    ([1], r"must be an object with keys, got \[1\]"),
    ({}, r"the keys \(none\) make no row"),
    ({"question": "a", "answer": "b"}, "the keys question, answer make no row; one has messages;"),
    ({"prompt": "a"}, "the keys prompt make no row"),
    ({"text": None}, "text must be text, got null"),
    ({"text": ""}, "the text is empty"),
    ({"prompt": 3, "completion": "b"}, "prompt must be text, or a list of turns, got 3"),
    ({"prompt": "a", "completion": None}, "completion must be text, or a list of turns, got null"),
    ({"instruction": None, "output": "b"}, "instruction must be text, got null"),
    ({"messages": None}, "messages must be a list of at least one turn, got null"),
    ({"messages": []}, "messages must be a list of at least one turn"),
    ({"messages": ["hi"]}, 'messages, turn 1: must be an object with role and content, got "hi"'),
    ({"messages": [{"role": "user"}]}, "messages, turn 1: content must be text, got null"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages, turn 1: content must be text"),
    ({"messages": CHAT[:1] + [{"role": "robot", "content": "a"}]}, 'messages, turn 2: role must be one of system, .*, got "robot"'),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "messages, turn 1: role must be one of"),
    ({"conversations": [{"from": "narrator", "value": "a"}]}, 'conversations, turn 1: from must be one of human, gpt, .*, got "narrator"'),
    ({"messages": CHAT[:2]}, "no assistant turn"),
    ({"prompt": CHAT[:3], "completion": CHAT[1:2]}, "no assistant turn"),
    ({"text": "a\ud800b"}, r"half of a surrogate pair \(\\ud800\)"),
    ({"prompt": "a", "completion": "\udfff"}, r"half of a surrogate pair \(\\udfff\)"),
]


@pytest.mark.parametrize("row, message", BAD_ROWS)
def test_a_row_that_cannot_be_used_is_refused_by_name_with_the_reason(row, message):
    with pytest.raises(ValueError, match=rf"^rows\.jsonl:2: .*{message}.*data\.bad_rows=skip"):
        tokenized([{"text": "fine"}, row])


def test_skipped_rows_are_counted_and_listed(tmp_path):
    source = write(tmp_path / "a.jsonl", GOOD + b"{broken\n" + GOOD + b'{"messages": 1}\n')
    rows = data.tokenize(data.read_rows(source, "skip"), make_tokenizer(), settings_of(bad_rows="skip"))
    assert rows.names == [f"{source}:1", f"{source}:3"]
    assert (rows.counts["rows_read"], rows.counts["rows"], rows.counts["rows_skipped"]) == (4, 2, 2)
    assert [message.split(": ")[0] for message in rows.skipped] == [f"{source}:2", f"{source}:4"]
    clean = tokenized([{"text": "fine"}] * 2)
    assert rows.digest == clean.digest and clean.skipped == []


def test_rows_refused_after_encoding_are_skipped_exactly():
    tokenizer = make_tokenizer(LLAMA3, eos="</s>", bos="<s>")
    rows = tokenized([{"text": "one"}, {"text": "<s><s>two"}, {"text": "three"}], tokenizer, bad_rows="skip")
    assert [tokenizer.decode(ids_of(rows, r)) for r in range(len(rows))] == ["one</s>", "three</s>"]
    assert rows.counts["rows_skipped"] == 1 and rows.counts["supervised_tokens_lost"] == 0


def test_a_data_set_of_which_nothing_is_left_is_refused():
    with pytest.raises(ValueError, match=r"no row is left of 1; the first was rows\.jsonl:1: .*no assistant turn"):
        tokenized([{"messages": CHAT[:2]}], bad_rows="skip")
    with pytest.raises(ValueError, match="no supervised token is left: of 1 rows .* 1 are lost to data.max_length=8"):
        tokenized([{"messages": CHAT}], max_length=8)


def test_a_tokenizer_that_is_missing_or_broken_is_refused_with_the_remedy(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "good")
    template = write(tmp_path / "template.jinja", LLAMA3)
    assert data.load_tokenizer(str(tmp_path / "good")).chat_template == CHATML
    assert data.load_tokenizer(str(tmp_path / "good"), template).chat_template == LLAMA3
    with pytest.raises(ValueError, match="data.chat_template: .*none.jinja"):
        data.load_tokenizer(str(tmp_path / "good"), str(tmp_path / "none.jinja"))
    for missing in (str(tmp_path / "none"), "tests/none", "./none"):  # and no hub is asked for what can only be a folder
        with pytest.raises(ValueError, match="model.path: there is no folder .*make setup"):
            data.load_tokenizer(missing)
    write(tmp_path / "good" / "tokenizer.json", "{")
    with pytest.raises(ValueError, match="model.path: no tokenizer could be loaded"):
        data.load_tokenizer(str(tmp_path / "good"))


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    hostile = json.loads(settings_file.read_text()) | {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    write(settings_file, json.dumps(hostile))
    write(tmp_path / "evil.py", f"import pathlib\npathlib.Path({str(tmp_path / 'canary')!r}).touch()\nclass Evil: pass\n")
    try:
        data.load_tokenizer(str(tmp_path))
    except ValueError:
        pass
    assert not (tmp_path / "canary").exists()


# ---------------------------------------------------------------------------------------------------------- truncation

def prompt_of(n):
    """Rows whose rendering is exactly n tokens, the last five of them 'abc', terminator, line break."""
    overhead = len(make_tokenizer()(make_tokenizer().apply_chat_template([{"role": "user", "content": ""}, {"role": "assistant", "content": "abc"}],
                                                                         tokenize=False))["input_ids"])
    return {"prompt": "p" * (n - overhead), "completion": "abc"}


LONG_ROWS = [prompt_of(60), prompt_of(61), prompt_of(63), prompt_of(64), prompt_of(65), prompt_of(80)]  # answers end 1 token before the row does


def test_cutting_counts_rows_cut_rows_lost_and_supervised_tokens_lost():
    rows = tokenized(LONG_ROWS, max_length=60)
    assert rows.names == [f"rows.jsonl:{i}" for i in range(1, 5)]
    assert [spans_of(rows, r, make_tokenizer()) for r in range(4)] == [["abc<|im_end|>"], ["abc<|im_end|>"], ["ab"], ["a"]]
    assert rows.counts == dict(rows_read=6, rows=4, rows_skipped=0, rows_truncated=3, rows_lost=2, rows_unsupervised=0, tokens=240,
                               supervised_tokens=4 + 4 + 2 + 1, supervised_tokens_lost=2 + 3 + 4 + 4, turns_unsupervised=0, turns_hidden=0)


def test_dropping_loses_long_rows_whole():
    rows = tokenized(LONG_ROWS, max_length=60, too_long="drop")
    assert rows.names == ["rows.jsonl:1"]
    assert (rows.counts["rows_lost"], rows.counts["rows_truncated"], rows.counts["supervised_tokens_lost"]) == (5, 0, 20)


def test_refusing_names_the_first_long_row():
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: 61 tokens are more than data\.max_length=60 .*data\.too_long"):
        tokenized(LONG_ROWS, max_length=60, too_long="refuse")


def test_a_row_without_targets_is_kept_and_counted():
    tokenizer = make_tokenizer(template=None, eos="</s>")
    rows = tokenized([{"text": "</s>"}, {"text": "ab"}], tokenizer)
    assert (rows.counts["rows"], rows.counts["rows_unsupervised"], len(rows)) == (2, 1, 2)


def test_rows_across_chunks_are_those_of_one_chunk(monkeypatch):
    many = EQUAL_ROWS + LONG_ROWS + [{"messages": CHAT}] * 3
    whole = tokenized(many)
    monkeypatch.setattr(tokens, "CHUNK_ROWS", 2)
    assert tokenized(many).digest == whole.digest


def test_the_digest_changes_with_ids_mask_and_borders():
    digests = [tokenized(rows).digest for rows in ([{"text": "ab"}], [{"text": "ac"}], [{"text": "a"}, {"text": "b"}], [{"text": "b"}, {"text": "a"}])]
    digests += [tokenized([{"messages": CHAT}], supervise=kind).digest for kind in ("assistant", "all")]
    assert len(set(digests)) == 6


# ------------------------------------------------------------------------------------------------ splits and prompts

def write_rows(path, n):
    return write(path, "".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(n)))


def test_rows_are_held_out_by_seed_alone_and_stand_in_one_split_only(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", 50)

    def names(seed):
        cfg = config.from_dict({"data": dict(train=source, eval="", eval_rows=7), "train": dict(seed=seed)})
        return [list(rows.names) for rows in data.load(cfg, make_tokenizer())]
    train, evaluation = names(0)
    assert len(evaluation) == 7 and sorted(train + evaluation) == sorted(f"{source}:{i}" for i in range(1, 51))
    np.random.seed(3), torch.manual_seed(3)
    assert names(0) == [train, evaluation] != names(1)
    with pytest.raises(ValueError, match="data.eval_rows: 50 rows cannot be held out of the 50 .*data.eval"):
        data.read_splits(config.from_dict({"data": dict(train=source, eval="", eval_rows=50)}))


def test_prompts_of_rows_end_where_the_answer_begins(tmp_path):
    tokenizer = make_tokenizer()
    train, evaluation = write_rows(tmp_path / "a.jsonl", 3), write_rows(tmp_path / "b.jsonl", 9)
    cfg = config.from_dict({"data": dict(train=train, eval=evaluation), "eval": dict(samples=2)})
    found = data.prompts(cfg, tokenizer)
    assert [(p["prompt"], p["reference"]) for p in found] == [("q0", "a0"), ("q1", "a1")]
    rows = data.load(cfg, tokenizer)[1]
    assert [len(p["ids"]) for p in found] == [int(rows.supervised[rows.offsets[r]:].argmax()) for r in range(2)]
    assert found[0]["ids"] == ids_of(rows, 0)[:len(found[0]["ids"])]
    chats = [("a:1", {"messages": CHAT}), ("a:2", {"messages": 1}), ("a:3", {"text": "abcdefgh"}), ("a:4", {"text": "unused"})]
    assert [(p["prompt"], p["reference"]) for p in data.prompts(cfg, tokenizer, chats)] == [("And of Peru?", "Lima."), ("abcd", "efgh")]
    assert data.prompts(config.from_dict({"eval": dict(samples=0)}), tokenizer) == []


def test_prompts_come_from_a_file_of_lines_or_rows(tmp_path):
    tokenizer = make_tokenizer()
    lines = write(tmp_path / "p.txt", "\ufeffWho?\n\n  Why?\r\n")
    rows = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, [{"prompt": "Who?"}, {"messages": CHAT[2:4]}, {"messages": CHAT}])))
    read = lambda path: data.prompts(config.from_dict({"eval": dict(prompts=path, samples=1)}), tokenizer)  # noqa: E731
    assert [p["prompt"] for p in read(lines)] == ["Who?", "Why?"]
    assert tokenizer.decode(read(lines)[0]["ids"]) == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert [(p["prompt"], p["reference"]) for p in read(rows)] == [("Who?", ""), ("And of Peru?", ""), ("And of Peru?", "Lima.")]
    for content, message in ((b"ok\n\xff\n", r"q\.txt:2: not UTF-8"), (b"x" * 3000, r"q\.txt:1: .*data\.max_length=2048")):
        with pytest.raises(ValueError, match=message):
            read(write(tmp_path / "q.txt", content))
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        read(str(tmp_path / "none.txt"))


# ----------------------------------------------------------------------------------------------------------- the order

@given(st.integers(1, 40), st.integers(0, 2**70), st.integers(0, 200), st.integers(0, 100), st.integers(0, 100))
def test_the_stream_is_one_whatever_windows_it_is_read_in(n_rows, seed, start, first, second):
    whole = data.sample_stream(n_rows, seed, start, first + second)
    assert whole == data.sample_stream(n_rows, seed, start, first) + data.sample_stream(n_rows, seed, start + first, second)
    assert len(whole) == first + second


@given(st.integers(1, 60), st.integers(0, 2**40))
def test_each_epoch_holds_every_row_once(n_rows, seed):
    stream = data.sample_stream(n_rows, seed, 0, 3 * n_rows)
    assert all(sorted(stream[e * n_rows:(e + 1) * n_rows]) == list(range(n_rows)) for e in range(3))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(data.sample_stream(100, seed, epoch * 100, 100)) for seed in (0, 1, 2**32) for epoch in range(4)]
    assert len(set(orders)) == 12 and tuple(range(100)) not in orders


def test_the_stream_neither_reads_nor_moves_a_global_generator():
    torch.manual_seed(5), np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    data._permutation.cache_clear()
    torch.manual_seed(5), np.random.seed(5)
    first = data.sample_stream(1000, 0, 990, 20)
    assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])
    data._permutation.cache_clear()
    assert data.sample_stream(1000, 0, 990, 20) == first


def test_the_order_is_the_same_on_every_machine():
    first_order = [6, 3, 1, 4, 5, 2, 7, 0, 1, 3, 6, 2, 0, 7, 5, 4]
    assert data.sample_stream(8, 0, 0, 16) == first_order, "a change of this order breaks the resuming of every saved run"


# ------------------------------------------------------------------------------------------------------------- packing

def rows_of(masks):
    """Rows with the given supervision masks (first token: off) and tokens that are all different."""
    lengths = [len(mask) for mask in masks]
    supervised = np.array([on and i > 0 for mask in masks for i, on in enumerate(mask)], bool)
    return data.Rows(np.arange(sum(lengths), dtype=np.int32), np.cumsum([0] + lengths), supervised, [""] * len(masks), {}, "")


MASKS = st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=30)


@settings(max_examples=200)
@given(MASKS, st.integers(1, 30), st.data())
def test_packing_keeps_every_target_with_exactly_what_stands_before_it(masks, max_tokens, draw):
    rows = rows_of(masks)
    samples = draw.draw(st.lists(st.integers(0, len(masks) - 1), max_size=40))  # a row may come twice: windows straddle epochs
    targets = lambda r: np.flatnonzero(rows.supervised[rows.offsets[r]:rows.offsets[r + 1]]).tolist()
    expected = sorted((r, i, int(rows.ids[rows.offsets[r] + i])) for r in samples for i in targets(r))
    found = []
    for batch in data.pack(rows, samples, max_tokens):
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == len(batch.input_ids) == len(batch.position_ids)
        assert bounds[-1] <= max_tokens or len(batch.samples) == 1
        assert batch.max_seqlen == max(b - a for a, b in zip(bounds, bounds[1:])) and len(bounds) == len(batch.samples) + 1
        for a, b, r in zip(bounds, bounds[1:], batch.samples):
            assert batch.position_ids[a:b].tolist() == list(range(b - a))
            assert batch.input_ids[a:b].tolist() == rows.ids[rows.offsets[r]:rows.offsets[r] + b - a].tolist()
        for place, target, d in zip(batch.rows.tolist(), batch.targets.tolist(), batch.document.tolist()):
            assert bounds[d] <= place < bounds[d + 1]
            found.append((batch.samples[d], place - bounds[d] + 1, target))
    assert sorted(found) == expected


@given(MASKS, st.integers(1, 30))
def test_packing_is_deterministic_and_its_longest_document_comes_first(masks, max_tokens):
    rows = rows_of(masks)
    once, again = (data.pack(rows, list(range(len(masks))), max_tokens) for _ in range(2))
    assert [batch.samples for batch in once] == [batch.samples for batch in again]
    assert not once or once[0].max_seqlen == max(batch.max_seqlen for batch in once)


@given(MASKS, st.integers(12, 40))
def test_no_two_micro_batches_would_have_fitted_into_one(masks, max_tokens):
    sizes = [len(batch.input_ids) for batch in data.pack(rows_of(masks), list(range(len(masks))), max_tokens)]
    assert all(a + b > max_tokens for i, a in enumerate(sizes) for b in sizes[:i])


def test_tokens_behind_the_last_prediction_and_rows_without_targets_are_not_computed():
    rows = rows_of([[0, 0, 1, 1, 0, 0], [0, 0, 0], [0, 1]])
    batch, = data.pack(rows, [0, 1, 2], 100)
    assert batch.samples == [0, 2] and batch.input_ids.tolist() == [0, 1, 2, 9]
    assert batch.rows.tolist() == [1, 2, 3] and batch.targets.tolist() == [2, 3, 10] and batch.document.tolist() == [0, 0, 1]
    assert data.pack(rows, [1, 1], 100) == []


def test_dtypes_are_those_that_the_model_takes_and_to_keeps_everything():
    batch, = data.pack(rows_of([[0, 1, 1]]), [0], 8)
    moved = batch.to("cpu")
    wanted = dict.fromkeys(("input_ids", "position_ids", "rows", "targets", "document"), torch.int64) | {"cu_seqlens": torch.int32}
    for name, dtype in wanted.items():
        assert getattr(batch, name).dtype == dtype and torch.equal(getattr(batch, name), getattr(moved, name))
    assert (moved.max_seqlen, moved.samples) == (2, [0])


# ------------------------------------------------------------------------------------------------ the packaged tokenizer

PACKAGED = pathlib.Path(data.__file__).parent / "models" / "SmolLM2-135M-Instruct"
SHARED = pathlib.Path(data.__file__).parent.parent / "shared" / "data"
needs_packaged = pytest.mark.skipif(not (PACKAGED / "tokenizer.json").exists(), reason="models/SmolLM2-135M-Instruct is not there: make setup makes it")


@needs_packaged
def test_the_packaged_tokenizer_supervises_the_answer_and_its_end():
    tokenizer = data.load_tokenizer(str(PACKAGED))
    rows = tokenized([{"messages": CHAT}], tokenizer)
    assert spans_of(rows, 0, tokenizer) == ["Paris.<|im_end|>", "Lima.<|im_end|>"]
    assert data.end_of_turn(tokenizer) == [tokenizer.eos_token_id] == tokenizer.convert_tokens_to_ids(["<|im_end|>"])


@needs_packaged
@pytest.mark.skipif(not (SHARED / "tldr-train-ids.npz").exists(), reason="the development data beside the checkout is not there")
def test_the_packaged_tokenizer_gives_the_reference_ids_and_prompt_lengths():
    tokenizer = data.load_tokenizer(str(PACKAGED))
    reference = dict(np.load(SHARED / "tldr-train-ids.npz"))
    rows = data.tokenize(data.read_rows(str(SHARED / "tldr-train.jsonl"))[:2000], tokenizer, settings_of())
    for r in range(2000):
        targets = np.flatnonzero(rows.supervised[rows.offsets[r]:rows.offsets[r + 1]])
        ids = ids_of(rows, r)
        assert ids[:targets[-1] + 1] == reference["ids"][reference["off"][r]:reference["off"][r + 1]].tolist()  # the reference ends with the terminator
        assert tokenizer.decode(ids[targets[-1] + 1:]) == "\n"  # … and the template's rendering with a line break behind it
        assert targets.tolist() == list(range(int(reference["prompt"][r]), int(targets[-1]) + 1))
