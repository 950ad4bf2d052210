"""Open a local page to type texts into: what retrieval brings each token, its neighbours, and other settings."""

from __future__ import annotations

import argparse
import threading

from knn_lm_eval.cli.arguments import add_model_arguments, check_at_least_one, read_model_args
from knn_lm_eval.cli.main import verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError

EXAMPLE = "knn-lm-eval explore --model_args datastore=stores/m-train,k=256"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ENDED = "the page is closed; the same command opens it again."


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    add_model_arguments(parser, "as for lm_eval --model knn-hf: datastore=D,k=1024,...", batches=False)
    parser.add_argument("--port", type=int, help="of the page (default: the first free one from 7860 on)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address it listens at; any other than the default is open to whoever reaches it, without a password "
        "(default: 127.0.0.1, this machine alone)",
    )
    parser.add_argument("--max_tokens", type=int, default=1024, help="of a text (default: 1024)")
    return parser.parse_args()


@verb(parse_arguments, kept=ENDED)
def main(arguments: argparse.Namespace) -> None:
    check_at_least_one(arguments, "max_tokens")
    if arguments.port is not None and not 1 <= arguments.port <= 65535:
        raise UserError(f"--port {arguments.port} is not between 1 and 65535.")
    model_args = read_model_args(arguments)

    from knn_lm_eval.explore.page import make_page, serve
    from knn_lm_eval.model.knn_hf import KNNHF
    from knn_lm_eval.study.exploration import Explorer

    lm = KNNHF(**model_args)
    page = make_page(Explorer(lm, arguments.max_tokens), lm.retriever.datastore.name)
    address = serve(page, arguments.host, arguments.port)
    print(f"Open {address} in a browser; Ctrl-C closes the page.", flush=True)
    if arguments.host not in LOOPBACK:
        print(f"Whoever reaches {arguments.host} can read texts of the datastore there.", flush=True)
    threading.Event().wait()
