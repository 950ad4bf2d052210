"""Entry for a checkout; the verb is knn_lm_eval/cli/build_suffix_array.py."""

from knn_lm_eval.cli.build_suffix_array import main

if __name__ == "__main__":
    main()
