"""Any PyTorch model that calls scaled_dot_product_attention: entropies, gradients, refusals."""

import contextlib
import copy
import functools
import gc
import io
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional
from torch.nn.attention import flex_attention
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from entropy_regularization import (
    EntropyRegularization,
    attention_with_entropy,
    record_entropy,
)
from entropy_regularization.attention.api import observers
from entropy_regularization.integrations import interception, watch
from entropy_regularization.integrations.sdpa import SdpaRecorder
from entropy_regularization.integrations.source import attends_by_source
from entropy_regularization.recording.recorder import Layers, make_recorder

ORIGINAL = functional.scaled_dot_product_attention
MULTI_HEAD = functional.multi_head_attention_forward


class SelfAttention(nn.Module):
    """As nanoGPT and timm write it: one projection, then the fused function."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.project(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        return q, k, v


class Stack(nn.Module):
    def __init__(self, causal: bool = True, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SelfAttention(16, 4, causal) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture(autouse=True)
def nothing_is_left_of_other_tests() -> None:
    gc.collect()  # a dropped model may still wait for its backward
    functional.scaled_dot_product_attention(*torch.zeros(3, 1, 1, 1))
    assert is_restored()


def is_restored() -> bool:
    return functional.scaled_dot_product_attention is ORIGINAL


def by_hand(q: Tensor, k: Tensor, allowed: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    weights = torch.softmax(scores, -1)
    return -(weights * weights.clamp(min=1e-30).log()).sum(-1)


@pytest.fixture
def x() -> Tensor:
    return 2 * torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("causal", [True, False], ids=["nanoGPT", "ViT"])
def test_direct_calls(causal: bool, x: Tensor) -> None:
    torch.manual_seed(0)
    model = Stack(causal)
    plain = model(x)
    with record_entropy(model) as recording:
        output = model(x)
    torch.testing.assert_close(output, plain)
    assert [layer.name for layer in recording] == ["blocks.0", "blocks.1"]
    q, k, _ = model.blocks[0].split(x)
    allowed = torch.ones(7, 7, dtype=torch.bool).tril() if causal else None
    expected = by_hand(q, k, allowed)
    torch.testing.assert_close(recording[0].entropy, expected, rtol=1e-5, atol=1e-5)
    counts = recording[0].allowed_keys.flatten().tolist()
    assert counts == (list(range(1, 8)) if causal else [7] * 7)
    weight = model.blocks[0].project.weight
    (got,) = torch.autograd.grad(recording[0].entropy.square().sum(), weight)
    (wanted,) = torch.autograd.grad(expected.square().sum(), weight)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert EntropyRegularization.calibrated()(recording, 0.5) > 0
    assert is_restored()


def test_layers_of_the_same_limits_share_what_follows_from_them(x: Tensor) -> None:
    """Other limits and lengths do not."""
    model = Stack(layers=4)
    model.blocks[1].causal = False
    with record_entropy(model) as recording:
        model(x)
        model(x[:, :5])
    for layers, n in ((list(recording)[:4], 7), (list(recording)[4:], 5)):
        causal, whole, *others = layers
        assert causal.allowed_keys.flatten().tolist() == list(range(1, n + 1))
        assert whole.allowed_keys.flatten().tolist() == [n] * n
        assert all(other.allowed_keys is causal.allowed_keys for other in others)
        assert all(other.rows is causal.rows for other in others)
        assert causal.rows.all()
        assert causal.rows.shape == (2, n)
        causal.rows[0, 3:] = False
        assert causal.rows[1].all()


class Memory(SelfAttention):
    """As x-transformers writes it: keys of memory before the others, normalised, a learned bias."""

    def __init__(self) -> None:
        super().__init__(16, 4, causal=False)
        self.keys, self.bias = (nn.Parameter(torch.randn(1, 4, *size)) for size in ((2, 4), (7, 9)))

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.split(x)
        memory = self.keys.expand(2, -1, -1, -1)
        k, v = torch.cat((memory, k), -2), torch.cat((memory, v), -2)
        return functional.normalize(q, dim=-1), functional.normalize(k, dim=-1), v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.scores(x)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=8.0)
        return self.out(y.transpose(1, 2).flatten(2))


def test_memory_keys_normalised_keys_and_a_learned_bias(x: Tensor) -> None:
    torch.manual_seed(0)
    model = Memory()
    plain = model(x)
    with record_entropy(model) as recording:
        torch.testing.assert_close(model(x), plain)
    q, k, _ = model.scores(x)
    weights = torch.softmax(8.0 * q @ k.mT + model.bias, -1)
    expected = -(weights * weights.log()).sum(-1)
    torch.testing.assert_close(recording[0].entropy, expected, rtol=0, atol=1e-5)
    assert recording[0].allowed_keys.unique().tolist() == [recording[0].keys] == [9]
    parameters = [model.keys, model.bias, model.project.weight]
    found = torch.autograd.grad(recording[0].entropy.square().sum(), parameters)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_causal_is_aligned_upper_left_as_torch_does(x: Tensor) -> None:
    class Cross(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(q, k, k, is_causal=True)

    q, k = x[:, None, :4], x[:, None]
    plain = Cross()(q, k)
    with record_entropy(Cross()) as recording:
        pass
    model = Cross()
    with record_entropy(model) as recording:
        torch.testing.assert_close(model(q, k), plain)
    assert recording[0].allowed_keys.flatten().tolist() == [1, 2, 3, 4]


def shapes_and_masks() -> dict[str, tuple[Tensor, Tensor, dict[str, Any]]]:
    """Return query, key (which is the value, too) and options."""
    draw = torch.Generator().manual_seed(1)
    q = 2 * torch.randn(2, 4, 7, 4, generator=draw)
    allowed = torch.rand(2, 1, 7, 7, generator=draw) > 0.4
    allowed |= torch.eye(7, dtype=torch.bool)
    additive = torch.zeros(7, 7).masked_fill(~allowed[0, 0], -torch.inf)
    grouped = {"enable_gqa": True, "scale": 0.3}
    return {
        "boolean": (q, q, {"attn_mask": allowed}),
        "additive": (q, q, {"attn_mask": additive}),
        "of heads": (q, q, {"attn_mask": torch.randn(4, 7, 7, generator=draw)}),
        "3-D": (q[:, 0], q[:, 0], {"attn_mask": allowed[:, 0]}),
        "5-D": (torch.stack((q, -q)), torch.stack((q, q)), {"attn_mask": allowed}),
        "2-D": (q[0, 0], q[0, 0], {}),
        "grouped": (q, q[:, :2], grouped),
        "grouped, masked": (q, q[:, :2], {**grouped, "attn_mask": allowed}),
        "grouped, 3-D": (q[0], q[0, :2], {**grouped, "attn_mask": additive}),
        "one query for all": (q[:1], q, {"attn_mask": allowed}),
        "one key for all": (q, q[:1], {}),
        "one head of keys": (q, q[:, :1], {"is_causal": True}),
    }


@pytest.mark.parametrize("kind", shapes_and_masks())
def test_masks_and_shapes(kind: str) -> None:
    q, k, options = shapes_and_masks()[kind]

    class Caller(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(q, k, k, **options)

    plain, model = Caller()(q, k), Caller()
    with record_entropy(model) as recording:
        output = model(q, k)
    torch.testing.assert_close(output, plain)
    heads = k.repeat_interleave(2, -3) if "enable_gqa" in options else k
    scores = q @ heads.mT * options.get("scale", 0.5)
    mask = options.get("attn_mask", torch.zeros(7, 7))
    if options.get("is_causal"):
        mask = torch.ones(7, 7, dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores + mask, -1)
    expected = torch.special.entr(weights).sum(-1)
    found = recording[0].entropy
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=0, atol=1e-5)
    counts = recording[0].allowed_keys.expand(found.shape).reshape(expected.shape)
    assert torch.equal(counts, mask.isfinite().sum(-1).expand(expected.shape))
    assert found.shape[1] == (4 if kind == "grouped, 3-D" or q.dim() > 3 else 1)


class Cross(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, **options)


@pytest.mark.parametrize(
    ("q", "k", "dim"),
    [
        ((2, 4, 3, 8), (2, 4, 0, 8), 8),
        ((2, 4, 0, 8), (2, 4, 3, 8), 8),
        ((2, 0, 3, 8), (2, 0, 3, 8), 8),
        ((0, 4, 3, 8), (0, 4, 3, 8), 8),
        ((2, 4, 3, 8), (2, 4, 3, 8), 0),
    ],
    ids=["keys", "queries", "heads", "batch", "values"],
)
def test_nothing_of_something(q: tuple[int, ...], k: tuple[int, ...], dim: int) -> None:
    model, given = Cross(), (torch.randn(q), torch.randn(k), torch.randn(*k[:-1], dim))
    plain = torch.zeros(*q[:-1], dim)  # as torch's own, but that 2.11 dies where there is no head
    with record_entropy(model) as recording:
        torch.testing.assert_close(model(*given), plain)
    assert recording[0].entropy.shape == q[:-1]
    assert recording[0].allowed_keys.unique().tolist() in ([], [k[2]])


LOWER_RIGHT = causal_lower_right(4, 7)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": (2, 4, 3, 8)}, ValueError, "value has shape .* pass one value per key"),
        ({"k": (2, 4, 7, 3)}, ValueError, "key has shape .* batch and dim must be the same"),
        ({"k": (3, 4, 7, 8)}, ValueError, "shapes .* do not broadcast; give them the same"),
        ({"k": (2, 3, 7, 8), "v": (2, 3, 7, 8), "enable_gqa": True}, ValueError, "a multiple of"),
        ({"k": (2, 2, 7, 8), "v": (2, 1, 7, 8), "enable_gqa": True}, ValueError, "one value per"),
        ({"k": torch.zeros(2, 4, 7, 8).double()}, TypeError, "key has dtype torch.float64 and"),
        ({"attn_mask": torch.ones(5, 7).int()}, TypeError, "attn_mask has dtype torch.int32; pass"),
        ({"attn_mask": [[True]]}, TypeError, "attn_mask is a list; pass a torch.Tensor"),
        ({"attn_mask": torch.ones(5, 6)}, ValueError, r"shape \(5, 6\) but query and key imply"),
        ({"attn_mask": torch.ones(1, 1, 1, 5, 7)}, ValueError, "one that broadcasts to it"),
        ({"attn_mask": torch.ones(5, 7, device="meta")}, ValueError, "attn_mask is on meta and"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p is -0.1; pass a rate in \[0, 1\]"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p is 1.5; pass a rate in \[0, 1\]"),
        ({"attn_mask": LOWER_RIGHT}, ValueError, r"of \(4, 7\) .* there are \(5, 7\); make one"),
        ({"attn_mask": LOWER_RIGHT, "is_causal": True}, ValueError, "pass one of the two"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_a_sentence(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"q": (2, 4, 5, 8), "k": (2, 4, 7, 8), "v": (2, 4, 7, 8), **change}
    for name, each in given.items():
        given[name] = torch.randn(each) if isinstance(each, tuple) else each
    model = Cross()
    with pytest.raises(error, match=message), record_entropy(model):
        model(**given)


@pytest.mark.parametrize("mask", [None, torch.zeros(7, 7)])
def test_dropout_of_all_puts_out_zeros_and_keeps_the_entropy(mask: Tensor | None) -> None:
    model, q = Cross(), torch.randn(2, 4, 7, 8, requires_grad=True)
    options = {"attn_mask": mask, "dropout_p": 1.0}
    with record_entropy(model) as recording:
        output = model(q, q, q, **options)
    assert torch.equal(output, model(q, q, q, **options))
    torch.testing.assert_close(recording[0].entropy, by_hand(q, q))
    (gradient,) = torch.autograd.grad(output.sum(), q, retain_graph=True)
    assert torch.equal(gradient, torch.zeros_like(q))
    total = output.sum() + recording[0].entropy.square().sum()
    (gradient,) = torch.autograd.grad(total, q, retain_graph=True)
    (wanted,) = torch.autograd.grad(by_hand(q, q).square().sum(), q)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    def forward(self, q: Tensor, mask: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize(
    ("dimensions", "size"),
    [
        (4, (7, 7)),
        (4, (7, 1)),
        (4, (1, 1, 1, 7)),
        (4, (2, 1, 7, 7)),
        (4, (2, 1, 1, 7)),
        (4, (4, 1, 7)),
        (3, (4, 1, 7)),
        (3, (7, 7)),
        (5, (7, 7)),
        (5, (1, 2, 1, 7, 7)),
        (5, (3, 1, 4, 1, 7)),
        (2, (1, 7)),
    ],
)
def test_masks_that_broadcast(dimensions: int, size: tuple[int, ...], floating: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 4, 7, 8, generator=draw)[(0,) * (5 - dimensions)].requires_grad_()
    mask = torch.randn(size, generator=draw)
    if not floating:
        mask = (mask > -1).index_fill(-1, torch.tensor([0]), True)
    model, given = Masked(), [q, mask.requires_grad_()] if floating else [q]
    plain = model(q, mask)
    with record_entropy(model) as recording:
        output = model(q, mask)
    torch.testing.assert_close(output, plain)
    added = mask if floating else torch.zeros(size).masked_fill(~mask, -torch.inf)
    weights = torch.softmax(q @ q.mT / 8**0.5 + added, -1)
    expected = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
    found = recording[0].entropy
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=0, atol=1e-5)
    wanted = torch.autograd.grad((plain.square().sum(), expected.square().sum()), given)
    gradients = torch.autograd.grad((output.square().sum(), found.square().sum()), given)
    for one, two in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


class Sizes(TorchDispatchMode):
    """Notes how large the largest tensor is that is made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("size", [(64, 64), (1, 1, 64, 64), (3, 1, 64, 64)])
