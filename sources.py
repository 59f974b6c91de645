"""What a source holds: the rows of files and hub data sets, one after another, and what each says as prompt and answer.

Files: JSONL, JSON, CSV, Parquet, each also with .gz or .zst; names with * stand for all files they match, in order of name.
Anything else that is no file is a hub data set. Rows are read as a stream: JSONL, CSV, Parquet and streamed hub data are
never in memory as a whole, a .json list is. What a row is, is seen from its keys; a `columns` mapping serves other names.

Leaves out: tokens, masks and order (data.py), pictures and sound, and anything that would run code of a data set.
"""
import csv
import glob
import gzip
import hashlib
import io
import json
import pathlib
import zlib
from itertools import islice

import config

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **ROLES, **dict.fromkeys(("chatgpt", "bing", "bard", "model"), "assistant"),
                  "function_call": "assistant", "observation": "tool", "function_response": "tool"}
UNDERSTOOD = "messages; conversations; instruction + output (+ input); prompt + completion; text"
KEYS = ("messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text", "system", "tools")
SHAPES = (("messages",), ("conversations",), ("instruction", "output"), ("prompt", "completion"), ("text",))
TURN_KEYS = ("turn.role", "turn.content")
SUFFIXES = (".gz", ".zst")  # of packed files
LONGEST_TEXT = 4_000_000  # characters of a row: about a million tokens, and half a gigabyte of their offsets
LONGEST_LINE = 64 << 20   # bytes of a line or a field: so many characters take no more, even escaped


def brief(error):
    """An error of a library as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ------------------------------------------------------------------------------------------------------------ reading

def read_rows(source, bad_rows="refuse"):
    """[(name, record)] of a source, as `stream` gives them. Raises ValueError naming file and line."""
    return list(stream(source, bad_rows))


def stream(source, bad_rows="refuse", limit=0):
    """(name, record) after (name, record) of a file, of files matched by a pattern, or of a hub data set NAME or NAME:SPLIT.

    name is 'file.jsonl:17' by line in JSONL and CSV, 'file.parquet:row 17' elsewhere, both from 1; blank lines are no
    rows. limit: stop after so many rows, and read no further (a hub data set is then streamed); 0: all. Raises ValueError
    naming file and line. With bad_rows='skip', a line that cannot be read becomes (name, ValueError); a file that cannot
    be read on from there is refused all the same.
    """
    count = 0
    for part in parts(source):
        try:
            for where, record in islice(_records(part, limit), limit - count if limit else None):
                if isinstance(record, ValueError) and bad_rows == "refuse":
                    raise ValueError(f"{where}: {record}; mend it (data.bad_rows=skip leaves such rows out)")
                yield f"{part}:{where}", record
                count += 1
        except ValueError as error:
            raise ValueError(f"{part}:{error}") from error
        if limit and count >= limit:
            return
    if not count:
        raise ValueError(f"{source}: holds no rows; give it at least one")


def parts(source):
    """The files that a source names, in order; the source itself where it is one file, or no file."""
    path = pathlib.Path(config.find(source))
    if path.exists() or not glob.has_magic(source) or ":" in source:  # a split such as train[:10%] is no pattern
        return [source]
    for pattern in (pathlib.Path(source).expanduser(), config.PROJECT / source):
        if found := sorted(glob.glob(str(pattern), recursive=True)):
            return found
    raise ValueError(f"{source}: matches no file; check the pattern")


def kind(source):
    """(the suffix that says how a file is read, or "" for a hub data set; the suffix of its packing or "").

    Raises ValueError for a folder and for a file of another kind.
    """
    path = pathlib.Path(config.find(source))
    suffix, packed = kind_of_name(path.name)
    if path.is_dir() or path.exists() and not (suffix and path.is_file()):  # a pipe or a device has no end
        remedy = f". Of a folder, name the files: {source.rstrip('/')}/*.parquet" if path.is_dir() else ""
        raise ValueError(f"{source}: is not a kind of file that rows are read from; those are {', '.join(READERS)}, each also with "
                         f"{' or '.join(SUFFIXES)}{remedy}")
    return suffix, packed


def kind_of_name(name):
    """(suffix, packing) of a file's name, as in (".csv", ".gz")."""
    packed = pathlib.Path(name).suffix.lower()
    packed = packed if packed in SUFFIXES else ""
    suffix = pathlib.Path(name[:-len(packed)] if packed else name).suffix.lower()
    return (suffix if suffix in READERS else "", packed)


