"""How heads, rows and experts lie on devices that they need not divide into.

All devices run one program, so each has as many slots of a kind as any other. A slot holds one head
(row, expert ...) of the model or, where there are too few, none: zeros, which add nothing. On one
device, and wherever sizes divide, every slot is filled and nothing lies elsewhere than it did.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Shaped

from fastgen_jax.models.config import ModelConfig

EMPTY = -1  # what a slot without anything holds


def padded(size: int, n_shards: int) -> int:
    """The smallest multiple of n_shards that is not below the size."""
    return -(-size // n_shards) * n_shards


@dataclass(frozen=True)
class HeadLayout:
    """Slots for the N query heads and K KV heads of a model on n_shards devices.

    The cache, which decoding reads and which fills the memory, has KV heads: so a device has as few
    slots for them as can be, ceil(K / n_shards). If that makes more slots than heads, each head is
    copied as often as fits and its queries are dealt out to the copies, so that a KV slot has
    group_size = ceil(G / n_copies) query slots. What is left over, at the end, is empty.

        28 queries, 4 KV heads, 8 devices: each KV head twice, with 4 of its queries and with 3
        40 queries, 10 KV heads, 4 devices: 12 slots with 4 queries each, of which 2 are empty
    """

    n_heads: int
    n_kv_heads: int
    n_shards: int

    @classmethod
    def of(cls, config: ModelConfig, n_shards: int) -> "HeadLayout":
        return cls(config.n_heads, config.n_kv_heads, n_shards)

    @property
    def n_kv_slots(self) -> int:
        return padded(self.n_kv_heads, self.n_shards)

    @property
    def n_copies(self) -> int:
        """Slots that hold the same KV head."""
        return self.n_kv_slots // self.n_kv_heads

    @property
    def group_size(self) -> int:
        """Query slots per KV slot."""
        return -(-self.n_heads // (self.n_kv_heads * self.n_copies))

    @property
    def n_own_kv_slots(self) -> int:
        """Of one device."""
        return self.n_kv_slots // self.n_shards

    @property
    def n_own_query_slots(self) -> int:
        """Of one device."""
        return self.n_own_kv_slots * self.group_size

    def queries(self, values: Shaped[np.ndarray, "N"], empty: float) -> Shaped[np.ndarray, "S g"]:
        """Of each query slot, by KV slots: the value of the head that it holds."""
        grouped = values.reshape(self.n_kv_heads, -1)
        n_missing = self.n_copies * self.group_size - grouped.shape[1]
        dealt = np.pad(grouped, ((0, 0), (0, n_missing)), constant_values=empty)
        return self._with_empty(dealt.reshape(-1, self.group_size), empty)

    def keys(self, values: Shaped[np.ndarray, "K"], empty: float) -> Shaped[np.ndarray, "S"]:
        """Of each KV slot: the value of the head that it holds."""
        return self._with_empty(np.repeat(values, self.n_copies), empty)

    def _with_empty(self, slots: np.ndarray, empty: float) -> np.ndarray:
        missing = [(0, self.n_kv_slots - len(slots))] + [(0, 0)] * (slots.ndim - 1)
        return np.pad(slots, missing, constant_values=empty)


def places(kind: str, size: int, config: ModelConfig, n_shards: int) -> Int[np.ndarray, "slots"]:
    """Of each line of an axis on several devices, one device behind the other: where it is on the
    axis of one that has all, or EMPTY.

    Args:
        kind: what lies along the axis, in parts of equal length: "queries"; "keys"; "qkv", each KV
            head's queries, key and value; "gate_up", all gates and then all ups; "even", anything.
        size: of the axis of the one that has all.
    """
    heads, g = HeadLayout.of(config, n_shards), config.group_size
    match kind:
        case "queries":
            parts = heads.queries(np.arange(config.n_heads), EMPTY)
        case "keys":
            parts = heads.keys(np.arange(config.n_kv_heads), EMPTY)
        case "qkv":
            of_head = np.arange(config.n_kv_heads * (g + 2)).reshape(-1, g + 2)
            key, value = (heads.keys(of_head[:, i], EMPTY)[:, None] for i in (g, g + 1))
            queries = heads.queries(of_head[:, :g].reshape(-1), EMPTY)
            parts = np.concatenate([queries, key, value], axis=1)
        case "gate_up":
            both = _filled_up(np.arange(size).reshape(2, -1), n_shards)
            parts = both.reshape(2, n_shards, -1).swapaxes(0, 1)
        case "even":
            parts = _filled_up(np.arange(size), n_shards)
        case _:
            raise AssertionError(kind)
    length = size // (parts.max() + 1)
    parts = parts.reshape(-1, 1)
    return np.where(parts == EMPTY, EMPTY, parts * length + np.arange(length)).reshape(-1)


def _filled_up(lines: Int[np.ndarray, "... n"], n_shards: int) -> Int[np.ndarray, "... m"]:
    """With as many EMPTY ones behind them as n_shards wants."""
    n_missing = padded(lines.shape[-1], n_shards) - lines.shape[-1]
    return np.pad(lines, [(0, 0)] * (lines.ndim - 1) + [(0, n_missing)], constant_values=EMPTY)


def taken(array: np.ndarray, lines: Int[np.ndarray, "slots"], axis: int) -> np.ndarray:
    """The array with these lines of the axis, zeros for EMPTY ones."""
    is_next = (np.diff(lines) == 1) & (lines[:-1] != EMPTY)
    if lines[0] != EMPTY and is_next.all():
        return array[(slice(None),) * axis + (slice(lines[0], lines[-1] + 1),)]
    found = np.zeros((*array.shape[:axis], len(lines), *array.shape[axis + 1 :]), array.dtype)
    source, target = np.moveaxis(array, axis, 0), np.moveaxis(found, axis, 0)
    ends = np.flatnonzero(~is_next) + 1
    for start, end in zip([0, *ends], [*ends, len(lines)], strict=True):
        if lines[start] != EMPTY:
            target[start:end] = source[lines[start] : lines[start] + end - start]
    return found
