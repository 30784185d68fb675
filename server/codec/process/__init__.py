"""Large JSON bodies are parsed, and large JSON answers written, in a process of their own: the codec process.

orjson and numpy hold the interpreter's lock for the whole of a body, some 15 ms for 1.4 MB, and every other request of
the gateway waits for it, on whatever thread the parsing runs. ``client`` is the gateway's end, ``worker`` the process.
"""
