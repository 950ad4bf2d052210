"""Entry for a checkout; the verb is knn_lm_eval/cli/inspect_neighbours.py."""

from knn_lm_eval.cli.inspect_neighbours import main

if __name__ == "__main__":
    main()