def test_a_mask_for_all_heads_is_not_made_one_for_each(size: tuple[int, ...]) -> None:
    model, mask = Masked(), torch.randn(size)
    with record_entropy(model, gradient=False), Sizes() as sizes:
        model(torch.randn(3, 16, 64, 8), mask)
    assert 0 < sizes.largest <= max(mask.nbytes, 3 * 16 * 64 * 8 * 4)


class Transparent(nn.Module):
    """Hands its input on to nn.MultiheadAttention with options."""

    def __init__(self, need_weights: bool, call: dict[str, Any], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 4, **options)
        self.call, self.need_weights = call, need_weights

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        options = {**self.call, "need_weights": self.need_weights}
        found: tuple[Tensor, Tensor | None] = self.attention(q, k, k, **options)
        return found


FUTURE = torch.ones(7, 7, dtype=torch.bool).triu(1)
PAD = torch.arange(7) >= torch.tensor([[7], [5]])
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"attn_mask": FUTURE, "is_causal": True},
    "padded": {"key_padding_mask": PAD, "attn_mask": FUTURE},
    "additive": {
        "key_padding_mask": torch.zeros(2, 7).masked_fill(PAD, -torch.inf),
        "attn_mask": torch.arange(49.0).view(7, 7) / 20,
    },
    "3-D": {"attn_mask": FUTURE | (torch.arange(8)[:, None, None] == torch.arange(7)) & FUTURE.T},
}


@pytest.mark.parametrize(
    ("call", "need_weights", "extra"),
    [
        each
        for each in itertools.product(CALLS, (False, True), (None, "add_bias_kv", "add_zero_attn"))
        if each[0] != "causal"
        or each[1]
        or each[2] is None  # torch itself then hides what is added
    ],
)
def test_multihead_attention_with_every_option(
    call: str, need_weights: bool, extra: str | None, x: Tensor
) -> None:
    options = {"batch_first": call != "causal", **({extra: True} if extra else {})}
    model = Transparent(need_weights, CALLS[call], **options).eval()
    q, k = (x, x) if options["batch_first"] else (x.transpose(0, 1), x.transpose(0, 1))
    whole = {**CALLS[call], "average_attn_weights": False}
    weights = model.attention(q, k, k, **whole)[1]
    plain = model(q, k)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient), record_entropy(model) as recording:
            output = model(q, k)
        for one, two in zip(output, plain, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        expected = torch.special.entr(weights).sum(-1)
        torch.testing.assert_close(recording[0].entropy, expected, rtol=0, atol=1e-5)
        counts = recording[0].allowed_keys.expand(expected.shape)
        assert torch.equal(counts, (weights > 0).sum(-1))


@pytest.mark.parametrize("kind", ["attention", "function"])
def test_nested_tensors_are_refused(kind: str) -> None:
    parts = [torch.randn(3, 16), torch.randn(5, 16)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 16, batch_first=True)).eval()
    if kind == "function":
        model = nn.Sequential(SelfAttention(16, 4, False))
        model[0].split = lambda x: [x.unflatten(-1, [4, 4]).transpose(1, 2)] * 3
    with torch.no_grad(), pytest.raises(ValueError, match="nested tensor"), record_entropy(model):
        model(nested)


