"""Weights that a model makes by a softmax of its own, on a GPU: needs torch and pytest alone."""

import pytest
import torch
from torch import Tensor, nn

from entropy_regularization import record_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Attention(nn.Module):
    """Attends by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x) @ self.project(x).unflatten(-1, (4, 4)).transpose(1, 2)

    def weights(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (4, 4)).transpose(1, 2)
        causal = torch.ones(x.shape[1], x.shape[1], device=x.device).tril() == 0
        return (heads @ heads.mT).masked_fill(causal, -torch.inf).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(2, 130, 16).double()
    weights = model.weights(x)
    expected = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
    (wanted,) = torch.autograd.grad(expected.mean(), model.project.weight)
    model.to("cuda", dtype)
    atol = 1e-5 if dtype == torch.float32 else 0.05
    for _ in range(2):  # the second pass is not watched
        with record_entropy(model) as recording:
            model(x.to("cuda", dtype))
        (layer,) = recording
        torch.testing.assert_close(layer.entropy.cpu().double(), expected, rtol=0, atol=atol)
        assert layer.allowed_keys[0, 0].tolist() == list(range(1, 131))
        (got,) = torch.autograd.grad(layer.entropy.mean(), model.project.weight)
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=0, atol=atol)
