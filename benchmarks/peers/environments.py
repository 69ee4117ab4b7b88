"""Where each engine is installed: a virtual environment of its own below build/peers, made once.

Nothing here is needed to serve or to test; versions are the newest that install together.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

FOLDER = Path("build/peers")


class Absent(Exception):
    """An engine cannot be run here; says why."""


class Peer(NamedTuple):
    """An engine: what pip installs for it (nothing: this Python has it), and its ways of working.

    Attributes:
        variants: of a number of requests, the names of what is to be tried; the best one counts.
    """

    requirements: str = ""
    variants: Callable[[int], list[str]] = lambda n_requests: [""]


PEERS = {
    "fastgen_jax": Peer(),
    "transformers": Peer(
        "torch transformers",
        lambda n: [*(f"static {n // part}" for part in (1, 2, 4)), "continuous"],
    ),
    "openvino": Peer("openvino-genai optimum-intel nncf tabulate torch"),
    "llama_cpp": Peer("llama-cpp-python gguf safetensors ml_dtypes"),
}


def python_of(name: str) -> str:
    """The Python that has that engine.

    Raises:
        Absent: it does not install.
    """
    requirements = PEERS[name].requirements
    if not requirements:
        return sys.executable
    folder = FOLDER / name
    python, log = folder / "bin/python", FOLDER / f"{name}.log"
    if not (folder / "complete").exists():
        print(f"  installing {name} into {folder} (log: {log})", file=sys.stderr, flush=True)
        FOLDER.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            for command in (
                [sys.executable, "-m", "venv", "--clear", str(folder)],
                [str(python), "-m", "pip", "install", *shlex.split(requirements)],
            ):
                if subprocess.run(command, stdout=output, stderr=output, check=False).returncode:
                    raise Absent(f"it does not install; {log} says why")
        (folder / "complete").touch()
    return str(python)
