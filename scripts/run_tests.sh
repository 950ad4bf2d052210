#!/usr/bin/env bash
# Sets up .venv, if need be, and runs all checks and tests in it. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_environment.sh

prepare cpu,test

stage "ruff"
ruff check .
ruff format --check .

stage "mypy"
mypy knn_lm_eval scripts

stage "lint-imports"
lint-imports

stage "pytest"
pytest -n 2 --dist loadgroup "$@"
