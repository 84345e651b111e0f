"""torch.compile, opcheck, autocast, checkpointing, and what is refused."""

import pytest
import torch
from cases import CASES, Case, gradients, worst_error
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from entropy_regularization import attention_with_entropy
from entropy_regularization.attention.operators import blockwise_forward

EVERYTHING = next(case for case in CASES if case.name == "everything")
PADDED = next(case for case in CASES if case.name == "causal-left-padding")


def test_opcheck() -> None:
    inputs, options = EVERYTHING.build(torch.float64)
    query, key, value, bias, sinks = inputs
    masks = options["allowed"], options["key_padding"], options["document"]
    opcheck(blockwise_forward, (query, key, value, *masks, bias, sinks, None, 6, 0, 0.3, 3.0, 0.0))


@pytest.mark.parametrize("case", [PADDED, EVERYTHING], ids=lambda case: case.name)
def test_compile_fullgraph(case: Case) -> None:
    inputs, options = case.build(torch.float64)
    compiled = torch.compile(
        lambda *tensors: tuple(case.run(list(tensors), options, "auto")),
        fullgraph=True,
        backend="aot_eager",
    )
    got = type(case.run(inputs, options, "reference"))(*compiled(*inputs))
    expected = case.run(inputs, options, "reference")
    assert worst_error(list(got), list(expected)) <= 1e-12
    assert worst_error(gradients(got, inputs), gradients(expected, inputs)) <= 1e-12


def test_autocast_does_not_round_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [8 * torch.randn(1, 2, 16, 8, generator=generator) for _ in range(3)]
    plain = attention_with_entropy(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attention_with_entropy(*inputs)
    assert torch.equal(plain.entropy, cast.entropy)
    assert torch.equal(plain.output, cast.output)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_computes_the_same_again(dropout: float) -> None:
    inputs, _ = CASES[3].build(torch.float64)

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        found = attention_with_entropy(*tensors, causal=True, dropout=dropout)
        return found.output.square().sum() + found.entropy.square().sum()

    torch.manual_seed(0)
    expected = torch.autograd.grad(function(*inputs), inputs)
    torch.manual_seed(0)
    total = checkpoint(function, *inputs, use_reentrant=False)
    assert worst_error(list(torch.autograd.grad(total, inputs)), list(expected)) <= 1e-12


def test_second_derivative_is_refused_in_a_sentence_and_the_reference_has_it() -> None:
    inputs, _ = CASES[0].build(torch.float64)
    for implementation in ("blockwise", "reference"):
        entropy = attention_with_entropy(*inputs, implementation=implementation).entropy
        (first,) = torch.autograd.grad(entropy.sum(), inputs[0], create_graph=True)
        if implementation == "blockwise":
            with pytest.raises(NotImplementedError, match="differentiated twice"):
                torch.autograd.grad(first.sum(), inputs[0])
        else:
            assert torch.isfinite(torch.autograd.grad(first.sum(), inputs[0])[0]).all()


def test_torch_func() -> None:
    inputs, _ = CASES[0].build(torch.float64)
    query, key, value = (tensor.detach() for tensor in inputs)

    def entropy(query: torch.Tensor) -> torch.Tensor:
        return attention_with_entropy(query, key, value).entropy

    stacked = torch.func.vmap(entropy)(torch.stack([query, 2 * query]))
    torch.testing.assert_close(stacked[1], entropy(2 * query))
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda q: entropy(q).sum())(query)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(
            lambda sinks: attention_with_entropy(query, key, value, sinks=sinks)[1].sum()
        )(torch.zeros(query.shape[1], dtype=query.dtype))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="a dual tensor"):
        entropy(forward_ad.make_dual(query, query))


def test_nothing_is_saved_and_nothing_requires_a_gradient_when_none_is_wanted() -> None:
    inputs = [torch.randn(1, 2, 5, 4) for _ in range(3)]
    assert not any(tensor.requires_grad for tensor in attention_with_entropy(*inputs))
    inputs[0].requires_grad_()
    found = attention_with_entropy(*inputs)
    assert found.output.requires_grad
    assert found.entropy.requires_grad
    assert not found.max_score.requires_grad
