"""Who may enter the engine: requests are checked against model and pool, the queue is bounded."""

import threading
from collections.abc import Collection
from typing import Any

import numpy as np

from fastgen_jax.config import is_integer
from fastgen_jax.engine.processors import Processor, check_arguments
from fastgen_jax.engine.scheduler import servable_tokens
from fastgen_jax.engine.types import PRIORITIES, Request
from fastgen_jax.errors import ContextLengthExceeded, EngineStopped, InvalidRequest, QueueFull
from fastgen_jax.sampling_params import POOLINGS

QUEUED_POOLS = 4  # prompt tokens that may wait, in KV pools ...
QUEUED_CONTEXTS = 64  # ... or in longest prompts, whichever is more


class Admission:
    """Counts the samples that are open and the prompt tokens that wait; thread-safe.

    Args:
        max_requests: samples open at once, running or waiting: a request counts as its n.
        max_model_len, n_blocks, block_size: what bounds a sequence; see `servable_tokens`.
        has_layers: hidden states of some can be asked for.
    """

    def __init__(
        self,
        *,
        max_requests: int,
        max_model_len: int,
        n_blocks: int,
        block_size: int,
        vocab_size: int,
        has_layers: bool = False,
        processors: tuple[Processor, ...] = (),
    ):
        self.max_total_tokens = servable_tokens(max_model_len, n_blocks, block_size)
        self._max_model_len = max_model_len
        self._n_blocks = n_blocks
        self._vocab_size = vocab_size
        self._has_layers = has_layers
        self._processors = processors
        self._max_requests = max_requests
        self._max_queued_tokens = max(
            QUEUED_POOLS * n_blocks * block_size, QUEUED_CONTEXTS * self.max_total_tokens
        )
        self._lock = threading.Lock()
        self._closed: str | None = None
        self.n_open = 0
        self.n_queued_tokens = 0

    @property
    def is_full(self) -> bool:
        """Whether even the smallest request would be refused now; takes no lock."""
        has_too_many_tokens = self.n_queued_tokens >= self._max_queued_tokens
        return self.n_open >= self._max_requests or has_too_many_tokens

    def check(self, request: Request) -> int:
        """The most tokens, prompt and output together, that a request may reach.

        Raises:
            InvalidRequest, ContextLengthExceeded: it can never be served.
        """
        p, prompt = request.params, request.prompt_token_ids
        if not prompt:
            raise InvalidRequest("the prompt is empty; it needs at least one token", param="prompt")
        if request.pooling is not None:
            check_embedding(request)
        if request.states_at is not None:
            check_states(request, has_layers=self._has_layers)
        check_scoring(request)
        wanted = 1 if p.max_tokens is None else p.max_tokens
        wanted = 0 if request.is_silent else wanted
        if len(prompt) + wanted > self.max_total_tokens:
            raise ContextLengthExceeded(self._too_long(len(prompt), wanted), param="prompt")
        self._check_samples(p.n)
        check_priority(request.priority)
        check_arguments(p, self._processors)
        check_ids("prompt", prompt, self._vocab_size)
        check_ids("stop_token_ids", p.stop_token_ids, self._vocab_size)
        check_ids("logit_bias", p.logit_bias or (), self._vocab_size)
        check_ids("allowed_token_ids", p.allowed_token_ids or (), self._vocab_size)
        for word in request.bad_words:
            check_ids("bad_words", word, self._vocab_size)
        # The token after a prompt is counted, though perhaps nobody wants it.
        return self.max_total_tokens if p.max_tokens is None else len(prompt) + max(p.max_tokens, 1)

    def enter(self, requests: list[Request]) -> None:
        """Counts all of them in or, raising, none.

        Raises:
            QueueFull, EngineStopped: not now.
            InvalidRequest: together they have more samples than may ever be open.
        """
        n_samples = sum(r.params.n for r in requests)
        self._check_samples(n_samples)
        n_tokens = sum(len(r.prompt_token_ids) * r.params.n for r in requests)
        with self._lock:
            if self._closed:
                raise EngineStopped(self._closed)
            if self.n_open + n_samples > self._max_requests:
                raise QueueFull(
                    f"{self.n_open} samples run or wait, the limit is {self._max_requests}; "
                    "try again later"
                )
            if self.n_queued_tokens and self.n_queued_tokens + n_tokens > self._max_queued_tokens:
                raise QueueFull(
                    f"{self.n_queued_tokens} prompt tokens wait, the limit is "
                    f"{self._max_queued_tokens}; try again later"
                )
            self.n_open += n_samples
            self.n_queued_tokens += n_tokens

    def _check_samples(self, n_samples: int) -> None:
        if n_samples > self._max_requests:
            raise InvalidRequest(
                f"{n_samples} samples (n for each prompt) are asked for at once, the limit is "
                f"{self._max_requests}; ask for fewer or raise --max-queued-requests",
                param="n",
            )

    def dequeue(self, n_tokens: int) -> None:
        """A prompt of that many tokens waits no more."""
        with self._lock:
            self.n_queued_tokens -= n_tokens

    def leave(self) -> None:
        """A sample has ended."""
        with self._lock:
            self.n_open -= 1

    def close(self, reason: str) -> None:
        """Refuses all further requests; the first reason stays."""
        with self._lock:
            self._closed = self._closed or reason

    def _too_long(self, n_prompt: int, n_output: int) -> str:
        bound = self.max_total_tokens
        text = f"This model's maximum context length is {bound} tokens. However, "
        if n_output:
            text += (
                f"you requested {n_prompt + n_output} tokens ({n_prompt} in the prompt, {n_output} "
                "in the completion). Please reduce the length of the prompt or completion."
            )
        else:
            text += f"the prompt has {n_prompt} tokens. Please shorten it."
        if bound < self._max_model_len:
            text += (
                f" (The KV cache of {self._n_blocks} blocks holds {bound} tokens; raise "
                "--num-kv-blocks or --memory-fraction.)"
            )
        return text


