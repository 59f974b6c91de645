"""Checkpoints under real faults: killed processes, full disks, flipped bits, cut files, folders made by someone hostile."""
import ctypes
import errno
import hashlib
import json
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import time
import traceback
import tracemalloc

import pytest
import safetensors.torch
import torch

import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
FILES = ("adapter_model.safetensors", "optimizer.safetensors", "generators.safetensors", "adapter_config.json", "state.json",
         "manifest.json")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What fsync does shows only when the power goes, and it takes most of a save's time; that it is called, and when, has a test."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def contents(step, salt=0, best_step=None, numbers=6):
    """What a run would save at `step`: small, and different for every (step, salt)."""
    generator = torch.Generator().manual_seed(1000 * step + salt)
    draw = lambda: torch.randn(numbers, generator=generator)
    tensors = {
        "adapter_model.safetensors": {"q_proj.lora_A.weight": draw(), "q_proj.lora_B.weight": draw()},
        "optimizer.safetensors": {"q_proj.lora_A.weight.exp_avg": draw(), "step": torch.tensor(float(step))},
        "generators.safetensors": {"cuda:0": torch.arange(16, dtype=torch.uint8)},
    }
    return tensors, {"adapter_config.json": '{"r": 1}', "state.json": json.dumps({"step": step, "best_step": best_step, "salt": salt})}


def save(run, step, salt=0, keep=9, best_step=None, numbers=6):
    return checkpoint.save(run, step, *contents(step, salt, best_step, numbers), keep, best_step)


def names(run):
    """Everything in a run's checkpoints folder, hidden names too."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def holds(folder, step, salt=0, best_step=None, numbers=6):
    """True if the checkpoint is exactly what `save` was given."""
    found, (tensors, texts) = checkpoint.load(folder), contents(step, salt, best_step, numbers)
    same = all(torch.equal(found["tensors"][name][key], tensors[name][key]) for name in tensors for key in tensors[name])
    return found["step"] == step and found["texts"] == texts and same


def reseal(folder, step=500):
    """A manifest that agrees with whatever lies in the folder: what somebody hostile would write."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
             for path in sorted(folder.iterdir()) if path.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"format": checkpoint.FORMAT, "step": step, "files": files}))


