"""What is asked for: the plan's configurations as DESIGN.md states them, errors all at once, and no key without a reader."""
import ast
import dataclasses
import functools
import inspect
import json
import subprocess
import sys
import textwrap

import pytest
from conftest import PROJECT

import config

CONFIGS = sorted((PROJECT / "configs").glob("*.json"))
KEYS = [f"{section}.{field.name}" for section, kind in config.SECTIONS.items() for field in dataclasses.fields(kind)]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOOP_1 = {"train.micro_batch_size": 2, "train.accumulation": 16, "train.max_steps": 2000, "train.epochs": 0.0,
          "schedule.learning_rate": 1e-4, "schedule.lr_warmup_steps": 200, "schedule.lr_kind": "cosine", "schedule.clip_norm": 1.0,
          "log.every_steps": 25, "eval.every_steps": 500, "save.every_steps": 500}
ADAPTER_12 = {"lora.r": 16, "lora.alpha": 32.0, "lora.dropout": 0.0, "lora.rslora": False, "lora.targets": PROJECTIONS,
              "model.quant": "nf4", "model.double_quant": True}
PLAN = {  # DESIGN.md, "From the plan that this project carries out"
    "approach1": LOOP_1 | ADAPTER_12,
    "approach2": LOOP_1 | ADAPTER_12 | {"train.micro_batch_size": 4, "schedule.learning_rate": 2e-4, "train.max_steps": 5000,
                                        "schedule.lr_warmup_steps": 500, "train.weight_decay": 0.01},
    "approach3": LOOP_1 | {"model.quant": "llm_int8", "model.llm_int8_threshold": 6.0, "lora.r": 32, "lora.alpha": 64.0,
                           "lora.dropout": 0.1, "lora.rslora": True,
                           "lora.targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "seed-failure": {"train.micro_batch_size": 1, "train.accumulation": 8, "train.max_steps": 500, "schedule.learning_rate": 5e-5,
                     "schedule.lr_min": 0.0, "schedule.lr_kind": "cosine", "schedule.lr_warmup_steps": 0},
    "llama-8b-one-gpu": {"model.quant": "nf4"},
    "quickstart": {"model.quant": "nf4", "lora.targets": PROJECTIONS},
}


def errors_of(tree, overrides=()):
    with pytest.raises(ValueError) as error:
        config.from_dict(tree, overrides)
    return str(error.value).splitlines()[1:]


def wrong_keys(tree, overrides=()):
    return [line.split(":")[0].strip() for line in errors_of(tree, overrides)]


# ------------------------------------------------------------------------------------------------ the configurations

def test_there_is_a_configuration_for_each_part_of_the_plan():
    assert {path.stem for path in CONFIGS} == set(PLAN)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_holds_the_plans_values(path):
    flat = config.read(path).flat()
    assert {key: flat[key] for key in PLAN[path.stem]} == PLAN[path.stem]


@pytest.mark.parametrize("name", ["approach1", "approach2", "approach3"])
def test_every_approach_has_a_floor_under_its_rate(name):
    schedule = config.read(PROJECT / f"configs/{name}.json").schedule
    assert 0 < schedule.lr_min < schedule.learning_rate


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "llama-8b-one-gpu"], ids=lambda path: path.stem)
def test_without_overrides_the_packaged_model_and_the_documentation_rows_are_used(path):
    c = config.read(path)
    assert (c.model.path, c.data.train, c.data.eval) == (
        "models/SmolLM2-135M-Instruct", "data/python-docs-train.jsonl", "data/python-docs-eval.jsonl")


def test_settings_written_out_are_read_back_the_same():
    for path in CONFIGS:
        c = config.read(path)
        assert config.from_dict(json.loads(json.dumps(c.to_dict()))) == c


# ------------------------------------------------------------------------------------------------------------ errors

