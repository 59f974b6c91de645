"""train.py with a planted fault: the graph begins behind the last layer, so that every gradient is exactly zero.

    python bench/cut.py configs/seed-failure.json [as train.py]
    python bench/cut.py configs/seed-failure.json --proof.enabled=false --alerts.stop=[]      to the end, unguarded

The loss is right, and no step teaches anything: what `enable_input_require_grads` does in the wrong place. Trainer, record and
guards are the project's own; only model.hidden_states is replaced, by bench/zoo.py's fault. Leaves out: every other fault (zoo.py).
"""
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as train.py does

import model
import train
import zoo

model.hidden_states = zoo.cut_everything(model.hidden_states)

if __name__ == "__main__":
    train.settings.run_command(train.main)
