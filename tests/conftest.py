"""One thread for all tests: their tensors are tiny, and sums then come in the same order everywhere."""

import torch

torch.set_num_threads(1)
