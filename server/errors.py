"""One tree of domain errors. Each class has a stable ``code``; none knows an HTTP or gRPC number.

``server.transport.status`` is the single table from ``code`` to protocol status. The text of a ``TidegateError``
is meant for the caller: it names what was wrong, what was wanted and what was got, and never carries internals
(paths, addresses, tracebacks). Any other exception is answered as "internal error" plus the request's id.
"""

from __future__ import annotations


class TidegateError(Exception):
    """Base of everything that may be told to a caller."""

    code = "internal"
    #: Whether one member of a batch may be to blame for it, or parts of the batch may do better: then it is divided.
    divides = False
    #: Whether it has been counted as a refusal: it may pass several places that would.
    counted = False

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidArgument(TidegateError):
    """The request is malformed or does not fit the model."""

    code = "invalid_argument"
    divides = True


class InputRejected(InvalidArgument):
    """The model's graph refused this input at run time (index out of range, shapes that do not broadcast...).

    Only raised after the member has been run alone, so it speaks of this request and not of a neighbour.
    """

    code = "input_rejected"


class PayloadTooLarge(TidegateError):
    """The body, raw or decompressed, is over the limit."""

    code = "payload_too_large"


class UnsupportedEncoding(TidegateError):
    """A Content-Encoding that the gateway does not speak."""

    code = "unsupported_encoding"


class NotFound(TidegateError):
    """No such model, version or route."""

    code = "not_found"


class ModelNotFound(NotFound):
    """``Request for unknown model: ...``: clients match on that text."""

    code = "model_not_found"


class VersionNotFound(NotFound):
    code = "version_not_found"


class ModelNotReady(TidegateError):
    """Known, but loading, failed or unloading."""

    code = "model_not_ready"


class Draining(TidegateError):
    """The process is shutting down and takes no new work."""

    code = "draining"


class QueueFull(TidegateError):
    """A bounded queue is full: the request was refused, nothing was done."""

    code = "queue_full"


class QueueTimeout(TidegateError):
    """The queue policy's timeout passed before the request was started."""

    code = "queue_timeout"


class TooManyRequests(TidegateError):
    """An admission limit (requests, connections, streams in flight) was hit."""

    code = "too_many_requests"


class DeadlineExceeded(TidegateError):
    """The caller's deadline passed; queued work was dropped."""

    code = "deadline_exceeded"


class VersionTimeout(TidegateError):
    """A version did not answer within the time that its policy gives an attempt."""

    code = "version_timeout"


class Cancelled(TidegateError):
    """The caller went away."""

    code = "cancelled"


class Unimplemented(TidegateError):
    """A part of the protocol that this server does not offer."""

    code = "unimplemented"


class FailedPrecondition(TidegateError):
    """The call is right, the server's state or settings are not (e.g. model control mode none)."""

    code = "failed_precondition"


class ConfigError(TidegateError):
    """A configuration file, flag or model directory is wrong. The message lists every mistake found."""

    code = "config_error"


class ModelLoadError(TidegateError):
    """A version could not be made ready. The message is one sentence saying why.

    ``model`` and ``version``: whose load it was, where whoever asked for several has to know ("" otherwise).
    """

    code = "model_load_error"

    def __init__(self, message: str, *, retry_after_s: float | None = None, model: str = "", version: str = "") -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.model = model
        self.version = version


class OutOfMemory(TidegateError):
    """The device had no memory for this batch; the model keeps serving."""

    code = "out_of_memory"
    divides = True


class RuntimeFailure(TidegateError):
    """The runtime failed in a way that the input does not explain."""

    code = "runtime_failure"
    divides = True


class UpstreamFailure(RuntimeFailure):
    """The server behind an upstream version failed, or answered what it should not.

    Never divided: the parts of a batch would cost a server in trouble up to twice its requests.
    """

    divides = False


class UpstreamUnavailable(UpstreamFailure):
    """The server behind an upstream version could not be reached, is not ready or did not answer in time."""

    code = "upstream_unavailable"
