"""What only a GPU can show: real launches, long sequences, large tensors, graphs, accuracy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    Case,
    check_error_is_at_most_that_of_naive_attention,
    gradients,
    worst_error,
)
from torch import Tensor

from entropy_regularization import attention_with_entropy
from entropy_regularization.attention.triton.support import is_interpreted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or is_interpreted(), reason="needs a CUDA device"
    ),
]

LARGE = [
    Case("large-causal", (2, 4, 2, 1000, 1000, 64, 64), {"causal": True}),
    Case("large-causal-128", (1, 4, 4, 777, 1111, 128, 128), {"causal": True}),
    Case("large-odd-dims", (1, 2, 2, 300, 500, 80, 96), {"causal": True}),
    Case("large-widest", (1, 2, 1, 300, 300, 256, 256), {"causal": True}),
    Case("large-window", (1, 4, 2, 1500, 1500, 64, 64), {"window": (200, 30)}),
    Case("large-padding", (3, 4, 4, 700, 700, 64, 64), {"causal": True}, padding=True),
    Case("large-documents", (2, 4, 2, 900, 900, 64, 64), {"causal": True}, documents=True),
    Case("large-bias", (3, 4, 4, 300, 400, 64, 64), {"causal": True}, bias=(1, 4, 300, 400)),
    Case("large-alibi", (3, 4, 4, 300, 400, 64, 64), {"causal": True}, bias=(1, 4, 1, 400)),
    Case("large-softcap-sinks", (2, 4, 2, 500, 500, 64, 64), {"softcap": 4.0}, sinks=True),
    Case(
        "large-everything",
        (2, 4, 2, 411, 514, 72, 40),
        {"causal": True, "window": (260, 2), "softcap": 3.0},
        padding=True,
        documents=True,
        dense=(1, 4, 411, 514),
        bias=(2, 1, 411, 514),
        sinks=True,
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_error_is_at_most_that_of_naive_attention(case: Case, dtype: torch.dtype) -> None:
    check_error_is_at_most_that_of_naive_attention(case, dtype, "cuda")


# float32 tiles stay small: they are multiplied without tensor cores, in unrolled code
CONFIGURATIONS = [
    ((16, 16, 4, 1), torch.float32),
    ((32, 16, 4, 2), torch.float32),
    ((16, 32, 8, 1), torch.float32),
    ((16, 16, 4, 1), torch.bfloat16),
    ((32, 64, 4, 2), torch.bfloat16),
    ((64, 32, 8, 3), torch.bfloat16),
    ((64, 64, 4, 2), torch.bfloat16),
    ((128, 32, 8, 2), torch.bfloat16),
]


@pytest.mark.parametrize(("tiles", "dtype"), CONFIGURATIONS)
def test_any_launch_configuration(
    tiles: tuple[int, int, int, int], dtype: torch.dtype, set_tiles: Any
) -> None:
    set_tiles(*tiles)
    inputs, options = LARGE[-1].build(dtype, "cuda")
    expected = LARGE[-1].run(inputs, options, "reference")
    got = LARGE[-1].run(inputs, options, "triton")
    budget = 1e-4 if dtype == torch.float32 else 0.1
    assert worst_error([got.entropy], [expected.entropy]) <= 1e-4
    assert worst_error(gradients(got, inputs), gradients(expected, inputs)) <= budget


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_repeats_are_bit_identical(case: Case) -> None:
    inputs, options = case.build(torch.bfloat16, "cuda")
    first = case.run(inputs, options, "triton")
    found = gradients(first, inputs)
    for _ in range(5):
        again = case.run(inputs, options, "triton")
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
        assert all(map(torch.equal, found, gradients(again, inputs)))


def capture(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Record a step after two runs on a side stream; return the graph and what it fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


@pytest.mark.parametrize("structure", ["causal", "documents and padding"])
def test_cuda_graph_replays_with_new_numbers(structure: str) -> None:
    inputs = [
        torch.randn(1, 4, 500, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    ]
    options: dict[str, Any] = {"causal": True}
    if structure != "causal":
        options["document"] = torch.arange(500, device="cuda")[None] // 180
        options["key_padding"] = torch.arange(500, device="cuda")[None] >= 70

    def step() -> list[Tensor]:
        got = attention_with_entropy(*inputs, **options, implementation="triton")
        total = got.output.float().square().sum() + got.entropy.square().sum()
        return [got.output, got.entropy, *torch.autograd.grad(total, inputs)]

    graph, captured = capture(step)
    with torch.no_grad():
        for tensor in inputs:
            tensor.normal_()
        for mask in list(options.values())[1:]:
            mask.copy_(mask.flip(-1))
    graph.replay()
    assert worst_error(captured, step()) == 0.0


def test_cuda_graph_draws_a_new_dropout_mask_at_every_replay() -> None:
    inputs = [torch.randn(1, 2, 64, 16, device="cuda") for _ in range(3)]
    graph, (output,) = capture(
        lambda: [attention_with_entropy(*inputs, dropout=0.5, implementation="triton").output]
    )
    graph.replay()
    first = output.clone()
    graph.replay()
    assert not torch.equal(first, output)


def test_offsets_beyond_two_to_the_31st_element() -> None:
    """The last head of a tensor of 2.2e9 elements equals the same head alone, backward too."""
    heads, rows, dim, tail = 17, 1_000_000, 128, 300
    query = torch.zeros(1, heads, rows, dim, device="cuda", dtype=torch.bfloat16)
    assert query.numel() > 2**31
    query[:, -1, -tail:].normal_(std=0.3)
    upstream = [torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=torch.float32)]
    for gradient in upstream:
        gradient[:, -1, -tail:].normal_()

    def tails(given: Tensor, upstream: list[Tensor], implementation: str) -> list[Tensor]:
        inputs = [given.detach().requires_grad_() for _ in range(3)]
        got = attention_with_entropy(*inputs, window=(100, 0), implementation=implementation)
        gradients = torch.autograd.grad([got.output, got.entropy], inputs, upstream)
        return [each[:, -1, -tail:] for each in (got.entropy, got.output, *gradients)]

    found = tails(query, upstream, "triton")
    last, *last_upstream = (each[:, -1:, -1000:].float() for each in (query, *upstream))
    wanted = tails(last, last_upstream, "reference")
    for one, two, bound in zip(found, wanted, (1e-4, *[0.02] * 4), strict=True):
        assert worst_error([one], [two]) <= bound * two.abs().max()


def test_memory_is_that_of_the_inputs() -> None:
    inputs = [
        torch.randn(1, 8, 16384, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    ]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = attention_with_entropy(*inputs, causal=True, implementation="triton")
    torch.autograd.grad([got.output, got.entropy], inputs, [torch.ones_like(t) for t in got[:2]])
    one = inputs[0].numel() * 2
    # output, its gradient, three gradients; six float32 numbers and an int64 count a row
    assert torch.cuda.max_memory_allocated() - before <= 5 * one + 8 * 16384 * 48 + 2**20


def test_checkpointing_under_dropout_draws_the_same_mask() -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = [torch.randn(1, 4, 300, 64, device="cuda").requires_grad_() for _ in range(3)]

    def function(*tensors: Tensor) -> Tensor:
        got = attention_with_entropy(*tensors, dropout=0.3, implementation="triton")
        return got.output.square().sum() + got.entropy.square().sum()

    torch.manual_seed(0)
    expected = torch.autograd.grad(function(*inputs), inputs)
    torch.manual_seed(0)
    total = checkpoint(function, *inputs, use_reentrant=False)
    assert worst_error(list(torch.autograd.grad(total, inputs)), list(expected)) == 0.0