def in_child(action):
    """Run action() in a forked process: 0 if it returned, its own exit status, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the parent's worker threads do not exist here, and waiting for them would never end
            status = action() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# What comes back is what went in

def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path):
    flat = torch.randn(24)
    odd = {
        "nan.payload": torch.tensor([0x7FC12345, -0x80000000], dtype=torch.int32).view(torch.float32),  # a NaN with a message, and -0.0
        "transposed": torch.randn(3, 5).t(), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "view.a": flat[:12].view(3, 4), "view.b": flat[6:18], "tied": flat,
        **{str(dtype).removeprefix("torch."): torch.arange(4).to(dtype)
           for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64, torch.bool)},
    }
    tensors, texts = contents(500)
    found = checkpoint.load(checkpoint.save(tmp_path, 500, {**tensors, "optimizer.safetensors": odd},
                                            {**texts, "chat_template.jinja": "{{ 'é' }}\r\n"}, 1))
    back = found["tensors"]["optimizer.safetensors"]
    assert back.keys() == odd.keys() and found["texts"]["chat_template.jinja"] == "{{ 'é' }}\r\n" and found["state"]["step"] == 500
    for name, tensor in odd.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        stored, given = (value.detach().contiguous().flatten().view(torch.uint8).tolist() for value in (back[name], tensor))
        assert stored == given, name


def test_peft_loads_a_checkpoint_folder_and_gives_the_same_logits(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    shape = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     num_key_value_heads=2)
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(shape).eval()
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "peft")
    tensors, texts = contents(500)
    tensors["adapter_model.safetensors"] = peft.get_peft_model_state_dict(model)
    texts["adapter_config.json"] = (tmp_path / "peft" / "adapter_config.json").read_text()
    folder = checkpoint.save(tmp_path / "run", 500, tensors, texts, 1)
    fresh = transformers.LlamaForCausalLM(shape)
    fresh.load_state_dict(weights)
    assert torch.equal(peft.PeftModel.from_pretrained(fresh, folder).eval()(ids).logits, expected)
    assert checkpoint.find(tmp_path / "peft") == tmp_path / "peft"
    plain = checkpoint.load(tmp_path / "peft")
    assert plain["step"] is None and plain["state"] == {}
    assert plain["tensors"]["adapter_model.safetensors"].keys() == tensors["adapter_model.safetensors"].keys()


def test_what_could_not_be_loaded_again_gets_no_name_and_is_written_nowhere_else(tmp_path):
    tensors, texts = contents(500)
    bad = [({**tensors, "../x.safetensors": {}}, texts, "cannot be a checkpoint's file"),
           (tensors, {**texts, "x.bin": ""}, "cannot be a checkpoint's file"),
           ({**tensors, "x.safetensors": {"../a": torch.ones(1)}}, texts, "cannot be a tensor's name"),
           (tensors, {**texts, "state.json": '{"step": 500, "best_loss": NaN}'}, "state.json: .*NaN is not a finite number"),
           (tensors, {**texts, "state.json": '{"step": 400}'}, "step 400 where"),
           (tensors, {"state.json": texts["state.json"]}, "needs adapter_config.json")]
    for some_tensors, some_texts, message in bad:
        with pytest.raises(ValueError, match=message):
            checkpoint.save(tmp_path, 500, some_tensors, some_texts, 1)
        assert {path.name for path in tmp_path.rglob("*.safetensors") if ".tmp-" not in path.parent.name} == set()
        assert not (tmp_path / "checkpoints" / "step-000500").exists()


# Killed

CALLS = ("mkdir", "write", "fsync", "rename", "unlink", "rmdir")


def kill_at(number, after):
    """In this process, let the number-th call that changes the disk be the last: killed before it, or just after (a write: half-way)."""
    seen = [0]

    def dying(call):
        original = getattr(os, call)

        def wrapper(*args, **kwargs):
            seen[0] += 1
            if seen[0] < number:
                return original(*args, **kwargs)
            if after and call == "write":
                args = (args[0], args[1][:len(args[1]) // 2])
            if after:
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return wrapper
    for call in CALLS:
        setattr(os, call, dying(call))


def before_first(run):
    run.mkdir()
    return 100, dict(keep=1)


def before_retention(run):
    for step in (100, 200, 300):
        save(run, step, best_step=100)
    return 400, dict(keep=1, best_step=100)


def before_replacing(run):
    save(run, 100)
    save(run, 200)
    return 200, dict(salt=1, keep=2)


def before_replacing_a_damaged_one(run):
    save(run, 100)
    os.truncate(save(run, 200) / "optimizer.safetensors", 20)
    return 200, dict(salt=1, keep=2)


def before_going_back(run):
    for step in (100, 200, 300):
        save(run, step)
    return 150, dict(keep=2)


@pytest.mark.parametrize("prepare", [before_first, before_retention, before_replacing, before_replacing_a_damaged_one, before_going_back])
@pytest.mark.parametrize("after", [False, True])
def test_a_save_killed_at_any_call_leaves_only_checkpoints_that_verify(tmp_path, prepare, after):
    start = tmp_path / "start"
    step, how = prepare(start)
    damaged = prepare is before_replacing_a_damaged_one
    earlier = [(100, 0), (200, 0), (300, 0)]
    for number in range(1, 1000):
        run = tmp_path / "run"
        shutil.copytree(start, run)
        status = in_child(lambda: (kill_at(number, after), save(run, step, **how))[0])
        if status == 0:
            break
        assert status == -signal.SIGKILL
        there = (run / "checkpoints").glob("step-*") if (run / "checkpoints").exists() else ()
        visible = [path for path in there if not path.name.endswith(".stale")]
        for path in visible:
            if not (damaged and path.name == "step-000200" and (path / "optimizer.safetensors").stat().st_size == 20):
                checkpoint.verify(path)
        if prepare is before_first and not visible:
            with pytest.raises(ValueError, match="no valid checkpoint|no such folder"):
                checkpoint.newest_valid(run)
        else:
            newest, problems = checkpoint.newest_valid(run)
            found = checkpoint.load(newest)["state"]
            candidates = [(step, how.get("salt", 0))] + (earlier if prepare is not before_first else [])
            if prepare is not before_going_back:  # never further back than before the save
                lowest = {before_first: 100, before_retention: 300, before_replacing: 200}.get(prepare, 100)
                candidates = [pair for pair in candidates if pair[0] >= lowest]
            assert (found["step"], found["salt"]) in candidates
            assert holds(newest, found["step"], found["salt"], found["best_step"])
            if how.get("best_step"):
                assert checkpoint.find(f"{run}@best").name == "step-000100"
            assert bool(problems) == (damaged and found["step"] == 100 and (run / "checkpoints" / "step-000200").exists())
        save(run, step + 1, **how)
        assert not [name for name in names(run) if not re.fullmatch(r"step-\d{6}(\.stale)?", name)], "leftovers were not swept"
        assert checkpoint.newest_valid(run)[0].name == f"step-{step + 1:06d}"
        shutil.rmtree(run)
    assert status == 0 and number > 15
    assert holds(checkpoint.newest_valid(run)[0], step, how.get("salt", 0), how.get("best_step"))


def test_files_and_folders_are_flushed_before_the_rename_and_the_rename_before_anything_is_deleted(tmp_path, monkeypatch):
    for step in (100, 200):
        save(tmp_path, step)
    events = []

    def recorded(call):
        original = getattr(os, call)

        def wrapper(first, *rest, **kwargs):
            path = os.readlink(f"/proc/self/fd/{first}") if call in ("write", "fsync") else str(first)
            events.append((call, path, *map(str, rest)) if call != "write" else (call, path))
            return original(first, *rest, **kwargs)
        monkeypatch.setattr(os, call, wrapper)
    for call in ("write", "fsync", "rename", "unlink", "rmdir"):
        recorded(call)
    save(tmp_path, 300, keep=1)
    folder = tmp_path / "checkpoints"
    temporary, final = folder / ".tmp-step-000300", folder / "step-000300"
    named = events.index(("rename", str(temporary), str(final)))
    for name in FILES:
        last_write = max(i for i, event in enumerate(events) if event == ("write", str(temporary / name)))
        assert last_write < events.index(("fsync", str(temporary / name))) < events.index(("fsync", str(temporary))) < named, name
    assert max(i for i, event in enumerate(events) if event[0] == "write") == events.index(("write", str(temporary / "manifest.json")))
    durable = events.index(("fsync", str(folder)), named)
    for parent in (tmp_path, tmp_path.parent):
        assert ("fsync", str(parent)) in events[named:]
    deleting = [i for i, event in enumerate(events) if event[0] in ("unlink", "rmdir", "rename") and i != named]
    assert deleting and min(deleting) > durable and names(tmp_path) == ["step-000300"]


def test_leftovers_of_killed_saves_are_swept_and_never_taken_for_checkpoints(tmp_path):
    save(tmp_path, 500)
    shutil.copytree(tmp_path / "checkpoints" / "step-000500", tmp_path / "checkpoints" / ".tmp-step-009000")
    (tmp_path / "checkpoints" / ".tmp-link").symlink_to(tmp_path)
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert checkpoint.newest_valid(tmp_path)[0].name == "step-000500"
    save(tmp_path, 600)
    assert names(tmp_path) == ["notes", "step-000500", "step-000600"] and tmp_path.is_dir()


# A disk that lies, or is full

def test_a_disk_that_stores_something_else_is_found_out_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    save(tmp_path, 400)
    write = os.write
    flip = lambda data: bytes(data[:-1]) + bytes([data[-1] ^ 1])
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, flip(data) if "optimizer" in os.readlink(f"/proc/self/fd/{fd}") else data))
    with pytest.raises(ValueError, match="optimizer.safetensors: changed"):
        save(tmp_path, 500)
    monkeypatch.undo()
    serialise = safetensors.torch.save
    wrong = lambda group, metadata: serialise({name: value + 1 if "lora_B" in name else value for name, value in group.items()}, metadata)
    monkeypatch.setattr(safetensors.torch, "save", wrong)
    with pytest.raises(ValueError, match="adapter_model.safetensors: read back"):
        save(tmp_path, 500)
    assert checkpoint.newest_valid(tmp_path) == (tmp_path / "checkpoints" / "step-000400", [])


def expect_refused_save(run, step, code, numbers):
    try:
        save(run, step, numbers=numbers)
    except OSError as error:
        assert error.errno == code, error
        assert re.search(r"needs \d+\.\d MiB, \d+\.\d MiB are free", str(error)), error
        assert float(re.search(r"needs (\d+\.\d)", str(error))[1]) >= 12 * numbers / 2**20 - 0.1, error
        return
    raise AssertionError("the save went through")


def test_a_full_or_read_only_disk_leaves_older_checkpoints_intact_and_tells_the_space_needed(tmp_path):
    def on_a_small_disk():
        libc, owner = ctypes.CDLL(None, use_errno=True), os.getuid()
        new_mounts, new_user, private, read_only, remount = 0x20000, 0x10000000, 0x44000, 1, 32
        if libc.unshare(new_mounts | (new_user if owner else 0)):
            return 77
        if owner:
            pathlib.Path("/proc/self/uid_map").write_text(f"0 {owner} 1")
        disk = str(tmp_path).encode()
        if libc.mount(b"none", b"/", None, private, None) or libc.mount(b"tmpfs", disk, b"tmpfs", 0, b"size=1m"):
            return 77
        run = tmp_path / "run"
        save(run, 100, numbers=20_000)  # 240 kB
        save(run, 200, numbers=20_000)
        for _ in range(2):  # the second time would fail otherwise if the first left its half behind
            expect_refused_save(run, 300, errno.ENOSPC, 60_000)
            assert names(run) == ["step-000100", "step-000200"] and checkpoint.newest_valid(run)[1] == []
        assert holds(save(run, 300, keep=1, numbers=20_000), 300, numbers=20_000) and names(run) == ["step-000300"]
        assert libc.mount(b"tmpfs", disk, b"tmpfs", read_only | remount, None) == 0
        expect_refused_save(run, 400, errno.EROFS, 10)
        assert names(run) == ["step-000300"] and checkpoint.newest_valid(run)[1] == []
    status = in_child(on_a_small_disk)
    if status == 77:
        pytest.skip("a small file system cannot be mounted here")
    assert status == 0


def test_a_file_size_limit_leaves_older_checkpoints_intact_and_tells_the_space_needed(tmp_path):
    save(tmp_path, 100)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        expect_refused_save(tmp_path, 200, errno.EFBIG, 60_000)
    assert in_child(limited) == 0
    assert names(tmp_path) == ["step-000100"] and holds(tmp_path / "checkpoints" / "step-000100", 100)


# Damaged

def refused(folder, message):
    """verify and load both refuse, with `message`."""
    for read in (checkpoint.verify, checkpoint.load):
        with pytest.raises(ValueError, match=message):
            read(folder)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_file_is_found_and_the_one_before_is_used(tmp_path, name):
    save(tmp_path, 400)
    folder = save(tmp_path, 500)
    path = folder / name
    good = path.read_bytes()
    places = range(0, 8 * len(good), 9) if name == "manifest.json" else (0, 8 * len(good) // 2, 8 * len(good) - 1)
    for place in places:
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=re.escape(str(folder))):
            checkpoint.verify(folder)
    refused(folder, name if name != "manifest.json" else re.escape(str(folder)))
    newest, problems = checkpoint.newest_valid(tmp_path)
    assert newest.name == "step-000400" and len(problems) == 1 and str(folder) in problems[0]
    path.write_bytes(good)
    assert checkpoint.newest_valid(tmp_path) == (folder, [])


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_named_and_the_one_before_is_used(tmp_path, name, capsys):
    save(tmp_path, 400)
    folder = save(tmp_path, 500)
    os.truncate(folder / name, (folder / name).stat().st_size - 1)
    refused(folder, name)
    (folder / name).unlink()
    refused(folder, f"{name}: missing")
    newest, problems = checkpoint.newest_valid(tmp_path)
    assert newest.name == "step-000400" and len(problems) == 1 and name in problems[0]
    assert checkpoint.find(tmp_path) == newest and name in capsys.readouterr().err
    os.truncate(newest / "state.json", 0)
    with pytest.raises(ValueError, match=rf"no valid checkpoint\n.*500/{name}.*\n.*400/state.json"):
        checkpoint.newest_valid(tmp_path)


def test_a_disk_block_that_cannot_be_read_damages_one_checkpoint_and_not_the_resume(tmp_path, monkeypatch):
    for step in (400, 500):
        save(tmp_path, step)
    digest = hashlib.file_digest

    def unreadable(file, kind):
        if "step-000500/optimizer" in str(file.name):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file.name))
        return digest(file, kind)
    monkeypatch.setattr(hashlib, "file_digest", unreadable)
    newest, problems = checkpoint.newest_valid(tmp_path)
    assert newest.name == "step-000400" and len(problems) == 1 and "step-000500/optimizer.safetensors" in problems[0]


def test_an_extra_file_a_folder_a_link_and_a_pipe_are_refused(tmp_path):
    folder = save(tmp_path, 500)
    (folder / "adapter_model.bin").write_bytes(b"")
    refused(folder, "adapter_model.bin: an extra file")
    (folder / "adapter_model.bin").unlink()
    (folder / "extra").mkdir()
    refused(folder, "extra: not an ordinary file")
    (folder / "extra").rmdir()
    for name in ("state.json", "manifest.json"):
        os.rename(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        refused(folder, f"{name}: not an ordinary file")
        (folder / name).unlink()
        os.mkfifo(folder / name)  # opening it would wait for ever
        refused(folder, f"{name}: not an ordinary file")
        (folder / name).unlink()
        os.rename(tmp_path / name, folder / name)
    checkpoint.verify(folder)


def test_a_run_without_checkpoints_is_an_error_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="--resume"):
        checkpoint.newest_valid(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="there is no checkpoint in it"):
        checkpoint.newest_valid(tmp_path)
    (tmp_path / "checkpoints" / "step-000500").symlink_to(save(tmp_path / "other", 500))
    with pytest.raises(ValueError, match="there is no checkpoint in it"):
        checkpoint.newest_valid(tmp_path)


def test_verifying_a_large_file_takes_little_memory(tmp_path):
    folder = save(tmp_path, 500, numbers=4 << 20)  # 16 MiB a tensor
    tracemalloc.start()
    checkpoint.verify(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


# Kept and deleted

@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_and_the_best_are_kept_and_nothing_else(tmp_path, keep):
    steps = list(range(100, 700, 100))
    for count, step in enumerate(steps, start=1):
        save(tmp_path, step, keep=keep, best_step=100)
        expected = sorted({100, *steps[:count][-keep:]})
        assert names(tmp_path) == [f"step-{step:06d}" for step in expected]
    assert holds(tmp_path / "checkpoints" / "step-000100", 100, best_step=100)
    save(tmp_path, 700, keep=keep, best_step=700)
    assert f"step-{100:06d}" not in names(tmp_path) and len(names(tmp_path)) == keep


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_higher_steps_of_a_past_that_the_run_left_are_set_aside_and_cost_no_other_checkpoint(tmp_path, keep):
    for step in (100, 200, 300, 400):
        save(tmp_path, step, best_step=100)
    save(tmp_path, 250, keep=keep, best_step=100)
    expected = {1: (100, 250), 2: (100, 200, 250), 3: (100, 200, 250)}[keep]
    assert names(tmp_path) == sorted([f"step-{step:06d}" for step in expected] + ["step-000300.stale", "step-000400.stale"])
    assert checkpoint.newest_valid(tmp_path) == (tmp_path / "checkpoints" / "step-000250", [])
    assert holds(tmp_path / "checkpoints" / "step-000400.stale", 400, best_step=100)
    save(tmp_path, 300, salt=1, best_step=100)
    save(tmp_path, 250, salt=1, best_step=100)
    assert holds(tmp_path / "checkpoints" / "step-000300.stale", 300, salt=1, best_step=100), "of two pasts the later one is kept"


def test_a_step_saved_again_is_kept_if_equal_and_replaced_if_not(tmp_path):
    folder = save(tmp_path, 500)
    inode = folder.stat().st_ino
    assert save(tmp_path, 500) == folder and folder.stat().st_ino == inode and names(tmp_path) == [folder.name]
    assert save(tmp_path, 500, salt=1) == folder and holds(folder, 500, salt=1) and names(tmp_path) == [folder.name]
    os.truncate(folder / "state.json", 3)
    assert save(tmp_path, 500, salt=1) == folder and holds(folder, 500, salt=1) and names(tmp_path) == [folder.name]


# Hostile

def edit_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [
    "../outside.json", "/etc/outside.json", "..", "a/../../outside.json", "a..json", ".hidden.json", "x\0.json", "é.json", "x.json\n",
    "state.pt", "state.bin", "state.pkl", "manifest.json", "a" * 200 + ".json", ""])
def test_a_manifest_cannot_name_files_elsewhere_or_pickles(tmp_path, name):
    folder = save(tmp_path, 500)
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: manifest["files"]["state.json"]}))
    refused(folder, "manifest.json: .*cannot be a checkpoint's file")


@pytest.mark.parametrize("change, message", [
    (lambda m: m.update(step=True), "step True"), (lambda m: m.update(step=-1), "step -1"), (lambda m: m.update(step=501), "step 501"),
    (lambda m: m.update(format="other"), "must hold format"), (lambda m: m.update(extra=1), "must hold format"),
    (lambda m: m.pop("step"), "must hold format"), (lambda m: m.update(files=[]), "files must be an object"),
    (lambda m: m["files"].update({"state.json": None}), "must have its bytes and sha256"),
    (lambda m: m["files"]["state.json"].update(bytes="9"), "must have its bytes and sha256"),
    (lambda m: m["files"]["state.json"].update(sha256="0"), "must have its bytes and sha256"),
    (lambda m: m["files"]["state.json"].update(bytes=10**18), "bytes where the manifest says"),
    (lambda m: m["files"].pop("state.json"), "state.json is not listed")])
def test_a_manifest_of_the_wrong_shape_is_refused(tmp_path, change, message):
    folder = save(tmp_path, 500)
    edit_manifest(folder, change)
    refused(folder, message)
    if message in ("step True", "step -1"):  # under a name that says nothing about the step too
        refused(folder.rename(tmp_path / "copy"), message)


@pytest.mark.parametrize("text, message", [
    ('{"format": 1, "format": 2}', "'format' stands twice"), ('{"step": NaN}', "NaN is not a finite number"),
    ('{"step": -Infinity}', "not a finite number"), ('{"step": 1e999}', "1e999 is not a finite number"),
    ("[" * 100_000, "not valid JSON"), ("[]", "must hold a JSON object"), ("\udcff", "not valid JSON"),
    ('{"step": ' + "9" * 10_000 + "}", "not valid JSON"), (" " * (2 << 20) + "{}", "larger than")])
def test_json_that_strict_readers_disagree_about_is_refused(tmp_path, text, message):
    folder = save(tmp_path, 500)
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, f"manifest.json: {message}" if message == "larger than" else message)


def test_a_state_of_another_step_or_not_text_is_refused_though_its_hash_is_right(tmp_path):
    folder = save(tmp_path, 500)
    for data, message in ((b'{"step": 499}', "step 499 where the manifest says 500"), (b'{"step": 500, "step": 500}', "stands twice"),
                          (b"\xff", "not UTF-8")):
        (folder / "state.json").write_bytes(data)
        reseal(folder)
        with pytest.raises(ValueError, match=f"state.json: .*{message}"):
            checkpoint.load(folder)


def test_a_text_of_enormous_size_is_refused_before_it_is_read(tmp_path):
    folder = save(tmp_path, 500)
    os.truncate(folder / "adapter_config.json", checkpoint.LARGEST_TEXT + 1)
    reseal(folder)
    tracemalloc.start()
    with pytest.raises(ValueError, match="adapter_config.json: larger than"):
        checkpoint.load(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def header(text, body=b"", length=None):
    data = text.encode() if isinstance(text, str) else text
    return (len(data) if length is None else length).to_bytes(8, "little") + data + body


ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize("data, message", [
    (header("{}", length=1 << 60), "header claims"), (header("{}", length=100), "header claims"),
    (header(" " * (33 << 20) + "{}"), "header claims"), (b"\x00\x00", "header claims"),
    (header(f'{{"a":{ONE},"a":{ONE}}}', bytes(4)), "'a' stands twice"), (header("[" * 100_000), "not valid JSON"),
    (header("[]"), "JSON object"), (header(b"\xff{}"), "not valid JSON"),
    (header(f'{{"../../a":{ONE}}}', bytes(4)), "cannot be a tensor's name"),
    (header(f'{{"/a":{ONE}}}', bytes(4)), "cannot be a tensor's name"),
    (header(f'{{"a..b":{ONE}}}', bytes(4)), "cannot be a tensor's name"),
    (header(f'{{"a":{ONE}}}', bytes(3)), "not a valid safetensors"), (header(f'{{"a":{ONE}}}', bytes(5)), "not a valid safetensors"),
    (header(f'{{"a":{ONE},"b":{ONE}}}', bytes(4)), "not a valid safetensors"),
    (header('{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}', bytes(4)), "not a valid safetensors"),
    (header('{"a":{"dtype":"OBJECT","shape":[1],"data_offsets":[0,4]}}', bytes(4)), "not a valid safetensors"),
    (header('{"a":7}'), "not a valid safetensors")])
def test_a_hostile_tensor_file_is_refused_though_its_hash_is_right(tmp_path, data, message):
    folder = save(tmp_path, 500)
    (folder / "optimizer.safetensors").write_bytes(data)
    reseal(folder)
    checkpoint.verify(folder)
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"optimizer.safetensors: .*{message}"):
        checkpoint.load(folder)
    assert time.monotonic() - start < 5


class Bomb:
    """Unpickling one creates the file that it names."""
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def test_pickles_are_never_opened_wherever_they_lie(tmp_path):
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary))
    pickle.loads(bomb).close()
    assert canary.exists(), "the bomb works"
    canary.unlink()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.bin").write_bytes(bomb)
    with pytest.raises(ValueError, match="save_pretrained"):
        checkpoint.find(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(bomb)
    with pytest.raises(ValueError, match="not a safetensors file"):
        checkpoint.load(checkpoint.find(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    os.mkfifo(adapter / "adapter_model.safetensors")  # opening it would wait for ever
    with pytest.raises(ValueError, match="adapter_model.safetensors: not an ordinary file"):
        checkpoint.load(adapter)
    folder = save(tmp_path / "run", 500)
    (folder / "optimizer.pt").write_bytes(bomb)
    reseal(folder)
    refused(folder, "cannot be a checkpoint's file")
    assert not canary.exists()


# Found

def test_find_takes_a_run_its_best_a_step_a_checkpoint_or_an_adapter_folder(tmp_path, capsys):
    run = tmp_path / "mail@home"
    for step in (100, 200, 300):
        save(run, step, best_step=100)
    checkpoints = run / "checkpoints"
    assert checkpoint.find(run) == checkpoints / "step-000300"
    assert checkpoint.find(str(checkpoints / "step-000100")) == checkpoints / "step-000100"
    assert checkpoint.find(f"{run}@best") == checkpoints / "step-000100"
    assert checkpoint.find(f"{run}@step-000200") == checkpoints / "step-000200"
    assert capsys.readouterr().err == ""
    for bad, message in ((f"{run}@step-000999", "there are step-000300, step-000200, step-000100"),
                         (f"{run}@../x", "no checkpoint"), (tmp_path / "none", "not a run folder"),
                         (tmp_path, "not a run folder"), (f"{tmp_path}@best", "not a run folder")):
        with pytest.raises(ValueError, match=message):
            checkpoint.find(bad)
    shutil.rmtree(checkpoints / "step-000100")
    with pytest.raises(ValueError, match="no checkpoint step-000100"):
        checkpoint.find(f"{run}@best")
    os.truncate(checkpoints / "step-000200" / "optimizer.safetensors", 9)
    for damaged in (f"{run}@step-000200", checkpoints / "step-000200"):
        with pytest.raises(ValueError, match="optimizer.safetensors"):
            checkpoint.find(damaged)
    save(tmp_path / "other", 100)
    with pytest.raises(ValueError, match="names no best_step"):
        checkpoint.find(f"{tmp_path / 'other'}@best")


def test_a_checkpoint_that_lost_its_manifest_does_not_pass_for_a_plain_adapter(tmp_path):
    folder = save(tmp_path, 500)
    (folder / "manifest.json").unlink()
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("state.json", "optimizer.safetensors"):
        (folder / name).unlink()
    for path in (folder, copy):
        for read in (checkpoint.find, checkpoint.load):
            with pytest.raises(ValueError, match="manifest.json: missing"):
                read(path)


# Locked

def test_a_run_folder_is_held_by_one_process_until_it_dies(tmp_path):
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            held = checkpoint.lock(tmp_path / "run")
            os.write(write_end, b"x")
            time.sleep(60)
            held.close()
        finally:
            os._exit(1)
    try:
        os.close(write_end)
        assert os.read(read_end, 1) == b"x"
        with pytest.raises(ValueError, match=rf"pid {pid}\b.*--out"):
            checkpoint.lock(tmp_path / "run")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read_end)
    with checkpoint.lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()}\n"
    (tmp_path / "run" / ".lock").write_text("99999999999\n")
    with checkpoint.lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()}\n"
    checkpoint.lock(tmp_path / "run").close()


def test_nothing_in_checkpoint_can_unpickle():
    source = pathlib.Path(checkpoint.__file__).read_text()
    assert not re.search(r"(?<!safetensors\.)torch\.load", source) and not re.search(r"import .*pickle", source)