def _records(source, limit):
    """(where, record or ValueError) of one file or hub data set. The ValueErrors it raises begin with the place in the file."""
    suffix, packed = kind(source)
    if not suffix:
        yield from _read_hub(source, limit)
        return
    try:
        with _opened(source, packed) as file:
            yield from READERS[suffix](file)
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(source, packed, error)) from None
    except FileNotFoundError:
        raise ValueError(" no such file; check the name (`make setup` makes the quick start's rows)") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f" cannot be read ({error}); check its permissions, or make it anew") from error


def _opened(source, packed):
    """A file as a stream of bytes, unpacked, behind its byte-order mark."""
    path = config.find(source)
    if packed == ".zst":
        import pyarrow
        file = io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    else:
        file = io.BufferedReader(gzip.open(path)) if packed else open(path, "rb")
    if file.peek(3)[:3] == b"\xef\xbb\xbf":
        file.read(3)
    return file


def _not_utf8(source, packed, error):
    """Where a file stops being UTF-8: the line, which whoever decodes a stream does not know."""
    with _opened(source, packed) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as here:
                return f"{number}: not UTF-8 (byte 0x{line[here.start]:02x}); save the file as UTF-8"
    return f" not UTF-8 ({error}); save the file as UTF-8"


def read_lines(source):
    """[(name, line)] of a file of text, without blank lines. Raises ValueError naming file and line."""
    try:
        with _opened(source, kind_of_name(source)[1]) as file:
            text = file.read(LONGEST_LINE)
            if len(text) == LONGEST_LINE:
                raise ValueError(f"{source}: holds {LONGEST_LINE:,} bytes or more; shorten it")
            lines = text.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}:{_not_utf8(source, kind_of_name(source)[1], error)}") from None
    except (OSError, EOFError, zlib.error) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ValueError(f"{source}: {what}; check the name") from None
    return [(f"{source}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def size(source):
    """Bytes of a source's files, about as much as they hold unpacked; of a hub data set, more than any file's."""
    total = 0
    for part in parts(source):
        suffix, packed = kind(part)
        path = pathlib.Path(config.find(part))
        total += path.stat().st_size * (4 if packed or suffix == ".parquet" else 1) if suffix and path.exists() else 2**62 * (not suffix)
    return total


def _read_jsonl(file):
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
        if not line.strip():
            continue
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_LINE)
            yield number, ValueError(f"has more than {LONGEST_LINE:,} bytes, and a row at most {LONGEST_TEXT:,} characters; "
                                     "split it into several rows")
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except json.JSONDecodeError as error:
            record = ValueError(f"not valid JSON ({error.msg} at column {error.colno})")
        except (UnicodeDecodeError, RecursionError, ValueError) as error:  # a number of thousands of digits is a plain ValueError
            record = ValueError(f"not JSON in UTF-8 ({error})")
        yield number, record


def _read_json(file):
    first, more, _ = file.peek(4096).lstrip().partition(b"\n")
    if first and not first.startswith(b"["):  # many files called .json hold an object a line
        if more and not first.rstrip().endswith(b"}"):
            raise ValueError("1: begins as one object over several lines; a .json file holds a list of rows, or a row a line: "
                             "write the list that is in it to a file of its own")
        yield from _read_jsonl(file)
        return
    try:
        records = json.loads(file.read().decode("utf-8").strip() or "[]")
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError as error:
        raise ValueError(f" not valid JSON ({error})") from None
    for number, record in enumerate(records, 1):
        yield f"row {number}", record


def _read_csv(file):
    csv.field_size_limit(LONGEST_LINE)  # Python's own 128 KiB a field is less than a long document
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        if len(header) == 1 and (other := next((sign for sign in ";\t|" if sign in header[0]), "")):
            raise ValueError(f"1: the columns seem to be set apart by {other!r}; save the file with commas between them")
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


def _read_parquet(file):
    import pyarrow.parquet
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file if isinstance(file.raw, io.FileIO) else io.BytesIO(file.read()))
        for batch in table.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield f"row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f" not a Parquet file that can be read ({brief(error)})") from error


