"""What a model folder from a stranger may make this program do: be read as data, within bounds, and nothing else.

Checked before anything in the folder is used: that no link leads out of it, that no file asks to run code, that JSON and
safetensors headers are of a sane size and mean one thing, that sizes in config.json are ones that its weights can have, and
that the chat template, which is a program, ends: it is rendered once in a child process under a time and a memory limit.
Pickled files may lie in a folder; nothing opens them. Leaves out: checkpoints (checkpoint.py has stricter rules of its own),
and whether a model is any good. A template that loops on some chats and not on the small one tried here is not found.
"""
import functools
import json
import math
import os
import pathlib
import resource
import select
import signal
import time

LARGEST_JSON = 64 << 20    # bytes: tokenizer.json of a large vocabulary has 35 MiB
LARGEST_HEADER = 32 << 20  # bytes: 36,000 tensors have a header of 6 MiB
LARGEST_NUMBER = 1 << 31   # in config.json
LARGEST_SIZE = 1 << 24     # in config.json: a width, a vocabulary, a count of heads
SECONDS = 10               # that a template may take for a chat of two words
LARGEST_TEXT = 1 << 20     # characters that it may make of it
MEMORY = 1 << 30           # bytes that it may take beyond what is in use
PROBE = [{"role": "user", "content": "plugh"}, {"role": "assistant", "content": "xyzzy"}]


def _once(pairs):
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:100]!r} stands twice")
    return dict(pairs)


def read_json(path):
    """The object in a JSON file. Raises ValueError naming the file: too large, not JSON, a key twice, no object."""
    path = pathlib.Path(path)
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; no such file needs more than {LARGEST_JSON:,}; copy or fetch it again")
    return _object(path.read_bytes(), path)


def _object(content, path):
    try:
        tree = json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path}: not valid JSON ({error}); copy or fetch it again") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(tree).__name__}")
    return tree


def tensor_shapes(path):
    """{name: shape} from the header of a safetensors file, read without the library and without the tensors.

    Raises ValueError for a header that is too large, is cut short, names a tensor twice, or claims other bytes than the file has.
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise ValueError(f"{path}: not a whole safetensors file (its header claims {length:,} bytes; at most {LARGEST_HEADER:,}, and "
                             "what the file has, are read); copy or fetch it again")
        header = _object(file.read(length), path)
    shapes, end = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            shapes[name], (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            sane = all(type(n) is int and 0 <= n for n in (*shapes[name], start, stop)) and start <= stop <= size - 8 - length
        except (TypeError, KeyError, ValueError):
            sane = False
        if not sane or math.prod(shapes[name]) > 8 * max(1, stop - start):  # no dtype has less than a bit an element
            raise ValueError(f"{path}: the header's entry of {name[:100]!r} is not one of a whole safetensors file; copy or fetch it again")
        end = max(end, stop)
    if end != size - 8 - length:
        raise ValueError(f"{path}: holds {size - 8 - length:,} bytes of tensors where its header describes {end:,}: "
                         "cut short or changed; copy or fetch it again")
    return shapes


def check_folder(folder):
    """Refuse a model folder with a link that leads out of it, a config.json that asks for code, or sizes that are no model's.

    A hub's cache is made of links into its own blobs/ folder, which is allowed. Raises ValueError naming the file.
    """
    folder = pathlib.Path(folder)
    templates = folder / "additional_chat_templates"  # the one folder in it that transformers reads
    allowed = [folder.resolve()] + [folder.resolve().parent.parent / "blobs"] * (folder.resolve().parent.name == "snapshots")
    for path in (*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise ValueError(f"{path}: a link that leads out of the model folder, which is never followed; put the file itself there")
        if path.suffix in (".json", ".jinja") and path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{path}: {path.stat().st_size:,} bytes; no such file needs more than {LARGEST_JSON:,}")
    if (folder / "config.json").is_file():
        _check_config(read_json(folder / "config.json"), folder / "config.json")


def _check_config(tree, path):
    if "auto_map" in tree:
        raise ValueError(f"{path}: auto_map asks to run code from the model folder, which is never done; "
                         "use a model whose architecture transformers has")
    for name, value in tree.items():
        largest = LARGEST_SIZE if name.endswith(("_size", "_dim", "_heads", "_layers", "_embd", "_inner")) else LARGEST_NUMBER
        if name == "sliding_window" and not (value is None or type(value) in (int, bool)):  # transformers takes it as it is
            raise ValueError(f"{path}: {name} = {json.dumps(value)[:100]}, and a window is a whole number; copy or fetch it again")
        if isinstance(value, dict):
            _check_config(value, path)
        elif type(value) in (int, float) and not abs(value) <= largest:
            raise ValueError(f"{path}: {name} = {value}, beyond what any model has; copy or fetch it again")


def check_sizes(tree, tensors, path):
    """Refuse a config.json that asks for more layers than its files have tensors, before an architecture is built of them."""
    for name, value in tree.items():
        if isinstance(value, dict):
            check_sizes(value, tensors, path)
        elif name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") and type(value) is int and value > tensors:
            raise ValueError(f"{path}: {name} = {value:,}, but the folder's files hold {tensors:,} tensors; "
                             "config.json and weights do not belong together")


@functools.lru_cache(maxsize=16)
def _try(template, render):
    """Render PROBE in a child process; returns what went wrong, '' if nothing did. render is the same for the same template."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with open("/proc/self/statm") as file:
                in_use = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 1))
            try:
                said = b"long" if len(render()) > LARGEST_TEXT else b"ends"
            except MemoryError:
                said = b"memory"
            except Exception:  # what it is, is told where a row is rendered
                said = b"ends"
            os.write(writing, said)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        deadline = time.monotonic() + SECONDS
        ready, _, _ = select.select([reading], [], [], SECONDS)
        said = os.read(reading, 16) if ready else b""
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if said == b"ends":
        return ""
    if time.monotonic() >= deadline:
        return f"did not end within {SECONDS} s"
    return {b"long": f"wrote more than {LARGEST_TEXT:,} characters"}.get(said, f"needed more than {MEMORY >> 20:,} MiB")


def try_template(tokenizer):
    """Refuse a chat template that does not end, or grows without bound, on a chat of two words.

    A template is a program that came with the model. transformers keeps it in a sandbox; this bounds its time and memory.
    Raises ValueError. What a template refuses by itself is left to the rows that it refuses.
    """
    template = tokenizer.chat_template
    if template is None:
        return
    render = _Render(json.dumps(template), tokenizer)
    problem = _try(render.key, render)
    if problem:
        raise ValueError(f"data.chat_template: the chat template that came with the model {problem}, rendering a chat of two words in a "
                         "process of its own; give another one with data.chat_template=FILE")


class _Render:
    """A call that is equal to another one for the same template, so that a template is tried once a process."""

    def __init__(self, key, tokenizer):
        self.key, self.tokenizer = key, tokenizer

    def __eq__(self, other):
        return self.key == other.key

    def __hash__(self):
        return hash(self.key)

    def __call__(self):
        return self.tokenizer.apply_chat_template(PROBE, tokenize=False)