def test_autocast_casts_what_torch_casts(x: Tensor) -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.bfloat16()
            return functional.scaled_dot_product_attention(x, x, y, attn_mask=x.new_zeros(7, 7))

    model = Wide()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(x)
        with record_entropy(model) as recording:
            output = model(x)
    assert output.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(output, plain)
    assert recording[0].entropy.dtype == torch.float32


def test_multihead_attention(x: Tensor) -> None:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
            found: tuple[Tensor, Tensor | None] = self.attention(
                x, x, x, need_weights=need_weights, average_attn_weights=False
            )
            return found

    model = Model()
    _, weights = model(x, need_weights=True)
    assert weights is not None
    with record_entropy(model) as recording:
        model(x)
    expected = torch.special.entr(weights).sum(-1)
    torch.testing.assert_close(recording[0].entropy, expected, rtol=0, atol=1e-5)
    with record_entropy(model) as recording:  # the weights are made, and heard as well
        again = model(x, need_weights=True)[1]
    torch.testing.assert_close(again, weights)
    torch.testing.assert_close(recording[0].entropy, expected, rtol=0, atol=1e-5)
    assert is_restored()
    with (
        pytest.raises(ValueError, match=r"before torch\.compile"),
        record_entropy(torch.compile(model)),
    ):
        pass


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_and_decoder(training: bool, x: Tensor) -> None:
    torch.manual_seed(0)
    options = {
        "d_model": 16,
        "nhead": 4,
        "dim_feedforward": 32,
        "batch_first": True,
        "dropout": 0.0,
    }
    model = nn.Transformer(num_encoder_layers=2, num_decoder_layers=1, **options).train(training)
    plain = model(x, x[:, :5])
    with torch.set_grad_enabled(training), record_entropy(model) as recording:
        output = model(x, x[:, :5])
    torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)
    assert [(layer.name.split(".", 1)[1], layer.kind) for layer in recording] == [
        ("layers.0.self_attn", "self"),
        ("layers.1.self_attn", "self"),
        ("layers.0.self_attn", "self"),
        ("layers.0.multihead_attn", "cross"),
    ]
    assert recording[3].entropy.shape == (2, 4, 5)
    assert torch.backends.mha.get_fastpath_enabled()


class OwnSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Identity()
        self.attention.forward = lambda x: torch.special.softmax(x @ x.mT, -1) @ x  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x)
        return y


def test_models_that_cannot_be_seen_are_refused_by_name(x: Tensor) -> None:
    model = OwnSoftmax()
    with (
        pytest.raises(ValueError, match="attention computes a softmax of its own"),
        record_entropy(model),
    ):
        model(x)
    both = nn.Sequential(Stack(layers=1), OwnSoftmax())
    with pytest.raises(ValueError, match=r"1\.attention computes a softmax"), record_entropy(both):
        both(x)
    with record_entropy(both, allow_partial=True) as recording:
        both(x)
    assert recording.missing == ["1.attention"]
    assert len(recording) == 1


class Processor:
    """Runs a module's code, as in diffusers; no module itself."""

    def __init__(self) -> None:
        self.fuse = True

    def __call__(self, model: nn.Module, x: Tensor, fuse: bool) -> Tensor:
        y: Tensor = x if fuse and self.fuse else model.own(x)
        return y


class OwnProcessor(Processor):
    def __call__(self, model: nn.Module, x: Tensor, fuse: bool) -> Tensor:
        return super().__call__(model, x, False)


class Chooses(nn.Module):
    """Attends by torch's function, and sometimes by a softmax of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.own = SelfAttention(16, 4, True), OwnSoftmax()
        self.part, self.fuse = nn.Identity(), True
        self.processor = Processor()

    def forward(
        self, x: Tensor, fuse: bool = True, fails: bool = False, how: str = "fused"
    ) -> Tensor:
        x = self.fused(x)
        if fails:
            raise ValueError("before the rest has run")
        fuse = fuse and self.fuse and not self.part.training and how == "fused"
        return self.processor(self, x, fuse)


CHANGES = ["an exception", "a flag", "an argument", "a part's mode", "a processor", "its flag"]
CHANGES += ["a word", "a function", "a function of the class"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_of_another_kind_is_watched_again(
    change: str, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stops = Chooses().eval(), contextlib.nullcontext()
    if change == "an exception":
        model.fuse, stops = False, contextlib.suppress(ValueError)
    with record_entropy(model), stops:
        model(x, fuse=True, fails=change == "an exception", how="fused")
    model.fuse = change not in ("a flag", "an exception")
    model.part.training = change == "a part's mode"
    if change == "a processor":
        model.processor = OwnProcessor()
    elif change == "its flag":
        model.processor.fuse = False
    elif change == "a function":
        model.forward = lambda x, **_: model.own(model.fused(x))
    elif change == "a function of the class":
        monkeypatch.setattr(Chooses, "forward", lambda self, x, **_: self.own(self.fused(x)))
    with pytest.raises(ValueError, match="attention computes a softmax"), record_entropy(model):
        model(
            x,
            fuse=change != "an argument",
            fails=False,
            how="own" if change == "a word" else "fused",
        )


def test_a_recorder_that_is_kept_forgets_what_it_refused(x: Tensor) -> None:
    model = Chooses().eval()
    recorder = SdpaRecorder(model)
    for fuse in (False, True, False, True):
        recorder.start()
        model(x, fuse=fuse)
        with contextlib.nullcontext() if fuse else pytest.raises(ValueError, match="own"):
            assert len(recorder.stop()) == 1


class Encoder(nn.Module):
    """Is run by another method than forward, as modules of Lightning are."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.own = Stack(), OwnSoftmax()

    def encode(self, x: Tensor) -> Tensor:
        y: Tensor = self.own(self.stack(x))
        return y


def test_parts_that_are_called_alone_are_watched(x: Tensor) -> None:
    model = Encoder()
    with pytest.raises(ValueError, match="attention computes"), record_entropy(model):
        model.encode(x)
    with record_entropy(model, layers=[1]) as recording:
        model.stack(x)
        model.stack(x)
    assert [layer.name for layer in recording] == ["stack.blocks.1"] * 2


@pytest.mark.parametrize(
    ("layers", "kept", "message"),
    [
        ([1], ["blocks.1"], None),
        ((name for name in ("*.1", "blocks.0")), ["blocks.0", "blocks.1"], None),
        (1, None, "layers is 1; pass a list of indices"),
        ([-1], None, r"layers is \[-1\], .* count from the first one"),
        (["blocks.0", "block.1"], None, "pattern 'block.1' matches no module of Stack"),
        ([2, 3], None, r"layers=\[2, 3\] keeps none of .* in this order: blocks.0, blocks.1\."),
        ("*.out", None, r"layers='\*.out' keeps none"),
        (["blocks.0", 2], None, "asks for attention call 2 of Stack, which made 2, counted from 0"),
    ],
)
def test_layers_are_chosen_or_refused(
    layers: Layers, kept: list[str] | None, message: str | None, x: Tensor
) -> None:
    model = nn.parallel.DataParallel(Stack()).eval()
    if kept is None:
        with (
            pytest.raises((TypeError, ValueError), match=message),
            record_entropy(model, layers=layers),
        ):
            model(x)
        assert not model.module._forward_hooks
    else:
        with record_entropy(model, layers=layers) as recording:
            model(x)
        assert [layer.name for layer in recording] == kept


