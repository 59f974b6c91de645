"""What the audit reports, and that it reports all of it: planted rows found, independent formulas agreed with, good rows left alone."""
import json
import random
import re

import datasketch
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import audit
import config
import data
import pool
import sources
import words
from test_data import make_tokenizer, write

WORDS = ("amber basalt cedar delta ember fjord garnet harbour indigo juniper kelp lagoon marble nettle onyx pebble quartz russet saffron thistle "
         "umber violet willow yarrow zephyr anchor bramble copper dune estuary").split()


def chat(question, answer, *more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns + [{"role": role, "content": text} for role, text in more]}


def sentence(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def unlike(n, seed=0, words=20):
    """n rows that are nothing like each other."""
    rng = random.Random(seed)
    return [chat(sentence(rng, words), sentence(rng, words)) for _ in range(n)]


def scanned(train, evaluation=(), special=(), near=True, workers=1, **changes):
    named = [[(f"{name}:{i}", row) for i, row in enumerate(rows, 1)] for name, rows in (("train", train), ("eval", evaluation))]
    return audit.scan(*named, config.from_dict({"data": changes}).data, special, near, workers)


def found(result, *checks):
    return [(row, check, other) for row, check, _, other in result["found"] if not checks or check in checks]


# ---------------------------------------------------------------------------------------------------------- likeness

def test_good_rows_that_are_unlike_each_other_are_left_alone():
    result = scanned(unlike(300), unlike(50, seed=1))
    assert found(result) == [] and result["evaluation_found"] == []
    assert result["group"].tolist() == list(range(300)) and (result["rows"], result["evaluation_rows"]) == (300, 50)


def test_a_copy_is_a_duplicate_of_the_first_and_white_space_at_its_ends_does_not_hide_it():
    rows = unlike(40)
    copy = chat(rows[3]["messages"][0]["content"] + "\n", " " + rows[3]["messages"][1]["content"])
    result = scanned([*rows, rows[3], copy])
    assert found(result) == [(40, "duplicate", 3), (41, "duplicate", 3)]
    assert result["group"][[3, 40, 41]].tolist() == [3, 3, 3]


def test_the_same_words_said_by_another_role_are_no_duplicate():
    rows = unlike(30)
    other = {"messages": [dict(turn, role="system" if turn["role"] == "user" else "assistant") for turn in rows[0]["messages"]]}
    assert found(scanned([*rows, other]), "duplicate") == []


@pytest.mark.parametrize("words", [5, 8, 14, 30, 200])
def test_every_row_with_one_word_changed_is_found_wherever_that_word_stands(words):
    rows, rng = unlike(60, words=words), random.Random(1)
    planted = []
    for r in range(40):
        turns = [dict(turn) for turn in rows[r]["messages"]]
        turn = turns[r % 2]
        parts = turn["content"].split(" ")
        parts[rng.randrange(words)] = "interloper"
        turn["content"] = " ".join(parts)
        planted.append({"messages": turns})
    assert found(scanned(rows + planted)) == [(60 + r, "near_duplicate", r) for r in range(40)]


def test_rows_that_differ_in_two_of_few_words_are_not_alike():
    rows = [chat(f"What is the capital city of {a} these days", f"It is called {b}") for a, b in zip(WORDS[:15], WORDS[15:])]
    assert found(scanned(rows + unlike(200)), "near_duplicate") == []


def test_what_frames_every_row_makes_no_rows_alike():
    frame = "Below is an instruction that describes a task. Write a response that completes the request, and be brief. Instruction: {} Response:"
    rng = random.Random(2)
    rows = [chat(frame.format(sentence(rng, 6)), sentence(rng, 5)) for _ in range(100)]
    assert found(scanned(rows), "near_duplicate") == []
    system = "You are a patient assistant who answers at length and never guesses. " * 6
    rows = [{"messages": [{"role": "system", "content": system}, *row["messages"]]} for row in unlike(10, words=6)]
    assert found(scanned(rows), "near_duplicate") == []
    labels = [chat(f"Classify the following word by its kind, please, in one or two words: {word}", "a noun") for word in WORDS]
    assert found(scanned(labels), "near_duplicate") == []  # one word apart, but the row's own words are few


def test_rows_of_the_evaluation_set_are_found_among_the_training_rows_the_same_or_nearly():
    train, evaluation = unlike(50), unlike(20, seed=5)
    changed = json.loads(json.dumps(evaluation[7]).replace(evaluation[7]["messages"][1]["content"].split()[4], "interloper", 1))
    result = scanned([*train, evaluation[2], changed, evaluation[2]], evaluation)
    assert found(result, "leak") == [(50, "leak", -3), (51, "leak", -8), (52, "leak", -3)]
    assert found(result, "duplicate") == [(52, "duplicate", 50)]


def test_a_second_copy_of_a_row_that_nearly_leaks_leaks_too():
    evaluation = unlike(5, seed=5)
    changed = json.loads(json.dumps(evaluation[1]).replace(evaluation[1]["messages"][1]["content"].split()[4], "interloper", 1))
    assert found(scanned([*unlike(30), changed, changed], evaluation), "leak") == [(30, "leak", -2), (31, "leak", -2)]


def test_the_threshold_is_the_exact_jaccard_similarity():
    long = sentence(random.Random(0), 120)
    cut = long[: int(len(long) * 0.85)]
    value = audit.jaccard(audit.shingles(long), audit.shingles(cut))
    rows = [{"text": long}, {"text": cut}, *({"text": row["messages"][0]["content"]} for row in unlike(30))]
    assert found(scanned(rows, near_duplicate=value - 0.01)) == [(1, "near_duplicate", 0)]
    assert found(scanned(rows, near_duplicate=min(1.0, value + 0.01))) == []


def test_without_near_only_exact_copies_are_reported():
    rows = unlike(20)
    near = chat("interloper " + rows[0]["messages"][0]["content"].split(" ", 1)[1], rows[0]["messages"][1]["content"])
    assert found(scanned([*rows, near, rows[1]], near=False)) == [(21, "duplicate", 1)]


def test_the_result_is_the_same_whoever_does_the_work(monkeypatch):
    monkeypatch.setattr(audit, "CHUNK_ROWS", 16)
    rows = unlike(100)
    rows += [rows[3], chat(rows[4]["messages"][0]["content"] + " !", rows[4]["messages"][1]["content"])] + unlike(60, seed=9)
    one, two = scanned(rows, unlike(20, seed=4), workers=1), scanned(rows, unlike(20, seed=4), workers=2)
    assert one["found"] == two["found"] and np.array_equal(one["group"], two["group"]) and len(one["found"]) == 2
    assert list(map(tuple, one["found"])) == scanned(rows, unlike(20, seed=4))["found"]


# ------------------------------------------------------------------------------------------------- against datasketch

TEXTS = st.lists(st.text(st.sampled_from("abcd é🎌"), max_size=40).map(lambda text: " ".join(text.split())), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_signatures_are_datasketchs(texts):
    mine = audit.minhash(texts)
    for text, row in zip(texts, mine):
        theirs = datasketch.MinHash(audit.BANDS * audit.BAND_ROWS, hashfunc=int, scheme="affine32")
        theirs.update_batch(audit.shingle_hashes(audit._codes([text])[0]).tolist() if len(text) >= audit.SHINGLE else [])
        assert row.tolist() == theirs.hashvalues.tolist()


def test_rows_that_share_a_band_are_those_that_datasketchs_lsh_finds():
    rng = random.Random(3)
    texts = [sentence(rng, 12) for _ in range(150)]
    texts += [" ".join(word if rng.random() < 0.8 else rng.choice(WORDS) for word in text.split()) for text in texts[:75]]
    signatures = audit.minhash(texts)
    lsh = datasketch.MinHashLSH(num_perm=audit.BANDS * audit.BAND_ROWS, params=(audit.BANDS, audit.BAND_ROWS))
    hashes = [datasketch.MinHash(hashvalues=row, scheme="affine32") for row in signatures]
    for r, one in enumerate(hashes):
        lsh.insert(r, one)
    theirs = {(min(r, other), max(r, other)) for r, one in enumerate(hashes) for other in lsh.query(one) if other != r}
    owner, group = audit._shared([audit.bands(signatures)], [np.repeat(np.arange(len(texts), dtype=np.uint32), audit.BANDS)])
    members = {}
    for o, g in zip(owner.tolist(), group.tolist()):
        members.setdefault(g, []).append(o)
    mine = {(min(a, b), max(a, b)) for rows in members.values() for a in rows for b in rows if a != b}
    assert mine == theirs and len(mine) > 20


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "cc", "é"]), min_size=8, max_size=9), min_size=2, max_size=12))
def test_left_out_words_agree_exactly_where_rows_differ_in_one_word(rows):
    texts = [" ".join(row) for row in rows]
    hashes, owner = audit.without_a_word(texts, [True] * len(texts))
    by_row = {r: set(hashes[owner == r].tolist()) for r in range(len(texts))}
    for a in range(len(rows)):
        for b in range(a):
            apart = sum(x != y for x, y in zip(rows[a], rows[b])) if len(rows[a]) == len(rows[b]) else 99
            assert bool(by_row[a] & by_row[b]) == (apart <= 1)


