"""Submissions to compare with: NAdamW, Schedule-Free AdamW and Muon at their published settings.

Each folder is a submission in the official format and takes any workload, official or smoke.
"""
