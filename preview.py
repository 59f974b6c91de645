"""Rows as the model sees them: every token, which of them are supervised, where turns end, and how rows lie in a micro-batch.

On a terminal supervised tokens are green, tokens that end a turn reversed, the BOS underlined, other special tokens dim;
elsewhere marks say the same: [supervised], [|end of a turn|], ^BOS. Leaves out: choosing rows (data.py). Run through data.py:

    python data.py CONFIG --preview 3
    python data.py CONFIG --preview 3 --ids
"""
import re
import textwrap

import words

GREEN, DIM, REVERSED, UNDERLINED, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[7m", "\x1b[4m", "\x1b[0m"
ESCAPES = re.compile("\x1b\\[[0-9;]*m")


def lines(rows, tokenizer, end_ids, chosen, packed, max_tokens, ids=False, colour=False, width=80):
    """Lines that show the rows `chosen` (indices), a token list each if `ids`, and the micro-batches `packed` of the first step."""
    out = [*wrapped(legend(tokenizer, end_ids, colour), width, ""), ""]
    for r in chosen:
        begin, end = int(rows.offsets[r]), int(rows.offsets[r + 1])
        tokens, supervised = rows.ids[begin:end].tolist(), rows.supervised[begin:end].tolist()
        counts = f": {len(tokens):,} tokens, {sum(supervised):,} supervised"
        out.append(_tail(rows.names[r], width - len(counts)) + counts)
        marked = text(tokens, supervised, tokenizer, end_ids, colour)
        out += wrapped(marked, words.fitting(marked, width))
        if not any(t in end_ids for t, s in zip(tokens, supervised) if s):
            out.append("  ! no supervised token ends a turn: the row was cut, or teaches no end")
        if ids:
            listed = " ".join(f"[{t}]" if s else str(t) for t, s in zip(tokens, supervised))
            out += textwrap.wrap(listed, width, initial_indent="  ", subsequent_indent="  ")
        out.append("")
    out += layout(rows, packed, max_tokens, width)
    return out


def legend(tokenizer, end_ids, colour):
    """How to read what follows."""
    ends = " or ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in end_ids)
    bos = f"{tokenizer.bos_token} ({tokenizer.bos_token_id})" if tokenizer.bos_token_id is not None else "none"
    marks = "[supervised], [|end of a turn|], ^BOS"
    if colour:
        marks = f"{GREEN}supervised{PLAIN}, {REVERSED}end of a turn{PLAIN}, {DIM}special{PLAIN}, {UNDERLINED}BOS{PLAIN}"
    return f"{marks}; a turn ends with {ends}; BOS {bos}"


def text(ids, supervised, tokenizer, end_ids, colour):
    """The row's text with its marks. Line breaks stay; the other characters that a terminal would obey are written out."""
    special, pieces = set(tokenizer.all_special_ids), []
    runs = []  # (ids, kind), a kind for each stretch of tokens shown alike: they are decoded together, since a character may take several
    for position, (token, on) in enumerate(zip(ids, supervised)):
        what = "special" if token in special else "plain"
        what = "end" if token in end_ids and on else "bos" if token == tokenizer.bos_token_id and position == 0 else what
        if runs and runs[-1][1] == (what, on) and what == "plain":
            runs[-1][0].append(token)
        else:
            runs.append(([token], (what, on)))
    for tokens, (what, on) in runs:
        piece = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in piece)
        if colour:
            style = {"end": REVERSED + GREEN, "bos": UNDERLINED}.get(what, GREEN if on else DIM if what == "special" else "")
            pieces.append(f"{style}{piece}{PLAIN}" if style else piece)
        else:
            pieces.append(f"[|{piece}|]" if what == "end" else f"^{piece}" if what == "bos" else f"[{piece}]" if on else piece)
    return "".join(pieces)


def wrapped(marked, width, indent="  "):
    """A marked text as lines of at most `width` columns, colours not counted; colours go on over line ends."""
    out, style = [], ""
    for paragraph in marked.split("\n"):
        line, used = indent + style, 0
        for piece in re.split("(\x1b\\[[0-9;]*m)", paragraph):
            if ESCAPES.fullmatch(piece):
                style = "" if piece == PLAIN else style + piece
                line += piece
                continue
            for word in re.split("( +)", piece):
                while word:
                    room = width - len(indent) - used
                    if len(word) > room and used and len(word) <= width - len(indent):
                        out.append((line + (PLAIN if style else "")).rstrip(" "))
                        line, used = indent + style, 0
                        word = word.lstrip(" ")
                        continue
                    line, used, word = line + word[:room], used + len(word[:room]), word[room:]
                    if word:
                        out.append(line + (PLAIN if style else ""))
                        line, used = indent + style, 0
        out.append((line + (PLAIN if style else "")).rstrip(" "))
    while out and not out[-1]:  # a template's last line break
        out.pop()
    return out


def _tail(name, width):
    return name if len(name) <= width else "…" + name[1 - width:]


def layout(rows, packed, max_tokens, width):
    """Which rows lie in which micro-batch of a step, each as a bar of its length."""
    total = sum(len(batch.input_ids) for batch in packed)
    supervised = sum(len(batch.targets) for batch in packed)
    micro_batches = f"{len(packed)} micro-batch{'es' * (len(packed) > 1)}"
    out = [f"step 1: {sum(len(batch.samples) for batch in packed)} rows, {total:,} tokens in {micro_batches} of at most {max_tokens:,}",
           f"  no padding; the loss is summed over {supervised:,} supervised tokens and divided once"]
    bar = width - 24
    for number, batch in enumerate(packed, 1):
        bounds = batch.cu_seqlens.tolist()
        cells = [0] * bar  # the document that a column shows: alternating marks make their borders visible
        full = max(max_tokens, bounds[-1])
        for d, (a, b) in enumerate(zip(bounds, bounds[1:])):
            for column in range(a * bar // full, max(a * bar // full + 1, b * bar // full)):
                cells[min(column, bar - 1)] = d + 1
        drawn = "".join(" " if c == 0 else "#" if c % 2 else "=" for c in cells)
        out.append(f"  {number:>3} |{drawn}| {bounds[-1]:>6,} tokens")
    first = packed[0]
    out.append("  micro-batch 1 holds, in this order, positions from 0 in each:")
    for d, r in enumerate(first.samples[:8]):
        a, b = int(first.cu_seqlens[d]), int(first.cu_seqlens[d + 1])
        on = int((first.document == d).sum())
        out.append(f"    tokens {a:>6,} to {b - 1:>6,}  {on:>5,} counted  {_tail(rows.names[r], width - 41)}")
    if len(first.samples) > 8:
        out.append(f"    and {len(first.samples) - 8} more")
    return out