# ---------------------------------------------------------------------------------------------------------- row by row

@pytest.mark.parametrize("row, check", [
    (chat("What now, and why?", ""), "empty"),
    (chat("What now, and why?", " \n"), "empty"),
    ({"text": "  "}, "empty"),
    (chat("What now, and why?", "Nothing."), "one_word"),
    (chat("What is the meaning of life?", "What is the meaning of life?"), "echo"),
    (chat("what is the meaning of LIFE", "What is the meaning of life? Oh."), "echo"),
    (chat("Sing.", "la di da " * 12), "repetition"),
    (chat("Sing.", "A good beginning, and then it goes wrong: " + "and so on, " * 9), "repetition"),
    (chat("Sing.", "Well: " + "ha" * 40), "repetition"),
    (chat("Wo?", "In der StraÃŸe gegenÃ¼ber."), "encoding"),
    (chat("Who?", "Itâ€™s me."), "encoding"),
    (chat("Who?", "It\ufffds me."), "encoding"),
    (chat("Who\x00?", "It is me."), "encoding"),
    (chat("Who?", "It is me, as\x93said."), "encoding"),
    (chat("Hi there.", "Hello you.", ("user", "And then?")), "unanswered"),
    ({"messages": [{"role": "user", "content": "Hi there."}]}, "unanswered"),
    (chat("What does <|im_end|> mean?", "It ends a turn."), "template_tokens"),
    ({"messages": "none"}, "unreadable"),
    ({"question": "a"}, "unreadable"),
])
def test_what_is_wrong_with_a_row_is_told_by_name_and_nothing_else_is(row, check):
    result = scanned([row, *unlike(3)], special=["<|im_end|>", "<|im_start|>"])
    assert found(result) == [(0, check, None)]
    assert found(scanned(unlike(3), [row], special=["<|im_end|>", "<|im_start|>"])) == []
    assert [(r, c) for r, c, *_ in scanned(unlike(3), [row], special=["<|im_end|>"])["evaluation_found"]] == [(0, check)]


