"""Which tokens, in which order, and which of them are supervised.

Rows come from sources (sources.py): files or hub data sets, as chats, instruction/input/output, prompt/completion, or plain
`text`. A chat is rendered by the tokenizer's own template and encoded as that text, without further special tokens. Which characters
of it the model would have written is found by rendering the chat up to each assistant turn: an answer is what the whole chat
has beyond its prompt, terminator included. Then: the order of samples as a pure function of (seed, epoch), of one source or of
several with weights, and packing without padding.

Tokens are made once, on all cores, and lie in a memory-mapped file (cache.py); what data.drop names is left out before anything
else is done (audit.py). Leaves out: pictures and sound. Used by train.py and eval.py:

    train, evaluation = data.load(config, tokenizer)
    window = data.samples(train, seed=0, start=step * 32, count=32)
    for micro_batch in data.pack(train, window, max_tokens=8192): ...

From a shell:

    python data.py CONFIG --check              what is wrong with the rows: duplicates, leaks, bad answers
    python data.py CONFIG --check=5            the same with five examples of each
    python data.py CONFIG --check --out=FILE   and the rows that data.drop leaves out, a JSON line each
    python data.py CONFIG --preview 3          rows as the model sees them, and a packed micro-batch; with --ids, token ids
"""
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

import audit
import cache
import config
import pool
import ranks
import sources
import tokens
from sources import read_rows  # noqa: F401  (what data offers to others, with the next line)
from tokens import Rows, end_of_turn, load_tokenizer, tokenize  # noqa: F401

AUDIT_BYTES = 16 * 2**20  # data.audit=auto looks for near duplicates in files of up to so many bytes at a start
KEPT_RECORDS = 64  # evaluation rows held out whose text is kept beside their tokens, for the generation samples


@dataclass
class MicroBatch:
    """D documents packed one after another, T tokens, no padding, with the S places where the loss is taken.

    A document ends with the last token that has something to predict: what follows could not change the loss, since
    attention looks back only.
    """
    input_ids: torch.Tensor     # int64 (T,)
    position_ids: torch.Tensor  # int64 (T,), from 0 in each document
    cu_seqlens: torch.Tensor    # int32 (D + 1,), where documents start and end
    max_seqlen: int             # tokens of the longest document
    rows: torch.Tensor          # int64 (S,), positions whose next token is supervised
    targets: torch.Tensor       # int64 (S,), that next token
    document: torch.Tensor      # int64 (S,), 0 <= document < D
    samples: list               # D row indices

    def to(self, device):
        """The same micro-batch on `device`; copies to a GPU go through pinned memory and do not block the host."""
        device = torch.device(device)
        fields = dict(vars(self))
        for name, value in fields.items():
            if isinstance(value, torch.Tensor):
                value = value.pin_memory() if device.type == "cuda" else value
                fields[name] = value.to(device, non_blocking=True)
        return MicroBatch(**fields)


# ------------------------------------------------------------------------------------------------- a run's data sets

def _train_sources(data):
    """[(source, weight)] of the training rows."""
    return [tuple(entry) for entry in data.mixture] or [(data.train, 1.0)]


def _train_stream(data):
    """(index of the source, name, record) of every training row, before anything is dropped or held out."""
    for number, (source, _) in enumerate(_train_sources(data)):
        for name, record in sources.stream(source, data.bad_rows, data.first_rows):
            yield number, name, record


def _shown_progress(what, total=None):
    """A progress bar on a terminal, of rows; elsewhere a line, where it may take a while."""
    from tqdm import tqdm
    if total and total > 50_000 and not sys.stderr.isatty():
        print(f"{what} {total:,} rows on {pool.cores()} cores", file=sys.stderr)
    return tqdm(desc=what, total=total, unit=" rows", disable=None, leave=False, mininterval=0.5)


