"""Tensor parallelism: one mesh axis, and which axis of each parameter it splits (Shoeybi et al.,
Megatron-LM, 2019).

Queries, keys, values, gate and up are split by their outputs, the products that follow by their
inputs, the cache by KV heads. A module is made with the parameters of one device, as checkpoints
have them; `place` lays them out for several.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layout import EMPTY, places, taken

AXIS = "tensor"
FSDP = "fsdp"


class Split(NamedTuple):
    """The axis of a parameter that devices split, and what lies along it (see layout.places)."""

    axis: int
    kind: str


# Suffix of a parameter's path -> how it is split; parameters not named are replicated.
SPLITS = {
    "attention.qkv.weight": Split(0, "qkv"),
    "attention.qkv.bias": Split(0, "qkv"),
    "attention.q.weight": Split(0, "queries"),  # latent attention's
    "attention.q_up.weight": Split(0, "queries"),
    "attention.kv_up.weight": Split(0, "keys"),
    "attention.out.weight": Split(1, "queries"),
    "attention.sinks": Split(0, "queries"),
    "mlp.gate_up.weight": Split(0, "gate_up"),
    "mlp.gate_up.bias": Split(0, "gate_up"),
    "mlp.down.weight": Split(1, "even"),
    "mlp.up.weight": Split(0, "even"),
    "mlp.up.bias": Split(0, "even"),
    "mlp.shared.gate_up.weight": Split(0, "gate_up"),
    "mlp.shared.gate_up.bias": Split(0, "gate_up"),
    "mlp.shared.down.weight": Split(1, "even"),
    "lm_head.weight": Split(0, "even"),
    "lm_head.bias": Split(0, "even"),
    # Experts whole, each on one device.
    "mlp.gate_up": Split(0, "even"),
    "mlp.gate_up_bias": Split(0, "even"),
    "mlp.down": Split(0, "even"),
    "mlp.down_bias": Split(0, "even"),
}
# Norms over heads, if they are not of each head alike.
HEAD_NORMS = {
    "attention.q_norm.weight": Split(0, "queries"),
    "attention.k_norm.weight": Split(0, "keys"),
}
CACHE = PartitionSpec(None, AXIS)  # "B K 2 C H" and its scales "B K 2 C" by KV heads
HEADS = PartitionSpec(None, AXIS)  # "T N H" by heads


def make_mesh(n_devices: int) -> Mesh:
    """A mesh over the first devices of the default backend; ConfigError when there are fewer."""
    devices = jax.devices()
    if n_devices > len(devices):
        raise ConfigError(
            f"tensor_parallel_size={n_devices} needs as many devices; {len(devices)} "
            f"{devices[0].platform} device(s) found"
        )
    return mesh_over(devices[:n_devices])


def mesh_over(devices: Sequence[Any]) -> Mesh:
    """The mesh over these devices, which need not be here."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def check_mesh(mesh: Mesh) -> Mesh:
    """The mesh; ConfigError unless it has the one axis that splits parameters."""
    if mesh.axis_names != (AXIS,):
        raise ConfigError(
            f"a mesh of the one axis {AXIS!r} is wanted, got {mesh.axis_names}; make_mesh of "
            "fastgen_jax.models.sharding makes one"
        )
    return mesh


def split_of(path: str, config: ModelConfig) -> Split | None:
    """How the parameter at a path is split; None: it is replicated."""
    has_head_norms = config.qk_norm in ("all", "each_head")
    for suffix, split in (SPLITS | HEAD_NORMS if has_head_norms else SPLITS).items():
        if path.endswith(suffix):
            return split
    return None


def lines_of(
    path: str, shape: tuple[int, ...], config: ModelConfig, n_shards: int
) -> tuple[int, Int[np.ndarray, "slots"]] | None:
    """The axis along which a parameter of that shape lies otherwise on several devices, and which
    of its lines are there; None: it lies as on one device.
    """
    split = split_of(path, config)
    if split is None:
        return None
    size = shape[split.axis]
    lines = places(split.kind, size, config, n_shards)
    is_same = len(lines) == size and (lines == np.arange(size)).all()
    return None if is_same else (split.axis, lines)


