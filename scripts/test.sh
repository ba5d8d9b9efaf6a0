#!/usr/bin/env bash
# Lint, the direction of imports, then the tests, in .venv (made where it is missing). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

install_package dev
ruff check .
ruff format --check --quiet .  # where this fails: ruff format .
lint-imports
mypy
# Two processes of one thread each: threads of several processes that share cores wait for one another.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -n 2 --dist loadfile "$@"
if [ $# -eq 0 ]; then  # and as on a machine without a C++ compiler
    # all but what is the same either way
    left_out=(native liger host_memory compiled expert_dropout)
    MOE_LLM_NATIVE=0 python -m pytest -n 2 --dist loadfile -q tests/ops $(printf -- "--ignore=tests/ops/test_%s.py " "${left_out[@]}")
fi
