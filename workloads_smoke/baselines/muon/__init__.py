"""The Muon baseline."""
