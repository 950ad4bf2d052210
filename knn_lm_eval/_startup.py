"""Makes `knn-hf` and our tasks known to lm-eval releases that have no entry-point plugins.

knn_lm_eval.pth imports this module at every start of Python. All it does then is to leave a finder on
`sys.meta_path` that waits for two modules of lm-eval and acts once each has run. Where lm-eval found us
through our entry points, nothing is left to do. KNN_LM_EVAL_NO_HOOK=1 switches it off.

It must cost no time and break nothing: no imports beyond `os` and `sys` until lm-eval itself is imported,
and whatever goes wrong is logged for debugging and leaves lm-eval as it was.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType
    from typing import Any

MODEL_NAME = "knn-hf"
MODEL_PLACE = "knn_lm_eval.model.knn_hf:KNNHF"


def register_model(models: "ModuleType") -> None:
    """Enter a placeholder for our model class into lm-eval's registry.

    Not before `lm_eval.models` has run: lm-eval takes a registry that isn't empty for one that has all of its
    own models.
    """
    from lm_eval.api import registry

    if not hasattr(registry, "load_plugins") and MODEL_NAME not in registry.model_registry:
        registry.model_registry.register(MODEL_NAME, target=MODEL_PLACE)


def add_tasks(manager: "ModuleType") -> None:
    """Let every TaskManager scan our tasks after lm-eval's own and before those the user names."""
    import functools
    import inspect

    original = manager.TaskManager.__init__
    signature = inspect.signature(original)

    @functools.cache
    def ours() -> "list[Path]":
        discover = getattr(manager, "discover_plugin_task_paths", list)
        return [] if tasks_dir() in _resolved(discover()) else [tasks_dir()]

    @functools.wraps(original)
    def init(self: "Any", *args: "Any", **kwargs: "Any") -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            if bound.arguments["include_defaults"]:
                users = bound.arguments["include_path"] or []
                users = list(users) if isinstance(users, (list, tuple)) else [users]
                bound.arguments["include_path"] = [p for p in ours() if p not in _resolved(users)] + users
            args, kwargs = bound.args[1:], bound.kwargs
        except Exception:
            _log_failure("tasks not added")
        original(self, *args, **kwargs)

    manager.TaskManager.__init__ = init


def tasks_dir() -> "Path":
    """The folder of task files: inside the package in a wheel, beside it in a checkout, where that is a link."""
    from pathlib import Path

    package = Path(__file__).resolve().parent
    folder = package / "tasks"
    return folder.resolve() if folder.is_dir() else package.parent / "tasks"  # no link where git makes none (Windows)


def recipes_dir() -> "Path":
    """The folder of recipes: inside the package in a wheel, beside it in a checkout."""
    from pathlib import Path

    package = Path(__file__).resolve().parent
    folder = package / "recipes"
    return folder if folder.is_dir() else package.parent / "recipes"


def _resolved(paths: "Sequence[Any]") -> "list[Path]":
    from pathlib import Path

    return [Path(p).resolve() for p in paths]


class Waiter:
    """A finder that finds nothing itself, but sees to it that an action follows the import of a module."""

    def __init__(self, actions: "dict[str, Callable[[ModuleType], None]]") -> None:
        self.actions = actions

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "ModuleSpec | None":
        if name not in self.actions:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    self._follow(spec)
                    return spec
        return None

    def _follow(self, spec: "ModuleSpec") -> None:
        """Have the spec's loader tell us when it has run the module."""
        loader: Any = spec.loader

        def exec_module(module: "ModuleType") -> None:
            original(module)
            if module.__name__ == spec.name:  # a loader can serve several modules
                vars(loader).pop("exec_module", None)
                self.act(spec.name, module)

        try:
            original = loader.exec_module
            loader.exec_module = exec_module
        except Exception:
            _log_failure(f"cannot follow the import of {spec.name}")

    def act(self, name: str, module: "ModuleType") -> None:
        """Do what waited for this module; with nothing left to wait for, leave."""
        action = self.actions.pop(name, None)
        try:
            if action:
                action(module)
        except Exception:
            _log_failure(f"nothing done after the import of {name}")
        if not self.actions and self in sys.meta_path:
            sys.meta_path.remove(self)


def _log_failure(message: str) -> None:
    import logging

    logging.getLogger(__name__).debug("%s; lm-eval stays as it is", message, exc_info=True)


def install() -> None:
    """Start waiting; act at once on what is imported already."""
    waiter = Waiter({"lm_eval.models": register_model, "lm_eval.tasks.manager": add_tasks})
    sys.meta_path.insert(0, waiter)
    for name in [name for name in waiter.actions if name in sys.modules]:
        waiter.act(name, sys.modules[name])


if os.environ.get("KNN_LM_EVAL_NO_HOOK", "0") in ("", "0"):
    install()
