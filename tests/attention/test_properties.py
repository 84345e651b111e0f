"""The identities of attention entropy, in float64, on random problems."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entropy_regularization import AttentionOutput, attention_with_entropy

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


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(0, 2**31), st.sampled_from(["reference", "blockwise"]))
def test_identities_hold_under_masks(
    problem: tuple[Tensor, Tensor, Tensor], seed: int, implementation: str
) -> None:
    """Bounds by the keys a row may see, permutation, shift and duplication, with masks and bias."""
    query, key, value = problem
    n_queries, n = query.shape[2], key.shape[2]
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(1, 2, n_queries, n, generator=generator) > 0.3
    bias = torch.randn(1, 2, n_queries, n, generator=generator, dtype=torch.float64)
    order = torch.randperm(n, generator=generator)

    def run(places: Tensor, shift: float = 0.0) -> AttentionOutput:
        return attention_with_entropy(
            query,
            key[:, :, places],
            value[:, :, places],
            allowed=allowed[..., places],
            bias=bias[..., places] + shift,
            implementation=implementation,
        )

    plain = run(torch.arange(n))
    seen = plain.allowed_keys
    assert (plain.entropy >= -1e-14).all()
    assert (plain.entropy <= seen.clamp(min=1).log() + 1e-13).all()
    assert (plain.entropy[seen.expand_as(plain.entropy) == 1].abs() <= 1e-14).all()
    torch.testing.assert_close(run(order).entropy, plain.entropy, **EXACT)
    torch.testing.assert_close(run(order, shift=5.0).entropy, plain.entropy, **EXACT)
    twice = run(torch.cat([order, torch.arange(n)])).entropy
    more = (seen > 0).double() * math.log(2.0)
    torch.testing.assert_close(twice, plain.entropy + more, **EXACT)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.floats(-300.0, 300.0), st.floats(-800.0, 800.0))
def test_uniform_rows_one_key_and_two_keys(n: int, score: float, gap: float) -> None:
    zero = torch.zeros(1, 1, 1, 2, dtype=torch.float64)

    def entropy(*scores: float) -> float:
        bias = torch.tensor(scores, dtype=torch.float64)[None, None, None]
        keys = zero.expand(1, 1, len(scores), 2)
        return float(entropy_of(zero, keys, keys, bias=bias))

    assert math.isclose(entropy(*[score] * n), math.log(n), rel_tol=0.0, abs_tol=2e-14)
    assert entropy(score) == 0.0
    p = 1 / (1 + math.exp(-abs(gap)))
    q = math.exp(-abs(gap)) * p
    binary = -p * math.log(p) - (q * math.log(q) if q > 0 else 0.0)
    assert math.isclose(entropy(0.0, gap), binary, rel_tol=1e-12, abs_tol=1e-15)


def test_uniform_causal_rows() -> None:
    zero = torch.zeros(1, 1, 4, 2, dtype=torch.float64)
    uniform = entropy_of(zero, zero, zero, causal=True)[0, 0]
    torch.testing.assert_close(uniform.exp(), torch.arange(1.0, 5.0, dtype=torch.float64), **EXACT)