def _special_texts(tokenizer):
    """Texts that the tokenizer turns into special tokens, of three characters or more."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(text for text in added | set(tokenizer.all_special_tokens) if len(text) >= 3)


def inspect(cfg, tokenizer, near=None):
    """What audit.scan finds in a run's rows: its result as a dict, from the cache where it has been found before.

    near: look for near duplicates; None: as data.audit says and data.drop needs. Raises ValueError as `sources.stream`.
    """
    data = cfg.data
    if near is None:
        small = sum(map(sources.size, _named_sources(data))) <= AUDIT_BYTES
        near = small or data.audit == "full" or {"near_duplicate", "leak"} & set(data.drop)
    near = bool(near)
    prints = [sources.fingerprint(source) for source in _named_sources(data)]
    special = _special_texts(tokenizer)
    place = cache.folder(data.cache) if all(prints) else None
    what = ["audit", prints, bool(data.eval), data.columns, data.roles, data.first_rows, data.near_duplicate, data.bad_rows, special]

    def build(folder):
        train = ((name, record) for _, name, record in _train_stream(data))
        evaluation = sources.stream(data.eval, data.bad_rows) if data.eval else ()
        with _shown_progress("looking through") as bar:
            result = audit.scan(train, evaluation, data, special, near, progress=lambda rows: bar.update(rows - bar.n))
        np.save(folder / "group.npy", result["group"], allow_pickle=False)
        with open(folder / "found.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in result["found"])
        return {name: result[name] for name in ("rows", "evaluation_rows", "evaluation_found", "near")}

    if not near and place and (place / cache.key([*what, True])).is_dir():
        near = True  # what is known by now is better
    return cache.entry(place, cache.key([*what, near]), build, _open_findings)


def _open_findings(path):
    meta = cache.meta(path)
    with open(path / "found.jsonl", encoding="utf-8") as file:
        found = [tuple(json.loads(line)) for line in file]
    return {name: meta[name] for name in ("rows", "evaluation_rows", "evaluation_found", "near")} | {
        "found": found, "group": np.load(path / "group.npy", allow_pickle=False)}


def _named_sources(data):
    return [source for source, _ in _train_sources(data)] + [data.eval] * bool(data.eval)


def _partition(cfg, seen):
    """(what becomes of each training row, int8 (N,): 0 trained on, 1 held out, 2 dropped; {row: (check, why, other)} of those dropped).

    seen: what `inspect` found. Rows are dropped before any are held out. Raises ValueError where too few are left.
    """
    data, dropped = cfg.data, {}
    for row, check, why, other in seen["found"]:
        if check in data.drop:
            dropped.setdefault(row, (check, why, other))
    fate = np.zeros(seen["rows"], np.int8)
    fate[list(dropped)] = 2
    left = np.flatnonzero(fate == 0)
    if not data.eval:
        if len(left) <= data.eval_rows:
            raise ValueError(f"data.eval_rows: {data.eval_rows} rows cannot be held out of the {len(left)} of "
                             f"{' and '.join(data.sources)}; lower it, or name evaluation rows with data.eval")
        fate[left[_permutation(len(left), cfg.train.seed, 0, 1)[:data.eval_rows]]] = 1
        if "leak" in data.drop:  # rows alike, of which one is held out
            held = np.isin(seen["group"], seen["group"][fate == 1])
            for row in np.flatnonzero(held & (fate == 0)).tolist():
                dropped[row] = ("leak", "nearly a row that is held out", None)
                fate[row] = 2
    if not (fate == 0).any():
        raise ValueError(f"data.drop: every row of {' and '.join(data.sources)} is left out by {', '.join(data.drop)}; drop less")
    return fate, dropped


def _unseen(data):
    """In place of `inspect`'s findings where nothing is looked for."""
    rows = sum(1 for _ in _train_stream(data))
    return {"rows": rows, "evaluation_rows": 0, "found": [], "evaluation_found": [], "group": np.arange(rows), "near": False}


def _looked_for(cfg, tokenizer):
    """What is known about a run's rows before they are split: an audit, unless nothing asks for one."""
    return _unseen(cfg.data) if cfg.data.audit == "off" and not cfg.data.drop else inspect(cfg, tokenizer)


