"""ModelConfig: the shape of a decoder, whatever family and whatever file it comes from."""

from dataclasses import dataclass

from fastgen_jax.config import is_integer, is_real
from fastgen_jax.errors import ConfigError

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
RESIDUALS = ("sequential", "parallel", "post")
NORM_PLACES = (("before",), ("after",), ("before", "after"))
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "xielu")
EXPERT_SCORES = ("softmax", "chosen", "sigmoid", "sparsemixer", "each_chosen")
QK_NORMS = (None, "head", "all", "each_head", "unit")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base frequency and context-extension scaling, named as transformers names
    them.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    short_mscale: float | None = None  # longrope: in place of its own factor on cos and sin
    long_mscale: float | None = None
    is_long: bool = False  # longrope: whether contexts may exceed original_max_position
    size: int | None = None  # elements of a head that turn; None: all
    interleaved: bool = False  # pairs are neighbours, not halves

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ConfigError(
                f"rope type {self.kind!r} is not supported; known: {', '.join(ROPE_KINDS)}"
            )
        if not (is_real(self.theta) and self.theta > 0):
            raise ConfigError(f"rope theta must be a positive number, got {self.theta!r}")
        if not (is_real(self.factor) and self.factor >= 1):
            raise ConfigError(f"rope factor must be at least 1, got {self.factor!r}")


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts: each token's MLP is a weighted sum of its best experts'."""

    n_experts: int
    n_chosen: int  # per token
    ffn_size: int  # of an expert
    layers: tuple[int, ...]  # which have experts; the others have the dense MLP
    # Of all experts: "softmax", "sigmoid". Of those with the highest logits: "chosen", a softmax;
    # "each_chosen", a sigmoid; "sparsemixer".
    scores: str = "softmax"
    weighs_input: bool = False  # scores weigh what experts read, not what they make
    tolerance: float = 0.0  # sparsemixer: how far from the best a score still counts, relative
    normalise: bool = False  # chosen scores sum to one
    scale: float = 1.0  # of the sum
    shared_size: int = 0  # of an MLP that every token takes as well
    shared_gate: bool = False  # which a sigmoid scales
    n_groups: int = 1  # of experts, of which only the best n_chosen_groups count
    n_chosen_groups: int = 1
    score_bias: bool = False  # added to scores to choose, not to weigh
    router_bias: bool = False
    expert_bias: bool = False
    clamp: float | None = None  # GPT-OSS: of gate and up, and its own activation

    def __post_init__(self):
        if self.scores not in EXPERT_SCORES:
            raise ConfigError(
                f"model config: scores={self.scores!r} of experts is not supported; known: "
                f"{', '.join(EXPERT_SCORES)}"
            )
        if not 1 <= self.n_chosen <= self.n_experts:
            raise ConfigError(
                f"model config: {self.n_chosen} experts per token of {self.n_experts} experts"
            )
        if self.n_groups != 1:
            self._check_groups()

    def _check_groups(self) -> None:
        if self.n_groups < 1 or self.n_experts % self.n_groups:
            raise ConfigError(
                f"model config: {self.n_experts} experts do not divide into {self.n_groups} groups"
            )
        if not 1 <= self.n_chosen_groups <= self.n_groups:
            raise ConfigError(
                f"model config: {self.n_chosen_groups} of {self.n_groups} groups of experts"
            )
        group_size = self.n_experts // self.n_groups
        if self.n_chosen > self.n_chosen_groups * group_size:
            raise ConfigError(
                f"model config: {self.n_chosen} experts per token, but the groups of a token have "
                f"{self.n_chosen_groups * group_size} experts"
            )
        if self.score_bias and group_size < 2:
            raise ConfigError("model config: a group of experts must have at least two experts")


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-AI, 2024): keys and values are made from one small
    vector per token, and queries perhaps from another.
    """

    kv_rank: int  # size of that vector
    q_rank: int | None  # None: queries come from the hidden state
    nope_size: int  # of a query or key: elements without position,
    rope_size: int  # and with it; of the keys all heads share these
    value_size: int

    def __post_init__(self):
        for name in ("kv_rank", "nope_size", "rope_size", "value_size"):
            value = getattr(self, name)
            if not (is_integer(value) and value > 0):
                raise ConfigError(f"model config: {name} must be a positive integer, got {value!r}")
        if self.value_size > self.head_size:
            raise ConfigError(
                f"model config: values of {self.value_size} elements, larger than keys of "
                f"{self.head_size}, are not supported"
            )

    @property
    def head_size(self) -> int:
        """Elements of a query or key."""
        return self.nope_size + self.rope_size


