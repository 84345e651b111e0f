"""torch.compile, opcheck, autocast, checkpointing, and what is refused."""

import shutil

import pytest
import torch
from cases import CASES, gradients, worst_error
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from entropy_regularization import attention_with_entropy
from entropy_regularization.attention.operators import blockwise_backward, blockwise_forward

EVERYTHING = next(case for case in CASES if case.name == "everything")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_opcheck(dtype: torch.dtype, dropout: float) -> None:
    inputs, options = EVERYTHING.build(dtype)
    query, key, value, bias, sinks = inputs
    masks = options["allowed"], options["key_padding"], options["document"]
    seed = torch.tensor([7]) if dropout else None
    arguments = (query, key, value, *masks, bias, sinks, seed, 6, 0, 0.3, 3.0, dropout, False)
    opcheck(blockwise_forward, arguments)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    output, entropy, *_, log2_normalizer = blockwise_forward(*detached)
    saved, upstream = (output, entropy, log2_normalizer), (output, entropy, entropy)
    for wanted in ([True] * 5, [False, True, False, False, True]):
        opcheck(
            blockwise_backward,
            (*detached, *saved, *upstream, wanted),
            test_utils=("test_schema", "test_faketensor"),
        )


COMPILED = (
    "causal-left-padding", "documents-causal", "dense-per-key", "bias-alibi",
    "softcap-bias-padding", "sinks-window-padding", "grouped-query", "everything",
)  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compile_fullgraph(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    inputs, options = case.build(torch.float64)
    compiled = torch.compile(
        lambda *tensors: tuple(case.run(list(tensors), options, "auto")),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = case.run(inputs, options, "reference")
    got = type(expected)(*compiled(*inputs))
    assert worst_error(list(got), list(expected)) <= 1e-12
    assert worst_error(gradients(got, inputs), gradients(expected, inputs)) <= 1e-12


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a compiler")
def test_compile_with_inductor_and_dropout() -> None:
    inputs, options = EVERYTHING.build(torch.float32)
    results = []
    for run in (EVERYTHING.run, torch.compile(EVERYTHING.run, fullgraph=True)):
        torch.manual_seed(0)
        results.append(run(inputs, {**options, "dropout": 0.3}, "blockwise"))
    eager, compiled = results
    assert worst_error([compiled.entropy], [eager.entropy]) <= 1e-6
    # Inductor draws other numbers, but the same in both passes: the output is linear in the value.
    weight = torch.randn(compiled.output.shape, generator=torch.Generator().manual_seed(0))
    total = (weight * compiled.output).sum()
    (by_value,) = torch.autograd.grad(total, inputs[2])
    torch.testing.assert_close((by_value * inputs[2]).sum(), total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["causal", "document", "key_padding"])
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_compile_is_one_graph_for_every_length(kind: str, implementation: str) -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        calls.append(graph)
        return graph

    def run(query: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, ...]:
        masks = {"document": place // 7, "key_padding": place > 2}
        options = {"causal": True, "implementation": implementation}
        options |= {kind: masks[kind]} if kind in masks else {}
        found = attention_with_entropy(query, query, query, **options)
        return found.entropy, found.allowed_keys

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for n in range(20, 90, 7):
        arguments = torch.randn(1, 2, n, 4), torch.arange(n)[None]
        assert all(map(torch.equal, compiled(*arguments), run(*arguments)))
    assert len(calls) == 1


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


def test_transforms_of_what_attention_does_not_depend_on() -> None:
    """A frozen encoder, and a head that is differentiated."""
    query = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def loss(weight: torch.Tensor) -> torch.Tensor:
        found = attention_with_entropy(query, query, query, causal=True)
        return (found.output * weight).sum()

    expected = attention_with_entropy(query, query, query, causal=True).output.sum((0, 1, 2))
    weight = torch.ones(4)
    for transform in (torch.func.grad, torch.func.jacrev):
        torch.testing.assert_close(transform(loss)(weight), expected)
    torch.testing.assert_close(torch.func.vjp(loss, weight)[0], expected.sum())


def test_the_compiler_does_not_trace_into_an_operator() -> None:
    """Not even where a break of the graph leaves its call to Python."""

    class Breaking(torch.nn.Module):
        def forward(self, query: torch.Tensor) -> torch.Tensor:
            for _ in range(2):  # a break in a loop: the whole frame is left
                torch._dynamo.graph_break()
                options = (*[None] * 7, 0, 0.5, None, 0.0, False)
                query = query + blockwise_forward(query, query, query, *options)[0]
            return query.sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    query = torch.randn(1, 2, 5, 4, requires_grad=True)
    expected = torch.autograd.grad(Breaking()(query), query)
    compiled = torch.compile(Breaking(), backend="eager")
    assert torch.equal(torch.autograd.grad(compiled(query), query)[0], expected[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


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


def test_vmap_over_gradients() -> None:
    inputs, _ = CASES[0].build(torch.float64)
    entropy = attention_with_entropy(*inputs, causal=True, implementation="blockwise").entropy
    directions = torch.randn(3, *entropy.shape, dtype=torch.float64)

    def derivative(direction: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(entropy, inputs[0], direction, retain_graph=True)[0]

    expected = torch.stack([derivative(direction) for direction in directions])
    assert worst_error([torch.func.vmap(derivative)(directions)], [expected]) <= 1e-14
    with pytest.raises(ValueError, match="a dimension of size 0"):
        torch.func.vmap(derivative)(directions[:0])


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
