"""Submissions to compare with: NAdamW, Schedule-Free AdamW and Muon at their published settings.

Of Muon a single point is published; the other four of its search space are ours, around it.

Each folder is a submission in the official format and takes any workload, official or smoke.
"""