@pytest.mark.parametrize("row", [
    chat("Où est la forêt de Fontainebleau ?", "À une heure de Paris, près de l’Île-de-France – voilà."),
    chat("こんにちは、元気ですか。", "はい、元気です。ありがとう！ 🎌"),
    chat("Draw a table of two columns.", "| a | b |\n|" + " --- |" * 20 + "\n" + "-" * 200),
    chat("首都はどこですか", "東京です。大きな都市です。"),
    chat("Colour it.", "Use \x1b[31mred\x1b[0m\tand tabs\r\nand lines."),
    chat("Repeat after me.", "one two three one two three one two three one two three"),
    chat("Is it so?", "It is so, as you said, and what is more it rains."),
    chat("Ações em São Paulo: Ã é uma letra?", "Sim, Ã e Â são letras do português."),
    {"messages": [{"role": "user", "content": "Map?"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "map"}]},
                  {"role": "tool", "content": "here"}, {"role": "assistant", "content": "It is here."}]},
])
def test_nothing_is_wrong_with_rows_that_only_look_like_it(row):
    assert found(scanned([row, *unlike(3)], special=["<|im_end|>"])) == []


def test_the_quick_look_for_repetition_misses_none_that_the_slow_one_finds():
    rng = random.Random(0)
    texts = [sentence(rng, rng.randrange(1, 30)) + " " + piece * times + sentence(rng, 3)
             for piece in ("ab", "abc", "la di da ", "x" * 7 + " ", sentence(rng, 9) + " ", sentence(rng, 25)[:190] + ". ") for times in (1, 5, 6, 7, 40)]
    codes, bounds = audit._codes([text + "\n" for text in texts] + ["\n" * 250])
    may = audit._may_run_away(codes, bounds[:-2])
    slow = [bool(audit.runaway(text)) for text in texts]
    assert all(quick for quick, exact in zip(may, slow) if exact) and 10 < sum(slow) < 25


