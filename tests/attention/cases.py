"""Attention problems of odd sizes, and the comparison that every implementation must pass."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from entropy_regularization import AttentionOutput, attention_with_entropy
from entropy_regularization.attention.masking import Structure, Tile, tile_allowed


@dataclass
class Case:
    """One attention problem; ``shape`` is batch, heads, kv_heads, queries, keys, dim, value_dim."""

    name: str
    shape: tuple[int, int, int, int, int, int, int] = (2, 4, 2, 9, 9, 8, 8)
    options: dict[str, Any] = field(default_factory=dict)
    padding: bool = False
    documents: bool = False
    dense: tuple[int, int, int, int] | None = None
    bias: tuple[int, int, int, int] | None = None
    sinks: bool = False
    gain: float = 1.5

    def build(self, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], dict[str, Any]]:
        """Return what needs gradients (query, key, value, [bias], [sinks]) and the options."""
        generator = torch.Generator().manual_seed(len(self.name))
        batch, heads, kv_heads, n_queries, n_keys, dim, value_dim = self.shape

        def normal(*size: int) -> Tensor:
            tensor = torch.randn(*size, generator=generator, dtype=torch.float64)
            return tensor.to(dtype).to(device).requires_grad_()

        inputs = [
            normal(batch, heads, n_queries, dim),
            normal(batch, kv_heads, n_keys, dim),
            normal(batch, kv_heads, n_keys, value_dim),
        ]
        options = dict(self.options)
        options.setdefault("scale", self.gain * dim**-0.5)
        if self.padding:
            real = torch.rand(batch, n_keys, generator=generator) > 0.3
            real[0, : n_keys // 2] = False  # left padding: causal rows there see no key at all
            options["key_padding"] = real.to(device)
        if self.documents:
            ids = torch.randint(0, 3, (batch, n_keys), generator=generator)
            options["document"] = ids.sort(-1).values.to(device)
        if self.dense:
            allowed = torch.rand(self.dense, generator=generator) > 0.4
            options["allowed"] = allowed.to(device)
        if self.bias:
            inputs.append(normal(*self.bias))
        if self.sinks:
            inputs.append(normal(heads))
        return inputs, options

    def run(
        self, inputs: list[Tensor], options: dict[str, Any], implementation: str
    ) -> AttentionOutput:
        """Call attention_with_entropy on what build returned."""
        query, key, value = inputs[:3]
        rest = list(inputs[3:])
        named = dict(options)
        if self.bias:
            named["bias"] = rest.pop(0)
        if self.sinks:
            named["sinks"] = rest.pop(0)
        return attention_with_entropy(query, key, value, implementation=implementation, **named)


CASES = [
    Case("plain"),
    Case("single-row", (1, 2, 2, 1, 1, 4, 4)),
    Case("cross", (2, 3, 3, 5, 11, 8, 6)),
    Case("causal", options={"causal": True}),
    Case("causal-decode-one-token", (2, 4, 2, 1, 13, 8, 8), {"causal": True}),
    Case("causal-prefill-chunk", (1, 4, 4, 5, 13, 8, 8), {"causal": True}),
    Case("causal-more-queries-than-keys", (1, 2, 1, 9, 5, 8, 8), {"causal": True}),
    Case("causal-left-padding", options={"causal": True}, padding=True),
    Case("padding", padding=True),
    Case("window", options={"window": (2, 1)}),
    Case("window-left", (1, 4, 2, 17, 17, 8, 8), {"window": (3, None)}),
    Case("window-causal", (1, 4, 2, 17, 20, 8, 8), {"window": (4, None), "causal": True}),
    Case("documents-causal", (2, 2, 2, 13, 13, 8, 8), {"causal": True}, documents=True),
    Case("documents-padding", (2, 2, 2, 13, 13, 8, 8), padding=True, documents=True),
    Case("dense-per-head", dense=(1, 4, 9, 9)),
    Case("dense-per-batch-causal", options={"causal": True}, dense=(2, 1, 9, 9)),
    Case("dense-per-key", dense=(2, 1, 1, 9)),
    Case("bias-full", bias=(2, 4, 9, 9)),
    Case("bias-per-head", options={"causal": True}, bias=(1, 4, 9, 9)),
    Case("bias-alibi", options={"causal": True}, bias=(1, 4, 1, 9)),
    Case("bias-per-row", bias=(1, 1, 9, 1), padding=True),
    Case("softcap", options={"softcap": 1.5, "causal": True}),
    Case("softcap-bias-padding", options={"softcap": 2.0}, bias=(1, 4, 9, 9), padding=True),
    Case("sinks", options={"causal": True}, sinks=True),
    Case("sinks-window-padding", options={"window": (3, 0)}, sinks=True, padding=True),
    Case("grouped-query", (2, 6, 2, 7, 10, 12, 5), {"causal": True}),
    Case("multi-query", (1, 5, 1, 7, 7, 3, 3), {"causal": True}),
    Case(
        "everything",
        (2, 4, 2, 11, 14, 8, 5),
        {"causal": True, "window": (6, 2), "softcap": 3.0},
        padding=True,
        documents=True,
        dense=(1, 4, 11, 14),
        bias=(2, 1, 11, 14),
        sinks=True,
    ),
]


def upstream(outputs: AttentionOutput) -> list[Tensor]:
    """Random gradients for output, entropy and log-normalizer: none of them 1, none alike."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        for tensor in outputs[:3]
    ]


