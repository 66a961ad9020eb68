"""Everything that a GPU machine measures: `make gpu`, or `python -m bench.gpu.suite`.

README.md in this folder explains it.
"""
