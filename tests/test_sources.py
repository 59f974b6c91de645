"""Strangers' data: rows as other projects write them, in the files that people have, and a mapping for anything else."""
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

import config
import data
import sources
from test_data import CALLING, CHAT, ids_of, make_tokenizer, save_as, settings_of, spans_of, tokenized, write

TURNS = [{"role": "user", "content": "Weather in Lima?"}, {"role": "assistant", "content": "Dry."}]


def answers(row, tokenizer=None, **changes):
    tokenizer = tokenizer or make_tokenizer()
    rows = tokenized([row], tokenizer, **changes)
    return spans_of(rows, 0, tokenizer), tokenizer.decode(ids_of(rows, 0))


# ------------------------------------------------------------------------------------------------------- kinds of rows

def test_sharegpt_with_tools_observations_and_a_system_turn():
    row = {"id": "x_0", "system": "Use tools.", "tools": json.dumps([{"name": "weather"}]), "conversations": [
        {"from": "human", "value": "Weather in Lima?"}, {"from": "function_call", "value": '{"name": "weather"}'},
        {"from": "observation", "value": "dry"}, {"from": "gpt", "value": "Dry."},
        {"from": "human", "value": "Thanks"}, {"from": "gpt", "value": "Bye."}]}
    tokenizer = make_tokenizer("{% if tools %}{{ tools[0].name }}|{% endif %}" + make_tokenizer().chat_template)
    found, text = answers(row, tokenizer)
    assert found == ['{"name": "weather"}<|im_end|>', "Dry.<|im_end|>", "Bye.<|im_end|>"]
    assert text.startswith("weather|<|im_start|>system\nUse tools.<|im_end|>") and "<|im_start|>tool\ndry<|im_end|>" in text


def test_a_sharegpt_conversation_that_opens_with_an_answer_supervises_only_prompted_ones():
    row = {"conversations": [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Well?"}]}
    assert answers(row)[0] == ["Well?<|im_end|>"]


@pytest.mark.parametrize("row", [
    {"conversations": [{"role": "user", "content": "Weather in Lima?"}, {"role": "assistant", "content": "Dry."}]},
    {"messages": [{"from": "human", "value": "Weather in Lima?"}, {"from": "gpt", "value": "Dry."}]},
    {"conversations": [{"from": "user", "value": "Weather in Lima?", "weight": None},
                       {"from": "chatgpt", "value": "Dry.", "markdown": None}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Lima?"}]},
                  {"role": "assistant", "content": "Dry."}]},
    {"messages": json.dumps(TURNS)},
    {"messages": None, "prompt": "Weather in Lima?", "completion": "Dry.", "text": None},
    {"prompt": TURNS[:1], "completion": TURNS[1:], "system": "linux"},
    {"messages": TURNS, "system": "linux", "source": "web"},
    {"instruction": "Weather in Lima?", "input": None, "output": "Dry.", "history": []},
])
def test_the_same_chat_in_strangers_words(row):
    assert answers(row) == answers({"messages": TURNS})


def test_several_assistant_turns_in_a_row_and_tool_calls_are_all_supervised():
    row = {"messages": [TURNS[0], {"role": "assistant", "content": "One moment."},
                        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w", "arguments": "{}"}}]},
                        {"role": "tool", "content": "dry", "tool_call_id": "1"}, TURNS[1]]}
    assert answers(row, make_tokenizer(CALLING))[0] == ["One moment.<|im_end|>", "w()<|im_end|>", "Dry.<|im_end|>"]


@pytest.mark.parametrize("row, message", [
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
     "messages, turn 1: content must be text, got .*image_url"),
    ({"messages": "[{"}, "messages begins as a list in JSON, but is none"),
    ({"messages": TURNS, "tools": "{"}, "tools must be a list, or one in JSON"),
    ({"messages": TURNS, "tools": {"a": 1}}, "tools must be a list, got"),
    ({"conversations": [{"from": "narrator", "value": "a"}]}, "narrator.*; data.roles=narrator=ROLE says what it is"),
    ({"question": "a", "answer": "b"}, r"the keys question, answer make no row; .*--data\.columns=prompt=question,completion=answer"),
])
def test_what_is_no_row_is_refused_with_the_remedy(row, message):
    with pytest.raises(ValueError, match=rf"^rows\.jsonl:1: .*{message}"):
        tokenized([row])


# --------------------------------------------------------------------------------------------------------- the mapping

@pytest.mark.parametrize("row, columns", [
    ({"question": "Weather in Lima?", "answer": "Dry.", "text": "something else"}, ["prompt=question", "completion=answer"]),
    ({"q": "Weather in Lima?", "answers": {"text": ["Dry.", "Cold."]}}, ["prompt=q", "completion=answers.text.0"]),
    ({"a.b": "Weather in Lima?", "c": "Dry."}, ["instruction=a.b", "output=c"]),
    ({"dialog": [{"speaker": "user", "utterance": "Weather in Lima?"}, {"speaker": "assistant", "utterance": "Dry."}]},
     ["messages=dialog", "turn.role=speaker", "turn.content=utterance"]),
    ({"data": {"chat": [{"from": "human", "value": "Weather in Lima?"}, {"from": "gpt", "value": "Dry."}]}}, ["conversations=data.chat"]),
])
def test_other_columns_are_read_by_the_mapping(row, columns):
    assert answers(row, columns=columns) == answers({"messages": TURNS})


def test_other_roles_and_a_system_column_are_read_by_the_mapping():
    row = {"persona": "Be dry.", "chat": [{"role": "Customer", "content": "Weather in Lima?"}, {"role": "Agent", "content": "Dry."}]}
    found, text = answers(row, columns=["messages=chat", "system=persona"], roles=["Customer=user", "Agent=assistant"])
    assert found == ["Dry.<|im_end|>"] and text.startswith("<|im_start|>system\nBe dry.<|im_end|>\n<|im_start|>user\nWeather")


def test_a_mapped_column_that_a_row_lacks_is_refused_by_row():
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: has no column 'answers\.text\.0', which data\.columns takes for completion; "
                                         r"it has q, answers"):
        tokenized([{"q": "a", "answers": {"text": ["b"]}}, {"q": "a", "answers": {"text": []}}],
                  columns=["prompt=q", "completion=answers.text.0"])


