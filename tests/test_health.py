"""Each rule fires on a record made sick in its way, and none on healthy noisy ones; every format gives the same record."""
import json
import math
import random
import re
import subprocess
import sys
import time

import pytest
from conftest import PROJECT

import health
import report
import rules

FAILED_RUN = PROJECT / "docs" / "examples" / "failed-run" / "trainer_state.json"


def healthy(seed, steps=400, **changes):
    """Lines of a healthy noisy run under our own names: an exponential fall, heavy-tailed norms, five evaluations."""
    rng, lines = random.Random(seed), []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "train/loss": 2 + 1.5 * math.exp(-step / (steps / 5)) + rng.gauss(0, 0.25),
                "train/grad_norm": 0.7 * math.exp(rng.gauss(0, 0.3)),
                "train/learning_rate": 1e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2),
                "train/clip_threshold": 1.0,
                "train/samples": 32,
                "train/epoch": 1.4 * step / steps,
                "adapters/lora_A_norm": 3 + step / 1e4,
                "adapters/lora_B_norm": step / 1e3,
            }
        )
        if step % (steps // 5) == 0:
            lines[-1] |= {"eval/loss": 2.1 + math.exp(-step / (steps / 5)) + rng.gauss(0, 0.004), "eval/adapter_digest": f"{step:x}"}
    for line in lines:
        line |= {tag: change(line) for tag, change in changes.items() if tag in line}
    return lines


def found(lines, **known):
    """{name: finding} of what a record of `lines` shows, what could not be judged left out."""
    return {f.name: f for f in health.diagnose(health.to_record("test", lines, **known)) if f.severity != "unjudged"}


def alarms(lines, **known):
    return {name for name, finding in found(lines, **known).items() if finding.severity in ("fault", "warning")}


def with_tag(tag, change, **arguments):
    """A healthy run with `tag` replaced by change(line) wherever it stands."""
    lines = healthy(1, **arguments)
    for line in lines:
        if tag in line:
            line[tag] = change(line)
    return lines


# ---------------------------------------------------------------------------------------------------------------- rules

@pytest.mark.parametrize("seed", range(12))
def test_healthy_noisy_runs_raise_no_alarm(seed):
    assert alarms(healthy(seed)) == set()
    assert alarms(healthy(seed, steps=2000)) == set()
    assert alarms(healthy(seed)[9::10]) == set()  # logged every ten steps


@pytest.mark.parametrize("seed", range(4))
def test_a_long_plateau_then_progress_and_a_loss_falling_to_almost_nothing_are_healthy(seed):
    rng = random.Random(seed)
    plateau, rote = healthy(seed), healthy(seed)
    for line, other in zip(plateau, rote):
        line["train/loss"] = 3 - max(0, line["step"] - 300) / 100 + rng.gauss(0, 0.05)
        other["train/loss"] = 3 * math.exp(-other["step"] / 80 + rng.gauss(0, 0.1))
    assert alarms(plateau) == set() and alarms(rote) == set()


def test_norms_of_zero_are_dead_gradients_from_the_step_where_they_begin():
    flat = [line | {"train/grad_norm": 0.0, "train/loss": 2.5 + 0.01 * (line["step"] % 3)} for line in healthy(1)]
    late = with_tag("train/grad_norm", lambda line: 0.0 if line["step"] > 250 else 0.5 + 0.001 * line["step"])
    for line in flat:
        line.pop("eval/loss", None)
    assert found(flat)["dead gradients"].severity == "fault" and found(flat)["dead gradients"].figures["zero_norms"] == 400
    assert found(late)["dead gradients"].figures["from_step"] == 251
    assert "From step 251 on" in health.headline(health.to_record("test", late), health.diagnose(health.to_record("test", late)))


def test_norms_of_zero_beside_a_falling_loss_are_a_wrong_record_and_not_a_dead_run():
    findings = found(with_tag("train/grad_norm", lambda line: 0.0))
    assert findings["gradient norm wrongly recorded"].severity == "warning" and "dead gradients" not in findings


def test_single_zero_norms_point_at_steps_without_supervised_tokens():
    findings = found(with_tag("train/grad_norm", lambda line: 0.0 if line["step"] in (50, 90) else 0.5))
    assert "steps 50, 90" in findings["steps without gradient"].evidence and "dead gradients" not in findings


@pytest.mark.parametrize(
    "tag, what", [("train/loss", "training loss"), ("train/grad_norm", "gradient norm"), ("eval/loss", "evaluation loss")]
)
@pytest.mark.parametrize("value", ["nan", math.inf])
def test_non_finite_values_are_a_fault_and_name_their_first_step(tag, what, value):
    findings = found(with_tag(tag, lambda line: value if line["step"] >= 320 else line[tag]))
    assert findings[f"non-finite {what}"].severity == "fault" and "320" in findings[f"non-finite {what}"].evidence


def test_the_first_overflows_of_fp16_are_a_note():
    assert (
        found(with_tag("train/grad_norm", lambda line: math.inf if line["step"] < 4 else 0.5 + line["step"] % 7 / 10))[
            "non-finite gradient norm"
        ].severity
        == "note"
    )


def test_a_loss_of_exactly_zero_is_a_fault():
    assert found(with_tag("train/loss", lambda line: 0.0))["loss of zero"].severity == "fault"


def test_identical_evaluations_are_a_fault_and_similar_ones_are_not():
    def same(value):
        return found(with_tag("eval/loss", value))
    assert same(lambda line: 2.5)["evaluation frozen"].severity == "fault"
    assert "other weights" in same(lambda line: 2.5)["evaluation frozen"].cause  # the digests do move
    assert "evaluation frozen" not in same(lambda line: 2.5 + line["step"] / 1e6)
    assert (
        same(lambda line: 2.31 if line["step"] < 200 else 2.2 - line["step"] / 1e5)["evaluation frozen"].severity == "warning"
    )  # two decimals may agree by chance
    assert same(lambda line: 2.3124567 if line["step"] < 200 else 2.2 - line["step"] / 1e5)["evaluation frozen"].severity == "fault"
    assert found(with_tag("eval/adapter_digest", lambda line: "abc"))["adapters never moved"].severity == "fault"


def test_evaluations_that_agree_because_the_rate_was_nothing_say_so():
    lines = with_tag("eval/loss", lambda line: 2.2345678 if line["step"] >= 240 else line["eval/loss"])
    for line in lines:
        line["train/learning_rate"] = 1e-4 if line["step"] <= 240 else 0.0
    finding = found(lines)["evaluation frozen"]
    assert finding.severity == "note" and "rate was next to nothing" in finding.cause


@pytest.mark.parametrize(
    "threshold, name, severity", [(0.1, "always clipped", "note"), (1e-6, "always clipped", "warning"), (50.0, "never clipped", "note")]
)
def test_clipping_always_or_never_is_told_by_its_factor(threshold, name, severity):
    assert found(with_tag("train/clip_threshold", lambda line: threshold))[name].severity == severity
    trainer = [{"step": line["step"], "grad_norm": line["train/grad_norm"]} for line in healthy(1)]
    assert found(trainer, clip=threshold)[name].severity == severity  # a Trainer's file does not hold it
    assert name not in found(trainer)


@pytest.mark.parametrize("tag, what", [("train/loss", "training loss"), ("train/grad_norm", "gradient norm")])
def test_spikes_are_found_at_their_steps(tag, what):
    findings = found(with_tag(tag, lambda line: line[tag] * (9 if line["step"] in (77, 300) else 1)))
    assert "steps 77, 300" in findings[f"spikes of the {what}"].evidence


def test_late_in_a_run_a_spike_must_rise_above_the_evaluation_that_the_run_began_with():
    rng = random.Random(4)
    mixed = [line | {"train/loss": (2.4 if line["step"] % 30 == 0 else 0.1) * math.exp(rng.gauss(0, 0.05))} for line in healthy(1)]
    for line in mixed:
        line.pop("eval/loss", None)
    assert found(mixed)["spikes of the training loss"].severity == "warning"  # one hard row in thirty, or a broken one?
    assert "spikes of the training loss" not in found([{"step": 0, "eval/loss": 2.6}, *mixed])  # as hard as the rows are untrained


def test_a_loss_that_climbs_or_loses_its_fall_again_diverges():
    rng = random.Random(3)
    assert found(with_tag("train/loss", lambda line: 4.6 + line["step"] / 130 + rng.gauss(0, 0.3)))["divergence"].severity == "fault"
    assert "divergence" in found(with_tag("train/loss", lambda line: 2 + abs(line["step"] - 200) / 100 + rng.gauss(0, 0.1)))


def test_a_loss_that_rises_a_little_but_surely_is_a_warning():
    rng = random.Random(5)
    finding = found(with_tag("train/loss", lambda line: 2 + line["step"] / 4000 + rng.gauss(0, 0.02)))["divergence"]
    assert finding.severity == "warning" and "+0.0" in finding.evidence


@pytest.mark.parametrize("seed", range(6))
def test_a_loss_that_only_jitters_is_flat_and_never_called_diverging(seed):
    rng = random.Random(seed)
    names = alarms(with_tag("train/loss", lambda line: 2.7 + rng.gauss(0, 0.1)))
    assert "divergence" not in names and names <= {"training loss flat"}
    steady = alarms(with_tag("train/loss", lambda line: 2.7 + 0.1 * (-1) ** line["step"]))
    assert steady == {"training loss flat"}


def test_a_rate_of_zero_is_a_fault_and_one_that_ends_at_nothing_is_weighed():
    zero = found(with_tag("train/learning_rate", lambda line: 0.0))
    linear = found(with_tag("train/learning_rate", lambda line: 1e-4 * (1 - line["step"] / 400)))
    early = found(with_tag("train/learning_rate", lambda line: 1e-4 * max(0, 1 - line["step"] / 200)))
    assert zero["learning rate of zero"].severity == "fault"
    assert linear["rate ends at nothing"].severity == "note"  # the Trainer's default, after all rows were seen
    assert early["rate ends at nothing"].severity == "warning" and abs(early["rate ends at nothing"].figures["negligible_from"] - 199) <= 1


def test_figures_of_the_rate_are_the_sum_over_steps_even_where_few_were_recorded():
    rates = [(step, 1e-4 * step / 50 if step <= 50 else 1e-4 * (350 - step) / 300) for step in range(1, 351)]
    every, some = rules.rate_figures(rates), rules.rate_figures([rates[0], *rates[49::50]])
    assert every["area"] == pytest.approx(sum(rate for _, rate in rates)) and some["area"] == pytest.approx(every["area"])
    assert every["negligible_from"] == some["negligible_from"] == 348  # the rate of step 347 is just 1 % of the peak
    assert rules.rate_figures([(1, 0.0), (10**12, 1e-4)])["peak"] == 1e-4  # a wild step number costs no time


def test_a_rate_beyond_reason_and_one_that_sums_to_nothing_are_warnings():
    assert found(with_tag("train/learning_rate", lambda line: 0.3))["high rate"].severity == "warning"
    assert found(with_tag("train/learning_rate", lambda line: 1e-9))["small rate area"].severity == "warning"
    assert found(with_tag("train/learning_rate", lambda line: 2e-5))["small rate area"].severity == "note"
    assert not {"high rate", "small rate area"} & set(found(healthy(1)))


def test_a_fall_that_the_noise_leaves_open_is_not_called_flat():
    few = [{"step": step, "loss": loss} for step, loss in enumerate((5.9, 6.1, 5.6, 5.8, 5.4, 5.7, 5.5, 5.6), start=1)]
    judged = {f.name: f for f in health.diagnose(health.to_record("test", few))}
    assert "training loss flat" not in judged and "could hide" in judged["fall of the training loss"].evidence


def test_coverage_comes_from_the_epoch_or_from_samples_and_rows():
    short = [line | {"train/epoch": line["step"] / 4000} for line in healthy(1)]
    assert found(short)["coverage below one epoch"].figures["coverage"] == pytest.approx(0.1)
    for line in short:
        del line["train/epoch"]
    assert "coverage below one epoch" not in found(short)
    assert found(short, rows=25_600)["coverage below one epoch"].figures["coverage"] == pytest.approx(0.5)
    assert "coverage below one epoch" not in found(short, rows=12_800)


def test_an_unfinished_run_is_judged_by_what_its_plan_would_see():
    part = [line | {"train/epoch": 3 * line["step"] / 4000} for line in healthy(1)]  # 400 of 4,000 steps, 3 epochs in all
    assert "coverage below one epoch" in found(part) and "coverage below one epoch" not in found(part, planned_steps=4000)
    assert "would see 60.0%" in found(part, planned_steps=800)["coverage below one epoch"].evidence


def test_a_run_of_ours_brings_its_planned_steps_and_a_handful_of_losses_is_called_too_little(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in healthy(1)[:3]))
    (tmp_path / "config.json").write_text(json.dumps({"train": {"max_steps": 400}}))
    assert health.read(tmp_path).planned_steps == 400
    health.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "Too little is recorded" in printed and "up to step 3 of 400: 3 losses, 3 gradient norms, 0 evaluations" in printed
    (tmp_path / "config.json").write_text("{broken")
    assert health.read(tmp_path).planned_steps == 0


