"""StructuredMask: a mask that is made only when computed with, and then is what eager's is."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, masking_utils

from entropy_regularization import record_entropy
from entropy_regularization.attention.masking import Structure
from entropy_regularization.integrations.transformers.masks import StructuredMask, entropy_mask

LOWEST = torch.finfo(torch.float32).min


def make(**changes: object) -> StructuredMask:
    options = {"batch_size": 2, "q_length": 4, "kv_length": 4, "device": torch.device("cpu")}
    mask = entropy_mask(**{**options, **changes})
    assert isinstance(mask, StructuredMask)
    return mask


def causal() -> Tensor:
    return torch.full((4, 4), LOWEST).triu(1).expand(2, 1, 4, 4)


def test_computing_with_a_mask_gives_the_dense_one() -> None:
    mask = make()
    assert mask.shape == (2, 1, 4, 4)
    assert mask.structure == Structure(right=0)
    assert torch.equal(mask + 0, causal())
    assert torch.equal(mask.to(torch.float64), causal().double())
    assert mask.structure == Structure(right=0)


@pytest.mark.parametrize("road", ["in place", "by a view", "by an index"])
def test_writing_to_a_mask_is_not_lost(road: str) -> None:
    mask, expected = make(), causal().clone()
    for tensor in (mask, expected):
        if road == "in place":
            tensor.masked_fill_(torch.eye(4, dtype=torch.bool), 0.5)
        elif road == "by a view":
            tensor[:, :, 1].zero_()
        else:
            tensor[0, 0, 2, 3] = 0.0
    assert mask.structure is None
    assert torch.equal(mask.make_dense(), expected)


def test_a_negated_mask_is_that_of_a_boolean_one() -> None:
    expected = torch.ones(4, 4, dtype=torch.bool).triu(1).expand(2, 1, 4, 4)
    assert torch.equal(make().logical_not(), expected)


def test_an_unknown_rule_is_dense_and_the_families_own() -> None:
    def chunked(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query // 2 == key // 2

    mask = make(mask_function=chunked)
    assert mask.structure is None
    options = {"batch_size": 2, "q_length": 4, "kv_length": 4, "device": torch.device("cpu")}
    expected = masking_utils.eager_mask(**options, mask_function=chunked)
    assert torch.equal(mask.make_dense(), expected)


@pytest.mark.parametrize("family", ["parakeet", "nemotron_asr_streaming"])
def test_a_family_that_takes_masks_to_be_boolean_attends_as_with_sdpa(family: str) -> None:
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    name = {"parakeet": "Parakeet", "nemotron_asr_streaming": "NemotronAsrStreaming"}[family]
    config = getattr(module, f"{name}EncoderConfig")(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        num_mel_bins=16,
        subsampling_conv_channels=8,
    )
    torch.manual_seed(0)
    model = getattr(module, f"{name}Encoder")._from_config(config, attn_implementation="sdpa")
    sound = torch.randn(2, 80, 16)
    mask = torch.ones(2, 80, dtype=torch.int64)
    mask[1, 40:] = 0
    plain = model.eval()(sound, attention_mask=mask).last_hidden_state
    with record_entropy(model) as recording:
        found = model(sound, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[0], plain[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1][:4], plain[1][:4], rtol=1e-4, atol=1e-5)
    counts = recording[0].allowed_keys[:, 0]
    assert counts[0].max() == counts.shape[1]
    assert 0 < counts[1].max() < counts.shape[1]


def test_the_fallback_config_is_not_needed() -> None:
    # Composed masks reach entropy_mask by the interface, whatever the config says.
    mask = masking_utils.create_causal_mask(
        config=LlamaConfig(attn_implementation="entropy_regularization"),
        inputs_embeds=torch.zeros(2, 4, 8),
        attention_mask=None,
        past_key_values=None,
    )
    assert isinstance(mask, StructuredMask)
    assert mask.structure == Structure(right=0)
