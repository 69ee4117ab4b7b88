"""Text that streams: incremental detokenisation, up to a stop string.

Text leaves a TextStream once and is never taken back; the pieces join to the decoding of all tokens
at once; no token costs more than those before it.
"""

from __future__ import annotations

import codecs
import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastgen_jax.engine.types import FinishReason, Output
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.tokenizer.stop_strings import StopMatcher, StopString
from fastgen_jax.tokenizer.tokenizer import Tokenizer

MAX_CHARACTER_BYTES = 4  # of UTF-8


class TextDelta(NamedTuple):
    """What one Output adds to its sample. stop_reason: the string or token id that ended it."""

    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class TextStream:
    """The text of one sample, emitted as early as it is certain.

    Held back are a character's first bytes, and text that may begin a stop string: at most
    max(len(stop)) - 1 characters. The first stop string to be complete ends the sample, wherever
    the tokens' borders are. Invalid UTF-8 becomes U+FFFD. (tokenizers turns a whole run of byte
    tokens like <0xFF> into U+FFFD if one is invalid; here the valid characters, already emitted,
    stay.)

    Args:
        prompt_ids: what goes before: a character may begin there, and after text a space is kept.
        stops: of params.stop; made here unless another stream has them.
        shown_ids: special tokens that are text here, whatever params hide.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        stops: Sequence[StopString] | None = None,
        shown_ids: frozenset[int] = frozenset(),
    ):
        self._tokenizer = tokenizer
        self._params = params
        hidden = tokenizer.special_ids if params.skip_special_tokens else frozenset[int]()
        self._hidden = hidden - shown_ids
        self._stops = [StopString(stop) for stop in params.stop] if stops is None else stops
        self._utf8_state, self._is_first = self._after(prompt_ids)
        self._begin()

    @classmethod
    def of_samples(
        cls,
        tokenizer: Tokenizer,
        prompts: Iterable[Sequence[int]],
        params: SamplingParams,
        shown_ids: frozenset[int] = frozenset(),
    ) -> list[TextStream]:
        """A stream for each of the `n` samples of each prompt. What they share is made once: per
        sample the cost depends neither on the prompt nor on the lengths of the stop strings.
        """
        stops = [StopString(stop) for stop in params.stop]
        firsts = [cls(tokenizer, prompt, params, stops, shown_ids) for prompt in prompts]
        return [first if i == 0 else first._sibling() for first in firsts for i in range(params.n)]

    def _sibling(self) -> TextStream:
        """Another stream after the same prompt, of which nothing was pushed yet."""
        assert not self.token_ids, len(self.token_ids)
        sibling = copy.copy(self)
        sibling._begin()
        return sibling

    def _begin(self) -> None:
        """Makes what each sample has of its own."""
        self.token_ids: list[int] = []
        self._matchers = [StopMatcher(stop) for stop in self._stops]
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._utf8.setstate(self._utf8_state)
        self._held = ""
        self._emitted: list[str] = []
        self._is_finished = False

    def _after(self, prompt_ids: Sequence[int]) -> tuple[tuple[bytes, int], bool]:
        """The UTF-8 decoder's state after the prompt, and whether no text came before."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for id in prompt_ids[-MAX_CHARACTER_BYTES:]:
            utf8.decode(self._spell(id))
        # Most prompts show text at once; one of a million hidden tokens is looked at once per kind.
        shows_text = any(map(self._spell, prompt_ids[:MAX_CHARACTER_BYTES])) or any(
            map(self._spell, set(prompt_ids))
        )
        return utf8.getstate(), not shows_text

    @property
    def text(self) -> str:
        """All that was emitted so far."""
        return "".join(self._emitted)

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    def push(self, output: Output) -> TextDelta:
        """Takes the sample's next output; outputs after the end are ignored.

        Where the delta has finish_reason "stop" and the output has none, a stop string is complete:
        the caller must tell the engine.
        """
        if self._is_finished:
            return TextDelta()
        text = self._decode(output)
        self._held += text
        if match := self._find_stop(text):
            delta = TextDelta(self._held[: match.n_kept], "stop", match.stop)
        elif output.finish_reason is not None:
            delta = TextDelta(self._held, output.finish_reason, output.stop_reason)
        else:
            n_doubtful = max((matcher.n_matched for matcher in self._matchers), default=0)
            n_certain = len(self._held) - n_doubtful
            delta = TextDelta(self._held[:n_certain])
            self._held = self._held[n_certain:]
        self._is_finished = delta.finish_reason is not None
        self._emitted.append(delta.text)
        return delta

    def _decode(self, output: Output) -> str:
        """The characters that the output completes."""
        spelling = b""
        if output.token_id is not None:
            self.token_ids.append(output.token_id)
            # A token that ends its sample (EOS, a stop token) is shown as stop strings are.
            if output.finish_reason != "stop" or self._params.include_stop_str_in_output:
                spelling = self._spell(output.token_id)
                if spelling and self._is_first:
                    spelling = self._tokenizer.first_bytes(output.token_id)
                    self._is_first = False
        return self._utf8.decode(spelling, final=output.finish_reason is not None)

    def _spell(self, id: int) -> bytes:
        return b"" if id in self._hidden else self._tokenizer.token_bytes(id)

    def _find_stop(self, text: str) -> StopMatch | None:
        """The stop string that `text`, the end of the held text, completes first."""
        may_stop = self.n_tokens >= self._params.min_tokens
        matches = [
            (n_read, -len(matcher.stop.text), matcher.stop.text)
            for matcher in self._matchers
            if (n_read := matcher.feed(text, may_stop=may_stop)) is not None
        ]
        if not matches:
            return None
        n_read, _, stop = min(matches)  # of those that end together, the longest
        n_cut = 0 if self._params.include_stop_str_in_output else len(stop)
        return StopMatch(stop, len(self._held) - len(text) + n_read - n_cut)


class StopMatch(NamedTuple):
    """A complete stop string, and how much of the held text to keep."""

    stop: str
    n_kept: int
