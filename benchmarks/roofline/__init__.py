"""What a training step would ask of a GPU, counted on a CPU; `python -m benchmarks.roofline` says how."""
