"""Entry for a checkout; the verb is knn_lm_eval/cli/benchmark.py."""

from knn_lm_eval.cli.benchmark import main

if __name__ == "__main__":
    main()
