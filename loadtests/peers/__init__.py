"""Other model servers beside Tidegate, in one interleaved run: ``python -m loadtests.peers``.

``catalog`` says which there are, ``environments`` installs each into an environment of its own, ``servers`` are the
programs that run there, ``running`` starts and ends them, ``paired`` measures, and ``table`` says what came of it.
"""
