"""The smoke workloads, one module each; `workloads_smoke.registry` builds them by name."""
