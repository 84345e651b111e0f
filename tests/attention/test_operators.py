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


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_autocast_does_not_round_the_scores(implementation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [
        (8 * torch.randn(1, 2, 16, 8, generator=generator)).requires_grad_() for _ in range(3)
    ]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = attention_with_entropy(*inputs, implementation=implementation)
        results.append([*found[:4], *gradients(found, inputs)])
    assert all(map(torch.equal, *results))


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
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda q: torch.func.vmap(entropy)(q).sum())(torch.stack([query, query]))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="a dual tensor"):
        entropy(forward_ad.make_dual(query, query))
    compiled = torch.compile(
        lambda q: torch.func.jvp(entropy, (q,), (q,)), fullgraph=True, backend="eager"
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="in forward-mode differentiation"):
        compiled(query)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("mapped", ["key_padding", "document", "allowed", "bias"])
def test_vmap_over_anything_and_its_gradient(implementation: str, mapped: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, _ = CASES[0].build(torch.float64)
    choice = torch.randint(0, 2, (3, 2, 1, 9, 9), generator=generator)
    given = {
        "key_padding": choice[:, :, 0, 0] > 0,
        "document": choice[:, :, 0, 0],
        "allowed": choice > 0,
        "bias": choice.double(),
    }[mapped]

    def function(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        options = {"causal": True, "implementation": implementation, mapped: tensor}
        return tuple(attention_with_entropy(*inputs, **options))

    found = torch.func.vmap(function)(given)
    expected = [torch.stack(parts) for parts in zip(*map(function, given), strict=True)]
    assert worst_error(list(found), expected) <= 1e-14
    weight = torch.randn(found[1].shape, generator=generator, dtype=torch.float64)
    derivatives = [
        list(torch.autograd.grad(entropy, inputs[:2], weight))
        for entropy in (found[1], expected[1])
    ]
    assert worst_error(*derivatives) <= 1e-14


def test_batched_gradients_are_refused_in_a_sentence_and_the_reference_has_them() -> None:
    inputs, _ = CASES[0].build(torch.float64)
    for implementation in ("blockwise", "reference"):
        entropy = attention_with_entropy(*inputs, implementation=implementation).entropy
        directions = torch.ones(2, *entropy.shape, dtype=torch.float64)
        if implementation == "blockwise":
            with pytest.raises(NotImplementedError, match="is_grads_batched=True"):
                torch.autograd.grad(entropy, inputs[0], directions, is_grads_batched=True)
        else:
            torch.autograd.grad(entropy, inputs[0], directions, is_grads_batched=True)


def test_nothing_is_saved_and_nothing_requires_a_gradient_when_none_is_wanted() -> None:
    inputs = [torch.randn(1, 2, 5, 4) for _ in range(3)]
    assert not any(tensor.requires_grad for tensor in attention_with_entropy(*inputs))
    inputs[0].requires_grad_()
    found = attention_with_entropy(*inputs)
    assert found.output.requires_grad
    assert found.entropy.requires_grad
    assert not found.max_score.requires_grad
