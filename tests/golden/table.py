"""The README's table of model families, from their docstrings and the goldens that test them.

python -m tests.golden.table
"""

import collections
import json
from pathlib import Path

from fastgen_jax.models import families
from fastgen_jax.models.families.wrappers import WRAPPERS, text_config

HEADER = "| model type | what it is | goldens |\n|---|---|---|\n"


def goldens() -> dict[str, list[str]]:
    """Names of goldens by model_type, and by that of a wrapper's text."""
    found = collections.defaultdict(list)
    for path in sorted(Path(__file__).parent.glob("*/config.json")):
        hf = json.loads(path.read_text())
        for model_type in {hf["model_type"], text_config(hf)["model_type"]}:
            found[model_type].append(path.parent.name)
    return found


def table() -> str:
    tested, rows = goldens(), ""
    for model_type in sorted(families.FAMILIES):
        title = (families.family(model_type).__doc__ or "").strip().split("\n\n")[0]
        names = ", ".join(tested[model_type])
        rows += f"| `{model_type}` | {' '.join(title.split()).rstrip('.')} | {names} |\n"
    for model_type in sorted(WRAPPERS):
        names = ", ".join(tested[model_type])
        rows += f"| `{model_type}` | of a model that also sees or hears, the text | {names} |\n"
    return HEADER + rows


if __name__ == "__main__":
    print(table())
