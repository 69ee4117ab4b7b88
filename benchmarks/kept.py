"""What is kept of a run: rows as CSV and JSON, a table as Markdown, and how it was made."""

import csv
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("fastgen-jax", "jax", "numpy", "scipy")


def save(
    folder: Path,
    name: str,
    rows: Sequence[dict[str, Any]],
    text: str,
    *,
    is_measured: bool = False,
    **more: Any,
) -> None:
    """Writes NAME.csv, NAME.json and NAME.md; `more` are further tables for the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    made = provenance(is_measured=is_measured)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _rounded(value) for key, value in row.items()} for row in rows)
    found = _rounded({"made": made, "rows": list(rows)} | more)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    heading = ", ".join(f"{key}: {value}" for key, value in made.items())
    (folder / f"{name}.md").write_text(f"{text}\n\n{heading}\n")


def provenance(*, is_measured: bool) -> dict[str, str]:
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "versions": f"Python {platform.python_version()} {versions}",
        "machine": f"{processor()}, {os.cpu_count()} cores" if is_measured else "none: simulated",
    }


def processor() -> str:
    """Its name, where the system has one."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[_cell(key, value) for key, value in row.items()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    if name.startswith("difference"):
        return f"{value:+.0%}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _rounded(value: Any) -> Any:
    """To six digits, and nothing that JSON lacks."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value
