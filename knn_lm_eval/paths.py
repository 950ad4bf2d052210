"""Where the folders lie that come with the package: inside it in a wheel, beside it in a source checkout."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def tasks_dir() -> Path:
    """The folder of lm-eval task files."""
    return _folder("tasks")


def scripts_dir() -> Path:
    """The folder of the command-line scripts."""
    return _folder("scripts")


def _folder(name: str) -> Path:
    packaged = PACKAGE / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name
