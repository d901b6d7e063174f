"""Settings of every test run: one thread, which is fastest for models this small and the same on any machine."""

import torch

torch.set_num_threads(1)
