# Each target is one line that a person could type; `make help` lists them. Works with GNU make 3.81 and later.
UV = .venv/bin/uv
UV_VERSION = 0.13.9
RUN = .venv/bin
# As pip does: a company's own certificate authority is in the system's store alone.
export UV_SYSTEM_CERTS ?= true
OLD_PYTHON = Safelight needs Python 3.11 or later (with venv): install it, or name one: make PYTHON=/path/to/python3
NO_WHEEL = The dependencies could not be installed; the lines above name the package that has no wheel here, or the network

PYTHON = $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BROKER = valkey
REQUESTS = 10000
SEED = 1
MINUTES = 60

.DEFAULT_GOAL = help
.PHONY: help up worker demo test check format chaos soak overload bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

up: .venv/.run ## run the system on PORT (8080): broker, gateway, one worker per core; Ctrl-C ends it
	@exec $(RUN)/safelight up

worker: .venv/.run ## add a worker to the running system
	@exec $(RUN)/safelight worker

demo: .venv/.run ## watch it: a request, a second worker, a killed worker, the saved mirror
	@exec $(RUN)/python examples/demo.py

# Two files at a time: most tests wait, for leases, sessions and servers.
test: .venv/.dev ## run the tests
	$(RUN)/pytest -n 2 --dist loadfile

check: .venv/.dev ## format, lint, types, direction of imports
	$(RUN)/ruff format --check && $(RUN)/ruff check && $(RUN)/mypy && $(RUN)/lint-imports

format: .venv/.dev ## put the code in its format
	$(RUN)/ruff format && $(RUN)/ruff check --fix

chaos: .venv/.dev ## break a whole system 50 times under load and count: BROKER=valkey, redis, rabbitmq or kafka
	@PYTHONPATH=tests $(RUN)/python -m chaos --broker $(BROKER) --requests $(REQUESTS) --seed $(SEED)

soak: .venv/.dev ## run a whole system for MINUTES (60) under load, and see whether anything grows
	@PYTHONPATH=tests $(RUN)/python -m chaos.long_run --minutes $(MINUTES)

overload: .venv/.dev ## offer a whole system ten times what it can do, then big and small images together
	@PYTHONPATH=tests $(RUN)/python -m chaos.overload

bench: .venv/.dev ## measure it beside the bare codec and what others would write (needs wrk and redis-server)
	@$(UV) sync -q --locked --inexact --all-extras --group bench
	$(RUN)/python benchmarks/bench.py && $(RUN)/python benchmarks/scale.py

clean: ## remove what make made; saved images stay
	rm -rf .venv benchmarks/baselines/.venv .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(UV): Makefile
	@test -n '$(PYTHON)' || { echo '$(OLD_PYTHON)' >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv && .venv/bin/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION) \
		|| { rm -rf .venv; echo '$(NO_WHEEL)' >&2; exit 1; }

.venv/.run: $(UV) uv.lock pyproject.toml
	@$(UV) sync -q --locked --inexact --no-dev || { echo '$(NO_WHEEL)' >&2; exit 1; }
	@touch $@

.venv/.dev: $(UV) uv.lock pyproject.toml
	@$(UV) sync -q --locked --inexact --all-extras || { echo '$(NO_WHEEL)' >&2; exit 1; }
	@touch $@ .venv/.run