def gradients(outputs: AttentionOutput, inputs: list[Tensor]) -> list[Tensor]:
    """Differentiate through output, entropy and log-normalizer at once."""
    finite = outputs.log_normalizer.masked_fill(outputs.log_normalizer == -torch.inf, 0.0)
    differentiable = [outputs.output, outputs.entropy, finite]
    return list(torch.autograd.grad(differentiable, inputs, upstream(outputs)))


def worst_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest absolute difference; infinite where shapes, NaNs or infinities do not match."""
    worst = 0.0
    for ours, theirs in zip(got, expected, strict=True):
        if ours.shape != theirs.shape:
            return float("inf")
        ours, theirs = ours.double(), theirs.double()
        if not torch.equal(torch.isfinite(ours), torch.isfinite(theirs)) or ours.isnan().any():
            return float("inf")
        difference = (ours - theirs)[torch.isfinite(theirs)].abs()
        worst = max(worst, difference.max().item() if difference.numel() else 0.0)
    return worst


def check_rows_without_keys_pass_nothing_on(implementation: str, sinks: bool, device: str) -> None:
    """A NaN that arrives at a row without keys, as from ``where(n > 0, H / n, 0)``, stays there."""
    case = Case("empty-rows", (2, 2, 1, 9, 9, 8, 8), {"causal": True}, padding=True, sinks=sinks)
    inputs, options = case.build(torch.float32, device)
    found = case.run(inputs, options, implementation)
    empty = found.allowed_keys.expand_as(found.entropy) == 0
    assert empty.any()
    derivatives = []
    for poison in (0.0, torch.nan):
        given = [
            torch.ones_like(tensor).masked_fill(
                empty if tensor.ndim == 3 else empty[..., None], poison
            )
            for tensor in found[:2]
        ]
        normalizer = torch.ones_like(found.log_normalizer).masked_fill(empty, poison)
        derivatives.append(
            torch.autograd.grad(found[:3], inputs, [*given, normalizer], retain_graph=True)[:3]
        )  # not those of sinks, which are the log-normalizers of rows without keys
    assert all(map(torch.equal, *derivatives))


def check_a_sink_of_infinity_leaves_nothing(
    implementation: str, dtype: torch.dtype, device: str
) -> None:
    """Output, entropy and gradients are 0 beside it, not NaN; the log-normalizer is the sink."""
    case = next(case for case in CASES if case.name == "sinks-window-padding")
    inputs, options = case.build(dtype, device)
    with torch.no_grad():
        inputs[-1][1] = torch.inf
    found = case.run(inputs, options, implementation)
    assert (found.output[:, 1] == 0).all()
    assert (found.entropy[:, 1] == 0).all()
    assert (found.log_normalizer[:, 1] == torch.inf).all()
    derivatives = gradients(found, inputs)
    assert all(each.isfinite().all() for each in (*found[:2], *derivatives))
    assert (derivatives[0][:, 1] == 0).all()
    assert torch.allclose(derivatives[-1][1], upstream(found)[2][:, 1].sum())


def check_large_scores(implementation: str, dtype: torch.dtype, device: str) -> None:
    """Scores beyond float16's range: a row that one key has won has no gradient left to give.

    A log-normalizer that was rounded on its way to nats and back would leave weights that sum to
    1.002 and an entropy gradient of 12.
    """
    generator = torch.Generator().manual_seed(0)
    gain = 200.0 if dtype == torch.float16 else 60.0
    query, key, value = (torch.randn(1, 2, 40, 16, generator=generator) for _ in range(3))
    inputs = [
        tensor.to(dtype).to(device).requires_grad_() for tensor in (gain * query, gain * key, value)
    ]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = (
        attention_with_entropy(*tensors, scale=1.0, implementation=name)
        for tensors, name in ((inputs, implementation), (exact, "reference"))
    )
    assert found.max_score.max() > (torch.finfo(torch.float16).max if gain > 100 else 5e4)
    assert torch.isfinite(found.log_normalizer).all()
    assert worst_error([found.entropy], [expected.entropy]) <= 1e-2
    won = expected.entropy < 1e-30
    assert won.float().mean() > 0.8
    # What rounding of the product is left: a GPU subtracts the normalizer in a multiply-add, and
    # the interpreter's products of other shapes, in other kernels, round by the machine.
    left = 0.0
    if implementation == "triton":
        left = torch.finfo(torch.float32).eps * found.max_score.max().item()
    (by_query,) = torch.autograd.grad(found.entropy.sum(), inputs[0], retain_graph=True)
    assert by_query[won].abs().max() <= 1e-20 + left * inputs[1].abs().max()
    (by_value,) = torch.autograd.grad(found.output[..., 0].sum(), inputs[2])
    assert (by_value[..., 0].float().sum(-1) / 40 - 1).abs().max() <= 1e-3 + left


def naive_in_dtype(case: Case, inputs: list[Tensor], options: dict[str, Any]) -> AttentionOutput:
    """Attention as models write it: every step rounded to the dtype of the inputs."""
    query, key, value, *rest = inputs
    group = query.shape[1] // key.shape[1]
    score = query @ key.repeat_interleave(group, 1).mT * options["scale"]
    if "softcap" in options:
        score = options["softcap"] * torch.tanh(score / options["softcap"])
    if case.bias:
        score = score + rest.pop(0)
    n_queries, n_keys = score.shape[-2:]
    left, right = options.get("window", (None, None))
    right = 0 if options.get("causal") else right
    masks = (options.get(name) for name in ("allowed", "key_padding", "document"))
    structure = Structure(left, right, *masks)
    whole = Tile(0, n_queries, 0, n_keys)
    allowed = tile_allowed(structure, whole, n_queries, n_keys, query.device)
    if allowed is None:
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    allowed = allowed.expand(score.shape)
    empty = ~allowed.any(-1, keepdim=True)
    score = score.masked_fill(~allowed, -torch.inf)
    if not case.sinks:
        score = score.masked_fill(empty, 0.0)
    else:
        sink = rest.pop(0)[None, :, None, None].expand(*score.shape[:3], 1)
        score = torch.cat((score, sink), -1)
    log_weight = score.log_softmax(-1)[..., :n_keys]
    weight = log_weight.exp().masked_fill(~allowed, 0.0)
    entropy = -(weight * log_weight.masked_fill(~allowed, 0.0)).sum(-1)
    normalizer = score.logsumexp(-1)
    if not case.sinks:
        normalizer = normalizer.masked_fill(empty[..., 0], 0.0)
    output = weight @ value.repeat_interleave(group, 1)
    return AttentionOutput(output, entropy.float(), normalizer.float(), entropy, entropy)


def check_error_is_at_most_that_of_naive_attention(
    case: Case, dtype: torch.dtype, device: str
) -> None:
    """Against float64, for output, entropy and every gradient: the error of the kernels.

    It is at most that of naive PyTorch in the same dtype plus a rounding of the largest number;
    eight in float32, where the scores' base 2, the softcap's tanh and the order of sums (it differs
    between machines) cost as much as rounding does.
    """
    inputs, options = case.build(dtype, device)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = case.run(exact, options, "reference")
    got = case.run(inputs, options, "triton")
    naive = naive_in_dtype(case, inputs, options)
    assert got.entropy.dtype == torch.float32
    assert worst_error([got.entropy], [truth.entropy]) <= 1e-4
    assert worst_error([got.log_normalizer], [truth.log_normalizer]) <= 1e-4
    ours = [got.output, got.entropy, *gradients(got, inputs)]
    theirs = [naive.output, naive.entropy, *gradients(naive, inputs)]
    right = [truth.output, truth.entropy, *gradients(truth, exact)]
    roundings = 8 if dtype == torch.float32 else 1
    for mine, plain, true in zip(ours, theirs, right, strict=True):
        budget = roundings * torch.finfo(mine.dtype).eps * true.abs().max().item()
        if mine.dtype != dtype:
            budget *= 4  # the entropy: float32 whatever the inputs
        assert worst_error([mine], [true]) <= worst_error([plain], [true]) + budget
