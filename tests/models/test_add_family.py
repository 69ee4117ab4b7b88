"""The page "Add a model family": what it tells a newcomer to write is run as they would."""

import json
import re
import types

import numpy as np
import pytest

from fastgen_jax.checkpoints import loading
from fastgen_jax.models import families
from fastgen_jax.models.families.wrappers import WRAPPERS
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.sharding import make_mesh
from tests.golden.families import FAMILIES
from tests.golden.table import goldens, table
from tests.models.test_golden import GOLDEN, TOLERANCE
from tests.tiny import Naive

PAGE = (GOLDEN.parents[1] / "fastgen_jax/models/families/ADDING.md").read_text()
FAMILY, ENTRY = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def newcomer(monkeypatch):
    """The page's family under a name that nobody knows."""
    module = types.ModuleType("newcomer")
    exec(compile(FAMILY, "ADDING.md", "exec"), vars(module))
    monkeypatch.setitem(families.FAMILIES, "newcomer", "newcomer")
    known = families.family
    monkeypatch.setattr(families, "family", lambda n: module if n == "newcomer" else known(n))
    return module


def test_family_of_the_page_gives_the_logits_of_transformers(newcomer):
    hf = json.loads((GOLDEN / "smollm3/config.json").read_text())
    config = newcomer.config(hf | {"model_type": "newcomer"})
    config = config.__class__(**vars(config) | {"family": "newcomer"})
    model = loading.load_model(GOLDEN / "smollm3", config, Policy(), make_mesh(1))
    with np.load(GOLDEN / "smollm3/golden.npz", allow_pickle=False) as golden:
        known = np.concatenate([golden["prompt_ids"], golden["greedy_ids"][:-1]])
        expected = golden["logits"]
    logits = Naive.of_model(model, config.n_layers, length=len(known)).logits(known)
    assert np.abs(logits - expected).max() <= TOLERANCE


def test_page_shows_the_files_as_they_are():
    assert (GOLDEN.parents[1] / "fastgen_jax/models/families/smollm3.py").read_text() == FAMILY
    name, _, value = ENTRY.strip().removesuffix(",").partition(": ")
    assert json.loads(name) == "smollm3"
    assert value in (GOLDEN / "families.py").read_text()
    assert FAMILIES["smollm3"]["model_type"] == "smollm3"


def test_every_family_has_goldens_and_a_line_in_the_readme():
    assert {*families.FAMILIES, *WRAPPERS} <= set(goldens())
    assert table() in (GOLDEN.parents[1] / "README.md").read_text()


def test_page_names_every_field_that_a_family_may_set():
    from fastgen_jax.models.config import ModelConfig

    sizes = {"family", "vocab_size", "hidden_size", "n_layers", "n_heads", "n_kv_heads"}
    sizes |= {"head_dim", "ffn_size", "max_position", "eos_token_ids", "bos_token_id"}
    missing = [
        n for n in ModelConfig.__dataclass_fields__ if n not in sizes and f"`{n}`" not in PAGE
    ]
    assert missing == []
