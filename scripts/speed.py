"""Entry for a checkout; the verb is knn_lm_eval/cli/speed.py."""

from knn_lm_eval.cli.speed import main

if __name__ == "__main__":
    main()
