"""Everything that a GPU machine measures: `make gpu`, or `python -m bench.gpu.suite`; see README.md
in this folder.
"""
