"""Another checkpoint over HTTP, on an engine with a model: it says what a fresh one says."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastgen_jax.built_in import DEMO
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.types import Request
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.tokenizer import Tokenizer
from tests import tiny
from tests.server.running import Running, events_of, serving, wait_until
from tests.server.test_admin import ask, phase, update

IDS = [0, *range(300, 340)]  # longer than a block
N_TOKENS = 12
LONG = 150
ASK = {"prompt": IDS, "max_tokens": N_TOKENS, "temperature": 0, "ignore_eos": True,
       "return_token_ids": True}  # fmt: skip


def config(directory: Path) -> EngineConfig:
    return EngineConfig(
        model=str(directory), max_model_len=256, block_size=16, num_kv_blocks=40,
        max_num_batched_tokens=64, max_num_seqs=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The demo as `base`, `other` of other weights, and `misfit` that two tensors keep out."""
    root = tmp_path_factory.mktemp("weights")
    for name in ("base", "other", "misfit"):
        shutil.copytree(DEMO, root / name)
    tensors = load_file(DEMO / "model.safetensors")
    noise = np.random.default_rng(0)
    others = {
        name: (array + noise.normal(size=array.shape, scale=0.05)).astype(array.dtype)
        for name, array in tensors.items()
    }
    save_file(others, root / "other" / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        others[name] = np.zeros((3,), np.float32)
    save_file(others, root / "misfit" / "model.safetensors")
    return root


@pytest.fixture(scope="module")
def said_by_other(root) -> list[int]:
    """By an engine that has never had other weights."""
    params = SamplingParams(max_tokens=N_TOKENS, temperature=0.0, ignore_eos=True)
    with tiny.one_program(config(root / "other")) as fresh:
        (outputs,) = tiny.run(fresh, [Request(IDS, params)])
    return tiny.tokens(outputs)


@pytest.fixture(scope="module")
def shared(root) -> Iterator[Running]:
    engine, tokenizer = tiny.one_program(config(root / "base")), Tokenizer(str(DEMO))
    with engine, serving(tokenizer, engine, admin_key="admin-key", weights_root=str(root)) as up:
        yield up


@pytest.fixture
def up(shared) -> Running:
    """With the weights of `base`, awake."""
    assert ask(shared, "/wake_up").status_code == 200
    assert update(shared, "base").status_code == 200
    return shared


def said(up: Running) -> list[int]:
    reply = ask(up, "/v1/completions", ASK).json()
    return reply["choices"][0]["token_ids"]


@pytest.mark.parametrize("in_flight", ["recompute", "drain", "keep"])
def test_the_new_weights_say_what_a_fresh_engine_says(up, said_by_other, in_flight):
    before = said(up)
    assert update(up, "other", in_flight=in_flight).status_code == 200
    assert said(up) == said_by_other != before
    assert update(up, "base").status_code == 200
    assert said(up) == before


@pytest.mark.parametrize("in_flight", ["recompute", "drain", "keep"])
def test_a_stream_that_has_begun_goes_on_to_its_end(up, said_by_other, in_flight):
    body = ASK | {"max_tokens": LONG, "stream": True}
    with up.http.stream("POST", up.url + "/v1/completions", json=body) as reply:
        lines = reply.iter_text()
        received = next(lines)
        assert update(up, "other", in_flight=in_flight).status_code == 200
        received += "".join(lines)
    *chunks, done = events_of(received)
    ids = [id for chunk in chunks for choice in chunk["choices"] for id in choice["token_ids"]]
    assert (len(ids), done) == (LONG, "[DONE]")
    assert said(up) == said_by_other


def test_what_does_not_fit_is_listed_and_changes_nothing(up, root):
    before = said(up)
    error = update(up, "misfit").json()["error"]
    for name in ("up_proj", "norm"):
        assert name in error["message"]
    assert (error["param"], str(root) in error["message"]) == ("path", False)
    assert said(up) == before
    assert phase(up) == (200, "ready")


@pytest.mark.parametrize("level", [1, 2])
def test_who_asks_a_sleeping_engine_waits_until_it_wakes(up, level):
    before = said(up)
    assert ask(up, f"/sleep?level={level}").json() == {"is_sleeping": True}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(said, up)
        wait_until(lambda: up.service._live)
        assert phase(up) == (503, "sleeping")
        assert not waiting.done()
        assert ask(up, "/wake_up").json() == {"is_sleeping": False}
        assert waiting.result() == before


def test_cached_prompts_are_forgotten_on_demand(up):
    def n_cached() -> int:
        usage = ask(up, "/v1/completions", ASK).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    n_cached()
    assert n_cached() > 0
    assert ask(up, "/reset_prefix_cache").status_code == 200
    assert n_cached() == 0
