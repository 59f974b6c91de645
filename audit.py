"""What is wrong with a data set before a model sees it: duplicates, leaks into the evaluation rows, rows that teach something bad.

Near duplicates are found in two ways. Rows of 5 to 64 words are given a hash for each word left out: two that share one differ
in that one word. Rows of any length are given a MinHash of their 5-character shingles (Broder 1997) by datasketch's
permutations, cut into bands as in its MinHashLSH (Indyk & Motwani 1998; Leskovec et al., Mining of Massive Datasets,
section 3.4): whoever shares a band is compared by the exact Jaccard similarity. The bands are grouped by sorting, not in
datasketch's tables of Python sets, which would take about 4 GiB for 1,000,000 rows; a test holds the two together.

Text that four of five rows share (a frame around each prompt) and system turns say nothing about likeness and are left out.
Leaves out: what a row means, and everything that needs a model. Run through data.py:

    python data.py CONFIG --check
"""
import functools
import hashlib
import mmap
import re
import tempfile
import textwrap
from collections import Counter
from itertools import chain

import numpy as np

import pool
import sources
import words

CHECKS = {
    "duplicate": "the same turns as an earlier row",
    "near_duplicate": "an earlier row with a word changed, or nearly its text",
    "leak": "stands among the evaluation rows too, the same or nearly",
    "unanswered": "the conversation ends without an answer",
    "empty": "an answer holds nothing",
    "one_word": "the answer is a single word",
    "echo": "the answer repeats the question",
    "repetition": "runaway repetition: a piece stands six times in a row or more",
    "encoding": "decoded wrongly: replacement characters, UTF-8 read as Latin-1, control characters",
    "template_tokens": "a turn holds the text of a special token, which becomes that token",
    "unreadable": "cannot be read as a row",
}
BY_ROW = tuple(CHECKS)[3:]
SHINGLE = 5             # characters
BANDS, BAND_ROWS = 12, 5  # 60 permutations: rows alike by 0.8 share a band with probability 0.991, by 0.85 with 0.9985, by 0.5 with 0.32
WORDS = (5, 64)         # rows of so many words are also compared by leaving out each word,
OWN_WORDS = 4           # where so many of them are the row's own
FRAME = 20              # characters of a piece of frame, text that is no row's own,
FRAME_SHARE = 0.8       # because so many rows have it
SAMPLE = 2000           # rows at the beginning from which the frame is read
LEADERS = 8             # rows of a group that others are compared with: bounds the comparisons, whatever the data
CHUNK_ROWS = 1024


# ------------------------------------------------------------------------------------------------------- row by row

MOJIBAKE = re.compile("[\u00c2-\u00f4][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc"
                      "\u2013\u2014\u2018-\u201e\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122]{1,3}")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]")  # but tab, line breaks, and the escape of terminal colours
PERIODS = range(2, 201)  # characters of a piece that is said over and over
RUNAWAY_CHARACTERS = 60
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]{5}")  # without spaces, yet no single word


def _as_byte(character):
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return character.encode("latin-1", "replace")


def wrong_encoding(text):
    """Why `text` looks decoded wrongly, or ""."""
    if text.isascii() and text.isprintable():
        return ""
    if "\ufffd" in text:
        return f"replacement character in {_around(text, text.index(chr(0xfffd)))}"
    if found := CONTROL.search(text):
        return f"control character {ascii(found[0])} in {_around(text, found.start())}"
    for found in MOJIBAKE.finditer(text):
        piece = b"".join(map(_as_byte, found[0]))
        for end in range(len(piece), 1, -1):  # the pattern may have taken a character that belongs to the next word
            try:
                return f"{found[0][:end]!r} for {piece[:end].decode('utf-8')!r} in {_around(text, found.start())}"
            except UnicodeDecodeError:
                pass
    return ""


def _around(text, place, reach=15):
    return ascii(text[max(0, place - reach):place + reach])


