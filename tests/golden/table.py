"""The README's table of model families, from their docstrings.

python -m tests.golden.table
"""

import collections
import json
from pathlib import Path

from fastgen_jax.models import families
from fastgen_jax.models.families.wrappers import WRAPPERS, text_config

HEADER = "| model type | what it is |\n|---|---|\n"


def goldens() -> dict[str, list[str]]:
    """Names of goldens by model_type, and by that of a wrapper's text."""
    found = collections.defaultdict(list)
    for path in sorted(Path(__file__).parent.glob("*/config.json")):
        hf = json.loads(path.read_text())
        for model_type in {hf["model_type"], text_config(hf)["model_type"]}:
            found[model_type].append(path.parent.name)
    return found


def table() -> str:
    """A row per module of a family, and one of all wrappers."""
    types = collections.defaultdict(list)
    for model_type in sorted(families.FAMILIES):
        types[families.family(model_type)].append(model_type)
    rows = [(names, (family.__doc__ or "").split("\n\n")[0]) for family, names in types.items()]
    rows.append((sorted(WRAPPERS), "the text of models that also see or hear."))
    return HEADER + "".join(f"| {_quoted(names)} | {_line(title)} |\n" for names, title in rows)


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _line(title: str) -> str:
    return " ".join(title.split()).rstrip(".")


if __name__ == "__main__":
    print(table())
