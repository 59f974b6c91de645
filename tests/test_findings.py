"""bench/findings.py runs and keeps experiments; docs/make_findings.py makes the page of what was kept, and of nothing else."""
import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zlib

import numpy as np
import pytest
from conftest import PROJECT, settings_of

import compare
import config
import record
import verdict


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


findings, make = loaded(PROJECT / "bench" / "findings.py"), loaded(PROJECT / "docs" / "make_findings.py")


# ------------------------------------------------------------------------------------------------------------- the plan

def test_every_training_has_settings_that_hold():
    for experiment in findings.experiments():
        for command in experiment.commands:
            if command[0] != "eval.py":
                words, _, overrides = config.command_line(command[1:], {"out": "", "adapters": ""})
                config.read(PROJECT / words[-1], overrides)
            assert (PROJECT / command[0]).is_file()


def test_a_cure_changes_one_thing_of_the_failed_run():
    of = {experiment.name: experiment.commands[0] for experiment in findings.experiments()}
    for name, count in (("cure-rate", 1), ("cure-floor", 1), ("cure-batch", 2), ("cure-steps", 2)):  # a batch is two keys
        changed = set(of[f"{name}-s0"]) - set(of["seed-failure-s0"])
        assert len(changed) == count + 1, changed  # and the folder


def test_seeds_differ_in_nothing_but_the_seed():
    of = {experiment.name: experiment.commands[0] for experiment in findings.experiments()}
    plain = lambda name: {word for word in of[name] if not word.startswith(("--out", "--train.seed"))}
    for name in of:
        if name.endswith("-s1") and not name.startswith("approach1"):  # whose first seed runs as it stands, for its time
            assert plain(name) == plain(name[:-1] + "0") == plain(name[:-1] + "2")


def test_a_rate_changes_the_rate_and_its_floor_and_a_schedule_at_it_one_thing_more():
    of = {experiment.name: set(experiment.commands[0]) for experiment in findings.experiments()}
    keys = lambda words: sorted(word.partition("=")[0].removeprefix("--schedule.") for word in words if not word.startswith("--out"))
    plain = of["approach1-s1"] - {"--train.seed=1"} | {"--train.seed=0", "--eval.samples=0", "--save.every_steps=0"}
    for name in ("2e-4", "5e-4", "1e-3", "2e-3"):
        values = dict(word.removeprefix("--schedule.").split("=") for word in of[f"rate-{name}-s0"] if "--schedule." in word)
        assert keys(of[f"rate-{name}-s0"] - plain) == ["learning_rate", "lr_min"]
        assert float(values["lr_min"]) == pytest.approx(float(values["learning_rate"]) / 10) and float(name) == float(values["learning_rate"])
    for name, key in (("wsd", "lr_kind"), ("constant", "lr_kind"), ("zero", "lr_min"), ("clip-off", "clip_norm")):
        assert keys(of[f"rate-5e-4-{name}-s0"] - of["rate-5e-4-s0"]) == [key]


def test_what_is_kept_in_the_repository_was_made_by_the_plan_s_commands():
    kept = [json.loads(path.read_text()) for path in (PROJECT / "docs" / "findings").glob("*/summary.json")]
    of = {experiment.name: experiment for experiment in findings.experiments()}
    for about in kept:
        planned = [f"python {' '.join(command)}" for command in of[about["name"]].commands]
        assert [set(command.split()) for command in about["commands"]] == [set(command.split()) for command in planned], about["name"]
        assert about["exit"] in of[about["name"]].ends


def test_what_is_kept_in_the_repository_ran_with_the_settings_that_the_plan_s_commands_give_today():
    checked = 0
    for path in (PROJECT / "docs" / "findings").glob("*/config.json"):
        if not (planned := json.loads(json.dumps(configured(path.parent.name)))):
            continue
        kept, checked = json.loads(path.read_text()), checked + 1
        planned["model"]["path"] = planned["model"]["path"].rpartition("/")[2]
        if planned["model"]["compute_dtype"] == "auto":
            planned["model"]["compute_dtype"] = "bf16"  # which the GPUs that made them have
        for section in set(kept) - {*compare.HOW_ONLY}:
            assert kept[section] == planned[section], (path.parent.name, section)
    assert checked > 50


