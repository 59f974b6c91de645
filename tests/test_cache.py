"""Tokens on disk: found again only where nothing changed, whole or not there, whatever happens to who writes or reads them."""
import ast
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import numpy as np
import pytest

import cache
import config
import data
import tokens
from test_data import CHATML, make_tokenizer, write, write_rows

PROJECT = config.PROJECT


def settings_for(tmp_path, **changes):
    train = changes.pop("train", None) or write_rows(tmp_path / "train.jsonl", 40)
    evaluation = changes.pop("eval", None)
    evaluation = write_rows(tmp_path / "eval.jsonl", 7) if evaluation is None else evaluation
    return config.from_dict({"data": {"train": train, "eval": evaluation, "cache": str(tmp_path / "cache"), "audit": "off", **changes}})


def made(monkeypatch):
    """A list that grows with each file that is tokenised."""
    seen, real = [], cache.write_tokens
    monkeypatch.setattr(cache, "write_tokens", lambda path, parts: (seen.append(path.name), real(path, parts))[1])
    return seen


def same(a, b):
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("ids", "offsets", "supervised"))
    return arrays and list(a.names) == list(b.names) and a.digest == b.digest


@pytest.mark.parametrize("place", ["folder", "off"])
def test_tokens_from_disk_are_those_made_in_memory(tmp_path, place):
    cfg = settings_for(tmp_path, **({"cache": "off"} if place == "off" else {}))
    tokenizer = make_tokenizer()
    for _ in range(2):
        for rows, source in zip(data.load(cfg, tokenizer), (cfg.data.train, cfg.data.eval)):
            plain = data.tokenize(data.read_rows(source), tokenizer, cfg.data)
            assert same(rows, plain) and (rows.ids.dtype, rows.offsets.dtype, rows.supervised.dtype) == (np.int32, np.int64, bool)
            assert plain.counts == {name: count for name, count in rows.counts.items() if name != "rows_dropped"}
            assert [b.input_ids.tolist() for b in data.pack(rows, range(5), 64)] == [b.input_ids.tolist() for b in data.pack(plain, range(5), 64)]


def test_tokens_are_mapped_not_read_and_open_with_datasets(tmp_path):
    import datasets
    rows = data.load(settings_for(tmp_path), make_tokenizer())[0]
    assert not rows.ids.flags.owndata and not rows.ids.flags.writeable
    table = datasets.Dataset.from_file(str(next((tmp_path / "cache").glob("*/train.arrow"))))
    assert table[3]["ids"] == rows.ids[rows.offsets[3]:rows.offsets[4]].tolist() and table[3]["name"] == rows.names[3]
    assert [bool(s) for s in table[3]["supervised"]] == rows.supervised[rows.offsets[3]:rows.offsets[4]].tolist()


def test_a_second_start_tokenises_nothing_and_one_byte_more_everything(tmp_path, monkeypatch):
    seen, cfg = made(monkeypatch), settings_for(tmp_path)
    data.load(cfg, make_tokenizer()), data.load(cfg, make_tokenizer()), data.load_evaluation(cfg, make_tokenizer())
    assert seen == ["train.arrow", "eval.arrow"]
    with open(cfg.data.train, "a") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    assert len(data.load(cfg, make_tokenizer())[0]) == 41 and seen == ["train.arrow", "eval.arrow", "train.arrow"]


CHANGES = [dict(max_length=40), dict(too_long="drop"), dict(bad_rows="skip"), dict(supervise="all"), dict(first_rows=9), dict(drop=["one_word"]),
           dict(columns=["prompt=prompt", "completion=completion"]), dict(roles=["bot=assistant"])]


@pytest.mark.parametrize("change", CHANGES)
def test_every_setting_that_shapes_tokens_has_tokens_of_its_own(tmp_path, monkeypatch, change):
    train = write_rows(tmp_path / "train.jsonl", 40)
    with open(train, "a") as file:
        file.write(json.dumps({"prompt": "a longer question than others", "completion": "with an answer of words"}) + "\n")
    seen = made(monkeypatch)
    before, after = (settings_for(tmp_path, train=train, **changes) for changes in ({}, change))
    first, other = (data.load(cfg, make_tokenizer())[0] for cfg in (before, after))
    assert seen.count("train.arrow") == 2
    assert same(data.load(before, make_tokenizer())[0], first) and same(data.load(after, make_tokenizer())[0], other)
    assert seen.count("train.arrow") == 2


def test_another_template_tokenizer_or_held_out_part_has_tokens_of_its_own(tmp_path, monkeypatch):
    seen, cfg = made(monkeypatch), settings_for(tmp_path)
    others = make_tokenizer(CHATML + "{# another #}"), make_tokenizer(merges=[("a", "b")]), make_tokenizer(eos="</s>")
    for tokenizer in (make_tokenizer(), *others, make_tokenizer()):
        data.load(cfg, tokenizer)
    assert seen == ["train.arrow", "eval.arrow"] * 4
    tree = settings_for(tmp_path, eval="").to_dict()["data"]
    held = [config.from_dict({"data": tree | {"eval_rows": n}, "train": {"seed": seed}}) for n, seed in ((5, 0), (6, 0), (5, 1), (5, 0))]
    del seen[:]
    for c in held:
        data.load(c, make_tokenizer())
    assert seen == ["eval.arrow", "train.arrow"] * 3


