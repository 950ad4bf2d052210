"""What a command takes: seconds, seconds of CPUs, peak memory, and how large a folder is then; as a row of a table.

    python tests/helpers/measured.py ROWS STEP FOLDER COMMAND...     run it, append a row to the file ROWS
    python tests/helpers/measured.py ROWS                            print the rows as a Markdown table

A command that ROWS has a row of already, by its step, is not run again. Memory is of the command with its children:
its own, which is what it cannot do without, and all that was resident, of which mapped files are given back where
memory is short.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

SAMPLED_EVERY = 0.2  # seconds


def main() -> int:
    rows_file = Path(sys.argv[1])
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
    if len(sys.argv) == 2:
        print("| step | seconds | of CPUs | own memory, MiB | resident, MiB | folder, MB |\n|---|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row['step']} | {row['seconds']:,.0f} | {row['cpu_seconds']:,.0f} | {row['own'] / 2**20:,.0f} "
                f"| {row['resident'] / 2**20:,.0f} | {row['folder'] / 1e6:,.0f} |"
            )
        return 0
    step, folder, command = sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
    if any(row["step"] == step for row in rows):
        return 0
    print(f"== {step}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(command)
    peak = {"own": 0, "resident": 0}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLED_EVERY):
            own, resident = memory_of(process.pid)
            peak["own"], peak["resident"] = max(peak["own"], own), max(peak["resident"], resident)

    sampler = threading.Thread(target=sample)
    sampler.start()
    status = process.wait()
    ended.set()
    sampler.join()
    if status:
        print(f"{step} failed with status {status}; its reason is above", file=sys.stderr)
        return status
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    size = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    row = {
        "step": step,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        **peak,
        "folder": size,
    }
    with rows_file.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"== {step}: {seconds:,.1f} s, {peak['own'] / 2**20:,.0f} MiB of its own", flush=True)
    return 0


def memory_of(process: int) -> tuple[int, int]:
    """What a process and its children have of their own, and resident in all, in bytes; 0 where it has ended."""
    own = resident = 0
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        children = " ".join(path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")).split()
    except OSError:
        return 0, 0
    if "RssAnon" in fields:
        own, resident = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))
    for child in children:
        of_child = memory_of(int(child))
        own, resident = own + of_child[0], resident + of_child[1]
    return own, resident


if __name__ == "__main__":
    sys.exit(main())
