"""Shared by all tests: the project on the path, no network, few threads, and tiny model folders made on the spot."""
import atexit
import logging
import os
import pathlib
import shutil
import socket
import sys
import tempfile

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
                  TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="rawlora-tests-")  # token caches of tests, removed with the last of them
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# --hypothesis-profile=default looks elsewhere each time
hypothesis.settings.register_profile("same each time", derandomize=True, database=None)
hypothesis.settings.load_profile("same each time")

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # two workers on two cores
# pytest keeps what is logged, with it an exception, its frames, and the lock of a run that is over
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

COMMON = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=320,
              max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SHAPES = {  # what differs from COMMON, by transformers' model_type
    "llama": {},
    "mistral": dict(sliding_window=8),
    "qwen2": dict(use_sliding_window=False),
    "qwen3": dict(head_dim=32),
    "gemma2": dict(head_dim=32, sliding_window=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0, query_pre_attn_scalar=20,
                   tie_word_embeddings=True),
    "gemma3_text": dict(head_dim=32, sliding_window=8, query_pre_attn_scalar=20, num_hidden_layers=3,
                        layer_types=["sliding_attention", "full_attention", "sliding_attention"], tie_word_embeddings=True),
}


def make_model(folder, kind="llama", dtype=torch.float32, seed=0, **changes):
    """Save a tiny random model of transformers' `kind` into `folder` and return transformers' own instance (eval mode, eager attention)."""
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(kind, **{**COMMON, **SHAPES[kind], **changes})
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in network.named_parameters():  # a fresh model's biases and norms are 0 and 1, which would hide their loss
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "proj" in name:
                parameter.mul_(3)
    network = network.to(dtype).eval()
    network.save_pretrained(folder)
    return network


@pytest.fixture(scope="session", params=list(SHAPES))
def tiny(request, tmp_path_factory):
    """(kind, folder, transformers' model in fp32) for each architecture."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, make_model(folder, request.param)


def packed(documents, supervised):
    """A micro-batch as data.pack makes it, written out by hand: documents are 1-D id tensors, supervised are bool tensors of the
    same lengths."""
    import types
    starts = [sum(len(d) for d in documents[:i]) for i in range(len(documents) + 1)]
    places = [(start, i, d) for start, d, mask in zip(starts, documents, supervised) for i in range(1, len(d)) if mask[i]]
    return types.SimpleNamespace(input_ids=torch.cat(documents), position_ids=torch.cat([torch.arange(len(d)) for d in documents]),
                                 cu_seqlens=torch.tensor(starts, dtype=torch.int32), max_seqlen=max(len(d) for d in documents),
                                 rows=torch.tensor([start + i - 1 for start, i, _ in places], dtype=torch.int64),
                                 targets=torch.tensor([int(d[i]) for _, i, d in places], dtype=torch.int64))


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_tokenizer(folder):
    """Save a tokenizer with a token a byte, three special tokens and a ChatML template; its 259 ids fit the tiny models."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    pieces = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>", chat_template=CHATML)
    fast.save_pretrained(folder)


def make_inputs(folder):
    """Put into `folder` all that a run needs, and that runs in a second: model/, train.jsonl (23 ragged chats), eval.jsonl (6 others)."""
    import json
    make_model(folder / "model", initializer_range=0.1)  # a head that can be sure of something
    make_tokenizer(folder / "model")
    words = ["red", "green", "blue", "grey", "violet", "orange"]
    chats = [[{"role": "user", "content": f"{words[i % 6]} {i}" + "?" * (i % 5)},
              {"role": "assistant", "content": " ".join([words[i % 6]] * (1 + i % 3))}] for i in range(29)]
    for name, part in (("train.jsonl", chats[:23]), ("eval.jsonl", chats[23:])):
        (folder / name).write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in part), encoding="utf-8")
    return folder


