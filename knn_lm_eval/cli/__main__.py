"""`python -m knn_lm_eval.cli <verb>`: the command, by this interpreter."""

import sys

from knn_lm_eval.cli.main import main

sys.exit(main())
