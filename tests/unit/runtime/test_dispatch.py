"""Which runtime a version is loaded by."""

from __future__ import annotations

from pathlib import Path

from server.runtime.base import LoadRequest, ModelOptions
from server.runtime.dispatch import DispatchRuntime
from server.runtime.fake import FakeRuntime
from server.runtime.upstream_options import UpstreamOptions


def test_a_version_with_an_upstream_is_loaded_by_that_upstreams_runtime() -> None:
    local, remote = FakeRuntime(), FakeRuntime()
    asked: list[UpstreamOptions] = []

    def upstream(options: UpstreamOptions) -> FakeRuntime:
        asked.append(options)
        return remote

    subject = DispatchRuntime(local, upstream)
    address = UpstreamOptions("http://host:1")
    here = subject.load(LoadRequest("m", "1", Path("m.onnx"), ModelOptions()))
    assert (local.engines, remote.engines, asked) == ([here], [], [])
    there = subject.load(LoadRequest("m", "2", Path(), ModelOptions(), upstream=address))
    assert (local.engines, remote.engines, asked) == ([here], [there], [address])
    assert subject.describe() == local.describe()
