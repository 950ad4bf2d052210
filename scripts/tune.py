"""Entry for a checkout; the verb is knn_lm_eval/cli/tune.py."""

from knn_lm_eval.cli.tune import main

if __name__ == "__main__":
    main()