@dataclass(frozen=True, kw_only=True)
class QueryScale:
    """A factor on queries that grows with their position p, to keep attention sharp in long
    contexts: 1 + weight * log(1 + floor((p + first) / length)).
    """

    weight: float
    length: int
    layers: tuple[int, ...]  # which have it
    first: int = 0  # how the first position counts

    def __post_init__(self):
        if not is_real(self.weight):
            raise ConfigError(f"model config: the weight {self.weight!r} of positions in queries")
        if not (is_integer(self.length) and self.length > 0):
            raise ConfigError(
                "model config: the length at which queries grow must be a positive integer, got "
                f"{self.length!r}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder: what the layers need, whatever family the checkpoint belongs to."""

    family: str
    vocab_size: int
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    max_position: int
    # The stream of hidden states.
    residual: str = (
        "sequential"  # "parallel": attention and MLP read the same x; "post": sums are normalised
    )
    norm_places: tuple[str, ...] = ("before",)  # of attention and MLP
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-5
    norm_bias: bool = True  # of layer norms
    norm_offset: float = 0.0  # added to a norm's weight
    shared_norm: bool = False  # parallel: one norm before both
    embedding_norm: bool = False
    final_norm: bool = True
    embedding_size: int | None = None  # if it is not hidden_size: projected
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    # Positions.
    rope: RopeConfig | None = RopeConfig()
    local_rope: RopeConfig | None = None  # of layers with a window; None: as the others
    unrotated_layers: tuple[int, ...] = ()
    n_learned_positions: int = 0  # rows of their table
    position_offset: int = 0  # row of the first position
    alibi_slopes: tuple[float, ...] = ()  # per query head
    # Attention.
    windows: tuple[int | None, ...] = ()  # per layer; (): none
    qkv_bias: bool = False
    out_bias: bool = False
    # RMS of each "head" or of "all" heads; layer norm of "each_head"; "unit": RMS of each head that
    # turns, without weights.
    qk_norm: str | None = None
    qk_norm_last: bool = False  # after queries and keys are turned
    attention_scale: float | None = None  # None: H ** -0.5
    query_scale: QueryScale | None = None
    attention_soft_cap: float | None = None
    sinks: bool = False
    qkv_clip: float | None = None
    latent: LatentConfig | None = None
    # MLP.
    activation: str = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    moe: MoeConfig | None = None
    # Logits.
    tie_embeddings: bool = False
    head_bias: bool = False
    unit_head: bool = False  # its rows count as if they had length one
    logits_scale: float = 1.0
    logits_soft_cap: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self):
        self._check_numbers()
        self._check_choices()
        for rope in filter(None, (self.rope, self.local_rope)):
            self._check_rope(rope)
        if self.alibi_slopes and len(self.alibi_slopes) != self.n_heads:
            raise ConfigError(
                f"model config: {len(self.alibi_slopes)} ALiBi slopes for {self.n_heads} heads"
            )
        if self.windows and len(self.windows) != self.n_layers:
            raise ConfigError(
                f"model config: {len(self.windows)} windows for {self.n_layers} layers"
            )

    def _check_numbers(self) -> None:
        for name in ("vocab_size", "hidden_size", "n_layers", "n_heads", "n_kv_heads", "head_dim",
                     "ffn_size", "max_position"):  # fmt: skip
            value = getattr(self, name)
            if not (is_integer(value) and value > 0):
                raise ConfigError(f"model config: {name} must be a positive integer, got {value!r}")
        if not (is_real(self.norm_eps) and self.norm_eps > 0):
            raise ConfigError(
                f"model config: norm_eps must be a positive number, got {self.norm_eps!r}"
            )
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"model config: {self.n_heads} query heads do not divide into "
                f"{self.n_kv_heads} KV heads"
            )

    def _check_choices(self) -> None:
        for name, known in (
            ("residual", RESIDUALS), ("norm_places", NORM_PLACES), ("qk_norm", QK_NORMS),
            ("norm", ("rms", "layer")), ("activation", ACTIVATIONS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"model config: {name}={getattr(self, name)!r} is not supported; known: "
                    f"{', '.join(map(str, known))}"
                )
        if self.residual != "sequential" and self.norm_places != ("before",):
            raise ConfigError(
                f"model config: residual={self.residual!r} has no norm_places={self.norm_places}"
            )

    def _check_rope(self, rope: RopeConfig) -> None:
        size = self.head_dim if rope.size is None else rope.size
        if size % 2 or not 2 <= size <= self.head_dim:
            raise ConfigError(
                f"model config: rotary size must be even and from 2 to head_dim={self.head_dim}, "
                f"got {size}"
            )
        n_factors = len(rope.short_factor), len(rope.long_factor)
        if rope.kind == "longrope" and n_factors != (size // 2, size // 2):
            raise ConfigError(
                f"model config: longrope needs {size // 2} short factors and as many long ones, "
                f"got {n_factors}"
            )

    @property
    def group_size(self) -> int:
        """Query heads per KV head, G = N/K."""
        return self.n_heads // self.n_kv_heads

    def window(self, layer: int) -> int | None:
        """How many tokens back that layer sees; None: all."""
        return self.windows[layer] if self.windows else None

    @property
    def longest_window(self) -> int | None:
        """What the layer that looks back furthest sees; None: all."""
        windows = [window for window in self.windows if window is not None]
        return max(windows) if windows and len(windows) == self.n_layers else None

    def rope_of(self, layer: int) -> RopeConfig | None:
        """What turns that layer's queries and keys."""
        if layer in self.unrotated_layers:
            return None
        return self.local_rope if self.local_rope and self.window(layer) else self.rope
