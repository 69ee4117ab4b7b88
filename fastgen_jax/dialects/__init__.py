"""How models write calls of tools, and thoughts: text in, events out.

No HTTP, no tokenizer, no engine: make_reader(...) makes events of an answer's text, Dialect.grammar
makes the grammar that forces a call, detect(...) tells from a chat template which ones a model has.
"""

from fastgen_jax.dialects.detect import DIALECTS, THINKING, detect
from fastgen_jax.dialects.dialect import Dialect, Tool
from fastgen_jax.dialects.events import CallPart, CallStart, Event, Text, Thought
from fastgen_jax.dialects.reader import make_reader
from fastgen_jax.dialects.tape import Reader
from fastgen_jax.dialects.thinking import Thinking

__all__ = [
    "DIALECTS",
    "THINKING",
    "CallPart",
    "CallStart",
    "Dialect",
    "Event",
    "Reader",
    "Text",
    "Thinking",
    "Thought",
    "Tool",
    "detect",
    "make_reader",
]