@pytest.mark.parametrize("lora, told", [({}, True), ({"init": "zero", "init_from": ""}, True), ({"init_from": "runs/a"}, False), ({"init": "loftq"}, False)])
def test_a_run_of_ours_that_starts_from_an_adapter_may_start_away_from_zero(tmp_path, lora, told):
    lines = [{"step": 0, "eval/loss": 2.0, "eval/adapter_digest": "a", "adapters/delta_ratio": 0.01}, *healthy(1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.json").write_text(json.dumps({"train": {"max_steps": 400}, "lora": lora}))
    names = [finding.name for finding in health.diagnose(health.read(tmp_path))]
    assert ("adapters do not start at zero" in names) is told
    assert ("adapters do not start at zero" in report.page(report.read_run(tmp_path), [])) is told


def test_a_nan_that_passes_is_a_warning_and_one_that_stays_a_fault():
    once = found(with_tag("train/loss", lambda line: math.nan if line["step"] == 100 else line["train/loss"]))
    assert once["non-finite training loss"].severity == "warning"


def test_an_evaluation_that_rises_while_the_training_loss_falls_is_a_growing_gap():
    rising = {80: 2.4, 160: 2.2, 240: 2.3, 320: 2.5, 400: 2.8}
    lines = with_tag("eval/loss", lambda line: rising[line["step"]])
    for line in lines:
        line["train/loss"] = 3 - line["step"] / 200
    assert "step 160" in found(lines)["growing gap"].evidence


@pytest.mark.parametrize("matrix, value", [("A", 3.25), ("B", 0.0)])
def test_adapters_whose_norm_repeats_never_moved(matrix, value):
    assert found(with_tag(f"adapters/lora_{matrix}_norm", lambda line: value))["adapters never moved"].severity == "fault"


def test_norms_that_repeat_where_the_rate_was_nothing_are_no_fault():
    """The adapters moved before their first norm was recorded, and rightly stood still from there on."""
    still = with_tag("adapters/lora_A_norm", lambda line: 3.5)
    late = [{tag: value for tag, value in line.items() if tag != "adapters/lora_A_norm" or line["step"] >= 20} for line in still]
    idle = [line | {"train/learning_rate": 0.0} if line["step"] >= 20 else line for line in late]
    assert "adapters never moved" in found(late) and "adapters never moved" not in found(idle)


# -------------------------------------------------------------------------------------------------------- the failed run

def test_the_failed_run_is_diagnosed_as_dead_gradients_and_not_as_low_coverage(capsys):
    assert health.main([str(FAILED_RUN), "--rows=45000"]) == 0
    printed = capsys.readouterr().out
    text = " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= max(80, len(str(FAILED_RUN)))
    shown = printed[printed.index("Dead gradients."):printed.index("  cause")].rstrip()
    page = (FAILED_RUN.parents[3] / "README.md").read_text(encoding="utf-8")
    assert "\n".join(f"    {line}".rstrip() for line in shown.splitlines()) in page, "what the README shows is what it prints"
    assert (
        text.index("Dead gradients.")
        < text.index("FAULT: dead gradients")
        < text.index("FAULT: evaluation frozen")
        < text.index("WARNING: coverage below one epoch")
    )
    for fact in (
        "Other rates, batch sizes or bits would not have cured it, nor more steps or more rows, and so none of the three approaches in configs would",
        "look at the rest (training loss flat, coverage below one epoch, rate ends at nothing)",
        "exactly 0.0 in 20 of 20",
        "2.9310, 3 times",
        "steps 0, 250, 500",
        "8.9% of its training rows: 4,000 of 45,000",
        "explains weak learning; it does not explain a gradient norm of exactly 0.0 or identical evaluations",
        "add up to 0.0125",
        "use_reentrant",
        "training loss flat",
    ):
        assert fact in text, fact


def test_the_failed_runs_file_says_that_it_is_synthetic_and_holds_the_reported_figures():
    state = json.loads(FAILED_RUN.read_text(encoding="utf-8"))
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert "made up" in state["synthetic"] and (losses[0], losses[-1]) == (2.7335, 2.7150)
    assert [line["eval_loss"] for line in state["log_history"] if "eval_loss" in line] == [2.9310] * 3


# ------------------------------------------------------------------------------------------------------ formats, bad input

def test_three_formats_of_one_run_give_the_same_diagnosis(tmp_path):
    pytest.importorskip("tensorboard")
    import record
    lines, trainer = healthy(2, steps=100), []
    lines = [line | {"train/grad_norm": 0.0} for line in lines]
    recorder = record.Recorder(tmp_path / "run", True, None)
    for line in lines:
        recorder.write(line["step"], {tag: value for tag, value in line.items() if tag != "step"})
        trainer.append({tag.removeprefix("train/"): value for tag, value in line.items() if tag == "step" or tag.startswith("train/")})
        trainer += [{"step": line["step"], "eval_loss": line["eval/loss"]}] if "eval/loss" in line else []
    recorder.close()
    (tmp_path / "out" / "checkpoint-100").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-100" / "trainer_state.json").write_text(json.dumps({"log_history": trainer, "max_steps": 100}))
    (tmp_path / "events").mkdir()
    for file in (tmp_path / "run").glob("events*"):
        file.rename(tmp_path / "events" / file.name)
    names = [
        {f.name for f in health.diagnose(health.read(tmp_path / folder)) if f.severity in ("fault", "warning")}
        for folder in ("run", "out", "events")
    ]
    assert names[0] == names[1] == names[2] == {"gradient norm wrongly recorded"}
    assert len(health.read(tmp_path / "events").steps) == 100


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "not valid JSON"),
        ("{\"log_history\": [{\"step\"", "cut off"),
        ("[1, 2]", "no log_history"),
        ("{\"log_history\": [3]}", "log_history entry 1"),
        ("{\"log_history\": [{\"loss\": 1.0}]}", "whole number as step"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_an_unreadable_file_is_refused_with_what_is_wrong(tmp_path, content, says):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(says)):
        health.read(tmp_path)


def test_what_is_not_there_or_not_text_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "weights.json").write_bytes(b"\xff\xfe\x00\x80")
    for path, says in ((tmp_path / "none.json", "cannot be read"), (tmp_path, "holds neither"), (tmp_path / "weights.json", "not text")):
        with pytest.raises(ValueError, match=says):
            health.read(path)
    for wrong in (["--rows=-3"], ["--rows=many"], ["--clip=nan"], ["more"]):
        with pytest.raises(ValueError, match="above 0|usage"):
            health.main([str(FAILED_RUN), *wrong])


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [{"step": 1, "loss": 2.5, "grad_norm": 0.7, "learning_rate": 1e-4, "epoch": 0.5}],
        [{"step": 0, "eval_loss": math.nan}],
        [{"step": s, "loss": math.nan, "grad_norm": None, "learning_rate": math.nan, "epoch": math.nan} for s in range(1, 30)],
        [{"step": s, "loss": 10**400, "grad_norm": "big", "learning_rate": -1e-4, "epoch": 0} for s in (5, 3, 5)],
        [{"step": 10**12, "loss": 1, "learning_rate": 1e-4}],
    ],
)
def test_records_that_hold_little_are_answered_with_what_cannot_be_judged(tmp_path, capsys, entries):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    assert health.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Not judged, for lack of data" in printed and ("record is empty" in printed) == (not entries)


