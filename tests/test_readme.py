"""What the README shows of the library in a JAX program does what it says there."""

import ast
import asyncio
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

from fastgen_jax.built_in import DEMO

README = Path(__file__).parents[1] / "README.md"


def blocks(title):
    """The Python of one section."""
    section = README.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


async def run(source, names):
    """Runs a block as a notebook does, which may await."""
    code = compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if inspect.isawaitable(result):
        await result


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the section's blocks leave, one after the other, with the demo as the model."""
    paths = {"path/to/model": str(DEMO), "path/to/trace": str(tmp_path_factory.mktemp("trace"))}
    left = {"directory": paths["path/to/trace"]}
    for source in blocks("In a JAX program"):
        for shown, path in paths.items():
            source = source.replace(shown, path)
        asyncio.run(run(source, left))
    return left


def test_each_block_of_the_section_runs(names):
    assert len(blocks("In a JAX program")) == 7
    assert names["output"].finished
    assert list(Path(names["directory"]).rglob("*.xplane.pb"))


def test_what_the_blocks_leave_is_what_the_text_says(names):
    assert names["logprobs"].shape == (len(names["logprobs"]),)
    assert (names["logprobs"] < 0).all()
    assert names["states"].shape[:2] == (2, 1)
    alone, beside = (outputs[0] for outputs in (names["alone"], names["beside"]))
    assert alone == beside
    assert np.isfinite(float(names["loss"](names["model"])))
