"""The function that transformers models call: what a family may hand it beside its tensors."""

import torch
from torch import Tensor, nn

from entropy_regularization.integrations.transformers.attention import RECORDERS, entropy_attention


class Listener:
    """Keeps what would be recorded."""

    def deposit(
        self, module: nn.Module, name: str, found: object, n_keys: int, padding: object
    ) -> None:
        self.found = found


def attend(mask: Tensor | None = None, **options: object) -> tuple[Tensor, object]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    module, listener = nn.Module(), Listener()
    module.__dict__[RECORDERS] = ((listener, "attn"),)
    output, _ = entropy_attention(module, query, key, value, mask, **options)
    return output, listener.found


def test_keys_chosen_by_index_are_those_of_a_mask() -> None:
    indices = torch.tensor([[[0, 4], [1, 1], [2, 0], [-1, 3], [4, 2]]]).expand(2, 5, 2)
    allowed = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    for row, chosen in enumerate(indices[0].tolist()):
        for key in chosen:
            allowed[:, :, row, key] |= key >= 0
    output, found = attend(indices=indices)
    expected, wanted = attend(allowed)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(found.entropy, wanted.entropy)
    assert found.allowed_keys.flatten()[:5].tolist() == [2, 1, 2, 1, 2]
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    output, _ = attend(causal, indices=indices)
    expected, _ = attend(causal & allowed)
    torch.testing.assert_close(output, expected)


def test_a_sink_of_every_row_is_one_key_more_without_a_value() -> None:
    sinks = torch.randn(3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = sinks[None, :, None, None].expand(2, 3, 5, 1)
    output, found = attend(sinks=rows)
    expected, wanted = attend(s_aux=sinks)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(found.entropy, wanted.entropy)
    torch.testing.assert_close(found.log_normalizer, wanted.log_normalizer)


def test_one_query_serves_a_batch_of_keys() -> None:
    query, keys = torch.randn(1, 4, 3, 8), torch.randn(5, 2, 7, 8)
    output, _ = entropy_attention(nn.Module(), query, keys, keys, None)
    expected, _ = entropy_attention(nn.Module(), query.expand(5, -1, -1, -1), keys, keys, None)
    torch.testing.assert_close(output, expected)
