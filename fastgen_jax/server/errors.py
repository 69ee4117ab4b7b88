"""ApiError: a refusal with its HTTP status in OpenAI's shape; the engine's errors as such."""

import math
from typing import Any

import orjson

from fastgen_jax.errors import (
    ContextLengthExceeded,
    EngineStopped,
    InvalidRequest,
    QueueFull,
    RequestError,
)

CLIENT_GONE = 499


class ApiError(Exception):
    """Ends one request with a status and an error object. The message is shown to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> bytes:
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return orjson.dumps({"error": error})


def invalid(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def unsupported(param: str, advice: str = "leave it out") -> ApiError:
    message = f"{param} is not supported by this server; {advice}"
    return ApiError(400, message, param=param, code="unsupported_parameter")


def unavailable(message: str, code: str, retry_after: int, *, close: bool = False) -> ApiError:
    headers = {"retry-after": str(retry_after)} | ({"connection": "close"} if close else {})
    return ApiError(503, message, type="service_unavailable", code=code, headers=headers)


def internal(message: str) -> ApiError:
    return ApiError(500, message, type="server_error", code="internal_error")


def from_engine(error: RequestError) -> ApiError:
    """What a refusal of the engine means in HTTP."""
    message = str(error)
    match error:
        case ContextLengthExceeded():
            return ApiError(400, message, param=error.param, code="context_length_exceeded")
        case InvalidRequest():
            return invalid(message, error.param)
        case QueueFull():
            seconds = max(1, math.ceil(error.retry_after))
            headers = {"retry-after": str(seconds)}
            return ApiError(
                429, message, type="rate_limit_error", code="queue_full", headers=headers
            )
        case EngineStopped():
            return unavailable(message, "engine_stopped", 5)
    return internal("the engine refused this request")
