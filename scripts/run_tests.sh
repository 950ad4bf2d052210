#!/usr/bin/env bash
# Sets up a virtual environment, if need be, and runs checks and tests in it. Arguments go to pytest, but the first may be
#   --lowest    the lowest versions that the package admits (constraints-lowest.txt), in .venv-lowest: some minutes of
#               tests that touch every room
#   --unpinned  the newest of everything but torch, in .venv-unpinned: all tests
# Without one of them: the versions of constraints.txt, in .venv, and all checks and tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_environment.sh

all_tests() {
    if [ $# -gt 0 ]; then
        pytest -n 2 --dist loadgroup "$@"
        return
    fi
    local forking=(tests/torture tests/test_shown_commands.py)
    pytest -n 2 --dist loadgroup "${forking[@]/#/--ignore=}"
    stage "pytest, torture and shown commands"
    # They fork, and so begin where no test has used Ray: a child might wait for ever for what Ray's threads held.
    pytest -n 2 "${forking[@]}"
}

case "${1:-}" in
--lowest)
    shift
    prepare cpu,test .venv-lowest constraints-lowest.txt
    stage "pytest, lowest versions"
    exec pytest -n 2 --dist loadgroup -m "not slow" tests/test_lowest_versions.py \
        tests/system/test_{diagnosis,files,locks,ray_jobs}.py tests/methods/test_{automaton,mixture,ngrams}.py \
        tests/store/test_{card,hub,key_stream,old_store}.py tests/lm/test_loading.py \
        tests/search/test_{factory_strings,mapped_lists,retriever,sign_codes}.py tests/make/test_text.py \
        tests/model/test_{generation,params}.py tests/study/test_{fitting,inspection}.py \
        tests/tasks/test_classification.py tests/report/test_{plots,tables}.py tests/cli/test_{completion,first_run}.py "$@"
    ;;
--unpinned)
    shift
    constraints="$(mktemp)"
    trap 'rm -f "$constraints"' EXIT
    grep '^torch==' constraints.txt >"$constraints"
    prepare cpu,docs,test .venv-unpinned "$constraints"
    stage "pytest, newest versions"
    all_tests "$@"
    exit
    ;;
esac

prepare cpu,docs,test

stage "ruff"
ruff check .
ruff format --check .

if python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then  # the last NumPy for 3.10 has other types
    stage "mypy"
    mypy knn_lm_eval scripts
fi

stage "lint-imports"
lint-imports

stage "pytest"
all_tests "$@"
