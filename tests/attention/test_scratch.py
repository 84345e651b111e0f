"""Buffers stay from call to call: nothing of one call may show in another."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import worst_error
from torch import Tensor

from entropy_regularization import attention_with_entropy
from entropy_regularization.attention.blockwise import chunk
from entropy_regularization.attention.blockwise.chunk import Scratch


@pytest.fixture(autouse=True)
def _no_spare() -> None:
    Scratch._spare.clear()


def everything(inputs: list[Tensor]) -> list[Tensor]:
    found = attention_with_entropy(*inputs, causal=True, implementation="blockwise")
    total = found.output.square().sum() + found.entropy.square().sum()
    return [found.output, found.entropy, *torch.autograd.grad(total, inputs)]


def make_inputs(seed: int, dtype: torch.dtype = torch.float32, n: int = 70) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 3, n, 8)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def test_calls_of_other_sizes_and_dtypes_between_change_nothing() -> None:
    expected = [tensor.clone() for tensor in everything(make_inputs(0))]
    for dtype, n in ((torch.float64, 20), (torch.bfloat16, 130), (torch.float32, 300)):
        everything(make_inputs(1, dtype, n))
    assert Scratch._spare
    for buffer in Scratch._spare[0].values():
        buffer.fill_(torch.nan)
    assert all(map(torch.equal, everything(make_inputs(0)), expected))


def test_buffers_of_inference_mode_serve_training() -> None:
    inputs = make_inputs(0)
    with torch.inference_mode():
        attention_with_entropy(*(tensor.detach() for tensor in inputs), implementation="blockwise")
    everything(inputs)


def test_threads_do_not_share_buffers() -> None:
    expected = [everything(make_inputs(seed)) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            found = list(pool.map(lambda seed: everything(make_inputs(seed)), range(16)))
            for mine, true in zip(found, expected, strict=True):
                assert worst_error(mine, true) <= 1e-6


def test_large_buffers_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "KEPT_BYTES", 1000)
    everything(make_inputs(0))
    assert not Scratch._spare
