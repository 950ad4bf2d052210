"""Entry for a checkout; the verb is knn_lm_eval/cli/project_datastore.py."""

from knn_lm_eval.cli.project_datastore import main

if __name__ == "__main__":
    main()
