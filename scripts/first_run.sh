#!/usr/bin/env bash
# Sets up .venv, if need be, and runs first_run.py in it. Arguments go to first_run.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_environment.sh

prepare cpu,gguf
exec python scripts/first_run.py "$@"
