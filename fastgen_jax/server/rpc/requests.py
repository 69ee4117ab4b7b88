"""From a message of fastgen.proto to what it asks for: the same specs, and so the same verdicts,
as JSON bodies.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from google.protobuf.internal import api_implementation
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from fastgen_jax.errors import ConfigError
from fastgen_jax.server import protocol
from fastgen_jax.server.errors import ApiError, invalid
from fastgen_jax.server.protocol import ChatRequest, CompletionRequest
from fastgen_jax.server.reader import Ask, Reader
from fastgen_jax.server.rpc.fastgen_pb2 import GenerateRequest, Prompt, TokenizeRequest
from fastgen_jax.server.rpc.format import GenerateFormat

OF_PROMPTS = ("echo", "add_special_tokens")  # fields that a chat has no use for
AnyMessage = TypeVar("AnyMessage", bound=Message)


def check_parser():
    """Raises ConfigError where protobuf parses in Python, slowly and without a bound of depth."""
    if api_implementation.Type() == "python":
        raise ConfigError(
            "protobuf runs here without its compiled parser; install a wheel of it, and unset "
            "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"
        )


def generation_of(reader: Reader, body: bytes, *, is_streaming: bool) -> Ask:
    """What a GenerateRequest asks for.

    Raises:
        ApiError: it is bad, naming the field.
    """
    reader.service.check_queue()
    request = parsed(GenerateRequest, body)
    values = values_of(request) | {"stream": is_streaming}
    if request.messages:
        return _chat(reader, values)
    spec = protocol.validated(CompletionRequest, values)
    return reader.completion_of(spec, GenerateFormat)


def _chat(reader: Reader, values: dict[str, Any]) -> Ask:
    if "prompt" in values:
        raise invalid("send either prompt or messages", "prompt")
    for name in OF_PROMPTS:
        if name in values:
            raise invalid(f"{name} is for prompts; leave it out beside messages", name)
    n_rivals = values.pop("logprobs", None)
    values |= {"logprobs": n_rivals is not None, "top_logprobs": n_rivals}
    spec = protocol.validated(ChatRequest, values)
    try:
        return reader.conversation_of(
            spec, lambda shared, params, tools: GenerateFormat(**shared), "messages"
        )
    except ApiError as error:
        if error.param == "top_logprobs":
            error.message = error.message.replace("top_logprobs", "logprobs")
            error.param = "logprobs"
        raise


def tokens_of(reader: Reader, body: bytes) -> list[int]:
    """The token ids of what a TokenizeRequest holds. Raises ApiError for a bad one."""
    values = values_of(parsed(TokenizeRequest, body))
    return reader.tokens_of(protocol.validated(protocol.TokenizeRequest, values))


def parsed(kind: type[AnyMessage], body: bytes) -> AnyMessage:
    """Raises ApiError for bytes that are no such message."""
    message = kind()
    name = message.DESCRIPTOR.name
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise invalid(f"the bytes are no {name}: {error}") from None
    if unknown := next(iter(UnknownFieldSet(message)), None):
        protocol.check_extras({f"{name}.{unknown.field_number}": None})
    return message


def values_of(message: Message) -> dict[str, Any]:
    """The fields that are set, as a JSON body would hold them."""
    return {
        field.name: CONVERTED.get(field.name, _plain)(value)
        for field, value in message.ListFields()
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else list(value)


def _prompts(prompts: Iterable[Prompt]) -> list[str | list[int] | None]:
    return [_prompt(prompt) for prompt in prompts]


def _prompt(prompt: Prompt) -> str | list[int] | None:
    match prompt.WhichOneof("form"):
        case "text":
            return prompt.text
        case "token_ids":
            return list(prompt.token_ids.ids)
    return None


def _form(form: Any) -> dict[str, Any]:
    name = form.WhichOneof("form")
    if name == "choice":
        return {"choice": list(form.choice.texts)}
    return {} if name is None else {name: getattr(form, name)}


def _biases(biases: Mapping[int, float]) -> dict[str, float]:
    return {str(id): bias for id, bias in biases.items()}


CONVERTED: dict[str, Callable[[Any], Any]] = {
    "prompt": lambda given: given if isinstance(given, str) else _prompts(given),
    "messages": lambda given: [{"role": each.role, "content": each.content} for each in given],
    "logit_bias": _biases,
    "structured_outputs": _form,
}
