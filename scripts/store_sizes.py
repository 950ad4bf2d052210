"""Entry for a checkout; the verb is knn_lm_eval/cli/store_sizes.py."""

from knn_lm_eval.cli.store_sizes import main

if __name__ == "__main__":
    main()
