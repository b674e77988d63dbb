"""Benchmarks of `shampoo_core`: counts, bytes and times on the shapes of real models.

`python -m benchmarks` prints them all; every module with a ``main`` runs alone too.
"""
