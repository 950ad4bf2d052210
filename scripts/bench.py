"""The old name of speed.py, which still answers."""

import sys

from knn_lm_eval.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
