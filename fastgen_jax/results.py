"""What a generation gives back, with vLLM's names and MII's."""

from dataclasses import dataclass

from fastgen_jax.engine.types import FinishReason


@dataclass(frozen=True)
class Logprob:
    """Natural-log probability of a token at a position. rank: 1 is the likeliest, None unknown."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass(frozen=True)
class CompletionOutput:
    """One sample. text: empty if none is made. error: why, if finish_reason is "error"."""

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
    """All samples of one prompt. The properties are MII's names for the first sample.

    num_cached_tokens: of the prompt, which the first sample took from the prefix cache.
    prompt_logprobs: of each place of the prompt the token there and the likeliest ones; None for
        the first, which nothing comes before. None where they were not asked for.
    metrics: None; vLLM's users look whether they are there.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: None = None

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


@dataclass(frozen=True)
class EmbeddingOutput:
    """The vector of one prompt. error: why there is none, and the vector is empty."""

    embedding: list[float]
    error: str | None = None

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(frozen=True)
class EmbeddingRequestOutput:
    """What LLM.embed gives back for one prompt.

    num_cached_tokens: of the prompt, which came from the prefix cache.
    """

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True