@pytest.mark.parametrize("seed", range(40))
def test_repetition_is_found_where_a_pattern_with_a_back_reference_finds_it(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices("ab -", k=rng.randrange(3, 120)))
    for _ in range(rng.randrange(4)):
        text += "".join(rng.choices("ab -", k=rng.randrange(1, 30))) * rng.randrange(1, 12) + "".join(rng.choices("abc", k=rng.randrange(9)))
    expected = [found for found in re.finditer(r"(?=((.{2,200}?)\2{5,}))", text, re.DOTALL) if len(found[1]) >= 60 and re.search("[a-c]", found[2])]
    seen = audit.runaway(text)
    assert bool(seen) == bool(expected)
    if seen:
        piece, times = seen
        assert piece * times in text and times >= 6 and len(piece * times) >= 60 and text.index(piece * times) <= expected[0].start()


def test_a_long_answer_of_few_letters_is_no_repetition():
    rng = random.Random(0)
    assert audit.runaway(" ".join(str(rng.randrange(10**5)) for _ in range(20_000))) is None


# -------------------------------------------------------------------------------------------------- dropping, and --check

def project(tmp_path, train, evaluation=None, **changes):
    """A config.Config whose rows lie in files."""
    files = {"train": write(tmp_path / "train.jsonl", "".join(json.dumps(row) + "\n" for row in train)), "eval": ""}
    if evaluation is not None:
        files["eval"] = write(tmp_path / "eval.jsonl", "".join(json.dumps(row) + "\n" for row in evaluation))
    return config.from_dict({"data": {**files, "cache": str(tmp_path / "cache"), **changes}})


def test_what_drop_names_is_left_out_and_kept_in_a_file_with_its_reason(tmp_path):
    rows, evaluation = unlike(20), unlike(4, seed=3)
    cfg = project(tmp_path, [*rows, rows[5], evaluation[1], chat("What now, and why?", "")], evaluation, drop=["duplicate", "leak"])
    train, held = data.load(cfg, make_tokenizer())
    assert len(train) == 21 and train.names[-1] == f"{cfg.data.train}:23" and len(held) == 4 and train.counts["rows_dropped"] == 2
    lines = [json.loads(line) for line in train.dropped]
    assert [(line["row"], line["reason"], line["like"]) for line in lines] == [
        (f"{cfg.data.train}:21", "duplicate", f"{cfg.data.train}:6"), (f"{cfg.data.train}:22", "leak", f"{cfg.data.eval}:2")]
    assert lines[0]["record"] == rows[5] and lines[0]["why"]
    assert any("1 empty" in line for line in train.remarks) and any("2 rows left out by data.drop: 1 duplicate, 1 leak" in line for line in train.remarks)
    plain = data.load(project(tmp_path, [*rows, chat("What now, and why?", "")], evaluation), make_tokenizer())[0]
    assert plain.digest == train.digest  # what is left is what it would be had the others never been there


def test_duplicates_are_dropped_before_rows_are_held_out_so_that_none_stands_on_both_sides(tmp_path):
    rows = unlike(30)
    cfg = project(tmp_path, rows * 3, eval_rows=10, drop=["duplicate"])
    train, held = data.load(cfg, make_tokenizer())
    assert (len(train), len(held)) == (20, 10)
    text = {name: i % 30 for i, name in enumerate(f"{cfg.data.train}:{line}" for line in range(1, 91))}
    assert {text[name] for name in train.names}.isdisjoint({text[name] for name in held.names})
    both = data.read_splits(cfg, make_tokenizer())
    assert [[name for name, _ in part] for part in both] == [list(train.names), list(held.names)]
    with_leaks = data.load(project(tmp_path, rows * 3, eval_rows=10), make_tokenizer())[0]
    assert any("leak" in line for line in with_leaks.remarks)
    without = data.load(project(tmp_path, rows * 3, eval_rows=10, drop=["leak"]), make_tokenizer())
    held = {text[name] for name in without[1].names}
    assert not held & {text[name] for name in without[0].names}


