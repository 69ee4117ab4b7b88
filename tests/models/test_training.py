"""`model(tokens, segment_ids, positions)`, the forward of trainers, against Hugging Face, and its
gradients against differences.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastgen_jax.checkpoints.directory import read_config
from fastgen_jax.checkpoints.loading import flat_params, load_model
from fastgen_jax.engine.startup import fit_rope
from fastgen_jax.errors import ConfigError
from fastgen_jax.models.dense import dense_attend
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.sharding import make_mesh, training_sharding
from pallas_kernels import AttentionSpec
from tests.golden.agreement import forward
from tests.models.test_golden import GOLDEN, OPTIONS, TOLERANCE
from tests.tiny import dense_attend as attend_plainly

# Of each mechanism one: plain; windows, soft caps, two norms; sinks, clamped experts; ALiBi; latent
# attention, groups of experts; a gated shared expert; sparsemixer; parallel residual; growing
# queries, weighed inputs; norms after, of all heads; a learned activation.
MECHANISMS = ["mha", "gemma2", "gpt_oss", "bloom", "deepseek_v3"]
MECHANISMS += [
    pytest.param(name, marks=pytest.mark.exhaustive)
    for name in ("qwen2_moe", "phimoe", "gptj", "llama4_text", "olmo2", "apertus")
]
SPECS = {
    "plain": (AttentionSpec(0.3), ()),
    "window": (AttentionSpec(0.3, window=140), ()),
    "soft cap, ALiBi": (AttentionSpec(0.3, soft_cap=1.5), ("alibi_slopes",)),
    "sinks, short window": (AttentionSpec(0.3, window=5), ("sinks",)),
}


@functools.cache
def model_of(name: str, dtype: str = "float32"):
    config = fit_rope(read_config(GOLDEN / name), OPTIONS["max_model_len"])
    return load_model(GOLDEN / name, config, Policy(dtype, dtype), make_mesh(1))


def known_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a golden and Hugging Face's logits after each."""
    with np.load(GOLDEN / name / "golden.npz", allow_pickle=False) as golden:
        known = np.concatenate([golden["prompt_ids"], golden["greedy_ids"][:-1]])
        return known.astype(np.int32), golden["logits"]


def test_a_row_without_segments_is_one_text_with_or_without_a_batch():
    known, expected = known_of("mha")
    one, many = forward(model_of("mha"), known), forward(model_of("mha"), known[None])
    assert one.shape == expected.shape
    assert np.abs(one - expected).max() <= TOLERANCE
    assert np.abs(many[0] - one).max() <= 1e-5


@pytest.mark.parametrize("name", ["mha", "mistral"])
def test_attention_of_jax_gives_the_same_logits(name):
    known, expected = known_of(name)
    segments = np.ones_like(known)
    logits = forward(model_of(name), known, segments, attention="xla")
    assert np.abs(logits - expected).max() <= TOLERANCE


def test_attention_that_lacks_what_a_layer_needs_is_refused():
    with pytest.raises(ConfigError, match="neither soft caps nor sinks nor ALiBi"):
        forward(model_of("bloom"), known_of("bloom")[0], attention="xla")
    with pytest.raises(ConfigError, match="'flash' is not known; known: chunked, xla, cudnn"):
        dense_attend(1, None, "flash")


@pytest.mark.parametrize("name", SPECS)
def test_chunks_of_packed_rows_attend_and_have_gradients_as_texts_alone(name):
    """Texts of 190 and 110 tokens in chunks of 128."""
    spec, extras = SPECS[name]
    rng = np.random.default_rng(0)
    q, out = rng.normal(size=(2, 300, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 300, 2, 8)).astype(np.float32)
    per_head = {extra: rng.uniform(0, 1, 4).astype(np.float32) for extra in extras}
    packed = dense_attend(1, jnp.repeat(jnp.array([1, 2]), jnp.array([190, 110]))[None])

    def total(attend, start, end, arrays):
        q, k, v, sinks = arrays
        options = per_head | ({"sinks": sinks} if "sinks" in extras else {})
        rows = (x[start:end] for x in (q, k, v))
        return jnp.sum(attend(*rows, None, spec=spec, **options)[0] * out[start:end])

    arrays = q, k, v, per_head.get("sinks", np.float32(0))
    value, gradient = jax.value_and_grad(functools.partial(total, packed, 0, 300))(arrays)
    alone = [
        jax.value_and_grad(functools.partial(total, attend_plainly, *ends))(arrays)
        for ends in ((0, 190), (190, 300))
    ]
    assert abs(value - sum(part for part, _ in alone)) <= 1e-3
    expected = jax.tree.map(jnp.add, *(part for _, part in alone))
    for found, wanted in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def loss_of(model, tokens, out, options: dict | None = None):
    return jnp.sum(model(tokens, **(options or {})) * out)


def gradient_of(model, tokens, out, **options):
    return jax.jit(jax.grad(lambda model: loss_of(model, tokens, out, options)))(model)


def subject(name: str, dtype: str = "float32"):
    """A model, a batch, and weights of its logits that make them a loss."""
    model, tokens = model_of(name, dtype), np.stack([known_of(name)[0][:20]] * 2)
    tokens[1] = tokens[1, ::-1]
    size = (*tokens.shape, model.config.vocab_size)
    return model, tokens, np.random.default_rng(0).normal(size=size).astype(np.float32) / 20


