"""workloads_smoke."""
