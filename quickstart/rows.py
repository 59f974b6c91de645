"""The quick start's data set: the documentation of the running Python as chat rows.

Every public module, class, function and method of the standard library gives up to three rows: what it does (the first
paragraph of its docstring), how it is called (its signature), and which one does what the docstring says. The docstrings
are read off the library's source files, so nothing of it is imported or run; only modules written in C, which have no
source to read, are imported, and only those named below, whose import does nothing. The rows are a pure function of the
Python version (and build) and the packages asked for. Modules are split whole between training and evaluation, by
the part of their name before the first dot, and an answer that occurs twice (os.path and its Windows twin) is kept once,
so that nothing evaluated was trained on. Leaves out: private names, tests, tutorials, and docstrings too short to teach.

The documentation is copyright of the Python Software Foundation, under the PSF licence, version 2; docstrings of
packages stand under their packages' licences. Nothing of it is part of this repository: rows are made where they are used.

    python quickstart/rows.py                             data/python-docs-train.jsonl and data/python-docs-eval.jsonl
    python quickstart/rows.py --packages torch numpy      the documentation of installed packages too
"""
import argparse
import ast
import dataclasses
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import os
import pathlib
import re
import sys
import sysconfig
import types
import warnings

OUT = pathlib.Path(__file__).resolve().parent.parent / "data"
EVAL_ROWS = 300  # about so many; the last module taken may exceed it
EVAL_MODULE_ROWS = (4, 60)  # a module gives this many rows to be chosen for evaluation, so that many modules make it up
ANSWER_CHARACTERS = (20, 420)  # of a description: about 5 to 100 tokens
SIGNATURE_CHARACTERS = 200

