"""Token sets (and what the unquantised model made of one) on disk: found again by what shapes them, and never half there.

An entry is a folder named by a key, the SHA-256 of everything that shapes its content, the code that makes it included. It is
written under another name, synced and renamed, so it is whole or it is not there; writers of one key wait for each other at a
lock that the system releases when they die. An entry's files carry their SHA-256, which is compared at each use: one that is
damaged, or cannot be read for any other reason, is told, removed and made anew.
Tokens are Arrow streams of one batch (`datasets.Dataset.from_file` opens them), so that their arrays can be used where they lie.
Leaves out: what a key holds (data.py), and any limit on size: entries may be deleted at any time.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np

STALE_SECONDS = 24 * 3600  # what a killed writer left is swept after that
CODE = ("audit.py", "cache.py", "data.py", "sources.py", "tokens.py")  # makes entries: what other text of theirs made is not taken
_told = set()  # folders that could not be written, each told once


def sha256(path):
    """The SHA-256 of a file's content, hexadecimal; the file is never in memory whole."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code(names):
    """The SHA-256 of each of this project's files: call it as a module is imported, so that it is the code that runs."""
    return [sha256(pathlib.Path(__file__).parent / name) for name in names]


_code = code(CODE)


def folder(setting):
    """The folder that data.cache names, made if need be; None where it is off, or the default place cannot be written.

    Raises ValueError where a folder that was asked for cannot be written.
    """
    if setting == "off":
        return None
    path = pathlib.Path(setting).expanduser()
    if setting == "auto":
        path = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "rawlora"
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        if setting == "auto":
            if path not in _told:
                _told.add(path)
                print(f"warning: tokens are not kept: {path} cannot be written ({error.strerror}); data.cache=FOLDER names another place",
                      file=sys.stderr)
            return None
        raise ValueError(f"data.cache: {path} cannot be written ({error.strerror}); name another folder, or off") from None
    return path


def key(what):
    """The name of an entry: a digest of a JSON-ready description of all that shapes it, and of this code."""
    return hashlib.sha256(json.dumps([_code, what], sort_keys=True).encode()).hexdigest()[:32]


def entry(place, name, build, read):
    """read(folder) of entry `name`, which build(folder) writes where it is not there yet. place: a folder, or None: it is not kept.

    build returns the JSON-ready dict kept in meta.json. What read returns may map files, but must not need their names, which are
    gone by then where place is None. Raises what build raises, and leaves nothing then; ValueError where the disk is full.
    """
    if place is None:
        with tempfile.TemporaryDirectory(prefix="rawlora-") as temporary:
            path = pathlib.Path(temporary)
            _write_meta(path, build(path))
            return read(path)
    path = place / name
    if (found := _kept(path, read)) is not None:
        return found
    with _locked(place / f"{name}.lock"):
        if (found := _kept(path, read)) is not None:  # another process made it meanwhile
            return found
        _sweep(place)
        temporary = place / f"{name}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            _write_meta(temporary, build(temporary))
            os.rename(temporary, path)
            sync(place)
        except OSError as error:
            if error.filename and not pathlib.Path(os.fsdecode(error.filename)).is_relative_to(place):
                raise  # what build reads, not what it writes
            raise ValueError(f"data.cache: {place} cannot be written ({error.strerror or error}); make room, name another folder, "
                             "or off") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return read(path)


def meta(path):
    """What an entry's build returned."""
    return json.loads((path / "meta.json").read_text(encoding="utf-8"))["meta"]


@contextlib.contextmanager
def _locked(path):
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that makes the same ({path})", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_meta(path, what):
    files = {}
    for file in sorted(path.iterdir()):
        files[file.name] = [file.stat().st_size, sha256(file)]
        sync(file)
    content = {"files": files, "meta": what}
    (path / "meta.json").write_text(json.dumps(content | {"sha256": _sha256_of(content)}), encoding="utf-8")
    sync(path / "meta.json"), sync(path)


def _sha256_of(tree):
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def sync(path):
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _kept(path, read):
    """read(path) of an entry that is there with every file as it was written, or None; what cannot be read is told and removed."""
    if not path.is_dir():
        return None
    try:
        content = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        wrong = [name for name, (size, digest) in content["files"].items()
                 if (path / name).stat().st_size != size or sha256(path / name) != digest]
        wrong += ["meta.json"] * (content.pop("sha256") != _sha256_of(content))
        if not wrong:
            return read(path)
    except (OSError, LookupError, TypeError, ValueError) as error:
        wrong = [f"{type(error).__name__}: {error}"]
    print(f"warning: {path}: damaged ({', '.join(wrong)}); it is made anew", file=sys.stderr)
    shutil.rmtree(path, ignore_errors=True)
    return None


def _sweep(place):
    for left in place.glob("*.tmp"):
        with contextlib.suppress(OSError):  # another process may sweep too
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- tokens

class Names(Sequence):
    """The names of R rows as they lie in a file: a list of texts that is not in memory."""

    def __init__(self, column):
        self.column = column

    def __len__(self):
        return len(self.column)

    def __getitem__(self, r):
        return self.column[r].as_py() if not isinstance(r, slice) else self.column[r].to_pylist()

    def __eq__(self, other):
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))


def write_tokens(path, parts):
    """Write (ids int32, supervised bool, lengths int64, names) after another of `parts` as the Arrow file `path`.

    They go through files beside it, so that they are never in memory together. Returns the SHA-256 of ids, offsets and supervised.
    """
    import pyarrow
    spools = [open(path.with_suffix(f".{name}"), "w+b") for name in ("ids", "supervised", "names")]
    lengths, name_lengths = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
    try:
        for ids, supervised, part_lengths, names in parts:
            names = [name.encode("utf-8", "replace") for name in names]
            for spool, piece in zip(spools, (ids.astype(np.int32).tobytes(), supervised.astype(np.uint8).tobytes(), b"".join(names))):
                spool.write(piece)
            lengths.append(np.asarray(part_lengths, np.int64)), name_lengths.append(np.array([len(name) for name in names], np.int64))
        for spool in spools:
            spool.flush()
        ids, supervised, letters = (np.memmap(spool, dtype, "r") for spool, dtype in zip(spools, (np.int32, np.uint8, np.uint8)))
        offsets, name_offsets = (np.cumsum(np.concatenate(each)) for each in (lengths, name_lengths))
        lists = [pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values)) for values in (ids, supervised)]
        texts = pyarrow.LargeStringArray.from_buffers(len(name_offsets) - 1, pyarrow.py_buffer(name_offsets), pyarrow.py_buffer(letters))
        batch = pyarrow.record_batch([*lists, texts], ["ids", "supervised", "name"])
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, batch.schema) as writer:
            writer.write_batch(batch)
        digest = hashlib.sha256(ids)
        digest.update(offsets), digest.update(supervised)
        return digest.hexdigest()
    finally:
        for spool in spools:
            spool.close()
            os.unlink(spool.name)


def read_tokens(path):
    """(ids int32 (T,), offsets int64 (R + 1,), supervised bool (T,), names) of an Arrow file, mapped, not read."""
    import pyarrow
    batch = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_next_batch()
    ids, supervised, names = (batch.column(name) for name in ("ids", "supervised", "name"))
    mapped = np.from_dlpack  # as Arrow's own to_numpy does, which imports pandas for it
    return mapped(ids.values), mapped(ids.offsets), mapped(supervised.values).view(bool), Names(names)
