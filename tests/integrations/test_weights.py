"""Weights that a model makes by a softmax of its own: heard if they attend, or refused."""

import gc
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from entropy_regularization import record_entropy
from entropy_regularization.integrations.layouts import Layouts
from entropy_regularization.integrations.products import averages_values
from entropy_regularization.integrations.weights import heads_folded, weigh

SOFTMAX, METHOD = torch.softmax, Tensor.softmax


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    yield
    gc.collect()
    torch.zeros(1, 1).softmax(-1)  # the first call takes wrappers away that nobody needs
    assert torch.softmax is SOFTMAX
    assert Tensor.softmax is METHOD
    assert "softmax" not in vars(Tensor)


# The numbers


def entropy(weights: Tensor) -> Tensor:
    p = weights.double()
    return -(p * p.masked_fill(p == 0, 1.0).log()).sum(-1)


def masked(fill: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Scores of a causal mask, whose first row is masked whole."""
    scores = 3 * torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    allowed = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    return scores.to(dtype).masked_fill(~allowed, fill)


@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float64).min])
def test_gradients_of_masked_rows(fill: float) -> None:
    """A row of -inf alone is NaN to the softmax, and its gradient; one of large numbers is not."""
    allowed = torch.ones(5, 5, dtype=torch.bool).tril(0 if fill == -torch.inf else -1)

    def entropies(scores: Tensor) -> Tensor:
        scores = scores.masked_fill(~allowed, fill)
        return weigh(scores, scores.softmax(-1)).entropy

    scores = masked(0.0).requires_grad_()
    assert torch.autograd.gradcheck(entropies, scores)
    assert torch.autograd.gradgradcheck(entropies, scores)
    (gradient,) = torch.autograd.grad(entropies(scores).sum(), scores)
    assert torch.equal(gradient[:, :, 0], torch.zeros(2, 3, 5).double())


def test_gradients_of_weights_that_do_not_sum_to_one() -> None:
    weights = torch.rand(2, 3, 4, dtype=torch.float64).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: weigh(torch.zeros(2, 3, 4), w).entropy, weights)


def test_a_key_is_real_if_any_head_sees_it() -> None:
    scores = torch.zeros(2, 3, 4, 4)
    scores[0, :, :, 3] = scores[1, 0, :, 2] = -torch.inf
    real = [[True, True, True, False], [True] * 4]
    assert weigh(scores, scores.softmax(-1)).real_keys(1).tolist() == real
    folded = scores.flatten(0, 1)
    assert weigh(folded, folded.softmax(-1)).real_keys(3).tolist() == real


@pytest.mark.parametrize(
    ("equation", "at", "averages"),
    [
        ("bhij,bhjd->bhid", 0, True),
        ("bhjd,bhij->bhid", 1, True),
        ("b h i j, b j h d -> b i h d", 0, True),
        ("...ij,...jd->...id", 0, True),
        ("bhij,bhjd", 0, False),  # without an arrow the order is that of the alphabet
        ("bhij,bhid->bhjd", 0, False),
        ("bhij,bhjd->bhijd", 0, False),
        ("bhij,bhijd->bhid", 0, False),
        ("bhij,bhjd->bhd", 0, False),
        ("bihj,bhjd->bhid", 0, False),
        ("bhij,bjd->bhid", 0, True),
        ("bhij,hjd->bhid", 0, False),
        ("bhij,bhjd->bid", 0, False),
    ],
)
def test_equations_that_average_values(equation: str, at: int, averages: bool) -> None:
    pair = [torch.zeros(1), torch.zeros(1)]
    assert averages_values(torch.einsum, (equation, *pair), pair, pair[at]) is averages


@pytest.mark.parametrize("fill", [-torch.inf, -1e4, -1e9, torch.finfo(torch.float32).min])
def test_masked_keys_are_not_allowed(fill: float) -> None:
    scores = masked(fill, torch.float32)
    found = weigh(scores, scores.softmax(-1))
    no_key = 0 if fill < -1e30 else 5  # large numbers in a whole row mask nothing
    assert found.allowed_keys[0, 0].tolist() == [no_key, 1, 2, 3, 4]
    expected = entropy(scores.double().softmax(-1))
    torch.testing.assert_close(
        found.entropy[..., 1:].double(), expected[..., 1:], rtol=0, atol=1e-6
    )
    assert not found.entropy[..., 0].any() or no_key


def test_keys_that_are_far_behind_are_allowed() -> None:
    scores = torch.tensor([[[0.0, 0.0, -200.0, -4000.0]]])
    found = weigh(scores, scores.softmax(-1))
    assert found.allowed_keys.item() == 4
    assert found.entropy.item() == pytest.approx(torch.tensor(2.0).log().item())


def test_a_score_that_is_nan_makes_its_row_nan_and_no_other() -> None:
    scores = torch.zeros(1, 2, 3)
    scores[0, 1, 1] = torch.nan
    found = weigh(scores, scores.softmax(-1)).entropy
    assert found[0].isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.bfloat16, 2e-3), (torch.float16, 5e-4), (torch.float32, 2e-6)]
)
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_error_of_rounded_weights(dtype: torch.dtype, budget: float, spread: float) -> None:
    """That the weights of a row do not sum to 1 costs nothing: near uniform it would be 0.01."""
    scores = spread * torch.randn(1, 4, 50, 500, generator=torch.Generator().manual_seed(2))
    weights = scores.softmax(-1).to(dtype)
    assert not torch.equal(weights.double().sum(-1), torch.ones(1, 4, 50).double())
    expected = entropy(scores.double().softmax(-1))
    found = weigh(scores.to(dtype), weights).entropy
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < budget


def test_large_gradients_of_weights_that_are_zero_do_not_overflow() -> None:
    scores = torch.zeros(1, 1, 4, 4).masked_fill(torch.ones(4, 4).tril() == 0, -torch.inf)
    weights = scores.half().softmax(-1).requires_grad_()
    (gradient,) = torch.autograd.grad(3000 * weigh(scores.half(), weights).entropy.sum(), weights)
    assert gradient.isfinite().all()


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_properties_of_rows(queries: int, keys: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 5 * torch.randn(2, 2, queries, keys, generator=generator, dtype=torch.float64)

    def entropies(scores: Tensor) -> Tensor:
        return weigh(scores, scores.softmax(-1)).entropy

    found = entropies(scores)
    close = {"rtol": 0.0, "atol": 1e-12}
    assert (found >= -1e-12).all()
    assert (found <= torch.tensor(keys).log() + 1e-12).all()
    torch.testing.assert_close(entropies(scores + 100), found, **close)
    permuted = scores[..., torch.randperm(keys, generator=generator)]
    torch.testing.assert_close(entropies(permuted), found, **close)
    doubled = entropies(torch.cat([scores, scores], -1))
    torch.testing.assert_close(doubled, found + torch.tensor(2.0).double().log(), **close)
    assert (weigh(scores, scores.softmax(-1)).allowed_keys == keys).all()


# The models


class Attention(nn.Module):
    """Attends by hand, as minGPT, timm and lucidrains do, in one of several ways."""

    def __init__(self, way: str = "functional", heads: int = 4) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.count, self.way = heads, way
        self.softmax, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, self.count, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, -torch.inf)
        values: Tensor = getattr(self, self.way)(scores, v)
        return self.out(values.transpose(1, 2).flatten(2))

    def functional(self, scores: Tensor, v: Tensor) -> Tensor:
        weights = functional.softmax(scores, dim=-1, dtype=torch.float32).type_as(v)
        return self.dropout(weights) @ v

    def method(self, scores: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(self.dropout(scores.softmax(dim=-1)), v)

    def torch(self, scores: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("b h i j, b h j d -> b h i d", torch.softmax(scores, -1), v)

    def torch_by_keyword(self, scores: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("...jd,...ij->...id", v, torch.softmax(input=scores, dim=3))

    def by_position(self, scores: Tensor, v: Tensor) -> Tensor:
        return scores.softmax(-1, torch.float32) @ v

    def module(self, scores: Tensor, v: Tensor) -> Tensor:
        return torch.linalg.matmul(self.softmax(scores), v)

    def shared(self, scores: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhij,bjd->bhid", scores.softmax(-1), v[:, 0])

    def folded(self, scores: Tensor, v: Tensor) -> Tensor:
        weights = scores.softmax(-1).flatten(0, 1)
        return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (-1, self.count))

    def one_value(self, scores: Tensor, v: Tensor) -> Tensor:
        values = scores.softmax(-1).flatten(1, 2) @ v.mean(1)  # of all heads, as multi-query has
        return values.unflatten(1, (self.count, -1))

    def twice(self, scores: Tensor, v: Tensor) -> Tensor:
        weights = scores.softmax(-1)
        return weights @ v + weights @ v.roll(1, 2)


HEARD = [name for name in vars(Attention) if not name.startswith("_") and name != "forward"]


class Stack(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x)
        return x


@pytest.fixture
def x() -> Tensor:
    return 2 * torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


def by_hand(part: Attention, x: Tensor) -> Tensor:
    q, k, _ = part.project(x).unflatten(-1, (3, part.count, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    weights = scores.masked_fill(torch.ones(7, 7).tril() == 0, -torch.inf).softmax(-1)
    return -(weights * weights.clamp(min=1e-30).log()).sum(-1)


@pytest.mark.parametrize("way", HEARD)
def test_attention_by_hand_is_heard(way: str, x: Tensor) -> None:
    model = Stack(Attention(way), Attention(way))
    weight = model.parts[0].project.weight
    expected = by_hand(model.parts[0], x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), weight)
    torch.manual_seed(3)
    plain = model(x)
    for _ in range(2):  # the second pass is not watched
        torch.manual_seed(3)
        with record_entropy(model) as recording:
            output = model(x)
        assert torch.equal(output, plain)
        assert [layer.name for layer in recording] == ["parts.0", "parts.1"]
        found = recording[0]
        torch.testing.assert_close(found.entropy, expected, rtol=0, atol=2e-6)
        assert found.allowed_keys.unique(dim=1).flatten(0, 1)[0].tolist() == list(range(1, 8))
        assert (found.keys, found.kind, found.rows.all().item()) == (7, "self", True)
        (got,) = torch.autograd.grad(found.entropy.square().sum(), weight)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_batch_may_be_empty(x: Tensor) -> None:
    model = Stack(Attention(), Attention("folded"))
    for _ in range(2):
        with record_entropy(model) as recording:
            model(x[:0])
        assert [tuple(layer.entropy.shape) for layer in recording] == [(0, 4, 7)] * 2


def test_a_head_that_is_a_module_is_a_layer(x: Tensor) -> None:
    class Head(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.softmax(x @ x.mT, dim=-1) @ x

    model = Stack(Head(), Head())
    with record_entropy(model) as recording:
        model(x)
    assert [tuple(layer.entropy.shape) for layer in recording] == [(2, 1, 7)] * 2


def test_queries_keys_and_values_may_be_given_to_a_module_of_their_own(x: Tensor) -> None:
    class Scaled(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return functional.softmax(q @ k.mT, dim=-1) @ v

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (4, 4)).transpose(1, 2)
            return self.inner(q[:, :, :3], q, q).sum()

    model = Around()
    with record_entropy(model) as recording:
        model(x)
    assert (recording[0].name, tuple(recording[0].entropy.shape)) == ("inner", (2, 4, 3))


@pytest.mark.parametrize("gradient", [True, False])
def test_checkpoints(gradient: bool, x: Tensor) -> None:
    class Checkpointed(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = x + checkpoint(part, x, use_reentrant=False)
            return x

    model = Checkpointed(Attention(), Attention())
    for _ in range(2):
        torch.manual_seed(5)
        with record_entropy(model, gradient=gradient) as recording:
            loss = model(x).sum()
        loss = loss + sum(layer.entropy.sum() for layer in recording)
        found = torch.autograd.grad(loss, list(model.parameters()))
        torch.manual_seed(5)
        model.__class__ = Stack
        with record_entropy(model, gradient=gradient) as recording:
            loss = model(x).sum()
        loss = loss + sum(layer.entropy.sum() for layer in recording)
        for got, wanted in zip(
            found, torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(got, wanted)
        model.__class__ = Checkpointed


class Routed(Attention):
    """Has a softmax beside that of its attention: a router of experts."""

    def functional(self, scores: Tensor, v: Tensor) -> Tensor:
        y = super().functional(scores, v)
        shares = functional.softmax(y @ torch.ones(4, 3), dim=-1, dtype=torch.float32)
        return y * shares.amax(-1, keepdim=True)


class Experts(Attention):
    """Has a router whose shares meet the experts and the tokens in one product."""

    def functional(self, scores: Tensor, v: Tensor) -> Tensor:
        y = super().functional(scores, v)
        shares = functional.softmax(y @ nn.Parameter(torch.ones(4, 3)), dim=-1)
        return torch.einsum("bhle,edf,bhld->bhlf", shares, nn.Parameter(torch.ones(3, 4, 4)), y)


@pytest.mark.parametrize("kind", [Routed, Experts])
def test_a_softmax_beside_that_of_attention_is_not_recorded(
    kind: type[Attention], x: Tensor
) -> None:
    model = Stack(kind(), Attention())
    for _ in range(2):
        with record_entropy(model) as recording:
            model(x)
        assert [layer.name for layer in recording] == ["parts.0", "parts.1"]


def test_layers_are_chosen_by_their_number(x: Tensor) -> None:
    model = Stack(Routed(), Attention(), Attention())
    for _ in range(2):
        with record_entropy(model, layers=[1]) as recording:
            model(x)
        assert [layer.name for layer in recording] == ["parts.1"]


# What is refused


class Odd(Attention):
    """Its weights are not what a softmax makes, or not laid out as those of attention are."""

    def masked_after(self, scores: Tensor, v: Tensor) -> Tensor:
        return scores.softmax(-1).masked_fill(torch.ones(7, 7).tril(-1) == 0, 0.0) @ v

    def changed_in_place(self, scores: Tensor, v: Tensor) -> Tensor:
        weights = scores.detach().softmax(-1)
        weights[..., 0] = 0
        return weights @ v

    def scaled_in_place(self, scores: Tensor, v: Tensor) -> Tensor:
        return scores.detach().softmax(-1).mul_(torch.rand(7)) @ v

    def over_queries(self, scores: Tensor, v: Tensor) -> Tensor:
        return scores.clamp(min=-9).softmax(-2) @ v

    def of_no_scores(self, scores: Tensor, v: Tensor) -> Tensor:
        return v.softmax(-1) @ (v.mT @ v)  # linear attention

    def transposed(self, scores: Tensor, v: Tensor) -> Tensor:
        return scores.softmax(-1).transpose(-1, -2) @ v

    def from_the_right(self, scores: Tensor, v: Tensor) -> Tensor:
        return (v.mT @ scores.softmax(-1)).mT

    def by_a_matrix_and_a_vector(self, scores: Tensor, v: Tensor) -> Tensor:
        rows, values = scores.softmax(-1).flatten(0, -2), v.flatten(0, 1)
        found = [values[row // 7].mT.mv(weights) for row, weights in enumerate(rows)]
        return torch.stack(found).view_as(v)

    def and_a_projection(self, scores: Tensor, v: Tensor) -> Tensor:
        out = nn.Parameter(torch.eye(4))
        return torch.einsum("bhij,bhjd,de->bhie", scores.softmax(-1), v, out)

    def and_a_bias(self, scores: Tensor, v: Tensor) -> Tensor:
        weights, values = scores.softmax(-1).flatten(0, 1), v.flatten(0, 1)
        return torch.baddbmm(nn.Parameter(torch.zeros(4)), weights, values).view_as(v)

    def turned(self, scores: Tensor, v: Tensor) -> Tensor:
        return v.__rmatmul__(scores.softmax(-1))

    def positions_first(self, scores: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(scores.transpose(1, 2), -1)  # [batch, queries, heads, keys]
        return torch.einsum("bihj,bhjd->bhid", weights, v)

    def heads_first(self, scores: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(scores.transpose(0, 1)[:3], -1)  # [heads, batch, queries, keys]
        return (weights @ v.transpose(0, 1)[:3]).transpose(0, 1).repeat(1, 2, 1, 1)[:, :4]

    def heads_first_of_as_many(self, scores: Tensor, v: Tensor) -> Tensor:
        scores, v = scores[:, :2], v[:, :2]  # as the batch
        values = scores.transpose(0, 1).softmax(-1) @ v.transpose(0, 1)
        return values.transpose(0, 1).repeat(1, 2, 1, 1)

    def of_as_many_heads_as_places(self, scores: Tensor, v: Tensor) -> Tensor:
        weights = scores[:, :, :4].softmax(-1) @ v[:, :1]  # queries first, for all that is known
        return weights.repeat(1, 1, 2, 1)[:, :, :7]

    def by_a_name_from_before(self, scores: Tensor, v: Tensor) -> Tensor:
        return METHOD(scores, -1) @ v

    def folded_before(self, scores: Tensor, v: Tensor) -> Tensor:
        weights = scores.transpose(0, 1).flatten(0, 1).softmax(-1)  # [heads * batch, ...]
        values = torch.bmm(weights, v.transpose(0, 1).flatten(0, 1))
        return values.unflatten(0, (self.count, -1)).transpose(0, 1)

    def grouped(self, scores: Tensor, v: Tensor) -> Tensor:
        weights = scores.unflatten(1, (2, 2)).softmax(-1)
        return (weights @ v.unflatten(1, (2, 2))).flatten(1, 2)

    def grouped_queries(self, scores: Tensor, v: Tensor) -> Tensor:
        weights = scores.unflatten(1, (2, 2)).flatten(2, 3).softmax(-1)  # two heads, one key
        return (weights @ v[:, ::2]).unflatten(2, (2, 7)).flatten(1, 2)

    def near_by(self, scores: Tensor, v: Tensor) -> Tensor:
        near = v.transpose(1, 2)[:, :, :, None] @ v.transpose(1, 2)[:, :, None].mT.expand(
            -1, -1, 4, -1, -1
        )
        weights = near.flatten(2, 3).softmax(-1)  # [batch, places, rows, near keys]
        return (weights @ v.transpose(1, 2)).transpose(1, 2)

    def noisy(self, scores: Tensor, v: Tensor) -> Tensor:
        return functional.gumbel_softmax(scores.clamp(min=-9), dim=-1) @ v

    def compiled(self, scores: Tensor, v: Tensor) -> Tensor:
        attend = torch.compile(lambda scores, v: scores.softmax(-1) @ v, backend="eager")
        return attend(scores, v)

    def in_a_function(self, scores: Tensor, v: Tensor) -> Tensor:
        return Detached.apply(scores) @ v

    def of_a_part(self, scores: Tensor, v: Tensor) -> Tensor:
        return scores.softmax(-1)[..., :5] @ v[..., :5, :]

    def of_weights(self, scores: Tensor, v: Tensor) -> Tensor:
        return (scores.softmax(-1) @ scores.clamp(min=-9).softmax(-1)) @ v


def test_heads_that_a_module_folds_are_not_known_by_their_number(x: Tensor) -> None:
    model = Stack(Odd("folded_before"))
    model.parts[0].num_heads = 4
    with pytest.raises(ValueError, match=r"parts\.0 computes a"), record_entropy(model):
        model(x)


class Annotated(Attention):
    """Gives the names of its arguments to its queries, as the Annotated Transformer does."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:  # type: ignore[override]
        shape = (len(query), -1, self.count, 4)
        query, key = (self.out(each).view(shape).transpose(1, 2) for each in (query, key))
        return functional.softmax(query @ key.mT, dim=-1) @ key


class Concatenated(Attention):
    """Puts its heads one behind the other in the batch, as the Set Transformer does."""

    def forward(self, query: Tensor) -> Tensor:
        query = torch.cat(self.out(query).split(4, 2))
        return functional.softmax(query @ query.mT, dim=-1) @ query


def test_a_module_may_give_the_names_of_its_arguments_to_other_tensors(x: Tensor) -> None:
    model = Annotated()
    with record_entropy(model) as recording:
        model(x, x[:, :5])
    assert (tuple(recording[0].entropy.shape), recording[0].keys) == ((2, 4, 7), 5)
    other = Concatenated()
    with pytest.raises(ValueError, match="Concatenated computes a"), record_entropy(other):
        other(x)


def test_sizes_that_happen_to_be_equal_later_are_no_other_layout(x: Tensor) -> None:
    """Heads are known from a pass of other sizes: of keys, batch and queries."""
    model = Annotated()
    with record_entropy(model):
        model(key=x[:, :5], query=x)
    for batch, queries, keys in ((2, 5, 4), (4, 4, 7), (4, 6, 1), (4, 4, 4), (2, 6, 3)):
        several = x[:1].repeat(batch, 1, 1)
        with record_entropy(model) as recording:
            model(key=several[:, :keys], query=several[:, :queries])
        assert recording[0].entropy.shape == (batch, 4, queries)


class Steps(Attention):
    """Attends with one query after the other, as decoders of recurrent networks do."""

    def forward(self, x: Tensor) -> Tensor:
        keys = self.out(x)
        weights = (functional.softmax(keys[:, [step]] @ keys.mT, dim=-1) for step in range(3))
        return torch.cat([each @ keys for each in weights], dim=1)


def test_steps_of_a_batch_of_one(x: Tensor) -> None:
    model = Steps()
    for batch in (2, 1, 1, 2):
        with record_entropy(model) as recording:
            model(x[:batch])
        assert [tuple(layer.entropy.shape) for layer in recording] == [(batch, 1, 1)] * 3


class OfRows(Attention):
    """Folds the rows of an image into the batch, and attends along their columns."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1))


class OfAll(Attention):
    """Attends from every place of an image to every other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(2).mT)