def test_dropping_everything_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.drop: every row of .* is left out by one_word; drop less"):
        data.load(project(tmp_path, [chat(f"What now, number {i}?", "Yes") for i in range(9)], unlike(3), drop=["one_word"]), make_tokenizer())


def test_the_checks_that_can_be_dropped_are_those_that_a_row_can_be_used_without():
    assert set(config.DROPS) == set(audit.CHECKS) - {"unreadable"}


def write_settings(folder, **changes):
    """c.json, for the files of `project` and the tokenizer in model/."""
    tree = {"train": "train.jsonl", "eval": "eval.jsonl", "cache": "off", **changes}
    write(folder / "c.json", json.dumps({"model": {"path": "model"}, "data": tree}))


def test_check_tells_counts_examples_and_reasons_in_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tokenizer().save_pretrained("model")
    rows, evaluation = unlike(20), unlike(4, seed=3)
    bad = [rows[5], evaluation[1], chat("What does <|im_end|> mean?", ""), chat("Hi there.", "Hello you.", ("user", "And?"))]
    project(tmp_path, [*rows, *bad], [*evaluation, chat("What now, and why?", "")])
    write_settings(tmp_path, drop=["duplicate"])
    assert data.main(["c.json", "--check", "--out=out.jsonl"]) == 0
    said = capsys.readouterr().out
    for piece in ("24 in train.jsonl, 5 to evaluate on in eval.jsonl", "duplicate                1   4.17%  (left out: data.drop)",
                  "train.jsonl:21", "like train.jsonl:6", "like eval.jsonl:2", "<|im_end|> in a turn of user", "ends with a turn of user",
                  "not found  near_duplicate", "evaluation rows  1 empty", "--data.drop=duplicate,leak,unanswered,empty,template_tokens"):
        assert piece in said, piece
    assert max(map(len, said.splitlines())) <= 80
    assert [json.loads(line)["row"] for line in open("out.jsonl", encoding="utf-8")] == ["train.jsonl:21"]


def test_examples_are_readable_in_any_script_and_under_a_mapping_and_fit_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tokenizer().save_pretrained("model")
    project(tmp_path, [{"q": f"次の言葉を説明してください{i}" + "、なるべく簡単な言葉で" * 9, "a": ""} for i in range(5)] + [{"q": "Où\x1b[2J ?", "a": ""}])
    write_settings(tmp_path, eval="", eval_rows=1, columns=["prompt=q", "completion=a"])
    assert data.main(["c.json", "--check=6"]) == 0 and data.main(["c.json", "--preview=5"]) == 0
    said = capsys.readouterr().out
    assert "user: 次の言葉を説明してください0" in said and "user: Où\\x1b[2J ? | assistant:" in said
    assert max(map(words.columns_of, said.splitlines())) <= 80


@pytest.mark.parametrize("argv, message", [
    (["c.json"], "give one configuration and what to do"), (["--check"], "give one configuration"), (["c.json", "--check", "3"], "give one configuration"),
    (["c.json", "--check=none"], "--check: takes a number above 0"), (["c.json", "--preview=0"], "--preview: takes a number above 0"),
    (["c.json", "--preview", "--out=x"], "--out goes with --check"), (["c.json", "--check", "--ids"], "--ids with --preview"),
    (["none.json", "--check"], "none.json"), (["c.json", "--check", "--data.drop=dupes"], "data.drop: there is no check called \"dupes\""),
])
def test_a_command_that_asks_for_nothing_sensible_is_refused(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.json", "{}")
    with pytest.raises(ValueError, match=message):
        data.main(argv)


def test_rows_left_out_are_written_whole_or_not_at_all_and_never_over_rows_that_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tokenizer().save_pretrained("model")
    project(tmp_path, [*unlike(5), *unlike(5)], unlike(3, seed=4))
    write_settings(tmp_path, drop=["duplicate"])
    before = (tmp_path / "train.jsonl").read_bytes()
    for out, said in (("train.jsonl", "holds the rows"), ("eval.jsonl", "holds the rows"), ("none/x", "cannot be a file"), ("model", "cannot be a file")):
        with pytest.raises(ValueError, match=f"--out: {out} {said}"):
            data.main(["c.json", "--check", f"--out={out}"])
    assert (tmp_path / "train.jsonl").read_bytes() == before

    def full(source, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.shutil, "copyfileobj", full)
    write(tmp_path / "out.jsonl", "older")
    with pytest.raises(OSError):
        data.main(["c.json", "--check", "--out=out.jsonl"])
    assert (tmp_path / "out.jsonl").read_text() == "older" and not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))