def test_a_record_says_with_what_other_settings_it_was_made(tmp_path):
    plan = [findings.training("short", "approach1", {"train.max_steps": 2000, "train.seed": 1}, 1),
            findings.Experiment("asked", [["eval.py", "--ckpt=WORK/short"]], 1)]
    for experiment in plan:
        (tmp_path / f"{experiment.name}.json").write_text('[{"seconds": 1, "beside": 0, "exit": 0}]')
        findings.write(experiment, tmp_path, None, tmp_path / "kept", (("train.max_steps", "4"),))
    short, asked = (json.loads((tmp_path / "kept" / e.name / "summary.json").read_text())["commands"][0].split() for e in plan)
    assert "--train.max_steps=4" in short and "--train.max_steps=2000" not in short and "--train.seed=1" in short
    assert asked == ["python", "eval.py", "--ckpt=WORK/short"]


# ------------------------------------------------------------------------------------------------------------- running

SLEEPER = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with open(sys.argv[1].partition("=")[2], "a") as log:
    log.write(f"{sys.argv[2]} begins\\n"); log.flush()
    time.sleep(float(sys.argv[3].partition("=")[2]))
    log.write(f"{sys.argv[2]} ends\\n")
"""


@pytest.fixture
def sleeper(tmp_path):
    """(make an experiment that sleeps, what happened in its order)."""
    program, log = tmp_path / "sleeper.py", tmp_path / "log"
    program.write_text(SLEEPER)
    log.write_text("")
    command = lambda name, seconds: [str(program), f"--log={log}", f"--name={name}", f"--for={seconds}"]
    made = lambda name, seconds, **more: findings.Experiment(name, [command(name, seconds)], 1, **more)
    return made, lambda: [line.removeprefix("--name=") for line in log.read_text().splitlines()]


def run(plan, tmp_path, jobs, seconds=60.0, done=lambda experiment: None, **more):
    return findings.run_all(plan, plan, tmp_path, tmp_path, jobs, seconds, (), done, **more)


def test_so_many_run_at_a_time_and_one_that_is_timed_runs_alone(sleeper, tmp_path):
    made, happened = sleeper
    plan = [made("a", 0.6), made("b", 0.6), made("timed", 0.2, alone=True), made("c", 0.1)]
    ended = []
    assert run(plan, tmp_path, 2, done=lambda experiment: ended.append(experiment.name)) == []
    order = happened()
    assert sorted(order[:2]) == ["a begins", "b begins"] and order[4:] == ["timed begins", "timed ends", "c begins", "c ends"]
    assert sorted(ended) == ["a", "b", "c", "timed"]
    beside = {name: findings.sittings_of(tmp_path, name)[0]["beside"] for name in ended}
    assert beside == {"a": 1, "b": 1, "timed": 0, "c": 0}


def test_a_command_of_the_project_runs_forked_and_speaks_to_its_log(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(findings.subprocess, "Popen", lambda *args, **rest: started.append(args))
    plan = [findings.Experiment(name, [[program, f"no/{name}.json"]], 1, ends=(2,)) for name, program in zip("ab", ("train.py", "bench/cut.py"))]
    assert run(plan, tmp_path, 2) == [] and not started
    for name in "ab":
        assert f"no/{name}.json: cannot read the configuration" in (tmp_path / f"{name}.log").read_text()


def test_what_can_go_on_later_begins_shortly_before_the_end_and_all_else_only_with_its_whole_time(sleeper, tmp_path, monkeypatch):
    made, happened = sleeper
    monkeypatch.setattr(findings, "TRAININGS", (made("", 0).commands[0][0],))
    short, other = made("short", 0.1)._replace(seconds=500), made("other", 0.1)._replace(seconds=500)
    other.commands[0][0] = str(shutil.copy(other.commands[0][0], tmp_path / "evaluates.py"))
    alone = made("timed", 0.1, alone=True)._replace(seconds=500)
    assert [e.name for e in run([short, other, alone], tmp_path, 2, findings.SOON + 5)] == ["other", "timed"]
    assert [e.name for e in run([made("none left", 0.1)], tmp_path, 2, findings.SOON - 1)] == ["none left"]
    assert [e.name for e in run([short._replace(name="last")], tmp_path, 2, findings.SOON + 5, last=True)] == ["last"]
    assert happened() == ["short begins", "short ends"]


def test_a_training_told_to_end_is_gone_on_with_and_its_summary_tells_of_both_sittings(tmp_path, tiny_inputs, capsys):
    work, into, steps = tmp_path / "work", tmp_path / "kept", 200
    settings_of(tiny_inputs, tmp_path / "tiny.json")
    values = findings.FIGURES | {"train.max_steps": steps, "eval.every_steps": 0, "train.seed": 3}
    plan = [findings.training("whole", "", values, 1)]
    plan[0].commands[0][1] = str(tmp_path / "tiny.json")
    work.mkdir()

    def tell():
        while findings.last_step(work / "whole") < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    assert run(plan, work, 1) == plan and "whole was stopped with 143" in capsys.readouterr().out
    saved = [path.name for path in (work / "whole" / "checkpoints").glob("step-*")]
    assert len(saved) == 1 and 3 <= int(saved[0][5:]) < steps  # though save.every_steps is 0
    assert run(plan, work, 1, done=lambda e: findings.write(e, work, None, into)) == []
    about, sittings = json.loads((into / "whole" / "summary.json").read_text()), findings.sittings_of(work, "whole")
    assert [sitting["exit"] for sitting in sittings] == [143, 0] and "--resume" in (work / "whole.log").read_text()
    assert about["exit"] == 0 and about["alone"] is False and about["seconds"] == pytest.approx(sum(s["seconds"] for s in sittings), abs=0.1)
    assert about["steps"] == steps and about["samples"] == 4 * steps
    assert sum(line.get("train/samples", 0) for line in record.read_metrics(into / "whole")) == 4 * steps
    assert findings.kept_already(plan[0], [into]) and not findings.kept_already(plan[0], [work])


def test_what_is_kept_is_not_run_again_unless_it_is_named(tmp_path, monkeypatch, capsys):
    plan = [findings.Experiment(name, [[str(tmp_path / "missing.py")]], 1, ends=(2,)) for name in ("a-s0", "a-s1", "b")]
    monkeypatch.setattr(findings, "experiments", lambda: plan)
    monkeypatch.setattr(findings, "commands_of", lambda rows, path: None)
    for name, code in (("a-s0", 2), ("b", 1)):  # b did not end
        (tmp_path / "kept" / name).mkdir(parents=True)
        (tmp_path / "kept" / name / "summary.json").write_text(json.dumps({"exit": code}))
    began = lambda: [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.endswith("begins")]
    places = [f"--kept={tmp_path / 'kept'}", "--minutes=1"]
    for number, (names, wanted) in enumerate(((["all"], ["a-s1", "b"]), (["a-*"], ["a-s1"]), (["a-s0"], ["a-s0"]))):
        assert findings.main([*names, *places, f"--work={tmp_path / str(number)}"]) == 0 and began() == wanted
    assert findings.main(["all", "--list", places[0]]) == 0
    assert "a-s0   1 s, kept" in (text := capsys.readouterr().out) and "2 experiments and 1 kept" in text


def test_only_a_peer_sees_the_peers_packages(tmp_path, monkeypatch):
    seen = []

    def started(words, env=None, **rest):
        seen.append((words[1], env.get("PYTHONPATH")))
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(findings, "subprocess", types.SimpleNamespace(Popen=started))
    monkeypatch.setattr(findings, "FORKED", ())
    monkeypatch.setenv("PYTHONPATH", "ours")
    (tmp_path / "tldr-train.jsonl").touch(), (tmp_path / "tldr-validation.jsonl").touch()
    assert run([e for e in findings.experiments() if e.name == "peer-trl-fp32"], tmp_path, 1, 1000.0, peers_site=tmp_path / "site") == []
    assert seen == [(str(PROJECT / "bench" / "peers.py"), f"ours{os.pathsep}{tmp_path / 'site'}"), (str(PROJECT / "eval.py"), "ours")]
    with pytest.raises(ValueError, match="--peers-site: .* is no folder"):
        findings.main(["peer-trl", f"--peers-site={tmp_path / 'nowhere'}", f"--rows={tmp_path}", f"--work={tmp_path}"])


@pytest.mark.parametrize("spoilt", [False, True])
def test_where_cuda_has_begun_before_the_fork_a_new_process_takes_over(tmp_path, spoilt):
    (tmp_path / "script.py").write_text("import sys; print('torch' in sys.modules, sys.argv[1:])")
    program = f"""
