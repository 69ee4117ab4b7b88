"""EngineConfig: what a user may choose of an engine; `startup.resolve` decides the rest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastgen_jax.config import LIBRARY, is_integer, is_json_object, is_real, option, show
from fastgen_jax.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
COMPILE = ("all", "first")
AUTO = "auto"
# Of the KV cache, by vLLM's names; None: the model's.
KV_CACHE_DTYPES = {
    "auto": None,
    "int8": "int8",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that shapes an engine. None means: chosen from the model and the machine."""

    model: str = option("", "directory of a Hugging Face checkpoint, or a hub id", "model")
    tokenizer: str | None = option(
        None, "tokenizer directory or hub id (default: the model's)", "model"
    )
    revision: str | None = option(
        None,
        "branch, tag or commit of the hub's repository of the model (default: its main branch)",
        "model",
    )
    hf_overrides: Mapping[str, Any] | None = option(
        None,
        "JSON object that changes keys of config.json before anything reads it; a config in it, "
        "such as text_config, key by key",
        "model",
        hash=False,
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
    deterministic: bool = option(
        False,
        "tokens and logprobs that are the same bits whatever else is in the batch, and however "
        "prompts are cut, cached or preempted; slower",
        "model",
    )
    compilation_cache: str | None = option(
        "~/.cache/fastgen_jax/xla",
        "directory that keeps compiled programs between runs; empty for none",
        "model",
    )
    compile: str | None = option(
        None,
        "all: every program is there before the first request is taken; first: the largest is, and "
        "the others come while it serves (default: first for a server, all in a program)",
        "model",
    )
    trust_programs: bool = option(
        False,
        "load compiled programs that lie beside the weights (python -m convert --compile) though "
        "another account has made them: they are machine code",
        "model",
    )
    block_size: int | None = option(
        None, "tokens per KV cache block (default: the backend's)", "cache"
    )
    kv_cache_dtype: str = option(
        "auto",
        "auto: the model's; int8 or fp8 (fp8_e4m3): almost twice the blocks of bfloat16 in the "
        "same memory, keys and values rounded to 8 bits with a scale per token and KV head",
        "cache",
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
    max_num_batched_tokens: int | Literal["auto"] | None = option(
        None,
        "token budget of one step, the SplitFuse budget; auto: as target_itl_ms wants, from how "
        "long steps take here, which is measured at the first start (default: 512 on CPU, else "
        "768)",
        "scheduler",
    )
    target_itl_ms: float | None = option(
        None,
        "with max_num_batched_tokens=auto: milliseconds that may pass between two tokens of a "
        "running request while prompts are computed (default: as many as it takes for nearly the "
        "most tokens per second)",
        "scheduler",
    )
    max_num_seqs: int | None = option(
        None, "sequences that may run at once (default: 64 on CPU, else 256)", "scheduler"
    )
    max_queued_requests: int = option(
        256,
        "requests, each counted n times, running and waiting at once; more are refused (HTTP 429)",
        "scheduler",
    )
    tensor_parallel_size: int = option(1, "devices over which the model is sharded", "parallelism")
    attention_backend: str = option(
        "auto",
        "attention implementation: auto, pallas_tpu, pallas_gpu, jax_triton, mosaic_gpu, cpu, xla, "
        "invariant, reference",
        "parallelism",
    )

    return_hidden_states: tuple[int, ...] = option(
        (),
        "layers whose hidden states `LLM.hidden_states` returns: 0 the embeddings, i what layer i "
        "leaves, -1 the last, after the final norm",
        LIBRARY,
    )
    logits_processors: Mapping[str, Callable[..., Any]] | None = option(
        None,
        "functions by name that change logits inside the step, for requests whose extra_args name "
        "them; see engine/processors.py",
        LIBRARY,
        hash=False,
    )

    def __post_init__(self):
        layers = self.return_hidden_states
        if not isinstance(layers, list | tuple) or not all(is_integer(i) for i in layers):
            raise ConfigError(
                f"return_hidden_states must be a tuple of layers' numbers, got {show(layers)}"
            )
        object.__setattr__(self, "return_hidden_states", tuple(layers))
        processors = self.logits_processors
        if processors is not None and not (
            isinstance(processors, Mapping)
            and all(isinstance(k, str) and callable(v) for k, v in processors.items())
        ):
            raise ConfigError(
                f"logits_processors must be a mapping of names to functions, got {show(processors)}"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.load_format not in LOAD_FORMATS:
            raise ConfigError(
                f"load_format must be one of {', '.join(LOAD_FORMATS)}, got {self.load_format!r}"
            )
        if self.kv_cache_dtype not in (*KV_CACHE_DTYPES,):
            raise ConfigError(
                f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, got "
                f"{show(self.kv_cache_dtype)}"
            )
        if self.compile not in (None, *COMPILE):
            raise ConfigError(
                f"compile must be one of {', '.join(COMPILE)}, got {show(self.compile)}"
            )
        if self.revision is not None and not (isinstance(self.revision, str) and self.revision):
            raise ConfigError(
                f"revision must be a branch, tag or commit, got {show(self.revision)}"
            )
        if not (self.hf_overrides is None or is_json_object(self.hf_overrides)):
            raise ConfigError(f"hf_overrides must be a JSON object, got {show(self.hf_overrides)}")
        for name in ("max_model_len", "block_size", "num_kv_blocks", "max_num_batched_tokens",
                     "max_num_seqs", "max_queued_requests", "tensor_parallel_size"):  # fmt: skip
            value = getattr(self, name)
            is_open = value is None and type(self).__dataclass_fields__[name].default is None
            is_open |= value == AUTO and name == "max_num_batched_tokens"
            if not is_open and not (is_integer(value) and value > 0):
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.max_model_len == 1:
            raise ConfigError(
                "max_model_len must be at least 2, got 1: a token of prompt and one of output"
            )
        if self.num_kv_blocks == 1:
            raise ConfigError(
                "num_kv_blocks must be at least 2, got 1: the first holds no tokens of requests"
            )
        self._check_pace()
        share = self.memory_fraction
        if share is not None and not (is_real(share) and 0 < share <= 1):
            raise ConfigError(f"memory_fraction must be in (0, 1], got {share!r}")
        if not (is_integer(self.seed) and 0 <= self.seed < 2**32):
            raise ConfigError(f"seed must be an integer in [0, 2**32), got {self.seed!r}")

    def _check_pace(self) -> None:
        target, is_auto = self.target_itl_ms, self.max_num_batched_tokens == AUTO
        if target is not None and not (is_real(target) and target > 0):
            raise ConfigError(f"target_itl_ms must be a positive number, got {show(target)}")
        if target is not None and not is_auto:
            raise ConfigError(
                "target_itl_ms chooses the token budget of steps; give max_num_batched_tokens=auto"
            )
        if is_auto and self.deterministic:
            raise ConfigError(
                "deterministic computes steps of one size only; give max_num_batched_tokens a "
                "number"
            )