def test_what_another_version_of_the_code_made_is_made_anew(tmp_path, monkeypatch):
    seen, cfg = made(monkeypatch), settings_for(tmp_path, audit="auto")
    data.load(cfg, make_tokenizer()), data.inspect(cfg, make_tokenizer())
    keys = {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    with monkeypatch.context() as other:
        other.setattr(cache, "_code", [*cache._code[:-1], "another text of tokens.py"])
        data.load(cfg, make_tokenizer())
        assert seen == ["train.arrow", "eval.arrow"] * 2
    assert len(keys) == 3 and len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 6
    data.load(cfg, make_tokenizer())
    assert seen == ["train.arrow", "eval.arrow"] * 2


def test_every_file_that_makes_tokens_is_in_their_key():
    """All that data.py imports, and what that imports, but for what reads settings, runs chunks, shows, shares out or refuses."""
    def own(name):
        tree = ast.parse((PROJECT / f"{name}.py").read_text(encoding="utf-8"))
        named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        named += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        return {name for name in named if (PROJECT / f"{name}.py").is_file()}

    found, left = set(), {"data"}
    while left:
        found |= left
        left = set().union(*map(own, left)) - found - {"config", "pool", "preview", "ranks", "trust", "words"}
    assert {f"{name}.py" for name in found} == set(cache.CODE)


def test_without_a_cache_no_file_is_left_and_rows_and_dropped_rows_can_be_read_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    train = write_rows(tmp_path / "train.jsonl", 40)
    with open(train, "a") as file:
        file.write(json.dumps({"prompt": "What now?", "completion": ""}) + "\n")
    cfg = settings_for(tmp_path, train=train, cache="off", drop=["empty"])
    rows, _ = data.load(cfg, make_tokenizer())
    assert list((tmp_path / "temporary").iterdir()) == []
    assert same(rows, data.tokenize(data.read_rows(train)[:40], make_tokenizer(), cfg.data))
    for _ in range(2):
        data.keep_dropped(rows, tmp_path)
        assert json.loads((tmp_path / "rows-dropped.jsonl").read_text())["record"] == {"prompt": "What now?", "completion": ""}


def test_an_entry_of_findings_that_lacks_something_is_made_anew(tmp_path, capsys):
    cfg = settings_for(tmp_path, audit="full")
    seen = data.inspect(cfg, make_tokenizer())
    file = next((tmp_path / "cache").glob("*/found.jsonl")).with_name("meta.json")
    tree = json.loads(file.read_text())
    del tree["meta"]["near"]
    file.write_text(json.dumps(sealed(tree)))
    again = data.inspect(cfg, make_tokenizer())
    assert again["near"] is seen["near"] is True and "damaged (KeyError: 'near'); it is made anew" in capsys.readouterr().err


def sealed(tree):
    """meta.json's content with the digest that it would have been written with."""
    return {"files": tree["files"], "meta": tree["meta"], "sha256": cache._sha256_of({"files": tree["files"], "meta": tree["meta"]})}


@pytest.mark.parametrize("fault", ["cut", "flip", "gone", "meta", "changed", "lacks"])
def test_a_damaged_entry_is_told_and_made_anew(tmp_path, capsys, fault):
    cfg = settings_for(tmp_path)
    good = data.tokenize(data.read_rows(cfg.data.train), make_tokenizer(), cfg.data)
    data.load(cfg, make_tokenizer())
    file = next((tmp_path / "cache").glob("*/train.arrow"))
    content = bytearray(file.read_bytes())
    if fault == "cut":
        file.write_bytes(content[:-64])
    if fault == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    if fault == "gone":
        file.unlink()
    if fault == "meta":
        (file.parent / "meta.json").write_text("{")
    if fault == "lacks":  # as an older version of this code may have written it
        tree = json.loads((file.parent / "meta.json").read_text())
        del tree["meta"]["train"]["too_long"]
        (file.parent / "meta.json").write_text(json.dumps(sealed(tree)))
    if fault == "changed":
        tree = json.loads((file.parent / "meta.json").read_text())
        tree["meta"]["train"]["too_long"] = [1]  # another row than it was
        (file.parent / "meta.json").write_text(json.dumps(tree))
    assert same(data.load(cfg, make_tokenizer())[0], good)
    said = capsys.readouterr().err
    named = {"meta": "JSONDecodeError", "changed": "damaged (meta.json)", "lacks": "KeyError: 'too_long'"}.get(fault, "train.arrow")
    assert "damaged" in said and "made anew" in said and named in said
    assert same(data.load(cfg, make_tokenizer())[0], good) and not capsys.readouterr().err


def test_what_fails_while_it_is_made_leaves_nothing_that_looks_whole(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", 40)
    with open(train, "a") as file:
        file.write("{broken\n")
    with pytest.raises(ValueError, match=r"train\.jsonl:41: not valid JSON"):
        data.load(settings_for(tmp_path, train=train), make_tokenizer())
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_writer_killed_at_any_moment_leaves_nothing_half_there(tmp_path):
    """The process is killed at a write of its own choice, 1 to 9 writes in; the next one makes the entry whole."""
    cfg = settings_for(tmp_path)
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = [{str(PROJECT)!r}, {str(PROJECT / 'tests')!r}]
        import cache
        from test_cache import *
        left = [int(sys.argv[1])]
        def counting(real):
            def call(*args, **kwargs):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            return call
        cache.sync, os.rename, cache.sha256 = map(counting, (cache.sync, os.rename, cache.sha256))
        data.load(config.from_dict({{"data": {cfg.to_dict()['data']!r}}}), make_tokenizer())
    """)
    children = [subprocess.Popen([sys.executable, "-c", script, str(n)], env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}) for n in (1, 4)]
    assert [child.wait() for child in children] == [-signal.SIGKILL] * 2
    rows = data.load(cfg, make_tokenizer())[0]
    assert same(rows, data.tokenize(data.read_rows(cfg.data.train), make_tokenizer(), cfg.data))
    left = [path for path in (tmp_path / "cache").glob("*.tmp")]
    for path in left:
        os.utime(path, (time.time() - 2 * cache.STALE_SECONDS,) * 2)
    data.load(settings_for(tmp_path, max_length=99), make_tokenizer())
    assert left and not [path for path in left if path.exists()]


def _load_in_child(cfg, queue):
    seen, real = [], cache.write_tokens

    def slow(path, parts):
        seen.append(path.name)
        time.sleep(0.3)
        return real(path, parts)
    cache.write_tokens = slow
    queue.put((data.load(cfg, make_tokenizer())[0].digest, len(seen)))


def test_of_two_writers_of_one_key_one_waits_and_reads(tmp_path):
    cfg = settings_for(tmp_path)
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    children = [fork.Process(target=_load_in_child, args=(cfg, queue)) for _ in range(3)]
    for child in children:
        child.start()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert len({digest for digest, _ in results}) == 1
    assert sum(count for _, count in results) == 2  # the training and the evaluation rows, once each


def test_a_place_that_cannot_be_written_is_refused_if_asked_for_and_told_if_it_is_the_default(tmp_path, monkeypatch, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match="data.cache: .*cannot be written.*another folder, or off"):
        cache.folder(str(blocked / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert cache.folder("auto") is None and "tokens are not kept" in capsys.readouterr().err
    assert len(data.load(settings_for(tmp_path, cache="auto"), make_tokenizer())[0]) == 40
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder("auto") == tmp_path / "xdg" / "rawlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder("auto") == tmp_path / "home" / ".cache" / "rawlora"
    assert cache.folder("off") is None


def test_a_disk_that_fills_is_told_with_the_remedy_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path, parts):
        list(parts)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(cache, "write_tokens", full)
    with pytest.raises(ValueError, match="data.cache: .*No space left on device.*make room"):
        data.load(settings_for(tmp_path), make_tokenizer())
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_workers_make_the_tokens_that_one_process_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK_ROWS", 4)
    cfg = settings_for(tmp_path)
    assert same(data.load(cfg, make_tokenizer())[0], data.tokenize(data.read_rows(cfg.data.train), make_tokenizer(), cfg.data))
    with open(cfg.data.train, "a") as file:
        file.write('{"prompt": 3, "completion": "x"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:41: prompt must be"):  # raised in a worker
        data.load(cfg, make_tokenizer())


def test_prompts_of_held_out_rows_are_those_rows(tmp_path):
    cfg = config.from_dict({"data": settings_for(tmp_path, eval="", eval_rows=6).to_dict()["data"], "eval": {"samples": 3}})
    expected = data.prompts(cfg, make_tokenizer(), data.read_splits(cfg)[1])
    assert data.prompts(cfg, make_tokenizer()) == expected and len(expected) == 3
    assert data.prompts(config.from_dict({"data": cfg.to_dict()["data"], "eval": {"samples": 6}}), make_tokenizer())[:3] == expected


def test_findings_of_a_mixture_are_not_taken_for_those_of_training_and_evaluation_rows(tmp_path):
    a, b = write_rows(tmp_path / "a.jsonl", 12), write_rows(tmp_path / "b.jsonl", 30)  # b begins with a's rows
    common = dict(cache=str(tmp_path / "cache"))
    apart = config.from_dict({"data": {"mixture": [[b, 1]], "eval": a, **common}})
    mixed = config.from_dict({"data": {"mixture": [[b, 1], [a, 1]], "eval": "", "eval_rows": 3, **common}})
    assert data.inspect(apart, make_tokenizer())["rows"] == 30 and data.inspect(mixed, make_tokenizer())["rows"] == 42