def placed(path: str, param: Any, config: ModelConfig, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of a parameter on the devices of the mesh.

    Args:
        param: anything of the shape and dtype that it has on one device.
    """
    split, shape = split_of(path, config), list(param.shape)
    if split is None:
        spec = PartitionSpec()
    else:
        spec = PartitionSpec(*[None] * split.axis, AXIS)
        shape[split.axis] = len(places(split.kind, shape[split.axis], config, mesh.size))
    return jax.ShapeDtypeStruct(tuple(shape), param.dtype, sharding=NamedSharding(mesh, spec))


def shape_on(
    path: str, shape: tuple[int, ...], config: ModelConfig, n_shards: int
) -> tuple[int, ...]:
    """On so many devices together, of a parameter that has the shape on one."""
    found = lines_of(path, shape, config, n_shards)
    if found is None:
        return tuple(shape)
    axis, lines = found
    return (*shape[:axis], len(lines), *shape[axis + 1 :])


def lies_alike(
    path: str, shape: tuple[int, ...], config: ModelConfig, one: int, other: int
) -> bool:
    """Whether a parameter has the same lines in the same order on so many devices as on others."""
    if one == other:
        return True
    return all(lines_of(path, shape, config, n) is None for n in (one, other))


def place(path: str, array: np.ndarray, config: ModelConfig, mesh: Mesh) -> jax.Array:
    """A parameter on the devices of the mesh.

    Args:
        array: as one device would have it. The host holds it and, where devices have its lines in
            another order, the part of one device.
    """
    want = placed(path, array, config, mesh)
    found = lines_of(path, array.shape, config, mesh.size)
    if found is None:
        return jax.device_put(array, want.sharding).block_until_ready()
    axis, lines = found
    shards = []
    for device, index in want.sharding.addressable_devices_indices_map(want.shape).items():
        assert index is not None
        own = taken(array, lines[index[axis]], axis)
        shards.append(jax.device_put(own, device).block_until_ready())
    return jax.make_array_from_single_device_arrays(want.shape, want.sharding, shards)


def gathered(
    path: str, array: np.ndarray, shape: tuple[int, ...], config: ModelConfig, n_shards: int
) -> np.ndarray:
    """The inverse of `laid_out`, on the host.

    Args:
        shape: that one device has.
    """
    found = lines_of(path, shape, config, n_shards)
    if found is None:
        return array
    axis, lines = found
    is_filled = lines != EMPTY
    one = np.empty(shape, array.dtype)
    places = (slice(None),) * axis
    one[(*places, lines[is_filled])] = array[(*places, is_filled)]
    return one


def laid_out(path: str, array: Array, config: ModelConfig, n_shards: int) -> Array:
    """`place` inside a program: the lines in their order for so many devices."""
    found = lines_of(path, array.shape, config, n_shards)
    if found is None:
        return array
    axis, lines = found
    lines = np.where(lines == EMPTY, array.shape[axis], lines).astype(np.int32)
    return jnp.take(array, lines, axis=axis, mode="fill", fill_value=0)


def training_sharding(
    path: str, shape: tuple[int, ...], config: ModelConfig, mesh: Mesh
) -> NamedSharding:
    """Of a parameter in training, on a mesh of the axes "fsdp" and "tensor" or one of them.

    "tensor" splits what serving splits, "fsdp" another axis, the last one that it divides, or else
    the same one (Rajbhandari et al., ZeRO, 2020): so a parameter is stored once over "fsdp", and
    gathered where it is used. A parameter has the lines of one device, in their order: an axis that
    devices do not divide, or not by whole heads, is not split.
    """
    spec: list[Any] = [None] * len(shape)
    n_tensor, n_fsdp = (mesh.shape.get(axis, 1) for axis in (AXIS, FSDP))
    split = split_of(path, config)
    if split is not None and n_tensor > 1:
        size = shape[split.axis]
        if len(places(split.kind, size, config, n_tensor)) == size:
            spec[split.axis] = AXIS
    free_first = sorted(range(len(shape)), key=lambda axis: (spec[axis] is not None, -axis))
    for axis in free_first:
        n_parts = n_fsdp * (1 if spec[axis] is None else n_tensor)
        if n_fsdp > 1 and shape[axis] % n_parts == 0:
            spec[axis] = FSDP if spec[axis] is None else (AXIS, FSDP)
            break
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def cache_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, CACHE)


def shard_attention(attention, mesh: Mesh):
    """`attention` run on each device for its own KV heads and their queries."""
    if mesh.size == 1:
        return attention

    def sharded(q, k, v, cache, meta, *, spec, kv_scales=None, **per_head):
        def own(*arrays):
            return attention(*arrays[:5], spec=spec, kv_scales=arrays[5], **arrays[6])

        n_pools = 1 if kv_scales is None else 2
        return jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(HEADS, HEADS, HEADS, CACHE, PartitionSpec(), CACHE, PartitionSpec(AXIS)),
            out_specs=(HEADS, *(CACHE,) * n_pools),
            check_vma=False,
        )(q, k, v, cache, meta, kv_scales, per_head)

    return sharded
