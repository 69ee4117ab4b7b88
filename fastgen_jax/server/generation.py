"""Generation: the text side of one HTTP request. Filled by the service, emptied by the response.

What a slow reader has not taken is merged into one larger piece; its size is bounded by the output
length that the engine admitted.
"""

import asyncio
import time

from fastgen_jax.engine.types import Output, TokenLogprobs
from fastgen_jax.server.errors import ApiError
from fastgen_jax.tokenizer import TextStream


class Choice:
    """One sample: text and tokens not taken yet. Finished once finish_reason is set."""

    __slots__ = (
        "finish_reason", "first_time", "index", "last_time", "n_reused", "n_tokens", "pending_ids",
        "pending_logprobs", "pending_text", "start_time", "stop_reason", "stream", "wants_logprobs",
    )  # fmt: skip

    def __init__(self, index: int, stream: TextStream, wants_logprobs: bool):
        self.index = index
        self.stream = stream
        self.wants_logprobs = wants_logprobs
        self.n_tokens = 0
        self.n_reused = 0  # prompt tokens that came from the prefix cache
        self.start_time = 0.0  # time.monotonic() of its first step, its first and its newest token
        self.first_time = self.last_time = 0.0
        self.pending_text: list[str] = []
        self.pending_ids: list[int] = []
        self.pending_logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def push(self, output: Output):
        """Takes in one event of the engine. INVARIANT: never called after finish_reason is set."""
        delta = self.stream.push(output)
        if output.token_id is not None:
            self.n_tokens += 1
            self.n_reused, self.start_time = output.n_reused, output.start_time
            self.pending_ids.append(output.token_id)
            if self.wants_logprobs and output.logprobs is not None:
                self.pending_logprobs.append(output.logprobs)
        if delta.text:
            self.pending_text.append(delta.text)
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    @property
    def has_pending(self) -> bool:
        return bool(self.pending_ids or self.pending_text)

    def take(self, limit: int | None = None) -> tuple[str, list[int], list[TokenLogprobs]]:
        """The text since the last call, and token ids and logprobs, `limit` at most of each."""
        taken = "".join(self.pending_text), self.pending_ids[:limit], self.pending_logprobs[:limit]
        self.pending_text = []
        del self.pending_ids[:limit], self.pending_logprobs[:limit]
        return taken


class Generation:
    """All samples of one HTTP request: prompt i, sample j is choice i * n + j.

    It ends when every choice is finished, or with `error`. Only the event loop touches it.
    """

    def __init__(
        self,
        choices: list[Choice],
        prompts: list[list[int]],
        *,
        is_streaming: bool,
        max_tokens: int | None = None,
    ):
        self.choices = choices
        self.prompts = prompts
        self.max_tokens = max_tokens
        self.is_streaming = is_streaming
        self.arrival = time.monotonic()
        self.n_open = len(choices)
        self.error: ApiError | None = None
        self.request_ids: list[int] = []
        self.timers: list[asyncio.TimerHandle] = []
        self.first_token_timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()

    @property
    def is_done(self) -> bool:
        return self.n_open == 0 or self.error is not None

    @property
    def n_samples(self) -> int:
        """Of each prompt."""
        return len(self.choices) // len(self.prompts)

    @property
    def n_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def n_reused_tokens(self) -> int:
        """Prompt tokens that the prefix cache saved each prompt's first sample."""
        return sum(choice.n_reused for choice in self.choices[:: self.n_samples])

    @property
    def n_tokens(self) -> int:
        return sum(choice.n_tokens for choice in self.choices)

    def notify(self):
        """Wakes the reader: at each change if it streams, else at the end."""
        if self.is_streaming or self.is_done:
            self._changed.set()

    async def changed(self):
        """Returns after the next change.

        Raises:
            ApiError: the request failed.
        """
        await self._changed.wait()
        self._changed.clear()
        if self.error is not None:
            raise self.error
