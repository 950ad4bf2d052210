"""Errors that the user can mend: one clear sentence instead of a traceback."""

from __future__ import annotations

import atexit
import difflib
import importlib.util
import os
import re
import reprlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

# What a terminal obeys instead of showing it: control characters but tab and newline, and changes of direction.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxstring = 2, 3, 4, 4, 80

NO_RESULTS = "no results were written; start again."
ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


class UserError(ValueError):
    """Something the user gave is wrong. The message says what, where, and what to do about it."""


def printable(text: str) -> str:
    """The text with what a terminal would obey written out, as ``\\x1b``: for text of a file or a server."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def counted(count: int, one: str, several: str | None = None) -> str:
    """A number of things for a sentence: ``1 entry`` or, with ``several`` (else an s behind it), ``2,000 entries``."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def shortened(value: object, most: int = 80) -> str:
    """A value of any size for a sentence, as Python writes it but in at most ``most`` characters and no time."""
    if isinstance(value, BaseException):
        said = ", ".join(each if isinstance(each, str) else shortened(each, most) for each in value.args[:3])
        text = f"{type(value).__name__}: {said}" if said else type(value).__name__
    elif isinstance(value, int) and value.bit_length() > 256:
        text = f"an integer of {value.bit_length():,} bits"
    else:
        text = _SHORT.repr(value)
    text = printable(" ".join(text.split()))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def did_you_mean(name: object, known: Iterable[str], least: float = 0.6) -> str:
    """The end of a sentence about a ``name`` that is unknown, with the nearest of the ``known`` ones; nothing where
    none is near.

    Parameters
    ----------
    least : how near it has to be, from 0 (the nearest of all) to 1, as difflib measures it.
    """
    near = difflib.get_close_matches(str(name), list(known), 1, least)
    return f"; did you mean {near[0]}?" if near else ""


class MissingPackage(UserError, ImportError):
    """A package that this needs is not installed. The message says how to install it."""


# The extras that bring what can be left out, by the module that is missed; either of several is enough.
EXTRAS = {
    "argcomplete": ("completion",),
    "bitsandbytes": ("bnb",),
    "faiss": ("cpu", "gpu"),
    "gguf": ("gguf",),
    "peft": ("peft",),
    "ray": ("ray",),
}
# What each of them is for.
FEATURES = {
    "argcomplete": "completing commands in a shell",
    "bitsandbytes": "quantised models (load_in_4bit=True, load_in_8bit=True)",
    "faiss": "knn-hf, RetoMaton, indexes and clusters",
    "gguf": "models in GGUF files (gguf_file=...), first_run",
    "peft": "adapters (peft=...)",
    "ray": "several machines (retriever=ray, --ray)",
}
# What is always installed with the package, unless someone takes it away: by module, its name for pip.
REQUIRED = {"lm_eval": "lm_eval", "yaml": "pyyaml"} | {
    name: name
    for name in (
        *("accelerate", "datasets", "filelock", "huggingface_hub", "jinja2", "matplotlib", "numba", "numpy", "pyarrow"),
        *("packaging", "rich", "scipy", "torch", "tqdm", "transformers"),
    )
}


def missing_package(module: str) -> MissingPackage:
    """The error where ``module``, of ``EXTRAS`` or ``REQUIRED``, is not installed."""
    # pip finds the package itself installed already, wherever it came from, and installs what the extra adds.
    commands = [f"pip install 'knn-lm-eval[{extra}]'" for extra in EXTRAS.get(module, ())]
    either = " or ".join(commands) or f"pip install {REQUIRED[module]}"
    by_hardware = " (for NVIDIA GPUs)" if module == "faiss" else ""
    error = MissingPackage(f"{module}, which this needs, is not installed: {either}{by_hardware}")
    error.name = module
    return error


@contextmanager
def naming_missing_packages() -> Iterator[None]:
    """Within this, an ImportError for want of one of the packages of ``EXTRAS`` and ``REQUIRED`` is a MissingPackage.

    Also one of a library that says in its message alone what it misses. All others pass.
    """
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            missed = [(error.name or "").partition(".")[0]]
        else:
            missed = [name for name in re.findall(r"\w+", str(error)) if name in EXTRAS.keys() | REQUIRED.keys()]
            missed = [name for name in missed if importlib.util.find_spec(name) is None]
        if not missed or missed[0] not in EXTRAS.keys() | REQUIRED.keys():
            raise
        raise missing_package(missed[0]) from error


class _Hook:
    def __init__(self, previous: ExceptHook, kept: str) -> None:
        self.previous, self.kept = previous, kept

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, UserError):
            print(f"error: {printable(str(error))}", file=sys.stderr)
        elif issubclass(kind, KeyboardInterrupt):
            say_interrupted(self.kept)
        else:
            self.previous(kind, error, trace)


def report_user_errors(kept: str | None = None) -> None:
    """Let an uncaught UserError end the program with its message alone (and exit status 1, as ever), and Ctrl-C and
    SIGTERM with one sentence, which says what is ``kept`` and how to go on (and with exit status 130 and 143).

    Where that is None it stays as it is: a verb has said it, and then makes an LM."""
    if not isinstance(sys.excepthook, _Hook):
        sys.excepthook = _Hook(sys.excepthook, kept or NO_RESULTS)
    elif kept is not None:
        sys.excepthook.kept = kept
    alone = threading.current_thread() is threading.main_thread()
    if alone and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)


def say_interrupted(kept: str) -> None:
    """Say once for all processes of a launch that this was interrupted."""
    if os.environ.get("RANK", "0") == "0":
        print(f"\ninterrupted: {kept}", file=sys.stderr)


def _end(signal_number: int, frame: FrameType | None) -> None:
    """On SIGTERM: leave all that is begun in order, as on any error, and end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if isinstance(sys.excepthook, _Hook):
        atexit.register(say_interrupted, sys.excepthook.kept)  # last, when progress bars have ended
    raise SystemExit(128 + signal_number)
