# Each target makes the environment it needs. Nothing is installed outside .venv.

PYTHON ?= python3
# Where torch is looked for first: PyTorch's own index has the small CPU builds.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# A worker for each core; a file's tests stay together, for they share projects.
PARALLEL := --numprocesses logical --dist loadfile
BIN := .venv/bin
PINS := src/edgetune/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint bench matrix examples docs lock audit

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  PYTHON=command makes .venv with another Python, TORCH_INDEX=url takes torch from another index.'

setup: .venv/.ready ## Make .venv with edgetune and all it is tested with

demo: setup ## Start a project in demo/my-slm, fine-tune it and ask it: offline, on the CPU
	@test -d demo/my-slm || $(BIN)/copier copy --quiet --defaults --vcs-ref HEAD "$(CURDIR)" demo/my-slm
	@$(MAKE) --no-print-directory -C demo/my-slm VENV="$(CURDIR)/.venv" finetune
	@$(MAKE) --no-print-directory -C demo/my-slm VENV="$(CURDIR)/.venv" infer
	@echo "The int4 model is in demo/my-slm/gen-model/onnx; the project is yours to change: cd demo/my-slm && make help"

test: setup ## Run the tests (a few minutes)
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: setup ## Run the tests that make environments and run stock Olive
	$(BIN)/python -m pytest $(PARALLEL) -m slow

lint: setup ## Check style and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: setup ## Print speed and memory beside peers, which are installed first
	set -e; for name in data startup merge export training inference preflight; do \
	  $(BIN)/python tests/benchmarks/$$name.py; \
	done

matrix: setup ## Run all architectures and write the table in docs/architectures.md
	$(BIN)/python tests/matrix.py

examples: setup ## Render examples/ anew, with the answers beside each
	set -e; for answers in examples/*.yml; do \
	  $(BIN)/copier copy --quiet --defaults --overwrite --vcs-ref HEAD --exclude .copier-answers.yml \
	    --data-file "$$answers" "$(CURDIR)" "$${answers%.yml}"; \
	done

docs: setup ## Write the generated parts of docs/cli.md and docs/configuration.md
	$(BIN)/python tests/reference_pages.py

lock: setup ## Write the template's requirements.lock anew, with the newest packages that go with constraints.txt
	$(BIN)/python tests/lock.py

audit: setup ## Look all locked versions up in the index's list of known vulnerabilities
	sed '/^{%/d' template/setup/requirements.lock.jinja | \
	  $(BIN)/uvx pip-audit --strict --no-deps --disable-pip -r /dev/stdin -r $(PINS)

# The fallback is for networks that reach a package mirror but not PyTorch's index.
.venv/.ready: pyproject.toml $(PINS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	torch="$$(grep '^torch==' $(PINS))" && \
	{ $(BIN)/python -m pip install --quiet --no-deps --retries 0 --timeout 5 --index-url "$(TORCH_INDEX)" "$$torch" || \
	  $(BIN)/python -m pip install --quiet "$$torch"; }
	$(BIN)/python -m pip install --quiet --constraint $(PINS) --group dev --editable '.[qlora,export,olive,azureml]'
	@touch .venv/.ready