def test_a_killed_runs_unfinished_last_line_is_left_out(tmp_path):
    lines = [json.dumps({"step": step, "train/loss": 2.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines)[:-5])
    assert [line["step"] for line in health.read(tmp_path).steps] == [1, 2]
    (tmp_path / "metrics.jsonl").write_text("\n".join(["{broken"] + lines))
    with pytest.raises(ValueError, match="line 1"):
        health.read(tmp_path)


def test_the_command_answers_in_a_second_without_torch_and_exits_2_where_it_cannot_read():
    script = (
        "import sys, time; start = time.time(); import health; health.main(sys.argv[1:]); assert time.time() - start < 1; assert not"
        " {'torch', 'numpy', 'tensorboard'} & set(sys.modules)"
    )
    start = time.time()
    done = subprocess.run([sys.executable, "-c", script, str(FAILED_RUN)], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0 and "Dead gradients" in done.stdout, done.stderr
    assert time.time() - start < 10
    missing = subprocess.run([sys.executable, "health.py", "no/such.json"], cwd=PROJECT, capture_output=True, text=True)
    assert missing.returncode == 2 and missing.stderr.startswith("error: no/such.json") and "Traceback" not in missing.stderr


# ------------------------------------------------------------------------------------------------- records of others

def dead(step, text=str):
    """The figures of one logged step of a dead run, as a trainer writes them: numbers, or text of them."""
    return {"loss": text(round(2.7335 + 0.01 * (step % 7), 4)), "grad_norm": text(0.0), "learning_rate": text(5e-05)}


TRL = {"mean_token_accuracy": "0.4971", "num_tokens": "61440", "entropy": "2.631"}
AXOLOTL = {"memory/max_active (GiB)": 5.1, "memory/device_reserved (GiB)": 6.2, "tokens/train_per_sec_per_gpu": 1531.2, "ppl": 15.4}
EVALUATED = {"eval_loss": "2.931", "eval_runtime": "3.1", "eval_mean_token_accuracy": "0.51", "eval_num_tokens": 10.0}


@pytest.mark.parametrize(
    "extra, text",
    [({}, float), (TRL, str), (AXOLOTL, float), ({"train_speed(iter/s)": 0.3, "memory(GiB)": 5.2}, float)],
    ids=["Trainer", "TRL", "axolotl", "others"],
)
def test_trainer_states_of_the_trainers_kin_are_diagnosed_alike(tmp_path, extra, text):
    history = [{"step": step, "epoch": text(step / 5000), **dead(step, text), **extra} for step in range(10, 301, 10)]
    history += [{"step": step, "epoch": step / 5000, **EVALUATED} for step in (100, 200, 300)]
    history.append({"step": 300, "total_flos": 1e15, "train_loss": 2.74, "train_runtime": 812.0})
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": history, "max_steps": 300, "num_train_epochs": 1, "best_metric": None})
    )
    judged = {f.name: f.severity for f in health.diagnose(health.read(tmp_path))}
    assert judged["dead gradients"] == judged["evaluation frozen"] == "fault" and judged["coverage below one epoch"] == "warning"


def test_llama_factorys_and_swifts_logs_are_read_by_their_own_names_of_a_step(tmp_path):
    factory = [
        {
            "current_steps": step,
            "total_steps": 300,
            "loss": 2.7 + step % 7 / 100,
            "lr": 5e-05,
            "epoch": step / 5000,
            "percentage": step / 3,
            "elapsed_time": "0:01:00",
            "remaining_time": "0:09:00",
        }
        for step in range(10, 301, 10)
    ]
    factory += [{"current_steps": step, "total_steps": 300, "eval_loss": 2.931, "epoch": step / 5000} for step in (100, 200, 300)] + [
        {"current_steps": 300, "total_steps": 300, "epoch": 0.06}
    ]
    swift = [
        {
            "loss": 2.7,
            "grad_norm": 0.0,
            "learning_rate": 5e-05,
            "token_acc": 0.5,
            "epoch": step / 5000,
            "global_step/max_steps": f"{step}/300",
            "percentage": "3.33%",
        }
        for step in range(10, 301, 10)
    ]
    swift.append({"last_model_checkpoint": "output/checkpoint-300", "best_metric": 2.9})
    for name, entries in (("trainer_log.jsonl", factory), ("logging.jsonl", swift)):
        (tmp_path / name).write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")
    read = health.read(tmp_path / "trainer_log.jsonl")
    judged = {f.name: f for f in health.diagnose(read)}
    assert read.planned_steps == 300 and len(read.series("loss")) == 30 and "LLaMA-Factory" in read.kind
    assert judged["evaluation frozen"].severity == "fault" and "no gradient norm" in judged["gradients"].evidence
    assert health.read(tmp_path / "logging.jsonl").steps[-1]["step"] == 300
    assert {f.name for f in health.diagnose(health.read(tmp_path / "logging.jsonl")) if f.severity == "fault"} == {"dead gradients"}


def test_a_console_log_is_read_with_the_steps_of_its_progress_bar_or_by_counting(tmp_path):
    line = "{'loss': '2.7%d', 'grad_norm': '0', 'learning_rate': '5e-05', 'epoch': '0.0%d'}"
    plain = (
        "Loading model\n"
        + "\n".join(line % (i % 7, i % 9) for i in range(1, 31))
        + "\n{'eval_loss': 2.931, 'epoch': 0.1}\n{'loss': nan, 'grad_norm': nan, 'epoch': 0.1}\n"
    )
    bars = "\n".join(
        f"  {i}%|# | {10 * i}/300 [00:{i:02d}<09:00,  1.0s/it]\n{line % (i % 7, i % 9)}\n 50%|#  | 3/6 [00:01<00:01]" for i in range(1, 31)
    )
    (tmp_path / "plain.log").write_text(plain)
    (tmp_path / "bars.txt").write_text(bars)
    counted, stepped = health.read(tmp_path / "plain.log"), health.read(tmp_path / "bars.txt")
    assert counted.steps[-1]["step"] == 31 and math.isnan(counted.steps[-1]["loss"]) and "no progress bar" in counted.doubts[0]
    assert (
        stepped.steps[-1]["step"] == 300 and stepped.planned_steps == 300 and "dead gradients" in {f.name for f in health.diagnose(stepped)}
    )
    others = "Map: 100%|##| 45000/45000 [00:01<00:00]\rLoading weights: 100%|##| 290/290 [00:00<00:00]\n"
    torchrun = bars.replace("  1%|# | 10/300", "[rank0]:   1%|# | 10/300")
    for name, text in (("named.log", others + bars), ("torchrun.log", others + torchrun)):  # bars that are not the training's
        (tmp_path / name).write_text(text)
        assert health.read(tmp_path / name).steps == stepped.steps and health.read(tmp_path / name).planned_steps == 300
    (tmp_path / "fast.log").write_text("  2%|# | 5/300 [00:01<00:59]\n" + "\n".join(line % (i, i) for i in range(4)))  # a bar that lags
    assert [entry["loss"] for entry in health.read(tmp_path / "fast.log").steps] == [2.70, 2.71, 2.72, 2.73]
    (tmp_path / "other.log").write_text("{'colour': 'red'}")
    with pytest.raises(ValueError, match="holds no line such as"):
        health.read(tmp_path / "other.log")


def test_of_several_evaluation_sets_one_is_followed_and_always_the_same():
    lines = [
        {"step": step, "eval_b_loss": 2.0 + step, "eval_b_runtime": 1.0} | ({"eval_a_loss": 1.0} if step > 1 else {})
        for step in range(1, 5)
    ]
    assert [value for _, value in health.to_record("test", lines).series("eval_loss")] == [3.0, 4.0, 5.0, 6.0]


def test_the_epoch_of_a_stream_says_nothing_of_coverage(tmp_path):
    history = [{"step": step, "epoch": step / 1000, **dead(step, float)} for step in range(10, 301, 10)]
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": history, "max_steps": 1000, "num_train_epochs": 9223372036854775807})
    )
    judged = {f.name: f for f in health.diagnose(health.read(tmp_path))}
    assert "coverage below one epoch" not in judged and "stream of unknown length" in judged["coverage"].evidence
    assert "stops at step 300 of 1,000" in judged["the end of the run"].evidence


