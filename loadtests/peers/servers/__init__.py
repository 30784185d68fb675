"""One program for each peer: the small model behind it, as its documentation shows it.

They run in the peers' environments (``loadtests.peers.environments``) and import nothing of the project but
``loadtests.session`` and ``loadtests.peers.servers.served``. Where to listen comes by the environment.
"""
