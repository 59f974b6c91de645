"""The preview shows the mask that training uses, and nothing that a terminal would obey."""
import json
import re

import pytest

import data
import preview
from test_data import CHAT, LLAMA3, make_tokenizer, tokenized, write

ESCAPES = re.compile("\x1b\\[[0-9;]*m")


def shown(rows, tokenizer, r=0, colour=False):
    a, b = rows.offsets[r], rows.offsets[r + 1]
    return preview.text(rows.ids[a:b].tolist(), rows.supervised[a:b].tolist(), tokenizer, data.end_of_turn(tokenizer), colour)


def test_brackets_hold_what_is_supervised_and_the_terminator_and_bos_are_marked():
    tokenizer = make_tokenizer(LLAMA3, eos="<|eot_id|>", bos="<s>")
    text = shown(tokenized([{"messages": CHAT}], tokenizer), tokenizer)
    assert re.findall(r"\[([^|\[\]]+)\]", text) == ["Paris.", "Lima."] and text.count("[|<|eot_id|>|]") == 2 and text.count("<|eot_id|>") == 5
    assert text.startswith("^<s><|start_header_id|>system")
    assert re.sub(r"\[\|(.*?)\|\]|\[([^|\[\]]+)\]", r"\1\2", text).removeprefix("^") == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_colours_say_the_same_and_fall_away_to_the_text():
    tokenizer = make_tokenizer()
    rows = tokenized([{"messages": CHAT}], tokenizer)
    text = shown(rows, tokenizer, colour=True)
    assert ESCAPES.sub("", text) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert re.findall(re.escape(preview.GREEN) + r"(Paris\.|Lima\.)" + re.escape(preview.PLAIN), text) == ["Paris.", "Lima."]
    assert text.count(preview.REVERSED) == 2
    bos = make_tokenizer(LLAMA3, eos="<|eot_id|>", bos="<s>")
    assert shown(tokenized([{"messages": CHAT}], bos), bos, colour=True).startswith(f"{preview.UNDERLINED}<s>{preview.PLAIN}")


def test_characters_of_several_tokens_are_whole_and_control_characters_are_written_out():
    tokenizer = make_tokenizer()
    text = shown(tokenized([{"prompt": "日本 🎌", "completion": "é\x1b[31m\x07日"}], tokenizer), tokenizer)
    assert "日本 🎌" in text and "[é\\x1b[31m\\x07日]" in text and "\x1b" not in text and "\x07" not in text


@pytest.mark.parametrize("colour", [False, True])
def test_lines_are_no_wider_than_asked_for_and_lose_nothing(colour):
    tokenizer = make_tokenizer()
    rows = tokenized([{"prompt": "word " * 60 + "x" * 300, "completion": "answer " * 50}], tokenizer)
    text = shown(rows, tokenizer, colour=colour)
    lines = preview.wrapped(text, 60)
    plain = [ESCAPES.sub("", line) for line in lines]
    assert max(map(len, plain)) <= 60
    assert re.sub(r"\s", "", "".join(plain)) == re.sub(r"\s", "", ESCAPES.sub("", text))
    assert all(line.count(preview.GREEN) <= line.count(preview.PLAIN) for line in lines)  # no colour runs on into what follows


def test_a_row_that_was_cut_before_its_end_is_told(tmp_path):
    tokenizer = make_tokenizer()
    rows = tokenized([{"prompt": "a", "completion": "b" * 100}], tokenizer, max_length=60)
    lines = preview.lines(rows, tokenizer, data.end_of_turn(tokenizer), [0], data.pack(rows, [0], 64), 64)
    assert any("no supervised token ends a turn" in line for line in lines) and max(map(len, lines)) <= 80


def test_the_command_shows_the_first_rows_of_the_run_and_the_micro_batches_of_its_first_step(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tokenizer().save_pretrained("model")
    write(tmp_path / "train.jsonl", "".join(json.dumps({"prompt": f"question {i}", "completion": "yes " * (1 + i % 9)}) + "\n" for i in range(30)))
    write(tmp_path / "eval.jsonl", json.dumps({"prompt": "q", "completion": "a b"}) + "\n")
    write(tmp_path / "c.json", json.dumps({"model": {"path": "model"}, "data": {"train": "train.jsonl", "eval": "eval.jsonl", "cache": "off"},
                                           "train": {"micro_batch_size": 2, "accumulation": 4}, "memory": {"max_tokens": 300}}))
    assert data.main(["c.json", "--preview", "2", "--ids"]) == 0
    said = capsys.readouterr().out
    order = data.sample_stream(30, 0, 0, 8)
    assert [int(n) for n in re.findall(r"^train\.jsonl:(\d+): ", said, re.M)] == [order[0] + 1, order[1] + 1]
    tokenizer = make_tokenizer()
    asked, answered = f"question {order[0]}", "yes " * (1 + order[0] % 9)
    whole = tokenizer.apply_chat_template([{"role": "user", "content": asked}, {"role": "assistant", "content": answered}])["input_ids"]
    first = said[:said.index("\ntrain.jsonl", said.index("train.jsonl") + 1)]
    numbers = re.findall(r"\d+", " ".join(line for line in first.splitlines() if re.fullmatch(r"  [\d\[\] ]+", line)))
    assert [int(n) for n in numbers] == whole
    assert re.search(r"step 1: 8 rows, [\d,]+ tokens in \d+ micro-batch", said) and "of at most 300" in said and "tokens      0 to" in said
    assert max(map(len, said.splitlines())) <= 80 and "\x1b" not in said
    assert data.main(["c.json", "--preview"]) == 0
    assert len(re.findall(r"^train\.jsonl:\d+: ", capsys.readouterr().out, re.M)) == 3