@pytest.mark.parametrize("name", MECHANISMS)
def test_gradients_are_the_differences_of_the_loss(name):
    """Along the gradient and along a direction by chance, so little that no token changes its
    experts.
    """
    model, tokens, out = subject(name)
    gradient = gradient_of(model, tokens, out, remat=True)
    loss = jax.jit(lambda model: loss_of(model, tokens, out))
    rng = np.random.default_rng(1)
    chance = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), gradient)
    for direction in (gradient, chance):
        length = norm(direction)
        high, low = (
            loss(jax.tree.map(lambda x, d, s=step / length: x + s * d, model, direction))
            for step in (5e-5, -5e-5)
        )
        slope = inner(gradient, direction) / length
        assert abs((high - low) / 1e-4 - slope) <= 0.01 * abs(slope) + 2e-3 * norm(gradient)


def inner(one, other) -> float:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return float(sum(np.vdot(np.float64(a), np.float64(b)) for a, b in pairs))


def norm(tree) -> float:
    return inner(tree, tree) ** 0.5


def assert_alike(found, wanted, tolerance: float) -> None:
    """Gradients, by their largest difference relative to their largest element."""
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("remat", [True, jax.checkpoint_policies.dots_saveable])
def test_layers_that_are_computed_again_have_the_same_gradients(remat):
    model, tokens, out = subject("gqa")
    again = gradient_of(model, tokens, out, remat=remat)
    assert_alike(again, gradient_of(model, tokens, out), 1e-6)


def test_of_layers_that_are_computed_again_only_their_input_is_kept():
    model, _, _ = subject("gqa")
    tokens = jnp.zeros((2, 512), jnp.int32)
    _, backward = jax.vjp(lambda model: model(tokens, remat=True), model)
    params = {id(x) for x in jax.tree.leaves(model)}
    sizes = [x.size for x in jax.tree.leaves(backward) if id(x) not in params]
    config = model.config
    assert max(sizes) <= tokens.size * max(config.hidden_size, config.head_dim)
    assert sum(sizes) <= tokens.size * (config.n_layers + 5) * config.hidden_size


@pytest.mark.parametrize("name", ["gqa", "gpt_oss"])
def test_gradients_in_bfloat16_point_where_those_in_float32_do(name):
    model, tokens, out = subject(name, "bfloat16")
    found, wanted = gradient_of(model, tokens, out), gradient_of(*subject(name))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(found) if x.ndim > 1)
    assert inner(found, wanted) >= 0.98 * norm(found) * norm(wanted)


def train_mesh(**axes: int) -> Mesh:
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes)
    )


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("gqa", {"fsdp": 4, "tensor": 2}),
        ("gqa", {"fsdp": 8}),
        ("gqa", {"tensor": 2}),
        ("deepseek_v3", {"fsdp": 4, "tensor": 2}),
    ],
)
def test_loss_and_gradients_on_several_devices_are_those_of_one(name, axes):
    model, tokens, out = subject(name)
    tokens, out = np.tile(tokens, (4, 1)), np.tile(out, (4, 1, 1))
    mesh = train_mesh(**axes)
    shardings = shardings_of(model, mesh)
    rows = NamedSharding(mesh, PartitionSpec("fsdp" if "fsdp" in axes else None))

    def step(model, tokens, out):
        return jax.value_and_grad(loss_of)(model, tokens, out, {"mesh": mesh, "remat": True})

    one = jax.jit(jax.value_and_grad(loss_of))(model, tokens, out)
    several = jax.jit(step, out_shardings=(None, shardings))(
        jax.device_put(model, shardings), *jax.device_put((tokens, out), rows)
    )
    assert float(several[0]) == pytest.approx(float(one[0]), rel=1e-4)
    assert_alike(several[1], one[1], 1e-5)


def shardings_of(model, mesh: Mesh):
    specs = [
        training_sharding(path, param.shape, model.config, mesh)
        for path, param in flat_params(model).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(model), specs)


def test_parameters_are_stored_once_over_fsdp_and_split_by_whole_heads():
    config = read_config(GOLDEN / "gqa")

    def spec(path: str, *shape: int, n_fsdp: int = 4, n_tensor: int = 2):
        mesh = train_mesh(fsdp=n_fsdp, tensor=n_tensor)
        return tuple(training_sharding(path, shape, config, mesh).spec)

    k, g, h = config.n_kv_heads, config.group_size, config.head_dim
    assert k == 2
    qkv = k * (g + 2) * h
    assert spec("layers.0.attention.qkv.weight", qkv, 64) == ("tensor", "fsdp")
    assert spec("layers.0.attention.out.weight", 64, k * g * h) == ("fsdp", "tensor")
    assert spec("layers.0.attention.qkv.bias", qkv) == (("tensor", "fsdp"),)
    assert spec("layers.0.attention.qkv.weight", qkv, 64, n_fsdp=2, n_tensor=4) == (None, "fsdp")
    assert spec("layers.0.mlp.gate_up.weight", 2 * 96, 63) == (("tensor", "fsdp"), None)
    assert spec("embed.weight", 260, 64) == (None, "fsdp")
    assert spec("norm.weight", 63) == (None,)
