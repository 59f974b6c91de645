"""How state survives: a checkpoint is either whole and proven, or not there at all.

    runs/NAME/.lock                          held by the one process that trains in this folder
    runs/NAME/checkpoints/step-000500/       adapter_model.safetensors and adapter_config.json (PEFT's own format),
                                             optimizer.safetensors, generators.safetensors, state.json, manifest.json;
                                             noise.safetensors where a pair of windows for the noise scale is half seen
    .../step-000500.old                      the one it replaces, for the moment between two renames
    .../step-002000.stale                    saved before the run went back to an earlier step; never read by itself
    .../.tmp-*                               what a killed save left behind; the next save sweeps it

The manifest holds the size and SHA-256 of every other file and is written last. All of it goes into a temporary folder,
is flushed to the disk, read back, compared, and only then renamed to its name; so a process killed anywhere leaves the
older checkpoints as they were. Deleting is the same thing backwards: first the name goes, then the files.

Whatever is read is distrusted: a checkpoint folder may have been cut, damaged, or made by someone else. Tensors come from
safetensors only; nothing is ever pickled or unpickled. Leaves out: what the tensors mean (train.py, model.py), and
checkpoints of several processes (one process saves; the trained state is the same in all of them).
"""
import errno
import fcntl
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import stat
import sys

import safetensors.torch
import torch

FORMAT = "rawlora checkpoint 1"
REQUIRED = ("adapter_model.safetensors", "adapter_config.json", "state.json")
SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".md")
CHUNK = 16 << 20  # bytes a write
LARGEST_MANIFEST, LARGEST_HEADER, LARGEST_TEXT = 1 << 20, 32 << 20, 64 << 20  # bytes; 36,000 tensors have a header of 6 MiB
FILE_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
TENSOR_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.:-]{0,511}")
CHECKPOINT_NAME = re.compile(r"step-([0-9]{6,12})(\.old)?")


# Reading: every check that stands between a file and the run

def _object(pairs):
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return dict(pairs)


def _finite(text):
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


def _json(data, path):
    """A JSON object from bytes or text: UTF-8, no key twice, no NaN or infinity, no bottomless nesting."""
    try:
        tree = json.loads(data, object_pairs_hook=_object, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(tree).__name__}")
    return tree


def _file_name(name, path):
    """Refuses names that could leave the folder or hold a pickle, in a manifest and before a save."""
    if not FILE_NAME.fullmatch(name) or not name.endswith(SUFFIXES) or name == "manifest.json":
        raise ValueError(f"{path}: {name!r} cannot be a checkpoint's file; "
                         f"names are letters, digits, '.', '_', '-' and end in {', '.join(SUFFIXES)}")


def _inventory(folder):
    """The manifest of a checkpoint whose files are all there, nothing else is, and each has the right size."""
    path = folder / "manifest.json"
    if not os.path.lexists(path):
        raise ValueError(f"{path}: missing; without it nothing tells whether the checkpoint is whole")
    found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    for name, status in found.items():
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{folder / name}: not an ordinary file; a checkpoint holds no links, folders or devices")
    if found.pop("manifest.json").st_size > LARGEST_MANIFEST:
        raise ValueError(f"{path}: larger than {LARGEST_MANIFEST} bytes, which no manifest is")
    manifest = _json(path.read_bytes(), path)
    if set(manifest) != {"format", "step", "files"} or manifest["format"] != FORMAT:
        raise ValueError(f"{path}: must hold format ({FORMAT!r}), step and files, got {str(manifest)[:200]}")
    step, files, named = manifest["step"], manifest["files"], CHECKPOINT_NAME.match(folder.name)
    if type(step) is not int or step < 0 or named and step != int(named[1]):
        raise ValueError(f"{path}: step {step!r} is not that of the folder")
    if not isinstance(files, dict):
        raise ValueError(f"{path}: files must be an object, got {type(files).__name__}")
    for name, entry in files.items():
        _file_name(name, path)
        if (not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"} or type(entry["bytes"]) is not int
                or not re.fullmatch("[0-9a-f]{64}", str(entry["sha256"]))):
            raise ValueError(f"{path}: {name} must have its bytes and sha256, got {str(entry)[:200]}")
        if name not in found:
            raise ValueError(f"{folder / name}: missing")
        if found[name].st_size != entry["bytes"]:
            raise ValueError(f"{folder / name}: {found[name].st_size} bytes where the manifest says {entry['bytes']}; truncated or changed")
    for name in REQUIRED:
        if name not in files:
            raise ValueError(f"{path}: {name} is not listed")
    for name in found:
        if name not in files:
            raise ValueError(f"{folder / name}: an extra file that the manifest does not know; move it elsewhere")
    return manifest