def check_embedding(request: Request) -> None:
    """Raises InvalidRequest unless a request with a pooling is one that Request.to_embed makes."""
    pooling = request.pooling
    if pooling not in POOLINGS:
        known = " or ".join(POOLINGS)
        raise InvalidRequest(f"pooling must be {known}, got {pooling!r:.40}", param="pooling")
    bare = request.prompt_token_ids, pooling, request.cache_salt, request.priority
    if request != Request.to_embed(*bare):
        raise InvalidRequest(
            "an embedding samples nothing, so that its request takes no params, grammar or "
            "bad_words; make it with Request.to_embed",
            param="pooling",
        )


def check_states(request: Request, *, has_layers: bool) -> None:
    """Raises InvalidRequest unless a request for states is one that Request.to_read makes."""
    positions, n_prompt = request.states_at, len(request.prompt_token_ids)
    if not has_layers:
        raise InvalidRequest(
            "hidden states are of layers that the engine was told of when it was made; give it "
            "return_hidden_states, such as (-1,)",
            param="return_hidden_states",
        )
    if not positions or not all(is_integer(p) and 0 <= p < n_prompt for p in positions):
        raise InvalidRequest(
            f"positions of hidden states must be at least one, each from 0 to {n_prompt - 1}, got "
            f"{positions!r:.80}",
            param="positions",
        )
    if request != Request.to_read(request.prompt_token_ids, positions):
        raise InvalidRequest(
            "who asks for hidden states gets no samples, so that the request takes nothing else; "
            "make it with Request.to_read",
            param="positions",
        )


def check_scoring(request: Request) -> None:
    """Raises InvalidRequest unless `scored_from` is a position that can be scored."""
    first, n_prompt = request.scored_from, len(request.prompt_token_ids)
    if first is None:
        return
    if request.params.prompt_logprobs is None:
        raise InvalidRequest(
            "scored_from needs prompt_logprobs, which says how many of the likeliest tokens are "
            "wanted beside each",
            param="prompt_logprobs",
        )
    if not is_integer(first) or not 1 <= first <= n_prompt:
        raise InvalidRequest(
            f"scored_from must be a position from 1 to {n_prompt}, the length of the prompt, got "
            f"{first!r:.40}: nothing comes before the first token, to say how likely it is",
            param="scored_from",
        )


def check_priority(priority: Any) -> None:
    """Raises InvalidRequest unless it is an integer of 64 bits."""
    if type(priority) is not int or priority not in PRIORITIES:
        raise InvalidRequest(
            f"priority must be an integer of 64 bits, of which lower ones go first, got "
            f"{priority!r:.40}",
            param="priority",
        )


def check_ids(name: str, ids: Collection[Any], vocab_size: int) -> None:
    """Raises InvalidRequest unless every id is an integer within the vocabulary."""
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) < vocab_size)):
        return  # without a step of Python per token
    for token in ids:
        is_integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
        if not is_integer or not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"{name} holds {token!r:.40}; token ids are integers from 0 to {vocab_size - 1}",
                param=name,
            )
