"""Intake: a request's way from its body into the engine's queue, the same for every front end."""

from collections.abc import Callable
from typing import NamedTuple

from fastgen_jax.server import protocol
from fastgen_jax.server.door import Client
from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.generation import Generation
from fastgen_jax.server.reader import Ask
from fastgen_jax.server.service import Service
from fastgen_jax.tokenizer import Constraints


class Entered(NamedTuple):
    """A request in the engine's queue, and what its body asked for."""

    generation: Generation
    ask: Ask


async def enter(
    service: Service,
    read: Callable[[], Ask],
    *,
    n_bytes: int,
    client: Client,
    timeout: float | None = None,
) -> Entered:
    """Has a body of so many bytes read by `read` and hands what it asks for to the engine.

    Args:
        timeout: seconds that the engine may take; None: as long as the server lets it.

    Raises:
        ApiError: the body is bad, or the engine refused it.
    """
    ask = await service.run_text(n_bytes, read)
    constraints = await _constraints(service, ask)
    generation = service.submit(
        ask.prompts,
        ask.params,
        is_streaming=ask.is_streaming,
        param=ask.param,
        voice=ask.voice,
        cache_salt=protocol.cache_salt(ask.cache_salt, client.tenant),
        owner=client.owner,
        priority=ask.priority,
        constraints=constraints,
        timeout=timeout,
    )
    return Entered(generation, ask)


async def _constraints(service: Service, ask: Ask) -> Constraints:
    """What the params constrain. Raises ApiError that names the field which asked for it."""
    try:
        return await service.constraints(ask.params)
    except ApiError as error:
        if error.param == "structured_outputs" and ask.form_param:
            error.param = ask.form_param
            error.message = error.message.replace("structured_outputs", ask.form_param, 1)
        raise
