"""Does llama.cpp make of a GGUF file what was trained? Its tokens, logits, loss and text beside ours.

    python bench/llamacpp.py RUN FILE.gguf [--rows=20] [--data=FILE]

RUN is what export.py was given as --ckpt. Needs llama-cpp-python, which compiles llama.cpp and so is in no requirements file:
pip install llama-cpp-python (a C++ compiler and CMake, about ten minutes on four cores). Rows are tokenised by both from the
same text; the loss is summed over supervised tokens and divided once, through llama.cpp's logits and through the adapter.
"""
import json
import pathlib
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import config as settings  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import model  # noqa: E402


def main(argv):
    words, flags, overrides = settings.command_line(argv, {"rows": "20", "data": ""})
    if len(words) != 2:
        raise ValueError("give a run and a GGUF file: python bench/llamacpp.py runs/quickstart out.gguf")
    from llama_cpp import Llama
    count = int(flags["rows"])
    overrides += [("eval.max_rows", flags["rows"]), ("eval.samples", "4")] + ([("data.eval", flags["data"])] if flags["data"] else [])
    config, adapter, folder = evaluation.configure(words[0], "", overrides)
    tokenizer = data.load_tokenizer(folder)
    rows = data.load_evaluation(config, tokenizer)
    count = min(count, len(rows))

    # llama.cpp: no BOS but the template's, special tokens in the text are special tokens
    began = time.perf_counter()
    threads = torch.get_num_threads()  # llama.cpp's wait actively: more than there are cores free are slower by far
    theirs = Llama(model_path=words[1], n_ctx=2048, n_batch=2048, logits_all=True, verbose=False, n_threads=threads, n_threads_batch=threads)
    same, nll, supervised, seconds = 0, np.zeros(count), np.zeros(count), time.perf_counter()
    logits = []
    for r in range(count):
        ids = rows.ids[rows.offsets[r]:rows.offsets[r + 1]]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found = theirs.tokenize(text.encode(), add_bos=False, special=True)
        same += found == ids.tolist()
        theirs.reset()
        theirs.eval(ids.tolist())
        scores = np.array(theirs.scores[:len(ids)], dtype=np.float64)
        mask = rows.supervised[rows.offsets[r]:rows.offsets[r + 1]]
        at = np.flatnonzero(mask)
        log_z = np.logaddexp.reduce(scores[at - 1], axis=1)
        nll[r], supervised[r] = (log_z - scores[at - 1, ids[at]]).sum(), len(at)
        logits.append(torch.from_numpy(scores[:128]).float())
    seconds = time.perf_counter() - seconds
    print(f"llama.cpp: {count} rows in {seconds:.1f} s", file=sys.stderr)

    network = model.load(config, "cuda" if torch.cuda.is_available() else "cpu")
    model.set_adapters(model.adapters(network), adapter, str(folder))
    figures, by_row = evaluation.evaluate(network, rows, count, 2048)
    network.adapter_memory.refresh()
    network.eval()
    off, first = [], []
    with torch.no_grad(), model.own_attention(network):
        for r in range(min(4, count)):
            ids = torch.tensor(rows.ids[rows.offsets[r]:rows.offsets[r + 1]][:128].tolist())
            ours, other = network(input_ids=ids[None], use_cache=False).logits[0].float(), logits[r]
            ours, other = ours - ours.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True)
            off.append(((ours - other).norm() / ours.norm()).item())
            first.append((ours.argmax(-1) == other.argmax(-1)).float().mean().item())
    prompts = data.prompts(config, tokenizer)
    samples = evaluation.generate(network, tokenizer, prompts, 48, data.end_of_turn(tokenizer))
    texts = []
    for prompt in prompts:
        theirs.reset()
        new = []
        for token in theirs.generate(prompt["ids"], temp=0.0, repeat_penalty=1.0):
            if token == theirs.token_eos() or len(new) == 48:
                break
            new.append(token)
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    told = {
        "file": pathlib.Path(words[1]).name, "rows": count, "rows with the same tokens": same,
        "loss, llama.cpp": round(nll.sum() / supervised.sum(), 4), "loss, adapter": round(figures["loss"], 4),
        "largest difference of a row, nats a token": round(float(np.abs((nll - by_row["nll"]) / supervised).max()), 4),
        "logits differ by": round(float(np.mean(off)), 4), "same token first": round(float(np.mean(first)), 4),
        "same greedy texts": sum(text == sample["text"] for text, sample in zip(texts, samples)), "of": len(samples),
        "texts": texts, "ours": [sample["text"] for sample in samples],
        "seconds, llama.cpp": round(seconds, 1), "seconds in all": round(time.perf_counter() - began, 1)}
    print(json.dumps(told, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    settings.run_command(main)
