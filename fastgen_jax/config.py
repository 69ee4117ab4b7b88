"""Frozen configuration: of a model, of the engine, of one request's sampling.

Every value is validated in `__post_init__`, so that a config that exists is valid. A field's help
text is part of the field (`metadata["help"]`): command-line flags and the README's table are
generated from it.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from fastgen_jax.errors import ConfigError, InvalidRequest

FinishReason = Literal["stop", "length", "abort", "error"]

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
RESIDUALS = ("sequential", "parallel", "post")
NORM_PLACES = (("before",), ("after",), ("before", "after"))
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
EXPERT_SCORES = ("softmax", "chosen", "sigmoid")
QK_NORMS = (None, "head", "all", "each_head")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024  # characters
MAX_STOP_TOKEN_IDS = 32
MAX_LOGIT_BIAS = 300
MAX_LOGPROBS = 20
MAX_SAMPLES = 128


def option(default: Any, help: str, group: str = "engine") -> Any:
    """A dataclass field that carries its own documentation."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group})


def check_known(kwargs: dict[str, Any], config_class: type) -> None:
    """Raises ConfigError for keys that are no field of `config_class`, naming the nearest one."""
    known = [f.name for f in dataclasses.fields(config_class)]
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"unknown option {name!r}{hint}")


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


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
    is_long: bool = False  # longrope: whether contexts may exceed original_max_position
    size: int | None = None  # elements of a head that turn; None: all
    interleaved: bool = False  # pairs are neighbours, not halves

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ConfigError(
                f"rope type {self.kind!r} is not supported; known: {', '.join(ROPE_KINDS)}"
            )
        if not (_is_real(self.theta) and self.theta > 0):
            raise ConfigError(f"rope theta must be a positive number, got {self.theta!r}")
        if not (_is_real(self.factor) and self.factor >= 1):
            raise ConfigError(f"rope factor must be at least 1, got {self.factor!r}")


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts: each token's MLP is a weighted sum of its best experts'."""

    n_experts: int
    n_chosen: int  # per token
    ffn_size: int  # of an expert
    layers: tuple[int, ...]  # which have experts; the others have the dense MLP
    scores: str = "softmax"  # of all experts; "chosen": softmax of the chosen; "sigmoid"
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
            if not (_is_integer(value) and value > 0):
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
    qk_norm: str | None = None  # RMS of each "head" or of "all" heads; layer norm of "each_head"
    attention_scale: float | None = None  # None: H ** -0.5
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
    logits_scale: float = 1.0
    logits_soft_cap: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "n_layers", "n_heads", "n_kv_heads", "head_dim",
                     "ffn_size", "max_position"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"model config: {name} must be a positive integer, got {value!r}")
        if not (_is_real(self.norm_eps) and self.norm_eps > 0):
            raise ConfigError(
                f"model config: norm_eps must be a positive number, got {self.norm_eps!r}"
            )
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"model config: {self.n_heads} query heads do not divide into "
                f"{self.n_kv_heads} KV heads"
            )
        for rope in filter(None, (self.rope, self.local_rope)):
            size = self.head_dim if rope.size is None else rope.size
            if size % 2 or not 2 <= size <= self.head_dim:
                raise ConfigError(
                    "model config: rotary size must be even and from 2 to "
                    f"head_dim={self.head_dim}, got {size}"
                )
            n_factors = len(rope.short_factor), len(rope.long_factor)
            if rope.kind == "longrope" and n_factors != (size // 2, size // 2):
                raise ConfigError(
                    f"model config: longrope needs {size // 2} short factors and as many long "
                    f"ones, got {n_factors}"
                )
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
        if self.alibi_slopes and len(self.alibi_slopes) != self.n_heads:
            raise ConfigError(
                f"model config: {len(self.alibi_slopes)} ALiBi slopes for {self.n_heads} heads"
            )
        if self.windows and len(self.windows) != self.n_layers:
            raise ConfigError(
                f"model config: {len(self.windows)} windows for {self.n_layers} layers"
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


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that shapes an engine. None means: chosen from the model and the machine."""

    model: str = option("", "directory of a Hugging Face checkpoint, or a hub id", "model")
    tokenizer: str | None = option(
        None, "tokenizer directory or hub id (default: the model's)", "model"
    )
    dtype: str = option(
        "auto",
        "float32, bfloat16 or float16; auto: float32 on CPU, bfloat16 on GPU and TPU",
        "model",
    )
    max_model_len: int | None = option(
        None,
        "longest sequence, prompt and output together, in tokens (default: the model's)",
        "model",
    )
    load_format: str = option(
        "auto", "auto: read weights; dummy: random weights from config.json", "model"
    )
    seed: int = option(
        0, "seed of sampling for requests that bring none, and of dummy weights", "model"
    )
    compilation_cache: str | None = option(
        "~/.cache/fastgen_jax/xla",
        "directory that keeps compiled programs between runs; empty for none",
        "model",
    )
    block_size: int | None = option(
        None, "tokens per KV cache block (default: the backend's)", "cache"
    )
    num_kv_blocks: int | None = option(
        None, "KV cache blocks (default: fill memory_fraction of the free memory)", "cache"
    )
    memory_fraction: float | None = option(
        None,
        "share of the memory left after loading for the KV cache (default: 0.9, CPU 0.25)",
        "cache",
    )
    enable_prefix_caching: bool = option(
        True, "reuse the KV blocks of prompts that start alike", "cache"
    )
    max_num_batched_tokens: int | None = option(
        None,
        "token budget of one step, the SplitFuse budget (default: 512 on CPU, else 768)",
        "scheduler",
    )
    max_num_seqs: int | None = option(
        None, "sequences that may run at once (default: 64 on CPU, else 256)", "scheduler"
    )
    max_queued_requests: int = option(
        256, "requests running and waiting at once; more are refused (HTTP 429)", "scheduler"
    )
    tensor_parallel_size: int = option(1, "devices over which the model is sharded", "parallelism")
    attention_backend: str = option(
        "auto",
        "attention implementation: auto, pallas_tpu, pallas_gpu, jax_triton, xla, reference",
        "parallelism",
    )

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.load_format not in LOAD_FORMATS:
            raise ConfigError(
                f"load_format must be one of {', '.join(LOAD_FORMATS)}, got {self.load_format!r}"
            )
        for name in ("max_model_len", "block_size", "num_kv_blocks", "max_num_batched_tokens",
                     "max_num_seqs", "max_queued_requests", "tensor_parallel_size"):  # fmt: skip
            value = getattr(self, name)
            is_open = value is None and type(self).__dataclass_fields__[name].default is None
            if not is_open and not (_is_integer(value) and value > 0):
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        share = self.memory_fraction
        if share is not None and not (_is_real(share) and 0 < share <= 1):
            raise ConfigError(f"memory_fraction must be in (0, 1], got {share!r}")
        if not (_is_integer(self.seed) and 0 <= self.seed < 2**32):
            raise ConfigError(f"seed must be an integer in [0, 2**32), got {self.seed!r}")


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Raises InvalidRequest unless `value` is a finite number in [low, high] ((low, high] if
    open_low).
    """
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or not low <= value <= high or (open_low and value == low):  # nan is not in range
        bracket = "(" if open_low else "["
        raise InvalidRequest(
            f"{name} must be in {bracket}{low}, {high}], got {_show(value)}", param=name
        )


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(
            f"{name} must be an integer from {low} to {high}, got {_show(value)}", param=name
        )


def _show(value: Any) -> str:
    """A value in an error message; Python refuses to print integers of thousands of digits."""
    is_huge = isinstance(value, int) and value.bit_length() > 256
    return "a huge integer" if is_huge else f"{value!r:.80}"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen; names and defaults are vLLM's.

    temperature 0 is greedy. top_k 0 or -1 keeps all tokens. `logprobs=k` returns the k most likely
    tokens of each step and the sampled one. Seeded output depends on (prompt, params, seed) alone,
    never on the batch.

    Raises:
        InvalidRequest: a value out of range, naming the field and the range.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name) or ()
            if not isinstance(value, list | tuple | set | frozenset):
                raise InvalidRequest(f"{name} must be a list, got {_show(value)}", param=name)
            object.__setattr__(self, name, tuple(value))
        _integer("n", self.n, 1, MAX_SAMPLES)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}",
                param="min_tokens",
            )
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_stops()
        self._check_bias()

    def _check_stops(self):
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS}", param="stop"
            )
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise InvalidRequest(
                    f"each stop must be a string of 1 to {MAX_STOP_LENGTH} characters, "
                    f"got {text!r:.80}",
                    param="stop",
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"stop_token_ids has {len(self.stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS}",
                param="stop_token_ids",
            )
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)

    def _check_bias(self):
        bias = self.logit_bias or {}
        if not isinstance(bias, dict):
            raise InvalidRequest(
                f"logit_bias must be a mapping of token ids to numbers, got {_show(bias)}",
                param="logit_bias",
            )
        if len(bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(
                f"logit_bias has {len(bias)} entries; at most {MAX_LOGIT_BIAS}", param="logit_bias"
            )
        for token, value in bias.items():
            _integer("logit_bias", token, 0, 2**31 - 1)
            _number("logit_bias", value, -100.0, 100.0)
