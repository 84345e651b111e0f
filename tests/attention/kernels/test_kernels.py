"""The kernels equal the specification: outputs, statistics, and the gradient of every input.

Without a GPU the same sources run by Triton's interpreter; with one, these tests are marked gpu.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    Case,
    check_a_sink_of_infinity_leaves_nothing,
    check_error_is_at_most_that_of_naive_attention,
    check_large_scores,
    check_rows_without_keys_pass_nothing_on,
    gradients,
    naive_in_dtype,
    worst_error,
)
from torch import Tensor

from entropy_regularization import attention_with_entropy
from entropy_regularization.attention.triton.support import is_interpreted
from entropy_regularization.attention.triton.views import strides_by_8

if torch.cuda.is_available():
    pytestmark = pytest.mark.gpu
interpreted = pytest.mark.skipif(not is_interpreted(), reason="float64 runs interpreted only")

# Several tiles in both directions: whole ones, cut ones, and some that are never touched.
TILED = [
    Case("tiled-causal", (1, 2, 1, 37, 37, 20, 9), {"causal": True}),
    Case("tiled-window", (1, 1, 1, 53, 61, 16, 16), {"window": (9, 4)}),
    Case("tiled-window-left", (1, 1, 1, 40, 53, 16, 16), {"window": (11, None)}),
    Case("tiled-window-causal", (1, 2, 2, 50, 50, 24, 40), {"window": (18, 0)}),
    Case("tiled-cross", (1, 2, 2, 35, 50, 16, 16)),
    Case("tiled-negative-scale", (1, 1, 1, 37, 37, 16, 16), {"causal": True, "scale": -0.3}),
    Case("tiled-padding", (2, 2, 1, 35, 41, 16, 16), {"causal": True}, padding=True),
    Case("tiled-documents", (2, 1, 1, 60, 60, 16, 16), {"causal": True}, documents=True),
    Case("tiled-documents-cross", (2, 1, 1, 40, 60, 16, 16), documents=True, padding=True),
    Case("tiled-bias", (2, 1, 1, 35, 41, 16, 16), {"causal": True}, bias=(1, 1, 35, 41)),
    Case("tiled-bias-keys", (2, 1, 1, 20, 41, 16, 16), bias=(1, 1, 1, 41)),
    Case("tiled-bias-rows", (1, 2, 2, 35, 20, 16, 16), bias=(1, 1, 35, 1)),
    Case("tiled-bias-one", (1, 2, 2, 20, 41, 16, 16), bias=(1, 1, 1, 1)),
    Case(
        "tiled-everything",
        (1, 2, 1, 37, 45, 18, 7),
        {"causal": True, "window": (29, 3), "softcap": 3.0},
        padding=True,
        documents=True,
        dense=(1, 2, 37, 45),
        bias=(1, 1, 37, 45),
        sinks=True,
    ),
]


def agree(case: Case, dtype: torch.dtype, device: str, budget: float) -> None:
    inputs, options = case.build(dtype, device)
    expected = case.run(inputs, options, "reference")
    got = case.run(inputs, options, "triton")
    assert worst_error(list(got), list(expected)) <= budget
    assert worst_error(gradients(got, inputs), gradients(expected, inputs)) <= budget


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_reference(case: Case, device: str, set_tiles: Any) -> None:
    set_tiles(16, 16)
    agree(case, torch.float32, device, 1e-5)


@pytest.mark.parametrize("tiles", [(16, 32), (32, 16)])
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_equals_reference_over_many_tiles(
    case: Case, tiles: tuple[int, int], device: str, set_tiles: Any
) -> None:
    set_tiles(*tiles)
    agree(case, torch.float32, device, 2e-5)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_keys_pass_nothing_on(sinks: bool, device: str, set_tiles: Any) -> None:
    set_tiles(16, 16)
    check_rows_without_keys_pass_nothing_on("triton", sinks, device)


def test_a_sink_of_infinity_leaves_nothing(device: str, set_tiles: Any) -> None:
    set_tiles(16, 16)
    check_a_sink_of_infinity_leaves_nothing("triton", torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_large_scores(dtype: torch.dtype, device: str) -> None:
    check_large_scores("triton", dtype, device)


@interpreted
@pytest.mark.parametrize(
    "case", [TILED[3], TILED[5], TILED[8], *CASES[-5:]], ids=lambda case: case.name
)
def test_equals_reference_in_float64(case: Case, device: str, set_tiles: Any) -> None:
    set_tiles(16, 16)
    # tanh is a series near zero, 4e-7 at worst; the rest is exact
    agree(case, torch.float64, device, 1e-7 if "softcap" in case.options else 1e-12)


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [
        ((1, 1), torch.float32),
        ((64, 64), torch.bfloat16),
        ((80, 80), torch.bfloat16),
        ((128, 48), torch.float32),
        ((192, 256), torch.bfloat16),
    ],
)
def test_own_tiles_of_every_head_dimension(
    dims: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    case = Case("own-tiles", (1, 1, 1, 70, 70, *dims), {"causal": True}, gain=1.0)
    agree(case, dtype, device, 2e-5 if dtype == torch.float32 else 6e-2)


# What the tiles of a device divide into several, whole and cut.
SEVERAL_OWN_TILES = [
    Case("own-tiles-causal", (1, 2, 1, 270, 270, 64, 64), {"causal": True}),
    Case("own-tiles-causal-16", (1, 1, 1, 150, 270, 16, 16), {"causal": True}),
    Case("own-tiles-causal-32", (1, 1, 1, 150, 270, 32, 24), {"causal": True}),
    Case("own-tiles-causal-128", (1, 1, 1, 140, 270, 128, 96), {"causal": True}),
    Case("own-tiles-narrow-values", (1, 1, 1, 140, 140, 128, 32), {"causal": True}),
    Case("own-tiles-widest", (1, 1, 1, 150, 150, 256, 256), {"causal": True}),
    Case("own-tiles-window", (1, 1, 1, 400, 400, 64, 64), {"window": (150, 0)}),
    Case("own-tiles-padding", (2, 1, 1, 150, 270, 64, 64), padding=True),
    Case("own-tiles-documents", (1, 1, 1, 400, 400, 64, 64), {"causal": True}, documents=True),
    Case("own-tiles-sinks-softcap", (1, 2, 2, 140, 270, 64, 64), {"softcap": 4.0}, sinks=True),
    # 272 keys: loads of 16 bytes
    Case("own-tiles-bias", (1, 2, 1, 150, 272, 64, 64), {"causal": True}, bias=(1, 2, 150, 272)),
    Case("own-tiles-dense", (1, 2, 1, 150, 272, 64, 64), dense=(1, 1, 150, 272)),
    Case(
        "own-tiles-everything",
        (1, 2, 1, 100, 150, 72, 40),
        {"causal": True, "window": (120, 2), "softcap": 3.0},
        padding=True,
        documents=True,
        dense=(1, 2, 100, 150),
        bias=(1, 1, 100, 150),
        sinks=True,
    ),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", SEVERAL_OWN_TILES, ids=lambda case: case.name)
def test_error_is_at_most_that_of_naive_attention_in_own_tiles(
    case: Case, dtype: torch.dtype, device: str
) -> None:
    check_error_is_at_most_that_of_naive_attention(case, dtype, device)


def test_strides_of_8_are_known_and_those_of_one_position_do_not_matter(
    device: str, set_tiles: Any
) -> None:
    """A width of 72, in either layout; one query, one head and one batch entry of any stride."""
    set_tiles(16, 16)
    generator = torch.Generator().manual_seed(0)
    several, one = (torch.randn(2, 20, n, 72, generator=generator).to(device) for n in (2, 1))
    by_head = several.transpose(1, 2)
    any_stride = one[0, 0].as_strided((1, 1, 1, 72), (3, 5, 7, 1))
    keys = several[0, :, 0].as_strided((1, 1, 20, 72), (3, 5, 72, 1))
    assert strides_by_8(several, by_head, any_stride, keys)
    assert not strides_by_8(several[..., :70].contiguous(), by_head)  # 70
    assert not strides_by_8(several[..., :64].contiguous())  # 64: the compiler sees 16
    for given in ([several] * 3, [by_head, by_head.flip(3), by_head], [any_stride, keys, keys]):
        found = []
        for name in ("triton", "reference"):
            tensors = [tensor.detach().requires_grad_() for tensor in given]
            got = attention_with_entropy(*tensors, causal=True, implementation=name)
            found.append([got.output, got.entropy, *gradients(got, tensors)])
        assert worst_error(*found) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case", [*TILED, CASES[0], CASES[23], CASES[25]], ids=lambda case: case.name
)
def test_error_is_at_most_that_of_naive_attention(
    case: Case, dtype: torch.dtype, device: str, set_tiles: Any
) -> None:
    set_tiles(16, 32)
    check_error_is_at_most_that_of_naive_attention(case, dtype, device)


def test_naive_attention_is_attention() -> None:
    """In float64 it is the reference, so that its error is one of rounding."""
    for case in (*CASES, *TILED):
        inputs, options = case.build(torch.float64)
        truth, naive = case.run(inputs, options, "reference"), naive_in_dtype(case, inputs, options)
        found = [naive.output, naive.entropy.double(), *gradients(naive, inputs)]
        expected = [truth.output, truth.entropy, *gradients(truth, inputs)]
        assert worst_error(found, expected) <= 1e-6


def filled_with_nan(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_nan(*arguments: Any, **options: Any) -> Tensor:
        tensor = allocate(*arguments, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return allocate_nan


def surrounded_by_nan(tensor: Tensor) -> Tensor:
    """Return the same numbers inside a larger buffer of NaN, so that reading past an end shows."""
    buffer = tensor.new_full([size + 7 for size in tensor.shape], torch.nan)
    inner = buffer[tuple(slice(3, 3 + size) for size in tensor.shape)]
    inner.copy_(tensor.detach())
    return inner.detach().requires_grad_()


@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_nothing_uninitialised_is_read_or_left(
    case: Case, device: str, set_tiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tiles(16, 16)
    inputs, options = case.build(torch.float32, device)
    expected = case.run(inputs, options, "reference")
    right = gradients(expected, inputs)
    inside = [surrounded_by_nan(tensor) for tensor in inputs]
    for owner, name in ((torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled_with_nan(getattr(owner, name)))
    got = case.run(inside, options, "triton")
    found = gradients(got, inside)
    assert torch.empty_like(inputs[0]).isnan().all()
    assert worst_error(list(got), list(expected)) <= 2e-5
    assert worst_error(found, right) <= 2e-5


SKIPPING: list[tuple[str, dict[str, Any]]] = [
    ("window", {"window": (5, 0)}),
    ("padding", {"key_padding": torch.arange(64)[None] >= 32}),
    ("documents", {"document": (torch.arange(64)[None] >= 32).long()}),
]


@pytest.mark.parametrize(("name", "options"), SKIPPING, ids=[name for name, _ in SKIPPING])
def test_excluded_tiles_are_never_touched(
    name: str, options: dict[str, Any], device: str, set_tiles: Any
) -> None:
    """The first half of the keys is NaN, and no row of the second half may notice."""
    set_tiles(16, 16)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 1, 64, 16, generator=generator).to(device) for _ in range(3)
    )
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    query = query[:, :, 48:] if name == "window" else query[:, :, 32:]
    key[:, :, :32], value[:, :, :32] = torch.nan, torch.nan
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    got = attention_with_entropy(*inputs, implementation="triton", **options)
    assert not any(tensor.isnan().any() for tensor in got)
    found = torch.autograd.grad(got.output.sum() + got.entropy.square().sum(), inputs)
    assert not any(gradient.isnan().any() for gradient in found)
    assert (found[2][:, :, :32] == 0).all()
    assert (found[2][:, :, 48:] != 0).any()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "column-major", "expanded"])
def test_any_strides(layout: str, device: str, set_tiles: Any) -> None:
    set_tiles(16, 16)
    generator = torch.Generator().manual_seed(0)

    def make() -> Tensor:
        if layout == "transposed":
            tensor = torch.randn(2, 19, 3, 8, generator=generator).transpose(1, 2)
        elif layout == "sliced":
            tensor = torch.randn(2, 3, 19, 24, generator=generator)[..., 5:13]
        elif layout == "column-major":
            tensor = torch.randn(2, 3, 8, 19, generator=generator).mT
        else:
            tensor = torch.randn(1, 1, 19, 8, generator=generator).expand(2, 3, 19, 8)
        return tensor.to(device).detach().requires_grad_()

    inputs = [make() for _ in range(3)]
    results = []
    for implementation in ("reference", "triton"):
        got = attention_with_entropy(*inputs, causal=True, implementation=implementation)
        weight = torch.linspace(-1, 1, got.output.numel(), device=device).view(2, 19, 3, 8)
        total = (got.output.transpose(1, 2) * weight).sum() + got.entropy.square().sum()
        results.append([*got[:4], *torch.autograd.grad(total, inputs)])
    if layout == "transposed":
        assert results[1][0].transpose(1, 2).is_contiguous()
    assert worst_error(results[1], results[0]) <= 1e-5


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [4], [0, 4], [1, 2], [2, 3]])
def test_any_subset_of_inputs_may_need_a_gradient(
    wanted: list[int], device: str, set_tiles: Any
) -> None:
    set_tiles(16, 16)
    inputs, options = CASES[-1].build(torch.float32, device)
    for place, tensor in enumerate(inputs):
        tensor.requires_grad_(place in wanted)
    chosen = [inputs[place] for place in wanted]
    found = []
    for implementation in ("reference", "triton"):
        got = CASES[-1].run(inputs, options, implementation)
        total = got.output.square().sum() + got.entropy.square().sum()
        found.append(torch.autograd.grad(total, chosen, materialize_grads=True, allow_unused=True))
    assert worst_error(list(found[1]), list(found[0])) <= 1e-5


@pytest.mark.parametrize("through", ["output", "entropy", "log_normalizer", "max_score"])
def test_upstream_gradients_may_be_missing(through: str, device: str, set_tiles: Any) -> None:
    set_tiles(16, 16)
    case = next(case for case in CASES if case.name == "sinks")
    inputs, options = case.build(torch.float32, device)
    found = []
    for implementation in ("reference", "triton"):
        got = getattr(case.run(inputs, options, implementation), through)
        if through == "max_score":
            assert not got.requires_grad
            return
        found.append(
            torch.autograd.grad(
                got.square().sum(), inputs, allow_unused=True, materialize_grads=True
            )
        )
    assert worst_error(list(found[1]), list(found[0])) <= 2e-5


def test_a_window_wider_than_any_integer_of_the_device_is_none(device: str, set_tiles: Any) -> None:
    set_tiles(16, 16)
    inputs, _ = TILED[0].build(torch.float32, device)
    expected = attention_with_entropy(*inputs, implementation="reference")
    for wide in ((2**31 - 1, 2**31 - 1), (2**40, 2**62)):
        got = attention_with_entropy(*inputs, window=wide, implementation="triton")
        assert worst_error(list(got[:4]), list(expected[:4])) <= 2e-5


def test_minus_infinity_in_a_bias_masks_its_key(device: str, set_tiles: Any) -> None:
    set_tiles(16, 16)
    inputs, _ = CASES[0].build(torch.float32, device)
    allowed = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    allowed[..., 4, :] = False
    allowed = allowed.to(device)
    bias = torch.zeros(1, 1, 9, 9, device=device).masked_fill(~allowed, -torch.inf)
    masked = attention_with_entropy(*inputs, allowed=allowed, implementation="reference")
    biased = attention_with_entropy(*inputs, bias=bias, implementation="triton")
    assert worst_error(list(biased[:4]), list(masked[:4])) <= 1e-5
    assert worst_error(gradients(biased, inputs), gradients(masked, inputs)) <= 1e-5


def test_rows_without_keys_are_zero_and_carry_no_gradient(device: str, set_tiles: Any) -> None:
    set_tiles(16, 16)
    inputs, options = TILED[6].build(torch.float32, device)
    got = TILED[6].run(inputs, options, "triton")
    empty = got.allowed_keys.expand_as(got.entropy) == 0
    assert empty.any()
    assert (got.entropy[empty] == 0).all()
    assert (got.output[empty] == 0).all()
    assert (got.log_normalizer[empty] == -torch.inf).all()
    # a gradient scaled up, as by a GradScaler, must not overflow on its way to nothing
    found = torch.autograd.grad(65536.0 * got.entropy.sum() + got.output.sum(), inputs)
    assert (found[0][empty] == 0).all()
    assert (found[0][~empty] != 0).any()


@pytest.mark.parametrize("where", ["query", "key", "bias"])
def test_nan_shows_in_every_row_that_sees_it(where: str, device: str, set_tiles: Any) -> None:
    """The maximum of a GPU passes over NaN (not the interpreter's, but that of tests/ptx does)."""
    set_tiles(16, 16)
    inputs, _ = TILED[0].build(torch.float32, device)
    bias = torch.zeros(1, 1, inputs[0].shape[2], inputs[1].shape[2], device=device)
    given = {"query": inputs[0][:, :, 5], "key": inputs[1][:, :, 3], "bias": bias[:, :, 5, 3]}
    given[where].detach().fill_(torch.nan)
    options = {"bias": bias} if where == "bias" else {}
    got = attention_with_entropy(*inputs, implementation="triton", **options)
    rows = torch.arange(inputs[0].shape[2], device=device)
    nan = (rows == 5) | (where == "key")
    for tensor in (got.output[..., 0], *got[1:4]):
        assert torch.equal(tensor.isnan(), nan.expand_as(tensor))
    (by_query,) = torch.autograd.grad(got.output.sum() + got.entropy.sum(), inputs[0])
    assert by_query[:, :, nan].isnan().all()


@pytest.mark.parametrize("sizes", [(0, 2, 7, 9), (2, 2, 0, 9), (2, 2, 7, 0)])
def test_empty_batch_queries_or_keys(sizes: tuple[int, ...], device: str) -> None:
    batch, heads, n_queries, n_keys = sizes
    inputs = [
        torch.randn(batch, heads, n, 8, requires_grad=True, device=device)
        for n in (n_queries, n_keys, n_keys)
    ]
    got = attention_with_entropy(*inputs, implementation="triton")
    assert got.output.shape == (batch, heads, n_queries, 8)
    assert (got.entropy == 0).all()
    (got.output.sum() + got.entropy.sum()).backward()
    assert all(tensor.grad is not None and (tensor.grad == 0).all() for tensor in inputs)


def test_entropy_survives_a_large_common_score(device: str, set_tiles: Any) -> None:
    """MATHEMATICS: ``lse - E[s]`` of unshifted scores loses 2e-3 at an offset of 1e4."""
    set_tiles(16, 16)
    inputs, _ = TILED[4].build(torch.float32, device)
    plain = attention_with_entropy(*inputs, implementation="triton")
    # an offset whose sum with a score is exact in float32 leaves the softmax what it was
    query, key, value = (tensor.detach() for tensor in inputs)
    wide = [torch.cat((x, torch.zeros_like(x[..., :1])), -1) for x in (query, key)]
    wide[0][..., -1], wide[1][..., -1] = 100.0, 400.0
    shifted = attention_with_entropy(
        wide[0], wide[1], value, scale=query.shape[-1] ** -0.5, implementation="triton"
    )
    exact = attention_with_entropy(
        wide[0].double(), wide[1].double(), value.double(), scale=query.shape[-1] ** -0.5
    )
    assert shifted.max_score.min() > 9000
    assert worst_error([shifted.entropy], [exact.entropy]) <= 5e-3
    assert worst_error([plain.entropy], [exact.entropy]) <= 1e-5


def test_repeats_are_bit_identical(device: str, set_tiles: Any) -> None:
    set_tiles(16, 16)
    inputs, options = TILED[-1].build(torch.float32, device)
    first = TILED[-1].run(inputs, options, "triton")
    again = TILED[-1].run(inputs, options, "triton")
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    pairs = zip(gradients(first, inputs), gradients(again, inputs), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
