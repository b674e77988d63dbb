"""The NAdamW baseline."""
