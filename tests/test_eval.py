"""How good a model is said to be: against transformers' own loss, however rows are packed, whatever holds the adapter."""
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT, make_model, settings_of
from safetensors.torch import load_file, save_file

import checkpoint
import config
import data
import eval as evaluation
import lora_layers
import model
import record
import train
import verdict


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So little work is done sooner by one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def configured(tiny_inputs, **sections):
    tree = {"model": {"path": str(tiny_inputs / "model"), "quant": "none", "compute_dtype": "fp32"},
            "data": {"train": str(tiny_inputs / "train.jsonl"), "eval": str(tiny_inputs / "eval.jsonl")}}
    return config.from_dict({name: tree.get(name, {}) | sections.get(name, {}) for name in {**tree, **sections}})


def tokenized(tiny_inputs, name="train.jsonl"):
    return data.tokenize(data.read_rows(str(tiny_inputs / name)), data.load_tokenizer(tiny_inputs / "model"), config.Data())


def reference(folder, rows, count):
    """(loss, accuracy) over all supervised tokens of the first `count` rows, by transformers, a row at a time."""
    from transformers import AutoModelForCausalLM
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    total, correct, tokens = 0.0, 0, 0
    for r in range(count):
        at = slice(rows.offsets[r], rows.offsets[r + 1])
        ids, supervised = torch.from_numpy(rows.ids[at]).long(), torch.from_numpy(rows.supervised[at])
        with torch.no_grad():
            out = network(input_ids=ids[None], labels=torch.where(supervised, ids, -100)[None])
        total += out.loss.item() * int(supervised.sum())
        correct += int((out.logits[0, :-1].argmax(-1) == ids[1:])[supervised[1:]].sum())
        tokens += int(supervised.sum())
    return total / tokens, correct / tokens


@pytest.fixture(scope="module")
def trained(tiny_inputs, tmp_path_factory):
    """A run of a few steps in 32 bits, without quantisation."""
    run = tmp_path_factory.mktemp("trained") / "run"
    path = run.parent / "c.json"
    sections = {"train": {"max_steps": 6, "micro_batch_size": 4, "accumulation": 1}, "lora": {"r": 4, "alpha": 8.0},
                "schedule": {"learning_rate": 2e-2, "lr_warmup_steps": 0}, "eval": {"samples": 2, "max_new_tokens": 6},
                "save": {"every_steps": 3}, "log": {"tensorboard": False}}
    path.write_text(json.dumps(configured(tiny_inputs, **sections).to_dict()))
    assert train.main([str(path), f"--out={run}"]) == 0
    return run


def run_eval(capsys, *arguments):
    """The JSON that `eval.py ARGUMENTS --json` prints."""
    capsys.readouterr()
    assert evaluation.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------------------ figures

def test_loss_and_accuracy_are_transformers_own_weighted_by_tokens_however_rows_are_packed(tiny_inputs):
    rows = tokenized(tiny_inputs)
    network = model.load(configured(tiny_inputs), "cpu")
    loss, accuracy = reference(tiny_inputs / "model", rows, len(rows))
    for max_tokens in (1, 70, 300, 100000):
        figures, by_row = evaluation.evaluate(network, rows, 0, max_tokens)
        assert figures["loss"] == pytest.approx(loss, rel=1e-5) and figures["token_accuracy"] == pytest.approx(accuracy, abs=1e-12)
        assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert (figures["supervised_tokens"], figures["rows"]) == (rows.counts["supervised_tokens"], 23)
        assert by_row["nll"].sum() / by_row["tokens"].sum() == pytest.approx(loss, rel=1e-5) and len(by_row["nll"]) == 23
        assert by_row["tokens"].tolist() == [rows.supervised[start:end].sum() for start, end in zip(rows.offsets, rows.offsets[1:])]


