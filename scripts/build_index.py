"""Entry for a checkout; the verb is knn_lm_eval/cli/build_index.py."""

from knn_lm_eval.cli.build_index import main

if __name__ == "__main__":
    main()
