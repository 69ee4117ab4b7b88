"""The one exception tree: everything that a user of fastgen_jax can cause or see."""


class FastGenError(Exception):
    """Root of every error that a user of fastgen_jax can cause or see."""


class ConfigError(FastGenError, ValueError):
    """An option, a flag or a model's config.json has a value that cannot work."""


class CheckpointError(FastGenError):
    """The files of a model are missing, damaged or do not fit its config."""


class WeightsError(FastGenError, ValueError):
    """Arrays that a program gave as weights do not fit the model; the message lists all of them."""


class RequestError(FastGenError):
    """A request was refused; nothing was allocated for it. `param` names the field at fault."""

    def __init__(self, message: str, *, param: str | None = None):
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError, ValueError):
    """A value of the request is out of range or of the wrong type."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output together can never fit the context or the KV pool."""


class QueueFull(RequestError):
    """The engine holds as many requests as it may; come back after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


class EngineStopped(RequestError):
    """The engine is draining, has stopped, or died; the message says which."""