def test_only_the_first_rows_count_where_so_many_are_asked_for(tiny_inputs):
    rows = tokenized(tiny_inputs)
    figures, _ = evaluation.evaluate(model.load(configured(tiny_inputs), "cpu"), rows, 5, 200)
    assert figures["loss"] == pytest.approx(reference(tiny_inputs / "model", rows, 5)[0], rel=1e-5) and figures["rows"] == 5


def test_the_chunk_of_logits_changes_nothing(tiny_inputs):
    loss_of = lambda network: evaluation.evaluate(network, tokenized(tiny_inputs), 0, 300)[0]["loss"]
    losses = [loss_of(model.load(configured(tiny_inputs, memory={"loss_chunk": chunk}), "cpu")) for chunk in (1, 7, 1024)]
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-6)


def test_dropout_is_off_in_an_evaluation_and_training_mode_comes_back(tiny_inputs):
    rows, network = tokenized(tiny_inputs), model.load(configured(tiny_inputs, lora={"dropout": 0.9}), "cpu")
    with torch.no_grad():
        for name, parameter in lora_layers.adapters(network).items():
            parameter.normal_()
    before = torch.get_rng_state()
    first, again = (evaluation.evaluate(network, rows, 0, 300)[0]["loss"] for _ in range(2))
    assert first == again and network.training and torch.equal(before, torch.get_rng_state())


def test_an_interrupted_evaluation_gives_nothing(tiny_inputs):
    network = model.load(configured(tiny_inputs), "cpu")
    assert evaluation.evaluate(network, tokenized(tiny_inputs), 0, 100, interrupted=[15]) == (None, None) and network.training


# ---------------------------------------------------------------------------------------------------------- generation

def test_samples_are_transformers_greedy_ones_prompt_by_prompt(tiny_inputs):
    from transformers import AutoModelForCausalLM
    tokenizer = data.load_tokenizer(tiny_inputs / "model")
    c = configured(tiny_inputs, eval={"samples": 4})
    prompts, end_ids = data.prompts(c, tokenizer), data.end_of_turn(tokenizer)
    samples = evaluation.generate(model.load(c, "cpu"), tokenizer, prompts, 7, end_ids)
    plain = AutoModelForCausalLM.from_pretrained(tiny_inputs / "model").eval()
    assert len({len(prompt["ids"]) for prompt in prompts}) > 1  # so that some are padded
    for prompt, sample in zip(prompts, samples):
        ids = list(prompt["ids"])
        for _ in range(7):
            with torch.no_grad():
                ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in end_ids:
                break
        new = ids[len(prompt["ids"]):]
        assert sample["tokens"] == len(new) and sample["stopped"] == (new[-1] in end_ids)
        assert sample["text"] == tokenizer.decode([token for token in new if token not in end_ids], skip_special_tokens=True)


def test_a_sample_that_ends_by_itself_counts_as_stopped(tiny_inputs, monkeypatch):
    tokenizer, network = data.load_tokenizer(tiny_inputs / "model"), model.load(configured(tiny_inputs), "cpu")
    prompts, end_ids = data.prompts(configured(tiny_inputs, eval={"samples": 2}), tokenizer), data.end_of_turn(tokenizer)
    ok, end = tokenizer.encode("ok"), end_ids[0]
    answers = torch.tensor([[*ok, end, end], [*ok, *ok]])
    monkeypatch.setattr(network, "generate", lambda input_ids, **_: torch.cat((input_ids, answers), dim=1))
    samples = evaluation.generate(network, tokenizer, prompts, 4, end_ids)
    assert [(s["text"], s["tokens"], s["stopped"]) for s in samples] == [("ok", 3, True), ("okok", 4, False)]
    assert evaluation.stop_rate(samples) == 0.5
    shown = evaluation.show([sample | {"text": sample["text"] * 60} for sample in samples])
    assert max(map(len, shown.splitlines())) <= 80 and shown.count("(did not stop)") == 1


# --------------------------------------------------------------------------------------------------------- the command