def repeats(question, answer):
    """Whether an answer is hardly more than its question again."""
    if not 0.5 < len(question) / max(1, len(answer)) < 2:
        return False
    question, answer = (" ".join(text.lower().split()).strip(" ?.!:`\"'") for text in (question, answer))
    shorter, longer = sorted((question, answer), key=len)
    return len(shorter) >= 12 and shorter in longer and len(shorter) >= 0.8 * len(longer)


def runaway(text):
    """The piece of 2 to 200 characters that stands six times in a row or more in `text`, over 60 characters or more, and how often;
    or None."""
    codes, found = _codes([text])[0].astype(np.uint32), []
    for period in PERIODS:
        same, needed = codes[:-period] == codes[period:], _stretch(period)
        if np.count_nonzero(same) >= needed:
            starts, lengths = _runs(same)
            for start, length in zip(starts[lengths >= needed].tolist(), lengths[lengths >= needed].tolist()):
                if any(map(str.isalnum, text[start:start + period])):  # not a ruler such as -----
                    found.append((start, period, 1 + length // period))
                    break
    return (text[found[0][0]:][:found[0][1]], found[0][2]) if (found := sorted(found)[:1]) else None


def _stretch(period):
    """Over how many characters a text equals itself one period further on, at least, where a piece of that length runs away."""
    return max(5 * period, RUNAWAY_CHARACTERS - period)


def _runs(same):
    """(start, length) of each stretch of True in a bool array, int64 arrays."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).view(np.int8)))
    return edges[::2], edges[1::2] - edges[::2]


def _may_run_away(codes, starts):
    """bool (R,): rows of the characters `codes`, beginning at `starts`, that may hold a piece six times in a row.

    Every tenth character is looked at: a stretch of n holds n // 10 of them.
    """
    found = np.zeros(len(starts), bool)
    places = np.arange(0, max(0, len(codes) - 250), 10)
    for period in PERIODS:
        same = codes[places] == codes[places + period]
        if (same[:-4] & same[1:-3] & same[2:-2] & same[3:-1] & same[4:]).any():  # most texts have no five: the shortest stretch's
            begins, lengths = _runs(same)
            found[np.searchsorted(starts, places[begins[lengths >= _stretch(period) // 10]], "right") - 1] = True
    return found


def look(record, columns, roles, special):
    """(turns [(role, text)], [(check, why)] of one row: all that its own text shows. special: compiled pattern of special tokens, or None.

    Runaway repetition is looked for elsewhere, over many rows at once.
    """
    found = []
    try:
        if isinstance(record, ValueError):
            raise record
        prompt, answer = sources.interpret(record, True, columns, roles)
        length = sum(map(len, (prompt, answer))) if isinstance(answer, str) else sum(len(turn["content"]) for turn in prompt + answer)
        if length > sources.LONGEST_TEXT:
            raise ValueError(f"has {length:,} characters")  # and is refused where it is tokenised
    except ValueError as error:
        return None, [("unreadable", str(error))]
    if isinstance(answer, str):
        turns, answers = [("text", prompt + answer)], [("", answer)]
        if not (prompt + answer).strip():
            found.append(("empty", "no text"))
    else:
        messages = prompt + answer
        turns, answers = [(turn["role"], turn["content"]) for turn in messages], []
        for number, turn in enumerate(messages):
            if turn["role"] == "assistant" and number >= len(prompt):
                asked = messages[number - 1]["content"] if number and messages[number - 1]["role"] == "user" else ""
                if not turn.get("tool_calls"):
                    answers.append((asked, turn["content"]))
        if messages[-1]["role"] != "assistant":
            found.append(("unanswered", f"ends with a turn of {messages[-1]['role']}"))
        if any(not answer.strip() for _, answer in answers):
            found.append(("empty", "the answer is empty" if len(answers) == 1 else "an answer is empty"))
        if len(answers) == 1 and len(answers[0][1].split(None, 1)) == 1 and not UNSPACED.search(answers[0][1]):
            found.append(("one_word", repr(answers[0][1].strip()[:40])))
        if any(repeats(question, answer) for question, answer in answers):
            found.append(("echo", "the answer is the question again"))
    for role, text in turns:
        why = wrong_encoding(text)
        if why:
            found.append(("encoding", why))
            break
    if special:
        for role, text in turns:
            if match := special.search(text):
                found.append(("template_tokens", f"{match[0]} in a turn of {role}" if role != "text" else f"{match[0]} in the text"))
                break
    return turns, found


# -------------------------------------------------------------------------------------------------------- likeness

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(h):
    """The finalizer of MurmurHash3 over uint64: spreads what is put in over all bits."""
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):
        h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
    return h ^ (h >> np.uint64(33))


def _windows(codes, width):
    """uint64 (T - width + 1,): a polynomial hash of each `width` characters in a row."""
    h = np.zeros(max(0, len(codes) - width + 1), np.uint64)
    for i in range(width):
        h = h * np.uint64(1_000_003) + codes[i:i + len(h)]
    return h


def _codes(texts):
    """Characters of texts one after another as uint64 (T,), and where each text begins and ends, int64 (R + 1,)."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    return codes, np.cumsum([0, *map(len, texts)])


def _inside(bounds, width, total):
    """bool (total - width + 1,): a window of `width` characters lies in one text."""
    inside = np.ones(max(0, total - width + 1), bool)
    for back in range(1, width):
        starts = bounds[1:-1] - back
        inside[starts[(starts >= 0) & (starts < len(inside))]] = False
    return inside


def frame_of(texts):
    """Hashes of the 20-character pieces that FRAME_SHARE of `texts` (fewer than 20: none) have, sorted uint64."""
    if len(texts) < 20:
        return np.zeros(0, np.uint64)
    seen, counts = np.unique(np.concatenate([np.unique(_windows(_codes([text])[0], FRAME)) for text in texts]), return_counts=True)
    return seen[counts >= FRAME_SHARE * len(texts)]


def own_text(texts, frame):
    """The texts without their frame."""
    codes, bounds = _codes(texts)
    if not len(frame) or len(codes) < FRAME:
        return texts
    begins = np.flatnonzero(np.isin(_windows(codes, FRAME), frame) & _inside(bounds, FRAME, len(codes)))
    covered = np.zeros(len(codes) + 1, np.int64)
    np.add.at(covered, begins, 1), np.add.at(covered, begins + FRAME, -1)
    keep = np.cumsum(covered)[:-1] == 0
    left = codes[keep].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    ends = np.concatenate([[0], np.cumsum(keep)])[bounds].tolist()
    return [left[a:b].strip() for a, b in zip(ends, ends[1:])]


def without_a_word(texts, chosen):
    """(hashes uint64 (V,), row of each int64 (V,)): for `chosen` rows of WORDS words, one for each word left out, by its place and
    the rest."""
    codes, bounds = _codes([text + " " for text in texts])
    spaces = np.flatnonzero(codes == 32)
    begins = np.concatenate([[0], spaces[:-1] + 1])
    owner = np.searchsorted(bounds, begins, "right") - 1
    lengths = spaces - begins
    place = np.arange(len(codes)) - np.repeat(begins, lengths + 1)
    powers = np.cumprod(np.full(int(place.max(initial=0)) + 1, 1_000_003, np.uint64))
    words = _mixed(np.add.reduceat(codes * powers[place], begins))  # (W,); the space behind a word is part of it
    counts = np.bincount(owner, minlength=len(texts))
    number = np.arange(len(words)) - (np.cumsum(counts) - counts)[owner]
    placed = _mixed(words + (number.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    whole = np.add.reduceat(placed, np.cumsum(counts) - counts)  # every text has a word at least, if an empty one
    chosen = (np.asarray(chosen) & (counts >= WORDS[0]) & (counts <= WORDS[1]))[owner]
    rest = whole[owner] - placed
    return _mixed(rest ^ _mixed((number.astype(np.uint64) << np.uint64(8)) + counts[owner].astype(np.uint64)))[chosen], owner[chosen]


@functools.cache
def _permutations():
    import datasketch
    return datasketch.MinHash(BANDS * BAND_ROWS, scheme="affine32").permutations


def minhash(texts):
    """uint32 (R, 60): each text's MinHash, as datasketch's MinHash.update_batch over `shingle_hashes`; all ones for texts too short."""
    codes, bounds = _codes(texts)
    hashes, inside = shingle_hashes(codes), _inside(bounds, SHINGLE, len(codes))
    hashes = hashes[inside]
    counts = np.maximum(0, np.diff(bounds) - SHINGLE + 1)
    signature = np.full((BANDS * BAND_ROWS, len(texts)), 2**32 - 1, np.uint32)
    have = np.flatnonzero(counts)
    if not len(have):
        return signature.T
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's finalizer over 32 bits, as in datasketch
        hashes = (hashes ^ (hashes >> np.uint32(shift))) * np.uint32(factor)
    hashes ^= hashes >> np.uint32(16)
    starts, permuted = (np.cumsum(counts) - counts)[have], np.empty_like(hashes)
    for k, (a, b) in enumerate(zip(*_permutations())):
        np.multiply(hashes, a, out=permuted)
        np.add(permuted, b, out=permuted)
        signature[k, have] = np.minimum.reduceat(permuted, starts)
    return signature.T


def shingle_hashes(codes):
    """uint32 of each 5 characters in a row."""
    return (_mixed(_windows(codes, SHINGLE)) >> np.uint64(32)).astype(np.uint32)


def bands(signature):
    """uint64 (R, 12): a hash of each band of five MinHash values and of which band it is."""
    h = np.zeros((len(signature), BANDS), np.uint64) + np.arange(1, BANDS + 1, dtype=np.uint64) * GOLDEN
    for k in range(BAND_ROWS):
        h = _mixed(h ^ signature[:, k::BAND_ROWS].astype(np.uint64)) * np.uint64(3)
    return h


def shingles(text):
    """The set of 5-character pieces of a text."""
    return {text[i:i + SHINGLE] for i in range(len(text) - SHINGLE + 1)}


def jaccard(a, b):
    """Size of the intersection of two sets over that of their union."""
    common = len(a & b)
    return common / (len(a) + len(b) - common) if a or b else 0.0


def one_word_apart(a, b):
    """The word of each in which two texts differ, or None where they differ otherwise."""
    a, b = a.split(" "), b.split(" ")
    apart = [k for k in range(len(a)) if a[k] != b[k]] if len(a) == len(b) else ()
    return (a[apart[0]], b[apart[0]]) if len(apart) == 1 else None


def _scan(chunk, columns, roles, special, frame, near):
    """What one chunk of (name, record) comes to: {"found": [(row in the chunk, check, why)], "digest", "texts", and hashes}."""
    turns, found = [], []
    for r, (_, record) in enumerate(chunk):
        row, of_row = look(record, columns, roles, special)
        turns.append(row or [])
        found += [(r, check, why) for check, why in of_row]
    answers = ["\n".join(text for role, text in row if role in ("assistant", "text")) for row in turns]
    codes, bounds = _codes([answer + "\n" for answer in answers] + ["\n" * 250])
    for r in np.flatnonzero(_may_run_away(codes.astype(np.uint32), bounds[:-2])):
        if seen := runaway(answers[r]):
            found.append((int(r), "repetition", f"{seen[0][:40]!r} stands {seen[1]} times in a row"))
    spelt = [repr([(role, text.strip()) for role, text in row]).encode("utf-8", "surrogatepass") for row in turns]
    digest = [hashlib.blake2b(row, digest_size=16).digest() for row in spelt]
    readable = np.array([bool(row) for row in turns])
    result = {"found": found, "rows": len(chunk), "readable": readable, "digest": np.frombuffer(b"".join(digest), np.uint64).reshape(-1, 2)}
    if near:
        texts = [spoken(row) for row in turns]
        own = own_text(texts, frame)
        signature = minhash(own)
        hashes, owner = without_a_word(texts, [text.count(" ") + 1 >= OWN_WORDS for text in own])
        result |= {"texts": [text.encode("utf-8", "surrogatepass") for pair in zip(texts, own) for text in pair],
                   "left_out": hashes, "owner": owner, "signature": signature.astype(np.uint8), "bands": bands(signature),
                   "long": np.array([len(text) >= 4 * SHINGLE for text in own])}
    return result


def spoken(turns):
    """What likeness is judged by: the text of all turns but the system's, white space evened out."""
    return " ".join(" ".join(text for role, text in turns if role != "system").split())


# ------------------------------------------------------------------------------------------------------ over all rows

def scan(train, evaluation=(), data=None, special=(), near=True, workers=0, progress=lambda rows: None):
    """Look through all rows. train, evaluation: iterables of (name, record); data: config.Data; special: texts of special tokens.

    Returns {"rows", "evaluation_rows": how many; "found": list of (row, check, why, other) in the order of rows, `other` the
    row it is like (negative: evaluation row -other - 1) or None; "evaluation_found": the same; "group": int64 (rows,), the
    first of all rows that are alike, by which a split keeps them together; "near": whether near duplicates were looked for}.
    near=False leaves near duplicates out.
    """
    columns, roles = sources.mapping(data.columns, data.roles) if data else ({}, {})
    special = re.compile("|".join(re.escape(text) for text in sorted(special, key=len, reverse=True))) if special else None
    train, evaluation, head = iter(train), list(pool.chunks(evaluation, CHUNK_ROWS)), []
    for row in train:
        head.append(row)
        if len(head) == SAMPLE:
            break
    sample = [spoken(look(record, columns, roles, None)[0] or []) for _, record in head]
    frame = frame_of([text for text in sample if text]) if near else ()
    work = chain(evaluation, pool.chunks(chain(head, train), CHUNK_ROWS))
    one = functools.partial(_scan, columns=columns, roles=roles, special=special, frame=frame, near=near)

    found, digests, readable, total = [], [], [], 0
    bounds, long, left_out, owners, banded, signatures = [0], [], [], [], [], []
    eval_rows = sum(map(len, evaluation))
    with tempfile.TemporaryFile() as spool:  # the texts, for the comparisons: on disk, since they may be many
        for part in pool.ordered(one, work, workers):
            found += [(total + r, check, why) for r, check, why in part["found"]]
            digests.append(part["digest"]), readable.append(part["readable"])
            if near:
                spool.write(b"".join(part["texts"]))
                bounds.append(np.cumsum([len(text) for text in part["texts"]]) + (bounds[-1][-1] if len(bounds) > 1 else 0))
                left_out.append(part["left_out"]), owners.append((part["owner"] + total).astype(np.uint32))
                banded.append(part["bands"]), long.append(part["long"]), signatures.append(part["signature"])
            total += part["rows"]
            progress(total)
        if total == eval_rows:
            raise ValueError("there are no rows to look through")
        readable = np.concatenate(readable)
        same = _same(np.concatenate(digests), readable)
        spool.flush()
        alike = []
        if near:
            kept = same == np.arange(total)  # duplicates are found already
            rows, group, by_band = _candidates(left_out, owners, banded, kept, np.concatenate(long) & readable, eval_rows)
            bounds, signatures = np.concatenate([[0], *bounds[1:]]), np.concatenate(signatures)
            alike = _near(rows, group, by_band, bounds, signatures, eval_rows, spool, data.near_duplicate if data else 0.8)
    return _told(found, same, alike, total, eval_rows, near)


def _same(digests, readable):
    """int64 (N,): the first row with the same digest, of those that are readable; a row's own number where it is the first."""
    order = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    starts = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(1)])
    first = np.empty(len(digests), np.int64)
    first[order] = order[np.flatnonzero(starts)[np.cumsum(starts) - 1]]
    return np.where(readable, first, np.arange(len(digests)))


def _shared(keys, owners):
    """(owner, group) of the keys that occur more than once, the group a number; in pieces of the keys' range, to bound the memory."""
    found, count = [], 0
    pieces = 1 + sum(k.size for k in keys) // 16_000_000
    for piece in range(pieces):
        chosen = [(k.ravel() >> np.uint64(40)) % np.uint64(pieces) == piece for k in keys]
        key = np.concatenate([k.ravel()[c] for k, c in zip(keys, chosen)])
        owner = np.concatenate([o.ravel()[c] for o, c in zip(owners, chosen)])
        if not len(key):
            continue
        order = np.argsort(key, kind="stable")
        key, owner = key[order], owner[order]
        again = np.concatenate([[False], key[1:] == key[:-1]])
        member = again | np.concatenate([again[1:], [False]])
        group = np.cumsum(~again)[member] + count
        count = int(group[-1]) + 1 if len(group) else count
        found.append((owner[member], group))
    nothing = [(np.zeros(0, np.uint32), np.zeros(0, np.int64))]
    return tuple(map(np.concatenate, zip(*nothing, *found)))


def _candidates(left_out, owners, banded, kept, long, eval_rows):
    """(row, group, whether a band made it) of all that share a hash with another row, in order of rows.

    A row stands in a group for each hash that it shares. kept, long: bool (N,), rows to compare, and those whose bands count.
    """
    rows, starts = np.arange(len(kept), dtype=np.uint32), np.cumsum([0, *map(len, banded)])
    first_owner, first_group = _shared(left_out, owners)
    second_owner, second_group = _shared(banded, [np.repeat(rows[a:b], BANDS) for a, b in zip(starts, starts[1:])])
    owner = np.concatenate([first_owner, second_owner]).astype(np.int64)
    group = np.concatenate([first_group, second_group + (first_group.max(initial=0) + 1)])
    by_band = np.concatenate([np.zeros(len(first_owner), bool), np.ones(len(second_owner), bool)])
    chosen = kept[owner] & (long[owner] | ~by_band) | (owner < eval_rows)
    order = np.lexsort((by_band, owner))
    return tuple(column[order[chosen[order]]] for column in (owner, group, by_band))


def _near(owner, group, by_band, bounds, signatures, eval_rows, spool, threshold):
    """[(row, other row, likeness, words)]: rows that are nearly another, in order; the other one came before, or is an evaluation row.

    owner, group, by_band: as `_candidates` gives them; bounds: where texts begin in `spool`, two a row. Each row is compared with
    the first LEADERS rows of each group it is in. likeness is a Jaccard similarity, or 0 where one word differs.
    """
    if bounds[-1] == 0:
        return []
    view = mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ)
    text = lambda r, own=0: view[bounds[2 * r + own]:bounds[2 * r + own + 1]].decode("utf-8", "surrogatepass")
    pieces = functools.lru_cache(20_000)(lambda r: shingles(text(r, 1)))

    hashes = BANDS * BAND_ROWS  # of which rows as alike as that share `enough`, but for 1 pair in 30,000
    enough = hashes * threshold - 4 * (hashes * threshold * (1 - threshold)) ** 0.5

    def like(row, one_word, banded):
        """(other, likeness, words) of the first of the candidates that `row` is like, or None."""
        for other in one_word:
            if words := one_word_apart(text(row), text(other)):
                return other, 0.0, words
        if banded:
            likely = (signatures[banded] == signatures[row]).sum(1) >= enough
            for other in np.array(banded)[likely].tolist():
                value = jaccard(pieces(row), pieces(other))
                if value >= threshold:
                    return other, value, None
        return None

    leaders, eval_leaders, found = {}, {}, []
    edges = np.concatenate([[0], np.flatnonzero(owner[1:] != owner[:-1]) + 1, [len(owner)]]) if len(owner) else [0]
    owner, group, by_band = owner.tolist(), group.tolist(), by_band.tolist()
    for begin, end in zip(edges, edges[1:]):
        row = owner[begin]
        if row < eval_rows:
            for g in group[begin:end]:
                eval_leaders.setdefault(g, []).append(row)
            continue
        for table in (eval_leaders, leaders):  # a leak is told beside a likeness among the training rows
            one_word, banded = [], []
            for g, band in zip(group[begin:end], by_band[begin:end]):
                if g in table:
                    (banded if band else one_word).extend(table[g][:LEADERS])
            hit = like(row, dict.fromkeys(one_word), list(dict.fromkeys(banded))) if one_word or banded else None
            if hit:
                found.append((row, *hit))
        for g in group[begin:end]:
            if len(leaders.setdefault(g, [])) < LEADERS:
                leaders[g].append(row)
    view.close()
    return found


def _told(found, same, alike, total, eval_rows, near):
    """The result of `scan`, from what was found row by row, the first row of the same digest, and the pairs that are alike."""
    of_train = [(row - eval_rows, check, why, None) for row, check, why in found if row >= eval_rows]
    of_eval = [(row, check, why, None) for row, check, why in found if row < eval_rows]
    group = np.arange(total)
    leaks = {}
    first_train = {}
    for row in np.flatnonzero((same != np.arange(total)) & (np.arange(total) >= eval_rows)).tolist():
        other = int(same[row])
        if other < eval_rows:
            leaks[row] = (other, "the same turns")
            if other in first_train:
                of_train.append((row - eval_rows, "duplicate", "the same turns", first_train[other] - eval_rows))
            other = first_train.setdefault(other, row)
        else:
            of_train.append((row - eval_rows, "duplicate", "the same turns", other - eval_rows))
        group[row] = other
    for row, other, likeness, words in alike:
        why = f"{words[0][:30]!r} for {words[1][:30]!r}" if words else f"alike by {likeness:.2f}"
        if other < eval_rows:
            leaks.setdefault(row, (other, why))
        elif row != other:
            of_train.append((row - eval_rows, "near_duplicate", why, other - eval_rows))
            group[row] = group[other]
    for row in range(eval_rows, total):  # duplicates of a row that is alike another one
        if group[group[row]] != group[row]:
            group[row] = group[group[row]]
    for row in np.flatnonzero(same >= eval_rows).tolist():  # a second copy leaks where the first does, though only that was compared
        if row >= eval_rows and int(same[row]) != row and int(same[row]) in leaks:
            leaks.setdefault(row, leaks[int(same[row])])
    of_train += [(row - eval_rows, "leak", why, -other - 1) for row, (other, why) in leaks.items()]
    return {"rows": total - eval_rows, "evaluation_rows": eval_rows, "found": sorted(of_train, key=lambda entry: entry[0]),
            "evaluation_found": of_eval, "group": group[eval_rows:] - eval_rows, "near": near}


# ---------------------------------------------------------------------------------------------------------- in words

def report(result, names, examples, source, data, rows, evaluation, width=80):
    """Lines that tell what `scan` found.

    names: {row: (name, record)} of the rows that examples need; rows, evaluation: their tokens, or None.
    """
    held = f", {result['evaluation_rows']:,} to evaluate on in {data.eval}" if data.eval else ""
    lines = wrapped("rows       ", f"{result['rows']:,} in {source}{held}", width)
    names_of_keys = sources.mapping(data.columns, data.roles)
    for what, tokens in (("to train on", rows), ("to evaluate on", evaluation)):
        lines += _tokens_told(what, tokens, data.max_length, width) if tokens is not None else []
    counted = Counter(check for _, check, *_ in result["found"])
    for check, meaning in CHECKS.items():
        if check == "near_duplicate" and not result["near"] or not counted[check]:
            continue
        dropped = "  (left out: data.drop)" if check in data.drop else ""
        lines += ["", f"{check:<16} {counted[check]:>9,}  {counted[check] / result['rows']:>6.2%}{dropped}"]
        lines += wrapped("  ", meaning, width)
        for row, _, why, other in [entry for entry in result["found"] if entry[1] == check][:examples]:
            lines += _example(names, row, why, other, names_of_keys, width)
    among = rows.audit.get("leak", 0) if rows is not None and not data.eval else 0
    if among:
        lines += ["", f"{'leak':<16} {among:>9,}  {among / result['rows']:>6.2%}"]
        lines += wrapped("  ", f"a row that is trained on is like one of the {len(evaluation):,} that are held out; leave such rows out, "
                         "or all but the first of their kind", width)
    clean = [check for check in CHECKS if not counted[check] and not (check == "leak" and (among or not data.eval))]
    lines += [""] + wrapped("not found  ", ", ".join(clean), width) if clean else []
    of_eval = Counter(check for _, check, *_ in result["evaluation_found"])
    if of_eval:
        lines += [""] + wrapped("evaluation rows  ", ", ".join(f"{count:,} {check}" for check, count in of_eval.most_common()), width)
        seen = set()
        for row, check, why, _ in result["evaluation_found"]:
            if check not in seen and check != "one_word":
                seen.add(check)
                lines += _example(names, -row - 1, f"{check}: {why}", None, names_of_keys, width)
    droppable = [check for check in [*counted, *["leak"] * bool(among)] if check not in ("unreadable", *data.drop)]
    if droppable:
        worth = [check for check in CHECKS if check in droppable and check != "one_word"] or droppable
        lines += [""] + wrapped("to leave rows out  ", f"--data.drop={','.join([*data.drop, *worth])}", width)
    if 0 < counted["unreadable"] < result["rows"]:  # of all rows nothing would be left
        lines += wrapped("to pass over what cannot be read  ", "--data.bad_rows=skip", width)
    return lines


def _tokens_told(what, tokens, max_length, width):
    counts, lengths = tokens.counts, np.diff(tokens.offsets)
    share = counts["supervised_tokens"] / counts["tokens"]
    lines = wrapped("tokens     ", f"{what}: {counts['tokens']:,} in {len(tokens):,} rows, {share:.1%} of them supervised; "
                    f"rows of {lengths.min():,} to {lengths.max():,}, half of them over {int(np.median(lengths)):,}", width)
    limit = f"data.max_length={max_length}"
    for name, one, many in (("rows_skipped", "row could not be read and is left out", "rows could not be read and are left out"),
                            ("rows_truncated", f"row is cut to {limit}", f"rows are cut to {limit}"),
                            ("rows_lost", f"row is lost to {limit}", f"rows are lost to {limit}"),
                            ("rows_unsupervised", "row has no supervised token", "rows have no supervised token"),
                            ("turns_unsupervised", "answer is not supervised: the template hides what the model wrote",
                             "answers are not supervised: the template hides what the model wrote"),
                            ("turns_hidden", "turn, tool or tool call is not shown by the template",
                             "turns, tools or tool calls are not shown by the template")):
        if counts[name]:
            lines.append(f"           {counts[name]:,} {one if counts[name] == 1 else many}")
    if tokens.too_long:
        lines += wrapped("           ", f"such as {tokens.too_long[0]}, of {tokens.too_long[1]:,} tokens", width)
    return lines


def _example(names, row, why, other, names_of_keys, width):
    name, record = names[row]
    lines = wrapped("    ", name, width)
    if other is not None:
        lines += wrapped("      like ", names[other][0], width)
    lines += wrapped("      ", why, width)
    for record in [record] + ([names[other][1]] if other is not None and why != "the same turns" else []):
        if isinstance(record, ValueError):
            continue  # the line was no JSON, so there is nothing to show but why
        text = _said(record, names_of_keys)
        lines += textwrap.wrap(text, words.fitting(text, width), initial_indent="      ", subsequent_indent="        ", max_lines=2,
                               placeholder=" …")
    return lines


def _said(record, names_of_keys):
    """A row on one line: what is said by whom, or as it stands where it is no row; what a terminal would obey is written out."""
    try:
        prompt, answer = sources.interpret(record, True, *names_of_keys)
    except ValueError:
        answer = sources.shown_row(record)
    if isinstance(answer, list):
        answer = " | ".join(f"{turn['role']}: {turn['content']}" for turn in prompt + answer if turn["role"] != "system")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in answer)


def wrapped(lead, text, width=80):
    """`text` as lines of at most `width` columns, `lead` before the first and spaces before the others; words are kept whole."""
    whole = dict(break_on_hyphens=False, break_long_words=False)
    return textwrap.wrap(text, words.fitting(text, width), initial_indent=lead, subsequent_indent=" " * len(lead), **whole) or [lead]
