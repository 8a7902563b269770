"""A grid of runs: its record and its jobs, and where they run."""

RECORD = "sweep.json"
"""Makes a folder a sweep's."""
