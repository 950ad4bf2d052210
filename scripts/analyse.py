"""Entry for a checkout; the verb is knn_lm_eval/cli/analyse.py."""

from knn_lm_eval.cli.analyse import main

if __name__ == "__main__":
    main()
