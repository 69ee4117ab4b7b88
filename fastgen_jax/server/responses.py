"""Answers that are not generated: error objects, and what a model is."""

from typing import Any

from starlette.types import Send

from fastgen_jax.server.errors import ApiError

# What OpenAI's first API said of each model, and some clients still look for.
PERMISSION = {
    "object": "model_permission", "organization": "*", "group": None, "is_blocking": False,
    "allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True,
    "allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False,
}  # fmt: skip


async def send_error(error: ApiError, send: Send, *, more_body: bool = False):
    """A response that is the error object; `more_body` leaves its end to the caller."""
    body = error.body()
    fields = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


def model_object(
    name: str, created: int, max_model_len: int | None, root: str | None
) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "fastgen_jax",
        "root": root or name,
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [PERMISSION | {"id": f"modelperm-{name}", "created": created}],
    }
