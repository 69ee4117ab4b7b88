"""Reflection: what grpcurl asks to know the calls and their messages, for whoever has a key."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc.aio import ServicerContext
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from fastgen_jax.server.door import Door
from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.rpc import statuses

# Version 1 has the messages of v1alpha, under another name.
NAMES = (reflection.SERVICE_NAME, "grpc.reflection.v1.ServerReflection")


def handlers(door: Door, names: tuple[str, ...]) -> list[grpc.GenericRpcHandler]:
    """Reflection on the services of these names."""
    servicer: Any = reflection.aio.ReflectionServicer((*names, *NAMES))

    async def explain(asked: Any, context: ServicerContext) -> AsyncIterator[Any]:
        metadata = dict(context.invocation_metadata() or ())
        try:
            door.client_of(str(metadata.get("authorization", "")))
        except ApiError as error:
            await context.abort(statuses.code_of(error), statuses.message_of(error))
        async for reply in servicer.ServerReflectionInfo(asked, context):
            yield reply

    method = grpc.stream_stream_rpc_method_handler(
        explain, ServerReflectionRequest.FromString, ServerReflectionResponse.SerializeToString
    )
    methods = {"ServerReflectionInfo": method}
    return [grpc.method_handlers_generic_handler(name, methods) for name in NAMES]
