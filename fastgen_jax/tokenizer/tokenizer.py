"""A checkpoint's tokenizer and chat template: text to token ids and back."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from fastgen_jax.errors import InvalidRequest
from fastgen_jax.tokenizer.history import (
    Control,
    Form,
    Message,
    best_form,
    has_calls,
    plain_messages,
    plain_tools,
    shaped,
)
from fastgen_jax.tokenizer.loading import load
from fastgen_jax.tokenizer.turns import end_of_turn
from fastgen_jax.tokenizer.vocabulary import BYTE_LEVEL_CODES, longest_token

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece vocabularies name a byte
# What a chat template can raise at messages that it was not written for.
TEMPLATE_ERRORS = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip


class Tokenizer:
    """A checkpoint's tokenizer and chat template. Never changes once made: threads may share it.

    Args:
        path: directory of a checkpoint, or a hub id that the local Hugging Face cache holds.
        chat_template: Jinja source chosen by the operator, instead of the checkpoint's.

    Raises:
        CheckpointError: the files are missing or damaged.
    """

    def __init__(self, path: str, *, chat_template: str | None = None):
        self._fast: Any = load(path)
        if chat_template is not None:
            self._fast.chat_template = chat_template
        self._backend = self._fast.backend_tokenizer
        self._backend.no_truncation()  # tokenizer.json may ask to cut long prompts
        self._backend.no_padding()
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id: int | None = self._fast.bos_token_id
        self.eos_token_id: int | None = self._fast.eos_token_id
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.longest_token = longest_token(self._backend)  # bytes of text; None: there is no bound
        self._decoders = _decoder_types(self._backend.decoder)
        self._any_text = self._backend.encode("a", add_special_tokens=False).ids[-1:] or [0]
        self._bytes: dict[int, bytes] = {}

    @property
    def has_chat_template(self) -> bool:
        return self._fast.chat_template is not None

    def with_template(self, chat_template: str) -> Tokenizer:
        """The same tokenizer with another chat template, of the operator's choice."""
        other = copy.copy(self)
        other._fast = copy.copy(self._fast)
        other._fast.chat_template = chat_template
        for of_the_old in ("eos_token_ids", "_control", "_history_form"):
            vars(other).pop(of_the_old, None)
        return other

    def for_transformers(self) -> Any:
        """A copy, as transformers knows it: what its user sets there changes nothing here."""
        return copy.deepcopy(self._fast)

    def describe(self) -> dict[str, Any]:
        """Its class, special tokens and chat template, under the names of tokenizer_config.json."""
        template = self._fast.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"))
        return {
            "tokenizer_class": type(self._fast).__name__,
            **tokens | self._fast.special_tokens_map,
            "chat_template": template,
        }

    @property
    def chat_template(self) -> str:
        """The source of the template, or of all of them; empty if there is none."""
        source = self._fast.chat_template or ""
        return source if isinstance(source, str) else "\n".join(source.values())

    @functools.cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """What ends a text, or a turn of a chat: the tokenizer's EOS, and what the template writes
        behind an answer. Checkpoints merged from several name only one of them in config.json.
        """
        added = self._backend.get_added_tokens_decoder()
        tokens = {token.content: id for id, token in added.items()}
        end = end_of_turn(self._text_of, tokens) if self.has_chat_template else None
        return frozenset(id for id in (self.eos_token_id, end) if id is not None)

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is this text."""
        id = self._backend.token_to_id(text)
        return id if id in self.special_ids else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Control tokens written in it count as such, unlike in messages.

        Of tokenizers' ways to encode the batch is the one that lets other threads run meanwhile.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the prompt is not valid Unicode: {error}", param="prompt"
            ) from None
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def spellings(self, word: str) -> tuple[tuple[int, ...], ...]:
        """Token ids of a word at the start of a line, and within one: after a space."""
        texts = (word.lstrip(), f" {word.lstrip()}")
        found = {tuple(self.encode(text, add_special_tokens=False)): None for text in texts}
        return tuple(ids for ids in found if ids)

    def as_json(self) -> str:
        """What its tokenizer.json would say."""
        return self._backend.to_str()

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids that the vocabulary lacks have none. Other threads run meanwhile."""
        return self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]

    def token_text(self, id: int) -> str:
        """token_bytes as text; a part of a character becomes U+FFFD."""
        return self.token_bytes(id).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 bytes that the token adds to text before it; possibly a part of a character."""
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self._bytes_after(self._any_text, id)
        return found

    def first_bytes(self, id: int) -> bytes:
        """token_bytes at the start of a text, where SentencePiece decoders drop a space."""
        return self._bytes_after([], id)

    def _bytes_after(self, before: list[int], id: int) -> bytes:
        piece = self._backend.id_to_token(id)
        if piece is None:
            return b""
        if "ByteLevel" in self._decoders:
            codes = [BYTE_LEVEL_CODES.get(character, -1) for character in piece]
            return piece.encode() if -1 in codes else bytes(codes)
        if "ByteFallback" in self._decoders and (byte := BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        n_before = len(self.decode(before, skip_special_tokens=False))
        return self.decode([*before, id], skip_special_tokens=False)[n_before:].encode()

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        /,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation. Control tokens that its messages spell are encoded as text.

        Args:
            messages: dicts with a role and a content: a string or a list of text parts, and for the
                assistant possibly None, which templates see as "". Earlier tool_calls are in
                OpenAI's form, with arguments that are an object or its JSON.
            add_generation_prompt: open an assistant's turn; default: unless continue_final_message.
            continue_final_message: leave the last message open, for the model to continue.
            tools: functions in OpenAI's form, for templates that know them.
            variables: others that the template reads, such as enable_thinking.

        Raises:
            InvalidRequest: no template, messages it refuses, or a variable that may not be set.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "this model has no chat template: send a plain prompt (/v1/completions, "
                "LLM.generate), or put a chat_template.jinja beside its tokenizer",
                param="messages",
            )
        self._check_variables(variables)
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        plain = plain_messages(messages)
        if has_calls(plain):
            plain = shaped(plain, self._history_form, self._control)
        self._control.check_keys(plain, "messages")
        self._control.check_keys(tools, "tools")
        self._control.check_keys(variables, "chat_template_kwargs")
        return self._render(
            plain,
            tools=plain_tools(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            sanitize_control_tokens=True,
            **variables,
        )

    @functools.cached_property
    def _control(self) -> Control:
        template = str(self._fast.chat_template)
        added = self._backend.get_added_tokens_decoder().values()
        texts = [(token.content, token.special) for token in added if token.content.strip()]
        return Control(text for text, is_special in texts if is_special or text in template)

    @functools.cached_property
    def _history_form(self) -> Form:
        """How the template wants earlier calls. Found when a first conversation has some."""
        return best_form(self._text_of)

    def _text_of(self, messages: list[Message], tools: list[Message] | None = None) -> str | None:
        """What the template makes of the messages; None: it refuses them."""
        try:
            return self._render(messages, tools=tools, tokenize=False)
        except InvalidRequest:
            return None

    def _render(self, messages: list[Message], **options: Any) -> Any:
        import jinja2

        try:
            return self._fast.apply_chat_template(messages, return_dict=False, **options)
        except (jinja2.TemplateError, *TEMPLATE_ERRORS) as error:
            raise InvalidRequest(f"the chat template refused: {error}", param="messages") from error

    def _check_variables(self, names: Iterable[str]) -> None:
        """A request brings no template of its own, nor redefines what the template relies on."""
        reserved = {"messages", *inspect.signature(self._fast.apply_chat_template).parameters}
        for name in names:
            if name in reserved or name in self._fast.special_tokens_map:
                raise InvalidRequest(f"a request may not set {name!r} of the template", param=name)


def _decoder_types(decoder: Any) -> set[str]:
    """The types named in tokenizer.json's "decoder", which may be a sequence of them."""
    if decoder is None:
        return set()
    spec: dict[str, Any] = json.loads(decoder.__getstate__())
    return {spec["type"], *(part["type"] for part in spec.get("decoders", ()))}