def test_the_loss_of_reinforcement_learning_is_not_judged_by_its_level():
    lines = [
        {
            "step": step,
            "loss": 0.0 if step < 5 else 0.001 * (step % 3),
            "grad_norm": 0.0 if step % 5 == 0 else 0.3,
            "learning_rate": 1e-6,
            "reward": 0.1 + step / 100,
            "reward_std": 0.1,
        }
        for step in range(1, 100)
    ]
    judged = {f.name: f for f in health.diagnose(health.to_record("test", lines))}
    assert "rewards" in judged["training loss"].evidence and judged["steps without gradient"].severity == "note"
    assert not {"loss of zero", "training loss flat", "divergence", "spikes of the training loss"} & set(judged)


def test_a_loss_learnt_down_to_zero_is_not_a_loss_of_zero_nor_dead():
    lines = [
        {
            "step": step,
            "loss": round(3 * math.exp(-step / 8), 4),
            "grad_norm": 0.0 if step > 100 else math.exp(-step / 20),
            "learning_rate": 1e-4,
            "epoch": step,
        }
        for step in range(1, 200)
    ]
    judged = {f.name: f.severity for f in health.diagnose(health.to_record("test", lines))}
    assert judged["nothing left to learn"] == "note" and not {"loss of zero", "dead gradients", "training loss flat"} & set(judged)


