"""What every test shares."""

import torch

# Two test processes share two cores; a second thread in each only makes them wait for each other.
torch.set_num_threads(1)
