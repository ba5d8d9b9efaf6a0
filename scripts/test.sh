#!/usr/bin/env bash
# Lint, the direction of imports, then the tests, in .venv (made where it is missing). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

install_package dev
ruff check .
lint-imports
exec python -m pytest "$@"
