"""Judging a model, base and tuned in one run, on benchmarks in their original file layouts."""
