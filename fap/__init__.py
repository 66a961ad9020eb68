"""Fast AdvProp (Mei et al., ICLR 2022): more robust image classifiers at the price of vanilla
training.
"""

__version__ = "0.1.0"