@pytest.mark.parametrize("changes, message", [
    (dict(columns=["question"]), 'data.columns: must be a list of KEY=COLUMN, .* got "question"'),
    (dict(columns=["reply=answer"]), "data.columns: .*KEY is one of messages"),
    (dict(columns=["prompt=a", "prompt=b"]), "data.columns: prompt stands twice"), (dict(columns=[3]), "data.columns: .* got 3"),
    (dict(roles=["bot=robot"]), "data.roles: .*ROLE is one of system"), (dict(roles=["a=user", "a=tool"]), "data.roles: a stands twice"),
])
def test_a_mapping_that_makes_no_sense_is_refused_by_key(changes, message):
    with pytest.raises(ValueError, match=message):
        tokenized([{"text": "a"}], **changes)


# --------------------------------------------------------------------------------------------------------------- files

LINES = [{"prompt": 'say "hi",\nplease', "completion": "hi"}, {"prompt": "é", "completion": " 7"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "list.json", "a.parquet"])
def test_zstd_files_are_read_like_plain_ones(tmp_path, name):
    plain = save_as(tmp_path / name, LINES)
    packed = str(tmp_path / (name + ".zst"))
    with pyarrow.CompressedOutputStream(packed, "zstd") as file:
        file.write(open(plain, "rb").read())
    placed = lambda source: [(where.rpartition(":")[2], row) for where, row in sources.read_rows(source)]
    assert placed(packed) == placed(plain)
    write(tmp_path / "bad.jsonl.zst", b"not packed")
    with pytest.raises(ValueError, match=r"bad\.jsonl\.zst: cannot be read"):
        sources.read_rows(str(tmp_path / "bad.jsonl.zst"))


