# Sagittal. `make` alone lists what there is.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
SERVERS := rabbitmq mongod s3 dcmtk
# What to hand to the program behind a target: make test ARGS="-k store -x"
ARGS ?=

.PHONY: help setup run cluster test check fmt bench k8s-check lock clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/' | expand -t 16

setup: $(VENV)/.sagittal-run ## Make .venv with what the archive needs (quick the second time)

run: setup ## Set up and run the embedded archive here; Ctrl-C stops it
	@exec $(BIN)/sagittal up $(ARGS)

cluster: $(VENV)/.sagittal-test ## The distributed form on this machine: RabbitMQ, mongod, S3, a process per service
	@$(BIN)/python -m cli.servers.install rabbitmq mongod s3
	@exec $(BIN)/sagittal cluster $(ARGS)

test: $(VENV)/.sagittal-test ## Set up and run the whole suite, against real servers (ARGS goes to pytest)
	$(BIN)/python -m cli.servers.install $(SERVERS)
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.sagittal-test ## Lint, format, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/mypy --strict deploy/k8s/check.py
	$(BIN)/lint-imports

fmt: $(VENV)/.sagittal-test ## Put the code into its format, and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.sagittal-test ## Side by side with Orthanc and storescp on this machine
	$(BIN)/python -m tests.bench.run $(ARGS)

k8s-check: $(VENV)/.sagittal-test ## Build the Kubernetes manifests; try them on an API server where there is one
	$(BIN)/python deploy/k8s/check.py

lock: $(VENV)/.sagittal-run ## Resolve the dependencies again into requirements.lock (ARGS=--upgrade for newer ones)
	$(BIN)/uv pip compile --universal --all-extras --no-emit-index-url --no-header pyproject.toml -o requirements.lock $(ARGS)

clean: ## Remove .venv and what tools left; your ./data stays
	rm -rf $(VENV) .run build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	find cli libs services tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The first Python that is new enough makes the environment; without one, or without its venv module, uv does.
$(BIN)/uv:
	@good=""; \
	for python in $${PYTHON:-python3.11 python3.12 python3.13 python3}; do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then good="$$python"; break; fi; \
	done; \
	if [ -n "$$good" ]; then \
	  echo "Making $(VENV) with $$("$$good" --version)"; "$$good" -m venv $(VENV); \
	elif command -v uv >/dev/null; then \
	  echo "Making $(VENV) with uv (no Python 3.11 with the venv module here)"; uv venv --quiet --seed --python '>=3.11,<3.14' $(VENV); \
	else \
	  echo "Sagittal needs Python 3.11 or newer with its venv module, and this machine has none." >&2; \
	  echo "  Debian, Ubuntu:  apt install python3.11 python3.11-venv   (or python3 python3-venv)" >&2; \
	  echo "  anywhere:        install uv (https://docs.astral.sh/uv/), which brings a Python along" >&2; \
	  echo "  elsewhere:       make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi
	@$(BIN)/python -m pip install --quiet 'uv>=0.5'

# uv is quick; where it cannot reach the index (a proxy's own certificate, say), pip does the same from the same lock.
define install
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -c requirements.lock -e '.[$(EXTRAS)]' \
	|| { echo "uv could not install; trying pip"; $(BIN)/python -m pip install --quiet -c requirements.lock -e '.[$(EXTRAS)]'; }
	@touch $@
endef

$(VENV)/.sagittal-run: EXTRAS := embedded
$(VENV)/.sagittal-run: pyproject.toml requirements.lock | $(BIN)/uv
	$(install)

$(VENV)/.sagittal-test: EXTRAS := embedded,test,bench
$(VENV)/.sagittal-test: pyproject.toml requirements.lock | $(BIN)/uv
	$(install)
	@touch $(VENV)/.sagittal-run
