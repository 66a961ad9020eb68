"""The targets of tests/fuzz.py, one module for each sort of input.

A target is a function `fuzz_...(rng, folder)`: it makes one input in the folder, damages it, uses
it as a run would, and raises what is wrong. It returns a line that says what happened. The input
depends on the generator only, so the order of the draws is part of a seed's meaning.
"""