def test_parquet_gzipped_and_with_columns_of_every_kind(tmp_path):
    import datetime
    table = pyarrow.table({"id": [1, 2], "when": [datetime.datetime(2026, 1, 1)] * 2, "score": [0.5, None], "messages": [TURNS, CHAT],
                           "embedding": [[1.0, 2.0]] * 2, "raw": [b"\xff", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    packed = write(tmp_path / "a.parquet.gz", gzip.compress((tmp_path / "a.parquet").read_bytes()))
    for path in (str(tmp_path / "a.parquet"), packed):
        rows = data.tokenize(sources.read_rows(path), make_tokenizer(), settings_of())
        assert rows.digest == tokenized([{"messages": TURNS}, {"messages": CHAT}]).digest
        cfg = config.from_dict({"data": {"train": path, "eval": "", "eval_rows": 1, "cache": str(tmp_path / "cache")},
                                "eval": {"samples": 1}})
        assert len(data.prompts(cfg, make_tokenizer())) == 1  # held-out rows are kept as JSON, which has no times and no bytes


def test_several_shards_are_read_in_order_of_their_names(tmp_path):
    for number, text in (("00001", "b"), ("00000", "a"), ("00002", "c")):
        save_as(tmp_path / f"train-{number}.parquet", [{"text": text}])
    rows = sources.read_rows(str(tmp_path / "train-*.parquet"))
    assert [row["text"] for _, row in rows] == ["a", "b", "c"] and rows[1][0].endswith("train-00001.parquet:row 1")
    with pytest.raises(ValueError, match="matches no file"):
        sources.read_rows(str(tmp_path / "none-*.parquet"))
    assert sources.fingerprint(str(tmp_path / "train-*.parquet")) != sources.fingerprint(str(tmp_path / "train-0000[01].parquet"))


def test_a_folder_is_refused_with_what_to_write_instead(tmp_path):
    with pytest.raises(ValueError, match=r"is not a kind of file .*Of a folder, name the files: .*/\*\.parquet"):
        sources.read_rows(str(tmp_path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_only_so_many_rows_are_read_and_nothing_behind_them(tmp_path, name):
    path = save_as(tmp_path / name, [{"text": f"row {i}"} for i in range(5000)])
    taken = list(sources.stream(path, limit=3))
    assert [row["text"] for _, row in taken] == ["row 0", "row 1", "row 2"]
    broken = write(tmp_path / "b.jsonl", b'{"text": "a"}\n{"text": "b"}\nbroken\n')
    assert len(list(sources.stream(broken, limit=2))) == 2
    stream = sources.stream(path)
    assert next(stream)[1] == {"text": "row 0"}  # one row costs one row
    stream.close()


def test_first_rows_are_taken_of_each_source_of_a_run(tmp_path):
    a, b = (save_as(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(50)]) for name in "ab")
    cfg = config.from_dict({"data": {"mixture": [[a, 1], [b, 1]], "eval": a, "first_rows": 4, "cache": "off", "audit": "off"}})
    rows, held = data.load(cfg, make_tokenizer(template=None, eos="</s>"))
    assert list(rows.names) == [f"{a}:{i}" for i in range(1, 5)] + [f"{b}:{i}" for i in range(1, 5)] and len(held) == 50


def test_a_hub_data_set_is_streamed_where_a_number_of_rows_is_stated(tmp_path, monkeypatch):
    import datasets
    asked, given = [], []

    def load_dataset(name, split, **more):
        asked.append((name, split, more))
        return datasets.IterableDataset.from_generator(lambda: (given.append(i) or {"text": f"row {i}"} for i in range(10_000)))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "_hub_revision", lambda source: "")
    held = save_as(tmp_path / "e.jsonl", [{"text": "held"}])
    cfg = config.from_dict({"data": {"train": "someone/rows:train", "eval": held, "first_rows": 20, "audit": "off",
                                     "cache": str(tmp_path / "cache")}})
    rows, _ = data.load(cfg, make_tokenizer(template=None, eos="</s>"))
    assert len(rows) == 20 and all(call == ("someone/rows", "train", {"streaming": True}) for call in asked) and max(given) < 25
    assert not list((tmp_path / "cache").glob("*/train.arrow"))  # nothing vouches for the content, so it is not found again
    monkeypatch.setattr(sources, "_hub_revision", lambda source: "abc")
    data.load(cfg, make_tokenizer(template=None, eos="</s>"))
    count = len(asked)
    data.load(cfg, make_tokenizer(template=None, eos="</s>"))
    assert len(asked) == count and list((tmp_path / "cache").glob("*/train.arrow"))


def test_a_fingerprint_is_of_the_content_not_the_name(tmp_path):
    a, b = (write(tmp_path / name, '{"text": "a"}\n') for name in ("a.jsonl", "b.jsonl"))
    assert sources.fingerprint(a) == sources.fingerprint(b)
    write(tmp_path / "b.jsonl", '{"text": "b"}\n')
    assert sources.fingerprint(a) != sources.fingerprint(b)
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file"):
        sources.fingerprint(str(tmp_path / "none.jsonl"))


# ------------------------------------------------------------------------------------------------------------ mixtures

def mixed(tmp_path, sizes, weights, **changes):
    files = [save_as(tmp_path / f"{k}.jsonl", [{"text": f"source {k} row {i}"} for i in range(n)]) for k, n in enumerate(sizes)]
    cfg = config.from_dict({"data": {"mixture": [list(pair) for pair in zip(files, weights)], "eval": files[0], "cache": "off",
                                     "audit": "off", **changes}})
    return data.load(cfg, make_tokenizer(template=None, eos="</s>"))[0]


def source_of(rows, sizes, order):
    return [next(k for k in range(len(sizes)) if r < sum(sizes[:k + 1])) for r in order]


def test_a_mixture_gives_every_source_its_share_and_every_row_of_a_source_its_turn(tmp_path):
    sizes, weights = (40, 10, 50), (1.0, 3.0, 1.0)
    rows = mixed(tmp_path, sizes, weights)
    assert len(rows) == 100 and rows.mixture == tuple(zip(sizes, weights))
    order = data.samples(rows, 0, 0, 1000)
    for epoch in range(10):
        counts = [source_of(rows, sizes, order[epoch * 100:epoch * 100 + 100]).count(k) for k in range(3)]
        assert counts == [20, 60, 20]
    seen = [order.count(r) for r in range(100)]
    assert set(seen[:40]) == {5} and set(seen[40:50]) == {60} and set(seen[50:]) == {4}
    early = source_of(rows, sizes, order[:25])
    assert len(set(early)) == 3  # mixed, not one after another


def test_a_mixture_is_a_pure_function_of_seed_and_position(tmp_path):
    rows = mixed(tmp_path, (7, 5, 3), (1, 2, 0.5))
    whole = data.samples(rows, 3, 0, 200)
    assert all(data.samples(rows, 3, start, 17) == whole[start:start + 17] for start in range(0, 180, 7))
    assert whole != data.samples(rows, 4, 0, 200)
    data._permutation.cache_clear()
    assert whole == data.samples(rows, 3, 0, 200)


def test_one_source_is_sampled_as_ever(tmp_path):
    rows = mixed(tmp_path, (9, 4), (1, 1))
    rows.mixture = ()
    assert data.samples(rows, 0, 5, 30) == data.sample_stream(13, 0, 5, 30)


def test_weights_and_sources_are_part_of_the_digest(tmp_path):
    digests = [mixed(tmp_path, (9, 4), weights).digest for weights in ((1, 1), (1, 2), (1, 1))]
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize("mixture, message", [
    ([["a.jsonl", 0]], "data.mixture: must be a list of .source, weight above 0."), ([["a.jsonl"]], "data.mixture: must be"),
    (["a.jsonl"], "data.mixture: must be"),
    ([["a.jsonl", 1], ["a.jsonl", 2]], "data.mixture: a source stands twice"), ([["a.jsonl", "1"]], "data.mixture: must be"),
])
def test_a_mixture_that_makes_no_sense_is_refused_by_key(mixture, message):
    with pytest.raises(ValueError, match=message):
        config.from_dict({"data": {"mixture": mixture}})
    with pytest.raises(ValueError, match="data.mixture, data.train: .*remove one"):
        config.from_dict({"data": {"mixture": [["a.jsonl", 1]], "train": "b.jsonl"}})


def test_a_source_that_gives_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.mixture: source 2 would give no sample in an epoch of 12"):
        mixed(tmp_path, (9, 3), (1, 0.01))


def test_a_mixtures_paths_are_found_beside_the_program_and_survive_a_saved_configuration(tmp_path):
    cfg = config.from_dict({"data": {"mixture": [["configs/quickstart.json", 2]]}})
    again = config.located(config.located(cfg))
    assert again.data.mixture in ([[str(config.PROJECT / "configs/quickstart.json"), 2]], [["configs/quickstart.json", 2]])
    assert config.from_dict(again.to_dict()) == again