@pytest.mark.parametrize(("kind", "shape"), [(OfRows, (2, 4, 7, 16)), (OfAll, (2, 16, 4, 4))])
def test_heads_may_be_as_many_as_rows(kind: type[Attention], shape: tuple[int, ...]) -> None:
    model = kind("method")
    with record_entropy(model) as recording:
        model(torch.randn(shape))
    queries = 7 if kind is OfRows else 16
    assert recording[0].entropy.shape[1:] == (4, queries)


class InDict(Attention):
    """Takes its input from a dictionary, and puts its heads first."""

    def forward(self, given: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        q = self.out(given["x"]).unflatten(-1, (4, 4)).permute(2, 0, 1, 3)
        return functional.softmax(q @ q.mT, dim=-1) @ q


def test_the_batch_of_a_dictionary_is_known(x: Tensor) -> None:
    model = InDict()
    with pytest.raises(ValueError, match="InDict computes a"), record_entropy(model):
        model({"x": x})


class Inner(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.softmax(q @ k.mT, dim=-1) @ v


class Around(Attention):
    """Makes heads, and gives them to a module that is a function of them, in one of two ways."""

    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        q = getattr(self, self.way)(self.out(x).unflatten(-1, (4, 4)))
        return self.inner(q, q, q)

    def first(self, q: Tensor) -> Tensor:
        return q.permute(2, 0, 1, 3)

    def first_in_batch(self, q: Tensor) -> Tensor:
        return self.first(q).flatten(0, 1)

    def in_batch(self, q: Tensor) -> Tensor:
        return q.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("way", ["first", "first_in_batch", "in_batch"])
def test_heads_that_the_module_around_puts_before_the_batch_are_refused(
    way: str, x: Tensor
) -> None:
    model = Around(way)
    with pytest.raises(ValueError, match="inner computes a softmax"), record_entropy(model):
        model(x)


class Rows(Attention):
    """Attends along the columns of every row."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.out(x)
        return functional.softmax(q @ q.mT, dim=-1) @ q


class OneKey(Attention):
    """Has one key for all heads, whose queries follow each other."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.out(x).unflatten(-1, (4, 4))
        k = q[:, :, 0]
        return functional.softmax(q.flatten(1, 2) @ k.mT, dim=-1) @ k


def test_rows_of_an_image_are_not_taken_for_heads_nor_heads_for_queries(x: Tensor) -> None:
    for model, images in ((Rows(), x[:, None].repeat(1, 7, 1, 1)), (OneKey(), x)):
        name = type(model).__name__
        with pytest.raises(ValueError, match=f"{name} computes a"), record_entropy(model):
            model(images)


def test_the_number_of_heads_that_a_module_tells_must_be_that_of_its_weights(x: Tensor) -> None:
    model = Stack(Attention(), Attention())
    model.parts[0].num_heads, model.parts[1].num_heads = 4, 8
    with pytest.raises(ValueError, match=r"recorded: parts\.1 computes a"), record_entropy(model):
        model(x)


class AsMany(nn.Module):
    """Has as many heads as there are batch entries, and lays them out in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.all = (nn.Linear(16, n) for n in (16, 16, 16, 48))
        self.own = nn.ModuleList(nn.Linear(16, 4) for _ in range(4))
        self.norm, self.convolution, self.way = nn.LayerNorm(4), nn.Conv2d(16, 48, 1), way
        self.cache = torch.zeros(4, 9, 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(self, self.way)(x)
        return y.mean() + x

    def heads(self, x: Tensor) -> list[Tensor]:
        each = (project(x).view(4, 7, 4, 4) for project in (self.q, self.k, self.v))
        return [one.transpose(1, 2) for one in each]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 2).softmax(-1) @ v


class BatchFirst(AsMany):
    """As models are written most often."""

    def parts(self, x: Tensor) -> Tensor:  # minGPT
        parts = (part.view(4, 7, 4, 4) for part in self.all(x).split(16, 2))
        return self.attend(*(part.transpose(1, 2) for part in parts))

    def at_once(self, x: Tensor) -> Tensor:  # timm
        q, k, v = self.all(x).reshape(4, 7, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(self.norm(q) * 0.5, self.norm(k), v)

    def interleaved(self, x: Tensor) -> Tensor:  # bloom
        parts = self.all(x).view(4, 7, 4, 3, 4)
        return self.attend(*(parts[..., i, :].transpose(1, 2) for i in range(3)))

    def copied(self, x: Tensor) -> Tensor:
        return self.attend(*(each.contiguous() for each in self.heads(x)))

    def rotated(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = (
            each.cos() * each + torch.cat((-each[..., 2:], each[..., :2]), -1) for each in (q, k)
        )
        return self.attend(q, k, v)

    def rotated_in_pairs(self, x: Tensor) -> Tensor:
        q, k, v = (each.transpose(1, 2) for each in self.heads(x))
        q, k = (torch.stack((-e[..., 1::2], e[..., ::2]), -1).flatten(-2) for e in (q, k))
        return self.attend(*(each.transpose(1, 2) for each in (q, k, v)))

    def rotated_as_complex(self, x: Tensor) -> Tensor:  # llama
        q, k, v = (each.transpose(1, 2) for each in self.heads(x))
        pairs = (torch.view_as_complex(e.reshape(4, 7, 4, 2, 2)) * torch.ones(2) for e in (q, k))
        q, k = (torch.view_as_real(each).flatten(3) for each in pairs)
        return self.attend(*(each.transpose(1, 2) for each in (q, k, v)))

    def grouped(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        past = torch.zeros(4, 2, 3, 4)
        k, v = (torch.cat((past, e[:, :2]), 2).repeat_interleave(2, dim=1) for e in (k, v))
        return self.attend(q.contiguous(), k, v)

    def expanded(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        wide = (each[:, :2, None].expand(-1, -1, 2, -1, -1) for each in (k, v))
        return self.attend(q, *(each.reshape(4, 4, 7, 4) for each in wide))

    def cached(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        self.cache[:, :7] = k[:, :2].detach().transpose(1, 2)
        k = self.cache[:, :7].repeat_interleave(2, 2).transpose(1, 2)
        return self.attend(q, k, v)

    def one_key(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.attend(q, k[:, :1], v[:, :1])

    def einsum(self, x: Tensor) -> Tensor:
        q, k, v = (each.transpose(1, 2) for each in self.heads(x))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, v)

    def einsum_with_dots(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = torch.einsum("... i d, ... j d -> ... i j", q, k).softmax(-1)
        return torch.einsum("...ij,...jd->...id", weights, v)

    def folded(self, x: Tensor) -> Tensor:
        q, k, v = (each.reshape(16, 7, 4) for each in self.heads(x))
        weights = torch.bmm(q, k.mT).view(4, 4, 7, 7).softmax(-1)
        return torch.bmm(weights.view(16, 7, 7), v)

    def biased(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.mT + torch.zeros(1, 4, 1, 7) + torch.zeros(4, 1, 7, 7)
        return functional.dropout(functional.softmax(scores, dim=-1), 0.1) @ v

    def convolved(self, x: Tensor) -> Tensor:
        parts = self.convolution(x.mT[:, :, None]).chunk(3, 1)
        q, k, v = (part.reshape(4, 4, 4, 7) for part in parts)
        weights = torch.einsum("bhdi,bhdj->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bhdj->bhid", weights, v)


class HeadsFirst(AsMany):
    """Its heads come before the batch."""

    def viewed(self, x: Tensor) -> Tensor:
        return self.attend(*(each.transpose(0, 1) for each in self.heads(x)))

    def copied(self, x: Tensor) -> Tensor:
        return self.attend(*(each.transpose(0, 1).contiguous() for each in self.heads(x)))

    def copied_twice(self, x: Tensor) -> Tensor:
        each = (one.contiguous().movedim(1, 0).contiguous() for one in self.heads(x))
        return self.attend(*each)

    def permuted(self, x: Tensor) -> Tensor:
        each = (project(x).view(4, 7, 4, 4) for project in (self.q, self.k, self.v))
        return self.attend(*(one.permute(2, 0, 1, 3).reshape(4, 4, 7, 4) for one in each))

    def later(self, x: Tensor) -> Tensor:
        q, k, v = (each.contiguous() for each in self.heads(x))
        return (q @ k.mT).transpose(0, 1).softmax(-1) @ v.transpose(0, 1)

    def einsum(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = torch.einsum("bhid,bhjd->hbij", q, k).softmax(-1)
        return torch.einsum("hbij,bhjd->bhid", weights, v)

    def folded(self, x: Tensor) -> Tensor:
        q, k, v = (each.transpose(0, 1).contiguous() for each in self.heads(x))
        return torch.bmm((q @ k.mT).softmax(-1).flatten(0, 1), v.flatten(0, 1))

    def places_before_the_batch(self, x: Tensor) -> Tensor:
        each = (project(x.transpose(0, 1)).view(7, 4, 4, 4) for project in (self.q, self.k, self.v))
        turned = (one.permute(2, 0, 1, 3).contiguous() for one in each)  # [heads, places, batch, 4]
        return self.attend(*(one.transpose(1, 2) for one in turned))


class Untold(AsMany):
    """Its heads come before the batch, and nothing tells it."""

    def stacked(self, x: Tensor) -> Tensor:
        return self.attend(*[torch.stack([project(x) for project in self.own])] * 3)

    def stacked_places(self, x: Tensor) -> Tensor:
        each = torch.stack([project(x.transpose(0, 1)) for project in self.own])
        return self.attend(*[each.transpose(1, 2)] * 3)

    def stacked_again(self, x: Tensor) -> Tensor:
        return self.attend(*(torch.stack(each.unbind(1)) for each in self.heads(x)))

    def concatenated(self, x: Tensor) -> Tensor:
        each = (torch.cat(project(x).chunk(4, -1)) for project in (self.q, self.k, self.v))
        return self.attend(*(one.view(4, 4, 7, 4) for one in each))

    def multiplied(self, x: Tensor) -> Tensor:
        weight = torch.stack([project.weight for project in self.own]).mT
        each = (x.transpose(0, 1).reshape(1, 28, 16) @ weight).view(4, 7, 4, 4).transpose(1, 2)
        return self.attend(each, each, each)

    def turned_in_place(self, x: Tensor) -> Tensor:
        each = (one.clone().transpose_(0, 1).contiguous() for one in self.heads(x))
        return self.attend(*each)

    def at_once(self, x: Tensor) -> Tensor:
        parts = self.all(x).view(4, 7, 3, 4, 4).permute(2, 3, 0, 1, 4).contiguous()
        return self.attend(*parts)


def ways(kind: type[nn.Module]) -> list[Any]:
    names = [name for name in vars(kind) if not name.startswith("_")]
    return [pytest.param(kind, name, id=f"{kind.__name__}-{name}") for name in names]


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(("kind", "way"), ways(BatchFirst))
def test_as_many_heads_as_batch_entries_are_heard(
    kind: type[AsMany], way: str, gradient: bool, x: Tensor
) -> None:
    model = kind(way)
    with torch.set_grad_enabled(gradient), record_entropy(model) as recording:
        model(x.repeat(2, 1, 1))
    assert len(recording) == 1


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(("kind", "way"), [*ways(HeadsFirst), *ways(Untold)])
def test_heads_before_as_many_batch_entries_are_refused(
    kind: type[AsMany], way: str, gradient: bool, x: Tensor
) -> None:
    model = kind(way)
    message = f"{kind.__name__} computes a softmax of its own"
    if kind is Untold:
        message += ", over as many heads as batch entries, and nothing tells which of them come "
        message += r"first \(record a pass of another batch size before\)"
    with (
        torch.set_grad_enabled(gradient),
        pytest.raises(ValueError, match=message),
        record_entropy(model),
    ):
        model(x.repeat(2, 1, 1))


def test_heads_are_told_from_as_many_batch_entries_by_an_earlier_pass(x: Tensor) -> None:
    class Stacked(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q = torch.stack(self.out(x).chunk(4, 2), 1)
            return functional.softmax(q @ q.mT, dim=-1) @ q

    model = Stacked()
    several = x.repeat(2, 1, 1)
    with pytest.raises(ValueError, match="another batch size"), record_entropy(model):
        model(several)
    for batch in (2, 4):
        with record_entropy(model) as recording:
            model(several[:batch])
        assert recording[0].entropy.shape == (batch, 4, 7)


class Detached(torch.autograd.Function):
    """A softmax without a graph inside, as sew-d has."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


ODD = [name for name in vars(Odd) if not name.startswith("_")]


@pytest.mark.parametrize("way", ODD)
@pytest.mark.parametrize("among_others", [True, False])
def test_what_is_not_attention_as_it_is_written_most_often_is_refused(
    way: str, among_others: bool, x: Tensor
) -> None:
    model = Stack(Attention(), Odd(way)) if among_others else Stack(Odd(way))
    name = "parts.1" if among_others else "parts.0"
    with pytest.raises(ValueError, match=f"{name} computes a"), record_entropy(model):
        model(x)
    if among_others:
        for _ in range(2):
            with record_entropy(model, allow_partial=True) as recording:
                model(x)
            assert [layer.name for layer in recording] == ["parts.0"]
            assert recording.missing == ["parts.1"]


class HalfHeard(Attention):
    """Its weights meet the values, and something else after that."""

    def functional(self, scores: Tensor, v: Tensor) -> Tensor:
        weights = scores.softmax(-1)
        return weights @ v + weights.mT @ v


def test_a_module_that_is_half_heard_is_left_out_whole(x: Tensor) -> None:
    model = Stack(HalfHeard(), Attention())
    with pytest.raises(ValueError, match=r"parts\.0 computes a softmax"), record_entropy(model):
        model(x)
    with record_entropy(model, allow_partial=True) as recording:
        model(x)
    assert ([layer.name for layer in recording], recording.missing) == (["parts.1"], ["parts.0"])
    for partial in (False, True):
        part = HalfHeard()
        with (
            pytest.raises(ValueError, match="HalfHeard computes a softmax"),
            record_entropy(part, allow_partial=partial),
        ):
            part(x)


class Twofold(nn.Module):
    """Calls one softmax in one place for its attention and for something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x @ x.mT) @ x + self.weights(x)

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


def test_a_softmax_that_serves_two_ends_is_refused(x: Tensor) -> None:
    message = "parts.0 takes one softmax for attention and for other things"
    model = Stack(Twofold())
    with pytest.raises(ValueError, match=message), record_entropy(model):
        model(x)


class Two(Attention):
    """Attends twice, and multiplies the weights that it has made first in one of two orders."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.out(x)
        first, second = torch.softmax(q @ q.mT, -1), torch.softmax(q @ x.mT, -1)
        pairs = [(first, q), (second, x)]
        if self.way == "turned":
            pairs.reverse()
        return sum(weights @ values for weights, values in pairs)


def test_weights_that_attend_in_another_order_than_they_are_made_are_refused(x: Tensor) -> None:
    model = Two("straight")
    with record_entropy(model) as watched:
        model(x)
    with record_entropy(model) as recording:
        model(x)
    for got, wanted in zip(recording, watched, strict=True):
        assert torch.equal(got.entropy, wanted.entropy)
    model.way = "turned"
    with pytest.raises(ValueError, match="Two computes a softmax"), record_entropy(model):
        model(x)


def test_a_hook_that_changes_weights_is_met_in_a_pass_after_others(x: Tensor) -> None:
    model = Stack(Attention("method"), Attention("module"))
    with record_entropy(model):
        model(x)
    for part in (model.parts[0].dropout, model.parts[1].softmax):
        hook = part.register_forward_hook(lambda part, given, weights: weights / 2)
        with pytest.raises(ValueError, match="computes a softmax"), record_entropy(model):
            model(x)
        hook.remove()
    with record_entropy(model) as recording:
        model(x)
    assert len(recording) == 2


class InThread(Stack):
    """Runs its last part in a thread."""

    def forward(self, x: Tensor) -> Tensor:
        made: list[Tensor] = []
        thread = threading.Thread(target=lambda: made.append(self.parts[-1](x)))
        thread.start()
        thread.join()
        return made[0] + self.parts[0](x)


def test_a_softmax_in_a_thread_is_refused(x: Tensor) -> None:
    model = InThread(Attention(), Attention())
    for _ in range(2):
        message = r"parts\.1 takes a softmax in a thread of its own"
        with pytest.raises(ValueError, match=message), record_entropy(model):
            model(x)


class Late(Stack):
    """Leaves its second part out of the first pass, as layer dropout may."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x) if self.passes > 1 else x + self.parts[0](x)


class Other(Attention):
    """An attention of another class."""


def test_a_layer_that_was_dropped_when_the_pass_was_watched_is_known_by_its_class(
    x: Tensor,
) -> None:
    model = Late(Attention(), Attention())
    for layers in (1, 2):
        with record_entropy(model) as recording:
            model(x)
        assert len(recording) == layers


def test_a_softmax_of_which_nothing_is_known_is_refused_and_then_known(x: Tensor) -> None:
    model = Late(Attention(), Other())
    with record_entropy(model):
        model(x)
    message = r"parts.1 takes a softmax that earlier passes did not \(run the pass again\)"
    with pytest.raises(ValueError, match=message), record_entropy(model):
        model(x)
    with record_entropy(model) as recording:
        model(x)
    assert len(recording) == 2


def test_weights_that_are_laid_out_otherwise_in_a_later_pass_are_refused(x: Tensor) -> None:
    class Folding(Attention):
        def functional(self, scores: Tensor, v: Tensor) -> Tensor:
            if scores.shape[0] == 2:
                return super().functional(scores, v)
            return super().functional(scores[None], v[None])[0]

    model = Stack(Attention("method"), Folding())
    with record_entropy(model):
        model(x)
    message = "parts.1 lays its weights out otherwise than in earlier passes"
    with pytest.raises(ValueError, match=message), record_entropy(model):
        model(x[:1])
    with record_entropy(model, allow_partial=True) as recording:
        model(x[:1])
    assert recording.missing == ["parts.1"]


def test_vmap_is_refused(x: Tensor) -> None:
    model = Stack(Direct())
    with pytest.raises(ValueError, match=r"parts\.0 computes a softmax"), record_entropy(model):
        torch.vmap(model)(x[:, None])


def test_a_compiled_model_is_refused(x: Tensor) -> None:
    torch._dynamo.reset()
    model = torch.compile(Stack(Direct()), backend="eager")
    with pytest.raises(ValueError, match=r"\(parts\.0 computes a softmax"), record_entropy(model):
        model(x)


class Direct(nn.Module):
    """Attends in its forward, where a compiled model is read."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.mT, dim=-1) @ x


def test_other_models_compile_and_run_as_ever_while_one_is_recorded(x: Tensor) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = Stack(Direct(), Attention("method")).eval()
    other = torch.compile(model, backend=counter, fullgraph=True)
    plain = other(x)
    with record_entropy(Stack(Attention())) as recording:
        torch.testing.assert_close(other(x), plain)
    assert not recording.layers
    torch.testing.assert_close(other(x), plain)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("ranks", [False, True])
def test_heads_that_a_module_tells_are_enough_over_several_processes_too(
    ranks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entropy_regularization.integrations.weights.has_ranks", lambda: ranks)
    module = nn.Identity()
    module.num_heads = 4
    weights, given = torch.zeros(2, 4, 8, 3), (2, 4, 16)  # sizes alone do not tell them
    assert heads_folded(weights, module, given) == 1
    module.num_heads = 8
    assert heads_folded(weights, module, given) is None
    assert heads_folded(weights[:, :2], module, (2, 8, 16)) == (1 if ranks else None)


def test_dimensions_of_heads_that_contradict_each_other_tell_nothing() -> None:
    layouts = Layouts()
    tokens = torch.randn(4, 6, 32)
    split = tokens.view(4, 6, 4, 8)
    second, first = split.transpose(1, 2), split.permute(2, 0, 1, 3)
    both = second + first
    layouts.follow(Tensor.view, (tokens, 4, 6, 4, 8), {}, split)
    layouts.follow(Tensor.transpose, (split, 1, 2), {}, second)
    layouts.follow(Tensor.permute, (split, 2, 0, 1, 3), {}, first)
    layouts.follow(torch.add, (second, first), {}, both)
    assert [layouts.heads_of(each) for each in (split, second, first, both)] == [2, 1, 0, None]