def test_a_run_its_best_a_checkpoint_and_an_adapter_folder_give_the_figures_of_training(trained, tiny_inputs, tmp_path, capsys):
    last = train.record.read_metrics(trained)[-1]
    newest = checkpoint.newest_valid(trained)[0]
    shutil.copytree(newest, tmp_path / "adapter", ignore=lambda folder, names: [name for name in names if not name.startswith("adapter_")])
    where = [f"--model={tiny_inputs / 'model'}", "--model.quant=none", "--model.compute_dtype=fp32", f"--data={tiny_inputs / 'eval.jsonl'}"]
    for arguments in ([f"--ckpt={trained}"], ["--ckpt", trained], [f"--ckpt={trained}@best"], [f"--ckpt={newest}"],
                      [f"--ckpt={tmp_path / 'adapter'}", *where]):
        figures = run_eval(capsys, *arguments)
        assert figures["loss"] == pytest.approx(last["eval/loss"], rel=1e-6) and figures["token_accuracy"] == last["eval/token_accuracy"]
    assert run_eval(capsys, f"--ckpt={trained}")["samples"] == json.loads(last["eval/samples"])
    first = run_eval(capsys, f"--ckpt={trained}@step-000003")
    assert first["loss"] > figures["loss"]


def test_an_adapter_that_peft_saved_is_evaluated_on_its_own_base_model(tiny_inputs, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_inputs / "model")
    network = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], init_lora_weights=False,
                                              task_type="CAUSAL_LM"))
    network.save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    network.merge_and_unload().save_pretrained(merged)
    figures = run_eval(capsys, f"--ckpt={tmp_path / 'adapter'}", "--model.quant=none", "--model.compute_dtype=fp32",
                       f"--data={tiny_inputs / 'eval.jsonl'}")
    rows = tokenized(tiny_inputs, "eval.jsonl")
    assert figures["loss"] == pytest.approx(reference(merged, rows, len(rows))[0], rel=1e-5)


def test_a_model_alone_is_evaluated_untouched_quantised_or_not(tiny_inputs, capsys):
    rows = tokenized(tiny_inputs, "eval.jsonl")
    loss, accuracy = reference(tiny_inputs / "model", rows, len(rows))
    arguments = [f"--model={tiny_inputs / 'model'}", f"--data={tiny_inputs / 'eval.jsonl'}", "--eval.samples=0",
                 "--model.compute_dtype=fp32"]
    plain, nf4 = run_eval(capsys, *arguments, "--model.quant=none"), run_eval(capsys, *arguments)
    assert plain["loss"] == pytest.approx(loss, rel=1e-5) and plain["token_accuracy"] == accuracy
    assert plain["samples"] == [] and plain["stop_rate"] is None
    assert plain["loss"] != nf4["loss"] == pytest.approx(loss, rel=0.1) and nf4["quant"] == "nf4"


