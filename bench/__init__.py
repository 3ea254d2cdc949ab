"""Benchmarks: each module writes long CSV rows; see bench/results/."""