def test_check_tells_of_rows_too_long_and_of_held_out_rows_with_a_twin(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tokenizer().save_pretrained("model")
    rows = unlike(20, words=8)
    project(tmp_path, [*rows, *rows, chat("Go on.", "and so it went " + sentence(random.Random(1), 90))])
    write_settings(tmp_path, eval="", eval_rows=8, max_length=400)
    assert data.main(["c.json", "--check"]) == 0
    said = capsys.readouterr().out
    leaks = data.load(config.read("c.json"), make_tokenizer())[0].audit["leak"]
    assert 0 < leaks <= 8 and f"leak             {leaks:>9,}" in said and "like one of the 8 that are held out" in said
    assert "1 row is cut to data.max_length=400" in said and "such as train.jsonl:41, of" in said and max(map(len, said.splitlines())) <= 80
    assert "--data.drop=duplicate,leak" in said


def test_rows_that_cannot_be_used_are_reported_before_the_run_refuses_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tokenizer().save_pretrained("model")
    project(tmp_path, [*unlike(5), {"messages": "none"}], unlike(3, seed=2))
    write_settings(tmp_path)
    with pytest.raises(ValueError, match=r"train\.jsonl:6: messages must be a list.*data\.bad_rows=skip"):
        data.main(["c.json", "--check"])
    said = capsys.readouterr().out
    assert "unreadable               1" in said and "to pass over what cannot be read  --data.bad_rows=skip" in said
    project(tmp_path, [{"question": "What?", "answer": "That."}] * 4, unlike(3, seed=2))
    with pytest.raises(ValueError, match="make no row"):
        data.main(["c.json", "--check"])
    said = capsys.readouterr().out
    assert "unreadable               4  100.00%" in said and "bad_rows" not in said  # nothing would be left
    assert "--data.columns=prompt=question,completion=answer" in said
    project(tmp_path, unlike(5), unlike(3, seed=2))
    with open("train.jsonl", "a", encoding="utf-8") as file:
        file.write("no JSON\n")
    with pytest.raises(ValueError, match=r"train\.jsonl:6: not valid JSON.*data\.bad_rows=skip"):
        data.main(["c.json", "--check"])
    said = capsys.readouterr().out
    assert "unreadable               1" in said and said.count("not valid JSON") == 1


# ------------------------------------------------------------------------------------------------------------ workers

def test_work_comes_back_in_order_and_only_so_much_is_under_way():
    taken = []

    def numbers():
        for i in range(60):
            taken.append(i)
            yield [(i, i)]
    ahead = []
    for n, result in enumerate(pool.ordered(lambda chunk: chunk[0][1] * 2, numbers(), workers=2)):
        assert result == 2 * n
        ahead.append(len(taken) - n)
    assert max(ahead) <= 8


@pytest.mark.parametrize("fault, message", [("raise", "row 7 is bad"), ("die", "a worker died over the rows .* look at them"),
                                            ("hang", "took more than 1 s over the rows row 7 to row 7")])
def test_a_worker_that_raises_dies_or_hangs_is_told_with_its_rows(monkeypatch, fault, message):
    import os
    import time
    monkeypatch.setattr(pool, "HANG_SECONDS", 1)

    def work(chunk):
        if chunk[0][1] == 7:
            if fault == "raise":
                raise ValueError("row 7 is bad")
            os._exit(9) if fault == "die" else time.sleep(30)
        return chunk
    began = time.time()
    with pytest.raises(ValueError, match=message):
        list(pool.ordered(work, ([(f"row {i}", i)] for i in range(20)), workers=2))
    assert time.time() - began < 15


def test_a_row_is_only_what_its_source_says_it_is():
    assert sources.shown_row(ValueError("broken")) == "broken" and sources.shown_row({"a": "é"}) == '{"a": "é"}'
