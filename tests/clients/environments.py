"""Makes what tools are installed in, below build/clients/, and says in what surroundings they run.

An environment is made again when its pins change. What is not there and cannot be fetched is
Missing, with the reason: its tools do not run, and the table says so.
"""

import os
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "clients"
LIST = tomllib.loads((Path(__file__).parent / "tools.toml").read_text())
SCRATCH, HOME = BUILD / "scratch", BUILD / "home"
UV_LOCK = threading.Lock()
SEALED = Path(__file__).parent / "sealed"
# Tools tell their makers how they are used, and look for news of themselves, unless told otherwise.
QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LANGSMITH_TRACING": "false",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "ANONYMIZED_TELEMETRY": "False",
    "SCARF_NO_ANALYTICS": "true",
    "AIDER_ANALYTICS": "false",
    "AIDER_CHECK_UPDATE": "false",
}


class Missing(Exception):
    """A tool cannot be had on this machine."""


class Environment(NamedTuple):
    """Packages that live together: of Python, with what they need or `alone`, or of node.

    `without` names what packages ask for and these tools do without.
    """

    name: str
    packages: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return BUILD / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def version(self, package: str) -> str:
        """As pinned, PACKAGE[extra]==1.2 or, of node, PACKAGE@1.2."""
        for pin in self.packages + self.alone + self.modules:
            name, _, version = pin.replace("==", "@").rpartition("@")
            if name.split("[")[0] == package:
                return version
        return ""

    def make(self) -> None:
        """Installs, unless it is there as pinned.

        Raises:
            Missing: what is needed is not on this machine and cannot be fetched.
        """
        stamp = self.folder / "installed"
        wanted = f"{LIST['uploaded_before']} {sys.version} {self}"
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._install_modules() if self.modules else self._install_packages()
        stamp.write_text(wanted)

    def _install_packages(self) -> None:
        uv = [get_uv(), "--quiet"]
        fetch([*uv, "venv", "--python", sys.executable, "--clear", self.folder])
        # A torch for CPU, which PyPI lacks, is where pip is told to look, and has no date.
        dates = [
            "--exclude-newer",
            LIST["uploaded_before"],
            "--exclude-newer-package",
            "torch=false",
        ]
        into = [*uv, "pip", "install", "--python", self.python, *dates]
        left_out = self.folder / "without"
        left_out.write_text("".join(f"{name}; python_version < '3'\n" for name in self.without))
        fetch([*into, "--override", left_out, *self.packages])
        if self.alone:
            fetch([*into, "--no-deps", *self.alone])

    def _install_modules(self) -> None:
        npm = shutil.which("npm") if shutil.which("node") else None
        if npm is None:
            raise Missing("there is no node, or no npm, on the PATH")
        (self.folder / "package.json").write_text("{}")
        day = f"--before={LIST['uploaded_before']}"
        quiet = ["--no-audit", "--no-fund", "--loglevel=error"]
        fetch([npm, "install", "--prefix", self.folder, day, *quiet, *self.modules])


def environments() -> dict[str, Environment]:
    tables = LIST["environments"].items()
    return {
        name: Environment(name, **{field: tuple(pins) for field, pins in table.items()})
        for name, table in tables
    }


def get_uv() -> Path:
    folder = BUILD / f"uv-{LIST['uv']}"
    with UV_LOCK:
        if not (folder / "bin" / "uv").is_file():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder]
            fetch([*pip, f"uv=={LIST['uv']}"])
    return folder / "bin" / "uv"


def fetch(command: list) -> None:
    """Raises Missing with the end of what a command says that fails."""
    found = os.environ.get("PIP_FIND_LINKS")
    settings = {**os.environ, **({"UV_FIND_LINKS": found} if found else {})}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=settings, check=False
    )
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no word"]
        raise Missing(f"{Path(command[0]).name} could not fetch it: {' '.join(said)[-300:]}")


def settings_of_a_tool(calls_out: Path, scratch: Path) -> dict[str, str]:
    """Environment variables: a home of its own, no talk, and no way out."""
    return QUIET | {
        "PATH": os.environ["PATH"],
        "HOME": str(HOME),
        "TMPDIR": str(scratch),
        "PYTHONPATH": f"{SEALED}{os.pathsep}{ROOT}",
        "NODE_OPTIONS": f"--import={(SEALED / 'seal.mjs').as_uri()}",
        "CALLS_OUT": str(calls_out),
        "PYTHON": sys.executable,  # that has our packages
        "LANG": "C.UTF-8",
    }