SKIPPED = {"antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "ntpath", "pydoc_data", "test", "this", "turtledemo"}
SKIPPED_PARTS = {"test", "tests", "testing", "site-packages", "__pycache__"}
# Python files under another name than the one they are used by.
ALIASES = {"_collections_abc": "collections.abc", "_pydatetime": "datetime", "_pydecimal": "decimal", "_pyio": "io",
           "genericpath": "os.path", "posixpath": "os.path"}
# Modules in C whose import has no effect, by the name they are used by. What a build lacks gives no rows.
IN_C = {"builtins": "builtins", "array": "array", "atexit": "atexit", "binascii": "binascii", "cmath": "cmath", "errno": "errno",
        "faulthandler": "faulthandler", "fcntl": "fcntl", "gc": "gc", "grp": "grp", "itertools": "itertools", "marshal": "marshal",
        "math": "math", "mmap": "mmap", "posix": "os", "pwd": "pwd", "pyexpat": "xml.parsers.expat", "resource": "resource",
        "select": "select", "sys": "sys", "syslog": "syslog", "termios": "termios", "time": "time", "unicodedata": "unicodedata",
        "zlib": "zlib", "_bz2": "bz2", "_collections": "collections", "_contextvars": "contextvars", "_csv": "csv",
        "_functools": "functools", "_lzma": "lzma", "_pickle": "pickle", "_queue": "queue", "_random": "random", "_signal": "signal",
        "_socket": "socket", "_sqlite3": "sqlite3", "_sre": "re", "_ssl": "ssl", "_struct": "struct", "_thread": "threading",
        "_weakref": "weakref"}

ASK_WHAT = {
    "module": ("What is the Python module `{name}` for?", "Describe the module `{name}` in a few words."),
    "class": ("What is the class `{name}` in Python?", "Describe the Python class `{name}`."),
    "function": ("What does the function `{name}` do in Python?", "What is `{name}` used for?", "Explain Python's `{name}`."),
    "method": ("What does the method `{name}` do in Python?", "What is the method `{name}` used for?", "Explain the method `{name}`."),
    "property": ("What is the attribute `{name}` in Python?", "Explain the attribute `{name}`."),
}
ASK_CALL = ("How is `{name}` called?", "What is the signature of `{name}`?", "Which arguments does `{name}` take?")
ASK_WHICH = ("Which {kind} of the module `{module}` fits this description? {words}",
             "Name the {kind} in Python's `{module}` described as: {words}")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One documented thing: its kind (a key of ASK_WHAT), module, full name, signature ("" if unknown) and description."""
    kind: str
    module: str
    name: str
    signature: str
    words: str


def describe(doc, name=""):
    """The first paragraph of a docstring as one line of text, cut at a sentence's end; "" if there is nothing worth teaching.

    A first line that only repeats how `name` is called is passed over, and reStructuredText marks become plain backticks.
    """
    last = name.rpartition(".")[2]
    paragraphs = [p for p in re.split(r"\n\s*\n", inspect.cleandoc(doc or "")) if p.strip()]
    while paragraphs:
        lines = paragraphs[0].splitlines()
        while lines and last and re.match(rf"(?:\w+\.)*{re.escape(last)}\s*\(", lines[0]):
            call = lines.pop(0)
            while lines and call.count("(") + call.count("[") > call.count(")") + call.count("]"):
                call += lines.pop(0)
        if lines:
            break
        paragraphs.pop(0)
    if not paragraphs:
        return ""
    words = " ".join(" ".join(lines).split())
    words = re.sub(r"^[\w.]+\.py --? ", "", words)
    words = re.sub(r":(?:[a-z]+:)?[a-z]+:`~?([^`<]+?)(?:\s*<[^>]*>)?`", r"`\1`", words)
    words = re.sub(r"``(.+?)``", r"`\1`", words)
    if any(mark in words for mark in (">>>", " -> ", "$Id", "::", "---", "===", "Copyright", "generated from", "|")):
        return ""
    low, high = ANSWER_CHARACTERS
    if len(words) > high:
        end = max(words.rfind(mark, 0, high) for mark in (". ", "! ", "? "))
        words = words[:end + 1] if end > 0 else ""
    if len(words) < low or len(words.split()) < 4 or not re.match(r"[A-Z`'\"]", words):
        return ""  # too short, or the rest of a line whose start was no sentence
    words = words.rstrip(",;:\\ ")
    return words if words[-1] in ".!?" else words + "."


def signature_of(node, name, bound):
    """How the function of syntax tree `node` is called, as `name(arguments)` without annotations; `bound` drops self or cls; "" if it
    is no call."""
    arguments = node.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    if bound:
        first = arguments.posonlyargs or arguments.args
        if first:
            del first[0]
    elif arguments.args and arguments.args[0].arg == "self":  # a decorator makes something else of it, as typing does
        return ""
    return f"{name}({ast.unparse(arguments)})"


def _body(nodes):
    """The statements of a module or class, those inside `if` and `try` included."""
    for node in nodes:
        if isinstance(node, ast.If):
            yield from _body([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from _body([*node.body, *(n for h in node.handlers for n in h.body), *node.orelse, *node.finalbody])
        else:
            yield node


def _decorators(node):
    return {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}


def from_source(text, module):
    """Entries of the Python source `text` of `module`, in the order they stand there; raises SyntaxError if it is no Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in other people's sources
        tree = ast.parse(text)
    entries, seen = [], set()

    def visit(nodes, prefix, in_class):
        for node in _body(nodes):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            name = f"{prefix}.{node.name}"
            marks = _decorators(node)
            if name in seen or "overload" in marks or "setter" in marks:
                continue
            seen.add(name)
            words = describe(ast.get_docstring(node), name)
            if isinstance(node, ast.ClassDef):
                start = [n for n in _body(node.body) if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
                entries.append(Entry("class", module, name, signature_of(start[0], name, bound=True) if start else "", words))
                visit(node.body, name, in_class=True)
            elif marks & {"property", "cached_property"}:
                entries.append(Entry("property", module, name, "", words))
            else:
                signature = signature_of(node, name, bound=in_class and "staticmethod" not in marks)
                entries.append(Entry("method" if in_class else "function", module, name, signature, words))

    entries.append(Entry("module", module, module, "", describe(ast.get_docstring(tree), module)))
    visit(tree.body, module, in_class=False)
    return entries


def from_c(module, public):
    """Entries of the built-in functions, types and their methods of the imported `module`, which is used as `public`."""
    prefix = "" if public == "builtins" else public + "."
    entries = []

    def add(kind, name, thing):
        text = thing.__text_signature__ or ""  # as in ($self, key, default=None, /), where $ marks what the caller does not write
        signature = text and name + re.sub(r"^\(\$\w+(?:, /)?(?:, )?", "(", " ".join(text.split()))
        entries.append(Entry(kind, public, name, signature, describe(thing.__doc__ if isinstance(thing.__doc__, str) else "", name)))

    for name, thing in sorted(vars(module).items()):
        if name.startswith("_"):
            continue
        if isinstance(thing, types.BuiltinFunctionType):
            add("function", prefix + name, thing)
        elif isinstance(thing, type):
            add("class", prefix + name, thing)
            for part, member in sorted(vars(thing).items()):
                if not part.startswith("_") and isinstance(member, (types.MethodDescriptorType, types.ClassMethodDescriptorType)):
                    add("method", f"{prefix}{name}.{part}", member)
    return entries


def _is_public(module):
    return not any(part.startswith("_") or part in SKIPPED_PARTS for part in module.split("."))


def source_files(name, spec):
    """(module name, file) of the module or package `name` with import spec `spec`, submodules included, sorted by name."""
    if spec is None or not spec.has_location or not spec.origin or not spec.origin.endswith(".py"):
        return []
    file = pathlib.Path(spec.origin)
    if not spec.submodule_search_locations:
        return [(name, file)]
    found = []
    for path in file.parent.rglob("*.py"):
        parts = path.relative_to(file.parent).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found.append((".".join((name, *parts)), path))
    return sorted(found)


def collect(packages=()):
    """All entries of the standard library and of the installed `packages`, and the files that could not be parsed.

    Raises ValueError if a package is not installed or has no Python source, or if this Python comes without its sources.
    """
    stdlib = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    files = []
    for name in sorted(sys.stdlib_module_names - SKIPPED):
        if name in ALIASES or _is_public(name):
            files += source_files(name, importlib.machinery.PathFinder.find_spec(name, stdlib))
    if not files:
        raise ValueError(f"this Python has no standard library sources in {stdlib[0]}; use a Python that has them")
    for name in packages:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None  # a name with a dot would import its parent
        found = source_files(name, spec)
        if not found:
            raise ValueError(f"--packages: {name!r} is no installed package with Python sources; give the name that `import` takes")
        files += found
    entries, unread = [], []
    for module, path in files:
        module = ALIASES.get(module, module)
        if not _is_public(module):
            continue
        try:
            entries += from_source(path.read_text(encoding="utf-8"), module)
        except (SyntaxError, UnicodeDecodeError, RecursionError):
            unread.append(path)  # templates and sources of another Python; the caller names them
    for private, public in sorted(IN_C.items()):
        if importlib.util.find_spec(private) is not None:
            entries += from_c(importlib.import_module(private), public)
    return entries, unread


def _pick(options, name):
    """One of `options`, the same for the same name on every machine."""
    return options[int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(options)]


def _row(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def rows_of(entry):
    """The rows that one entry gives: none if it has no description."""
    if not entry.words:
        return []
    rows = [_row(_pick(ASK_WHAT[entry.kind], entry.name).format(name=entry.name), entry.words)]
    arguments = entry.signature[len(entry.name):]
    readable = len(entry.signature) <= SIGNATURE_CHARACTERS and "<" not in arguments and "..." not in arguments
    if readable and arguments not in ("", "()", "(*args, **kwargs)", "(*args)", "(**kwargs)"):
        rows.append(_row(_pick(ASK_CALL, entry.name).format(name=entry.name), f"`{entry.signature}`"))
    first = re.split(r"(?<=[.!?]) ", entry.words)[0]
    last = entry.name.rpartition(".")[2]
    if entry.kind in ("function", "class", "method") and len(first.split()) >= 5 and not re.search(rf"\b{re.escape(last)}\b", first, re.I):
        rows.append(_row(_pick(ASK_WHICH, entry.name).format(kind=entry.kind, module=entry.module, words=first), f"`{entry.name}`"))
    return rows


def _plain(text):
    return re.sub(r"\W+", " ", text).strip().lower()


def make(packages=()):
    """(training rows, evaluation rows, source files that could not be parsed): lists of chats and a list of paths.

    Each entry's description is used once, whichever module says it first; the order is a shuffle by content, so it is
    the same for the same set of rows and mixes modules and kinds.
    """
    entries, unread = collect(packages)
    groups, seen, asked = {}, set(), set()
    for entry in sorted(entries, key=lambda e: (e.name, e.kind)):  # sorted is stable: of two of one name, sources come before C
        words = _plain(entry.words)
        if words in seen or entry.name in seen:
            continue
        if words:
            seen.update((words, entry.name))
        for row in rows_of(entry):
            question = row["messages"][0]["content"]
            if question not in asked:  # two methods of a module may begin alike: "which one?" then has two answers
                asked.add(question)
                groups.setdefault(entry.module.partition(".")[0], []).append(row)

    def by_content(text):
        return hashlib.sha256(text.encode()).hexdigest()

    train, evaluation = [], []
    for top in sorted(groups, key=by_content):
        chosen = len(evaluation) < EVAL_ROWS and EVAL_MODULE_ROWS[0] <= len(groups[top]) <= EVAL_MODULE_ROWS[1]
        (evaluation if chosen else train).extend(groups[top])
    for rows in (train, evaluation):
        rows.sort(key=lambda row: by_content(json.dumps(row)))
    return train, evaluation, unread


def write(path, rows):
    """Write `rows` as JSON lines to `path` by a temporary file beside it and a rename: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")  # one name, so that the next run takes it over from a killed one
    with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def main():
    parser = argparse.ArgumentParser(description="Turn the documentation of the running Python into chat rows.")
    parser.add_argument("--packages", nargs="+", default=[], metavar="NAME", help="installed packages to document too, by import name")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, metavar="FOLDER", help="where the two files go; default: data")
    args = parser.parse_args()
    try:
        train, evaluation, unread = make(args.packages)
    except ValueError as error:
        print(f"quickstart/rows.py: {error}", file=sys.stderr)
        return 2
    for path in unread:
        print(f"left out, could not be parsed: {path}", file=sys.stderr)
    for name, rows in (("python-docs-train.jsonl", train), ("python-docs-eval.jsonl", evaluation)):
        write(args.out / name, rows)
        print(f"{args.out / name}: {len(rows):,} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
