"""--overfit: which settings it takes, the loss that contradictory rows leave, and the reason where rows are not learnt."""
import math
import pathlib

import numpy as np
import pytest
import torch
from conftest import make_config

import config
import data
import model
import overfit
import record


def rows_of(*texts, supervised_from=1):
    """data.Rows of one token a letter; targets begin at the letter `supervised_from`."""
    ids = np.concatenate([np.array([ord(letter) for letter in text], dtype=np.int32) for text in texts])
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    supervised = np.concatenate([np.arange(len(text)) >= supervised_from for text in texts])
    return data.Rows(ids, offsets, supervised, [f"my.jsonl:{i + 1}" for i in range(len(texts))], {}, "")


# ----------------------------------------------------------------------------------------------------------- settings

def test_all_settings_but_those_named_stay():
    before = config.from_dict({"lora": {"r": 8, "dropout": 0.1}, "train": {"max_steps": 2000, "weight_decay": 0.1},
                               "eval": {"patience": 3}, "model": {"quant": "int8"},
                               "schedule": {"lr_kind": "points", "lr_points": [[1, 1.0]], "batch_points": [[1, 8]],
                                            "clip_percentile": 50.0}, "memory": {"max_tokens": 512}})
    after = overfit.settings(before, 5)
    assert after.samples_per_step == 5 and after.train.max_steps == 2000 and after.lora.dropout == 0
    assert after.schedule.lr_kind == "constant" and after.schedule.batch_points == []
    same = {key for key, value in before.flat().items() if after.flat()[key] == value}
    assert {"lora.r", "model.quant", "memory.max_tokens", "train.seed", "lora.targets", "schedule.clip_norm", "proof.enabled"} <= same
    assert config.from_dict({}) == overfit.settings.__globals__["configuration"].from_dict({}), "the given configuration is not written to"
    assert overfit.settings(config.from_dict({"schedule": {"learning_rate": 0.01}}), 2).schedule.learning_rate == 0.01
    assert overfit.settings(config.from_dict({"train": {"max_steps": 0, "epochs": 1.0}}), 2).train.max_steps == overfit.STEPS


FLAGS = {"out": "", "resume": None, "accept": "", "overwrite": False, "preflight": False, "overfit": "8"}


@pytest.mark.parametrize("flags, words", [({"overfit": "0"}, "above 0, .*got 0"), ({"overfit": "-3"}, "got -3"), ({"overfit": "eight"}, "got eight"),
                                          ({"resume": True}, "leave out --resume"), ({"preflight": True}, "leave out --preflight")])
def test_what_is_no_number_of_rows_and_flags_that_make_no_sense_are_refused(flags, words):
    with pytest.raises(ValueError, match=f"--overfit.*{words}"):
        overfit.begin(config.from_dict({}), pathlib.Path("runs/a"), FLAGS | flags)


def test_a_check_replaces_an_earlier_check_and_nothing_else():
    flags = dict(FLAGS)
    assert overfit.begin(config.from_dict({}), pathlib.Path("runs/a"), flags)[1] == pathlib.Path("runs/a-overfit") and flags["overwrite"]
    flags = FLAGS | {"out": "runs/b"}
    assert overfit.begin(config.from_dict({}), pathlib.Path("runs/b"), flags)[1] == pathlib.Path("runs/b") and not flags["overwrite"]


def test_the_rows_are_the_first_of_the_first_source():
    after = overfit.settings(config.from_dict({"data": {"mixture": [["a.jsonl", 3], ["b.jsonl", 1]], "eval": "", "drop": ["leak"]}}), 4)
    assert (after.data.train, after.data.mixture, after.data.first_rows, after.data.eval, after.data.drop) == ("a.jsonl", [], 4, "a.jsonl", [])


# ---------------------------------------------------------------------------------------------------------- the floor

def test_rows_that_agree_leave_nothing():
    assert overfit.floor(rows_of("Qabc", "Rabd", "Qabc")) == (0.0, [])


def test_the_same_prompt_with_two_answers_leaves_one_coin_toss_and_is_named():
    lowest, pairs = overfit.floor(rows_of("Qyes", "Qno!", "Rno!"))
    assert lowest == pytest.approx(2 * math.log(2) / 9) and pairs == [("my.jsonl:1", "my.jsonl:2")]


def test_what_is_not_supervised_decides_nothing():
    assert overfit.floor(rows_of("abX", "acX", supervised_from=2)) == (0.0, [])
    assert overfit.floor(rows_of("abX", "abY", supervised_from=2))[0] == pytest.approx(math.log(2))


def test_the_floor_is_the_least_that_a_table_of_probabilities_reaches():
    """Against the best of all models that see only what stands before: one free distribution for each beginning, by gradient descent."""
    rows = rows_of("aab", "aac", "aac", "abb", "aab")
    beginnings = {}
    places = []
    for r in range(len(rows)):
        text = rows.ids[rows.offsets[r]:rows.offsets[r + 1]].tolist()
        places += [(beginnings.setdefault(tuple(text[:i]), len(beginnings)), text[i] - 97) for i in range(1, 3)]
    logits = torch.zeros(len(beginnings), 3, requires_grad=True)
    index, target = torch.tensor(places).T
    for _ in range(4000):
        loss = torch.nn.functional.cross_entropy(logits[index], target)
        gradient, = torch.autograd.grad(loss, logits)
        logits.data -= 2 * gradient
    assert overfit.floor(rows)[0] == pytest.approx(loss.item(), abs=2e-3)


# -------------------------------------------------------------------------------------------------------- the verdict

