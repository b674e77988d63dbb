"""Tiny offline versions of the AlgoPerf workloads, with a local runner and scoring."""