def test_recordings_may_end_in_another_order_than_they_began(x: Tensor) -> None:
    options = {"d_model": 16, "nhead": 4, "dim_feedforward": 16, "batch_first": True}
    one, two = (nn.TransformerEncoderLayer(**options).eval() for _ in range(2))
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    with torch.no_grad():
        first.enter_context(record_entropy(one))
        recording = second.enter_context(record_entropy(two))
        first.close()
        for _ in range(2):  # the second pass is not watched
            two(x)
        second.close()
    assert len(recording) == 2
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("compiled", [False, True])
def test_copies_and_pickles_are_apart(compiled: bool, x: Tensor) -> None:
    model = Stack()
    torch._dynamo.reset()
    forward = torch.compile(model, backend="eager") if compiled else model
    with record_entropy(forward) as recording:
        forward(x)
        twin, file = copy.deepcopy(model), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for other in (twin, loaded):
            other(x)
    assert len(recording) == 2
    for other in (twin, loaded):
        with record_entropy(other) as apart:
            other(x)
        torch.testing.assert_close(apart[1].entropy, recording[1].entropy)
        assert compiled or not other._forward_hooks


def test_state_is_restored_after_an_exception_and_two_models_do_not_mix(x: Tensor) -> None:
    one, two = Stack(layers=1), Stack(layers=2)
    with pytest.raises(RuntimeError, match="mine"), record_entropy(one):
        raise RuntimeError("mine")
    assert is_restored()
    assert not one._forward_hooks
    assert not one.blocks[0]._forward_pre_hooks
    with record_entropy(one) as first, record_entropy(two) as second:
        one(x)
        two(x)
    assert (len(first), len(second)) == (1, 2)
    with record_entropy(two) as outer, record_entropy(two, layers=[1], gradient=False) as inner:
        two(x)
    assert (len(outer), len(inner)) == (2, 1)
    assert outer[0].entropy.requires_grad
    assert not inner[0].entropy.requires_grad


class Attend(nn.Module):
    """A function that happens to be a module."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x)


class Student(Stack):
    """Another module runs inside its forward pass without being a part of it."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__(layers=1)
        self.others = [other]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.others[0](x)


def test_a_module_that_is_no_part_of_the_model_is_refused_if_it_attends(x: Tensor) -> None:
    model, fused = Student(Stack()), Student(Attend())
    with (
        pytest.raises(RuntimeError, match="Stack attends inside the forward pass of Student"),
        record_entropy(model),
    ):
        model(x)
    assert is_restored()
    with record_entropy(fused) as recording:
        fused(x)
    assert [layer.name for layer in recording] == ["blocks.0", "Student"]
    with record_entropy(model, allow_partial=True) as own:
        model(x)
    with record_entropy(model, layers="blocks.*") as chosen:
        model(x)
    assert [len(own), len(chosen)] == [1, 1]


class Calling(nn.Module):
    """A part that lets the whole attend."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = [whole]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.whole[0].attend(x)
        return result


class Growing(Stack):
    """Builds a block while it runs."""

    def forward(self, x: Tensor) -> Tensor:
        if len(self.blocks) == 1:
            self.blocks.append(SelfAttention(16, 4, True))
        return super().forward(x)

    def attend(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x)


def test_a_part_that_came_later_and_a_whole_around_a_part_are_no_strangers(x: Tensor) -> None:
    model = Growing(layers=1)
    with record_entropy(model) as recording:
        model(x)
    assert len(recording) == 2
    model.part = Calling(model)
    with record_entropy(model.part) as recording:
        model.part(x)
    assert [layer.name for layer in recording] == ["Calling"]


def penalised(model: nn.Module, x: Tensor, inside: bool = True) -> list[Tensor]:
    """Return gradients of a sum of outputs and entropies, backward inside the context or after."""
    parameters = list(model.parameters())
    with record_entropy(model) as recording:
        total = model(x).square().mean()
        total = total + sum(layer.entropy.square().sum() for layer in recording)
        if inside:
            return list(torch.autograd.grad(total, parameters))
    return list(torch.autograd.grad(total, parameters))


def test_compiled_direct_calls_break_no_graph_and_are_compiled_once(x: Tensor) -> None:
    model = Stack()
    expected = penalised(model, x)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    found = penalised(compiled, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = penalised(compiled, x)
    for one, two, wanted in zip(found, again, expected, strict=True):
        torch.testing.assert_close(one, wanted)
        torch.testing.assert_close(two, wanted)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with record_entropy(compiled) as recording:
        compiled(x)
    assert [layer.name for layer in recording] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_is_not_exported_while_it_is_recorded(strict: bool, x: Tensor) -> None:
    model = Stack()
    refused = pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported))
    with record_entropy(model), refused as error:
        torch.export.export(model, (x,), strict=strict)
    assert "Stack was exported while its entropies are recorded" in str(error.value)


def test_compiled_parts_are_recorded_again_and_again(x: Tensor) -> None:
    model = Stack()
    expected = penalised(model, x)
    torch._dynamo.reset()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    for _ in range(3):
        for found, wanted in zip(penalised(model, x), expected, strict=True):
            torch.testing.assert_close(found, wanted)
    with record_entropy(model) as recording:
        model(x)
    assert [layer.name for layer in recording] == ["blocks.0", "blocks.1"]


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (OwnSoftmax, "1 computes a softmax of its own"),
        (MultiHead, "1.attention is torch's multi-head attention in compiled code"),
    ],
)
def test_what_a_model_attends_unheard_in_a_compiled_function_is_refused(
    part: type[nn.Module], message: str, x: Tensor
) -> None:
    model = nn.Sequential(Stack(), part())
    torch._dynamo.reset()
    step = torch.compile(lambda x: model(x), backend="aot_eager")
    recorder = make_recorder(model)
    for _ in range(3):
        recorder.start()
        step(x)
        with pytest.raises(ValueError, match=message):
            recorder.stop()
    with record_entropy(model[0]) as recording:
        step(x)
    assert len(recording) == 2


class CompiledMethod(MultiHead):
    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    @torch.compile(backend="aot_eager")
    def attend(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stack(self.attend(x))
        return y


def test_multi_head_attention_in_a_compiled_method_is_refused_or_left_out(x: Tensor) -> None:
    torch._dynamo.reset()
    model = CompiledMethod()
    with record_entropy(model) as recording:  # watched, and run as it is written
        model(x)
    assert [layer.name for layer in recording] == ["attention", "stack.blocks.0", "stack.blocks.1"]
    message = "attention is torch's multi-head attention in compiled code"
    for _ in range(2):
        with pytest.raises(ValueError, match=message), record_entropy(model):
            model(x)
    with record_entropy(model, allow_partial=True) as recording:
        for _ in range(2):
            model(x)
    assert recording.missing == ["attention"]
    assert [layer.name for layer in recording] == ["stack.blocks.0", "stack.blocks.1"] * 2
    assert all(layer.entropy.isfinite().all() for layer in recording)


class Checkpointed(Stack):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing_is_exact_wherever_backward_runs(inside: bool, x: Tensor) -> None:
    plain, model = Stack(), Checkpointed()
    model.load_state_dict(plain.state_dict())
    expected = penalised(plain, x)
    for _ in range(2):  # the second pass begins while the first one's attention is still there
        for one, two in zip(penalised(model, x, inside), expected, strict=True):
            torch.testing.assert_close(one, two)
    with record_entropy(model, gradient=False):
        output = model(x)
    Checkpointed()(x).sum().backward()  # another model computes its own attention again
    output.sum().backward()
    model(x)
    assert is_restored()


def test_a_recorder_that_is_kept_leaves_nothing_at_every_step(x: Tensor) -> None:
    model, counts = Checkpointed(), []
    drop = weakref.finalize(model, int)
    recorder = make_recorder(model)
    for _ in range(3):
        recorder.start()
        output = model(x)
        recorder.stop()
        output.sum().backward()
        counts.append(len(weakref.finalize._registry))  # type: ignore[attr-defined]
    assert counts[0] == counts[2]
    assert not is_restored()
    del recorder, model, output
    gc.collect()
    assert not drop.alive
    Stack()(x)
    assert is_restored()


class CausalByBias(nn.Module):
    def __init__(self, upper_left: bool) -> None:
        super().__init__()
        self.upper_left = upper_left

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        make = causal_upper_left if self.upper_left else causal_lower_right
        return functional.scaled_dot_product_attention(q, k, k, make(q.shape[2], k.shape[2]))


@pytest.mark.parametrize(("rows", "keys"), [(5, 5), (3, 5), (5, 3)])
@pytest.mark.parametrize("upper_left", [False, True])
def test_causal_biases(rows: int, keys: int, upper_left: bool) -> None:
    """Tensors of torch.nn.attention.bias, whose numbers mean nothing."""
    model, (q, k) = CausalByBias(upper_left), (torch.randn(2, 2, n, 8) for n in (rows, keys))
    wanted = model(q, k)
    allowed = torch.ones(rows, keys, dtype=torch.bool).tril(0 if upper_left else keys - rows)
    other = CausalByBias(upper_left)
    with record_entropy(model) as recording:
        found = model(q, k)
        torch.testing.assert_close(other(q, k), wanted)  # not recorded, but computed as ever
    torch.testing.assert_close(found, wanted)
    seen = allowed.any(-1)
    torch.testing.assert_close(recording[0].entropy[..., seen], by_hand(q, k, allowed)[..., seen])
    assert recording[0].allowed_keys.flatten().tolist() == allowed.sum(-1).tolist()


def test_a_function_that_a_user_put_in_place_of_torchs_stays(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, other = [], Stack()

    def mine(*args: object, **options: object) -> Tensor:
        calls.append(args)
        return ORIGINAL(*args, **options)

    mine.__module__ = None  # as that of a function made by exec
    monkeypatch.setattr(functional, "scaled_dot_product_attention", mine)
    for each in (Stack(), Checkpointed()):
        with record_entropy(each) as recording:
            each(x)
            assert not calls
            other(x)
        assert len(recording) == len(calls) == 2
        each(x)
        assert len(calls) == 4
        assert functional.scaled_dot_product_attention is mine
        calls.clear()


@pytest.mark.parametrize("multi_head", [False, True])
def test_a_model_that_is_dropped_while_another_is_compiled(multi_head: bool, x: Tensor) -> None:
    """Garbage is collected at any time: Dynamo must find what it has guarded on."""
    dropped = Checkpointed()
    with record_entropy(dropped):
        dropped(x)
    cycle = [dropped]
    cycle.append(cycle)  # type: ignore[arg-type]
    drop = weakref.finalize(dropped, int)
    del dropped, cycle

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        gc.collect()
        return graph

    gc.disable()
    try:
        attention = nn.MultiheadAttention(16, 4, batch_first=True)
        other = (lambda x: attention(x, x, x)[0]) if multi_head else Stack()
        torch._dynamo.reset()
        compiled = torch.compile(other, backend=backend, fullgraph=True)
        assert drop.alive
        assert functional.scaled_dot_product_attention is not ORIGINAL
        output = compiled(x)
    finally:
        gc.enable()
    assert not drop.alive
    torch.testing.assert_close(output, other(x))
    assert is_restored()
    torch.testing.assert_close(compiled(x), output)


def test_reentrant_checkpointing_is_refused(x: Tensor) -> None:
    model = Checkpointed()
    model.reentrant = True
    with pytest.raises(RuntimeError, match="use_reentrant=False"), record_entropy(model):
        model(x.requires_grad_())
    with record_entropy(model, gradient=False) as recording:
        model(x).sum().backward()
    assert len(recording) == 2


class ComputesAgain(torch.autograd.Function):
    """As checkpoints of other libraries and reversible layers are written."""

    @staticmethod
    def forward(ctx, x: Tensor, module: nn.Module, *_: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        wanted = (x, *ctx.module.parameters())
        with torch.enable_grad():
            output = ctx.module(x)
        found = torch.autograd.grad(output, wanted, gradient)
        return found[0], None, *found[1:]


class ComputesAgainInTwoSteps(ComputesAgain):
    """Its forward sees no context."""

    @staticmethod
    def forward(*given: Any) -> Tensor:
        return given[1](given[0])

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.module = inputs[1]
        ctx.save_for_backward(inputs[0])


@pytest.mark.parametrize("function", [ComputesAgain, ComputesAgainInTwoSteps])
def test_checkpoints_of_other_libraries_are_refused(
    function: type[ComputesAgain], x: Tensor
) -> None:
    class Foreign(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = function.apply(x, block, *block.parameters())
            return x

    model = Foreign()
    with pytest.raises(RuntimeError, match=r"blocks.0 runs without a gradient .*any library"):
        penalised(model, x)
    with record_entropy(model, gradient=False) as recording:
        model(x).sum().backward()
    assert len(recording) == 2


def test_a_part_under_a_no_grad_decorator_is_no_checkpoint(x: Tensor) -> None:
    class Decorated(ComputesAgain):
        """All functions under this decorator run the code of one wrapper."""

        forward = staticmethod(torch.no_grad()(ComputesAgain.forward))

    class HalfFrozen(Stack):
        @torch.no_grad()
        def embed(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.embed(x))

    model = HalfFrozen()
    with record_entropy(model) as recording:
        model(x)
    assert [layer.entropy.requires_grad for layer in recording] == [False, True]
    model.embed = lambda x: Decorated.apply(x, model.blocks[0], *model.blocks[0].parameters())
    with pytest.raises(RuntimeError, match=r"blocks.0 runs without a gradient"):
        penalised(model, x)


class Busy(Stack):
    """Computes, after attention, what recording computes: a result found by number is mistaken."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
            places = torch.arange(0, x.shape[1]).clamp(0, 2) + torch.zeros(1, dtype=torch.int64)
            seen = (places > 0).clone()
            x = x * (places + seen)[:, None]
        return x