@pytest.mark.parametrize("key, bad", [
    ("schedule.learning_rate", "1e-4"), ("schedule.learning_rate", float("nan")), ("schedule.learning_rate", float("inf")),
    ("schedule.learning_rate", -1e-4), ("schedule.learning_rate", 10**400), ("schedule.learning_rate", None),
    ("lora.r", 0), ("lora.r", -4), ("lora.r", 8.5), ("lora.r", True), ("lora.alpha", 0),
    ("lora.dropout", 1.0), ("lora.targets", []), ("lora.targets", "q_proj"), ("lora.targets", [3]), ("lora.targets", ["q_proj", "q_proj"]),
    ("lora.targets", ["q_proj", "lm_head"]), ("lora.targets", ["model.embed_tokens"]), ("lora.targets", ["all-linear", "q_proj"]),
    ("model.quant", "nf5"), ("model.double_quant", "yes"), ("model.double_quant", 1), ("model.path", ""), ("model.path", 7),
    ("train.micro_batch_size", 0), ("train.accumulation", -1), ("train.max_steps", -5), ("train.max_steps", 10.0),
    ("train.seed", -1), ("train.seed", 2**64), ("data.train", ""), ("data.max_length", 0), ("eval.every_steps", -1),
    ("save.keep", 0), ("memory.checkpoint_layers", -2), ("memory.loss_chunk", 0), ("log.every_steps", 0),
    ("schedule.clip_percentile", 101), ("schedule.batch_points", [[1, 4.5]]), ("schedule.batch_points", [[1, 0]]),
    ("schedule.batch_points", [[5, 4], [5, 8]]), ("schedule.batch_points", [[-1, 4]]), ("schedule.batch_points", [[1]]),
    ("schedule.batch_points", [["1", 4]]), ("schedule.batch_points", [[True, 4]]),
    ("data.max_length", 10**20), ("data.first_rows", 10**20), ("train.max_steps", 10**20),
])
def test_a_value_that_breaks_its_rule_is_refused_once_and_by_its_key(key, bad):
    section, name = key.split(".")
    assert wrong_keys({section: {name: bad}}) == [key]


@pytest.mark.parametrize("tree", [
    {"train": {"epochs": 1.0}}, {"train": {"max_steps": 0}}, {"schedule": {"lr_min": 1e-3}}, {"schedule": {"lr_kind": "points"}},
    {"schedule": {"lr_points": [[1, 1.0]]}}, {"schedule": {"lr_decay_steps": 10}},
    {"schedule": {"clip_percentile": 50, "clip_norm": 0}}, {"eval": {"patience": 2, "every_steps": 0}},
    {"model": {"compute_dtype": "fp64"}}, {"model": {"quant": "llm_int8", "compute_dtype": "fp32"}},
    {"memory": {"shard": True, "keep_dequantized": "yes"}}, {"model": {"attention": "varlen", "compute_dtype": "fp32"}},
])
def test_settings_that_contradict_each_other_are_refused_with_both_keys(tree):
    keys = wrong_keys(tree)
    assert len(keys) == 1 and len(keys[0].split(", ")) == 2 and set(keys[0].split(", ")) <= set(KEYS)


def test_a_key_that_is_wrong_by_itself_is_not_told_again_as_a_contradiction():
    assert wrong_keys({"schedule": {"learning_rate": "1e-3", "lr_min": 5e-4}}) == ["schedule.learning_rate"]


def test_unknown_sections_and_keys_are_refused_and_the_right_place_is_named():
    lines = errors_of({"trian": {"seed": 1}, "train": {"learning_rate": 1e-4, "stepz": 3}, "lora": 5},
                      [("modle.quant", "nf4"), ("save.evry", "3")])
    wrong = [line.split(":")[0].strip() for line in lines]
    assert wrong == ["trian", "lora", "train.learning_rate", "train.stepz", "save.evry", "--modle.quant"]
    assert "did you mean schedule.learning_rate?" in lines[2] and "max_steps" in lines[3]


