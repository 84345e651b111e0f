"""Every wrong input is one sentence: what came, what was expected, what to do."""

from typing import Any

import numpy as np
import pytest
import torch

from entropy_regularization import attention_with_entropy

Q = torch.randn(2, 8, 5, 4)
K = torch.randn(2, 4, 7, 4)
V = torch.randn(2, 4, 7, 3)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, "query is a list"),
    ({"query": Q.long()}, TypeError, "query has dtype torch.int64; pass float16"),
    ({"query": Q[0]}, ValueError, "query has shape (8, 5, 4); pass [batch, heads, positions, dim]"),
    ({"key": K.double()}, TypeError, "key has dtype torch.float64 and query torch.float32"),
    ({"key": K[:1]}, ValueError, "key has shape (1, 4, 7, 4) but query (2, 8, 5, 4) implies"),
    ({"value": V[:, :, :6]}, ValueError, "pass one value per key"),
    ({"query": Q[:, :6]}, ValueError, "query has 6 heads and key 4"),
    ({"query": Q.to("meta")}, ValueError, "key is on cpu and query on meta"),
    ({"window": (-1, 0)}, ValueError, "window is (-1, 0); sides count keys and cannot be negative"),
    ({"window": 3}, TypeError, "window is 3; pass (left, right)"),
    ({"causal": 1}, TypeError, "causal is 1; pass True or False"),
    (
        {"allowed": torch.ones(2, 1, 5, 9, dtype=torch.bool)},
        ValueError,
        "allowed has shape (2, 1, 5, 9) but query and key imply (2 or 1, 8 or 1, 5 or 1, 7 or 1)",
    ),
    ({"allowed": torch.ones(1, 1, 5, 7)}, TypeError, "allowed has dtype torch.float32"),
    ({"key_padding": torch.ones(2, 5).bool()}, ValueError, "imply (2, 7); pass one entry per key"),
    ({"key_padding": torch.ones(2, 7)}, TypeError, "key_padding has dtype torch.float32"),
    ({"document": torch.ones(2, 7)}, TypeError, "document has dtype torch.float32"),
    ({"document": torch.ones(2, 5).long()}, ValueError, "document has shape (2, 5)"),
    ({"bias": torch.ones(5, 7)}, ValueError, "pass four dimensions"),
    ({"bias": torch.ones(1, 1, 5, 7).bool()}, TypeError, "bias has dtype torch.bool"),
    ({"bias": [1.0]}, TypeError, "bias is a list; pass a torch.Tensor"),
    ({"allowed": [True]}, TypeError, "allowed is a list; pass a torch.Tensor"),
    ({"document": [0] * 7}, TypeError, "document is a list; pass a torch.Tensor"),
    ({"sinks": [1.0] * 8}, TypeError, "sinks is a list; pass a torch.Tensor"),
    ({"sinks": torch.ones(4)}, ValueError, "sinks has shape (4,) but query implies (8,)"),
    ({"scale": float("nan")}, ValueError, "scale is nan"),
    ({"softcap": True}, ValueError, "softcap is True; pass a positive number"),
    ({"dropout": False}, ValueError, "dropout is False; pass a rate in [0, 1)"),
    ({"scale": True}, ValueError, "scale is True; pass a finite number"),
    ({"scale": 10**400}, ValueError, "scale is 1000"),
    ({"scale": 1e300}, ValueError, "scale is 1e+300; pass a finite number of float32"),
    ({"softcap": 10**400}, ValueError, "softcap is 1000"),
    ({"softcap": 1e300}, ValueError, "softcap is 1e+300; pass a positive number of float32"),
    ({"softcap": 1e-300}, ValueError, "softcap is 1e-300; pass a positive number of float32"),
    ({"scale": 3e38}, ValueError, "scale is 3e+38, and times log2(e) more than float32 holds"),
    ({"scale": -3e38}, ValueError, "scale is -3e+38, and times log2(e) more than float32 holds"),
    ({"softcap": 3e38}, ValueError, "softcap is 3e+38, and times log2(e) more than float32 holds"),
    (
        {"scale": 1e15, "softcap": 1e-30},
        ValueError,
        "scale is 1000000000000000.0 and softcap 1e-30, and their quotient more than float32",
    ),
    ({"query": Q.to_sparse()}, TypeError, "query is a torch.sparse_coo tensor; pass a dense one"),
    ({"bias": torch.ones(1, 1, 5, 7).to_sparse()}, TypeError, "bias is a torch.sparse_coo tensor"),
    ({"key": torch.nested.nested_tensor(list(K))}, TypeError, "key is a nested tensor; pass a de"),
    ({"softcap": 0.0}, ValueError, "softcap is 0.0; pass a positive number"),
    ({"dropout": 1.0}, ValueError, "dropout is 1.0; pass a rate in [0, 1)"),
    (
        {"implementation": "flash"},
        ValueError,
        "choose one of auto, reference, blockwise, compiled, triton",
    ),
    (
        {"implementation": "triton", "value": torch.randn(2, 4, 7, 300)},
        ValueError,
        "implementation='triton' cannot run:",
    ),
]


@pytest.mark.parametrize(("change", "error", "sentence"), WRONG, ids=range(len(WRONG)))
def test_sentence(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    arguments: dict[str, Any] = {"query": Q, "key": K, "value": V}
    attention_with_entropy(**arguments)
    with pytest.raises(error) as caught:
        attention_with_entropy(**{**arguments, **change})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers() -> None:
    given = {"scale": np.float32(0.5), "softcap": np.int64(3), "dropout": np.float64(0.0)}
    plain = {"scale": 0.5, "softcap": 3.0}
    found, wanted = (attention_with_entropy(Q, K, V, **options) for options in (given, plain))
    assert torch.equal(found.entropy, wanted.entropy)


@pytest.mark.parametrize(
    "numbers",
    [
        {"scale": 3e38},
        {"scale": -3e38},
        {"softcap": 3e38},
        {"scale": 1e15, "softcap": 1e-30},
        {"scale": np.float32(3e38), "softcap": 1.0},
    ],
)
def test_products_that_float32_cannot_hold_are_right_in_float64(numbers: dict[str, Any]) -> None:
    inputs = [tensor.double() * 1e-20 for tensor in (Q, K, V)]
    found, expected = (
        attention_with_entropy(*inputs, implementation=implementation, **numbers)
        for implementation in ("blockwise", "reference")
    )
    torch.testing.assert_close(found[:4], expected[:4], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("numbers", [{"scale": 2.3e38}, {"softcap": 2.3e38}, {"softcap": 1.2e-38}])
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_products_that_float32_just_holds(numbers: dict[str, Any], implementation: str) -> None:
    query = Q * 1e-38 if "scale" in numbers else Q
    found = attention_with_entropy(query, K, V, implementation=implementation, **numbers)
    exact = attention_with_entropy(*(each.double() for each in (query, K, V)), **numbers)
    torch.testing.assert_close(found.entropy.double(), exact.entropy, rtol=1e-4, atol=1e-4)


def test_document_needs_a_key_for_every_query() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="5 queries and 3 keys"):
        attention_with_entropy(Q, K[:, :, :3], V[:, :, :3], document=ids)
