"""How a report writes: Markdown that also reads well as plain text on a console of 80 columns.

Leaves out: what there is to say (report.py).
"""
import json
import pathlib
import re
import textwrap
import unicodedata

WIDTH = 80


def visible(text):
    """Text without control characters, which could do things to a console."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "�" for c in text.replace("\r\n", "\n"))


def plain(text):
    """Text as it shall be read, on one line: nothing in it is taken for Markdown or HTML."""
    text = " ".join(visible(str(text)).split())
    return re.sub(r"([\\`*<\[~$|&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)


def prose(text, bullet=""):
    """Markdown as a paragraph, or with bullet "- " as an item of a list: lines of at most 80, none by chance like a list or a heading."""
    lines = textwrap.wrap(text, WIDTH - 1, initial_indent=bullet, subsequent_indent=" " * len(bullet), break_long_words=False,
                          break_on_hyphens=False)
    begun = [re.sub(r"^( *)(\d{1,9})([.)])(?= |$)", r"\1\2\\\3", re.sub(r"^( *)([-+#>=]+)(?= |$)", r"\1\\\2", line)) for line in lines[1:]]
    return "\n".join(lines[:1] + begun)


def paragraphs(*parts):
    """Those of the parts that are not empty, a blank line between them."""
    return "\n\n".join(part for part in parts if part)


def columns_of(text):
    """Columns that a text takes on a console: two for wide characters, none for combining ones."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fitting(text, width):
    """Characters of `text` that surely fit into `width` columns: half as many where it has wide ones."""
    return width if all(columns_of(c) < 2 for c in set(text)) else width // 2


def padded(text, width):
    return text + " " * (width - columns_of(text))


def table(head, rows):
    """A Markdown table whose columns also line up where it is read as text."""
    rows = [[str(value) for value in row] for row in [head, *rows]]
    widths = [max(3, *map(columns_of, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(padded, row, widths)) + " |" for row in rows)


def wrapped(text, width):
    """Lines of at most `width` columns. Spaces within a line stay, since the text may be code."""
    lines = []
    for line in text.expandtabs(4).splitlines() or [""]:
        while columns_of(line) > width:
            fits = max(1, next(i for i in range(len(line) + 1) if columns_of(line[:i + 1]) > width))
            space = line.rfind(" ", 0, fits + 1)
            cut = space if line[:max(space, 0)].strip() else fits
            lines.append(line[:cut])
            line = line[cut:].lstrip()
        lines.append(line)
    return lines


def side_by_side(title, columns):
    """A code block with `title` over texts in columns, {heading: text}: as code they stay beside each other, and are no Markdown."""
    width = (WIDTH - 2 * len(columns)) // len(columns)
    cells = [[heading, "-" * width, *wrapped(visible(text), width)] for heading, text in columns.items()]
    rows = ["  ".join(padded(cell[i] if i < len(cell) else "", width) for cell in cells).rstrip() for i in range(max(map(len, cells)))]
    body = "\n".join([*wrapped(visible(title), WIDTH), "", *rows])
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", body)), default=0))
    return f"{fence}text\n{body}\n{fence}"


def code(value):
    """A setting's value as code; what would break out of it as escaped text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return plain(text) if "`" in text or "|" in text or not text.strip() else "`" + " ".join(visible(text).split()) + "`"


def short(name):
    """A file or model name without the folders of the machine it lay on."""
    return "/".join(pathlib.PurePath(str(name)).parts[-2:]) if name else "none"


def number(value, form=".4g"):
    """A number as `form` says; a dash where there is none, and text as it is."""
    return "–" if value is None or value != value else f"{value + 0:{form}}" if type(value) in (int, float) else plain(value)


def count(n, what):
    """'1 step', '2,000 steps', '3 losses'."""
    return f"{n:,} {what}{'' if n == 1 else 'es' if what.endswith('s') else 's'}"


def listed(values, longest=5):
    """'3, 17, 20 and 4 more'."""
    shown = ", ".join(f"{value:,}" if type(value) is int else str(value) for value in values[:longest])
    return shown + (f" and {len(values) - longest:,} more" if len(values) > longest else "")


def moved(first, last, form=".4f"):
    """How a figure changed, in words."""
    return f"stayed at {last:{form}}" if first == last else f"{'fell' if last < first else 'rose'} from {first:{form}} to {last:{form}}"


def duration(seconds):
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
