import socket

import pytest
import torch
from torch import distributed, multiprocessing

from entropy_regularization.reduction import SumAndCount, mean_count_over_ranks, sum_rows


def test_sum_rows_and_mean() -> None:
    values = torch.arange(12.0).view(2, 2, 3).requires_grad_()
    counted = torch.tensor([[True, True, False], [False, False, False]])[:, None]
    pair = sum_rows(values, counted)
    assert pair.total.tolist() == [1.0, 7.0]
    assert pair.count.tolist() == [2.0, 2.0]
    assert pair.mean().tolist() == [0.5, 3.5]
    assert sum_rows(values).count.tolist() == [6.0, 6.0]


def test_uncounted_rows_have_no_gradient_even_if_nan() -> None:
    values = torch.tensor([[[1.0, torch.nan]]], requires_grad=True)
    sum_rows(values, torch.tensor([True, False])).mean().sum().backward()
    assert values.grad.tolist() == [[[1.0, 0.0]]]


def test_nothing_counted_is_zero() -> None:
    values = torch.ones(1, 2, 3, requires_grad=True)
    mean = sum_rows(values, torch.tensor(False)).mean()
    mean.sum().backward()
    assert mean.tolist() == [0.0, 0.0]
    assert values.grad.abs().max() == 0


def test_pairs_of_parts_make_the_whole() -> None:
    torch.manual_seed(0)
    values, counted = torch.rand(4, 3, 5), torch.rand(4, 1, 5) > 0.5
    whole = sum_rows(values, counted)
    parts = sum_rows(values[:1], counted[:1]).plus(sum_rows(values[1:], counted[1:]))
    torch.testing.assert_close(parts.mean(), whole.mean())
    unweighted = (sum_rows(values[:1], counted[:1]).mean() + whole.mean()) / 2
    assert not torch.allclose(unweighted, whole.mean())


def two_ranks(rank: int, port: int) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    counts = torch.tensor([[4.0, 4.0], [1.0, 0.0]])[rank]
    pairs = [SumAndCount(torch.ones(2), counts), SumAndCount(torch.ones(1), counts[:1])]
    first, second = mean_count_over_ranks(pairs)
    assert first.count.tolist() == [2.5, 2.0]
    assert second.count.tolist() == [2.5]
    assert first.mean().tolist() == pytest.approx([0.4, 0.5])
    distributed.destroy_process_group()


def test_counts_over_ranks() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(two_ranks, (port,), nprocs=2)


@pytest.mark.parametrize("pairs", [[], [SumAndCount(torch.ones(2), torch.ones(2))]])
def test_counts_without_ranks_stay(pairs: list[SumAndCount]) -> None:
    assert mean_count_over_ranks(pairs) == pairs
