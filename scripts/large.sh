#!/usr/bin/env bash
# Makes a large datastore of small ones and goes through all that is done with it, with time and memory of each step:
# grows it, verifies it, builds an index, searches, clusters, walks RetoMaton, and checks that what was found is what
# the arrays on disk say. A night's work at 10^8 entries on 2 cores; what is done is passed over when it is run again.
#
#   [ENTRIES=100000000] scripts/large.sh FOLDER TEXT DATASTORE...
#
# DATASTOREs are of one LM, such as dump_datastore --keys 64 makes, TEXT is for scoring. Also read: FACTORY (auto), PARTS,
# QUERIES (to measure the index with), CLUSTERS (a hundredth of the entries), SAMPLE (to train them on), MEMORY (such as
# 8GiB; half of what is available), TOKENS (1024, scored), REPEATS (3), MODEL_ARGS (for scoring).
# The table is printed and written to FOLDER/large.md.
set -euo pipefail

[ $# -ge 3 ] || { echo "usage: scripts/large.sh FOLDER TEXT DATASTORE..., see the script's first lines" >&2; exit 2; }
folder="$1" text="$2"
shift 2
tests="$(cd "$(dirname "${BASH_SOURCE[0]}")/../tests" && pwd)"
entries="${ENTRIES:-100000000}"
clusters="${CLUSTERS:-$((entries / 100))}"
mkdir -p "$folder"

step() {
    local name="$1"
    shift
    python "$tests/helpers/measured.py" "$folder/rows.jsonl" "$name" "$folder" "$@"
}
score() {
    local name="$1" arguments="$2"
    step "$name" knn-lm-eval speed --model_args "datastore=$folder/store,params=False$arguments${MODEL_ARGS:+,$MODEL_ARGS}" \
        --text "$text" --tokens "${TOKENS:-1024}" --repeats "${REPEATS:-3}" --no_memory
}

step "grow" knn-lm-eval grow_datastore "$@" --output "$folder/store" --entries "$entries"
step "build_index" knn-lm-eval build_index --datastore "$folder/store" --factory "${FACTORY:-auto}" \
    ${PARTS:+--parts "$PARTS"} ${QUERIES:+--quality_queries "$QUERIES"} ${MEMORY:+--memory "$MEMORY"}
step "verify" knn-lm-eval verify_datastore "$folder/store"
score "kNN-LM, laying out codes" ""
score "kNN-LM" ""
step "cluster" knn-lm-eval cluster_datastore --datastore "$folder/store" --method kmeans \
    --num_clusters "$clusters" ${SAMPLE:+--sample "$SAMPLE"} ${MEMORY:+--memory "$MEMORY"}
score "RetoMaton, laying out codes" ",retomaton=True,clusters=kmeans"
score "RetoMaton" ",retomaton=True,clusters=kmeans"
step "check" python "$tests/helpers/large_check.py" "$folder/store" --clusters kmeans
python "$tests/helpers/measured.py" "$folder/rows.jsonl" | tee "$folder/large.md"
