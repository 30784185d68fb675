"""BentoML: JSON ``{"x": [[...]]}`` at ``/infer``. No V2 server; its batcher chooses its delay by itself."""

from __future__ import annotations

import bentoml  # type: ignore[import-not-found]
from bentoml_cli.cli import cli  # type: ignore[import-not-found]

from loadtests.peers.servers.served import HOST, MOST_ROWS, Array, Served, http_port

_LONGEST_MS = 60_000


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}}, metrics={"enabled": False})
class Rows:
    def __init__(self) -> None:
        self._served = Served()

    @bentoml.api(batchable=True, max_batch_size=MOST_ROWS, max_latency_ms=_LONGEST_MS, route="/infer")  # type: ignore[untyped-decorator]
    def infer(self, x: Array) -> Array:
        return self._served.run(x)


def main() -> None:
    cli(["serve", f"{__spec__.name}:Rows", "--host", HOST, "--port", str(http_port())])


if __name__ == "__main__":
    main()
