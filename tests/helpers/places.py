"""Where things lie in the checkout."""

from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = REPO / "scripts"
TASKS = REPO / "tasks"
LOCAL_TASKS = Path(__file__).resolve().parent / "local_tasks"