def verify(folder):
    """Prove that a checkpoint folder is what was saved, reading its files in small pieces. Returns the manifest.

    Raises ValueError naming the file that is missing, truncated, changed, extra, a link, or not allowed by its name.
    """
    folder = pathlib.Path(folder)
    manifest = _inventory(folder)
    for name, entry in manifest["files"].items():
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise ValueError(f"{folder / name}: changed since it was saved (its SHA-256 is not the manifest's)")
    return manifest


def _tensors(data, path):
    """{name: CPU tensor} from the bytes of a safetensors file, after checking the header that the library would trust."""
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, LARGEST_HEADER):
        raise ValueError(f"{path}: not a safetensors file (its header claims {length} bytes; "
                         f"at most {LARGEST_HEADER}, and what the file has, are read)")
    for name in _json(data[8:8 + length], path):
        if name != "__metadata__" and not TENSOR_NAME.fullmatch(name):
            raise ValueError(f"{path}: {name[:100]!r} cannot be a tensor's name; they are letters, digits, '_', '.', ':' and '-'")
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise ValueError(f"{path}: not a valid safetensors file ({error})") from None


def load(path):
    """A verified checkpoint as plain things.

    Returns {"step": int, "state": dict of state.json, "tensors": {file: {name: CPU tensor}}, "texts": {file: str}}.
    The bytes that are hashed are the bytes that are parsed. A folder in PEFT's format that is no checkpoint of ours gives
    step None, an empty state, and the adapter's two files. Raises ValueError naming the file and what is wrong with it.
    """
    folder = pathlib.Path(path)
    manifest = _inventory(folder) if not _is_plain_adapter(folder) else {"step": None, "files": {name: None for name in REQUIRED[:2]}}
    tensors, texts = {}, {}
    for name, entry in manifest["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: not an ordinary file")
        if not name.endswith(".safetensors") and (folder / name).stat().st_size > LARGEST_TEXT:
            raise ValueError(f"{folder / name}: larger than {LARGEST_TEXT} bytes")
        data = (folder / name).read_bytes()
        if entry and hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"{folder / name}: changed since it was saved (its SHA-256 is not the manifest's)")
        if name.endswith(".safetensors"):
            tensors[name] = _tensors(data, folder / name)
            continue
        try:
            texts[name] = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / name}: not UTF-8 text ({error})") from None
    state = _json(texts["state.json"], folder / "state.json") if "state.json" in texts else {}
    if manifest["step"] != state.get("step"):
        raise ValueError(f"{folder / 'state.json'}: step {state.get('step')!r} where the manifest says {manifest['step']}")
    return {"step": manifest["step"], "state": state, "tensors": tensors, "texts": texts}


# Finding

def _checkpoints(folder):
    """[(step, path)] of what is visible as a checkpoint, newest first. Links are hints for people and never followed."""
    found = [(CHECKPOINT_NAME.fullmatch(path.name), path) for path in folder.iterdir() if not path.is_symlink()]
    return sorted(((int(name[1]), path) for name, path in found if name), key=lambda pair: (pair[0], not pair[1].suffix), reverse=True)


def newest_valid(run_folder):
    """(path, problems): the newest checkpoint of a run that verifies, and a line for each newer one that does not.

    Raises ValueError if there is none: a run that has lost its checkpoints never starts afresh by itself.
    """
    folder = pathlib.Path(run_folder) / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, so there is nothing to go on from; "
                         "start the run without --resume, or name its folder with --out")
    problems = []
    for _, path in _checkpoints(folder):
        try:
            verify(path)
        except (ValueError, OSError) as error:  # an unreadable disk block is one more way for a checkpoint to be damaged
            problems.append(str(error))
        else:
            return path, problems
    found = "\n".join("  " + problem for problem in problems) or "  there is no checkpoint in it"
    raise ValueError(f"{folder}: no valid checkpoint\n{found}\n"
                     "restore one of them from a copy, or start again in another folder with --out")


