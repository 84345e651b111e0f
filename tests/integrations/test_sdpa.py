"""Any PyTorch model that calls scaled_dot_product_attention: entropies, gradients, refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from entropy_regularization import EntropyRegularization, record_entropy
from entropy_regularization.integrations.unseen import attends_by_source

ORIGINAL = functional.scaled_dot_product_attention


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
    assert functional.scaled_dot_product_attention is ORIGINAL


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


@pytest.mark.parametrize(
    "kind", ["boolean", "additive", "3-D", "grouped", "two dimensions", "one query for all"]
)
def test_masks_and_shapes(kind: str, x: Tensor) -> None:
    q = x.unflatten(-1, (4, 4)).transpose(1, 2)
    allowed = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    allowed |= torch.eye(7, dtype=torch.bool)
    calls: dict[str, Callable[[], Tensor]] = {
        "boolean": lambda: functional.scaled_dot_product_attention(q, q, q, attn_mask=allowed),
        "additive": lambda: functional.scaled_dot_product_attention(
            q, q, q, attn_mask=torch.zeros(7, 7).masked_fill(~allowed[0, 0], -torch.inf)
        ),
        "3-D": lambda: functional.scaled_dot_product_attention(x, x, x, attn_mask=allowed[:, 0]),
        "grouped": lambda: functional.scaled_dot_product_attention(
            q, q[:, :2], q[:, :2], enable_gqa=True, scale=0.3
        ),
        "two dimensions": lambda: functional.scaled_dot_product_attention(x[0], x[0], x[0]),
        "one query for all": lambda: functional.scaled_dot_product_attention(
            q[:1], q, q, attn_mask=allowed
        ),
    }

    class Caller(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return calls[kind]()

    plain = calls[kind]()
    model = Caller()
    with record_entropy(model) as recording:
        output = model(x)
    torch.testing.assert_close(output, plain)
    if kind in ("boolean", "one query for all"):
        queries = q if kind == "boolean" else q[:1]
        expected = by_hand(queries, q, allowed)
        torch.testing.assert_close(recording[0].entropy, expected, rtol=0, atol=1e-5)


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
    assert functional.scaled_dot_product_attention is ORIGINAL
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
        self.attention.forward = lambda x: functional.softmax(x @ x.transpose(-1, -2), -1) @ x  # type: ignore[method-assign]

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


def test_state_is_restored_after_an_exception_and_two_models_do_not_mix(x: Tensor) -> None:
    one, two = Stack(layers=1), Stack(layers=2)
    with pytest.raises(RuntimeError, match="mine"), record_entropy(one):
        raise RuntimeError("mine")
    assert functional.scaled_dot_product_attention is ORIGINAL
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


def penalised(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return gradients of a sum of outputs and entropies, backward inside the context."""
    parameters = list(model.parameters())
    with record_entropy(model) as recording:
        total = model(x).square().mean()
        total = total + sum(layer.entropy.square().sum() for layer in recording)
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


class Checkpointed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


def test_checkpointing_with_backward_inside_the_context(x: Tensor) -> None:
    plain, model = Stack(), Checkpointed()
    model.load_state_dict(plain.state_dict())
    for one, two in zip(penalised(model, x), penalised(plain, x), strict=True):
        torch.testing.assert_close(one, two)
    with record_entropy(model) as recording:
        output = model(x)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):  # never a wrong gradient
        (output.sum() + recording[0].entropy.sum()).backward()


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


class Commented(nn.Module):
    """Its softmax( is a gate; a @ b is only spoken of."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.softmax(-1)  # not weights @ values


def test_comments_are_not_read_as_source() -> None:
    assert attends_by_source(Commented) is None
    assert attends_by_source(Mixing) is not None


class DeformableAttention(nn.Module):
    """Weighs values sampled at a few places, as deformable DETR does."""

    def forward(self, x: Tensor) -> Tensor:
        weights = functional.softmax(x[..., :4], -1)  # [batch, queries, places]
        return (x[:, :, None, :].expand(-1, -1, 4, -1) * weights[..., None]).sum(2)


def test_deformable_attention_is_refused_by_name(x: Tensor) -> None:
    model = nn.Sequential(Stack(), DeformableAttention())
    message = "1 weighs sampled values by a softmax of its own"
    with pytest.raises(ValueError, match=message), record_entropy(model):
        model(x)


class Alias(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ORIGINAL(x, x, x)


def test_a_function_imported_by_name_is_refused(x: Tensor) -> None:
    model = nn.Sequential(Stack(), Alias())
    message = "1 calls scaled_dot_product_attention by another name"
    with pytest.raises(ValueError, match=message), record_entropy(model):
        model(x)


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
