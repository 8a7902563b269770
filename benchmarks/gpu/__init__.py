"""Acceptance on a CUDA machine, in pieces of at most ten minutes: `make gpu`, or `python -m
benchmarks.gpu --help`."""
