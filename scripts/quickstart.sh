#!/usr/bin/env bash
# From a fresh clone to a trained model: makes .venv, installs, trains configs/quickstart.yaml, prints a sample
# and where the checkpoint is. Arguments are overrides: scripts/quickstart.sh train.max_steps=50 run.dir=runs/b
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

install_package
exec moe-llm train configs/quickstart.yaml "$@"
