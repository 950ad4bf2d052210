"""Entry for a checkout; the verb is knn_lm_eval/cli/reproduce.py."""

from knn_lm_eval.cli.reproduce import main

if __name__ == "__main__":
    main()
