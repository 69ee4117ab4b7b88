"""Text to token ids and back: tokenizers, chat templates, text that streams, forms of output.

The engine never sees text; this folder never sees the engine.
"""

from fastgen_jax.tokenizer.constrained import Constrainer, Constraints, needs_words
from fastgen_jax.tokenizer.loading import has_tokenizer
from fastgen_jax.tokenizer.text_stream import TextDelta, TextStream
from fastgen_jax.tokenizer.tokenizer import Tokenizer

__all__ = [
    "Constrainer",
    "Constraints",
    "TextDelta",
    "TextStream",
    "Tokenizer",
    "has_tokenizer",
    "needs_words",
]