def _is_plain_adapter(folder):
    """True for an adapter folder by PEFT, False for a checkpoint, even one that has lost its manifest."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    ours = names & {"manifest.json", "state.json", "optimizer.safetensors"}
    return "adapter_config.json" in names and not ours and not CHECKPOINT_NAME.match(folder.name)


def find(path):
    """The folder that holds the adapter: of a run (its newest valid checkpoint), a checkpoint, or an adapter in PEFT's format.

    RUN@best is the checkpoint that the run's newest one names as best_step, RUN@step-000500 that one. Newer checkpoints
    that do not verify are named on stderr. Raises ValueError with the remedy.
    """
    folder, name = pathlib.Path(path), ""
    if not folder.exists() and "@" in str(path):
        before, _, name = str(path).rpartition("@")
        folder = pathlib.Path(before)
    if (folder / "checkpoints").is_dir():
        if not name or name == "best":
            newest, problems = newest_valid(folder)
            for problem in problems:
                print(f"warning: passed over a damaged checkpoint: {problem}", file=sys.stderr)
        if not name:
            return newest
        if name == "best":
            best_step = _json((newest / "state.json").read_bytes(), newest / "state.json").get("best_step")
            if type(best_step) is not int:
                raise ValueError(f"{path}: {newest.name} names no best_step (it is {best_step!r}); use {folder}")
            name = f"step-{best_step:06d}"
        there = [path.name for _, path in _checkpoints(folder / "checkpoints")]
        if name not in there:
            raise ValueError(f"{path}: no checkpoint {name} in {folder}; there are {', '.join(there) or 'none'}")
        verify(folder / "checkpoints" / name)
        return folder / "checkpoints" / name
    if name or not any((folder / known).exists() for known in ("manifest.json", *REQUIRED)):
        raise ValueError(f"{path}: not a run folder, a checkpoint folder or an adapter folder; "
                         "give runs/NAME, runs/NAME@best or runs/NAME@step-000500")
    if not _is_plain_adapter(folder):
        verify(folder)
    elif not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{folder}: no adapter_model.safetensors; pickled adapters are not read: "
                         "save it again with PEFT's save_pretrained")
    return folder


# Writing

def _sync(folder):
    """Flush a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path, data):
    """Write and flush a new file. Returns its line of the manifest, computed from what should have been written."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest[:CHUNK]):]
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):  # so that reading back asks the disk, not the memory it was written from
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _same(a, b):
    """Equal in dtype, shape and every bit: NaN equals NaN, and 0.0 is not -0.0."""
    bits = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def _write_all(folder, step, tensors, texts):
    """Every file of a checkpoint into `folder`, the manifest last; flushed, read back and compared with what was given."""
    folder.mkdir()
    files = {}
    for name, group in tensors.items():  # cloned: safetensors refuses tensors that share memory, such as views of one flat buffer
        group = {key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for key, value in group.items()}
        files[name] = _write(folder / name, safetensors.torch.save(group, metadata={"format": "pt"}))
    for name, text in texts.items():
        files[name] = _write(folder / name, text.encode("utf-8"))
    manifest = {"format": FORMAT, "step": step, "files": files}
    _write(folder / "manifest.json", json.dumps(manifest, indent=1).encode("utf-8"))
    _sync(folder)
    back = load(folder)  # the hashes prove what the disk holds, this proves that what went into the files is what was given
    for name, group in tensors.items():
        found = back["tensors"][name]
        if found.keys() != group.keys() or not all(_same(value, found[key]) for key, value in group.items()):
            raise ValueError(f"{folder / name}: read back, its tensors are not what was saved")
    if back["texts"] != texts:
        raise ValueError(f"{folder}: read back, its texts are not what was saved")
    return manifest


def _delete(path):
    """Take away the name in one rename, then the files: a half-deleted folder is never visible as a checkpoint."""
    if not path.name.startswith(".tmp-"):
        hidden = path.with_name(f".tmp-deleted-{path.name}")
        os.rename(path, hidden)
        path = hidden
    path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


def _sweep(folder):
    """Finish what killed saves left: their temporary folders go, and a checkpoint that was about to be replaced gets its name back."""
    for path in folder.iterdir():
        if path.name.startswith(".tmp-") or path.suffix == ".old" and path.with_suffix("").exists():
            _delete(path)
        elif path.suffix == ".old":
            os.rename(path, path.with_suffix(""))


def _publish(temporary, final, manifest):
    """Rename a proven temporary folder to its name. At every moment the old or the new one of that step is there."""
    old = final.with_name(final.name + ".old")
    if os.path.lexists(final):
        try:
            same = not final.is_symlink() and verify(final) == manifest
        except (ValueError, OSError):
            _delete(final)  # damaged: the new one takes its place
        else:
            if same:
                return _delete(temporary)
            os.rename(final, old)
    os.rename(temporary, final)
    for folder in final.absolute().parents[:3]:  # checkpoints, the run folder and the folder of runs: each may have a new name in it
        _sync(folder)
    if old.exists():
        _delete(old)


def _set_aside(folder, step):
    """Rename checkpoints above `step`, before the new one gets its name: a kill in between leaves the one that the run went back to."""
    for other, path in _checkpoints(folder):
        if other > step:
            stale = path.with_name(f"step-{other:06d}.stale")
            if os.path.lexists(stale):
                _delete(stale)
            os.rename(path, stale)


def _retain(folder, keep, best_step):
    """Delete what is neither among the newest `keep` checkpoints nor the best."""
    for number, (other, path) in enumerate(_checkpoints(folder)):
        if number >= keep and other != best_step:
            _delete(path)


def save(run_folder, step, tensors, texts, keep, best_step=None):
    """Save a checkpoint of `step` in run_folder/checkpoints; returns its folder once it is on the disk, proven and named.

    tensors: {"adapter_model.safetensors": {name: tensor}, …}, any device, dtype and layout, copied bit for bit.
    texts: {"adapter_config.json": str, "state.json": str, …}; state.json is an object without NaN, its "step" equal to `step`.
    Afterwards the newest `keep` steps and best_step stay, and nothing goes before the new one is durable. A step saved
    again is kept if nothing differs, else replaced. Steps above `step` belong to a past that the run has left (it went on
    from an earlier checkpoint): they are set aside as step-….stale, neither read nor deleted. The caller holds lock().
    Raises ValueError for names or texts that could not be loaded again, OSError with the space needed when the disk is full.
    """
    assert step >= 0 and keep >= 1 and (best_step is None or best_step <= step), (step, keep, best_step)
    folder = pathlib.Path(run_folder) / "checkpoints"
    final = folder / f"step-{step:06d}"
    for name in REQUIRED:
        if name not in tensors and name not in texts:
            raise ValueError(f"{final}: a checkpoint needs {name}")
    for name in (*tensors, *texts):
        _file_name(name, final)
        assert name.endswith(".safetensors") == (name in tensors), name
    needed = (sum(t.numel() * t.element_size() + 256 for group in tensors.values() for t in group.values())
              + sum(2 * len(t) for t in texts.values()) + 8192)
    temporary = folder / f".tmp-{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)  # before writing: leftovers may be what fills the disk
        manifest = _write_all(temporary, step, tensors, texts)
        _set_aside(folder, step)
        _publish(temporary, final, manifest)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)  # or the message would count its own leftovers as used
        free = shutil.disk_usage(next(parent for parent in folder.absolute().parents if parent.exists())).free
        raise OSError(error.errno, f"{final}: could not be saved ({os.strerror(error.errno or errno.EIO)}); "
                      f"it needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free; older checkpoints are untouched: "
                      "make room and run again with --resume") from error
    _retain(folder, keep, best_step)
    return final


def lock(run_folder):
    """Hold run_folder for this process until the returned file is closed or the process ends, however it ends.

    Raises ValueError naming the process that holds it. The file stays behind; only the lock on it means anything.
    """
    path = pathlib.Path(run_folder) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read(32).strip() or "unknown"
        file.close()
        raise ValueError(f"{run_folder}: another training process (pid {holder}) uses this run folder; "
                         "wait for it, stop it, or choose another with --out") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
