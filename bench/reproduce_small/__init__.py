"""The whole method on a CPU with SmolLM2-135M: `python -m bench.reproduce_small`."""
