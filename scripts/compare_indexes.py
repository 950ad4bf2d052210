"""Entry for a checkout; the verb is knn_lm_eval/cli/compare_indexes.py."""

from knn_lm_eval.cli.compare_indexes import main

if __name__ == "__main__":
    main()