def lines_of(losses, evals=(), accuracy=0.5, **tags):
    lines = [{"step": i + 1, "train/loss": loss, "train/grad_norm": 1.0, "train/learning_rate": 1e-3, "train/clipped": 0.0,
              "train/skipped": 0.0, "train/clip_threshold": 1.0}
             | {f"train/{tag}": value for tag, value in tags.items()} for i, loss in enumerate(losses)]
    for step, loss in evals:
        lines[step - 1] |= {"eval/loss": loss, "eval/token_accuracy": accuracy}
    return lines


FALLING = [4 * 0.95**i for i in range(200)]


@pytest.mark.parametrize("lines, floor, code, words", [
    (lines_of(FALLING, [(200, 0.001)]), 0.0, 0, "LEARNT: loss 4.000 -> 0.000"),
    (lines_of([4 * 0.995**i for i in range(200)]), 0.0, 5, "too short"),
    (lines_of([4.0] * 200), 0.0, 5, "stayed where it was"),
    (lines_of([4.0] * 200, grad_norm=0.0), 0.0, 5, "exactly 0.0"),
    (lines_of([4.0] * 200, learning_rate=0.0), 0.0, 5, "rate was 0"),
    (lines_of([4.0] * 200, clipped=1.0, grad_norm=1.0, clip_threshold=1e-6), 0.0, 5, "clip_norm"),
    (lines_of([4.0] * 50 + [9.0] * 150), 0.0, 5, "too high"),
    (lines_of([max(1.0, 4 - i / 10) for i in range(200)]), 0.0, 5, "no longer fell"),
    (lines_of([max(0.7, loss) for loss in FALLING]), 0.65, 0, "go on differently"),
    (lines_of([max(1.2, loss) for loss in FALLING]), 0.65, 5, "go on differently"),
    (lines_of([math.nan] * 200, skipped=1.0), 0.0, 5, "no verdict"),
    (lines_of([4.0] + [math.nan] * 200, skipped=1.0), 0.0, 5, "not applied"),
    ([], 0.0, 5, "no verdict"),
    (lines_of([max(0.14, loss) for loss in FALLING], [(200, 0.14)], accuracy=1.0), 0.0, 0, "puts every token of the rows first"),
    (lines_of([max(0.14, loss) for loss in FALLING], [(200, 0.14)], accuracy=0.99), 0.0, 5, "no longer fell"),
    (lines_of([0.14] * 200, [(200, 0.14)], accuracy=1.0), 0.0, 5, "NOT LEARNT"),
    (lines_of([4.0]), 0.0, 5, "NOT LEARNT"),
])
def test_the_reason_is_named(lines, floor, code, words):
    got, text = overfit.judge(lines, floor, [("a.jsonl:1", "a.jsonl:2")] if floor else [])
    assert got == code and words in " ".join(text.split()), text
    assert max(map(len, text.splitlines())) <= 80


def test_a_tiny_model_learns_rows_by_heart_down_to_what_contradictions_leave(tmp_path_factory):
    """With the settings of `settings`, in a loop like train.py's: three rows that agree, and two answers to one question."""
    from conftest import make_model
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, initializer_range=0.3)  # a head that can be sure of something
    for texts in (["Qyes.", "Rno..", "Salso"], ["Qyes.", "Qno..", "Rno.."]):
        rows = rows_of(*texts)
        lowest, _ = overfit.floor(rows)
        settings = overfit.settings(make_config(folder, lora={"r": 16}, train={"max_steps": 1000}, schedule={"learning_rate": 1e-2}), len(rows))
        network = model.load(settings, "cpu")
        flat = network.adapter_memory.flat
        optimizer, reached = torch.optim.Adam([flat], lr=settings.schedule.learning_rate), None
        batch, = data.pack(rows, range(len(rows)), 512)
        for step in range(1, settings.train.max_steps + 1):
            flat.grad.zero_()
            loss = model.summed_loss(network, batch)[0] / len(batch.targets)
            loss.backward()
            optimizer.step()
            if overfit.learnt(loss.item(), lowest):
                reached = step
                break
        assert reached and loss.item() >= lowest, (texts, loss.item(), lowest)


@pytest.fixture
def check(tiny_inputs, tmp_path, monkeypatch):
    """check(*options): train.py's main with --overfit 3 over tiny inputs, 20 steps of it."""
    import train
    from conftest import settings_of
    monkeypatch.setattr(overfit, "STEPS", 20)
    monkeypatch.setattr(train, "catch_signals", list)
    monkeypatch.chdir(tmp_path)
    path = settings_of(tiny_inputs, tmp_path / "tiny.json")
    return lambda *options: train.main([str(path), "--overfit", "3", *options])


def test_a_check_evaluates_on_the_rows_it_trains_on_and_ends_with_its_reason(check, tmp_path, capsys):
    assert check() == 5
    told = capsys.readouterr().out
    assert "3 to train on, 3 to evaluate on" in told and "overfit    NOT LEARNT" in told and "verdict" not in told
    lines = record.read_metrics(tmp_path / "runs/tiny-overfit")
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 20]
    assert check() == 5, "the next check replaces it"


def test_a_check_ends_once_the_rows_are_known(check, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(overfit, "NEAR", 9.0)
    code, told = check(), capsys.readouterr().out
    assert code == 0 and "overfit    LEARNT" in told, told
    assert record.read_metrics(tmp_path / "runs/tiny-overfit")[-1]["step"] == 0


def test_a_check_over_a_cut_graph_stops_with_the_proofs_word(check, capsys, monkeypatch):
    real = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda *a: real(*a).detach().requires_grad_() if torch.is_grad_enabled() else real(*a))
    assert check("--proof.enabled=true") == 4 and "gradients  DEAD" in capsys.readouterr().out
