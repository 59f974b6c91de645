"""How much of what is wrong with a data set the audit finds: duplicates, near duplicates and leaks are planted, then looked for.

    python bench/audit.py TRAIN.jsonl EVAL.jsonl [--duplicates 500 --near 500 --leaks 100 --seed 0]
    python bench/audit.py TRAIN.jsonl EVAL.jsonl --rows 1000000 --out MANY.jsonl
                                                    only write a large file: TRAIN's rows again and again, half their words changed

A planted duplicate is a copy of a row; a near duplicate a copy in which one word, anywhere in its turns, is another word of the
data set; a leak a copy of an evaluation row, every second one with a word changed. They are put in at random places. Recall is
the share of planted rows that were tied to the row they were made from. What a data set holds by itself is counted apart, and
what is reported is judged by code of its own that knows nothing of hashes: a report is true if the two rows have the same
words, differ in one word, or have 5-character shingles with a Jaccard similarity of 0.8 or more. How many of a data set's own near
duplicates are found is measured on a sample of rows, each compared with all others.
"""
import argparse
import json
import pathlib
import random
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import audit  # noqa: E402
import config  # noqa: E402
import sources  # noqa: E402


def changed(record, words, rng):
    """A copy of a chat in which one word, of all its turns, is another."""
    record = json.loads(json.dumps(record))
    places = [(turn, k) for turn in record["messages"] for k in range(len(turn["content"].split(" "))) if turn["content"].split(" ")[k].strip()]
    turn, k = rng.choice(places)
    text = turn["content"].split(" ")
    text[k] = rng.choice([word for word in rng.sample(words, 8) if word != text[k]])
    turn["content"] = " ".join(text)
    return record


def plant(train, evaluation, counts, rng):
    """(rows, kind of each planted row {index: (kind, source's index or -evaluation index - 1)}), sources' indices after planting."""
    words = sorted({word for _, record in train for turn in record["messages"] for word in turn["content"].split()})
    new = [("duplicate", s, train[s][1]) for s in rng.sample(range(len(train)), counts["duplicate"])]
    new += [("near_duplicate", s, changed(train[s][1], words, rng)) for s in rng.sample(range(len(train)), counts["near_duplicate"])]
    new += [("leak", -s - 1, changed(evaluation[s][1], words, rng) if i % 2 else evaluation[s][1])
            for i, s in enumerate(rng.sample(range(len(evaluation)), counts["leak"]))]
    tagged = [(("own", i, None), record) for i, (_, record) in enumerate(train)]
    for kind, source, record in new:
        tagged.insert(rng.randrange(len(tagged) + 1), ((kind, source, record), record))
    at = {tag[1]: i for i, (tag, _) in enumerate(tagged) if tag[0] == "own"}
    planted = {i: (tag[0], at[tag[1]] if tag[1] >= 0 else tag[1]) for i, (tag, _) in enumerate(tagged) if tag[0] != "own"}
    return [record for _, record in tagged], planted


def words_of(record):
    return " ".join(turn["content"] for turn in record["messages"] if turn["role"] != "system").split()


def truly_alike(a, b, threshold=0.8):
    """Same words, one word apart, or alike by characters: written down again, from scratch."""
    x, y = words_of(a), words_of(b)
    if len(x) == len(y) and sum(p != q for p, q in zip(x, y)) <= 1:
        return True
    x, y = (" ".join(w) for w in (x, y))
    x, y = ({t[i:i + 5] for i in range(len(t) - 4)} for t in (x, y))
    return len(x & y) >= threshold * len(x | y)


