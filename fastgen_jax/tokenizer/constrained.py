"""What a request's params say in words of what its output may be, in terms of tokens."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from fastgen_jax.grammar import Grammar, GrammarCompiler, grammar_text
from fastgen_jax.sampling_params import SamplingParams, StructuredOutputsParams
from fastgen_jax.tokenizer.tokenizer import Tokenizer


class Constraints(NamedTuple):
    """Fields of a Request."""

    grammar: Grammar | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()


def needs_words(params: SamplingParams) -> bool:
    """Whether they say anything that only who knows the tokenizer can turn into tokens."""
    return params.structured_outputs is not None or bool(params.bad_words)


class Constrainer:
    """Turns the words of one model's requests into its tokens; thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]):
        self._tokenizer = tokenizer
        self._compiler = GrammarCompiler(tokenizer.as_json, vocab_size, eos_token_ids)

    def constraints(
        self,
        params: SamplingParams,
        read: Callable[[StructuredOutputsParams], str] = grammar_text,
    ) -> Constraints:
        """What these params constrain.

        Args:
            read: grammar_text, or what does the same in bounded time.

        Raises:
            InvalidRequest: a form that cannot be compiled.
        """
        structure, spellings = params.structured_outputs, self._tokenizer.spellings
        grammar = None if structure is None else self._compiler.compile(read(structure))
        return Constraints(
            grammar, tuple(ids for word in params.bad_words for ids in spellings(word))
        )
