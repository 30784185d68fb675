"""The native transport: asyncio protocols on the event loop, with no coroutine, task or future per inference request.

``session`` is the only importer of the HTTP/2 library; ``wire`` knows gRPC's framing and nothing of sockets; ``h2`` is
one HTTP/2 connection, ``unary``, ``streams`` and ``asgi`` what its streams can be; ``http1`` is one HTTP/1.1
connection, ``cycle`` one inference request on it; ``server`` listens and finds out which of the two a connection
speaks.
"""
