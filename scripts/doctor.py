"""Entry for a checkout; the verb is knn_lm_eval/cli/doctor.py."""

from knn_lm_eval.cli.doctor import main

if __name__ == "__main__":
    main()
