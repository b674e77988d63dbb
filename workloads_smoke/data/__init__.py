"""Offline data sets of the smoke workloads and the queue that serves them."""
