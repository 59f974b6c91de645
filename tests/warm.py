"""What a forked child of the fault tests finds already done: everything imported, one short run behind it, one thread, no GPU.

multiprocessing's fork server imports this once; every child is a copy of it, so that a process to be killed costs a third
of a second. No test process forks by itself: it may have threads or a GPU by then, which a copy cannot use.
"""
import contextlib
import io
import logging
import os
import pathlib
import signal
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""

from conftest import make_inputs, settings_of  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402

torch.set_num_threads(1)
for library in ("bitsandbytes", "transformers", "datasets", "huggingface_hub"):
    logging.getLogger(library).setLevel(logging.ERROR)
before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    settings = settings_of(make_inputs(pathlib.Path(folder)), pathlib.Path(folder) / "settings.json")
    assert train.main([str(settings), f"--out={folder}/run", "--train.max_steps=1", "--schedule.lr_warmup_steps=0", "--log.tensorboard=true"]) == 0
for number, handler in before.items():
    signal.signal(number, handler)
