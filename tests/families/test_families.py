"""Every family of transformers: what is recorded is what its eager attention computes.

The families in FAST run with every test session, under three paddings each. The others are marked
``families``: ``make families`` or ``pytest -m families`` runs them.
"""

import contextlib
import functools
import importlib.util
from dataclasses import replace

import pytest
import torch
from check import FUSED, INTERFACE, OWN, check
from zoo import families

from entropy_regularization import record_entropy

_FAST = """
    albert apertus arcee aya_vision bart beit bert bert-generation biogpt bitnet blenderbot
    bloom camembert clip cohere cohere2 ctrl data2vec-text deberta-v2 deepseek_v3 deepseek_v32 deit
    dinov2 distilbert doge dots3_note_text electra ernie exaone4 falcon fsmt gemma gemma2 gemma3
    gemma3_text
    glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss granite granite_swa granitemoe helium
    hubert inkling2_text jamba jetmoe lfm2 llama llava m2m_100 marian mbart megatron-bert mistral
    mixtral modernbert mpt nemotron olmo olmo2 olmoe opt paligemma pegasus persimmon phi phi3
    pixtral plbart qwen2 qwen2_moe qwen2_vl qwen3 qwen3_moe rembert roberta seed_oss siglip
    smollm3 stablelm starcoder2 swin t5 umt5 vit vit_mae wav2vec2 whisper xclip xglm xlm-roberta
    xlnet
""".split()
FAST = [family for family in _FAST if family in families()]  # older transformers have fewer
# Families outside the attention interface, recorded where they call scaled_dot_product_attention,
# or a softmax of their own.
OUTSIDE = set("bloom deberta-v2 falcon fsmt gpt_neo megatron-bert mpt rembert xglm xlnet".split())
PARTIAL = {"inkling2_text"}  # it attends over its own depth
SLOW = sorted(set(families()) - set(FAST))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAST)
def test_a_recording_is_what_eager_attention_computes(family, padding):
    result = check(family, padding)
    allowed = {"exact"}
    if family in PARTIAL:
        allowed |= {"partial"}
    if family in OUTSIDE:
        assert result.way in (FUSED, OWN)
    else:
        assert result.way == INTERFACE
    assert result.outcome in allowed, result


@pytest.mark.families
@pytest.mark.parametrize("family", SLOW)
def test_no_family_is_recorded_wrong(family):
    for padding in ("none", "left", "right"):
        result = check(family, padding)
        if result.outcome == "not built":
            pytest.skip(result.note)
        assert result.outcome != "wrong", result


def test_there_are_families():
    assert len(families()) > 300
    assert len(FAST) > 80


def _with(change):
    """Return record_entropy with something done to its recording afterwards."""

    @contextlib.contextmanager
    def record(model):
        with record_entropy(model) as recording:
            yield recording
        change(recording)

    return record


def _change_first(recording, change):
    first = recording.layers[0]
    recording.layers[0] = replace(first, entropy=change(first.entropy))


def _count_all_rows(recording):
    first = recording.layers[0]
    recording.layers[0] = replace(first, rows=torch.ones_like(first.rows))


def _nudge_one_row(entropy):
    nudge = torch.zeros_like(entropy)
    nudge[1, 1, 5] = 1e-3
    return entropy + nudge


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (functools.partial(_change_first, change=_nudge_one_row), "entropy"),
        (functools.partial(_change_first, change=torch.Tensor.detach), "gradient"),
        (functools.partial(_change_first, change=lambda entropy: entropy * torch.nan), "entropy"),
        (_count_all_rows, "padding"),
        (lambda recording: recording.layers.reverse(), None),
    ],
    ids=["one row", "no gradient", "nan", "padding", "order is not content"],
)
def test_the_check_notices_a_wrong_recording(change, said):
    result = check("llama", "left", record=_with(change))
    if said is None:
        assert result.outcome == "exact"
    else:
        assert result.outcome == "wrong"
        assert said in result.note


def test_the_check_notices_a_layer_that_is_left_out():
    result = check("llama", record=_with(lambda recording: recording.layers.pop()))
    assert result.outcome == "partial"
    assert result.unseen == ["layers.1.self_attn (LlamaAttention)"]


def test_the_check_notices_an_implementation_that_is_not_put_back():
    @contextlib.contextmanager
    def record(model):
        with record_entropy(model) as recording:
            yield recording
        model.set_attn_implementation("sdpa")

    assert check("llama", record=record).note == "the attention implementation was not put back"


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_family_that_cannot_be_built_says_why():
    result = check("timm_wrapper")
    assert result.outcome == "not built"
    assert "timm" in result.note
