"""The benchmark's recipe for targets, in miniature; `workloads_smoke.set_targets` runs it."""