def test_all_errors_come_in_one_message_with_exit_code_2_before_anything_is_loaded(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{"lora": {"r": 0, "alpha": 32, "alpha": 16}, "schedule": {"learning_rate": NaN, "lr_decay_steps": 5},'
                    ' "train": {"seed": "0", "speed": 1}, "model": {"path": "no/such/model"}}')
    done = subprocess.run([sys.executable, PROJECT / "train.py", path, f"--out={tmp_path / 'run'}", "--eval.patience=x",
                           "--data.train=missing.jsonl"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "run").exists()
    head, *lines = done.stderr.splitlines()
    assert head == f"error: {path}: 7 errors"
    assert {line.split(":")[0].strip() for line in lines} == {
        "alpha", "lora.r", "schedule.learning_rate", "schedule.lr_decay_steps, schedule.lr_kind", "train.seed", "train.speed",
        "eval.patience"}


@pytest.mark.parametrize("text, said", [
    ("{", "line 1: not valid JSON"), ('{"lora": {"r": 16,}}', "line 1: not valid JSON"), ("\n\n[1, 2", "line 3"),
    ("[]", "must be a JSON object"), ("", "line 1"),
    ('{"lora": {"r": 1' + "0" * 5000 + "}}", "not valid JSON"), ("[" * 100000, "not valid JSON"), (b"\xff\xfe{}", "not valid JSON"),
])
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path, text, said):
    path = tmp_path / "c.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        config.read(path)
    assert str(path) in str(error.value) and said in str(error.value)


def test_a_byte_order_mark_is_no_error(tmp_path):
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf{}")
    assert config.read(tmp_path / "c.json") == config.Config()


def test_a_missing_file_is_refused_and_says_where_configurations_are(tmp_path):
    with pytest.raises(ValueError, match="cannot read the configuration .No such file.*configs"):
        config.read(tmp_path / "none.json")


# -------------------------------------------------------------------------------------------------- the command line

def test_every_kind_of_key_can_be_given_on_the_command_line():
    words, flags, overrides = config.command_line(
        ["c.json", "--train.seed=7", "--schedule.learning_rate=2e-4", "--schedule.lr_min=0", "--lora.rslora=true",
         "--lora.targets=q_proj,v_proj", "--model.path=a=b", "--schedule.batch_points=[[1, 4], [10, 8]]", "--resume", "--out", "there"],
        {"out": "", "resume": None, "accept": "", "overwrite": False})
    c = config.from_dict({"train": {"seed": 1}}, overrides)
    assert (words, flags) == (["c.json"], {"out": "there", "resume": True, "accept": "", "overwrite": False})
    assert (c.train.seed, c.schedule.learning_rate, c.schedule.lr_min, c.schedule.batch_points) == (7, 2e-4, 0.0, [[1, 4], [10, 8]])
    assert (c.lora.rslora, c.lora.targets, c.model.path) == (True, ["q_proj", "v_proj"], "a=b")


@pytest.mark.parametrize("arg", ["--train.seed", "--speed=1", "--overwrite=yes", "--out", "--out=", "-v", "--resume="])
def test_an_option_that_makes_no_sense_is_refused_by_name(arg):
    with pytest.raises(ValueError, match=arg.rstrip("=")):
        config.command_line([arg], {"out": "", "resume": None, "overwrite": False})


def test_an_override_given_twice_is_refused():
    assert wrong_keys({}, [("train.seed", "1"), ("train.seed", "2")]) == ["--train.seed"]


def test_an_override_of_the_wrong_type_is_refused():
    overrides = [("train.seed", "1.5"), ("lora.rslora", "yes"), ("schedule.learning_rate", "fast"), ("schedule.batch_points", "1,2")]
    assert sorted(wrong_keys({}, overrides)) == sorted(key for key, _ in overrides)


def test_help_lists_every_key_with_its_default_and_fits_a_console():
    done = subprocess.run([sys.executable, PROJECT / "train.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    for section, kind in config.SECTIONS.items():
        for field in dataclasses.fields(kind):
            assert any(line.startswith(f"  --{section}.{field.name}=") for line in lines), field.name
    assert "  --schedule.learning_rate=0.0002" in lines and "  --model.quant=nf4" in lines and max(map(len, lines)) <= 120


# --------------------------------------------------------------------------------------------------- every key is read

@functools.cache
def read_keys():
    """The 'section.key' that some module but config.py reads as an attribute: config.lora.r, model_config.quant, schedule.lr_min, ..."""
    modules = [path.read_text(encoding="utf-8") for path in PROJECT.glob("*.py") if path.name != "config.py"]
    found = set()
    for source in [*modules, textwrap.dedent(inspect.getsource(config.Config.samples_per_step.fget))]:  # which schedule.py reads
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute):
                above = node.value
                owner = above.attr if isinstance(above, ast.Attribute) else above.id if isinstance(above, ast.Name) else ""
                found.add(f"{owner.removesuffix('_config')}.{node.attr}")
    return found


@pytest.mark.parametrize("key", KEYS)
def test_the_key_is_read_by_a_module(key):
    assert key in read_keys()


# --------------------------------------------------------------------------------------------------------------- paths

def test_a_path_is_taken_as_given_and_else_beside_the_program_and_else_as_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.find("configs/approach1.json") == str(PROJECT / "configs/approach1.json")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/approach1.json").write_text("{}")
    assert config.find("configs/approach1.json") == "configs/approach1.json"
    assert config.find("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


def test_a_reader_that_has_gone_is_no_error():
    command = f"{sys.executable} train.py --help | head -n 1"
    done = subprocess.run(["bash", "-c", command + '; echo ${PIPESTATUS[0]}'], cwd=PROJECT, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.splitlines()[-1] in ("0", "141") and len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("key, value", [
    ("schedule.learning_rate", 1e308), ("train.weight_decay", 1e4), ("train.adam_eps", 1e-320), ("lora.alpha", 1e308),
    ("criteria.optimal_steady_parts", 10**9), ("model.path", "a\0b"), ("data.cache", "\0")])
def test_values_that_no_number_or_folder_could_follow_are_refused(key, value):
    section, name = key.split(".")
    with pytest.raises(ValueError, match=rf"{key}: must "):
        config.from_dict({section: {name: value}})


@pytest.mark.parametrize("error, named", [
    (OSError(28, "No space left on device"), False), (OSError(28, "x/step-000004: could not be saved; make room"), True),
    (FileNotFoundError(2, "No such file or directory", "x"), True)])
def test_an_error_that_names_a_file_is_not_said_to_name_none(monkeypatch, capsys, error, named):
    def main(argv):
        raise error

    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as left:
        config.run_command(main)
    assert left.value.code == 2 and ("it names no file" in capsys.readouterr().err) != named
