"""Does Fast AdvProp pay, where, and how much? The study behind docs/evidence.md.

`python -m bench.evidence` runs it; `studies.py` says what is trained, `arms.py` how.
"""