def own_pairs(records, sample):
    """For each row of `sample`: whether another row of `records` is truly alike it, by comparing it with every other one."""
    import numpy
    import scipy.sparse
    numbers, rows, columns, sizes = {}, [], [], []
    for r, record in enumerate(records):
        text = " ".join(words_of(record))
        pieces = {text[i:i + 5] for i in range(len(text) - 4)}
        rows += [r] * len(pieces)
        columns += [numbers.setdefault(piece, len(numbers)) for piece in pieces]
        sizes.append(len(pieces))
    table = scipy.sparse.csr_matrix((numpy.ones(len(rows), numpy.float32), (rows, columns)), (len(records), len(numbers)))
    sizes, left_out = numpy.array(sizes), {}
    for r, record in enumerate(records):
        words = words_of(record)
        for k in range(len(words)):
            left_out.setdefault((*words[:k], None, *words[k + 1:]), set()).add(r)
    found = []
    for begin in range(0, len(sample), 100):
        part = sample[begin:begin + 100]
        common = (table[part] @ table.T).toarray()
        value = common / (sizes[part][:, None] + sizes[None] - common)
        value[range(len(part)), part] = 0
        for r, best in zip(part, value.max(1)):
            words = words_of(records[r])
            found.append(best >= 0.8 or any(len(left_out[(*words[:k], None, *words[k + 1:])]) > 1 for k in range(len(words))))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("train"), parser.add_argument("evaluation")
    for name, default in (("duplicates", 500), ("near", 500), ("leaks", 100), ("seed", 0), ("rows", 0), ("sample", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", default="many.jsonl")
    args = parser.parse_args()
    rng, settings = random.Random(args.seed), config.Data()
    train, evaluation = sources.read_rows(args.train), sources.read_rows(args.evaluation)
    if args.rows:
        words = sorted({word for _, record in train for word in words_of(record)})
        with open(args.out, "w", encoding="utf-8") as file:
            for i in range(args.rows):
                record = train[i % len(train)][1]
                file.write(json.dumps(jumbled(record, words, random.Random(i)) if i >= len(train) else record, ensure_ascii=False) + "\n")
        print(f"{args.rows:,} rows in {args.out}")
        return
    print(f"{len(train):,} training rows of {args.train}, {len(evaluation):,} evaluation rows\n\nas they are:")
    began = time.perf_counter()
    before = audit.scan(train, evaluation, settings)
    print(f"  {time.perf_counter() - began:.1f} s")
    tell(before)
    records = [record for _, record in train]
    sample = sorted(rng.sample(range(len(records)), min(args.sample, len(records))))
    truth = own_pairs(records, sample)
    members = {}
    for g in before["group"].tolist():
        members[g] = members.get(g, 0) + 1
    seen = [members[int(before["group"][r])] > 1 for r in sample]
    both = sum(a and b for a, b in zip(truth, seen))
    print(f"  of {len(sample):,} rows drawn at random, {sum(truth)} have a row truly alike among all others; {both} of these were found, and {sum(seen) - both} others")

    counts = {"duplicate": args.duplicates, "near_duplicate": args.near, "leak": args.leaks}
    rows, planted = plant(train, evaluation, counts, rng)
    began = time.perf_counter()
    result = audit.scan(((f"row {i}", record) for i, record in enumerate(rows)), evaluation, settings)
    print(f"\nwith {args.duplicates} duplicates, {args.near} near duplicates and {args.leaks} leaks planted: {time.perf_counter() - began:.1f} s")
    tell(result)
    group, leaks = result["group"], {row for row, check, *_ in result["found"] if check == "leak"}
    for kind, count in counts.items():
        hits = sum((row in leaks) if kind == "leak" else group[row] == group[source] for row, (what, source) in planted.items() if what == kind)
        print(f"  recall of planted {kind:<15} {hits} of {count}: {hits / max(1, count):.4f}")
    for kind in counts:
        reported = [(row, other) for row, check, _, other in result["found"] if check == kind]
        true = sum(truly_alike(rows[row], rows[other] if other >= 0 else evaluation[-other - 1][1]) for row, other in reported)
        if kind == "duplicate":
            true = sum(words_of(rows[row]) == words_of(rows[other]) for row, other in reported)
        ours = sum(row in planted or any(source == row for _, source in planted.values()) for row, _ in reported)
        print(f"  precision of reported {kind:<15} {true} of {len(reported)} are: {true / max(1, len(reported)):.4f} ({ours} of them planted or a planted row's source)")


def jumbled(record, words, rng):
    """A row like another in kind, but with half of its words others: so that a million rows are not copies."""
    turns = [dict(turn, content=" ".join(rng.choice(words) if rng.random() < 0.5 else word for word in turn["content"].split(" "))) for turn in record["messages"]]
    return {"messages": turns}


def tell(result):
    counts = {}
    for _, check, *_ in result["found"]:
        counts[check] = counts.get(check, 0) + 1
    print("  reported: " + ", ".join(f"{count:,} {check}" for check, count in sorted(counts.items(), key=lambda entry: -entry[1])))


if __name__ == "__main__":
    main()
