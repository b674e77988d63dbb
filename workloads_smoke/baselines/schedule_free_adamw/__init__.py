"""The Schedule-Free AdamW baseline."""
