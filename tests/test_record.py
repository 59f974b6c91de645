"""The record of a run: each step once, whatever was killed, in metrics.jsonl and in TensorBoard."""
import json
import math
import os
import re
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch

import record

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def events(folder):
    """TensorBoard's own reader over a run folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    reader.Reload()
    return reader


def numbers(reader, tag):
    """[(step, value)] of a scalar tag, in the order of the files."""
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def test_a_step_is_one_line_however_often_it_is_written(tmp_path):
    recorder = record.Recorder(tmp_path, False, None)
    recorder.write(0, {"eval/loss": torch.tensor(3.0)})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    recorder.write(1, {"train/loss": 0.1, "train/supervised_tokens": 7})
    recorder.write(1, {"eval/loss": 2.5, "eval/adapter_digest": "ab12"})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "eval/loss": 3.0}\n'
    recorder.flush()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[1] == (
        '{"step": 1, "train/loss": 0.1, "train/supervised_tokens": 7, "eval/loss": 2.5, "eval/adapter_digest": "ab12"}')
    with pytest.raises(AssertionError, match="step 1 was already recorded"):
        recorder.write(1, {"train/loss": 9.0})
    recorder.close()
    assert [line["step"] for line in record.read_metrics(tmp_path)] == [0, 1]


def test_a_line_reaches_the_file_in_one_write(tmp_path, monkeypatch):
    recorder, written, write = record.Recorder(tmp_path, False, None), [], os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: written.append(bytes(data)) or write(descriptor, data))
    for step in (1, 2):
        recorder.write(step, {"train/loss": 1.5})
    recorder.close()
    assert written == [b'{"step": 1, "train/loss": 1.5}\n', b'{"step": 2, "train/loss": 1.5}\n']


def test_nan_and_infinity_are_strict_json_and_come_back(tmp_path):
    recorder = record.Recorder(tmp_path, True, None)
    recorder.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(math.nan)})
    recorder.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert line == {"step": 1, "a": "nan", "b": "inf", "c": "-inf", "d": "nan"}
    values = record.read_metrics(tmp_path)[0]
    assert math.isnan(values["a"]) and math.isnan(values["d"]) and (values["b"], values["c"]) == (math.inf, -math.inf)
    assert math.isnan(numbers(events(tmp_path), "a")[0][1])


def record_until_killed(folder):
    """Steps 0-8 in a process of their own: flushed after 5 (a checkpoint) and 7, killed in step 8."""
    pid = os.fork()
    if pid == 0:
        try:
            recorder = record.Recorder(folder, True, None)
            for step in range(9):
                recorder.write(step, {"train/loss": float(step), "train/grad_norm": 1.0})
                recorder.histogram(step, "lora/norm", torch.full((3,), float(step)))
                if step in (5, 7):
                    recorder.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_after_a_kill_and_a_resume_each_step_is_there_once(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported before the fork, or each child would take seconds over it
    record_until_killed(tmp_path)
    assert [line["step"] for line in record.read_metrics(tmp_path)] == list(range(8))
    assert [step for step, _ in numbers(events(tmp_path), "train/loss")] == list(range(8))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 8, "train/lo')
    with open(next(tmp_path.glob("events.*")), "ab") as file:
        file.write(b"\x20\x00\x00\x00\x00\x00\x00\x00half an event")
    time.sleep(1.1)  # event files are ordered by the second in their name; a real restart takes longer than that
    recorder = record.Recorder(tmp_path, True, 5)
    assert [line["step"] for line in record.read_metrics(tmp_path)] == list(range(6))
    for step in range(6, 11):
        recorder.write(step, {"train/loss": 100.0 + step, "train/grad_norm": 1.0})
        recorder.histogram(step, "lora/norm", torch.full((3,), float(step)))
    recorder.close()
    expected = [(step, float(step) if step < 6 else 100.0 + step) for step in range(11)]
    assert [(line["step"], line["train/loss"]) for line in record.read_metrics(tmp_path)] == expected
    reader = events(tmp_path)
    assert numbers(reader, "train/loss") == expected
    assert [event.step for event in reader.Histograms("lora/norm")] == list(range(11))


def test_what_was_flushed_survives_a_kill_in_the_next_instant(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    tags = [f"many/{number}" for number in range(200)]  # more than TensorBoard's queue holds
    pid = os.fork()
    if pid == 0:
        try:
            recorder = record.Recorder(tmp_path, True, None)
            os.fsync = lambda descriptor: None  # this and the next line: TensorBoard's thread gets no chance to be done by luck
            sys.setswitchinterval(1000)
            recorder.write(1, dict.fromkeys(tags, 1.0))
            recorder.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert record.read_metrics(tmp_path) == [{"step": 1, **dict.fromkeys(tags, 1.0)}]
    assert set(events(tmp_path).Tags()["scalars"]) == set(tags)


def test_cutting_off_steps_is_one_rename(tmp_path, monkeypatch):
    recorder = record.Recorder(tmp_path, False, None)
    for step in range(4):
        recorder.write(step, {"a": 1.0})
    recorder.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(source, target):
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        record.Recorder(tmp_path, False, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    record.Recorder(tmp_path, False, 1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before.splitlines(keepends=True)[:2])
    record.Recorder(tmp_path, False, -1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_new_run_does_not_write_over_an_earlier_one(tmp_path):
    recorder = record.Recorder(tmp_path, False, None)
    recorder.write(1, {"a": 1.0})
    recorder.close()
    with pytest.raises(ValueError, match="holds 1 steps of an earlier run.*--resume"):
        record.Recorder(tmp_path, True, None)
    assert len(record.read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("line, message", [
    (b'{"step": 2, "a": 1', "not valid JSON"), (b'{"step": 2, "a": NaN}', "NaN is not JSON"),
    (b'{"step": 2, "step": 3}', "stands twice"), (b'{"a": 1}', "whole number as step"), (b'{"step": 2.0}', "whole number as step"),
    (b'{"step": -1}', "whole number as step"), (b'{"step": true}', "whole number as step"), (b"[2]", "must be an object"),
    (b"", "not valid JSON"), (b'{"step": 1}', "step 1 after step 1"), (b'{"step": 0}', "step 0 after step 1"),
    (b'{"step": 2, "a": [1]}', "a must be a number or text"), (b'{"step": 2, "a": "\xff"}', "not valid JSON"),
    (b'{"step": 2, "train/loss": "low"}', "train/loss must be a number"), (b'{"step": 2, "alerts": 3}', "alerts must be text"),
    (b'{"step": 2, "eval/samples": "nan"}', "must be text")])
def test_a_broken_line_is_named_and_an_unfinished_last_one_is_not_read(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a": 1.5}\n' + line)
    assert record.read_metrics(tmp_path) == [{"step": 1, "a": 1.5}]
    path.write_bytes(b'{"step": 1, "a": 1.5}\n' + line + b'\n{"step": 5}\n')
    for read in (record.read_metrics, lambda folder: record.Recorder(folder, False, 9)):
        with pytest.raises(ValueError, match=f"metrics.jsonl, line 2: .*{message}"):
            read(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        record.read_metrics(tmp_path / "elsewhere")


def test_tensorboard_mirrors_the_record_in_one_run_with_its_hyperparameters(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.plugins.hparams import plugin_data_pb2
    recorder = record.Recorder(tmp_path / "run", True, None)
    recorder.hyperparameters({"lora.r": 16, "schedule.learning_rate": 1e-4, "lora.targets": ["q_proj"], "lora.rslora": False,
                              "model.quant": "nf4"})
    recorder.write(1, {"train/loss": 2.0, "eval/adapter_digest": "ab12"})
    recorder.write(1, {"eval/loss": 3.0})
    recorder.histogram(1, "lora/weights", torch.tensor([1.0, math.nan, 2.0]))
    recorder.histogram(1, "lora/nothing", torch.tensor([math.nan]))
    recorder.text(1, "samples", "**a question**")
    recorder.close()
    reader = events(tmp_path / "run")
    assert numbers(reader, "train/loss") == [(1, 2.0)] and numbers(reader, "eval/loss") == [(1, 3.0)]
    assert set(reader.Tags()["scalars"]) == {"train/loss", "eval/loss"}
    assert reader.Tags()["histograms"] == ["lora/weights"] and reader.Histograms("lora/weights")[0].histogram_value.num == 2
    assert reader.Tensors("samples/text_summary")[0].tensor_proto.string_val[0] == b"**a question**"
    content = reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    data = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert data["lora.r"].number_value == 16 and data["lora.targets"].string_value == '["q_proj"]'
    assert data["lora.rslora"].bool_value is False
    assert {path.is_dir() for path in (tmp_path / "run").iterdir()} == {False}, "a folder inside would be a second run in TensorBoard"


def test_without_tensorboard_nothing_but_the_metrics_is_written(tmp_path):
    recorder = record.Recorder(tmp_path, False, None)
    recorder.hyperparameters({"a": 1})
    recorder.write(1, {"train/loss": 2.0})
    recorder.histogram(1, "h", torch.ones(2))
    recorder.text(1, "t", "text")
    recorder.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_stops_the_record_with_the_step(tmp_path, monkeypatch):
    recorder, write = record.Recorder(tmp_path, False, None), os.write
    recorder.write(7, {"train/loss": 2.0})
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(OSError, match=r"metrics.jsonl: step 7 could not be written \(only 5 of 31 bytes\); make room"):
        recorder.flush()
    monkeypatch.undo()
    assert record.read_metrics(tmp_path) == []


def test_the_environment_names_versions_and_hardware_and_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hf_do_not_write_this_down")
    found = record.environment()
    text = json.dumps(found, allow_nan=False)
    assert torch.__version__.startswith(found["packages"]["torch"]) and re.match(r"3\.\d+", found["python"])
    assert found["cores"] >= 1 and found["cpu"]
    assert len(found["devices"]) == torch.cuda.device_count()
    words = re.findall(r"[\w.+-]+", text)
    assert "hf_do_not" not in text and socket.gethostname() not in words
    assert not {str(tmp_path.home()), tmp_path.home().name, os.getcwd()} & set(words)


def test_evaluations_come_back_by_step_with_their_metadata_and_a_cut_file_is_named(tmp_path):
    rows = {name: np.array([1.5, 0.25 * i, 3.0]) for i, name in enumerate(("nll", "tokens", "correct"))}
    record.save_evaluation(tmp_path, "step-000500", rows, {"step": "500", "rows_digest": "abc"})
    record.save_evaluation(tmp_path, "unquantised", rows, {})
    read = record.read_evaluations(tmp_path)
    assert set(read) == {500, "unquantised"} and read[500][1] == {"step": "500", "rows_digest": "abc"}
    assert all(np.array_equal(read[500][0][name], rows[name]) for name in rows)
    path = tmp_path / "evaluations" / "step-000500.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="step-000500.safetensors: not a whole"):
        record.read_evaluations(tmp_path)
