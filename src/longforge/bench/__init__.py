"""Measurements: our operations against the best rivals on the same machine, in one process, interleaved.

A benchmark runs a quick check of its operation against the reference first and refuses to report if that
fails. `python -m longforge.bench` needs no more than torch, numpy, numba and, on a GPU, Triton; `longforge
bench` is the same with the command's manners.
"""
