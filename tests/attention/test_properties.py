"""The identities of attention entropy, in float64, on random problems."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entropy_regularization import attention_with_entropy

EXACT = {"rtol": 0.0, "atol": 1e-13}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    queries, keys = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    gain = draw(st.sampled_from([0.1, 1.0, 5.0]))
    shapes = [(1, 2, queries, 4), (1, 2, keys, 4), (1, 2, keys, 3)]
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return gain * query, key, value


def entropy_of(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
    return attention_with_entropy(query, key, value, implementation="blockwise", **options).entropy


@settings(max_examples=40, deadline=None)
@given(problems())
def test_bounds_permutation_shift_and_duplication(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = problem
    n = key.shape[2]
    plain = entropy_of(query, key, value)
    assert (plain >= -1e-13).all()
    assert (plain <= math.log(n) + 1e-13).all()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(
        entropy_of(query, key[:, :, order], value[:, :, order]), plain, **EXACT
    )
    shift = torch.full((1, 1, query.shape[2], 1), 3.0, dtype=torch.float64)
    torch.testing.assert_close(entropy_of(query, key, value, bias=shift), plain, **EXACT)
    twice = entropy_of(query, torch.cat([key, key], 2), torch.cat([value, value], 2))
    torch.testing.assert_close(twice, plain + math.log(2), **EXACT)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_gradient_sums_to_zero_over_keys_and_follows_the_variance(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    query, key, value = problem
    scores = torch.zeros(1, 2, query.shape[2], key.shape[2], dtype=torch.float64).requires_grad_()
    entropy = entropy_of(query, key, value, bias=scores)
    (gradient,) = torch.autograd.grad(entropy.sum(), scores)
    zero = torch.zeros_like(gradient[..., 0])
    torch.testing.assert_close(gradient.sum(-1), zero, rtol=0.0, atol=1e-12)
    # d H / d beta = -beta Var_p(s) for scores beta s
    s = query @ key.transpose(-1, -2) / 2
    beta = 1.3
    p = torch.softmax(beta * s, -1)
    variance = (p * s.square()).sum(-1) - (p * s).sum(-1).square()
    scaled = (beta * query).requires_grad_()
    (by_query,) = torch.autograd.grad(entropy_of(scaled, key, value).sum(), scaled)
    torch.testing.assert_close((by_query * query).sum(-1), -beta * variance, rtol=1e-10, atol=1e-10)


def test_closed_forms() -> None:
    zero = torch.zeros(1, 1, 4, 2, dtype=torch.float64)
    uniform = entropy_of(zero, zero, zero, causal=True)[0, 0]
    torch.testing.assert_close(uniform.exp(), torch.arange(1.0, 5.0, dtype=torch.float64))
    for gap in (0.0, 0.5, 3.0, 40.0, 800.0):
        bias = torch.tensor([[[[0.0, gap]]]], dtype=torch.float64)
        one = zero[:, :, :1]
        found = entropy_of(one, zero[:, :, :2], zero[:, :, :2], bias=bias).item()
        p = 1 / (1 + math.exp(-gap))
        q = math.exp(-gap) / (1 + math.exp(-gap))
        binary = -p * math.log(p) - (q * math.log(q) if q > 0 else 0.0)
        assert math.isclose(found, binary, rel_tol=1e-12, abs_tol=1e-15)
