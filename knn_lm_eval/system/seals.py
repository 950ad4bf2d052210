"""JSON files that carry a checksum of their own content, so that no flipped bit in one goes unnoticed.

The entry ``sha256`` is over everything else, in one canonical form: blanks and the order of names do not count. Files
without one, of earlier versions or written by hand, are read as they are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from knn_lm_eval.errors import UserError
from knn_lm_eval.system.files import write_json

SEAL = "sha256"


def write_sealed_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as JSON, with its checksum, all at once."""
    write_json(path, sealed(content))


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` with its checksum."""
    return content | {SEAL: _checksum(content)}


def check_seal(path: Path, content: dict[str, Any], remedy: str) -> dict[str, Any]:
    """The content of ``path`` without its checksum.

    Parameters
    ----------
    remedy : what to do where it is damaged, for the message.

    Raises
    ------
    UserError
        Where the checksum is another one.
    """
    rest = {name: value for name, value in content.items() if name != SEAL}
    if SEAL in content and content[SEAL] != _checksum(rest):
        raise UserError(
            f"{path} is damaged, or was changed by hand: its content is not what its own {SEAL} says; {remedy} (or, if "
            f"you changed it, take out that entry)."
        )
    return rest


def is_sealed(content: dict[str, Any]) -> bool:
    """Whether it carries a checksum."""
    return SEAL in content


def _checksum(content: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(content))  # as it is read again
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