def test_the_trainers_filtered_nan_is_recognised():
    """With logging_nan_inf_filter, the default, a loss of NaN is written as 0.0; the norm beside it gives it away."""
    lines = [
        {"step": step, "loss": 2.5 - step / 200 if step < 100 else 0.0, "grad_norm": 0.7 if step < 100 else math.nan, "learning_rate": 1e-4}
        for step in range(5, 300, 5)
    ]
    judged = {f.name: f for f in health.diagnose(health.to_record("test", lines))}
    assert (
        judged["non-finite gradient norm"].severity == judged["loss of zero"].severity == "fault"
        and "logging_nan_inf_filter" in judged["loss of zero"].cause
    )


def test_what_a_run_of_ours_adds_to_its_record_is_judged():
    named = healthy(1)
    named[0] |= {"proof/outcome": "dead: 2 of 28 adapter matrices", "train/grad_norm": 1.0}
    assert "2 of 28" in found(named)["dead gradients"].evidence
    assert "in a part" in health.headline(health.to_record("x", named), health.diagnose(health.to_record("x", named)))
    empty = [line | {"train/supervised_tokens": 0, "train/skipped": 1.0} for line in healthy(12)]
    assert found(empty)["steps not applied"].severity == "fault"
    proof = healthy(1)
    proof[0] |= {"proof/ratio": 0.31, "proof/tolerance": 0.04}
    assert found(proof)["wrong gradients"].severity == "fault" and "wrong gradients" not in found(
        [proof[0] | {"proof/ratio": 1.01}, *proof[1:]]
    )
    still = [line | ({"adapters/delta_ratio": 0.0} if "eval/loss" in line else {}) for line in healthy(1)]
    assert found(still)["adapters never moved"].severity == "fault"
    before = [{"step": 0, "eval/loss": 3.4, "eval/unquantised_loss": 1.1}, *healthy(1)]
    assert found(before)["damage by quantisation"].severity == "warning"
    worse = [{"step": 0, "eval/loss": 1.0}, *healthy(1)]
    assert found(worse)["evaluation worse than before training"].severity == "warning"


def test_samples_of_a_record_are_judged_from_half_of_its_plan_on():
    written = [{"prompt": "p", "reference": "short", "text": "on and on and on and on and on it goes", "stopped": False}] * 3
    sampled = [line | ({"eval/samples": json.dumps(written), "eval/token_accuracy": 0.7} if "eval/loss" in line else {}) for line in healthy(1)]
    assert "samples never stop" in found(sampled, planned_steps=400) and "samples never stop" not in found(sampled, planned_steps=4000)


def test_a_record_is_found_inside_folders_and_two_runs_of_events_are_not_mixed(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter
    for run in ("a", "b"):
        writer = SummaryWriter(str(tmp_path / "out" / "runs" / run))
        for step in range(1, 30):
            writer.add_scalar("train/grad_norm", 0.0, step)
        writer.close()
    assert len(health.read(tmp_path / "out" / "runs" / "a").steps) == 29
    with pytest.raises(ValueError, match="events of 2 runs; name one"):
        health.read(tmp_path / "out")


def test_json_output_holds_every_finding_for_programs(capsys):
    assert health.main([str(FAILED_RUN), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["findings"][0]["name"] == "dead gradients" and printed["steps"] == 500 and "Dead gradients" in printed["headline"]