def test_other_rows_and_prompts_are_taken_from_the_command_line(trained, tiny_inputs, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("say blue\nsay red twice\n")
    figures = run_eval(capsys, f"--ckpt={trained}", "--data", tiny_inputs / "train.jsonl", "--prompts", tmp_path / "prompts.txt",
                       "--eval.max_new_tokens=2")
    assert (figures["rows"], figures["data"]) == (23, "train.jsonl")
    assert [sample["prompt"] for sample in figures["samples"]] == ["say blue", "say red twice"]
    assert all(sample["tokens"] <= 2 for sample in figures["samples"])


def test_rows_held_out_of_the_training_rows_are_those_of_the_run(tiny_inputs, tmp_path, capsys):
    path = tmp_path / "c.json"
    held_out = configured(tiny_inputs, data={"eval": "", "eval_rows": 5}, train={"max_steps": 1, "seed": 3}, eval={"samples": 0},
                          log={"tensorboard": False})
    path.write_text(json.dumps(held_out.to_dict()))
    assert train.main([str(path), f"--out={tmp_path / 'run'}", "--schedule.lr_warmup_steps=0"]) == 0, capsys.readouterr()
    figures = run_eval(capsys, f"--ckpt={tmp_path / 'run'}")
    assert figures["rows"] == 5 and figures["loss"] == pytest.approx(train.record.read_metrics(tmp_path / "run")[-1]["eval/loss"], rel=1e-6)


def test_the_command_prints_figures_and_samples_for_people_and_nothing_else(trained):
    done = subprocess.run([sys.executable, PROJECT / "eval.py", "--ckpt", trained], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    for word in ("loss", "perplexity", "token accuracy", "stop rate", "prompt", "reference"):
        assert word in done.stdout
    assert max(map(len, done.stdout.replace(str(trained.parent.parent), "").splitlines())) <= 80


def test_a_loss_that_is_no_number_is_still_json(tiny_inputs, capsys, monkeypatch):
    real = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: (real(*args)[0] | {"loss": math.nan, "perplexity": math.inf}, {}))
    figures = run_eval(capsys, f"--model={tiny_inputs / 'model'}", f"--data={tiny_inputs / 'eval.jsonl'}", "--eval.samples=0")
    assert figures["loss"] is None and figures["perplexity"] is None


# ------------------------------------------------------------------------------------------------------------ bad input

def test_what_is_wrong_is_told_before_the_model_is_loaded(trained, tiny_inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "load", lambda *args: pytest.fail("the model was loaded"))
    for arguments, said in (([], "name what to evaluate"), (["runs/x"], "unexpected"), (["--ckpt=nothing"], "not a run folder"),
                            (["--model=no/such/model"], "model.path"),
                            ([f"--ckpt={trained}", "--data=none.jsonl"], "none.jsonl: no such file"),
                            ([f"--ckpt={trained}", "--prompts=none.txt"], "none.txt: no such file"),
                            ([f"--ckpt={trained}", "--lora.r=0"], "lora.r"),
                            ([f"--ckpt={trained}@step-000077"], "no checkpoint step-000077")):
        with pytest.raises(ValueError, match=said):
            evaluation.main(arguments)


def test_an_adapter_of_another_model_is_refused(trained, tiny_inputs, tmp_path):
    shutil.copytree(tiny_inputs / "model", tmp_path / "wider")
    make_model(tmp_path / "wider", hidden_size=128)
    with pytest.raises(ValueError, match="has the shape"):
        evaluation.main([f"--ckpt={trained}", f"--model={tmp_path / 'wider'}"])


def test_the_command_exits_2_with_one_message():
    done = subprocess.run([sys.executable, PROJECT / "eval.py", "--ckpt", "nothing"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("error: nothing: not a run folder")


# -------------------------------------------------------------------------------------------------- kept for the verdict

@pytest.fixture
def finished(trained, tmp_path):
    """The run of `trained`, in a folder of its own."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_a_kept_evaluation_holds_each_rows_figures_with_what_tells_whose_they_are(finished, capsys):
    shutil.rmtree(finished / "evaluations", ignore_errors=True)
    figures = run_eval(capsys, f"--ckpt={finished}", "--keep")
    untrained = run_eval(capsys, f"--ckpt={finished}", "--untrained", "--keep")
    unquantised = run_eval(capsys, f"--ckpt={finished}", "--untrained", "--keep", "--model.quant=none")
    kept, metrics = record.read_evaluations(finished), record.read_metrics(finished)
    assert set(kept) == {0, 6, "unquantised"}
    for key, shown, line in ((6, figures, metrics[-1]), (0, untrained, metrics[0]), ("unquantised", unquantised, metrics[0])):
        arrays, metadata = kept[key]
        loss = arrays["nll"].sum() / arrays["tokens"].sum()
        assert len(arrays["nll"]) == shown["rows"] and loss == pytest.approx(shown["loss"]) == pytest.approx(line["eval/loss"], rel=1e-5)
        assert metadata["adapter_digest"] == line["eval/adapter_digest"]
        assert len(metadata["rows_digest"]) == 64 and len(metadata["tokenizer"]) == 16
    assert figures["adapter"].endswith("step-000006") and untrained["adapter"] is None
    assert {c.name: c.low is not None for c in verdict.of_run(finished).criteria}["eval loss drop"]


@pytest.mark.parametrize("arguments, said", [
    (["--data=x.jsonl"], "--data.eval=x.jsonl would make it another"), (["--model.quant=int8"], "--model.quant=int8 would"),
    (["--data.max_length=9"], "data.max_length"), (["--untrained", "--model.quant=int8"], "--model.quant=int8 would")])
def test_what_would_be_another_evaluation_is_not_kept_as_the_runs_own(finished, arguments, said):
    with pytest.raises(ValueError, match=said):
        evaluation.main([f"--ckpt={finished}", "--keep", *arguments])


def test_only_a_runs_checkpoint_has_a_place_to_keep_its_evaluation(finished, tiny_inputs, tmp_path):
    shutil.copytree(checkpoint.find(str(finished)), tmp_path / "alone")
    for arguments in ([f"--ckpt={tmp_path / 'alone'}", "--keep"], [f"--model={tiny_inputs / 'model'}", "--keep"]):
        with pytest.raises(ValueError, match="--keep"):
            evaluation.main(arguments)
    with pytest.raises(ValueError, match="--untrained"):
        evaluation.main([f"--model={tiny_inputs / 'model'}", "--untrained"])


def test_sample_figures_are_means_over_samples_and_overlap_over_those_with_a_reference():
    samples = [{"text": "a b c d a b c d", "reference": "", "stopped": False},
               {"text": "red files", "reference": "red doors", "stopped": True}]
    assert evaluation.sample_figures(samples) == {"stop_rate": 0.5, "repetition": pytest.approx(0.1), "overlap": pytest.approx(0.5)}
    assert "overlap" not in evaluation.sample_figures(samples[:1]) and evaluation.sample_figures([]) == {}


@pytest.mark.parametrize("how", ["zero", "another's", "trained"])
def test_template_tokens_that_the_model_never_trained_are_warned_of(tiny_inputs, tmp_path, capsys, how):
    """All rows of tokens that were never met in training move alike; SmolLM2's <|im_start|> has a cosine of 0.993 to such rows, and
    they of 0.99999 to each other."""
    import safetensors.torch
    shutil.copytree(tiny_inputs / "model", tmp_path / "model")
    tensors = safetensors.torch.load_file(tmp_path / "model/model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    start = data.load_tokenizer(str(tmp_path / "model")).convert_tokens_to_ids("<|im_start|>")
    if how == "trained":
        noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
        table[start] = table[300] + 0.05 * table[300].norm() / 8 * noise  # cosine 0.9988
    else:
        table[start] = table[start] * 0.001 if how == "zero" else 1.01 * table[300]
    safetensors.torch.save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    settings = settings_of(tiny_inputs, tmp_path / "tiny.json")
    options = [f"--model.path={tmp_path / 'model'}", "--train.max_steps=1", "--schedule.lr_warmup_steps=0", "--eval.every_steps=0"]
    assert train.main([str(settings), f"--out={tmp_path / 'run'}", *options]) == 0
    told = capsys.readouterr().err
    warning = "warning: model.path: the rows use '<|im_start|>', which the base model seems never to have been trained on"
    assert (warning in told) == (how != "trained"), told


# ------------------------------------------------------------------------------------- the untouched model, kept between starts

def test_the_unquantised_figures_are_kept_and_every_row_of_theirs(tiny_inputs, tmp_path, monkeypatch):
    cfg = configured(tiny_inputs, model={"quant": "nf4"}, data={"cache": str(tmp_path / "cache")})
    rows, cpu = tokenized(tiny_inputs), torch.device("cpu")
    figures, by_row = evaluation.evaluate_unquantised(cfg, cpu, rows)
    assert figures["loss"] == pytest.approx(reference(tiny_inputs / "model", rows, len(rows))[0], rel=1e-5)
    real, loads = model.load, []
    monkeypatch.setattr(model, "load", lambda *given: loads.append(given) or real(*given))
    again, rows_again = evaluation.evaluate_unquantised(cfg, cpu, rows)
    assert not loads and again == figures == evaluation.figures_of(by_row) and set(rows_again) == set(by_row)
    for started in ({"init": "loftq", "r": 2}, {"dora": True, "r": 8}):  # adapters that would not begin at nothing
        changed = configured(tiny_inputs, model={"quant": "nf4"}, data={"cache": str(tmp_path / "cache")}, lora=started)
        assert evaluation.evaluate_unquantised(changed, cpu, rows)[0] == figures
    assert not loads
    assert all(rows_again[name].dtype == by_row[name].dtype and (rows_again[name] == by_row[name]).all() for name in by_row)
    for other in ({"model": {"compute_dtype": "fp32"}, "lora": {"r": 2}}, {"model": {"double_quant": False}}):  # nothing of the figures
        sections = {"data": {"cache": str(tmp_path / "cache")}} | other | {"model": {"quant": "nf4"} | other["model"]}
        evaluation.evaluate_unquantised(configured(tiny_inputs, **sections), cpu, rows)
    assert not loads
    for file in (tmp_path / "cache").glob("*/by_row.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    assert evaluation.evaluate_unquantised(cfg, cpu, rows)[0]["loss"] == figures["loss"] and len(loads) == 1, "damaged, so made anew"


def test_unquantised_figures_of_another_model_or_other_rows_are_not_taken(tiny_inputs, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_inputs / "model", tmp_path / "model")
    sections = {"model": {"path": str(folder), "quant": "nf4"}, "data": {"cache": str(tmp_path / "cache")}}
    rows, cpu = tokenized(tiny_inputs), torch.device("cpu")
    loss = lambda which=rows, **more: evaluation.evaluate_unquantised(configured(tiny_inputs, **sections | more), cpu, which)[0]["loss"]
    first = loss()
    assert loss(tokenized(tiny_inputs, "eval.jsonl")) != first
    assert loss(eval={"max_rows": 3}) != first
    weights = load_file(folder / "model.safetensors")
    before = (folder / "model.safetensors").stat()
    changed = {name: tensor * 1.5 if "norm" in name else tensor for name, tensor in weights.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    os.utime(folder / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (folder / "model.safetensors").stat().st_size == before.st_size
    assert loss() != first, "the same name, size and time, and other weights"


def test_without_a_cache_the_unquantised_model_is_evaluated_each_time(tiny_inputs, tmp_path, monkeypatch):
    cfg = configured(tiny_inputs, model={"quant": "int8"}, data={"cache": "off"})
    rows, loads, real = tokenized(tiny_inputs), [], model.load
    monkeypatch.setattr(model, "load", lambda *given: loads.append(given) or real(*given))
    values = [evaluation.evaluate_unquantised(cfg, torch.device("cpu"), rows) for _ in range(2)]
    assert len(loads) == 2 and values[0][0]["loss"] == values[1][0]["loss"] and set(values[0][1]) == {"nll", "tokens", "correct"}


def test_unquantised_figures_that_are_not_finite_are_told_and_not_kept(tiny_inputs, tmp_path, monkeypatch):
    cfg = configured(tiny_inputs, model={"quant": "nf4"}, data={"cache": str(tmp_path / "cache")})
    rows, real, loads = tokenized(tiny_inputs), model.load, []

    def broken(*given):
        network = real(*given)
        if not loads:
            network.get_input_embeddings().weight.data[:] = float("nan")
        loads.append(network)
        return network

    monkeypatch.setattr(model, "load", broken)
    losses = [evaluation.evaluate_unquantised(cfg, torch.device("cpu"), rows)[0]["loss"] for _ in range(3)]
    assert math.isnan(losses[0]) and losses[1] == losses[2] and math.isfinite(losses[1]) and len(loads) == 2


def test_a_model_that_does_not_fit_is_not_read_to_find_its_figures(tiny_inputs, tmp_path, monkeypatch, capsys):
    cfg = configured(tiny_inputs, model={"quant": "nf4"}, data={"cache": str(tmp_path / "cache")})
    monkeypatch.setattr(model, "free_memory", lambda device: 0)
    monkeypatch.setattr(evaluation, "unquantised_shaped_by", lambda *given: pytest.fail("the weights were read"))
    assert evaluation.evaluate_unquantised(cfg, torch.device("cpu"), tokenized(tiny_inputs)) is None
    assert "does not fit" in capsys.readouterr().out


def test_a_model_file_that_cannot_be_read_is_not_called_a_cache_that_cannot_be_written(tiny_inputs, tmp_path, monkeypatch):
    cfg = configured(tiny_inputs, model={"quant": "nf4"}, data={"cache": str(tmp_path / "cache")})

    def refused(*given):
        raise PermissionError(13, "Permission denied", str(tiny_inputs / "model/model.safetensors"))

    monkeypatch.setattr(model, "load", refused)
    with pytest.raises(PermissionError):
        evaluation.evaluate_unquantised(cfg, torch.device("cpu"), tokenized(tiny_inputs))
    assert not list((tmp_path / "cache").glob("*.tmp"))


# ------------------------------------------------------------------------------------------- rows that a model can place

@pytest.mark.parametrize("kind, changes, words", [
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
     r"more than 32, .*\(dynamic\).*data.max_length to 32"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "short_factor": [1.0] * 8,
                                  "long_factor": [4.0] * 8},
              "original_max_position_embeddings": 32, "max_position_embeddings": 64}, r"more than 32, .*\(longrope\)"),
    ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}, "more than 32, and this model has no more positions"),
    ("llama", {}, "")])
def test_rows_that_a_models_positions_do_not_hold_are_refused_by_name(tmp_path, kind, changes, words):
    """Two kinds of rotary positions follow the longest document of a micro-batch; learnt ones end."""
    from conftest import COMMON, make_config, rows_of
    from transformers import AutoConfig, AutoModelForCausalLM
    settings = AutoConfig.for_model(kind, **{**COMMON, "max_position_embeddings": 32, **changes})
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    network = model.load(make_config(tmp_path, lora={"targets": ["q_proj", "v_proj"] if kind != "phi3" else ["qkv_proj"]}), "cpu")
    evaluation.check_rows(network, rows_of([5, 32]))
    if not words:
        return evaluation.check_rows(network, rows_of([5, 33]), sampled=40)
    with pytest.raises(ValueError, match="^1: has 33 tokens, " + words):
        evaluation.check_rows(network, rows_of([5, 33, 7]))
    if kind == "opt":
        with pytest.raises(ValueError, match="eval.max_new_tokens: samples of up to 40 tokens"):
            evaluation.check_rows(network, rows_of([5]), sampled=40)


def test_a_run_asks_whether_its_rows_can_be_placed(tiny_inputs, tmp_path):
    folder = tmp_path / "model"
    make_model(folder, max_position_embeddings=16, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_inputs / "model" / name, folder / name)
    settings = settings_of(tiny_inputs, tmp_path / "c.json")
    for quantised in ("no", "auto"):  # before the unquantised model is evaluated, too
        with pytest.raises(ValueError, match=r"\.jsonl:\d+: has \d+ tokens, more than 16, "):
            train.main([str(settings), f"--model.path={folder}", f"--eval.unquantised={quantised}", f"--out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content, said", [("", "not valid JSON"), ('{"model": {"pa', "not valid JSON"),
                                           ("[]", "must be an object of sections"), ('{"model": 5}', "must be an object of sections")])
def test_a_runs_damaged_settings_are_named_by_their_file(trained, tmp_path, content, said):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"run/config\.json: {said}.*restore it or remove it"):
        evaluation.main([f"--ckpt={tmp_path / 'run'}"])
