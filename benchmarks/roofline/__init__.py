"""The work of a training step on a GPU, counted on a CPU; see `python -m benchmarks.roofline`."""