def read_splits(cfg, tokenizer=None):
    """(training records, evaluation records) of a run, [(name, record)] each, in memory, as `load` would tokenise them.

    Without data.eval, data.eval_rows rows drawn by train.seed are held out. tokenizer: where data.drop asks for an audit.
    """
    data = cfg.data
    if data.eval and not data.drop:
        return [(name, record) for _, name, record in _train_stream(data)], sources.read_rows(data.eval, data.bad_rows)
    if data.drop and tokenizer is None:
        tokenizer = load_tokenizer(cfg.model.path, data.chat_template, cfg.model.revision)
    rows = [(name, record) for _, name, record in _train_stream(data)]
    seen = _looked_for(cfg, tokenizer) if data.drop else {"rows": len(rows), "found": [], "group": np.arange(len(rows))}
    fate, _ = _partition(cfg, seen)
    return ([row for row, what in zip(rows, fate) if what == 0],
            sources.read_rows(data.eval, data.bad_rows) if data.eval else [row for row, what in zip(rows, fate) if what == 1])


def _shaping(cfg, tokenizer):
    """All but the rows themselves that shapes their tokens, ready for a key."""
    data, template = cfg.data, tokenizer.chat_template or ""
    versions = {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")}
    today = None
    if "strftime" in str(template):  # such a template writes today's date into every row
        import datetime
        today = datetime.date.today().isoformat()
    backend, special = tokenizer.backend_tokenizer.to_str(), str(sorted(tokenizer.special_tokens_map.items()))
    return [hashlib.sha256(backend.encode()).hexdigest(), str(template), special, today, versions,
            data.max_length, data.too_long, data.bad_rows, data.supervise, data.columns, data.roles]


def load(cfg, tokenizer):
    """(training Rows, evaluation Rows) of a run's configuration, from the cache where they have been made before.

    Raises ValueError as `sources.stream`, `tokenize` and `audit.scan` do.
    """
    data = cfg.data
    train_prints = [sources.fingerprint(source) for source, _ in _train_sources(data)]
    what = ["train", _shaping(cfg, tokenizer), train_prints, " and ".join(data.sources)]
    what += [data.first_rows, data.mixture, data.drop, data.audit]
    what += [data.near_duplicate, _special_texts(tokenizer)] if data.drop else []
    if not data.eval:
        what += [cfg.train.seed, data.eval_rows]
    elif data.drop or data.audit != "off":
        what += [sources.fingerprint(data.eval)]
    place = cache.folder(data.cache) if all(train_prints) else None
    parts = ["train"] if data.eval else ["train", "eval"]
    found = cache.entry(place, cache.key(what), lambda folder: _build(cfg, tokenizer, folder),
                        lambda folder: [_open_rows(folder, part) for part in parts])
    return found[0], load_evaluation(cfg, tokenizer) if data.eval else found[1]


def keep_dropped(rows, folder):
    """Put the file of the rows that data.drop left out into a run's folder as rows-dropped.jsonl; without any, an older one is removed."""
    (folder / "rows-dropped.jsonl").unlink(missing_ok=True)
    if rows.dropped:
        _write_dropped(rows, folder / "rows-dropped.jsonl")


def _write_dropped(rows, path):
    """Write the rows that data.drop left out into the file `path`, which is there whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            if rows.dropped:
                rows.dropped.seek(0)
                shutil.copyfileobj(rows.dropped, file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_evaluation(cfg, tokenizer):
    """The evaluation Rows alone: of data.eval, or held out of the training rows."""
    data = cfg.data
    if not data.eval:
        return load(cfg, tokenizer)[1]
    fingerprint = sources.fingerprint(data.eval)
    place = cache.folder(data.cache) if fingerprint else None

    def build(folder):
        rows = ((0, *row) for row in sources.stream(data.eval, data.bad_rows))
        return {"eval": _write_rows(folder / "eval.arrow", rows, tokenizer, data)}

    key = cache.key(["eval", _shaping(cfg, tokenizer), fingerprint, data.eval])
    return cache.entry(place, key, build, lambda folder: _open_rows(folder, "eval"))


def _open_rows(path, part):
    meta, dropped = cache.meta(path)[part], path / "rows-dropped.jsonl"
    return Rows(*cache.read_tokens(path / f"{part}.arrow"), meta["counts"], meta["digest"], meta["skipped"],
                mixture=tuple(map(tuple, meta.get("mixture", ()))), too_long=tuple(meta["too_long"]), audit=meta.get("audit", {}),
                remarks=tuple(meta.get("remarks", ())), records=list(map(tuple, meta.get("records", ()))),
                dropped=open(dropped, "rb") if part == "train" and dropped.exists() else None)


def _build(cfg, tokenizer, folder):
    """Write the tokens of the training rows, and of those held out, into `folder`; returns its meta data."""
    data = cfg.data
    seen = _looked_for(cfg, tokenizer)
    fate, dropped = _partition(cfg, seen)
    found, records, others = {}, [], {other for _, _, other in dropped.values() if other is not None}
    names = {}
    if any(other < 0 for other in others):
        names = {-r - 1: name for r, (name, _) in enumerate(sources.stream(data.eval, data.bad_rows)) if -r - 1 in others}

    def walk(wanted, file=None):
        for row, (number, name, record) in enumerate(_train_stream(data)):
            if row in others:
                names[row] = name
            if row >= len(fate):
                raise ValueError(f"{name}: the source grew while it was read; start again")
            if fate[row] == 2 and file:
                check, why, other = dropped[row]
                like = {"like": names[other]} if other is not None else {}
                file.write(json.dumps({"row": name, "reason": check, "why": why, **like, "record": record}, default=str) + "\n")
            elif fate[row] == wanted:
                yield number, name, record

    if not data.eval:
        held = list(walk(1))
        records = [[name, record] for _, name, record in held[:KEPT_RECORDS] if not isinstance(record, ValueError)]
        found["eval"] = _write_rows(folder / "eval.arrow", held, tokenizer, data)
        found["eval"]["records"] = json.loads(json.dumps(records, default=str))
    with open(folder / "rows-dropped.jsonl", "w", encoding="utf-8") as file:
        found["train"] = _write_rows(folder / "train.arrow", walk(0, file), tokenizer, data, int((fate == 0).sum()))
    if not dropped:
        (folder / "rows-dropped.jsonl").unlink()
    sizes, weights = found["train"].pop("sizes"), [weight for _, weight in _train_sources(data)]
    if data.mixture:
        sizes = [sizes.get(number, 0) for number in range(len(weights))]
        empty = [source for (source, _), size in zip(_train_sources(data), sizes) if not size]
        if empty:
            raise ValueError(f"data.mixture: no row of {empty[0]} is left to train on; take it out")
        found["train"]["mixture"] = list(zip(sizes, weights))
        found["train"]["digest"] = hashlib.sha256(json.dumps([found["train"]["digest"], found["train"]["mixture"]]).encode()).hexdigest()
        _quotas(found["train"]["mixture"])
    found["train"]["counts"]["rows_dropped"] = len(dropped)
    found["train"]["audit"] = _audited(cfg, seen, fate)
    found["train"]["remarks"] = _remarks(cfg, seen, found["train"]["audit"], dropped)
    return found


def _write_rows(path, rows, tokenizer, data, total=None):
    """Tokenise (source's number, name, record) after another into an Arrow file.

    Returns {"counts", "digest", "skipped", "too_long", "sizes": rows kept of each source}.
    """
    totals, sizes, numbers = {}, {}, []

    def by_source():
        batch, current = [], None
        for number, name, record in rows:
            if batch and (number != current or len(batch) == tokens.CHUNK_ROWS):
                numbers.append(current)
                yield batch
                batch = []
            batch.append((name, record))
            current = number
        if batch:
            numbers.append(current)
            yield batch

    def counted():
        with _shown_progress("tokenising", total) as bar:
            for part, made in enumerate(tokens.tokenizing(by_source(), tokenizer, data, totals, workers=0)):
                sizes[numbers[part]] = sizes.get(numbers[part], 0) + len(made[2])
                bar.update(len(made[2]))
                yield made

    digest = cache.write_tokens(path, counted())
    return {"counts": totals["counts"], "digest": digest, "skipped": totals["skipped"], "too_long": totals["longest"] or (), "sizes": sizes}


def _audited(cfg, seen, fate):
    """{check: rows} of the rows that are trained on."""
    counts = dict(Counter(check for row, check, *_ in seen["found"] if fate[row] == 0))
    if not cfg.data.eval:
        leaks = int((np.isin(seen["group"], seen["group"][fate == 1]) & (fate == 0)).sum())
        counts |= {"leak": leaks} if leaks else {}
    return counts


def _remarks(cfg, seen, counts, dropped):
    """What an audit found, in a few lines for the console: counts of what stays in, then of what was dropped."""
    lines = []
    telling = {check: count for check, count in counts.items() if check not in ("one_word", "unreadable")}
    if telling:
        most_first = sorted(telling.items(), key=lambda entry: -entry[1])
        lines += audit.wrapped("audit     ", ", ".join(f"{count:,} {check}" for check, count in most_first))
        lines.append("          python data.py CONFIG --check shows them")
    elif cfg.data.audit != "off":
        lines.append("audit     nothing found" + ("" if seen["near"] else "; python data.py CONFIG --check looks for near duplicates too"))
    if dropped:
        reasons = ", ".join(f"{count:,} {check}" for check, count in Counter(check for check, *_ in dropped.values()).items())
        lines += audit.wrapped("dropped   ", f"{len(dropped):,} rows left out by data.drop: {reasons}; see rows-dropped.jsonl")
    return lines


def prompts(cfg, tokenizer, eval_records=None):
    """Fixed prompts to sample from: [dict(prompt=text to show, ids=its tokens, reference=the row's own answer or "")].

    All of the file eval.prompts (rows as everywhere, `prompt` alone, or one a line of text), or the first eval.samples usable
    ones of `eval_records` (read as cfg says if None). A chat is asked for its last answer; a plain text is continued from
    its first half, 32 tokens at most. Prompts longer than data.max_length are passed over, in the file refused.
    """
    source, found = cfg.eval.prompts, []
    ends, (columns, roles) = tokens.ends_of(tokenizer), sources.mapping(cfg.data.columns, cfg.data.roles)
    if source:
        records, columns, roles = _read_prompts(source), {}, {}
    elif cfg.eval.samples:
        records = _first_records(cfg, tokenizer) if eval_records is None else eval_records
    else:
        records = []
    for name, record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            prompt = tokens.prompt_of(record, tokenizer, ends, columns, roles)
            if len(prompt["ids"]) > cfg.data.max_length:
                raise ValueError(f"the prompt's {len(prompt['ids'])} tokens exceed data.max_length={cfg.data.max_length}; shorten it")
        except ValueError as error:
            if source:
                raise ValueError(f"{name}: {error}") from error
            continue  # an evaluation row: `tokenize` has refused it, or counted it with its reason
        found.append(prompt)
        if not source and len(found) == cfg.eval.samples:
            break
    return found


def _first_records(cfg, tokenizer):
    """The evaluation records from the first on: read as far as they are needed, or as they were kept beside their tokens."""
    if cfg.data.eval:
        return sources.stream(cfg.data.eval, cfg.data.bad_rows)
    rows = load_evaluation(cfg, tokenizer)
    return rows.records if len(rows.records) >= min(cfg.eval.samples, len(rows)) else read_splits(cfg, tokenizer)[1]


def _read_prompts(source):
    path = pathlib.Path(config.find(source))
    if sources.kind_of_name(path.name)[0]:
        return sources.read_rows(source)
    return [(name, {"prompt": line}) for name, line in sources.read_lines(source)]


# ---------------------------------------------------------------------------------------------------- order, packing

@functools.lru_cache(maxsize=8)
def _permutation(n, seed, *key):
    """A permutation of range(n), int64 (n,), that depends on `seed` and `key` (whole numbers >= 0) and nothing else.

    By sorting raw words of a generator of its own: those are promised to stay the same in every version of NumPy, which
    the shuffles built on them are not, and no global generator is drawn from.
    """
    return np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(n).argsort(kind="stable")


def sample_stream(n_rows, seed, start, count):
    """Row indices of samples start .. start + count - 1 in the endless stream of epochs, each its own permutation of the rows.

    Pure: any window can be had at any time, on any machine, so that a position in the data is just a number.
    """
    if n_rows < 1:
        raise ValueError(f"cannot draw samples from {n_rows} rows")
    order = []
    while count > 0:
        epoch, position = divmod(start, n_rows)
        taken = _permutation(n_rows, seed, epoch)[position:position + count].tolist()
        order += taken
        start, count = start + len(taken), count - len(taken)
    return order


def _quotas(mixture):
    """How many samples of an epoch each source of a mixture [(rows, weight), ...] gives: its share by weight, by largest remainder.

    Raises ValueError where a source would give none.
    """
    total, weights = sum(size for size, _ in mixture), [weight for _, weight in mixture]
    exact = [total * weight / sum(weights) for weight in weights]
    quotas = [int(share) for share in exact]
    for k in sorted(range(len(exact)), key=lambda k: quotas[k] - exact[k])[:total - sum(quotas)]:
        quotas[k] += 1
    if 0 in quotas:
        raise ValueError(f"data.mixture: source {quotas.index(0) + 1} would give no sample in an epoch of {total}; raise its weight, "
                         "or take it out")
    return quotas


def samples(rows, seed, start, count):
    """Row indices of samples start .. start + count - 1 of a data set, mixed by the weights of its sources where it has several.

    An epoch is len(rows) samples. A mixture gives each source the same number of them in every epoch (see `_quotas`) at places
    drawn anew; a source's own rows come in an endless stream of passes, each a permutation, so that all are seen equally often. Pure,
    like `sample_stream`.
    """
    if not rows.mixture:
        return sample_stream(len(rows), seed, start, count)
    quotas = np.array(_quotas(rows.mixture))
    begins, bases, order = np.cumsum(quotas) - quotas, np.cumsum([0] + [size for size, _ in rows.mixture]), []
    while count > 0:
        epoch, position = divmod(start, len(rows))
        slots = _permutation(len(rows), seed, epoch)[position:position + count]
        source = np.searchsorted(begins, slots, "right") - 1
        for k, nth in zip(source.tolist(), (slots - begins[source] + epoch * quotas[source]).tolist()):
            size = rows.mixture[k][0]
            order.append(int(bases[k] + _permutation(size, seed, nth // size, 2 + k)[nth % size]))
        start, count = start + len(slots), count - len(slots)
    return order


def share(rows, samples, max_tokens, in_step=False):
    """This rank's part of `samples`, packed. With `in_step` every rank gets the same number of micro-batches, empty ones at the end."""
    window = pack(rows, ranks.share(rows, samples), max_tokens)
    most, = ranks.most(len(window)) if in_step else (0,)
    none = torch.zeros(0, dtype=torch.int64)
    empty = MicroBatch(input_ids=torch.zeros(1, dtype=torch.int64), position_ids=torch.zeros(1, dtype=torch.int64), max_seqlen=1,
                       samples=[], cu_seqlens=torch.tensor([0, 1], dtype=torch.int32), rows=none, targets=none, document=none)
    return window + [empty] * (most - len(window))


def pack(rows, samples, max_tokens):
    """MicroBatches of at most `max_tokens` tokens that hold every one of `samples` (row indices) with a supervised token once.

    First-fit decreasing: longest first, each into the first micro-batch with room, so the same samples always pack the
    same way. A document longer than max_tokens has a micro-batch to itself.
    """
    documents = []  # (tokens, row, positions whose next token is supervised)
    for r in samples:
        predicting = np.flatnonzero(rows.supervised[rows.offsets[r]:rows.offsets[r + 1]]) - 1
        if len(predicting):
            documents.append((int(predicting[-1]) + 1, r, predicting))
    documents.sort(key=lambda document: -document[0])  # stable: equal lengths stay in the order of the samples
    room, bins = np.full(len(documents), max_tokens), []
    for document in documents:
        tokens = min(document[0], max_tokens)
        chosen = int((room[:len(bins) + 1] >= tokens).argmax())
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(document)
        room[chosen] -= tokens
    return [_micro_batch(rows, documents) for documents in bins]


def _micro_batch(rows, documents):
    predicting = [where for _, _, where in documents]
    lengths = np.array([tokens for tokens, _, _ in documents])
    ends = np.cumsum(lengths)
    begins = ends - lengths
    at = [slice(rows.offsets[r], rows.offsets[r] + tokens + 1) for tokens, r, _ in documents]
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate([rows.ids[s][:-1] for s in at]).astype(np.int64)),
        position_ids=torch.from_numpy(np.arange(ends[-1]) - np.repeat(begins, lengths)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        rows=torch.from_numpy(np.concatenate([begin + where for begin, where in zip(begins, predicting)])),
        targets=torch.from_numpy(np.concatenate([rows.ids[s][where + 1] for s, where in zip(at, predicting)]).astype(np.int64)),
        document=torch.from_numpy(np.repeat(np.arange(len(documents)), [len(where) for where in predicting])),
        samples=[r for _, r, _ in documents])


# ------------------------------------------------------------------------------------------------- from a shell

def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    words, flags, overrides = config.command_line(argv, {"check": None, "preview": None, "ids": False, "out": ""})
    numbers = [word for word in words if word.isdigit()]  # --preview 3, as well as --preview=3
    words = [word for word in words if not word.isdigit()]
    if len(words) != 1 or len(numbers) > 1 or not (flags["check"] or flags["preview"]) or numbers and not flags["preview"]:
        raise ValueError("give one configuration and what to do, as in: python data.py configs/approach1.json --check (or --preview 3)")
    for flag in ("check", "preview"):
        if isinstance(flags[flag], str) and not (flags[flag].isdigit() and int(flags[flag])):
            raise ValueError(f"--{flag}: takes a number above 0, got {flags[flag]}")
    if flags["out"] and not flags["check"] or flags["ids"] and not flags["preview"]:
        raise ValueError("--out goes with --check, --ids with --preview")
    cfg = config.located(config.read(config.find(words[0]), overrides))
    tokenizer = load_tokenizer(cfg.model.path, cfg.data.chat_template, cfg.model.revision)
    if flags["out"]:
        _check_out(pathlib.Path(flags["out"]), cfg.data)
    if flags["check"]:
        _check(cfg, tokenizer, 2 if flags["check"] is True else int(flags["check"]), flags["out"])
    if flags["preview"]:
        import preview
        count = int(numbers[0]) if numbers else 3 if flags["preview"] is True else int(flags["preview"])
        rows, _ = load(cfg, tokenizer)
        window = samples(rows, cfg.train.seed, 0, cfg.samples_per_step)
        max_tokens = cfg.memory.max_tokens or 2048
        packed, ends, colour = pack(rows, window, max_tokens), end_of_turn(tokenizer), sys.stdout.isatty()
        print(*preview.lines(rows, tokenizer, ends, window[:count], packed, max_tokens, flags["ids"], colour), sep="\n")
    return 0


def _check_out(out, data):
    """Raises ValueError where dropped rows cannot be written to `out`, or would be over rows that are read."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out: {out} cannot be a file; name one in a folder that exists")
    if any(pathlib.Path(config.find(part)).resolve() == out.resolve() for source in _named_sources(data) for part in sources.parts(source)):
        raise ValueError(f"--out: {out} holds the rows that are looked through; name another file")


def _check(cfg, tokenizer, examples, out):
    """Print what is wrong with a run's rows, with examples; write what data.drop leaves out to `out`."""
    looked = replace(cfg.data, bad_rows="skip")  # what cannot be read is told as the other findings are, and refused at the end
    seen = inspect(replace(cfg, data=looked), tokenizer, near=True)
    needed = set()
    for check in audit.CHECKS:
        for row, *_, other in [entry for entry in seen["found"] if entry[1] == check][:examples]:
            needed |= {row} | ({other} if other is not None else set())
    names = {row: (name, record) for row, (_, name, record) in enumerate(_train_stream(looked)) if row in needed}
    if cfg.data.eval:
        wanted = {-other - 1 for other in needed if other < 0} | {row for row, *_ in seen["evaluation_found"]}
        names |= {-row - 1: entry for row, entry in enumerate(sources.stream(cfg.data.eval, looked.bad_rows)) if row in wanted}
    refused = None
    try:
        rows, evaluation = load(cfg, tokenizer)
    except ValueError as error:
        rows = evaluation = None
        refused = str(error)
    for line in audit.report(seen, names, examples, " and ".join(cfg.data.sources), cfg.data, rows, evaluation):
        print(line)
    if refused:
        raise ValueError(refused)
    if out:
        _write_dropped(rows, pathlib.Path(out))
        print(f"written    {out}: the {rows.counts['rows_dropped']:,} rows left out by data.drop")


if __name__ == "__main__":
    config.run_command(main)
