"""Evaluation metrics as the official workloads define them, one module each."""
