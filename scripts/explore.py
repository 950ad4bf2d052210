"""Entry for a checkout; the verb is knn_lm_eval/cli/explore.py."""

from knn_lm_eval.cli.explore import main

if __name__ == "__main__":
    main()
