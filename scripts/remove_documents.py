"""Entry for a checkout; the verb is knn_lm_eval/cli/remove_documents.py."""

from knn_lm_eval.cli.remove_documents import main

if __name__ == "__main__":
    main()
