"""grpc.aio with a generic handler: bytes in, an answer that is there already out."""

from __future__ import annotations

from pathlib import Path

import grpc

from loadtests.floors.canned import Canned
from loadtests.floors.usual_grpc import SERVICE


async def start(folder: Path) -> tuple[grpc.aio.Server, str]:
    """A server and its address."""
    answer = Canned.of(folder).grpc

    async def infer(_request: bytes, _context: object) -> bytes:
        return answer

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    handler = grpc.unary_unary_rpc_method_handler(infer)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"
