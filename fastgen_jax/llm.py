"""The offline API: LLM (vLLM's names) and pipeline (MII's): lists of prompts in, finished texts out.

Steps the engine in the caller's thread. All prompts are checked before the first one runs; results come in the
order of the prompts; an interrupt cancels what runs and leaves the LLM usable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastgen_jax.config import EngineConfig, FinishReason, SamplingParams, check_known
from fastgen_jax.errors import EngineStopped, InvalidRequest, QueueFull
from fastgen_jax.tokenizer import TextStream, Tokenizer, has_tokenizer
from fastgen_jax.types import Output, Request, TokenLogprobs

if TYPE_CHECKING:
    from fastgen_jax.engine import Engine

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Logprob:
    """Natural-log probability of one token at one position. rank 1 is the likeliest; None: not among the top."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass(frozen=True)
class CompletionOutput:
    """One sample. `text` is empty without a tokenizer; `error` says what a finish_reason "error" was."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    error: str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """All samples of one prompt. The properties are MII's names for the first sample."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True

    @property
    def generated_text(self) -> str:
        return self.outputs[0].text

    @property
    def prompt_length(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def generated_length(self) -> int:
        return len(self.outputs[0].token_ids)

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[0].finish_reason

    def __str__(self) -> str:
        return self.generated_text


class LLM:
    """A model, for generation in the caller's thread. Close it, or use it in `with`, to stop it early.

        llm = LLM("path-or-hub-id", max_model_len=2048)
        outs = llm.generate(["Once upon a time"], SamplingParams(max_tokens=64, temperature=0.0))
        print(outs[0].outputs[0].text)

    Args:
        model: directory of a Hugging Face checkpoint, or a hub id.
        options: fields of EngineConfig: dtype, max_model_len, block_size, num_kv_blocks,
            max_num_batched_tokens, max_num_seqs, tensor_parallel_size, attention_backend, seed ...

    Raises:
        ConfigError: an unknown option (with the nearest known one), or a value that cannot work.
        CheckpointError: the model's files are missing or damaged.
    """

    def __init__(self, model: str, **options: Any):
        from fastgen_jax import checkpoint
        from fastgen_jax.engine import Engine

        check_known(options, EngineConfig)
        engine = Engine(EngineConfig(model=model, **options))
        path = str(checkpoint.locate(engine.config.tokenizer or engine.config.model))
        self._set(engine, Tokenizer(path) if has_tokenizer(path) else None)
