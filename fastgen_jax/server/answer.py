"""Answer: a request's way from the engine back to its client, the same for every front end."""

import asyncio
from collections.abc import AsyncIterator

from fastgen_jax.server.formats.format import Format
from fastgen_jax.server.generation import Generation

INLINE_ENTRIES = 2000  # up to which an answer is built on the event loop


async def pieces(generation: Generation, format: Format) -> AsyncIterator[bytes]:
    """A stream's messages as they come, and those that close it.

    Raises:
        ApiError: the request failed.
    """
    is_last = False
    while not is_last:
        await generation.changed()
        is_last = generation.n_open == 0
        for i, piece in enumerate(format.chunks(generation)):
            if i:
                await asyncio.sleep(0)  # others come in between
            yield piece
    yield format.end(generation)


async def whole(generation: Generation, format: Format) -> bytes:
    """The answer to a request that does not stream, once it has ended.

    Raises:
        ApiError: the request failed.
    """
    await generation.changed()
    if format.n_entries(generation) <= INLINE_ENTRIES:
        return format.result(generation)
    return await asyncio.to_thread(format.result, generation)
