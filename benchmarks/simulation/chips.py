"""Chips and models by their published numbers; what reference bounds are computed from.

A chip's numbers are its vendor's data sheet, dense bfloat16, but for H200, where they are ceilings
measured on one (copy and matrix product). Link: bytes a second that leave one chip, all its links
together.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One accelerator."""

    flops: float  # a second
    bandwidth: float  # bytes a second
    memory: float  # bytes
    link: float  # bytes a second, one direction
    source: str


CHIPS = {
    "a100": Chip(312e12, 2.039e12, 80e9, 300e9, "NVIDIA A100 80GB SXM data sheet"),
    "h100": Chip(989e12, 3.35e12, 80e9, 450e9, "NVIDIA H100 SXM data sheet"),
    "h200": Chip(790e12, 4.3e12, 141e9, 450e9, "measured ceilings; link, memory: data sheet"),
    "v5e": Chip(197e12, 0.819e12, 16e9, 200e9, "Google Cloud TPU v5e documentation"),
    "v6e": Chip(918e12, 1.64e12, 32e9, 448e9, "Google Cloud TPU v6e documentation"),
    "tpu7x": Chip(2307e12, 7.37e12, 192e9, 600e9, "Google Cloud TPU7x documentation"),
}


class Model(NamedTuple):
    """A decoder's sizes, in the dim letters of the repository."""

    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    n_experts: int = 1
    n_chosen: int = 1  # experts of a token

    @property
    def n_attention(self) -> int:
        """Weights of all layers' attention."""
        heads = 2 * self.n_heads + 2 * self.n_kv_heads
        return self.n_layers * self.width * self.head_dim * heads

    @property
    def n_expert(self) -> int:
        """Weights of one expert, or of the feed-forward, of all layers."""
        return self.n_layers * 3 * self.width * self.ffn

    @property
    def n_linear(self) -> int:
        """Weights of matrix products: all but the input embedding."""
        routers = self.n_layers * self.width * self.n_experts if self.n_experts > 1 else 0
        head = self.width * self.vocab
        return self.n_attention + self.n_experts * self.n_expert + routers + head

    @property
    def n_active(self) -> int:
        """Of these, what one token is multiplied with."""
        return self.n_linear - (self.n_experts - self.n_chosen) * self.n_expert

    def n_read(self, n_tokens: int) -> float:
        """Of these, what a step reads, if tokens choose their experts at random."""
        missed = (1 - self.n_chosen / self.n_experts) ** n_tokens
        return self.n_linear - self.n_experts * missed * self.n_expert

    @property
    def cell(self) -> int:
        """Bytes of one token in the KV cache."""
        return 2 * 2 * self.n_layers * self.n_kv_heads * self.head_dim

    @property
    def n_bytes(self) -> int:
        return 2 * (self.n_linear + self.width * self.vocab)


MODELS = {
    "llama-2-7b": Model(32, 4096, 32, 32, 128, 11008, 32000),
    "llama-2-13b": Model(40, 5120, 40, 40, 128, 13824, 32000),
    "llama-2-70b": Model(80, 8192, 64, 8, 128, 28672, 32000),
    "llama-3-8b": Model(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-3-70b": Model(80, 8192, 64, 8, 128, 28672, 128256),
    "mixtral-8x7b": Model(32, 4096, 32, 8, 128, 14336, 32000, 8, 2),
}


def n_cells(chip: Chip, model: Model, n_chips: int, share: float = 0.9) -> int:
    """Tokens that the KV cache of one replica holds, in that share of its memory.

    Raises:
        ValueError: the weights leave no room.
    """
    free = share * chip.memory * n_chips - model.n_bytes
    if free < model.cell * 1024:
        raise ValueError(
            f"{model.n_bytes / 1e9:.0f} GB of weights leave no room in {n_chips} x "
            f"{chip.memory / 1e9:.0f} GB; name more chips"
        )
    return int(free / model.cell)
