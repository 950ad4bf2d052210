"""A small Hugging Face hub on loopback, for the hub's real clients: models and data sets, revisions, gates, commits.

    with hub_server(tmp_path / "hub") as hub:
        hub.add_model("org/tiny", model_folder)
        hub.add_dataset("Salesforce/wikitext", folder)
        hub.fail("cdn GET .*keys.npy", drop_after=1000)
        subprocess.run(command, env=os.environ | hub.environment())

Like the hub it redirects small files within itself and large ones (LFS) to another host (here another port), which
takes no token. It knows what ``huggingface_hub``, ``transformers`` and ``datasets`` ask for when they list, fetch,
create and commit. Uploads are plain LFS, in one part or several, and nothing is offered through Xet: where ``hf_xet``
is installed, clients upload only with HF_HUB_DISABLE_XET=1, which ``environment`` and ``patch`` set.

``helpers.hub_contents`` is what it holds and how it can be made to fail, ``helpers.hub_answers`` what it answers to
which request.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

from helpers.hub_answers import Handler
from helpers.hub_contents import TOKEN, USER, Hub

__all__ = ["TOKEN", "USER", "Hub", "hub_server"]


@contextmanager
def hub_server(folder: Path) -> Iterator[Hub]:
    """A hub that keeps what it is given in ``folder``, until the end of the block."""
    hub, servers = Hub(folder), []
    for at in ("hub", "cdn"):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.hub, server.at = hub, at
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
