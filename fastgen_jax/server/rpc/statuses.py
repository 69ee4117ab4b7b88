"""What an ApiError is in gRPC: a status code, a message, and details in google.rpc's types."""

from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from fastgen_jax.server.errors import CLIENT_GONE, ApiError

CODES = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    408: StatusCode.DEADLINE_EXCEEDED,
    413: StatusCode.RESOURCE_EXHAUSTED,
    429: StatusCode.RESOURCE_EXHAUSTED,
    CLIENT_GONE: StatusCode.CANCELLED,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
MAX_MESSAGE = 1000  # bytes: a client takes 8 KiB of trailers, in which some of them take three
DOMAIN = "fastgen_jax"
STATUS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"  # which retrying clients heed by themselves


def code_of(error: ApiError) -> StatusCode:
    return CODES.get(error.status, StatusCode.INTERNAL)


def message_of(error: ApiError) -> str:
    return error.message.encode(errors="replace")[:MAX_MESSAGE].decode(errors="ignore")


def trailers_of(error: ApiError, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata that ends a call: the status with all that is known of the error."""
    status = Status(code=code_of(error).value[0], message=message_of(error))
    for detail in _details_of(error, request_id):
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    trailers: list[tuple[str, str | bytes]] = [(STATUS_KEY, status.SerializeToString())]
    if seconds := error.headers.get("retry-after"):
        trailers.append((PUSHBACK_KEY, str(1000 * int(seconds))))
    return (*trailers, ("x-request-id", request_id))


def _details_of(error: ApiError, request_id: str) -> list[Message]:
    found: list[Message] = [details.RequestInfo(request_id=request_id)]
    if error.code is not None:
        found.append(details.ErrorInfo(reason=error.code.upper(), domain=DOMAIN))
    if error.param is not None:
        violation = details.BadRequest.FieldViolation(
            field=error.param, description=message_of(error)
        )
        found.append(details.BadRequest(field_violations=[violation]))
    if seconds := error.headers.get("retry-after"):
        found.append(details.RetryInfo(retry_delay=Duration(seconds=int(seconds))))
    return found
