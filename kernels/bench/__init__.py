"""Benchmarks of the kernels; every figure is a ratio taken in one run."""
