"""One runtime over two: versions with files are loaded here, versions with an upstream are another server's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from server.runtime.base import Engine, LoadRequest, Runtime
from server.runtime.upstream_options import UpstreamOptions


class DispatchRuntime:
    """Implements ``Runtime``: each request goes to the runtime that its version needs."""

    def __init__(self, local: Runtime, upstream: Callable[[UpstreamOptions], Runtime]) -> None:
        self._local = local
        self._upstream = upstream

    def load(self, request: LoadRequest) -> Engine:
        """A warm engine, or ModelLoadError with one sentence saying why."""
        runtime = self._local if request.upstream is None else self._upstream(request.upstream)
        return runtime.load(request)

    def describe(self) -> Mapping[str, object]:
        """Facts about the runtime that works here."""
        return self._local.describe()
