"""What every test shares."""

import os

import torch

# Without a GPU the kernels run by Triton's interpreter. Triton decides when it is first imported,
# which transformers does, so this stands before everything else.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Two test processes share two cores; a second thread in each only makes them wait for each other.
torch.set_num_threads(1)