import sys; sys.path.insert(0, {str(PROJECT / 'bench')!r})
import forked, torch
torch.cuda._is_in_bad_fork = lambda: {spoilt}
forked.run_script([{str(tmp_path / 'script.py')!r}, "--word"], {str(tmp_path / 'out')!r}, {str(tmp_path / 'log')!r}, {{"OMP_NUM_THREADS": "1"}})
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "out").read_text() == f"{not spoilt} ['--word']\n"


def test_adapters_in_32_bits_are_trl_s_alone():
    command = [sys.executable, PROJECT / "bench" / "peers.py", "trl", "configs/approach1.json", "--adapters=fp16"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 2 and "there is --adapters=fp32, for trl" in answer.stderr + answer.stdout


def test_at_the_limit_runs_are_told_to_end_and_the_next_sitting_does_the_rest(sleeper, tmp_path):
    made, happened = sleeper
    plan = [made("short", 0.1), made("long", 30)]
    left = run(plan, tmp_path, 2, findings.GRACE + 2.5)
    assert [experiment.name for experiment in left] == ["long"]
    assert findings.sittings_of(tmp_path, "long")[0]["exit"] == 143 and "long ends" not in happened()
    assert run([plan[0], made("long", 0.1)], tmp_path, 2) == []
    assert happened().count("short begins") == 1 and happened()[-1] == "long ends"
    assert len(findings.sittings_of(tmp_path, "long")) == 2


def test_one_that_fails_stops_no_other_and_is_left(tmp_path, sleeper, capsys):
    made, _ = sleeper
    broken = findings.Experiment("broken", [[str(tmp_path / "missing.py")]], 1)
    reads = findings.Experiment("reads", [[str(tmp_path / "sleeper.py"), "--ckpt=WORK/broken"]], 1)
    left, said = run([broken, made("good", 0.1), reads], tmp_path, 1), capsys.readouterr().out
    assert [experiment.name for experiment in left] == ["broken", "reads"] and "broken FAILED" in said
    assert f"reads reads broken, which has not ended in {tmp_path}" in said


def test_a_signal_ends_everything_with_what_runs_told_to_save(tmp_path, sleeper):
    program = f"""
import sys; sys.path.insert(0, {str(PROJECT / 'bench')!r})
import findings, pathlib
place = pathlib.Path({str(tmp_path)!r})
e = findings.Experiment("a", [[str(place / "sleeper.py"), f"--log={{place}}/log", "--name=a", "--for=60"]], 1)
findings.run_all([e], [e], place, place, 1, 600, (), print)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    while "a begins" not in (tmp_path / "log").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "a was stopped with 143" in process.communicate(timeout=20)[0]


# ------------------------------------------------------------------------------------------------------------- keeping

def test_a_thinned_record_keeps_sums_evaluations_and_alerts():
    lines = [{"step": 0, "eval/loss": 3.0, "eval/samples": '[{"text": "of a row"}]'}]
    lines += [{"step": step, "train/loss": 2.0 + step % 2, "train/grad_norm": 1.0, "train/seconds": 0.5, "train/samples": 8,
               "train/tokens": 100, "train/supervised_tokens": 20, "train/tokens_per_second": 200.0, "train/learning_rate": step * 1e-5} for step in range(1, 1001)]
    lines[333] |= {"alerts": '[{"name": "x"}]'}
    lines[1000] |= {"eval/loss": float("nan"), "adapters/modules": "{}"}
    kept = findings.thinned(lines, 50)
    total = lambda tag: sum(line.get(tag, 0) for line in kept)
    assert len(kept) < 60 and kept[0]["eval/loss"] == 3.0 and kept[-1]["eval/loss"] == "nan"
    assert [line["step"] for line in kept if "alerts" in line] == [333]
    assert total("train/samples") == 8000 and total("train/seconds") == pytest.approx(500)
    assert kept[-1]["train/learning_rate"] == 0.01 and kept[-1]["train/tokens_per_second"] == 200.0
    assert kept[5]["train/loss"] == pytest.approx(2.5) and "of a row" not in json.dumps(kept)


def test_a_command_is_right_whatever_stands_around_it():
    for text in ("ls -l", " ls -l\n", "`ls -l`", "```bash\nls -l\n```", "```\nls -l```"):
        assert findings.bare(text) == "ls -l"
    assert findings.bare("Use ls -l") != "ls -l" and findings.bare("ls -la") != "ls -l"


# ------------------------------------------------------------------------------------------------------------- the page

def configured(name):
    """The configuration that the plan's command gives a training, as config.json holds it; {} of what is no training."""
    command = next((e.commands[0] for e in findings.experiments() if e.name == name), ["eval.py"])
    if command[0] not in findings.TRAININGS:
        return {}
    words, _, overrides = config.command_line(command[1:], {"out": ""})
    return dataclasses.asdict(config.read(PROJECT / words[0], overrides))


def keep_one(folder, name, losses, rows=400, step=2000, digest="rows"):
    """A record of an experiment as bench/findings.py keeps it: `losses` by step, each row's own around them."""
    place, draw = folder / name, np.random.default_rng(5)
    tokens, row = draw.integers(5, 20, rows).astype(np.uint16), draw.normal(0, 0.5, rows)
    own = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.02, rows)
    metrics = []
    for at, value in losses.items():
        noise = row + own - ((row + own) * tokens).sum() / tokens.sum()
        nll = (value + noise) * tokens
        record.save_evaluation(place, at if at == "unquantised" else f"step-{at:06d}",
                               {"nll": nll, "tokens": tokens, "correct": (tokens // 2).astype(np.uint16)}, {"rows_digest": digest})
        if at != "unquantised":
            metrics.append({"step": at, "eval/loss": value, "eval/token_accuracy": 0.5, "train/loss": value + 0.1})
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (place / "config.json").write_text(json.dumps(configured(name)))
    (place / "verdict.json").write_text(json.dumps({"outcome": "PASS", "sets": {"minimum": "PASS", "optimal": "FAIL", "milestone": "PASS"}}))
    about = {"exit": 0, "seconds": 92.0, "alone": True, "steps": step, "samples": 64000, "step_seconds": 0.0105, "train_seconds": 40.4,
             "loss": [4.5, 2.1], "peak_memory_gib": 4.1, "norm": [0.8, 1.4, 2.7], "clipped": 0.9, "alerts": [], "forecast": [],
             "proof": [[0, 1.01, 0.07]], "diagnosis": [{"name": "x", "severity": "fault"}]}
    (place / "summary.json").write_text(json.dumps(about))


NAMES = (*make.BLOCKS, *(f"picture-{kind}" for kind in make.PICTURES))
PAGE = "# Page\n\n" + "".join(f"<!-- made: {name} -->\nold\n<!-- end -->\n\n" for name in NAMES)


def test_every_block_has_a_place_on_the_page():
    page = "".join((PROJECT / name).read_text(encoding="utf-8") for name in ("docs/FINDINGS.md", "README.md"))
    assert sorted(re.findall(r"<!-- made: ([\w-]+) -->", page)) == sorted(NAMES)


def row(text, label):
    return [cell.strip() for cell in next(line for line in text.splitlines() if line.startswith(f"| {label} ")).strip("|").split("|")]


def test_without_records_nothing_is_told_but_that_it_was_not_run(tmp_path):
    text = make.filled(PAGE, {}, tmp_path)
    assert "old" not in text and "0 of " in text and text.count("not run") > 40 and not list(tmp_path.glob("*.png"))
    assert set(re.findall(r"\d\.\d{3,}", text)) == {"2.7335", "2.7150", "2.9310"}  # the failed run's own figures


def test_a_difference_is_that_of_the_rows_and_is_called_clear_beyond_what_seeds_do(tmp_path):
    for seed, value in enumerate((2.150, 2.152, 2.148)):
        keep_one(tmp_path, f"approach1-s{seed}", {0: 4.6, 2000: value} | ({"unquantised": 3.9} if seed == 0 else {}))
    keep_one(tmp_path, "schedule-zero-s0", {0: 4.6, 2000: 2.153})
    keep_one(tmp_path, "schedule-wsd-s0", {0: 4.6, 2000: 2.05})
    keep_one(tmp_path, "schedule-no-clip-s0", {0: 4.6, 2000: 2.25})
    runs = make.read(tmp_path)
    deviation, freedom = make.seed_deviation(runs)
    assert deviation == pytest.approx(0.002, rel=1e-3) and freedom == 2
    text = make.filled(PAGE, runs, tmp_path)
    assert row(text, "cosine, floor 1e-5")[1:3] == ["3", "2.1500 ± 0.0020"]
    wsd, zero = row(text, "WSD, floor 1e-5"), row(text, "cosine to 0")
    assert wsd[3] == "-0.1000" and wsd[5] == "lower" and row(text, "not clipped")[5] == "higher" and zero[5] == "unclear"
    low, high = (float(part) for part in wsd[4].split(" to "))
    assert low < -0.1 < high < 0 and row(text, "constant")[1] == "not run"
    assert "NF4, double" in text and row(text, "16 bits")[1] == "3.9000" and "+0.7000" in text
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["findings-approaches.png", "findings-differences.png"]
    assert make.filled(text, runs, tmp_path) == text  # made again, it stays


@pytest.mark.parametrize("freedom, quantile", [(2, 4.3027), (4, 2.7764), (14, 2.1448)])
def test_what_seeds_do_is_judged_by_students_t(freedom, quantile):
    assert make.seed_noise(0.01, freedom, (1, 3)) == pytest.approx(0.01 * quantile * (4 / 3) ** 0.5, rel=1e-4)
    assert make.seed_noise(math.nan, 0, (1, 3)) == 0


def test_the_setting_whose_seeds_deviate_most_is_named_beside_all_others(tmp_path):
    for name, losses in {"approach1": (2.150, 2.152, 2.148), "schedule-wsd": (2.10, 2.104, 2.096), "rate-1e-3": (1.90, 1.92, 1.94)}.items():
        for seed, value in enumerate(losses):
            keep_one(tmp_path, f"{name}-s{seed}", {0: 4.6, 2000: value})
    runs = make.read(tmp_path)
    assert make.seed_deviation(runs) == (pytest.approx(((0.002**2 + 0.004**2 + 0.02**2) / 3) ** 0.5), 6)
    assert make.seed_deviation(runs, ("rate-1e-3",)) == (pytest.approx((0.00001) ** 0.5), 4)
    told = " ".join(make.machine(runs).split())
    assert "deviates by 0.0118 nats (6 degrees of freedom): 0.0200 in `rate-1e-3`, 0.0032 in all others." in told


def test_answers_of_one_word_are_looked_at_apart_from_all_others(tmp_path):
    for name in ("approach1-s0", "clean-s0", "clean-words-s0"):
        keep_one(tmp_path, name, {0: 4.6, 2000: 2.1})
    single, place = [3, 7, 200], tmp_path / "clean-words-s0"
    (control, _), (arrays, about) = (record.read_evaluations(tmp_path / name)[2000] for name in ("clean-s0", "clean-words-s0"))
    chosen = np.isin(np.arange(400), single)
    moved = arrays | {"nll": control["nll"] + np.where(chosen, 1.5, -0.01) * arrays["tokens"], "correct": np.where(chosen, arrays["tokens"], 0)}
    record.save_evaluation(place, "step-002000", moved, about)
    assert "one word alone" not in make.clean(make.read(tmp_path))  # which rows these are is not told
    (place / "rows.json").write_text(json.dumps({"one_word": single}))
    text = " ".join(make.clean(make.read(tmp_path)).split())
    assert "on the 3 answers of one word +1.5000 nats (+1.5000 to +1.5000), 0 → 3 of them right in every token" in text
    assert "on the 397 others -0.0100 nats (-0.0100 to -0.0100), 0 → 0 of them right in every token" in text


def test_which_rows_have_an_answer_of_one_word_is_kept_by_number_alone(tmp_path):
    answers = ["ls", "ls -l", " pwd\n", "", "users"]
    lines = [json.dumps({"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": answer}]}) for answer in answers]
    (tmp_path / "tldr-validation.jsonl").write_text("\n".join(lines) + "\n")
    assert findings.one_word(tmp_path) == [0, 2, 4]
    kept = json.loads((PROJECT / "docs" / "findings" / "clean-words-s0" / "rows.json").read_text())
    assert list(kept) == ["one_word"] and all(type(number) is int and 0 <= number < 1309 for number in kept["one_word"])


def test_what_of_a_gain_is_the_repair_of_4_bits_is_told_after_step_500(tmp_path):
    keep_one(tmp_path, "bits-none-s0", {0: 3.9, 500: 2.3, 2000: 2.1})
    keep_one(tmp_path, "approach1-s0", {0: 4.5, 500: 2.36, 2000: 2.15})
    text = " ".join(make.bits_after(make.read(tmp_path)).split())
    assert "by step 500: +0.0600, 10% of it, so 25% of the 2.1400 nats gained until then are its repair." in text


def test_a_setting_that_changed_nothing_is_shown_as_the_same_run(tmp_path):
    """Its loss may well differ from the mean over seeds, which would look like a finding."""
    for seed, value in enumerate((2.150, 2.152, 2.148)):
        keep_one(tmp_path, f"approach1-s{seed}", {0: 4.6, 2000: value})
    shutil.copytree(tmp_path / "approach1-s1", tmp_path / "schedule-adaptive-clip-s0")
    about = tmp_path / "schedule-adaptive-clip-s0" / "summary.json"
    about.write_text(about.read_text().replace("approach1-s1", "schedule-adaptive-clip-s0"))
    cells = row(make.filled(PAGE, make.read(tmp_path), None), "clipped at the median")
    assert cells[3:6] == [make.DASH, make.DASH, "the same run, bit for bit"]


def test_a_proof_that_stopped_the_run_is_told_with_what_it_found(tmp_path):
    keep_one(tmp_path, "cut", {0: 4.6}, step=0)
    line = {"step": 0, "eval/loss": 4.6, "proof/outcome": "dead: 2 of 4 matrices have a gradient that is zero: a, b. Nothing reaches them."}
    (tmp_path / "cut" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    keep_one(tmp_path, "seed-failure-s0", {0: 4.6})
    lines = [{"step": 0, "proof/ratio": 1.0124, "proof/outcome": "proved: the loss changes 1.0124 times as much."}, {"step": 2, "proof/ratio": 0.98}]
    (tmp_path / "seed-failure-s0" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = " ".join(make.filled(PAGE, make.read(tmp_path), None).split())
    assert "gradient proof dead (2 of 4 matrices have a gradient that is zero) at step 0;" in text
    assert "gradient proof 1.012 at step 0, 0.980 at step 2;" in text


def test_of_a_cost_that_training_repaired_none_is_left(tmp_path):
    keep_one(tmp_path, "bits-none-s0", {0: 3.9, 2000: 2.1})
    keep_one(tmp_path, "bits-int8-s0", {0: 3.95, 2000: 2.0996})
    keep_one(tmp_path, "bits-single-s0", {0: 4.5, 2000: 2.4})
    text = " ".join(make.filled(PAGE, make.read(tmp_path), None).split())
    assert "-0.0004 after: none is left that could be told." in text and "+0.3000 after: 50% of it is left." in text


@pytest.mark.parametrize("step, told", [(2000, "did not end before its last step, 2,000,"), (900, "ended after step 900,")])
def test_of_early_stopping_is_told_whether_it_stopped(tmp_path, step, told):
    keep_one(tmp_path, "gsm8k-early", {step: 0.85}, step=step)
    (tmp_path / "gsm8k-early" / "config.json").write_text(json.dumps({"train": {"max_steps": 2000}}))
    assert told in " ".join(make.filled(PAGE, make.read(tmp_path), None).split())


def test_rates_are_compared_with_approach_1_and_the_schedules_at_a_rate_with_that_rate(tmp_path):
    keep_one(tmp_path, "approach1-s0", {0: 4.6, 2000: 2.15})
    keep_one(tmp_path, "rate-5e-4-s0", {0: 4.6, 2000: 2.0})
    keep_one(tmp_path, "rate-2e-3-s0", {0: 4.6, 2000: 2.3})
    keep_one(tmp_path, "rate-5e-4-wsd-s0", {0: 4.6, 2000: 1.95})
    keep_one(tmp_path, "ours-500-s0", {500: 2.35})
    keep_one(tmp_path, "peer-trl", {500: 2.4})
    keep_one(tmp_path, "peer-trl-fp32", {500: 2.36})
    text = make.filled(PAGE, make.read(tmp_path), tmp_path)
    assert row(text, "5e-4")[3] == "-0.1500" and row(text, "2e-3")[3] == "+0.1500" and row(text, "2e-4")[1] == "not run"
    assert row(text, "WSD, floor 5e-5")[3] == "-0.0500" and row(text, "the same, adapters in fp32")[3] == "+0.0100"
    results = " ".join(text.split())
    assert "Of 2 higher rates in approach 1 5e-4 came out lowest (`rate-5e-4-s0`): evaluation loss 2.0000, -0.1500 nats" in results
    assert row(text, "TRL, PEFT, bitsandbytes")[6] == "40 (10)" and row(text, "the same, adapters in fp32")[7] == make.DASH
    assert "after 500 steps; +0.0100 (" in results and (tmp_path / "findings-differences.png").is_file()


def test_a_shape_is_set_beside_a_cosine_of_the_same_rate_area(tmp_path):
    """Losses that depend on the area alone differ by nothing, whatever the shape; the areas are sums that can be done by hand."""
    warm_up, by_hand = 200 * 201 / 2 / 200, {"schedule-constant-s0": 1.0, "schedule-wsd-s0": None, "schedule-zero-s0": 0.5}
    worse = {"schedule-constant-s0": 0.05}
    for name in ("approach1-s0", *(f"{rate}-s0" for rate in make.RATES.values()), *by_hand):
        keep_one(tmp_path, name, {0: 4.6})
        area = make.rate_area({"config": configured(name)})
        if by_hand.get(name):
            assert area == pytest.approx(1e-4 * (warm_up + 1800 * by_hand[name]), rel=1e-3)
        keep_one(tmp_path, name, {0: 4.6, 2000: 3.0 - 0.1 * math.log(area) + worse.get(name, 0.0)})
    runs = make.read(tmp_path)
    off = {label: [float(cell) for cell in row(make.area(runs), label)[4:6]] for label in ("cosine to 0", "WSD", "constant")}
    assert off == {"cosine to 0": [0.0, 0.0], "WSD": [0.0, 0.0], "constant": [0.05, 0.05]}
    make.filled(PAGE, runs, tmp_path)
    assert (tmp_path / "findings-area.png").is_file()


def test_between_cosines_that_bend_a_smooth_curve_lies_below_the_straight_line_and_beyond_them_nothing_is_said():
    places = np.array([0.1, 0.2, 0.4, 0.8])
    bent = lambda place: (math.log(place) - 1) ** 2
    for own in (0.15, 0.3, 0.6):
        straight, smooth = make.beside_cosines(places, [bent(place) for place in places], own)
        assert straight > bent(own) and abs(smooth - bent(own)) < straight - bent(own)
    assert np.isnan(make.beside_cosines(places, places, 0.05)).all() and np.isnan(make.beside_cosines(places, places, 0.9)).all()


def test_the_criteria_that_a_run_did_not_pass_are_named(tmp_path):
    keep_one(tmp_path, "approach1-s0", {0: 4.6, 2000: 2.15})
    assert "did not pass" not in make.approaches(make.read(tmp_path))
    kept = [{"set": which, "name": name, "outcome": outcome} for which, name, outcome in
            (("milestone", "loss", "FAIL"), ("minimum", "loss", "PASS"), ("optimal", "perplexity", "FAIL"),
             ("optimal", "samples", "INCONCLUSIVE"))]
    (tmp_path / "approach1-s0" / "verdict.json").write_text(json.dumps({"criteria": kept}))
    text = " ".join(make.approaches(make.read(tmp_path)).split())
    assert text.endswith("did not pass. approach1: optimal perplexity FAIL, optimal samples INCONCLUSIVE.")


def test_what_moved_the_adapters_as_far_as_a_larger_rate_is_set_beside_that_rate(tmp_path):
    far = {"approach1-s0": (0.01, 2.2), "rate-2e-4-s0": (0.02, 2.1), "rate-5e-4-s0": (0.04, 2.0), "factor-rslora-s0": (0.02, 2.13)}
    for name, (moved, value) in far.items():
        keep_one(tmp_path, name, {0: 4.6, 2000: value})
        with open(tmp_path / name / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 2001, "adapters/delta_ratio": moved}) + "\n")
    cells = row(make.moved(make.read(tmp_path)), "rsLoRA")
    assert cells[1:] == ["0.0200", "2.1300", "+0.0300", "+0.0300", "`factor-rslora-s0`"]


def test_every_line_of_a_table_names_the_experiment_that_makes_it_again(tmp_path):
    for name in ("approach1-s0", "approach1-s1", "schedule-zero-s0", "approach3"):
        keep_one(tmp_path, name, {0: 4.6, 2000: 2.15})
    runs, names = make.read(tmp_path), {experiment.name for experiment in findings.experiments()}
    told = [row(make.schedules(runs), label)[-1] for label in ("cosine, floor 1e-5", "cosine to 0")]
    told += [row(make.factors(runs), "approach 3: and LLM.int8()")[-1]]
    assert told == ["`approach1-s*`", "`schedule-zero-s0`", "`approach3`"] and row(make.schedules(runs), "constant")[-1] == make.DASH
    page = (PROJECT / "docs" / "FINDINGS.md").read_text()
    asked = re.findall(r"\| `([\w*-]+)` +\|$", page, re.M)
    assert len(asked) > 40 and all(any(findings.fnmatch.fnmatchcase(name, one) for name in names) for one in asked)


def test_runs_on_other_rows_are_refused(tmp_path):
    keep_one(tmp_path, "approach1-s0", {0: 4.6, 2000: 2.15})
    keep_one(tmp_path, "schedule-zero-s0", {0: 4.6, 2000: 2.15}, rows=300)
    with pytest.raises(ValueError, match="different rows"):
        make.filled(PAGE, make.read(tmp_path), None)


def test_generations_are_counted_and_only_our_own_prompts_are_shown(tmp_path):
    own = (PROJECT / "bench" / "prompts.txt").read_text().splitlines()
    (tmp_path / "generation-after").mkdir()
    kept = {"prompts": [{"prompt": prompt, "text": "ls -l", "tokens": 3, "stopped": True} for prompt in own],
            "commands": [{"exact": i < 50, "holds": True, "stopped": True, "overlap": 0.5} for i in range(200)]}
    (tmp_path / "generation-after" / "generation.json").write_text(json.dumps(kept))
    (tmp_path / "generation-after" / "summary.json").write_text("{}")
    text = make.filled(PAGE, make.read(tmp_path), None)
    low, high = verdict.binomial_interval(50, 200, 0.95)
    assert f"25.0% ({low:.1%} to {high:.1%})" in text and text.count("ls -l") == 12 and len(own) == 12


def test_a_block_that_nobody_makes_is_refused():
    with pytest.raises(ValueError, match="no block called nonsense"):
        make.filled("<!-- made: nonsense -->\n<!-- end -->\n", {}, None)


def test_the_page_in_the_repository_is_what_its_records_say(capsys):
    assert make.main(["--check"]) == 0, capsys.readouterr().out
