"""Engines on modules that the program holds: shared where they may be, moved where they must be."""

import jax
import numpy as np
import pytest
from flax import nnx

from fastgen_jax import LLM, models
from fastgen_jax.checkpoints.loading import flat_params
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import ConfigError, WeightsError
from fastgen_jax.models.sharding import make_mesh
from fastgen_jax.sampling_params import SamplingParams
from tests import tiny

OPTIONS = {name: value for name, value in tiny.OPTIONS.items() if name != "load_format"}
UNEVEN = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 63}
UNEVEN |= {"intermediate_size": 65, "tie_word_embeddings": False}


def module(seed=0, n_devices=1, dtype="float32", **changes):
    config, rngs = tiny.CONFIG | changes, nnx.Rngs(seed)
    return models.create(config, rngs, dtype=dtype, mesh=make_mesh(n_devices))


def engine_on(module, **options):
    return tiny.one_program(EngineConfig(**OPTIONS | options), module=module)


def buffers(array):
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


def greedy(engine, seed=1):
    return [tiny.tokens(outputs) for outputs in tiny.run(engine, tiny.random_requests(seed, 3))]


def live_bytes():
    """Of all buffers, however many arrays share one."""
    arrays = [array for array in jax.live_arrays() if not array.is_deleted()]
    shards = [shard.data for array in arrays for shard in array.addressable_shards]
    return sum({shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}.values())


@pytest.mark.parametrize("n_devices", [1, 2])
def test_engine_shares_the_buffers_of_a_module(n_devices):
    held = module(n_devices=n_devices)
    with engine_on(held, tensor_parallel_size=n_devices) as engine:
        leaves = jax.tree.leaves(held)
        assert list(map(buffers, engine._runner.leaves)) == list(map(buffers, leaves))


def test_engine_on_a_module_takes_no_memory_for_weights(no_collection):
    held = module()
    before = live_bytes()
    with engine_on(held) as engine:
        runner = engine._runner
        own = sum(a.nbytes for a in jax.tree.leaves((runner.state, runner._row_tables)))
        assert live_bytes() - before == own
    assert live_bytes() == before


@pytest.mark.parametrize("changes", [{}, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(("given", "wanted"), [(1, 4), (4, 2)])
def test_engine_on_other_devices_makes_the_same_tokens(changes, given, wanted):
    with engine_on(module(**changes)) as engine:
        expected = greedy(engine)
    held = module(n_devices=given, **changes)
    with engine_on(held, tensor_parallel_size=wanted) as engine:
        assert greedy(engine) == expected


def test_engine_of_another_dtype_has_arrays_of_its_own():
    held = module()
    with engine_on(held, dtype="bfloat16") as engine:
        for own, given in zip(engine._runner.leaves, jax.tree.leaves(held), strict=True):
            np.testing.assert_array_equal(own, given.astype("bfloat16"))


def test_dtype_auto_is_the_modules():
    with engine_on(module(dtype="bfloat16")) as engine:
        assert engine.config.dtype == "bfloat16"
        assert {leaf.dtype.name for leaf in engine._runner.leaves} == {"bfloat16"}


def test_module_of_a_directory_makes_the_tokens_of_an_engine_on_it(tmp_path):
    held = module(seed=3)
    expected = tiny.Naive.of_model(held, 2, 96).greedy([5, 6, 7], 8)
    with LLM.from_module(held, **OPTIONS) as llm:
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        (output,) = llm.generate([5, 6, 7], params, use_tqdm=False)
    assert output.outputs[0].token_ids == expected


def test_models_are_created_alike_from_whatever_says_their_config(tmp_path):
    path = tiny.write_config(tmp_path)
    expected = module()
    for config in (path, tmp_path, expected.config):
        found = models.create(config, nnx.Rngs(0))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other)


def test_two_models_of_the_same_rngs_differ():
    rngs = nnx.Rngs(0)
    one, other = (flat_params(models.create(tiny.CONFIG, rngs)) for _ in range(2))
    assert (one["embed.weight"][...] != other["embed.weight"][...]).any()


def test_module_with_deleted_arrays_is_refused_by_their_names():
    held = module()
    held.layers[1].mlp.down.weight[...].delete()
    with pytest.raises(WeightsError, match=r"deleted: layers.1.mlp.down.weight .*donated"):
        engine_on(held)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"model": "there"}, "model does not go with a module"),
        ({"load_format": "dummy"}, "load_format does not go with a module"),
        ({"max_model_len": 1000}, "exceeds the 256 positions"),
    ],
)
def test_options_that_do_not_go_with_a_module_are_refused(options, problem):
    with pytest.raises(ConfigError, match=problem):
        engine_on(module(), **options)


def test_other_modules_and_meshes_are_refused_with_what_is_wanted():
    with pytest.raises(ConfigError, match="is wanted, got Linear"):
        engine_on(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    mesh = jax.make_mesh((2, 2), ("data", "tensor"))
    with pytest.raises(ConfigError, match="one axis 'tensor' is wanted"):
        models.create(tiny.CONFIG, nnx.Rngs(0), mesh=mesh)
    with pytest.raises(ConfigError, match="dtype must be auto, float32, bfloat16 or float16"):
        models.create(tiny.CONFIG, nnx.Rngs(0), dtype="int8")