def settings_of(inputs, path):
    """Write the settings of a tiny run over `make_inputs`' folder to `path`, and return that."""
    import json
    tiny = {"model": {"path": str(inputs / "model")}, "data": {"train": str(inputs / "train.jsonl"), "eval": str(inputs / "eval.jsonl")},
            "lora": {"r": 4, "alpha": 8.0}, "train": {"micro_batch_size": 2, "accumulation": 2, "max_steps": 8},
            "schedule": {"learning_rate": 1e-2, "lr_min": 1e-3, "lr_warmup_steps": 2},
            "eval": {"every_steps": 4, "samples": 1, "max_new_tokens": 3, "unquantised": "no"}, "save": {"every_steps": 4},
            "log": {"every_steps": 4, "tensorboard": False, "report": False}, "proof": {"enabled": False}}
    path.write_text(json.dumps(tiny))
    return path


@pytest.fixture(scope="session")
def tiny_inputs(tmp_path_factory):
    """A folder with all that a run needs (make_inputs)."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


class After(list):
    """Something that is empty when it is first asked, and no longer after `number` times."""

    def __init__(self, number):
        self.left = number

    def __bool__(self):
        self.left -= 1
        return self.left < 0


def rows_of(lengths, seed=0, supervised_share=0.5):
    """data.Rows of random tokens in the given lengths, their first token unsupervised and their last supervised."""
    import numpy as np
    import data
    generator = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    supervised = generator.random(offsets[-1]) < supervised_share
    supervised[offsets[:-1]] = False
    supervised[offsets[1:] - 1] = True
    names = [str(i) for i in range(len(lengths))]
    return data.Rows(generator.integers(3, 320, offsets[-1]).astype(np.int32), offsets, supervised, names, {}, "")


WATCHED = ("seconds", "per_second", "memory_gib")  # what depends on the clock; proof/ depends on where a process began


def free_port():
    """A TCP port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def curve(run):
    """Every step of a run but what depends on the clock; evaluations and generated samples are in it."""
    import record
    told = lambda tag: not tag.endswith(WATCHED) and not tag.startswith(("proof/", "startup/"))
    return [{tag: value for tag, value in line.items() if told(tag)} for line in record.read_metrics(run)]


def newest(run):
    import checkpoint
    return checkpoint.load(checkpoint.newest_valid(run)[0])


def differences(a, b):
    """What two runs do not share, by name: steps, evaluations, final adapter, optimizer, generators, state. [] says that they are the
    same run."""
    import record
    found = [f"step {x['step']}: {sorted(tag for tag in x.keys() | y.keys() if str(x.get(tag)) != str(y.get(tag)))}"
             for x, y in zip(curve(a), curve(b)) if str(x) != str(y)]
    found += [f"{len(curve(a))} steps and {len(curve(b))}"] * (len(curve(a)) != len(curve(b)))
    rows = [{name: ({key: values.tolist() for key, values in arrays.items()}, metadata)
             for name, (arrays, metadata) in record.read_evaluations(folder).items()} for folder in (a, b)]
    found += [f"evaluations: {name}" for name in rows[0].keys() | rows[1].keys() if rows[0].get(name) != rows[1].get(name)]
    a, b = newest(a), newest(b)
    for saved in (a, b):
        saved["state"]["plan"].pop("why", None)  # "as the run began" where it went on
    for file in a["tensors"].keys() | b["tensors"].keys():
        mine, theirs = a["tensors"].get(file, {}), b["tensors"].get(file, {})
        found += [f"{file}: {name}" for name in mine.keys() | theirs.keys()
                  if not (name in mine and name in theirs and torch.equal(mine[name], theirs[name]))]
    return found + [f"state: {name}" for name in a["state"].keys() | b["state"].keys()
                    if name not in ("line", "accepted") and a["state"].get(name) != b["state"].get(name)]


def make_config(folder, quant="none", dtype="fp32", lora=None, **sections):
    """A config.Config for a tiny model: unquantised fp32 with adapters of rank 4 on all seven projections, unless told otherwise."""
    import config
    model = {"path": str(folder), "quant": quant, "compute_dtype": dtype, **sections.pop("model", {})}
    return config.from_dict({"model": model, "lora": {"r": 4, "alpha": 8, **(lora or {})}, **sections})
