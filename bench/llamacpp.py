"""Does llama.cpp make of a GGUF file what was trained? Its tokens, logits, loss and text beside ours.

    python bench/llamacpp.py RUN FILE.gguf [--rows=20] [--data=FILE]

RUN is what export.py was given as --ckpt. Needs llama-cpp-python, which compiles llama.cpp and so is in no requirements file:
pip install llama-cpp-python (a C++ compiler, CMake, and minutes). Rows are tokenised by both from the
same text; the loss is summed over supervised tokens and divided once, through llama.cpp's logits and through the adapter.
"""
import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import config as settings  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import attention
import lora_layers
import model  # noqa: E402


TOKENS = 48  # of a sample


def by_llama(theirs, rows, count, tokenizer):
    """llama.cpp over `count` rows: (rows it tokenises alike, nats of each, supervised tokens of each, logits of their first tokens)."""
    same, nll, supervised, logits = 0, np.zeros(count), np.zeros(count), []
    for r in range(count):
        ids = rows.ids[rows.offsets[r]:rows.offsets[r + 1]]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # no BOS but the template's; special tokens in the text are special tokens
        same += theirs.tokenize(text.encode(), add_bos=False, special=True) == ids.tolist()
        theirs.reset()
        theirs.eval(ids.tolist())
        scores = np.array(theirs.scores[:len(ids)], dtype=np.float64)
        at = np.flatnonzero(rows.supervised[rows.offsets[r]:rows.offsets[r + 1]])
        nll[r] = (np.logaddexp.reduce(scores[at - 1], axis=1) - scores[at - 1, ids[at]]).sum()
        supervised[r] = len(at)
        logits.append(torch.from_numpy(scores[:128]).float())
    return same, nll, supervised, logits


@torch.no_grad()
def apart(network, rows, logits):
    """(norm of the difference over that of ours, share of places with the same token first), means over the first four rows."""
    off, first = [], []
    for r, other in enumerate(logits[:4]):
        ids = torch.tensor(rows.ids[rows.offsets[r]:rows.offsets[r + 1]][:128].tolist())
        ours = network(input_ids=ids[None], use_cache=False).logits[0].float()
        ours, other = ours - ours.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True)
        off.append(((ours - other).norm() / ours.norm()).item())
        first.append((ours.argmax(-1) == other.argmax(-1)).float().mean().item())
    return np.mean(off), np.mean(first)


def continued(theirs, ids):
    """The token ids that llama.cpp goes on with, greedily."""
    theirs.reset()
    new = []
    for token in theirs.generate(ids, temp=0.0, repeat_penalty=1.0):
        if token == theirs.token_eos() or len(new) == TOKENS:
            break
        new.append(token)
    return new


def main(argv):
    words, flags, overrides = settings.command_line(argv, {"rows": "20", "data": ""})
    if len(words) != 2:
        raise ValueError("give a run and a GGUF file: python bench/llamacpp.py runs/quickstart out.gguf")
    try:
        from llama_cpp import Llama
    except ImportError:
        raise ValueError("llama-cpp-python is not installed, and is no part of the requirements, since it compiles: "
                         "pip install llama-cpp-python") from None
    overrides += [("eval.max_rows", flags["rows"]), ("eval.samples", "4")] + ([("data.eval", flags["data"])] if flags["data"] else [])
    config, adapter, folder = evaluation.configure(words[0], "", overrides)
    tokenizer = data.load_tokenizer(folder)
    rows = data.load_evaluation(config, tokenizer)
    count = min(int(flags["rows"]), len(rows))

    threads = torch.get_num_threads()  # llama.cpp's wait actively: more than there are cores free are slower by far
    theirs = Llama(words[1], n_ctx=2048, n_batch=2048, logits_all=True, verbose=False, n_threads=threads, n_threads_batch=threads)
    same, nll, supervised, logits = by_llama(theirs, rows, count, tokenizer)

    network = model.load(config, "cuda" if torch.cuda.is_available() else "cpu")
    lora_layers.set_adapters(lora_layers.adapters(network), adapter, str(folder))
    figures, by_row = evaluation.evaluate(network, rows, count, 2048)
    network.adapter_memory.refresh()
    network.eval()
    with attention.own_attention(network):
        off, first = apart(network, rows, logits)
    prompts = data.prompts(config, tokenizer)
    samples = evaluation.generate(network, tokenizer, prompts, TOKENS, data.end_of_turn(tokenizer))
    texts = [tokenizer.decode(continued(theirs, prompt["ids"]), skip_special_tokens=True) for prompt in prompts]
    print(json.dumps({
        "file": pathlib.Path(words[1]).name, "rows": count, "rows with the same tokens": same,
        "loss, llama.cpp": round(nll.sum() / supervised.sum(), 4), "loss, adapter": round(figures["loss"], 4),
        "largest difference of a row, nats a token": round(float(np.abs((nll - by_row["nll"]) / supervised).max()), 4),
        "logits differ by": round(float(off), 4), "same token first": round(float(first), 4),
        "same greedy texts": sum(text == sample["text"] for text, sample in zip(texts, samples)), "of": len(samples),
        "texts": texts, "ours": [sample["text"] for sample in samples]}, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    settings.run_command(main)
