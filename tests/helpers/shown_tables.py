"""What of the shown commands is replaced when the tests run them, and which are not run, and why."""

from __future__ import annotations

# Not run are commands that begin so.
MACHINE = "sets up a machine, over a network"
PUBLISHED = "needs the published code's checkout"
OVER_RAY = "tests/search/test_ray.py does it over a cluster of two nodes"
NOT_RUN = {
    "git clone ": MACHINE,
    "pip install ": MACHINE,
    "pip wheel ": MACHINE,
    "pre-commit install ": MACHINE,
    "hf auth login ": "asks for a token of yours",
    "bash scripts/run_tests.sh": "runs these tests",
    "source .venv/bin/activate": "changes the shell",
    "bash scripts/first_run.sh": "sets up .venv; tests/cli/test_first_run.py runs what it runs",
    "knn-lm-eval doctor": "takes ten seconds for all packages; tests/test_missing_packages.py runs it",
    "knn-lm-eval first_run ": "needs a package with a real model; tests/cli/test_first_run.py runs it with a tiny one",
    "knn-lm-eval reproduce python_docs ": "is first_run",
    "scripts/gpu_check.sh ": "is for a machine with an NVIDIA GPU",
    "knn-lm-eval speed --model_args datastore=stores/m-law,k=1024,probe=32,retomaton=True,clusters=kmeans": PUBLISHED,
    "knn-lm-eval speed --model_args datastore=stores/m-law,dtype=float32,index=pq": PUBLISHED,
    "knn-lm-eval build_index --datastore stores/m-train --parts 16 --ray auto": OVER_RAY,
    "lm_eval --model knn-hf --model_args datastore=stores/m-train,retriever=ray": OVER_RAY,
}

# Regular expressions, and what stands in the place of what they find: no more than makes a command small, or fills in
# what a reader is to fill in.
SMALL = (  # and no PQ64, which needs wider keys than M has
    " --fraction 1e-5 --set index.factory=IVF4096,SQ8 --set index.quality_queries=0"
    " --set tune.knn.lmbda=0.1,0.5 --set tune.knn.knn_temp=1"
)
REPLACED = {
    r"(?<=lm_eval) \.\.\.(?= --tasks)": " --model knn-hf --model_args datastore=stores/m-train",
    r"(?<=lm_eval) \.\.\.(?= --model_args)": " --model knn-hf --metadata data_dir=DATA --tasks law",
    r" \.\.\.(?= #|$)": " --metadata data_dir=DATA --tasks law",
    r"HF_TOKEN=\.\.\.": "HF_TOKEN=hf_mine",
    r"USER(?=/NAME|,)": "me",
    r"(?<=reproduce )(gpt2|retomaton_law|mine.yaml)(?! --dry_run)": r"\1" + SMALL,
    r" --fraction 0\.001": "",
    r"--set device=cuda": "--set device=cpu",
    r"(?<=reproduce )(retomaton_law|mine.yaml)": r"\1 --set model.pretrained=M",
    r"knn_lm_tasks": "knn_lm_memory",  # its other half takes some 90 data sets of the hub
    r"(?<=--tasks python_docs)": " --limit 2",
    r"--entries 10000000": "--entries 6000",
    r"--keys (256|128)": "--keys 8",
    r"--tokens \d+": "--tokens 100",
    r"(?<=knn-lm-eval speed )": "--no_memory ",
    r"RR576,IVF16384_HNSW32": "RR32,IVF64_HNSW8",
    r"IVF4096,PQ64$": "IVF64,PQ8",
    r"--num_clusters 2000": "--num_clusters 60",
    r"(?<=knn-lm-eval build_index )": "--quality_queries 50 ",
    r"^torchrun --nproc_per_node 8": "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2",
    r"--runs \d+": "--runs 1",
}

# Options for what is not installed here, and the class of lm_eval.loggers in whose place one stands that only sees
# whether it is told all that it would be told.
STAND_INS = {"--wandb_args": "WandbLogger", "--trackio_args": "TrackioLogger"}

# What pages say in words must come before a command: that it begins so, and what makes what it reads.
KNN = "lm_eval --model knn-hf --tasks law --metadata data_dir=DATA --model_args datastore=stores/m-train"
TUNE = "knn-lm-eval tune --tasks law_valid --metadata data_dir=DATA --k 16 --model_args pretrained=M"
GALLERY = [f"{TUNE},datastore=first_run/store --output tune.json"]
BEFORE = {
    "knn-lm-eval inspect_neighbours --model_args datastore=first_run/store,params=tune.json": GALLERY,
    "lm_eval --model knn-hf --model_args datastore=first_run/store,params=tune.json": GALLERY,
    "knn-lm-eval analyse records/knn records/retomaton": [
        f"{KNN},records=records/knn",
        f"{KNN},retomaton=True,records=records/retomaton",
    ],
    "knn-lm-eval compare results/law --baseline base --report": ["knn-lm-eval benchmark law.yaml"],
    "knn-lm-eval benchmark stores.yaml": [
        f"{TUNE},datastore=stores/law --output tuned/law.json",
        f"{TUNE},datastore=stores/wiki --output tuned/wiki.json",
    ],
}

# Files that pages have in words, and that of pages that show results alone.
CELLS = """\
output: results/{name}
records: true
metadata: {{data_dir: DATA}}
models: {{smollm: {{pretrained: M}}}}
datastores: {datastores}
methods: {{base: {{model: hf}}, {methods}}}
tasks: {{law: {{limit: 500}}}}
"""
LAW = "{law: stores/law}"
ALL = "{law: stores/law, wiki: stores/wiki, both: {path: [stores/law, stores/wiki]}}"
NGRAMS = "ngram: {lmbda: 0, ngram_lmbda: 0.3}, knn: {k: 1024}, both: {params: tuned/both.json}"
FILES = {
    "docs/how-to/several-datastores.md": {
        "stores.yaml": CELLS.format(name="stores", datastores=ALL, methods='knn: {params: "tuned/{datastore}.json"}')
    },
    "docs/measurements/ngrams.md": {"law.yaml": CELLS.format(name="law", datastores=LAW, methods=NGRAMS)},
    "docs/measurements/tuning.md": {
        "law.yaml": CELLS.format(
            name="law", datastores="{law: stores/m-law}", methods="knn: {k: 1024}, tuned: {params: tuned.json}"
        )
    },
}
ANYWHERE = {"law.yaml": CELLS.format(name="law", datastores=LAW, methods="knn: {k: 1024, lmbda: 0.25}")}
