"""Entry for a checkout; the verb is knn_lm_eval/cli/compare.py."""

from knn_lm_eval.cli.compare import main

if __name__ == "__main__":
    main()
