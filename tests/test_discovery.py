"""lm-eval finds the model and the tasks in a fresh environment, and the start-up hook gets in nobody's way.

Tried with a wheel and with editable installs of checkouts, with and without links; with an lm-eval that reads entry
points and one that doesn't.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("discovery")  # one worker makes the environments for all tests

REPO = Path(__file__).resolve().parents[1]
SITE_PACKAGES = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
OUR_TASKS = {"wikitext103", "law"}


class Environment:
    """A virtual environment; `packages` are folders of packages that it sees besides its own."""

    def __init__(self, root: Path, packages: list[str] | None = None) -> None:
        self.root = root
        venv.create(root, symlinks=True)
        self.python = root / "bin" / "python"
        paths = sysconfig.get_paths("venv", vars={"base": str(root), "platbase": str(root)})
        self.site = Path(paths["purelib"])
        # Folders that a .pth file names are searched after the environment's own, and .pth files in them are
        # not read: an editable install in the environment of the tests stays out.
        (self.site / "packages.pth").write_text("\n".join(packages or []))

    def install(self, *what: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        options = ["--no-deps", "--no-build-isolation", "--ignore-installed"]
        checked([*pip, *options, *what], env=clean_env(), cwd=self.root)

    def unpack(self, wheel: Path) -> None:
        """All that installing would do, but for the commands."""
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.site)

    def run(self, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), *map(str, args)]
        return subprocess.run(
            command, env=clean_env() | env, cwd=self.root, capture_output=True, text=True, timeout=300
        )

    def code(self, source: str, **env: str) -> str:
        """What the Python code prints; it must succeed and keep stderr empty."""
        result = self.run("-c", textwrap.dedent(source), **env)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        return result.stdout

    def lm_eval(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run(shutil.which("lm_eval", path=str(Path(sys.executable).parent)), *args, **env)


def clean_env() -> dict[str, str]:
    ours = ("PYTHONPATH", "PYTHONHOME", "KNN_LM_EVAL_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return env | {"HF_HUB_OFFLINE": "1"}


def build_wheel(source: Path, folder: Path) -> Path:
    """The wheel that pip makes of a folder of sources or an sdist."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    checked([*pip, "--wheel-dir", str(folder), str(source)])
    return next(folder.glob("*.whl"))


def checked(command: list[str], **options: object) -> None:
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr


def add_lm_eval(env: Environment) -> None:
    """Put lm-eval into the environment with one of its tasks, since reading all of them takes long."""
    source = Path(importlib.util.find_spec("lm_eval").origin).parent

    def skipped(folder: str, names: list[str]) -> list[str]:
        if Path(folder) != source / "tasks":
            return ["__pycache__"]
        return [name for name in names if Path(folder, name).is_dir() and name != "wikitext"]

    shutil.copytree(source, env.site / "lm_eval", ignore=skipped)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(REPO, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    checked([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(REPO)])
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def unlinked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout by a git that makes no links (Windows): where the link to tasks/ would be, a file names its aim."""
    checkout = tmp_path_factory.mktemp("unlinked") / "checkout"
    checkout.mkdir()
    for file in ("pyproject.toml", "README.md", "LICENSE", "knn_lm_eval.pth"):
        shutil.copy(REPO / file, checkout)
    for folder in ("knn_lm_eval", "recipes", "tasks"):
        no_caches = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(REPO / folder, checkout / folder, symlinks=True, ignore=no_caches)
    (checkout / "knn_lm_eval" / "tasks").unlink()
    (checkout / "knn_lm_eval" / "tasks").write_text("../tasks")
    return checkout


@pytest.fixture(scope="session")
def wheel_env(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    env = Environment(tmp_path_factory.mktemp("wheel-env"), SITE_PACKAGES)
    env.install(str(wheel))
    add_lm_eval(env)
    return env


@pytest.fixture(scope="session")
def editable_env(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    env = Environment(tmp_path_factory.mktemp("editable-env"), SITE_PACKAGES)
    env.install("--editable", str(REPO))
    add_lm_eval(env)
    return env


@pytest.fixture(scope="session")
def unlinked_env(tmp_path_factory: pytest.TempPathFactory, unlinked: Path) -> Environment:
    env = Environment(tmp_path_factory.mktemp("unlinked-env"), SITE_PACKAGES)
    env.install("--editable", str(unlinked))
    add_lm_eval(env)
    return env


@pytest.fixture(params=["wheel", "editable"])
def env(request: pytest.FixtureRequest) -> Environment:
    return request.getfixturevalue(f"{request.param}_env")


@pytest.fixture(params=["wheel", "editable", "unlinked"])
def any_env(request: pytest.FixtureRequest) -> Environment:
    return request.getfixturevalue(f"{request.param}_env")


@pytest.fixture
def bare_env(tmp_path: Path, wheel: Path) -> Environment:
    """Our package and nothing else."""
    env = Environment(tmp_path / "bare")
    env.unpack(wheel)
    return env


# What is installed


def test_wheel_carries_the_package_with_its_tasks_and_recipes_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"knn_lm_eval.pth"}
    beside = {REPO / name: f"knn_lm_eval/{name}" for name in ("recipes", "tasks")}
    for path, inside in ({REPO / "knn_lm_eval": "knn_lm_eval"} | beside).items():
        files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
        ignored = re.compile(r"(^|/)(\.|__pycache__/)")
        there = {f"{inside}/{file}" for file in files if not ignored.search(str(file))}
        assert there
        expected |= there
    assert names == expected
    assert {"knn_lm_eval/py.typed", "knn_lm_eval/tasks/law.yaml", "knn_lm_eval/methods/automaton.py"} <= names


@pytest.mark.parametrize("source", ["sdist", "unlinked"])
def test_wheel_is_the_same_from_other_sources(
    wheel: Path, source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    other = build_wheel(request.getfixturevalue(source), tmp_path)
    files, others = (
        {info.filename: info.CRC for info in zipfile.ZipFile(file).infolist() if not info.filename.endswith("/RECORD")}
        for file in (wheel, other)
    )
    assert files == others


def test_each_environment_imports_its_own_copy(wheel_env: Environment, editable_env: Environment) -> None:
    source = """
        import knn_lm_eval
        from knn_lm_eval._startup import tasks_dir
        print(knn_lm_eval.__file__, tasks_dir(), sep="\\n")
    """
    package = wheel_env.site / "knn_lm_eval"
    expected = [package / "__init__.py", package / "tasks"]
    assert wheel_env.code(source).split() == [str(path) for path in expected]
    expected = [REPO / "knn_lm_eval" / "__init__.py", REPO / "tasks"]
    assert editable_env.code(source).split() == [str(path) for path in expected]
    assert not (editable_env.site / "knn_lm_eval").exists()


def test_tasks_are_a_part_of_the_package(wheel_env: Environment, editable_env: Environment) -> None:
    source = "from knn_lm_eval.tasks import corpora, perplexity; print(corpora.__file__)"
    for env, folder in ((wheel_env, wheel_env.site / "knn_lm_eval" / "tasks"), (editable_env, REPO / "tasks")):
        assert Path(env.code(source).strip()).resolve() == (folder / "corpora.py").resolve()


def test_a_checkout_without_links_reads_its_tasks_beside_the_package(unlinked: Path, unlinked_env: Environment) -> None:
    """Also the first run's text, which is the training split of one of them."""
    source = """
        from knn_lm_eval._startup import tasks_dir
        from knn_lm_eval.make.text import python_docs_split
        print(tasks_dir(), len("".join(python_docs_split("train"))) > 10_000)
    """
    assert unlinked_env.code(source).split() == [str(unlinked / "tasks"), "True"]


def test_command_is_installed(env: Environment) -> None:
    result = env.run(env.root / "bin" / "knn-lm-eval", "--version")
    assert result.returncode == 0 and result.stdout.startswith("knn-lm-eval 0.")


# With lm-eval as released


def test_lm_eval_lists_our_tasks(any_env: Environment) -> None:
    listed = any_env.lm_eval("ls", "tasks").stdout
    names = {line.split("|")[1].strip() for line in listed.splitlines() if line.startswith("|")}
    assert names >= OUR_TASKS | {"wikitext"}


def test_lm_eval_knows_the_model(any_env: Environment) -> None:
    result = any_env.lm_eval("--model", "knn-hf", "--tasks", "wikitext103")
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert "datastore" in output
    assert "Traceback" not in output and "no model for this name" not in output


MODELS = """
    import json
    from lm_eval.api.registry import get_model, model_registry
    get_model("dummy")
    print(json.dumps(list(model_registry)))
"""


def test_builtin_models_stay_known(env: Environment) -> None:
    for before in ("", "import lm_eval.models\n", "import knn_lm_eval._startup\n"):
        names = json.loads(env.code(before + textwrap.dedent(MODELS)))
        assert {"hf", "dummy", "knn-hf"} <= set(names), before


def test_switched_off(wheel_env: Environment) -> None:
    assert "knn-hf" not in json.loads(wheel_env.code(MODELS, KNN_LM_EVAL_NO_HOOK="1"))
    result = wheel_env.lm_eval("ls", "tasks", KNN_LM_EVAL_NO_HOOK="1")
    assert "wikitext" in result.stdout and "wikitext103" not in result.stdout


def test_hook_can_come_after_lm_eval(wheel_env: Environment) -> None:
    """As where .pth files aren't read and someone imports the hook by hand."""
    source = """
        import os
        import lm_eval.models, lm_eval.tasks.manager
        del os.environ["KNN_LM_EVAL_NO_HOOK"]
        import sys
        del sys.modules["knn_lm_eval._startup"]
        import knn_lm_eval._startup
        from lm_eval.api.registry import model_registry
        assert "knn-hf" in model_registry
        assert "law" in lm_eval.tasks.manager.TaskManager().all_tasks
        assert not any(isinstance(finder, knn_lm_eval._startup.Waiter) for finder in sys.meta_path)
    """
    wheel_env.code(source, KNN_LM_EVAL_NO_HOOK="1")


def test_task_folders_keep_their_order(env: Environment, tmp_path: Path) -> None:
    """lm-eval's own, then ours, then the user's, who may override both."""
    law = {"task": "law", "dataset_path": "x", "output_type": "loglikelihood_rolling"}
    (tmp_path / "law.yaml").write_text(json.dumps(law))
    source = f"""
        import json
        from pathlib import Path
        from lm_eval.tasks import TaskManager
        from knn_lm_eval._startup import tasks_dir

        folder, ours = {str(tmp_path)!r}, tasks_dir()

        def look(*args, **kwargs):
            index = TaskManager(*args, **kwargs).task_index
            names = {{"wikitext", "wikitext103", "law"}} & set(index)
            return {{name: index[name].yaml_path.parent.name for name in sorted(names)}}

        print(json.dumps(dict(
            ours=look(include_path=ours),
            none=look(),
            text=look(include_path=folder),
            path=look(None, Path(folder)),
            several=look(None, (folder,), True),
            no_defaults=look(include_defaults=False),
            only_theirs=look(None, folder, False),
        )))
        try:
            TaskManager(nonsense=1)
        except TypeError as error:
            assert "nonsense" in str(error)
    """
    result = env.run("-c", textwrap.dedent(source))
    assert result.returncode == 0, result.stderr
    ours = {"law": "tasks", "wikitext": "wikitext", "wikitext103": "tasks"}
    theirs = ours | {"law": tmp_path.name}
    assert json.loads(result.stdout) == {
        "ours": ours,
        "none": ours,
        "text": theirs,
        "path": theirs,
        "several": theirs,
        "no_defaults": {},
        "only_theirs": {"law": tmp_path.name},
    }
    warned = [line for line in result.stderr.splitlines() if "overrides" in line]
    assert len(warned) == 3 and all("'law'" in line for line in warned)  # text, path and several


# With an lm-eval that reads entry points

FAKE_LM_EVAL = {
    "__init__.py": "",
    "api/__init__.py": "",
    "api/registry.py": """
        from importlib.metadata import EntryPoint, entry_points

        class Registry(dict):
            def register(self, name, target):
                assert name not in self
                self[name] = target

        model_registry = Registry()

        def load_plugins(group, registry):
            for entry_point in entry_points(group=group):
                registry.register(entry_point.name, target=entry_point)
    """,
    "models/__init__.py": """
        from lm_eval.api.registry import load_plugins, model_registry

        model_registry.register("hf", target="lm_eval.models.huggingface:HFLM")
        load_plugins("lm_eval.models", model_registry)
    """,
    "tasks/__init__.py": "",
    "tasks/manager.py": """
        from importlib.metadata import entry_points
        from importlib.util import find_spec
        from pathlib import Path

        def discover_plugin_task_paths():
            specs = [find_spec(entry_point.value) for entry_point in entry_points(group="lm_eval.tasks")]
            return [Path(spec.submodule_search_locations[0]) for spec in specs]

        class TaskManager:
            def __init__(self, include_path=None, include_defaults=True):
                self.paths = [*discover_plugin_task_paths(), *(include_path or [])]
    """,
}


def write_package(folder: Path, files: dict[str, str]) -> str:
    for name, source in files.items():
        path = folder / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    return str(folder)


def test_entry_points_alone_do_the_work(env: Environment, tmp_path: Path) -> None:
    source = """
        from importlib.metadata import EntryPoint
        import lm_eval.models
        from lm_eval.api.registry import model_registry
        from lm_eval.tasks.manager import TaskManager
        from knn_lm_eval._startup import tasks_dir

        assert list(model_registry) == ["hf", "knn-hf"]
        assert isinstance(model_registry["knn-hf"], EntryPoint)
        (folder,) = TaskManager().paths  # which in a checkout is a link to the other
        assert folder.resolve() == tasks_dir()
        assert TaskManager(["theirs"]).paths == [folder, "theirs"]
    """
    env.code(source, PYTHONPATH=write_package(tmp_path, FAKE_LM_EVAL))


def test_hook_helps_where_task_entry_points_fail(env: Environment, tmp_path: Path) -> None:
    failing = "\ndef discover_plugin_task_paths():\n    return []\n"
    manager = textwrap.dedent(FAKE_LM_EVAL["tasks/manager.py"]) + failing
    source = """
        from lm_eval.tasks.manager import TaskManager
        from knn_lm_eval._startup import tasks_dir

        assert TaskManager(["theirs"]).paths == [tasks_dir(), "theirs"]
        assert TaskManager(["theirs"], include_defaults=False).paths == ["theirs"]
    """
    env.code(source, PYTHONPATH=write_package(tmp_path, FAKE_LM_EVAL | {"tasks/manager.py": manager}))


def test_a_host_with_entry_points_for_models_alone(env: Environment, tmp_path: Path) -> None:
    """It has tasks by --include_path only; our hook gives it ours all the same, and once where they are given, too."""
    manager = """
        class TaskManager:
            def __init__(self, include_path=None, include_defaults=True):
                self.paths = [include_path] if isinstance(include_path, str) else list(include_path or [])
    """
    source = """
        from importlib.metadata import EntryPoint
        import lm_eval.models
        from lm_eval.api.registry import model_registry
        from lm_eval.tasks.manager import TaskManager
        from knn_lm_eval._startup import tasks_dir

        assert list(model_registry) == ["hf", "knn-hf"]
        assert isinstance(model_registry["knn-hf"], EntryPoint)
        assert TaskManager().paths == [tasks_dir()]
        assert TaskManager("theirs").paths == [tasks_dir(), "theirs"]
        assert TaskManager(str(tasks_dir())).paths == [str(tasks_dir())]
    """
    host = FAKE_LM_EVAL | {"tasks/manager.py": manager}
    env.code(source, PYTHONPATH=write_package(tmp_path, host))
    by_path = """
        from lm_eval.tasks.manager import TaskManager
        assert TaskManager("ours").paths == ["ours"]  # without the hook, as its guide says
    """
    env.code(by_path, PYTHONPATH=str(tmp_path), KNN_LM_EVAL_NO_HOOK="1")


# The hook keeps out of the way


def test_changed_lm_eval_is_left_alone(bare_env: Environment, tmp_path: Path) -> None:
    changed = {
        "__init__.py": "",
        "models/__init__.py": "from lm_eval import *",
        "tasks/__init__.py": "",
        "tasks/manager.py": """
            class TaskManager:
                def __init__(self, folders=()):
                    self.folders = folders
        """,
    }
    source = """
        import sys
        import lm_eval.models
        from lm_eval.tasks.manager import TaskManager
        assert TaskManager(["one"]).folders == ["one"]
        assert not [finder for finder in sys.meta_path if type(finder).__name__ == "Waiter"]
    """
    bare_env.code(source, PYTHONPATH=write_package(tmp_path, changed))


def test_failed_import_can_be_repeated(bare_env: Environment, tmp_path: Path) -> None:
    """A module of lm-eval that fails at first (a missing package, say) is still waited for."""
    files = dict(FAKE_LM_EVAL)
    files["api/registry.py"] = (
        "class Registry(dict):\n    register = lambda self, name, target: self.setdefault(name, target)\n"
    )
    files["api/registry.py"] += "model_registry = Registry()\n"
    files["models/__init__.py"] = "import lm_eval\nassert lm_eval.ready"
    source = """
        import importlib.util
        import lm_eval
        from lm_eval.api.registry import model_registry
        for lm_eval.ready in (False, True):
            assert importlib.util.find_spec("lm_eval.models").loader
            try:
                import lm_eval.models
            except AssertionError:
                assert not lm_eval.ready
        assert dict(model_registry) == {"knn-hf": "knn_lm_eval.model.knn_hf:KNNHF"}
        assert "exec_module" not in vars(lm_eval.models.__spec__.loader)
    """
    bare_env.code(source, PYTHONPATH=write_package(tmp_path, files))


def test_without_lm_eval_python_starts_silently(bare_env: Environment) -> None:
    source = """
        import sys
        assert "knn_lm_eval._startup" in sys.modules
        try:
            import lm_eval.models
        except ModuleNotFoundError as error:
            print(error)
    """
    assert bare_env.code(source) == "No module named 'lm_eval'\n"


@pytest.mark.parametrize("damage", ["no hook", "no package", "broken hook", "broken package"])
def test_damaged_package_lets_python_start_silently(bare_env: Environment, damage: str) -> None:
    package = bare_env.site / "knn_lm_eval"
    if damage == "no hook":
        (package / "_startup.py").unlink()
    elif damage == "no package":
        shutil.rmtree(package)
    elif damage == "broken hook":
        (package / "_startup.py").write_text("this is no Python")
    else:
        (package / "__init__.py").write_text("import no_such_module")
    assert bare_env.code("print('started')") == "started\n"


def test_hook_imports_nothing_else(bare_env: Environment, tmp_path: Path) -> None:
    """Counts modules instead of milliseconds: what isn't imported costs nothing."""
    source = "import sys; print(*sys.modules)"
    without = set(Environment(tmp_path / "without").code(source).split())
    assert set(bare_env.code(source).split()) - without == {"knn_lm_eval", "knn_lm_eval._startup"}
