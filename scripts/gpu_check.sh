#!/usr/bin/env bash
# Runs the GPU tests and a speed comparison where there is a GPU, from a bare checkout: in under ten minutes, once the
# wheels are there. Without a GPU it runs as far as a CPU goes, and says so.
#
#   scripts/gpu_check.sh WHEELS [arguments of tests/helpers/gpu_speed.py, such as --model FOLDER --text FILE]
#
# WHEELS is a folder with wheels of all that the extra gpu needs, so that no network is:
#   pip download -d WHEELS '.[gpu]' pytest pytest-timeout hypothesis hatchling editables
# The table, as Markdown for docs/measurements/gpu.md, is printed and written to gpu_check.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_environment.sh

[ $# -ge 1 ] && [ -d "$1" ] || fail "give the folder of wheels: scripts/gpu_check.sh WHEELS; see the script's first lines"
wheels="$(cd "$1" && pwd)"
shift

environment=.venv-gpu
[ -x "$environment/bin/pip" ] || "$(find_python)" -m venv "$environment"
export PATH="$PWD/$environment/bin:$PATH" HF_HUB_OFFLINE=1
from_wheels=(python -m pip install --quiet --no-index --find-links "$wheels")

stage "installation from $wheels"
"${from_wheels[@]}" hatchling editables pytest pytest-timeout hypothesis &&
    "${from_wheels[@]}" --no-build-isolation -e ".[gpu]" ||
    fail "the installation failed; pip's reason is above"

stage "what is here"
python - <<'END'
import faiss, torch
gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
print("PyTorch", torch.__version__, "sees", ", ".join(gpus) or "no GPU: what follows runs on the CPU")
print("faiss", faiss.__version__, "sees", getattr(faiss, "get_num_gpus", lambda: 0)(), "GPUs")
END

stage "tests"
result=0
python -m pytest -q -rs tests/search/test_gpu.py tests/search/test_gpu_choice.py tests/test_pretended_gpu.py \
    tests/model/test_wrong_device.py || result=$?

stage "speed"
PYTHONPATH="$PWD:$PWD/tests" python -W ignore -m helpers.gpu_speed --output gpu_check.md "$@"
exit "$result"
