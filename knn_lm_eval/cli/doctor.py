"""Say what is installed, on what machine, how large the caches are, and what is missing for which feature."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from knn_lm_eval.cli.main import verb
from knn_lm_eval.cli.parsing import VerbParser

EXAMPLE = "knn-lm-eval doctor"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(
        __doc__,
        EXAMPLE,
        epilog="Takes some seconds: torch, faiss and lm-eval are imported, by processes of their own. Ends with exit "
        "status 1 where an evaluation with knn-hf cannot run.",
    )
    parser.add_argument(
        "--json", nargs="?", type=Path, const=Path("-"), metavar="FILE", help="print it as JSON, or write it to a file"
    )
    return parser.parse_args()


@verb(parse_arguments)
def main(arguments: argparse.Namespace) -> None:
    from knn_lm_eval.system.diagnosis import examine

    if arguments.json not in (None, Path("-")):
        from knn_lm_eval.system.files import check_writable

        check_writable(arguments.json)
    found = examine()
    text = json.dumps(found, indent=1)
    if arguments.json is None:
        print("\n".join(report(found)))
    elif arguments.json == Path("-"):
        print(text)
    else:
        from knn_lm_eval.system.files import write_text

        write_text(arguments.json, text + "\n")
        print(f"Wrote {arguments.json}.")
    if found["faults"]:
        raise SystemExit(1)


def report(found: dict[str, Any]) -> list[str]:
    """What ``examine`` found, as lines for a terminal."""
    python, machine = found["python"], found["machine"]
    lines = [
        f"knn-lm-eval {found['knn_lm_eval']}, {python['implementation']} {python['version']} ({python['executable']})",
        f"{python['platform']}, {machine['cpus']} CPUs{of_memory(machine)}",
        *(f"{name}={value}" for name, value in found["environment"].items()),
    ]
    lines += ["", "packages"]
    for package in found["packages"]:
        version = package["version"] or ("-" if package["extra"] else "MISSING")
        of_extra = f"extra {package['extra']}" if package["extra"] else ""
        note = package["fault"] if package["version"] else ""
        lines.append(f"  {package['module']:16} {version:14} {of_extra:18} {note}".rstrip())
    lines += ["", "devices", *devices(found)]
    lines += ["", "lm-eval", f"  {discovered(found['lm_eval'])}"]
    lines += ["", "caches"]
    for cache in found["caches"]:
        lines.append(f"  {size(cache['bytes']):>10}  {cache['what']:42} {cache['path']}")
    lines += ["", "features"]
    for feature in found["features"]:
        missing = "" if feature["install"] is None else f"\n           {feature['install']}"
        lines.append(f"  {'missing' if missing else 'ok':7}  {feature['feature']}{missing}")
    lines += ["", *(f"FAULT: {fault}" for fault in found["faults"])]
    return lines if found["faults"] else [*lines, "An evaluation with knn-hf can run."]


def of_memory(machine: dict[str, Any]) -> str:
    if machine["memory"] is None:
        return ""
    return f", {size(machine['memory'])} of memory" + (
        "" if machine["available"] is None else f" ({size(machine['available'])} available)"
    )


def devices(found: dict[str, Any]) -> list[str]:
    """What torch and faiss can compute on."""
    torch, faiss = found["torch"], found["faiss"]
    if "fault" in torch:
        lines = [f"  torch: {torch['fault']}"]
    else:
        built = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "CPUs alone"
        lines = [f"  torch: built for {built}, {torch['threads']} threads" + ", MPS" * torch["mps"]]
        lines += [
            f"    cuda:{number}  {gpu['name']}, {size(gpu['total'])} ({size(gpu['free'])} free), "
            f"compute capability {gpu['capability']}"
            for number, gpu in enumerate(torch["gpus"])
        ] or ["    no GPU"]
    if "fault" in faiss:
        return [*lines, f"  faiss: {faiss['fault']}"]
    kind = f"for GPUs, of which it sees {faiss['gpus']}" if faiss["for_gpus"] else "for CPUs"
    return [*lines, f"  faiss: built {kind} ({' '.join(faiss['options'])}), {faiss['threads']} threads"]


def discovered(answer: dict[str, Any]) -> str:
    if "fault" in answer:
        return answer["fault"]
    return f"finds knn-hf ({answer['model']}); tasks: {'found' if answer['tasks'] else 'not found'}"


def size(number: int | None) -> str:
    """So many bytes as people read them; ``-`` for None."""
    from knn_lm_eval.system.memory import size_text

    return "-" if number is None else size_text(number)
