"""Entry for a checkout; the verb is knn_lm_eval/cli/push_datastore.py."""

from knn_lm_eval.cli.push_datastore import main

if __name__ == "__main__":
    main()
