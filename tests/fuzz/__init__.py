"""Calls of the public operators drawn at random, valid and invalid, in processes whose death is counted.

``python -m tests.fuzz --calls 20000 --seed 0`` makes them and prints one line.
"""