@pytest.mark.parametrize("saved", ["all", "no products", "products"])
def test_selective_checkpointing(saved: str, x: Tensor) -> None:
    def policy(context: object, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        product = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        kept = {"all": True, "products": product, "no products": not product}[saved]
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    class Selective(Busy):
        def forward(self, x: Tensor) -> Tensor:
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            for place in range(len(self.blocks)):
                part = Busy(layers=0)
                part.blocks = self.blocks[place : place + 1]
                x = checkpoint(part, x, use_reentrant=False, context_fn=contexts)
            return x

    plain, model = Busy(layers=3), Selective(layers=3)
    model.load_state_dict(plain.state_dict())
    expected = penalised(plain, x)
    for got, wanted in zip(penalised(model, x), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_an_evaluation_and_a_training_pass_in_one_recording(x: Tensor) -> None:
    model = Stack()
    with record_entropy(model) as recording:
        with torch.inference_mode():
            model(x)
        model(x)
    trained = list(recording)[2:]
    sum((a.entropy * a.rows[:, None] * a.allowed_keys).sum() for a in trained).backward()
    assert model.blocks[0].project.weight.grad.abs().max() > 0


def test_names_are_those_without_wrappers(x: Tensor) -> None:
    model = Stack()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    with record_entropy(model, layers="blocks.1") as recording:
        model(x)
    assert [layer.name for layer in recording] == ["blocks.1"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [Stack, Checkpointed])
def test_a_recording_inside_a_checkpoint_is_made_again(
    kind: type[Stack], reentrant: bool, x: Tensor
) -> None:
    plain, model = Stack(), kind()
    model.load_state_dict(plain.state_dict())
    expected = penalised(plain, x)

    def loss(x: Tensor) -> Tensor:
        with record_entropy(model) as recording:
            total = model(x).square().mean()
        assert len(recording) == 2
        return total + sum(layer.entropy.square().sum() for layer in recording)

    for _ in range(2):
        model.zero_grad()
        checkpoint(loss, x.requires_grad_(), use_reentrant=reentrant).backward()
        for parameter, wanted in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, wanted)
    model(x)
    assert is_restored()


class Ours(SelfAttention):
    """Calls the library's own function."""

    implementation: Any = "auto"

    def forward(self, x: Tensor) -> Tensor:
        options = {"causal": self.causal, "implementation": self.implementation}
        y = attention_with_entropy(*self.split(x), **options).output
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("implementation", ["auto", "reference", "blockwise", "compiled model"])
def test_the_librarys_own_function_is_heard(implementation: str, x: Tensor) -> None:
    plain, model = Stack(), Stack()
    model.blocks[1] = Ours(16, 4, True)
    model.load_state_dict(plain.state_dict())
    expected = penalised(plain, x)
    torch._dynamo.reset()
    if implementation == "compiled model":
        forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        forward, model.blocks[1].implementation = model, implementation
    for _ in range(2):
        for found, wanted in zip(penalised(forward, x), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with record_entropy(forward, gradient=False) as recording, record_entropy(plain) as known:
        forward(x)
        plain(x)
        attention_with_entropy(*torch.zeros(3, 1, 1, 1, 1))  # of no model
    assert [layer.name for layer in recording] == ["blocks.0", "blocks.1"]
    assert not recording[1].entropy.requires_grad
    torch.testing.assert_close(recording[1].entropy, known[1].entropy)
    assert torch.equal(recording[1].allowed_keys, known[1].allowed_keys)
    assert (recording[1].keys, len(known)) == (7, 2)
    assert not observers


class Mapping(Stack):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.vmap(super().forward)(x[:, None])[:, 0]
        return y


@pytest.mark.parametrize("inside", [False, True])
def test_vmap_is_refused(inside: bool, x: Tensor) -> None:
    model = Mapping() if inside else Stack()
    call = model if inside else lambda x: torch.vmap(model)(x[:, None])
    message = r"blocks\.0 attends inside torch\.vmap, .* give the model a batch"
    with pytest.raises(NotImplementedError, match=message), record_entropy(model):
        call(x)
    assert is_restored()


class Einsum(nn.Module):
    """As x-transformers writes it: einsum, a softmax in float32, talking heads, flash by choice."""

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.to_qkv, self.mix, self.flash = nn.Linear(16, 48), nn.Conv2d(4, 4, 1), flash
        self.act = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        if self.flash:
            return functional.scaled_dot_product_attention(q, k, v, scale=0.3)
        scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.3
        weights = self.mix(self.act(scores.float()).type_as(scores))
        return torch.einsum("b h i j, b h j d -> b h i d", functional.dropout(weights, 0.1), v)


def test_einsum_attention_is_refused_and_its_flash_branch_recorded(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(16, 16), Einsum(flash=False))
    with pytest.raises(ValueError, match="1 computes a softmax of its own"), record_entropy(model):
        model(x)
    model[1].flash = True
    with record_entropy(model) as recording:
        model(x)
    q, k, _ = model[1].to_qkv(model[0](x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    expected = by_hand(q * 0.3 * 2, k)
    torch.testing.assert_close(recording[0].entropy, expected, rtol=0, atol=1e-5)


class Router(nn.Module):
    """A softmax that chooses experts, one over classes, one that pools: none of them attends."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.gate = Stack(), nn.Linear(16, 4)
        self.experts = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stack(x)
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        x = sum(
            weights[..., i, None] * torch.einsum("btd,btde->bte", x, self.experts[chosen[..., i]])
            for i in range(2)
        )
        pooled = (self.gate(x)[..., :1].softmax(1) * x).sum(1)
        return self.gate(pooled).softmax(-1)


def test_a_softmax_that_does_not_attend_is_let_pass(x: Tensor) -> None:
    model = Router()
    with record_entropy(model) as recording:
        model(x)
    assert (len(recording), recording.missing) == (2, [])


class Mixing(nn.Module):
    """A hyper-connection: four streams of every token, mixed by a doubly stochastic matrix.

    Args:
        attends: make the scores of queries and keys, and mix the tokens: attention all the same.
        scaled: over the columns too.
    """

    def __init__(self, attends: bool, scaled: bool) -> None:
        super().__init__()
        self.attends, self.scaled = attends, scaled
        self.stack, self.scores = Stack(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stack(x)
        if self.attends:
            scores, values = self.scores(x) @ x.mT, x
        else:
            scores, values = self.scores(x).unflatten(-1, (4, 4)), x.unflatten(-1, (4, 4))
        weights = torch.softmax(scores + 1, dim=-1) + 1e-6
        if self.scaled:
            weights = weights / (weights.sum(dim=-2, keepdim=True) + 1e-6)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)
        return (weights.transpose(-1, -2) @ values).reshape(x.shape)


def test_a_mixture_of_streams_is_let_pass(x: Tensor) -> None:
    model = nn.Sequential(*[Mixing(attends=False, scaled=True) for _ in range(2)])
    with record_entropy(model) as recording:
        model(x)
    assert (len(recording), recording.missing) == (4, [])


@pytest.mark.parametrize(("attends", "scaled"), [(True, True), (True, False), (False, False)])
def test_attention_that_is_scaled_like_a_mixture_is_refused(
    attends: bool, scaled: bool, x: Tensor
) -> None:
    model = Mixing(attends, scaled)
    message = "Mixing computes a softmax of its own"
    with pytest.raises(ValueError, match=message), record_entropy(model):
        model(x)


class Differential(nn.Module):
    """The difference of two attentions, whose weights are one softmax that is taken apart."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.softmax(torch.stack([x @ x.mT, x @ x.mT / 2]), -1).unbind()
        return (first - 0.5 * second) @ x


def test_attention_whose_weights_are_taken_apart_is_refused(x: Tensor) -> None:
    model = nn.Sequential(Stack(), Differential())
    message = "1 computes a softmax of its own"
    with pytest.raises(ValueError, match=message), record_entropy(model):
        model(x)


class Spelled(nn.Module):
    """Attends by hand, in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.talk, self.mix = way, nn.Linear(4, 4), nn.Conv2d(4, 8, 1)
        self.gain = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 4)).transpose(1, 2)
        y: Tensor = getattr(self, self.way)(q, q @ q.mT)
        return y.mean() + x

    def talking_heads(self, v: Tensor, scores: Tensor) -> Tensor:
        return self.talk(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v

    def talking_einsum(self, v: Tensor, scores: Tensor) -> Tensor:
        return torch.einsum("bhij,hg->bgij", scores.softmax(-1), self.gain) @ v

    def more_heads(self, v: Tensor, scores: Tensor) -> Tensor:
        return self.mix(scores.softmax(-1))[:, :4] @ v

    def one_head(self, v: Tensor, scores: Tensor) -> Tensor:
        return scores.softmax(-1).select(1, 0) @ v[:, 0]

    def stacked(self, v: Tensor, scores: Tensor) -> Tensor:
        return torch.stack([head.softmax(-1) for head in scores.unbind(1)], 1) @ v

    def blocks_of_rows(self, v: Tensor, scores: Tensor) -> Tensor:
        weights = torch.empty_like(scores)
        for start in range(0, 7, 3):
            weights[:, :, start : start + 3] = scores[:, :, start : start + 3].softmax(-1)
        return weights @ v

    def gumbel(self, v: Tensor, scores: Tensor) -> Tensor:
        return functional.gumbel_softmax(scores, dim=-1) @ v

    def powers_of_two(self, v: Tensor, scores: Tensor) -> Tensor:
        powers = torch.exp2(scores)
        return powers / powers.sum(-1, keepdim=True) @ v

    def compiled(self, v: Tensor, scores: Tensor) -> Tensor:
        attends = torch.compile(lambda scores, v: scores.softmax(-1) @ v, backend="eager")
        y: Tensor = attends(scores, v)
        return y

    def compiled_flex(self, v: Tensor, scores: Tensor) -> Tensor:
        y: Tensor = torch.compile(flex_attention.flex_attention, backend="eager")(v, v, v)
        return y


WAYS = [name for name in vars(Spelled) if not name.startswith("_") and name != "forward"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_by_hand_is_refused_however_it_is_written(way: str, x: Tensor) -> None:
    how = "calls flex_attention" if "flex" in way else "computes a softmax of its own"
    model = nn.Sequential(Stack(), Spelled(way))
    with torch.no_grad(), pytest.raises(ValueError, match=f"1 {how}"), record_entropy(model):
        model(x)


def test_what_is_compiled_is_compiled_again_after_watches_that_overlap(x: Tensor) -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        calls.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend=backend)
    outer, inner = nn.Sequential(Stack()), Stack()
    with record_entropy(outer), record_entropy(outer[0]):
        outer(x)
        compiled(x)
    assert len(calls) == 1
    inner.register_forward_hook(stops)
    with pytest.raises(ValueError, match="stops"), record_entropy(inner):
        inner(x)
    compiled(torch.cat([x, x]))
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_watch_that_ends_leaves_another_one_watching(x: Tensor) -> None:
    model = nn.Sequential(Stack(), Spelled("compiled_flex"))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="1 calls flex_attention"),
        record_entropy(model),
        record_entropy(model[0]),
    ):
        model(x)


def stops(*_: object) -> None:
    raise ValueError("stops")


class Commented(nn.Module):
    """Its softmax( is a gate; a @ b is only spoken of."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.softmax(-1)  # not weights @ values


class Heir(Mixing):
    """Has no forward of its own."""


def test_comments_are_not_read_as_source_but_inherited_forwards_are() -> None:
    assert attends_by_source(Commented) is None
    assert attends_by_source(Mixing) is not None
    assert attends_by_source(Heir) == attends_by_source(Mixing)
    assert attends_by_source(nn.ModuleList) is None


class DeformableAttention(nn.Module):
    """Weighs values sampled at a few places, as deformable DETR does."""

    def forward(self, x: Tensor) -> Tensor:
        weights = functional.softmax(x[..., :4], -1)  # [batch, queries, places]
        return (x[:, :, None, :].expand(-1, -1, 4, -1) * weights[..., None]).sum(2)


class BroadcastAttn(nn.Module):
    """Multiplies and sums, where others call a product of matrices."""

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ x.transpose(-1, -2)).softmax(-1)
        return (weights[..., None] * x[:, None]).sum(2)


class LogAttention(nn.Module):
    """Normalises in the logarithm."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.log_softmax(x @ x.transpose(-1, -2), -1).exp() @ x


class StepwiseAttention(nn.Module):
    """Takes the exponentials, a mask of them, and their sum by itself."""

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        weights = (scores - scores.amax(-1, keepdim=True)).exp() * torch.ones(7, 7).tril()
        return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)) @ x


class LogSumAttention(nn.Module):
    """Takes the logarithm of the sum from the scores, as reformer does."""

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        return torch.exp(scores - scores.logsumexp(-1)[..., None]) @ x


class InPlaceAttention(nn.Module):
    """Divides in place, by an operator and by a method."""

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ x.transpose(-1, -2)).sigmoid().exp()
        if len(x) % 2:
            return weights.div_(weights.sum(-1, keepdim=True)) @ x
        weights /= weights.sum(-1, keepdim=True)
        return weights @ x


class AssigningAttention(nn.Module):
    """Its values are a softmax too."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(-1, -2), -1) @ x.softmax(-1)


class LinearAttention(nn.Module):
    """Multiplies the values by a function that others project with."""

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(x @ x.transpose(-1, -2), -1)
        each = zip(weights, x, strict=True)
        return torch.stack([functional.linear(weight, value.T) for weight, value in each])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (DeformableAttention, "1 weighs sampled values by a softmax of its own"),
        (BroadcastAttn, "1 computes a softmax of its own"),
        (LogAttention, "1 computes a softmax of its own"),
        (StepwiseAttention, "1 computes a softmax of its own"),
        (LogSumAttention, "1 computes a softmax of its own"),
        (InPlaceAttention, "1 computes a softmax of its own"),
        (AssigningAttention, "1 computes a softmax of its own"),
        (LinearAttention, "1 computes a softmax of its own"),
    ],
)
def test_attention_in_another_guise_is_refused_by_name(
    part: type[nn.Module], message: str, x: Tensor
) -> None:
    model = nn.Sequential(Stack(), part())
    for each in (x, x[:1]):
        with pytest.raises(ValueError, match=message), record_entropy(model):
            model(each)


class Broadcast(nn.Module):
    """Multiplies and sums, in a module whose name tells nothing."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.score, self.route = way, nn.Linear(16, 1), nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.bank, self.mix = nn.Parameter(torch.randn(3, 16)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(self, self.way)(x)
        return y.mean() + x


class Averages(Broadcast):
    """Averages the values of its keys."""

    def of_keys(self, x: Tensor) -> Tensor:
        return ((x @ x.mT).softmax(-1)[..., None] * x[..., None, :, :]).sum(-2)

    def the_other_way_round(self, x: Tensor) -> Tensor:
        weights = (x @ x.mT).softmax(-1).unsqueeze(-1)
        return torch.multiply(x.unsqueeze(1), functional.dropout(weights, 0.1)).sum(2)

    def of_heads(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 4)).transpose(1, 2)
        return ((q @ q.mT).softmax(-1)[..., None] * q[:, :, None]).sum(-2)

    def of_keys_before_rows(self, x: Tensor) -> Tensor:
        return ((x @ x.mT).softmax(-2)[..., None] * x[..., None, :]).sum(-3)

    def of_turned_weights(self, x: Tensor) -> Tensor:
        return ((x @ x.mT).softmax(-1).mT[..., None] * x[..., None, :]).sum(-3)

    def of_features_before_keys(self, x: Tensor) -> Tensor:
        return ((x @ x.mT).softmax(-1)[:, :, None] * x.mT[:, None]).sum(-1)

    def of_expanded(self, x: Tensor) -> Tensor:
        weights = (x @ x.mT).softmax(-1)[..., None].expand(-1, -1, -1, 16)
        return (weights * x[:, None].expand(-1, 7, -1, -1)).sum(-2)

    def of_one_text(self, x: Tensor) -> Tensor:
        return ((x[0] @ x[0].mT).softmax(-1)[..., None] * x[0]).sum(1)

    def of_added_scores(self, x: Tensor) -> Tensor:
        weights = self.score((x[:, :, None] + x[:, None]).tanh()).squeeze(-1).softmax(-1)
        return (weights[..., None] * x[:, None]).sum(2)


class Mixes(Broadcast):
    """Mixes what every row has made for itself, or what is learned."""

    def experts_of_tokens(self, x: Tensor) -> Tensor:
        made = torch.stack([expert(x) for expert in self.experts], -2)
        return (self.route(x).softmax(-1)[..., None] * made).sum(-2)

    def experts_in_front(self, x: Tensor) -> Tensor:
        made = torch.stack([expert(x) for expert in self.experts])
        weights = torch.softmax(input=self.route(x), dim=2)
        return (weights.permute(2, 0, 1)[..., None] * made).sum(0)

    def gates_before_experts(self, x: Tensor) -> Tensor:
        return (self.route(x).softmax(-1)[..., None] * x[:, :, None]).sum(-2)

    def a_bank(self, x: Tensor) -> Tensor:
        return (self.route(x).softmax(-1)[..., None] * self.bank).sum(-2)

    def a_bank_with_dimensions(self, x: Tensor) -> Tensor:
        return (self.route(x).softmax(-1)[..., None] * self.bank[None, None]).sum(-2)

    def a_bank_that_was_cast(self, x: Tensor) -> Tensor:
        return (self.route(x[:, 0]).softmax(-1)[..., None] * self.bank.double()[None]).sum(-2)

    def layers(self, x: Tensor) -> Tensor:
        return (self.mix.softmax(0)[:, None, None, None] * torch.stack([x, x + 1, x + 2])).sum(0)

    def clusters(self, x: Tensor) -> Tensor:  # NetVLAD
        return (self.route(x).softmax(-1)[..., None] * (x[:, :, None] - self.bank)).sum(1)

    def branches(self, x: Tensor) -> Tensor:
        weights = self.route(x.mean(1)).softmax(-1)
        return (weights[..., None, None] * torch.stack([x, x + 1, x + 2], 1)).sum(1)


def ways(kind: type[nn.Module]) -> list[str]:
    return [name for name in vars(kind) if not name.startswith("_")]


@pytest.mark.parametrize("way", ways(Averages))
def test_broadcast_products_that_average_are_refused(way: str, x: Tensor) -> None:
    model = nn.Sequential(Stack(), Averages(way))
    for each in (x, x[:1]):
        with (
            pytest.raises(ValueError, match="1 computes a softmax of its own"),
            record_entropy(model),
        ):
            model(each)


@pytest.mark.parametrize("way", ways(Mixes))
def test_broadcast_products_that_mix_are_let_pass(way: str, x: Tensor) -> None:
    model = nn.Sequential(Stack(), Mixes(way))
    for each in (x, x[:, :3], x[:1]):
        with record_entropy(model) as recording:
            model(each)
        assert (len(recording), recording.missing) == (2, [])


class Retention(nn.Module):
    """Products of queries and keys that decay, divided by their sum: mLSTM, RetNet."""

    def forward(self, x: Tensor) -> Tensor:
        gates = x.mean(-1).sigmoid().log().cumsum(-1)
        decay = (gates[:, :, None] - gates[:, None]).tril().exp()
        decay = decay / decay.sum(-1, keepdim=True).sqrt()
        scores = (x @ x.transpose(-1, -2)) * decay
        return (scores / scores.sum(-1, keepdim=True).abs().clamp(min=1)) @ x


class GaussianBlur(nn.Module):
    """As torchvision writes it: the product of two normalised kernels, then a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        density = torch.exp(-0.5 * torch.linspace(-1, 1, 3).pow(2))
        kernel = density / density.sum()
        kernel = torch.mm(kernel[:, None], kernel[None])
        return functional.conv2d(x[:, None], kernel[None, None], padding=1)[:, 0]


class CastHead(nn.Linear):
    """A softmax over 16 projected by weights that are no parameters, as those that were cast."""

    def __init__(self) -> None:
        super().__init__(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.softmax(-1), self.weight.double().float())


@pytest.mark.parametrize("part", [Retention, GaussianBlur, CastHead])
def test_exponentials_that_do_not_attend_are_let_pass(part: type[nn.Module], x: Tensor) -> None:
    model = nn.Sequential(Stack(), part())
    for grad in (True, False):
        with torch.set_grad_enabled(grad), record_entropy(model) as recording:
            model(x)
        assert (len(recording), recording.missing) == (2, [])


def test_a_wrapper_around_ours_is_no_endless_loop(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Stack()
    with record_entropy(model):
        model(x)
        ours = functional.scaled_dot_product_attention
    wanted = model(x)
    theirs = lambda *args, **options: ours(*args, **options)  # noqa: E731
    monkeypatch.setattr(functional, "scaled_dot_product_attention", theirs)
    with record_entropy(model) as recording:
        torch.testing.assert_close(model(x), wanted)
    assert len(recording) == 2
    torch.testing.assert_close(model(x), wanted)


def test_an_interrupted_watch_ends_with_the_next_one(x: Tensor) -> None:
    """KeyboardInterrupt runs no hooks; the model may be dropped, and another one made."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    interrupted, model, recorder = Stack(), Stack(), None
    interrupted.blocks[1].register_forward_hook(interrupt)
    recorder = SdpaRecorder(interrupted)
    recorder.start()
    with pytest.raises(KeyboardInterrupt):
        interrupted(x)
    del recorder, interrupted
    assert torch.overrides._get_current_function_mode() is not None
    with record_entropy(model) as recording:
        model(x)
    assert len(recording) == 2
    assert torch.overrides._get_current_function_mode() is None
    assert not watch._watching
    assert not watch._running
    interception._listeners.clear()  # of the model that was dropped
    interception.places().clear()
    interception._restore()


def test_what_runs_after_an_interrupted_pass_is_not_heard(x: Tensor) -> None:
    """Nor kept, by a recorder that will be asked for its next pass."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model, other = Stack(), Stack()
    expected = other(x)
    with record_entropy(model) as recording:
        hook = model.blocks[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        hook.remove()
        assert interception.places()
        torch.testing.assert_close(other(x), expected)
        assert not interception.places()
        assert torch.overrides._get_current_function_mode() is None
        heard = len(recording)
        model(x)
    assert [layer.name for layer in recording][heard:] == ["blocks.0", "blocks.1"]
    assert not any(layer.name.startswith("Stack") for layer in recording)


def test_replicas_of_data_parallel_are_heard(x: Tensor) -> None:
    """They share the hooks of the model, and are no modules of it."""
    model = Stack()
    with record_entropy(model) as recording:
        for _ in range(2):
            replica = model._replicate_for_data_parallel()
            replica.blocks = nn.ModuleList(
                block._replicate_for_data_parallel() for block in model.blocks
            )
            for copy_of, block in zip(replica.blocks, model.blocks, strict=True):
                copy_of.project, copy_of.out = block.project, block.out
            replica(x)
    assert [layer.name for layer in recording] == ["blocks.0", "blocks.1"] * 2


class InThreads(Stack):
    """Runs its blocks in a thread that waits for each."""

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            for block in self.blocks:
                x = x + pool.submit(block, x).result()
        return x


def test_parts_that_run_in_another_thread(x: Tensor) -> None:
    model, plain = InThreads(), Stack()
    plain.load_state_dict(model.state_dict())
    with record_entropy(plain) as expected:
        plain(x)
    with record_entropy(model) as recording:
        model(x)
    assert [layer.name for layer in recording] == ["blocks.0", "blocks.1"]
    torch.testing.assert_close(recording[1].entropy, expected[1].entropy)
    assert torch.overrides._get_current_function_mode() is None


class Flex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = flex_attention.flex_attention(x[:, None], x[:, None], x[:, None])
        return found


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(-1, -2), -1) @ x


@torch.no_grad()
def test_attention_inside_flex_attention_or_torch_jit_is_refused(x: Tensor) -> None:
    for part, message in (
        (Flex(), "1 calls flex_attention"),
        (torch.jit.script(Scripted()), r"1 attends inside torch\.jit"),
    ):
        model = nn.Sequential(Stack(), part)
        with pytest.raises(ValueError, match=message), record_entropy(model):
            model(x)


class BlockMasked(Stack):
    """Makes a mask for flex_attention, and calls a function of its own in a file of that name."""

    def forward(self, x: Tensor) -> Tensor:
        mask = flex_attention.create_block_mask(lambda b, h, q, k: q >= k, 2, 4, 7, 7, device="cpu")
        own: dict[str, Any] = {}
        exec(compile("def twice(x): return x + x", "my/attention/flex_attention.py", "exec"), own)
        return super().forward(own["twice"](x) * mask.shape[0])


class ScriptedHead(Stack):
    """A classifier that torch.jit runs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(super().forward(x))
        return y


@pytest.mark.parametrize("kind", [BlockMasked, ScriptedHead])
def test_what_only_looks_like_flex_attention_or_scripted_attention_is_let_pass(
    kind: type[Stack], x: Tensor
) -> None:
    model = kind()
    with record_entropy(model) as recording:
        model(x)
    assert (len(recording), recording.missing) == (2, [])


def test_a_compiled_function_inside_a_model_is_left_alone(x: Tensor) -> None:
    class Doubles(Stack):
        double = staticmethod(torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True))

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x).softmax(-1)
            return self.double(x)

    torch._dynamo.reset()
    model = Doubles()
    with record_entropy(model) as recording:
        model(x)
    assert len(recording) == 2


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, x = Stack(), torch.randn(2, 7, 16)
    with record_entropy(model) as recording:
        model(x)
    assert "blocks.1 (self) (2, 4, 7)" in repr(recording)
    assert recording[1].entropy.is_meta


class Alias(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ORIGINAL(x, x, x)


class Given(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = ORIGINAL

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x)


class MultiHeadAlias(MultiHead):
    def forward(self, x: Tensor) -> Tensor:
        part, x = self.attention, x.transpose(0, 1)
        given = (part.in_proj_weight, part.in_proj_bias, None, None, False, 0.0)
        out = (part.out_proj.weight, part.out_proj.bias)
        return MULTI_HEAD(x, x, x, 16, 4, *given, *out)[0].transpose(0, 1)


def test_multi_head_attention_imported_by_name_is_refused_at_every_pass(x: Tensor) -> None:
    for first in (Stack(), MultiHead()):
        model = nn.Sequential(first, MultiHeadAlias())
        for _ in range(2):
            message = "1 calls multi_head_attention_forward by another name"
            with pytest.raises(ValueError, match=message), record_entropy(model):
                model(x)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("part", [Alias, Given])
def test_a_function_imported_by_name_is_refused(
    part: type[nn.Module], compiled: bool, x: Tensor
) -> None:
    model = nn.Sequential(Stack(), part())
    torch._dynamo.reset()
    forward = torch.compile(model, backend="eager") if compiled else model
    message = "1 calls scaled_dot_product_attention by another name"
    with pytest.raises(ValueError, match=message), record_entropy(forward):
        forward(x)


def test_timm_vision_transformer() -> None:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision does not import beside a CPU torch
        pytest.skip(f"timm does not import here: {error}")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    image = torch.randn(2, 3, 32, 32)
    plain = model(image)
    with record_entropy(model) as recording:
        torch.testing.assert_close(model(image), plain, rtol=1e-4, atol=1e-5)
    assert [layer.name for layer in recording] == ["blocks.0.attn", "blocks.1.attn"]
    assert recording[0].entropy.shape == (2, 3, 5)
