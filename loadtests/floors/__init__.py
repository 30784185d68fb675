"""What Tidegate is measured against in the same run: servers that do less, and the usual ways of doing the same.

``python -m loadtests.floors NAME FOLDER`` serves the models in FOLDER on free loopback ports and writes one line of
JSON with the addresses when it is ready.
"""
