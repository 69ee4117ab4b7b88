"""Text to token ids and back: chat templates, incremental detokenisation, stop strings.

The engine never sees text; this file never sees the engine. Text leaves a TextStream once and is
never taken back; the pieces join to the decoding of all tokens at once; no token costs more than
those before it.
"""

from __future__ import annotations

import codecs
import copy
import functools
import inspect
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastgen_jax.engine.types import FinishReason, Output
from fastgen_jax.errors import CheckpointError, InvalidRequest
from fastgen_jax.history import (
    Control,
    Form,
    Message,
    best_form,
    has_calls,
    plain_messages,
    plain_tools,
    shaped,
)
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.vocabulary import BYTE_LEVEL_CODES, longest_token

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
MAX_CHARACTER_BYTES = 4  # of UTF-8
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece vocabularies name a byte
# What a chat template can raise at messages that it was not written for.
TEMPLATE_ERRORS = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip


def has_tokenizer(path: str) -> bool:
    """False for a directory without tokenizer files; a hub id is taken to have them."""
    directory = Path(path)
    return not directory.is_dir() or any((directory / name).exists() for name in TOKENIZER_FILES)


class Tokenizer:
    """A checkpoint's tokenizer and chat template. Never changes once made: threads may share it.

    Args:
        path: directory of a checkpoint, or a hub id that the local Hugging Face cache holds.
        chat_template: Jinja source chosen by the operator, instead of the checkpoint's.

    Raises:
        CheckpointError: the files are missing or damaged.
    """

    def __init__(self, path: str, *, chat_template: str | None = None):
        self._fast: Any = _load(path)
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
        vars(other).pop("_history_form", None)  # which that of the old template had
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
                "LLM.generate), or put a chat_template.jinja beside its tokenizer.json",
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

        def render(messages: list[Message], tools: list[Message]) -> str | None:
            try:
                return self._render(messages, tools=tools, tokenize=False)
            except InvalidRequest:
                return None

        return best_form(render)

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


def _load(path: str) -> Any:
    """The tokenizer of a directory or of a cached hub repository. Runs no code from there.

    tokenizer.json is taken as it stands. AutoTokenizer would rebuild it as the class that
    tokenizer_config.json names, and imports more; only older formats need it.
    """
    logging.getLogger("transformers").addFilter(_is_not_about_torch)
    import transformers  # half a second, hence only when there is text to handle
    from huggingface_hub import snapshot_download

    try:
        if not Path(path).is_dir():
            path = snapshot_download(path, local_files_only=True)
        if (Path(path) / "tokenizer.json").exists():
            fast = transformers.PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
            fast._tokenizer = _with_specials_found_first(fast.backend_tokenizer)
        else:
            # Left out, trust_remote_code would have transformers ask a terminal, and obey.
            fast = transformers.AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        if not fast.is_fast:
            raise ValueError("it has no fast form; convert it to a tokenizer.json")
    except Exception as error:  # tokenizers raises plain Exception at damaged files
        raise CheckpointError(f"cannot load the tokenizer of {path!r}: {error}") from error
    return fast


def _with_specials_found_first(backend: Any) -> Any:
    """The tokenizer, with special tokens looked for in the text as it is, before normalisation.

    Some files of LLaMA 1 have <s> normalised to ▁<s>: then tokenizers neither finds it inside text
    nor hides it when it decodes.
    """
    normalize = backend.normalizer.normalize_str if backend.normalizer else str
    added = backend.get_added_tokens_decoder().values()
    specials = [token for token in added if token.special and token.normalized]
    if all(normalize(token.content) == token.content for token in specials):
        return backend
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["normalized"] = token["normalized"] and not token["special"]
    return type(backend).from_str(json.dumps(spec))


def _is_not_about_torch(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


def _decoder_types(decoder: Any) -> set[str]:
    """The types named in tokenizer.json's "decoder", which may be a sequence of them."""
    if decoder is None:
        return set()
    spec: dict[str, Any] = json.loads(decoder.__getstate__())
    return {spec["type"], *(part["type"] for part in spec.get("decoders", ()))}


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


class StopString:
    """A stop string, prepared for its matchers; never changes.

    Knuth, Morris and Pratt, "Fast pattern matching in strings", 1977.
    INVARIANT: borders[i] is the length of the longest proper prefix of `text` that ends
    text[: i + 1].
    """

    def __init__(self, text: str):
        self.text = text
        self.borders = [0] * len(text)
        for i in range(1, len(text)):
            self.borders[i] = self.extend(self.borders[i - 1], text[i])

    def extend(self, n_matched: int, character: str) -> int:
        """Length of the longest prefix that ends the text, after one more character."""
        while n_matched and self.text[n_matched] != character:
            n_matched = self.borders[n_matched - 1]
        return n_matched + (self.text[n_matched] == character)


class StopMatcher:
    """Finds a stop string in text that arrives in pieces, at constant cost per character.

    INVARIANT: n_matched is the length of the longest proper prefix of `stop` that ends the text.
    """

    __slots__ = ("n_matched", "stop")

    def __init__(self, stop: StopString):
        self.stop = stop
        self.n_matched = 0

    def feed(self, text: str, *, may_stop: bool) -> int | None:
        """How many characters of `text` complete the first match; None: no match that counts."""
        stop, n_matched = self.stop, self.n_matched
        if not n_matched and stop.text[0] not in text:
            return None
        for n_read, character in enumerate(text, 1):
            n_matched = stop.extend(n_matched, character)
            if n_matched == len(stop.text):
                if may_stop:
                    return n_read
                n_matched = stop.borders[-1]
        self.n_matched = n_matched
        return None
