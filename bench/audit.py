"""How much of what is wrong with a data set the audit finds: duplicates, near duplicates and leaks are planted, then looked for.

    python bench/audit.py TRAIN.jsonl EVAL.jsonl [--duplicates 500 --near 500 --leaks 100 --seed 0]
    python bench/audit.py TRAIN.jsonl EVAL.jsonl --rows 1000000 [--model FOLDER]
                                                    only time `data.py --check` with nothing in the cache, on so many rows:
                                                    TRAIN's, then again and again with half of their words exchanged

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
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import audit  # noqa: E402
import config  # noqa: E402
import sources  # noqa: E402


def changed(record, words, rng):
    """A copy of a chat in which one word, of all its turns, is another."""
    record = json.loads(json.dumps(record))
    places = [(turn, k) for turn in record["messages"] for k, word in enumerate(turn["content"].split(" ")) if word.strip()]
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
    parser.add_argument("--model", default=config.Model().path)
    args = parser.parse_args()
    train, evaluation = sources.read_rows(args.train), sources.read_rows(args.evaluation)
    if args.rows:
        check_many(train, args.evaluation, args.rows, args.model)
        return
    print(f"{len(train):,} training rows of {args.train}, {len(evaluation):,} evaluation rows")
    rng = random.Random(args.seed)
    as_they_are(train, evaluation, rng, args.sample)
    with_planted(train, evaluation, rng, {"duplicate": args.duplicates, "near_duplicate": args.near, "leak": args.leaks})


def as_they_are(train, evaluation, rng, sample):
    """Print what the rows hold by themselves, and how much of it is found, judged on `sample` rows."""
    print("\nas they are:")
    began = time.perf_counter()
    result = audit.scan(train, evaluation, config.Data())
    print(f"  {time.perf_counter() - began:.1f} s")
    tell(result)
    sample = sorted(rng.sample(range(len(train)), min(sample, len(train))))
    truth = own_pairs([record for _, record in train], sample)
    members = Counter(result["group"].tolist())
    seen = [members[int(result["group"][r])] > 1 for r in sample]
    both = sum(a and b for a, b in zip(truth, seen))
    print(f"  of {len(sample):,} rows drawn at random, {sum(truth)} have a row truly alike among all others; "
          f"{both} of these were found, and {sum(seen) - both} others")


def with_planted(train, evaluation, rng, counts):
    """Print recall and precision over rows in which `counts` of each kind are planted."""
    rows, planted = plant(train, evaluation, counts, rng)
    began = time.perf_counter()
    result = audit.scan(((f"row {i}", record) for i, record in enumerate(rows)), evaluation, config.Data())
    planting = " and ".join(f"{count} {kind}" for kind, count in counts.items())
    print(f"\nwith {planting} planted: {time.perf_counter() - began:.1f} s")
    tell(result)
    group, leaks = result["group"], {row for row, check, *_ in result["found"] if check == "leak"}
    for kind, count in counts.items():
        mine = [(row, source) for row, (what, source) in planted.items() if what == kind]
        hits = sum((row in leaks) if kind == "leak" else group[row] == group[source] for row, source in mine)
        print(f"  recall of planted {kind:<15} {hits} of {count}: {hits / max(1, count):.4f}")
    of_planted = set(planted) | {source for _, source in planted.values()}
    for kind in counts:
        reported = [(row, other) for row, check, _, other in result["found"] if check == kind]
        record = lambda other: rows[other] if other >= 0 else evaluation[-other - 1][1]
        same = (lambda a, b: words_of(a) == words_of(b)) if kind == "duplicate" else truly_alike
        true = sum(same(rows[row], record(other)) for row, other in reported)
        print(f"  precision of reported {kind:<15} {true} of {len(reported)} are: {true / max(1, len(reported)):.4f} "
              f"({sum(row in of_planted for row, _ in reported)} of them planted or a planted row's source)")


def check_many(train, evaluation, count, model):
    """Time `data.py --check` over `count` rows: seconds of clock and of processor, and the most memory of all processes together."""
    words = sorted({word for _, record in train for word in words_of(record)})
    with tempfile.TemporaryDirectory() as folder:
        many, settings = pathlib.Path(folder, "many.jsonl"), pathlib.Path(folder, "many.json")
        with open(many, "w", encoding="utf-8") as file:
            for i in range(count):
                record = train[i % len(train)][1]
                record = jumbled(record, words, random.Random(i)) if i >= len(train) else record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        tree = {"data": {"train": str(many), "eval": str(pathlib.Path(evaluation).absolute()), "cache": str(pathlib.Path(folder, "cache"))}}
        settings.write_text(json.dumps(tree | {"model": {"path": str(pathlib.Path(model).absolute())}}), encoding="utf-8")
        print(f"{count:,} rows, {many.stat().st_size / 1e6:,.0f} MB; load of this machine {os.getloadavg()[0]:.1f}", flush=True)
        began, peak = time.perf_counter(), [0]
        command = subprocess.Popen([sys.executable, "data.py", str(settings), "--check"], cwd=PROJECT, stdout=subprocess.PIPE, text=True)

        def watch():
            while command.poll() is None:
                peak[0] = max(peak[0], memory_of(command.pid))
                time.sleep(0.5)

        watcher = threading.Thread(target=watch)
        watcher.start()
        told = command.communicate()[0]
        watcher.join()
    used = os.times()
    print("\n".join(line for line in told.split("\n") if line[:1].strip()))
    print(f"exit code {command.returncode}; {time.perf_counter() - began:.0f} s, {used.children_user + used.children_system:.0f} s of "
          f"processor time on {os.cpu_count()} cores, at most {peak[0] / 2**30:.2f} GiB; load of this machine {os.getloadavg()[0]:.1f}")


def memory_of(pid):
    """Bytes of a process and those it started that are no files' pages, shared ones counted once (Linux)."""
    total = 0
    try:
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon", "Pss_Shmem")):
                total += int(line.split()[1]) * 1024
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended by now
        return total
    return total + sum(map(memory_of, children))


def jumbled(record, words, rng):
    """A row like another in kind, but with half of its words others: so that a million rows are not copies."""
    other = lambda text: " ".join(rng.choice(words) if rng.random() < 0.5 else word for word in text.split(" "))
    return {"messages": [dict(turn, content=other(turn["content"])) for turn in record["messages"]]}


def tell(result):
    counts = Counter(check for _, check, *_ in result["found"])
    print("  reported: " + ", ".join(f"{count:,} {check}" for check, count in counts.most_common()))


if __name__ == "__main__":
    main()
