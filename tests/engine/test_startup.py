"""What is decided before a model is loaded: lengths, the attention backend."""

import pytest

from fastgen_jax.engine import startup
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import ConfigError
from fastgen_jax.models.families import llama
from fastgen_jax.models.sharding import make_mesh
from tests.tiny import CONFIG


def resolve(model, **options) -> startup.ResolvedConfig:
    return startup.resolve(EngineConfig(**options), model, make_mesh(1))


def of(original: int, kind: str, **fields) -> dict:
    """A rope_scaling."""
    return {"rope_type": kind, "original_max_position_embeddings": original, **fields}


FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize(
    ("positions", "rope", "longest"),
    [
        (32768, None, 32768),
        (4096, {"type": "linear", "factor": 2.5}, 10240),
        (4096, {"type": "dynamic", "factor": 2.0}, 8192),
        # Qwen 2.5 and Qwen 3, as their cards tell users to stretch them.
        (32768, {"type": "yarn", "factor": 4.0}, 131072),
        (40960, of(32768, "yarn", factor=4.0), 131072),
        # DeepSeek V3, GPT-OSS, Llama 3.2, Phi-3.5, which were trained stretched.
        (163840, of(4096, "yarn", factor=40), 163840),
        (131072, of(4096, "yarn", factor=32.0, truncate=False), 131072),
        (131072, of(8192, "llama3", factor=32.0), 131072),
        (131072, of(4096, "longrope", **FACTORS), 131072),
    ],
)
def test_longest_context_is_the_stretched_one_whoever_stretched_it(positions, rope, longest):
    model = llama.config(CONFIG | {"max_position_embeddings": positions, "rope_scaling": rope})
    assert resolve(model).max_model_len == longest
    assert resolve(model, max_model_len=longest).max_model_len == longest
    with pytest.raises(ConfigError, match=f"exceeds the {longest} positions of the model"):
        resolve(model, max_model_len=longest + 1)


def test_cpu_without_its_library_has_plain_xla_and_says_so(monkeypatch, caplog):
    def select(name):
        raise ImportError("the CPU's attention is not built")

    monkeypatch.setattr(startup, "select", select)
    assert resolve(llama.config(CONFIG)).attention_backend == "xla"
    assert "attention_backend=xla, which is slower: the CPU's attention is not" in caplog.text
    with pytest.raises(ConfigError, match="the CPU's attention is not built"):
        resolve(llama.config(CONFIG), attention_backend="cpu")
