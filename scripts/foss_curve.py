"""Entry for a checkout; the verb is knn_lm_eval/cli/foss_curve.py."""

from knn_lm_eval.cli.foss_curve import main

if __name__ == "__main__":
    main()
