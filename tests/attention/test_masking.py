"""Which keys a row sees, and how many, against a mask written out position by position."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from entropy_regularization.attention.blockwise import Problem
from entropy_regularization.attention.blockwise.blocking import choose_blocks
from entropy_regularization.attention.masking import (
    Structure,
    Tile,
    count_allowed_keys,
    limits_and_ids,
    sees_all,
    tile_allowed,
    visible_blocks,
)

CPU = torch.device("cpu")
aten = torch.ops.aten


@st.composite
def structures(draw: st.DrawFn) -> tuple[Structure, int, int]:
    n_queries = draw(st.integers(1, 9))
    n_keys = draw(st.integers(1, 9))
    limit = st.none() | st.integers(-2, 8)
    batch = 2
    bits = st.lists(st.booleans(), min_size=n_keys, max_size=n_keys)
    padding = draw(st.none() | st.lists(bits, min_size=batch, max_size=batch))
    document = None
    if n_keys >= n_queries and draw(st.booleans()):
        ids = st.lists(st.integers(0, 2), min_size=n_keys, max_size=n_keys)
        document = torch.tensor(draw(st.lists(ids, min_size=batch, max_size=batch)))
    allowed = None
    if draw(st.booleans()):
        sizes = (batch, 2, n_queries, n_keys)
        shape = [draw(st.sampled_from([1, size])) for size in sizes]
        generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
        allowed = torch.rand(shape, generator=generator) > 0.4
    return (
        Structure(
            draw(limit),
            draw(limit),
            allowed,
            None if padding is None else torch.tensor(padding),
            document,
        ),
        n_queries,
        n_keys,
    )


def spelled_out(structure: Structure, n_queries: int, n_keys: int) -> torch.Tensor:
    mask = torch.zeros(2, 2, n_queries, n_keys, dtype=torch.bool)
    for b in range(2):
        for i in range(n_queries):
            position = i + n_keys - n_queries
            for j in range(n_keys):
                sees = structure.left is None or j >= position - structure.left
                sees &= structure.right is None or j <= position + structure.right
                if structure.key_padding is not None:
                    sees &= bool(structure.key_padding[b, j])
                if structure.document is not None:
                    sees &= bool(structure.document[b, j] == structure.document[b, position])
                mask[b, :, i, j] = sees
    return mask if structure.allowed is None else mask & structure.allowed


@settings(max_examples=150, deadline=None)
@given(structures())
def test_tiles_counts_and_visible_ranges(case: tuple[Structure, int, int]) -> None:
    structure, n_queries, n_keys = case
    expected = spelled_out(structure, n_queries, n_keys)
    whole = tile_allowed(structure, Tile(0, n_queries, 0, n_keys), n_queries, n_keys, CPU)
    if whole is None:
        assert expected.all()
    else:
        assert torch.equal(whole.expand_as(expected), expected)
    counts = count_allowed_keys(structure, n_queries, n_keys, CPU, block=2)
    assert torch.equal(counts.expand(2, 2, n_queries), expected.sum(-1))
    for number, (first, last) in enumerate(visible_blocks(structure, 3, n_queries, n_keys)):
        start, stop = 3 * number, min(3 * number + 3, n_queries)
        outside = expected[:, :, start:stop].clone()
        outside[..., first:last] = False
        assert not outside.any()
        part = tile_allowed(structure, Tile(start, stop, first, last), n_queries, n_keys, CPU)
        if part is not None and last > first:
            wanted = expected[:, :, start:stop, first:last]
            assert torch.equal(part.expand_as(wanted), wanted)


@settings(max_examples=150, deadline=None)
@given(structures())
def test_limits_of_rows_and_ids_where_these_are_not_all(case: tuple[Structure, int, int]) -> None:
    structure, n_queries, n_keys = case
    structure = structure._replace(allowed=None)
    expected = spelled_out(structure, n_queries, n_keys)[:, 0]
    (first, stop), ids = limits_and_ids(structure, n_queries, n_keys)
    place = torch.arange(n_keys)
    in_limits = (place >= first[..., None]) & (place < stop[..., None])
    assert (ids is None) == torch.equal(in_limits.expand_as(expected), expected)
    if ids is not None:
        in_limits = in_limits & (ids[0][..., None] == ids[1][:, None])
    assert torch.equal(in_limits.expand_as(expected), expected)


@pytest.mark.parametrize("n", [1, 8192])
def test_counting_a_causal_band_makes_no_matrix(n: int) -> None:
    counts = count_allowed_keys(Structure(left=255, right=0), n, n, CPU)
    assert counts.shape == (1, 1, n)
    assert counts[0, 0, -1] == min(n, 256)


@pytest.mark.parametrize("kind", ["window", "document", "padding"])
def test_blocks_are_as_wide_as_what_they_see(kind: str) -> None:
    n = 2048
    structure = {
        "window": Structure(left=15, right=0),
        "document": Structure(right=0, document=torch.arange(n)[None] // 16),
        "padding": Structure(key_padding=torch.arange(n)[None] < 16),
    }[kind]
    tensor = torch.zeros(1, 2, n, 4)
    blocks = choose_blocks(Problem(tensor, tensor, tensor, structure, 1.0))
    assert blocks.rows * blocks.keys <= 128 * (16 + 128 + 16)


def test_packed_documents_need_no_order_of_ids() -> None:
    n, length = 600, 50
    ids = torch.randperm(n // length, generator=torch.Generator().manual_seed(0))
    documents = ids.repeat_interleave(length)[None]
    blocks = visible_blocks(Structure(document=documents), length, n, n)
    assert blocks == [(start, start + length) for start in range(0, n, length)]


@pytest.mark.parametrize(
    "kind", ["documents", "padding", "allowed keys", "allowed queries", "dense"]
)
def test_compiled_counting_is_one_graph_for_every_length_without_a_matrix(kind: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def count(place: torch.Tensor) -> torch.Tensor:
        seen = place > 3
        structures = {
            "documents": Structure(9, 0, document=place[None] // 100),
            "padding": Structure(9, 0, key_padding=seen[None]),
            "allowed keys": Structure(9, 0, seen[None, None, None]),
            "allowed queries": Structure(9, 0, seen[None, None, :, None]),
        }
        dense = (place[:, None] > place)[None, None] if kind == "dense" else None
        structure = structures.get(kind, Structure(9, 0, dense))
        return count_allowed_keys(structure, len(place), len(place), CPU)

    torch._dynamo.reset()
    compiled = torch.compile(count, fullgraph=True, dynamic=True, backend=keep)
    for n in (1500, 1300, 700):
        assert torch.equal(compiled(torch.arange(n)), count(torch.arange(n)))
    assert len(graphs) == 1
    values = [node.meta.get("example_value") for node in graphs[0].graph.nodes]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert kind == "dense" or max(int(tensor.numel()) for tensor in tensors) <= 2 * 1501


@pytest.mark.parametrize("n_keys", [127, 128, 700])
@pytest.mark.parametrize("right", [None, 0])
def test_counting_a_dense_mask_makes_at_most_bytes_of_it(right: int | None, n_keys: int) -> None:
    class Allocations(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            # a sum converts all that it adds to its own dtype
            summed = args[0].numel() * result.itemsize if func is aten.sum.dim_IntList else 0
            self.largest = max(self.largest, summed, result.nbytes)
            return result

    generator = torch.Generator().manual_seed(0)
    allowed = torch.rand(3, 5, 800, n_keys, generator=generator) > 0.3
    allowed[..., 0, :] = True
    structure = Structure(right=right, allowed=allowed)
    with Allocations() as made:
        counts = count_allowed_keys(structure, 800, n_keys, CPU)
    whole = tile_allowed(structure, Tile(0, 800, 0, n_keys), 800, n_keys, CPU)
    assert whole is not None
    assert torch.equal(counts, whole.sum(-1))
    assert made.largest <= 2**20


def test_counts_of_an_empty_batch() -> None:
    padding = torch.ones(0, 5, dtype=torch.bool)
    for structure in (
        Structure(right=0, key_padding=padding),
        Structure(right=0, key_padding=padding, document=torch.zeros(1, 5, dtype=torch.int64)),
        Structure(right=0, allowed=padding[:, None, None]),
    ):
        assert count_allowed_keys(structure, 5, 5, CPU).shape == (0, 1, 5)


def test_tiles_without_gaps_are_whole() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    padding = torch.tensor([[False, True, True, True, True, True]])
    whole = Tile(0, 3, 0, 3)
    assert sees_all(Structure(document=documents), whole, 6, 6)
    assert not sees_all(Structure(document=documents), Tile(0, 3, 0, 4), 6, 6)
    assert not sees_all(Structure(document=documents), Tile(2, 4, 0, 3), 6, 6)
    assert sees_all(Structure(key_padding=padding), Tile(0, 6, 1, 6), 6, 6)
    assert not sees_all(Structure(key_padding=padding), whole, 6, 6)
    assert not sees_all(Structure(allowed=torch.ones(1, 1, 6, 6).bool()), whole, 6, 6)
    # three queries stand at the last three keys
    assert sees_all(Structure(document=documents), Tile(0, 3, 3, 6), 3, 6)


@given(structures())
@settings(deadline=None)
def test_rows_said_to_see_something_do(drawn: tuple[Structure, int, int]) -> None:
    structure, n_queries, n_keys = drawn
    if n_queries and not structure.may_leave_rows_empty(n_queries, n_keys):
        assert count_allowed_keys(structure, n_queries, n_keys, CPU).min() > 0


@pytest.mark.parametrize("left", [None, -1, 0, 2])
@pytest.mark.parametrize("right", [None, -2, -1, 0, 1])
@pytest.mark.parametrize("n_keys", [1, 3, 4, 6])
def test_a_band_that_may_leave_rows_empty_is_known(
    left: int | None, right: int | None, n_keys: int
) -> None:
    structure = Structure(left=left, right=right)
    if not structure.may_leave_rows_empty(4, n_keys):
        assert count_allowed_keys(structure, 4, n_keys, CPU).min() > 0
