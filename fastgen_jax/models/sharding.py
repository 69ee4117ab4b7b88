"""Tensor parallelism: one mesh axis, and which axis of each parameter it splits (Shoeybi et al.,
Megatron-LM, 2019).

Queries, keys, values, gate and up are split by their outputs, the products that follow by their
inputs, the cache by KV heads.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig

AXIS = "tensor"
# Suffix of a parameter's path -> how it is split; parameters not named are replicated.
RULES = {
    "attention.qkv.weight": PartitionSpec(AXIS, None),
    "attention.qkv.bias": PartitionSpec(AXIS),
    "attention.q.weight": PartitionSpec(AXIS, None),  # latent attention's
    "attention.q_up.weight": PartitionSpec(AXIS, None),
    "attention.kv_up.weight": PartitionSpec(AXIS, None),
    "attention.out.weight": PartitionSpec(None, AXIS),
    "mlp.gate_up.weight": PartitionSpec(AXIS, None),
    "mlp.gate_up.bias": PartitionSpec(AXIS),
    "mlp.down.weight": PartitionSpec(None, AXIS),
    "mlp.up.weight": PartitionSpec(AXIS, None),
    "mlp.up.bias": PartitionSpec(AXIS),
    "mlp.shared.gate_up.weight": PartitionSpec(AXIS, None),
    "mlp.shared.down.weight": PartitionSpec(None, AXIS),
    "lm_head.weight": PartitionSpec(AXIS, None),
    "lm_head.bias": PartitionSpec(AXIS),
    "attention.sinks": PartitionSpec(AXIS),
    # Experts whole, each on one device.
    "mlp.gate_up": PartitionSpec(AXIS),
    "mlp.gate_up_bias": PartitionSpec(AXIS),
    "mlp.down": PartitionSpec(AXIS),
    "mlp.down_bias": PartitionSpec(AXIS),
}
CACHE = PartitionSpec(None, AXIS)  # "B K 2 C H" by KV heads
HEADS = PartitionSpec(None, AXIS)  # "T N H" by heads


def make_mesh(n_devices: int) -> Mesh:
    """A mesh over the first devices of the default backend; ConfigError when there are fewer."""
    devices = jax.devices()
    if n_devices > len(devices):
        raise ConfigError(
            f"tensor_parallel_size={n_devices} needs as many devices; {len(devices)} "
            f"{devices[0].platform} device(s) found"
        )
    return Mesh(np.array(devices[:n_devices]), (AXIS,), axis_types=(AxisType.Auto,))


def check_divides(config: ModelConfig, n_devices: int) -> None:
    """Raises ConfigError unless heads, feed-forward, experts and the head's vocabulary split evenly
    (a tied head is not split).
    """
    sizes = {"n_kv_heads": config.n_kv_heads}
    if not config.tie_embeddings:
        sizes["vocab_size"] = config.vocab_size
    moe = config.moe
    if moe is None or len(moe.layers) < config.n_layers:
        sizes["ffn_size"] = config.ffn_size
    if moe is not None:
        sizes |= {"n_experts": moe.n_experts, "shared_size": moe.shared_size}
    for name, size in sizes.items():
        if size % n_devices:
            raise ConfigError(
                f"tensor_parallel_size={n_devices} does not divide the model's {name}={size}"
            )


def parameter_sharding(path: str, mesh: Mesh) -> NamedSharding:
    for suffix, spec in RULES.items():
        if path.endswith(suffix):
            return NamedSharding(mesh, spec)
    return NamedSharding(mesh, PartitionSpec())


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def cache_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, CACHE)


def shard_attention(attention, mesh: Mesh):
    """`attention` run on each device for its own KV heads and their queries."""
    if mesh.size == 1:
        return attention

    def sharded(q, k, v, cache, meta, *, spec, **per_head):
        return jax.shard_map(
            lambda *arrays: attention(*arrays[:-1], spec=spec, **arrays[-1]),
            mesh=mesh,
            in_specs=(HEADS, HEADS, HEADS, CACHE, PartitionSpec(), PartitionSpec(AXIS)),
            out_specs=(HEADS, CACHE),
            check_vma=False,
        )(q, k, v, cache, meta, per_head)

    return sharded
