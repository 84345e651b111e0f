"""The compiled kernel equals the specification, and where it cannot be built nothing is lost."""

import ctypes
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    Case,
    check_large_scores,
    check_rows_without_keys_pass_nothing_on,
    gradients,
    worst_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from entropy_regularization import AttentionOutput, attention_with_entropy
from entropy_regularization.attention.api import attend
from entropy_regularization.attention.blockwise.problem import MASKED_SCORE, Problem
from entropy_regularization.attention.compiled import build, cutting, passes
from entropy_regularization.attention.masking import Structure
from entropy_regularization.attention.operators import blockwise_backward, blockwise_forward

here = pytest.mark.skipif(
    build.unavailable_reason() is not None, reason=f"no kernel: {build.unavailable_reason()}"
)
linux = pytest.mark.skipif(platform.system() != "Linux", reason="it is built on Linux alone")
SUPPORTED = [case for case in CASES if not (case.dense or case.bias or "softcap" in case.options)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, stripes, tiles and segments in a problem of any size."""
    use_small_cuts(monkeypatch)


def use_small_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(structure: Structure, n_queries: int, n_keys: int, group: int) -> cutting.Cut:
        whole = cutting._cut(structure, n_queries, n_keys, group)
        hulls = cutting._hulls(*whole.of_rows, 3, n_keys)
        return whole._replace(rows=3, stripe=32, tile=16, of_blocks=hulls)

    monkeypatch.setattr(passes, "cut", cut)
    monkeypatch.setattr(passes, "DEPTH", 2)
    monkeypatch.setattr(passes, "_segments", lambda units, stripes: min(3, stripes))


def compare(case: Case, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return (compiled, exact) pairs of statistics and gradients; check that it did run."""
    inputs, options = case.build(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = case.run(exact, options, "reference")
    got = case.run(inputs, options, "compiled")
    assert torch.equal(got.allowed_keys, expected.allowed_keys)
    pairs = zip(got[:4], expected[:4], strict=True)
    return [*pairs, *zip(gradients(got, inputs), gradients(expected, exact), strict=True)]


@here
@pytest.mark.parametrize("case", SUPPORTED, ids=lambda case: case.name)
@pytest.mark.parametrize("sizes", ["chosen", "small"])
def test_it_equals_the_reference(case: Case, sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if sizes == "small":
        use_small_cuts(monkeypatch)
    for mine, true in compare(case, torch.float32):
        assert worst_error([mine], [true]) <= 5e-6


@here
@pytest.mark.parametrize("case", SUPPORTED, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", ["chosen", "small"])
def test_low_precision_error_is_that_of_rounding_the_results(
    case: Case, dtype: torch.dtype, sizes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sizes == "small":
        use_small_cuts(monkeypatch)
    output, *statistics, q, k, v = compare(case, dtype)[:7]
    for mine, true in statistics:
        assert mine.dtype == torch.float32
        assert worst_error([mine], [true]) <= 1e-5
    for mine, true in (output, q, k, v):
        assert mine.dtype == dtype
        budget = 2 * torch.finfo(dtype).eps * (1 + true.abs().max().item())
        assert worst_error([mine], [true]) <= budget


LARGE = [
    Case("wide", (1, 2, 1, 1301, 1301, 16, 8), {"causal": True}),
    Case("wide-window", (1, 1, 1, 1301, 1301, 16, 16), {"causal": True, "window": (700, 0)}),
    Case("narrow-window", (1, 2, 2, 1301, 1301, 16, 16), {"window": (100, 30)}),
    Case("all", (1, 3, 3, 197, 2500, 16, 16)),
    Case("shuffled-documents", (2, 2, 1, 1301, 1301, 16, 16), {"causal": True}, documents=True),
    Case("padding", (2, 2, 1, 700, 700, 16, 16), {"causal": True}, padding=True, sinks=True),
    Case("decode", (2, 8, 2, 1, 3000, 16, 16), {"causal": True}),
    Case("peaked", (1, 2, 2, 700, 700, 16, 16), {"causal": True}, gain=40.0),
]


@here
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_blocks_stripes_and_tiles(case: Case, dtype: torch.dtype) -> None:
    for mine, true in compare(case, dtype):
        budget = 3e-5 if mine.dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        assert worst_error([mine], [true]) <= budget * max(1.0, true.abs()[true.isfinite()].max())


@here
def test_padded_keys_may_be_anything() -> None:
    inputs = [torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(0))] * 3
    real = torch.arange(40)[None] >= 5
    options = {"key_padding": real, "implementation": "compiled"}
    expected = everything(inputs, options)
    poisoned = [inputs[0], *(tensor.clone() for tensor in inputs[1:])]
    for tensor in poisoned[1:]:
        tensor[:, :, :5] = torch.nan
    assert all(map(torch.equal, everything(poisoned, options), expected))


@here
def test_every_float16_and_bfloat16_number_is_read_and_written() -> None:
    """One key: the output is the value."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
        value = every.view(1, 256, 1, 256)
        query = torch.zeros_like(value)
        found = attention_with_entropy(query, query, value, implementation="compiled").output
        torch.testing.assert_close(found, value, rtol=0, atol=0, equal_nan=True)


@here
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 0x7BFF), (torch.bfloat16, 0x7EFF)])
def test_ties_are_rounded_as_torch_rounds(dtype: torch.dtype, largest: int) -> None:
    """Two keys of equal weight: the output is their mean, half way between two numbers."""
    every = torch.arange(largest, dtype=torch.int32).to(torch.uint16).view(dtype)
    value = torch.stack([every[:-1], every[1:]])[None, None]
    query = torch.zeros_like(value)
    found = attention_with_entropy(query, query, value, implementation="compiled").output[0, 0, 0]
    assert torch.equal(found, value.double().mean(2)[0, 0].to(dtype))


@here
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_kind_of_nan_becomes_a_number(dtype: torch.dtype) -> None:
    """The last bits of this one carry into its sign where they are rounded away."""
    query = torch.randn(1, 1, 3, 8).to(dtype).requires_grad_()
    entropy = attention_with_entropy(query, query, query, implementation="compiled").entropy
    upstream = torch.full((1, 1, 3), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert torch.autograd.grad(entropy, query, upstream)[0].isnan().all()


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    n_keys = draw(st.integers(1, 90))
    n_queries = draw(st.integers(1, 90))
    dim, value_dim = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    shapes = [(heads, n_queries, dim), (kv_heads, n_keys, dim), (kv_heads, n_keys, value_dim)]
    inputs = [torch.randn(batch, *shape, generator=generator) for shape in shapes]
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    side = st.one_of(st.none(), st.integers(0, 40))
    options["window"] = draw(st.one_of(st.none(), st.tuples(side, side)))
    many = draw(st.sampled_from([1, batch]))
    if draw(st.booleans()):
        options["key_padding"] = torch.rand(many, n_keys, generator=generator) > 0.3
    if n_queries <= n_keys and draw(st.booleans()):
        options["document"] = torch.randint(0, 3, (batch, n_keys), generator=generator)
    if draw(st.booleans()):
        options["sinks"] = torch.randn(heads, generator=generator)
    return inputs, options


@here
@settings(max_examples=150, deadline=None)
@given(problems(), st.booleans())
def test_any_structure(problem: tuple[list[Tensor], dict[str, Any]], small: bool) -> None:
    inputs, options = problem
    with pytest.MonkeyPatch.context() as monkeypatch:
        if small:
            use_small_cuts(monkeypatch)
        found = []
        for name, dtype in (("compiled", torch.float32), ("reference", torch.float64)):
            tensors = [tensor.to(dtype).requires_grad_() for tensor in inputs]
            got = attention_with_entropy(*tensors, **options, implementation=name)
            found.append([*got, *gradients(got, tensors)])
    # The gradient of a key is a sum over queries.
    assert worst_error(*found) <= 2e-5 * max(1.0, inputs[0].shape[2] / inputs[1].shape[2])
    assert (found[0][1] >= -1e-6).all()
    if "sinks" not in options:
        assert (found[0][1] <= found[0][4].clamp(min=1).log() + 1e-6).all()


@here
@settings(max_examples=60, deadline=None)
@given(st.floats(-300.0, 300.0))
def test_two_keys(gap: float) -> None:
    """The powers of 2: the entropy of two keys, down to where one of them has no mass."""
    query = torch.tensor([[[[gap]]]])
    key = torch.tensor([[[[0.0], [1.0]]]])
    found = attention_with_entropy(query, key, key, scale=1.0, implementation="compiled")
    p = torch.tensor([0.0, gap], dtype=torch.float32).double().softmax(0)
    assert abs(found.entropy.item() - torch.special.entr(p).sum().item()) <= 3e-7
    assert abs(found.output.item() - p[1].item()) <= 2e-7


@here
def test_powers_of_2_are_exact_to_a_unit_in_the_last_place() -> None:
    """Two keys: the weight of the second is 2^x / (1 + 2^x), for scores 0 and x in base 2."""
    x = torch.linspace(-1.0, 0.0, 100_001)[None, None, :, None]
    key = torch.tensor([[[[0.0], [1.0]]]])
    scale = math.log(2.0)
    found = attention_with_entropy(x, key, key, scale=scale, implementation="compiled").output
    true = x.double().exp2()
    # and a rounding of 1 + 2^x, of its inverse, and of the product
    error = (found / (true / (1 + true)) - 1).abs().max()
    assert error <= 2.5 * torch.finfo(torch.float32).eps


@here
@pytest.mark.parametrize("through", ["output", "entropy", "log_normalizer"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_gradient_of_anything(
    through: str, wanted: tuple[int, ...], dtype: torch.dtype
) -> None:
    case = next(case for case in CASES if case.name == "sinks-window-padding")
    inputs, options = case.build(dtype)
    exact = [tensor.detach().double() for tensor in inputs]
    found = []
    for name, tensors in (("compiled", inputs), ("reference", exact)):
        for place, tensor in enumerate(tensors):
            tensor.requires_grad_(place in wanted)
        got = getattr(case.run(tensors, options, name), through)
        total = got.masked_fill(got == -torch.inf, 0.0).sum()
        if not total.requires_grad:  # the entropy by the values
            return
        chosen = [tensors[place] for place in wanted]
        given = torch.autograd.grad(total, chosen, allow_unused=True, materialize_grads=True)
        found.append(list(given))
    largest = max(tensor.abs().max().item() for tensor in found[1])
    assert worst_error(*found) <= 4 * torch.finfo(dtype).eps * max(largest, 1.0)


@here
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_keys_pass_nothing_on(sinks: bool) -> None:
    check_rows_without_keys_pass_nothing_on("compiled", sinks, "cpu")


@here
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_large_scores(dtype: torch.dtype) -> None:
    check_large_scores("compiled", dtype, "cpu")


@here
@pytest.mark.usefixtures("small")
def test_nothing_is_read_that_was_not_written_and_no_key_that_no_row_sees() -> None:
    """Fresh memory holds NaN here, and so do a cache's evicted keys and values."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8, generator=generator) for n in (70, 200, 200))
    options = {"causal": True, "window": (40, 0), "implementation": "compiled"}
    expected = everything([query, key, value], options)
    for tensor in (key, value):
        tensor[:, :, :90] = torch.nan  # row 0 stands at key 130
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    try:
        got = everything([query, key, value], options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, got, expected))


@here
@pytest.mark.usefixtures("small")
def test_keys_after_the_last_that_a_row_sees_may_be_anything() -> None:
    """A static cache is longer than what it holds."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, n, 8, generator=generator) for n in (70, 200, 200)]

    def run() -> list[Tensor]:
        tensors = [tensor.clone().requires_grad_() for tensor in inputs]
        structure = Structure(left=40, right=-20)
        found = attend(*tensors, structure, scale=1.0, implementation="compiled")
        return [*found, *gradients(found, tensors)]

    expected = run()
    for tensor in inputs[1:]:
        tensor[:, :, 180:] = torch.nan
    assert all(map(torch.equal, run(), expected))


@here
def test_padding_that_was_written_in_place_is_seen() -> None:
    query = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    real = torch.ones(1, 40, dtype=torch.bool)
    for stop in (40, 17):
        real[:, stop:] = False
        found, expected = (
            attention_with_entropy(query, query, query, key_padding=real, implementation=name)
            for name in ("compiled", "blockwise")
        )
        assert worst_error([found.entropy], [expected.entropy]) <= 1e-5


def everything(inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    tensors = [tensor.clone().requires_grad_() for tensor in inputs]
    found = attention_with_entropy(*tensors, **options)
    return [*found, *gradients(found, tensors)]


@here
def test_not_a_number_stays_in_its_row() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 70, 8, generator=generator) for _ in range(3))
    expected = attention_with_entropy(query, key, value, causal=True, implementation="compiled")
    query[0, 1, 33] = torch.nan
    got = attention_with_entropy(query, key, value, causal=True, implementation="compiled")
    for mine, other in zip(got[:4], expected[:4], strict=True):
        assert mine[0, 1, 33].isnan().all()
        changed = mine.clone()
        changed[0, 1, 33] = other[0, 1, 33]
        assert torch.equal(changed, other)


@here
def test_scores_that_overflow_are_not_hidden() -> None:
    query, key = torch.full((1, 1, 3, 8), 1e20), torch.full((1, 1, 40, 8), -1e20)
    for sign in (1, -1):
        for name in ("compiled", "blockwise"):
            found = attention_with_entropy(sign * query, key, key, implementation=name)
            assert found.output.isnan().all()
            assert found.entropy.isnan().all()


def layouts() -> dict[str, list[Tensor]]:
    base = torch.randn(2, 40, 4, 8, generator=torch.Generator().manual_seed(0))
    heads_last = base.transpose(1, 2)
    one = base[:, :1, :, :1].transpose(1, 2)
    return {
        "transposed": [heads_last, heads_last.flip(2), heads_last.flip(1)],
        "one key for all": [heads_last, heads_last[:, :1, :1].expand(2, 4, 40, 8), heads_last],
        "strided width": [base.repeat(1, 1, 1, 2)[..., ::2].transpose(1, 2)] * 3,
        "overlapping": [heads_last, base.flatten().as_strided((2, 4, 40, 8), (99, 7, 3, 1))] * 2,
        "one position, one width": [one.as_strided((2, 4, 1, 1), (7, 3, 0, 0))] * 3,
        "one position": [base.as_strided((2, 4, 1, 8), (32, 8, 0, 1))] * 3,
        "one batch for all": [heads_last[:1].expand(2, -1, -1, -1)] * 3,
    }


@here
@pytest.mark.parametrize("layout", list(layouts()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(layout: str, dtype: torch.dtype) -> None:
    inputs = [tensor.to(dtype) for tensor in layouts()[layout][:3]]
    plain = [tensor.contiguous().clone() for tensor in inputs]
    found = []
    for layout_of in (inputs, plain):
        tensors = [tensor.detach().requires_grad_() for tensor in layout_of]
        got = attention_with_entropy(*tensors, causal=True, implementation="compiled")
        upstream = [torch.ones(1).expand_as(got.output), got.entropy.mT.contiguous().mT]
        if layout_of is plain:
            upstream = [tensor.contiguous() for tensor in upstream]
        found.append([*got, *torch.autograd.grad(got[:2], tensors, upstream)])
    assert worst_error(*found) <= 1e-6


@here
def test_calls_from_many_threads_and_again_are_bit_identical() -> None:
    def run(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(1, 3, 150, 8, generator=generator) for _ in range(3)]
        return everything(inputs, {"causal": True, "implementation": "compiled"})

    expected = [run(seed) for seed in range(12)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for mine, true in zip(pool.map(run, range(12)), expected, strict=True):
                assert all(map(torch.equal, mine, true))


@pytest.fixture
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@here
@pytest.mark.usefixtures("_four_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_head_is_dealt_to_all_cores(dtype: torch.dtype) -> None:
    for units, stripes, segments in ((1, 100, 4), (3, 100, 4), (3, 2, 2), (4, 9, 1), (9, 9, 2)):
        assert passes._segments(units, stripes) == segments
    for mine, true in compare(LARGE[1], dtype):
        rounding = 2 * torch.finfo(dtype).eps * max(1.0, true.abs().max().item())
        assert worst_error([mine], [true]) <= (1e-4 if mine.dtype == torch.float32 else rounding)


@here
@pytest.mark.usefixtures("_four_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_meet(dtype: torch.dtype) -> None:
    """Eight heads for four threads: each is one thread's, as it is where there is one thread."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 8, 900, 32, generator=generator).to(dtype) for _ in range(3)]
    options = {"causal": True, "implementation": "compiled"}
    many = everything(inputs, options)
    torch.set_num_threads(1)
    assert all(map(torch.equal, everything(inputs, options), many))


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype: torch.dtype) -> None:
    inputs, options = next(c for c in CASES if c.name == "documents-padding").build(dtype)
    masks = None, options["key_padding"], options["document"]
    sinks = torch.randn(2, dtype=dtype)
    arguments = (*inputs, *masks, None, sinks, None, 6, 0, 0.3, None, 0.0, True)
    opcheck(blockwise_forward, arguments)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    output, entropy, *_, log2_normalizer = blockwise_forward(*detached)
    saved, upstream = (output, entropy, log2_normalizer), (output, entropy, entropy)
    for wanted in ([True, True, True, False, True], [False, True, False, False, False]):
        opcheck(
            blockwise_backward,
            (*detached, *saved, *upstream, wanted),
            test_utils=("test_schema", "test_faketensor"),
        )


@here
@pytest.mark.parametrize("name", ["causal-left-padding", "documents-causal", "grouped-query"])
def test_torch_compile_autocast_and_vmap(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    inputs, options = case.build(torch.float32)
    plain = case.run(inputs, options, "compiled")
    traced = torch.compile(
        lambda *tensors: tuple(case.run(list(tensors), options, "compiled")),
        fullgraph=True,
        backend="aot_eager",
    )
    got = AttentionOutput(*traced(*inputs))
    assert all(map(torch.equal, got, plain))
    assert all(map(torch.equal, gradients(got, inputs), gradients(plain, inputs)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, case.run(inputs, options, "compiled"), plain))
    stacked = [torch.stack([tensor, 2 * tensor]) for tensor in inputs]
    mapped = torch.func.vmap(lambda *t: case.run(list(t), options, "compiled").entropy)(*stacked)
    twice = case.run([2 * tensor for tensor in inputs], options, "compiled")
    assert torch.equal(mapped, torch.stack([plain.entropy, twice.entropy]))


@here
def test_auto_takes_it_on_a_cpu_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(passes.Pass, "run", lambda self, name, items: taken.append(name))
    query = torch.randn(1, 2, 9, 8)
    attention_with_entropy(query, query, query, causal=True)
    assert taken == ["attention_forward"]
    options = {"softcap": 2.0}, {"dropout": 0.1}, {"bias": torch.zeros(1, 1, 1, 9)}
    for option in (*options, {"allowed": torch.ones(1, 1, 9, 9, dtype=torch.bool)}):
        attention_with_entropy(query, query, query, **option)
    attention_with_entropy(*[query.double()] * 3)
    attention_with_entropy(query, query, query, implementation="blockwise")
    attention_with_entropy(*[query[:, :, :0]] * 3, implementation="compiled")
    assert taken == ["attention_forward"]


@pytest.mark.parametrize("left", [None, 100])
def test_blocks_begin_and_end_at_multiples(left: int | None) -> None:
    """Products are fastest there; but no key is read that no row sees."""
    plan = cutting.cut(Structure(left, 0), 300, 1000, 1)
    lowest, highest = plan.of_blocks
    assert lowest.min() == (0 if left is None else 600)
    assert highest.max() == 1000
    for limits, end in ((lowest, lowest.min()), (highest, highest.max())):
        assert ((limits % cutting.MULTIPLE == 0) | (limits == end)).all()


@here
def test_python_and_the_kernel_agree() -> None:
    kernel = build.kernel()
    assert kernel.call_bytes() == ctypes.sizeof(passes.Call)
    assert kernel.multiple() == cutting.MULTIPLE
    assert kernel.masked_score() == torch.tensor(MASKED_SCORE).item()


@here
def test_what_the_kernel_would_read_or_write_elsewhere_is_refused() -> None:
    query, key, value = (torch.zeros(2, heads, 6, 4) for heads in (4, 2, 2))
    for tensors in (
        (query, key[:, :, :5], value),
        (query, key[..., :3], value),
        (query, key, value[:1]),
        (query[:1], key, value),
        (query[:, :3], key, value),
    ):
        with pytest.raises(ValueError, match=r"query, key and value have shapes \("):
            passes.Pass(Problem(*tensors, Structure(), 1.0))
    padding = torch.ones(3, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"first and stop have shape \(3, 6\) and the query a"):
        passes.Pass(Problem(query, key, value, Structure(key_padding=padding), 1.0))
    this = passes.Pass(Problem(query, key, value, Structure(), 1.0))
    with pytest.raises(ValueError, match=r"output has shape \(2, 4, 4, 6\) and strides"):
        this.target("output", query.mT)


RUN = """
import torch
from entropy_regularization import attention_with_entropy
q = torch.zeros(1, 1, 3, 2)
found = attention_with_entropy(q, q, q, causal=True, implementation="compiled")
print(found.entropy.exp().flatten().tolist())
"""


@pytest.fixture
def _built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(build.SWITCH, raising=False)
    build._found.cache_clear()
    yield
    build._found.cache_clear()


def refused() -> str:
    """Ask for the kernel and for anything: the one refuses with a reason, the other runs."""
    query = torch.randn(1, 2, 9, 8)
    assert attention_with_entropy(query, query, query, causal=True).entropy.isfinite().all()
    with pytest.raises(ValueError, match="implementation='compiled' cannot run") as caught:
        attention_with_entropy(query, query, query, causal=True, implementation="compiled")
    return str(caught.value)


@linux
@pytest.mark.usefixtures("_built_anew")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no C++ compiler (g++, clang++, c++) is installed" in refused()


@linux
@pytest.mark.usefixtures("_built_anew")
def test_with_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    lines = "echo In file kernel.cpp: >&2; echo error: no $1 >&2; echo '    ^' >&2"
    compiler.write_text(f"#!/bin/sh\n{lines}\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -cheese")  # it may have arguments
    assert f"{compiler} failed: error: no -cheese" in refused()
    monkeypatch.setenv("CXX", "no-such-compiler")
    build._found.cache_clear()
    assert "no C++ compiler (no-such-compiler) is installed" in refused()


@here
@pytest.mark.usefixtures("_built_anew")
def test_a_cached_file_that_is_cut_off_is_built_again(tmp_path: Path) -> None:
    assert build.unavailable_reason() is None
    (made,) = (tmp_path / "cache" / "entropy_regularization").iterdir()
    whole = made.read_bytes()
    made.unlink()  # a loaded one must not be written to
    half = len(whole) // 2
    for content in (b"", b"\x7fELF", whole[:2000], whole[:half] + bytes(len(whole) - half)):
        made.write_bytes(content)
        # Another process: what is loaded once stays.
        subprocess.run([sys.executable, "-c", RUN], check=True, timeout=200)
        assert made.stat().st_size > 1000
        made.unlink()


@here
@pytest.mark.usefixtures("_built_anew")
def test_a_cache_that_others_may_write_to_is_not_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "entropy_regularization"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "others may write to" in refused()


@pytest.mark.usefixtures("_built_anew")
def test_a_request_is_refused_under_torch_compile_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    query = torch.randn(1, 2, 9, 8)
    traced = torch.compile(
        lambda q: attention_with_entropy(q, q, q, implementation="compiled").entropy,
        backend="eager",
    )
    with pytest.raises(Exception, match="ENTROPY_REGULARIZATION_COMPILE is 0"):
        traced(query)


@linux
@pytest.mark.usefixtures("_built_anew")
def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    monkeypatch.setenv("CXX", sys.executable)  # whatever there is; it is not called
    assert "there is no home directory; set XDG_CACHE_HOME" in refused()


@pytest.mark.usefixtures("_built_anew")
def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    assert "ENTROPY_REGULARIZATION_COMPILE is 0" in refused()


@here
@pytest.mark.usefixtures("_built_anew")
def test_with_a_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "it cannot be kept or loaded" in refused()


@here
@pytest.mark.usefixtures("_built_anew")
def test_it_is_compiled_once_for_all_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert build.unavailable_reason() is None
    (made,) = (tmp_path / "cache" / "entropy_regularization").iterdir()
    written = made.stat().st_mtime_ns
    build._found.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.unavailable_reason() is None
    assert made.stat().st_mtime_ns == written


@here
@pytest.mark.usefixtures("_built_anew")
def test_processes_that_compile_at_once_all_have_it() -> None:
    command = [sys.executable, "-c", RUN]
    started = [
        subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in started:
        assert process.communicate(timeout=200)[0].startswith("[1.0, 2.0")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"softcap": 2.0}, "softcap is given, which it does not have."),
        ({"bias": torch.zeros(1, 1, 9, 9)}, "bias is given"),
        ({"allowed": torch.ones(1, 1, 9, 9, dtype=torch.bool)}, "allowed is given"),
        ({"dropout": 0.1}, "dropout is 0.1"),
        ({"double": True}, "the inputs are torch.float64; it computes float32, bfloat16"),
    ],
)
def test_what_it_does_not_compute_is_refused(change: dict[str, Any], sentence: str) -> None:
    query = torch.randn(1, 2, 9, 8)
    if change.pop("double", False):
        query = query.double()
    with pytest.raises(ValueError, match="implementation='compiled' cannot run") as caught:
        attention_with_entropy(query, query, query, implementation="compiled", **change)
    assert sentence in str(caught.value)