def _read_hub(source, limit):
    import datasets
    name, _, split = source.partition(":")
    try:
        records = datasets.load_dataset(name, split=split or "train", **({"streaming": True} if limit else {}))
    except Exception as error:  # whatever the hub, the network or the data set's own layout makes the library raise
        raise ValueError(f" neither a file nor a hub data set that can be loaded ({brief(error)}); name a file that exists, or a hub "
                         "data set as NAME or NAME:SPLIT (needs a network)") from error
    for number, record in enumerate(records, 1):
        yield f"row {number}", record


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def fingerprint(source):
    """SHA-256 of a source's content, as hexadecimal text; of a hub data set, of what the hub says its state is.

    Returns "" where nothing vouches for the content: a hub data set whose revision cannot be asked for. Raises ValueError as `stream`.
    """
    digest = hashlib.sha256()
    for part in parts(source):
        if not kind(part)[0]:
            revision = _hub_revision(part)
            if not revision:
                return ""
            digest.update(f"{part}@{revision}".encode())
            continue
        try:
            with open(config.find(part), "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except FileNotFoundError:
            raise ValueError(f"{part}: no such file; check the name (`make setup` makes the quick start's rows)") from None
        except OSError as error:
            raise ValueError(f"{part}: cannot be read ({error}); check its permissions, or make it anew") from error
    return digest.hexdigest()


def _hub_revision(source):
    import huggingface_hub
    try:
        return huggingface_hub.HfApi().dataset_info(source.partition(":")[0], timeout=10).sha or ""
    except Exception:  # no network, no such data set, no permission: `stream` says which; here it only means that nothing is known
        return ""


# ------------------------------------------------------------------------------------------- from a row to its turns

def mapping(columns, roles):
    """The settings data.columns ["completion=answer", ...] and data.roles ["bot=assistant", ...] as (dict, dict).

    Raises ValueError naming the key of the configuration.
    """
    found = {}
    for name, entries, allowed, left in (("columns", columns, (*KEYS, *TURN_KEYS), True), ("roles", roles, tuple(ROLES), False)):
        found[name] = {}
        for entry in entries:
            one, equals, other = entry.partition("=") if isinstance(entry, str) else ("", "", "")
            known, given = (one, other) if left else (other, one)
            if not equals or not one or not other or known not in allowed:
                what = "KEY=COLUMN, where KEY is one of " if left else "NAME=ROLE, where ROLE is one of "
                raise ValueError(f"data.{name}: must be a list of {what}{', '.join(allowed)}; got {json.dumps(entry)}")
            if one in found[name]:
                raise ValueError(f"data.{name}: {one} stands twice; keep one")
            found[name][one] = other
    return found["columns"], found["roles"]


def renamed(record, columns):
    """A row with the keys that `columns` gives it, {key: column}; a column such as answers.text.0 is looked for inside.

    Only mapped keys are kept, so that a column that happens to be called as another kind of row is does not count.
    """
    if not columns or not isinstance(record, dict):
        return record
    row = {}
    for key, column in columns.items():
        if key in TURN_KEYS:
            continue
        value = record
        for step in [column] if column in record else column.split("."):
            if isinstance(value, list) and step.isdigit() and int(step) < len(value):
                value = value[int(step)]
            elif isinstance(value, dict) and step in value:
                value = value[step]
            else:
                raise ValueError(f"has no column {column!r}, which data.columns takes for {key}; it has "
                                 f"{', '.join(map(str, record)) or 'none'}")
        row[key] = value
    return row if row else record


def _text(record, key):
    if not isinstance(record[key], str):
        raise ValueError(f"{key} must be text, got {shown(record[key])}")
    return record[key]


def call_name(call):
    """What a tool, or a call of one, is called, in {"name": ...} or {"function": {"name": ...}}; "" where that is no text."""
    call = call.get("function", call) if isinstance(call, dict) else {}
    name = call.get("name") if isinstance(call, dict) else ""
    return name if isinstance(name, str) else ""


def shown(value):
    """The beginning of a value, for a message."""
    return json.dumps(value, default=str)[:80]


def shown_row(record):
    """A row as one line of text."""
    return str(record) if isinstance(record, ValueError) else json.dumps(record, default=str, ensure_ascii=False)


def _messages(turns, key, default, columns, roles):
    """Checked messages with the roles that templates know; keys that hold null (Parquet fills them in) are left out.

    default: the names that role and content go by where a turn does not show it, ("role", "content") or ("from", "value").
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a table that holds no lists holds them as JSON text
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise ValueError(f"{key} begins as a list in JSON, but is none ({error})") from None
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key} must be a list of at least one turn, got {shown(turns)}")
    messages, known, known_from = [], {**ROLES, **roles}, {**SHAREGPT_ROLES, **roles}
    mapped_role, mapped_content = columns.get("turn.role"), columns.get("turn.content")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"{key}, turn {number}: must be an object with {default[0]} and {default[1]}, got {shown(turn)}")
        turn = {name: value for name, value in turn.items() if value is not None}
        role_key = mapped_role or ("role" if "role" in turn else "from" if "from" in turn else default[0])
        content_key = mapped_content or ("content" if "content" in turn else "value" if "value" in turn else default[1])
        allowed = known_from if role_key == "from" else known
        role, content = turn.pop(role_key, None), turn.pop(content_key, "" if turn.get("tool_calls") else None)
        if not isinstance(role, str) or role not in allowed:
            raise ValueError(f"{key}, turn {number}: {role_key} must be one of {', '.join(allowed)}, got {shown(role)}"
                             + (f"; data.roles={role}=ROLE says what it is" if isinstance(role, str) else ""))
        of_text = lambda part: isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text"
        if isinstance(content, list) and content and all(map(of_text, content)):
            content = "".join(part["text"] for part in content)  # text in parts, as for models that also take pictures
        if not isinstance(content, str):
            raise ValueError(f"{key}, turn {number}: {content_key} must be text, got {shown(content)}")
        calls = turn.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) and call_name(call) for call in calls):
            raise ValueError(f"{key}, turn {number}: tool_calls must be a list of calls, each with the name of its function, "
                             f"got {shown(calls)}")
        messages.append({"role": allowed[role], "content": content, **turn})
    return messages


def interpret(record, template, columns=None, roles=None):
    """(prompt, answer) of a row: two lists of messages (the assistant turns of the second are answers), or two texts.

    Text that is marked as prompt and answer becomes a chat where the tokenizer has a `template`; plain text stays text.
    columns, roles: as `mapping` gives them. Raises ValueError with the reason, without the row's name.
    """
    columns, roles = columns or {}, roles or {}
    if not isinstance(record, dict):
        raise ValueError(f"a row must be an object with keys, got {shown(record)}")
    record = renamed(record, columns)
    # Parquet fills other kinds' columns with null
    shape = next((keys for keys in SHAPES if all(record.get(key) is not None for key in keys)), None)
    shape = shape or next((keys for keys in SHAPES if all(key in record for key in keys)), None)
    # a column called system may be anything, but for these
    taken = "system" in columns or shape in (("conversations",), ("instruction", "output"))
    system = [{"role": "system", "content": _text(record, "system")}] if taken and record.get("system") else []
    if shape == ("messages",):
        messages = _messages(record["messages"], "messages", ("role", "content"), columns, roles)
        return [], (system if messages[0]["role"] != "system" else []) + messages
    if shape == ("conversations",):
        return system, _messages(record["conversations"], "conversations", ("from", "value"), columns, roles)
    if shape == ("instruction", "output"):
        before = [_text(record, key) for key in ("instruction", "input") if record.get(key) or key == "instruction"]
        prompt, answer = "\n\n".join(before) + ("" if template else "\n\n"), _text(record, "output")
    elif shape == ("prompt", "completion"):
        prompt, answer = record["prompt"], record["completion"]
    elif shape == ("text",):
        return "", _text(record, "text")
    else:
        raise ValueError(f"the keys {', '.join(map(str, record)) or '(none)'} make no row; one has {UNDERSTOOD}"
                         + ("" if columns else " (data.columns names others: --data.columns=prompt=question,completion=answer)"))
    if not (template or system or isinstance(prompt, list) or isinstance(answer, list)):
        return _text({"prompt": prompt}, "prompt"), _text({"completion": answer}, "completion")
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    default = ("role", "content")
    for key, value in (("prompt", prompt), ("completion", answer)):
        if not isinstance(value, list):
            raise ValueError(f"{key} must be text, or a list of turns, got {shown(value)}")
    prompt, answer = _messages(prompt, "prompt", default, columns, roles), _messages(answer, "completion", default, columns, roles)
    return (system if prompt[0]["role"] != "system" else []) + prompt, answer


def tools_of(record, columns=None):
    """A row's tools for its template: a list, also where it stands as JSON text; None where there are none. Raises ValueError."""
    tools = renamed(record, columns).get("tools") if "tools" in (columns or {}) else record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools must be a list, or one in JSON; got {shown(tools)} ({error})") from None
    if tools and not isinstance(tools, list):
        raise ValueError(f"tools must be a list, got {shown(tools)}")
    return tools or None
