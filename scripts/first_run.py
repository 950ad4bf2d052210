"""Entry for a checkout; the verb is knn_lm_eval/cli/first_run.py."""

from knn_lm_eval.cli.first_run import main

if __name__ == "__main__":
    main()
