"""What scripts share. A scenario is a function of the server's address; its name says what is seen.

A script prints a line for each. What pydantic, of which most clients are made, has to warn of in an
answer fails the scenario.
"""

import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

DEMO = Path(__file__).parents[2] / "fastgen_jax" / "demo" / "checkpoint"
MODEL = "fastgen-demo"
KEY = "any"  # a server without keys takes any
TALE = "Tell me a story about Tom."
HISTORY = [{"role": "user", "content": TALE}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


def main(*scenarios: Callable[[str], None]) -> None:
    """Runs all on the address of the command line; the exit status says whether one failed."""
    failed = [scenario for scenario in scenarios if not passes(scenario, sys.argv[1])]
    sys.exit(bool(failed))


def run_command(*words: object, seconds: float = 240, **variables: str) -> str:
    """What a command of the tool prints; one that fails says why."""
    done = subprocess.run(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=seconds, env={**os.environ, **variables}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, " | ".join(done.stdout.strip().splitlines()[-8:])
    return done.stdout


def beside_python(name: str) -> Path:
    """A program of the environment that runs the script."""
    return Path(sys.executable).parent / name


def passes(scenario: Callable[[str], None], url: str) -> bool:
    """Prints `ok NAME` or `FAILED NAME: why`, and where on stderr."""
    name = scenario.__name__.replace("_", " ")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Pydantic serializer")
            scenario(url)
    except Exception as error:
        traceback.print_exc()
        first, *_ = [*str(error).splitlines(), ""]
        print(f"FAILED {name}: {type(error).__name__} {first[:400]}", flush=True)
        return False
    print(f"ok {name}", flush=True)
    return True
