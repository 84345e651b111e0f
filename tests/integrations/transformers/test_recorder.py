"""record_entropy on transformers models: whose rows, which layers, and nothing left behind."""

import contextlib
import copy
import functools
import io
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    CanineConfig,
    CanineModel,
    CLIPConfig,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    EncoderDecoderCache,
    FalconConfig,
    FalconForCausalLM,
    FSMTConfig,
    FSMTForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoModel,
    LayoutLMv3Config,
    LayoutLMv3Model,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerModel,
    MambaConfig,
    MambaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from entropy_regularization import (
    EntropyRegularization,
    attention_with_entropy,
    record_entropy,
)
from entropy_regularization.integrations import interception
from entropy_regularization.integrations.transformers import regularize
from entropy_regularization.integrations.transformers.attention import RECORDERS
from entropy_regularization.integrations.transformers.recorder import TransformersRecorder
from entropy_regularization.recording.recorder import make_recorder

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
FRONT = {  # of a model of sounds
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
VISION = {key: value for key, value in TEXT.items() if key != "vocab_size"}
BLOOM = BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=4)
VISION |= {"image_size": 16, "patch_size": 8}


def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    """Draw weights that attend far from uniformly; deterministic."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(2 * noise / parameter[0].numel() ** 0.5)
    return model.eval()


def llama(**changes: object) -> PreTrainedModel:
    config = LlamaConfig(**TEXT, num_key_value_heads=2, **changes)
    return sharpen(LlamaForCausalLM(config))


def gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    return sharpen(GPT2LMHeadModel(GPT2Config(**sizes)))


def bart() -> PreTrainedModel:
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 64}
    layers = {"encoder_layers": 2, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(**sizes, **layers, **heads, max_position_embeddings=32)
    return sharpen(BartForConditionalGeneration(config))


def tokens(n: int = 9, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(3, 64, (batch, n), generator=torch.Generator().manual_seed(seed))


def padding(side: str, n: int = 9, count: int = 3) -> Tensor:
    mask = torch.ones(2, n, dtype=torch.int64)
    mask[1, :count] = mask[1, :count] * (side != "left")
    mask[1, n - count :] = mask[1, n - count :] * (side != "right")
    return mask


def eager_entropies(model: PreTrainedModel, **inputs: Tensor) -> tuple[Tensor, ...]:
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return tuple(
        torch.special.entr(weights).sum(-1)
        for weights in twin(**inputs, output_attentions=True).attentions
    )


# Whose rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_padding_queries_are_no_rows(build: Callable[[], PreTrainedModel], side: str) -> None:
    model, mask = build(), padding(side)
    with record_entropy(model) as recording:
        model(tokens(), attention_mask=mask)
    expected = eager_entropies(model, input_ids=tokens(), attention_mask=mask)
    for layer, wanted in zip(recording, expected, strict=True):
        assert torch.equal(layer.rows, mask.bool())
        assert layer.allowed_keys.shape == (2, 1, 9)
        places = mask.cumsum(-1) if side == "left" else torch.arange(1, 10).expand(2, 9)
        assert torch.equal(layer.allowed_keys[:, 0][layer.rows], places[layer.rows])
        real = layer.rows[:, None].expand_as(wanted)
        torch.testing.assert_close(layer.entropy[real], wanted[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sliding", [False, True])
def test_layers_of_one_mask_share_what_follows_from_it(sliding: bool) -> None:
    """And those of another do not; two passes of one recording neither."""
    kinds = ["full_attention", "sliding_attention" if sliding else "full_attention"] * 2
    config = Gemma3TextConfig(
        **TEXT | {"num_hidden_layers": 4}, head_dim=4, layer_types=kinds, sliding_window=3
    )
    model = Gemma3ForCausalLM(config)
    ids = torch.arange(14).view(2, 7)
    masks = torch.ones(2, 7, dtype=torch.long), torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    with record_entropy(model) as recording:
        for mask in masks:
            model(input_ids=ids, attention_mask=mask)
    first, second = list(recording)[:4], list(recording)[4:]
    for layers, mask in zip((first, second), masks, strict=True):
        assert len({id(layer.allowed_keys) for layer in layers}) == len(set(kinds))
        assert len({id(layer.rows) for layer in layers}) == len(set(kinds))
        for kind, layer in zip(kinds, layers, strict=True):
            longest = 3 if kind == "sliding_attention" else 7
            assert layer.allowed_keys.max() == longest
            assert torch.equal(layer.rows, mask.bool())


@pytest.mark.parametrize("made", [functools.partial, functools.wraps(sdpa_attention_forward)])
def test_attention_that_somebody_registered_is_refused(made: Callable) -> None:
    """It may be something else: one that divides the sequence over ranks, for instance."""

    def attend(*args: Tensor, **options: object) -> tuple[Tensor, None]:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **options)

    AttentionInterface.register("own", made(attend))
    AttentionMaskInterface.register("own", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = llama(attn_implementation="own")
    sentence = "the model attends by 'own', a function of .*test_recorder that a recording would"
    with pytest.raises(ValueError, match=sentence), record_entropy(model):
        model(tokens())
    assert model.config._attn_implementation == "own"
    model.set_attn_implementation("sdpa")
    with record_entropy(model) as recording:
        model(tokens())
    assert len(recording) == 2


def test_padding_of_a_model_whose_forward_is_called() -> None:
    """As sentence-transformers does, around the hooks of the model."""

    class Around(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Tensor) -> object:
            return self.model.forward(**inputs)

    torch.manual_seed(0)
    model = BertModel(BertConfig(**TEXT)).eval()
    mask = padding("right")
    with record_entropy(model) as expected:
        model(input_ids=tokens(), attention_mask=mask)
    around = Around(model)
    with record_entropy(around) as recording:
        around(input_ids=tokens(), attention_mask=mask)
    for found, wanted in zip(recording, expected, strict=True):
        assert torch.equal(found.rows, mask.bool())
        torch.testing.assert_close(found.mean_per_head(), wanted.mean_per_head())


@pytest.mark.parametrize("kind", ["positional", "boolean", "float", "4-D", "4-D, boolean"])
def test_masks_may_be_given_in_every_form(kind: str) -> None:
    model, mask = llama(), padding("left")
    expected = eager_entropies(model, input_ids=tokens(), attention_mask=mask)[1]
    allowed = mask.bool()[:, None, None] & torch.ones(9, 9, dtype=torch.bool).tril()
    given = {
        "positional": mask,
        "boolean": mask.bool(),
        "float": mask.float(),
        "4-D": torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min),
        "4-D, boolean": allowed,
    }[kind]
    with record_entropy(model) as recording:
        model(tokens(), given) if kind == "positional" else model(tokens(), attention_mask=given)
    assert torch.equal(recording[1].rows, mask.bool())
    assert torch.equal(recording[1].allowed_keys, allowed.sum(-1))
    real = mask.bool()[:, None].expand_as(expected)
    torch.testing.assert_close(recording[1].entropy[real], expected[real], rtol=0, atol=1e-5)


def test_encoder_and_decoder_have_masks_of_their_own() -> None:
    model, encoder, decoder = bart(), padding("left"), padding("right", n=7, count=2)
    with record_entropy(model) as recording:
        model(
            tokens(),
            attention_mask=encoder,
            decoder_input_ids=tokens(7),
            decoder_attention_mask=decoder,
        )
    with record_entropy(model) as unmasked:
        model(tokens(), attention_mask=encoder, decoder_input_ids=tokens(7))
    for layer, without in zip(recording, unmasked, strict=True):
        in_encoder = ".encoder." in layer.name
        assert torch.equal(layer.rows, (encoder if in_encoder else decoder).bool()), layer.name
        assert without.rows.all() != in_encoder
    assert [layer.kind for layer in recording] == ["self", "self", "self", "cross"]
    cross = recording[3]
    assert cross.keys == 9
    assert torch.equal(cross.allowed_keys.flatten(), encoder.sum(-1).repeat_interleave(7))


def test_prompt_tuning_lengthens_the_rows() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with record_entropy(model) as recording:
        model(input_ids=tokens(), attention_mask=padding("left"))
    virtual = torch.ones(2, 3, dtype=torch.bool)
    for layer in recording:
        assert torch.equal(layer.rows, torch.cat((virtual, padding("left").bool()), 1))
        assert layer.entropy.shape == (2, 4, 12)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_padding_of_labels_is_padding_of_the_decoder(family: str) -> None:
    """The collators of transformers make no mask for it; a label left out before is none."""
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 1}
    config = T5Config(**sizes, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    model = bart() if family == "bart" else sharpen(T5ForConditionalGeneration(config))
    labels = tokens().masked_fill(padding("right") == 0, -100)
    labels[:, 1] = -100
    inside = {"attention_mask": padding("left"), "labels": labels}
    for given in (inside, {**inside, "attention_mask": None}):
        with record_entropy(model, gradient=False) as recording:
            model(tokens(), **given)
        encoder, *_, own, crossing = recording
        assert torch.equal(own.rows, padding("right").bool())
        assert torch.equal(crossing.rows, padding("right").bool())
        masked = given["attention_mask"] is not None
        assert torch.equal(encoder.rows, padding("left").bool() | (not masked))
    with record_entropy(model, gradient=False) as recording:
        model(tokens(), decoder_input_ids=tokens(), labels=labels)
    assert recording[-1].rows.all()


def test_an_image_beside_the_text_has_no_padding_of_the_text() -> None:
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    model, mask = CLIPModel(config).eval(), padding("right", count=6)
    with record_entropy(model) as recording:
        model(tokens(), torch.randn(2, 3, 16, 16), attention_mask=mask)
    for layer in recording:
        text = "text" in layer.name
        assert torch.equal(layer.rows, mask.bool() if text else torch.ones(2, 5).bool())


@pytest.mark.parametrize("compiled", [False, True])
def test_padding_is_known_where_the_model_around_makes_the_mask(compiled: bool) -> None:
    """Of its 2-D mask, which its text model does not get to see."""
    text = {**TEXT, "model_type": "gemma", "head_dim": 4, "num_key_value_heads": 2}
    vision = {**VISION, "vision_use_head": False}
    config = PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=16)
    model = sharpen(PaliGemmaForConditionalGeneration(config)).train()
    mask, types = padding("right"), torch.ones(2, 9, dtype=torch.int64)
    run = torch.compile(model, backend="eager") if compiled else model
    with record_entropy(run, gradient=False) as recording:
        run(input_ids=tokens(), attention_mask=mask, token_type_ids=types)
    assert all(torch.equal(layer.rows, mask.bool()) for layer in recording)


@pytest.mark.skipif(not LayoutLMv3Model._supports_sdpa, reason="attends by itself in this version")
@pytest.mark.parametrize("compiled", [False, True])
def test_padding_is_known_where_the_model_appends_rows_to_the_text(compiled: bool) -> None:
    sizes = {"input_size": 16, "patch_size": 8, "coordinate_size": 2, "shape_size": 4}
    model: nn.Module = LayoutLMv3Model(LayoutLMv3Config(**TEXT, **sizes)).eval()
    run = torch.compile(model, backend="eager") if compiled else model
    given = {"bbox": torch.zeros(2, 9, 4).long(), "pixel_values": torch.randn(2, 3, 16, 16)}
    mask = padding("right")
    with record_entropy(run) as recording:
        run(tokens(), attention_mask=mask, **given)
    rows = torch.cat([mask.bool(), torch.ones(2, 5).bool()], 1)  # 4 patches and one for all
    assert all(torch.equal(layer.rows, rows) for layer in recording)


def test_a_decoder_does_not_take_the_mask_of_its_encoder() -> None:
    model, mask = bart(), padding("right")
    causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
    given = {"attention_mask": mask, "decoder_attention_mask": causal}
    with record_entropy(model, gradient=False) as recording:
        model(tokens(), decoder_input_ids=tokens(), **given)
    encoder, *_, own, crossing = recording
    assert torch.equal(encoder.rows, mask.bool())
    assert own.rows.all()
    assert crossing.rows.all()


@pytest.mark.parametrize("kind", ["eager", "compiled", "of torch's own attention"])
def test_frames_of_a_padded_sound_are_no_rows(kind: str) -> None:
    model: nn.Module = Wav2Vec2Model(Wav2Vec2Config(**TEXT, **FRONT)).eval()
    if kind == "compiled":
        model = torch.compile(model, backend="eager")
    elif kind == "of torch's own attention":
        model = WavLMModel(WavLMConfig(**TEXT, **FRONT)).eval()
    mask = torch.ones(2, 200, dtype=torch.int64)
    mask[1, 100:] = 0  # of samples; 200 are 19 frames, 100 are 9
    with record_entropy(model) as recording:
        model(torch.randn(2, 200), attention_mask=mask)
    assert torch.equal(recording[0].rows, torch.arange(19) < torch.tensor([[19], [9]]))
    assert recording[0].allowed_keys[:, 0, 0].tolist() == [19, 9]


# Which layers: all, or a refusal that names them


class Towers(nn.Module):
    """Two transformers models and attention of its own, as users put them together."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = llama().model, gpt2().transformer
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        one = self.one(ids, attention_mask=attention_mask).last_hidden_state
        two = self.two(ids).last_hidden_state
        found: Tensor = self.attention(one, two, two)[0]
        return found


def test_everything_around_transformers_models_is_heard() -> None:
    model, mask = Towers().eval(), padding("right")
    plain = model(tokens(), mask)
    with record_entropy(model) as recording:
        torch.testing.assert_close(model(tokens(), mask), plain, rtol=1e-4, atol=1e-5)
    names = ["one.layers.0.self_attn", "one.layers.1.self_attn"]
    assert [layer.name for layer in recording] == [
        *names,
        "two.h.0.attn",
        "two.h.1.attn",
        "attention",
    ]
    assert [bool(layer.rows.all()) for layer in recording] == [False, False, True, True, True]
    assert {part.config._attn_implementation for part in (model.one, model.two)} == {"sdpa"}
    with pytest.raises(ValueError, match=r"several transformers models \(one, two\)"):
        regularize(model)
    # as lightning.Fabric hands on a model that it has set up
    fabric = type("FabricModule", (nn.Sequential,), {"__module__": "lightning.fabric.wrappers"})
    for wrapped in (nn.parallel.DataParallel(nn.Sequential(llama())), fabric(llama())):
        with record_entropy(wrapped) as recording:
            wrapped(tokens())
        assert recording[0].name == "model.layers.0.self_attn"


class Ours(nn.Module):
    """Attends by the library's own function."""

    def forward(self, x: Tensor) -> Tensor:
        return attention_with_entropy(x, x, x, causal=True).output


class WithOurs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.own = gpt2().transformer, Ours()

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.own(self.inner(ids).last_hidden_state[:, None])
        return y


def test_the_librarys_own_function_is_heard_beside_transformers() -> None:
    model = WithOurs().eval()
    x = model.inner(tokens()).last_hidden_state[:, None]
    expected = attention_with_entropy(x, x, x, causal=True)
    for _ in range(2):  # the second pass is not watched
        with record_entropy(model) as recording:
            model(tokens())
        assert [layer.name for layer in recording] == ["inner.h.0.attn", "inner.h.1.attn", "own"]
    torch.testing.assert_close(recording[2].entropy, expected.entropy)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    message = "own calls attention_with_entropy, which cannot be heard in a compiled model; "
    message += "pass allow_partial=True to leave that part out, or record it without torch.compile"
    with pytest.raises(ValueError, match=message), record_entropy(compiled):
        compiled(tokens())


class Fused(PreTrainedModel):
    """Holds a layer that torch runs fused in evaluation, calling no attention function."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.inner = llama().model
        self.layer = nn.TransformerEncoderLayer(16, 4, 16, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.layer(self.inner(ids).last_hidden_state)
        return y


@torch.no_grad()
def test_layers_that_torch_would_run_fused_are_heard() -> None:
    model = Fused(LlamaConfig(**TEXT)).eval()
    for _ in range(2):  # the second pass is not watched
        with record_entropy(model) as recording:
            model(tokens())
        assert recording[-1].name == "layer.self_attn"


def test_generated_tokens_of_a_softmax_of_its_own() -> None:
    model, mask = sharpen(BloomForCausalLM(BLOOM)), padding("left")
    with record_entropy(model) as recording:
        ids = model.generate(tokens(), attention_mask=mask, max_new_tokens=3, do_sample=False)
    longer = torch.cat([mask, mask.new_ones(2, 2)], 1)
    with record_entropy(model) as whole:
        model(ids[:, :-1], attention_mask=longer)
    for layer in (0, 1):
        steps = [each for each in recording if each.name == whole[layer].name]
        assert [each.entropy.shape[2] for each in steps] == [mask.shape[1], 1, 1]
        found = torch.cat([each.entropy for each in steps], 2)
        real = whole[layer].counted()
        torch.testing.assert_close(found[real], whole[layer].entropy[real], rtol=0, atol=1e-5)
        assert torch.equal(torch.cat([each.rows for each in steps], 1), longer.bool())


def test_rows_after_a_cache_are_those_at_the_end_of_the_mask() -> None:
    model, mask = sharpen(BloomForCausalLM(BLOOM)), padding("right")
    first = model(tokens()[:, :3], attention_mask=mask[:, :3], use_cache=True)
    with record_entropy(model) as recording:
        model(tokens()[:, 3:], attention_mask=mask, past_key_values=first.past_key_values)
    for layer in recording:
        assert torch.equal(layer.rows, mask[:, 3:].bool())


def test_chunks_of_tokens_tell_their_own_padding() -> None:
    config = CanineConfig(
        **VISION,
        num_hash_functions=2,
        num_hash_buckets=64,
        local_transformer_stride=4,
        downsampling_rate=2,
        upsampling_kernel_size=2,
    )
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 9:] = 0
    model = sharpen(CanineModel(config))
    with record_entropy(model) as recording:
        model(torch.randint(5, 60, (2, 12)), attention_mask=mask)
    chunks = [layer for layer in recording if layer.name.startswith("initial")]
    assert [layer.entropy.shape[2] for layer in chunks] == [4, 4, 4]
    assert torch.equal(torch.cat([layer.rows for layer in chunks], 1), mask.bool())


def test_the_decoder_of_fsmt_has_the_mask_that_the_model_has_for_it() -> None:
    config = FSMTConfig(
        langs=["en", "de"],
        src_vocab_size=64,
        tgt_vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        use_cache=False,  # with which older transformers compute the last token alone
    )
    model = sharpen(FSMTForConditionalGeneration(config))
    ids = torch.randint(5, 60, (2, 5))
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    with record_entropy(model) as recording:
        model(tokens(), padding("right"), decoder_input_ids=ids, decoder_attention_mask=mask)
    assert torch.equal(recording[0].rows, padding("right").bool())
    assert [layer.kind for layer in recording] == ["self", "self", "cross"]
    for layer in list(recording)[1:]:
        assert torch.equal(layer.rows, mask.bool())


def test_parts_that_are_called_alone_are_watched() -> None:
    model, inputs = git()
    with pytest.raises(ValueError, match="computes a softmax"), record_entropy(model):
        model.git(**inputs)


class Halved(nn.Module):
    """Changes weights in the place of dropout: they are not what their softmax has made."""

    def forward(self, weights: Tensor) -> Tensor:
        return weights / 2


def git() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model whose text attends in a way that cannot be heard, and whose image can."""
    model = GitForCausalLM(GitConfig(vision_config=VISION, **TEXT))
    for layer in model.git.encoder.layer:
        layer.attention.self.dropout = Halved()
    return sharpen(model), {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 16, 16)}


def test_a_part_that_attends_by_itself_is_refused_by_name_or_listed() -> None:
    model, inputs = git()
    own = [f"git.encoder.layer.{number}.attention.self" for number in (0, 1)]
    with pytest.raises(ValueError, match=own[0] + " computes a softmax"), record_entropy(model):
        model(**inputs)
    assert model.config._attn_implementation != "entropy_regularization"
    with record_entropy(model, allow_partial=True) as recording:
        model(**inputs)
    assert recording.missing == own
    assert len(recording) == 2
    assert "vision" in recording[0].name


def test_a_part_seen_only_with_other_inputs_is_found_then() -> None:
    model, inputs = git()
    with pytest.raises(ValueError, match="computes a softmax"), record_entropy(model):
        model(input_ids=inputs["input_ids"])
    with record_entropy(model.git.image_encoder) as recording:
        model.git.image_encoder(inputs["pixel_values"])
    assert len(recording) == 2
    with pytest.raises(ValueError, match="computes a softmax"), record_entropy(model):
        model(**inputs)


@pytest.mark.parametrize("function", [False, True])
def test_compiled_models_are_read_since_they_cannot_be_watched(function: bool) -> None:
    model = BloomForCausalLM(BLOOM).eval()
    torch._dynamo.reset()
    compiled = torch.compile((lambda ids: model(ids)) if function else model, backend="eager")
    recorded = model if function else compiled
    with pytest.raises(ValueError, match="computes a softmax"), record_entropy(recorded):
        compiled(tokens())


def test_compiled_parts_that_call_torch_are_refused_by_name() -> None:
    model = sharpen(SiglipVisionModel(SiglipVisionConfig(**VISION)))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    message = "head.attention calls torch's own attention, which cannot be heard in a compiled "
    message += "model; pass allow_partial=True to leave that part out, or record it without "
    message += "torch.compile"
    with pytest.raises(ValueError, match=message), record_entropy(compiled):
        compiled(torch.randn(2, 3, 16, 16))
    sounds = torch.compile(WavLMModel(WavLMConfig(**TEXT, **FRONT)).eval(), backend="eager")
    message = "encoder.layers.0.attention calls torch's own attention, which cannot be heard in a "
    with pytest.raises(ValueError, match=message), record_entropy(sounds):
        sounds(torch.randn(2, 200))


@pytest.mark.parametrize(
    ("model_class", "config", "message"),
    [
        (
            LongformerModel,
            LongformerConfig(attention_window=4, pad_token_id=1, **TEXT),
            "attention.self computes a",
        ),
        (
            MambaForCausalLM,
            MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1),
            "nothing in it was seen to attend",
        ),
    ],
    ids=["longformer", "mamba"],
)
def test_models_without_attention_that_can_be_heard(
    model_class: type[PreTrainedModel], config: object, message: str
) -> None:
    model = model_class(config).eval()
    with pytest.raises(ValueError, match=message), record_entropy(model):
        model(tokens())


def test_a_family_outside_the_interface_is_heard_through_torch() -> None:
    model, mask = falcon(), padding("left")
    plain = model(tokens(), attention_mask=mask).logits
    with record_entropy(model) as recording:
        output = model(tokens(), attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(output[real], plain[real], rtol=1e-4, atol=1e-5)
    eager = sharpen(FalconForCausalLM._from_config(model.config, attn_implementation="eager"))
    logits, *_, weights = eager(tokens(), attention_mask=mask, output_attentions=True).values()
    for layer, matrix in zip(recording, weights, strict=True):
        expected = torch.special.entr(matrix).sum(-1)
        keep = real[:, None].expand_as(expected)
        torch.testing.assert_close(layer.entropy[keep], expected[keep], rtol=0, atol=1e-5)
        assert torch.equal(layer.rows, real)
    with record_entropy(eager) as by_softmax:
        assert torch.equal(eager(tokens(), attention_mask=mask).logits[real], logits[real])
    for layer, matrix in zip(by_softmax, weights, strict=True):
        expected = torch.special.entr(matrix).sum(-1)
        keep = real[:, None].expand_as(expected)
        torch.testing.assert_close(layer.entropy[keep], expected[keep], rtol=0, atol=1e-5)
        assert torch.equal(layer.rows, real)
    eager.config.alibi = True  # where there is dropout
    eager = sharpen(FalconForCausalLM._from_config(eager.config, attn_implementation="eager"))
    for block in eager.transformer.h:
        block.self_attention.attention_dropout = Halved()
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"), record_entropy(eager):
        eager(tokens())


def test_attention_of_torch_inside_a_transformers_model() -> None:
    model = sharpen(SiglipVisionModel(SiglipVisionConfig(**VISION)))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = model(pixels).pooler_output
    with record_entropy(model) as recording:
        torch.testing.assert_close(model(pixels).pooler_output, plain, rtol=1e-4, atol=1e-5)
    assert [layer.name.split(".")[-1] for layer in recording] == [
        "self_attn",
        "self_attn",
        "attention",
    ]
    head = model.get_submodule(recording[2].name)
    hidden = model(pixels).last_hidden_state
    probe = model.get_submodule(recording[2].name.rsplit(".", 1)[0]).probe.repeat(2, 1, 1)
    weights = head(probe, hidden, hidden, average_attn_weights=False)[1]
    expected = torch.special.entr(weights).sum(-1)
    torch.testing.assert_close(recording[2].entropy, expected, rtol=0, atol=1e-5)


def test_every_part_of_clipseg_is_heard_and_put_back() -> None:
    decoder = {"reduce_dim": 16, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 16}
    config = CLIPSegConfig(
        text_config=TEXT,
        vision_config=VISION,
        projection_dim=16,
        extract_layers=[0, 1],
        **decoder,
    )
    model = CLIPSegForImageSegmentation(config).eval()
    with record_entropy(model) as recording:
        model(input_ids=tokens(), pixel_values=torch.randn(2, 3, 16, 16))
    assert sum("decoder" in layer.name for layer in recording) == 2
    assert len(recording) == 6
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    assert {config._attn_implementation for config in configs.values()} == {"sdpa"}


# Nothing left behind


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything that a recording touches."""
    return {
        name: (
            sorted(part.__dict__),
            list(part._forward_hooks),
            list(part._forward_pre_hooks),
            getattr(getattr(part, "config", None), "_attn_implementation", None),
        )
        for name, part in model.named_modules()
    }


def test_the_model_is_left_as_it_was_found(tmp_path: Path) -> None:
    model = llama()
    before = state_of(model)
    plain = model(tokens()).logits
    with record_entropy(model):
        model(tokens())
    assert state_of(model) == before
    with pytest.raises(RuntimeError, match="size mismatch"), record_entropy(model):
        model(tokens()).logits @ torch.ones(3)
    with pytest.raises(IndexError), record_entropy(model):
        model(tokens() + 1000)  # no such token: forward raises inside its hooks
    assert state_of(model) == before
    assert torch.equal(model(tokens()).logits, plain)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert "entropy" not in (tmp_path / "config.json").read_text()
    assert torch.equal(loaded.eval()(tokens()).logits, plain)


def test_a_copy_made_inside_a_recording_is_apart() -> None:
    model = llama()
    with record_entropy(model) as recording:
        model(tokens())
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert len(recording) == 2
    for other in (twin, loaded):
        other(tokens())  # the first pass finds that nobody listens
        assert state_of(other) == state_of(model)
        with record_entropy(other) as apart:
            other(tokens())
        torch.testing.assert_close(apart[1].entropy, recording[1].entropy)


def test_recordings_nest_and_do_not_mix() -> None:
    one, two = llama(), gpt2()
    with record_entropy(one) as outer, record_entropy(two) as other:
        one(tokens())
        with record_entropy(one, layers="*1.self_attn", gradient=False) as inner:
            one(tokens(5))
        two(tokens())
    assert [layer.entropy.shape[-1] for layer in outer] == [9, 9, 5, 5]
    assert [layer.name for layer in inner] == ["model.layers.1.self_attn"]
    assert not inner[0].entropy.requires_grad
    assert [layer.name for layer in other] == ["transformer.h.0.attn", "transformer.h.1.attn"]


def test_recordings_may_end_in_another_order_than_they_began() -> None:
    model, first, second = llama(), contextlib.ExitStack(), contextlib.ExitStack()
    before = state_of(model)
    one = first.enter_context(record_entropy(model))
    two = second.enter_context(record_entropy(model))
    model(tokens())
    first.close()
    model(tokens())
    second.close()
    assert (len(one), len(two)) == (2, 4)
    assert state_of(model) == before


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("kind", ["part", "twin", "copy"])
def test_a_config_is_put_back_by_the_last_that_needs_it(kind: str, order: tuple[int, int]) -> None:
    whole = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))
    part = whole.vision_model if kind == "part" else CLIPModel(whole.config)
    configs = [whole.config, whole.config.vision_config, whole.config.text_config]
    contexts = [contextlib.ExitStack(), contextlib.ExitStack()]
    contexts[0].enter_context(record_entropy(whole))
    if kind == "copy":  # which is recorded before its first pass
        part = copy.deepcopy(whole)
        configs += [part.config, part.config.vision_config, part.config.text_config]
    contexts[1].enter_context(record_entropy(part))
    for index in order:
        assert configs[1]._attn_implementation == "entropy_regularization" or kind == "copy"
        contexts[index].close()
    if kind == "copy":
        part(input_ids=tokens(), pixel_values=torch.randn(2, 3, 16, 16))
    assert {config._attn_implementation for config in configs} == {"sdpa"}


def test_checkpointed_recordings_of_a_model_and_its_part_put_all_back() -> None:
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with record_entropy(model), record_entropy(model.model):
        loss = model(tokens()).logits.square().mean()
    loss.backward()
    assert model.config._attn_implementation == "entropy_regularization"
    model(tokens())
    assert model.config._attn_implementation == "sdpa"


def test_one_model_is_recorded_by_one_thread_at_a_time() -> None:
    model = llama()

    def record() -> None:
        with record_entropy(model):
            model(tokens())

    with record_entropy(model) as recording, ThreadPoolExecutor(1) as pool:
        model(tokens())
        with pytest.raises(RuntimeError, match="another thread records the same LlamaForCausalLM"):
            pool.submit(record).result()
    assert len(recording) == 2
    record()


def test_a_thread_that_is_refused_takes_nothing_from_the_other() -> None:
    model = llama()
    with record_entropy(model) as recording, ThreadPoolExecutor(1) as pool:
        given = [part.__dict__[RECORDERS] for part in model.modules()]
        with pytest.raises(RuntimeError, match="another thread"):
            pool.submit(record_entropy(model).__enter__).result()
        for part, recorders in zip(model.modules(), given, strict=True):
            assert part.__dict__[RECORDERS] is recorders  # not for a moment without them
        model(tokens())
    assert len(recording) == 2


def test_a_start_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().train()
    before = state_of(model)
    handle = regularize(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "set_attn_implementation", None)
        for _ in range(2):
            with pytest.raises(TypeError, match="not callable"):
                model(tokens())
        assert not interception._listeners
    assert model.config._attn_implementation == "sdpa"
    model(tokens(), labels=tokens())
    handle.remove()
    assert state_of(model) == before


def test_a_start_that_fails_in_a_second_model_puts_the_first_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    towers = Towers()
    monkeypatch.setattr(type(towers.two), "set_attn_implementation", None)
    with pytest.raises(TypeError, match="not callable"), record_entropy(towers):
        pass
    assert towers.one.config._attn_implementation == "sdpa"


def test_a_part_that_is_exchanged_inside_a_recording_is_left_as_it_was_found() -> None:
    model = llama()
    before, other = state_of(model), llama().model.layers[1]
    layers, replaced = model.model.layers, model.model.layers[1]
    with record_entropy(model, allow_partial=True):
        model(tokens())
        layers[1] = other
    assert state_of(model) == before
    layers[1] = replaced
    assert state_of(model) == before


def test_models_exchanged_between_the_recordings_of_one_recorder_are_heard() -> None:
    model = Towers().eval()
    recorder = make_recorder(model)
    for tower in (model.one, llama().model):
        model.one = tower
        recorder.start()
        assert tower.config._attn_implementation != "sdpa"
        model(tokens(), padding("right"))
        assert [layer.name for layer in recorder.stop()][:2] == [
            "one.layers.0.self_attn",
            "one.layers.1.self_attn",
        ]
        assert tower.config._attn_implementation == "sdpa"


def test_configs_of_parts_that_cannot_be_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    attention, head = model.model.layers[1].self_attn, model.lm_head
    attention.config, head.config = copy.deepcopy(model.config), copy.deepcopy(model.config)
    cannot = classmethod(lambda cls: False)
    monkeypatch.setattr(type(model.model), "_can_set_attn_implementation", cannot)
    with record_entropy(model):
        assert attention.config._attn_implementation == "sdpa"
        assert model.config._attn_implementation == head.config._attn_implementation != "sdpa"
    assert model.config._attn_implementation == head.config._attn_implementation == "sdpa"


def test_threads_record_their_own_models() -> None:
    models = [llama() for _ in range(4)]
    with record_entropy(models[0]) as recording:
        models[0](tokens())
    barrier = threading.Barrier(4)

    def work(model: PreTrainedModel) -> Tensor:
        barrier.wait()
        for _ in range(5):
            with record_entropy(model) as mine:
                model(tokens())
            assert len(mine) == 2
        return mine[1].entropy

    with ThreadPoolExecutor(4) as pool:
        for entropy in pool.map(work, models):
            torch.testing.assert_close(entropy, recording[1].entropy)


# Machinery


def penalised(model: PreTrainedModel, n: int = 9, inside: bool = False) -> dict[str, Tensor]:
    """Return the gradients of logits and entropies, backward after the context or inside it."""
    model.zero_grad()
    context = contextlib.ExitStack()
    recording = context.enter_context(record_entropy(model))
    with context:
        logits = model(tokens(n)).logits
        if not inside:
            context.close()
        weights = torch.arange(1.0, 1 + len(recording))
        entropies = [w * layer.entropy.square().sum() for w, layer in zip(weights, recording)]  # noqa: B905
        (logits.float().square().mean() + sum(entropies)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], budget: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.float().abs().max() + 1e-6
        assert (found[name].float() - gradient.float()).abs().max() <= budget * scale, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_exact_or_refused(reentrant: bool) -> None:
    expected = penalised(llama())
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
        for frozen in (False, True):  # what is frozen still hands a gradient on to what is not
            model.model.layers.requires_grad_(not frozen)
            with pytest.raises(RuntimeError, match="use_reentrant': False"):
                penalised(model)
    else:
        for _ in range(2):  # the second pass begins while the attention of the first is still set
            assert_near(penalised(model), expected, 1e-5)
    assert model.config._attn_implementation in ("sdpa", "entropy_regularization")
    model(tokens())  # the next pass is the model's own again
    assert model.config._attn_implementation == "sdpa"


def falcon() -> PreTrainedModel:
    config = FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    return sharpen(FalconForCausalLM(config))


class WholeCheckpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> object:
        return checkpoint(self.model, *args, use_reentrant=False)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["through torch", "direct"])
def test_checkpointing_of_other_kinds_is_exact(kind: str, inside: bool) -> None:
    model = (falcon() if kind == "through torch" else llama()).train()
    model.config.use_cache = False
    expected = penalised(model)
    if kind == "through torch":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found = penalised(model, inside=inside)
    else:
        found = penalised(WholeCheckpointed(model), inside=inside)
        found = {name.removeprefix("model."): gradient for name, gradient in found.items()}
    assert_near(found, expected, 1e-5)


@pytest.mark.parametrize("part", ["model", "layers", "wrapped layers"])
def test_compiled_models_break_no_graph_and_are_compiled_once(part: str) -> None:
    expected = penalised(llama())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = llama()
    if part == "model":
        forward = torch.compile(model, backend="aot_eager")
    else:
        forward = model
        for index, layer in enumerate(model.model.layers):
            if part == "layers":
                layer.compile(backend="aot_eager")
            else:
                model.model.layers[index] = torch.compile(layer, backend="aot_eager")
        penalised(forward)  # is watched, and compiles nothing
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    found = penalised(forward)
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = penalised(forward)
    strip = {name.replace("_orig_mod.", ""): gradient for name, gradient in found.items()}
    assert_near(strip, expected, 1e-5)
    assert_near(again, found, 1e-6)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if part == "model" else 2)
    penalised(forward, 8)  # a second length makes lengths symbols; a third needs nothing
    with torch._dynamo.config.patch(error_on_recompile=True):
        shorter = penalised(forward, 7)
    strip = {name.replace("_orig_mod.", ""): gradient for name, gradient in shorter.items()}
    assert_near(strip, penalised(llama(), 7), 1e-5)


def penalised_eager(model: PreTrainedModel) -> dict[str, Tensor]:
    """As penalised, by eager matrices."""
    model.zero_grad()
    model.set_attn_implementation("eager")
    output = model(tokens(), output_attentions=True)
    total = output.logits.double().square().mean()
    for number, matrix in enumerate(output.attentions):
        matrix = matrix.double()
        entropy = -(matrix * matrix.clamp(min=1e-30).log()).sum(-1)  # entr has no gradient at 0
        total = total + (number + 1) * entropy.square().sum()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    pairs = [(found[name].double(), wanted[name].double()) for name in wanted]
    error = sum((a - b).square().sum() for a, b in pairs)
    return float((error / sum(b.square().sum() for _, b in pairs)).sqrt())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_no_further_off_than_eager_attention(
    dtype: torch.dtype, autocast: bool
) -> None:
    exact = penalised_eager(llama().double())
    assert distance(penalised(llama()), exact) <= 1e-5
    model, twin = (llama() if autocast else llama().to(dtype) for _ in range(2))
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found, eager = penalised(model), penalised_eager(twin)
        with record_entropy(model) as recording:
            model(tokens())
    assert recording[0].entropy.dtype == torch.float32
    assert distance(found, exact) <= 1.5 * distance(eager, exact)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_adapters(kind: str) -> None:
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    settings = {
        "lora": LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False),
        "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    model = get_peft_model(llama(), settings[kind])
    with record_entropy(model) as recording:
        model(input_ids=tokens())
    sum(layer.entropy.sum() for layer in recording).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert recording[0].keys == (12 if kind == "prefix" else 9)
    assert recording[0].allowed_keys.flatten().tolist()[:9] == (
        list(range(4, 13)) if kind == "prefix" else list(range(1, 10))
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_that_of_sdpa_and_gives_one_row_a_step(cache: str) -> None:
    model, mask = llama(), padding("left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 63}
    options |= {"attention_mask": mask, "cache_implementation": cache}
    if cache == "static":
        options["disable_compile"] = True
    expected = model.generate(tokens(), **options)
    with record_entropy(model, gradient=False) as recording:
        found = model.generate(tokens(), **options)
    assert torch.equal(found, expected)
    steps = len(recording) // 2
    assert steps == expected.shape[1] - 9
    assert recording[0].entropy.shape == (2, 4, 9)
    assert all(layer.entropy.shape == (2, 4, 1) for layer in recording.layers[2:])
    seen = [layer.allowed_keys.flatten().tolist() for layer in recording.layers[2::2]]
    assert seen == [[10 + step, 7 + step] for step in range(steps - 1)]
    assert torch.equal(recording[0].rows, mask.bool())


@pytest.mark.parametrize("part", ["forward", "h.0"])
def test_a_softmax_is_not_left_out_of_what_no_hook_tells_of(part: str) -> None:
    model = GPTNeoModel(
        GPTNeoConfig(
            vocab_size=64,
            hidden_size=16,
            num_heads=4,
            attention_types=[[["global"], 1]],
            num_layers=1,
        )
    )
    block, embedded = model.h[0], torch.randn(2, 5, 16)
    message = "GPTNeoModel takes a softmax where no model was called; call the model, not its"
    run = (lambda: model.forward(tokens())) if part == "forward" else (lambda: block(embedded))
    with pytest.raises(ValueError, match=message), record_entropy(model):
        run()


def test_a_pass_that_is_not_to_be_recorded_is_not_refused() -> None:
    recorder = TransformersRecorder(model := BloomForCausalLM(BLOOM), training_only=True)
    recorder.start()
    for gradient in (False, True, False):
        with torch.set_grad_enabled(gradient):
            model(tokens())
    assert len(recorder.stop().layers) == 2


def test_generation_records_an_encoder_that_is_no_model_by_itself() -> None:
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_beams": 1}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "src_vocab_size": 64, "tgt_vocab_size": 64}
    model = FSMTForConditionalGeneration(FSMTConfig(langs=["en", "de"], **sizes, **heads, **layers))
    mask = padding("right")
    for _ in range(2):
        with record_entropy(model.eval()) as recording:
            model.generate(tokens(), attention_mask=mask, max_new_tokens=1, do_sample=False)
        names = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn"]
        names += ["decoder.layers.0.encoder_attn"]
        assert [layer.name for layer in recording] == [f"model.{name}" for name in names]
        assert torch.equal(recording[0].rows, mask.bool())


@pytest.mark.parametrize("kind", ["beams", "sampling", "assisted", "encoder and decoder"])
def test_generation_of_other_kinds_is_that_of_sdpa(kind: str) -> None:
    model = bart() if kind == "encoder and decoder" else llama()
    options: dict[str, object] = {
        "beams": {"num_beams": 3},
        "sampling": {"do_sample": True, "num_return_sequences": 2},
        "assisted": {"assistant_model": llama(), "do_sample": False},
        "encoder and decoder": {"num_beams": 2},
    }[kind]
    ids = tokens(batch=1) if kind == "assisted" else tokens()
    mask = padding("left")[: len(ids)]
    options |= {"attention_mask": mask, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": 63}
    torch.manual_seed(0)
    expected = model.generate(ids, **options)
    torch.manual_seed(0)
    with record_entropy(model, gradient=False) as recording:
        found = model.generate(ids, **options)
    assert torch.equal(found, expected)
    assert recording[0].entropy.shape[-1] == (10 if kind == "assisted" else 9)  # with a candidate
    assert recording[0].rows[:, :9].sum() % mask.sum() == 0
    if kind == "encoder and decoder":
        assert [layer.kind for layer in recording][:6] == ["self", "self", *["self", "cross"] * 2]
        assert recording[3].keys == 9


def test_static_cache_by_hand() -> None:
    model = llama()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with record_entropy(model) as recording:
        model(tokens(), past_key_values=cache)
    with record_entropy(model) as plain:
        model(tokens(), use_cache=False)
    torch.testing.assert_close(recording[1].entropy, plain[1].entropy, rtol=0, atol=1e-5)
    assert torch.equal(recording[1].allowed_keys, plain[1].allowed_keys)


@pytest.mark.parametrize("kind", ["decoder", "encoder and decoder"])
def test_the_mask_of_a_static_cache_may_be_as_long_as_it(kind: str) -> None:
    model, given, name = llama(), {}, "attention_mask"
    if kind == "encoder and decoder":
        model, name = bart(), "decoder_attention_mask"
        given["encoder_outputs"] = model.get_encoder()(tokens(), return_dict=True)
    ids = "decoder_input_ids" if given else "input_ids"
    cache, mask = StaticCache(config=model.config, max_cache_len=16), padding("left")
    if given:
        cache = EncoderDecoderCache(cache, StaticCache(config=model.config, max_cache_len=16))
    rows = []
    for first, stop in ((0, 5), (5, 9)):
        whole = torch.nn.functional.pad(mask[:, :stop], (0, 16 - stop))
        with record_entropy(model, gradient=False) as recording:
            inputs = {ids: tokens()[:, first:stop], name: whole}
            model(past_key_values=cache, use_cache=True, **inputs, **given)
        rows.append(recording[0].rows)
    assert torch.equal(torch.cat(rows, 1), mask.bool())


# Structured masks


def test_packed_documents_by_position_ids() -> None:
    model = llama().train()
    model.config.use_cache = False
    positions = torch.cat((torch.arange(4), torch.arange(5)))[None]
    ids = tokens(9, batch=1)
    with record_entropy(model) as recording:
        model(ids, position_ids=positions)
    with record_entropy(model) as apart:
        model(ids[:, :4])
        model(ids[:, 4:])
    expected = torch.cat((apart[1].entropy, apart[3].entropy), -1)
    torch.testing.assert_close(recording[1].entropy, expected, rtol=0, atol=1e-5)
    assert recording[1].allowed_keys.flatten().tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 5]


FLAT = torch.cat((torch.arange(4), torch.arange(5)))[None]
LENGTHS = torch.tensor([0, 4, 9], dtype=torch.int32)
VARLEN = {"cu_seq_lens_q": LENGTHS, "cu_seq_lens_k": LENGTHS, "max_length_q": 5, "max_length_k": 5}


@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": FLAT},
        {"position_ids": FLAT + 2},
        {"position_ids": FLAT, "attention_mask": torch.ones(1, 9, dtype=torch.long)},
        VARLEN,
        {"position_ids": FLAT, **VARLEN},
    ],
)
def test_flattened_texts_are_apart_where_flash_attention_takes_them_apart(
    given: dict[str, object],
) -> None:
    """With a cache too, as in training by default: the masks of other attentions say nothing."""
    model, ids = llama().train(), tokens(9, batch=1)
    model.config._attn_implementation_internal = "flash_attention_2"  # which no CPU can run
    with record_entropy(model) as recording:
        model(ids, **given)
    assert model.config._attn_implementation == "flash_attention_2"
    with record_entropy(model) as apart:
        model(ids[:, :4])
        model(ids[:, 4:])
    for layer in (0, 1):
        expected = torch.cat((apart[layer].entropy, apart[layer + 2].entropy), -1)
        torch.testing.assert_close(recording[layer].entropy, expected, rtol=0, atol=1e-5)
        assert recording[layer].allowed_keys.flatten().tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 5]
        assert recording[layer].rows.all()
    assert recording[0].allowed_keys is recording[1].allowed_keys


@pytest.mark.parametrize(
    "given", [{"position_ids": FLAT}, VARLEN, {"position_ids": torch.arange(9)[None] + 3}]
)
def test_one_text_remains_one(given: dict[str, object]) -> None:
    """As the model's own attention has it, which takes no note of lengths, or is given one text."""
    model, ids = llama(), tokens(9, batch=1)
    if "position_ids" in given and given["position_ids"] is not FLAT:
        model.config._attn_implementation_internal = "flash_attention_2"
    with record_entropy(model) as recording:
        output = model(ids, **given)
    assert recording[1].allowed_keys.flatten().tolist() == list(range(1, 10))
    model.config._attn_implementation_internal = "sdpa"
    torch.testing.assert_close(output.logits, model(ids, **given).logits)


def test_lengths_of_flattened_texts_in_several_rows_are_refused() -> None:
    model = llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    sentence = "cu_seq_lens came for a query of 2 x 9 and 9 keys; pass flattened texts as one row"
    with pytest.raises(NotImplementedError, match=sentence), record_entropy(model):
        model(tokens(), **VARLEN)


def test_penalty_of_a_recording_and_its_means() -> None:
    model = llama()
    with record_entropy(model) as recording:
        model(tokens(), attention_mask=padding("right"))
    assert EntropyRegularization.calibrated()(recording, 0.5).requires_grad
    mean = recording[0].mean_per_head()
    real = recording[0].rows[:, None].expand_as(recording[0].entropy)
    by_hand = recording[0].entropy.masked_fill(~real, 0.0).sum((0, 2)) / 15
    torch.testing.assert_close(mean, by_hand)
    assert mean.max() <= math.log(9)


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_matrices_that_are_asked_for_are_refused(
    build: Callable[[], PreTrainedModel], by: str
) -> None:
    """Some families gather them around their attention, which is then not told."""
    model = build().eval()
    model.set_attn_implementation("eager")
    model.config.output_attentions = by == "configuration"
    asked = {"output_attentions": True} if by == "argument" else {}
    with pytest.raises(ValueError, match="no attention matrix is ever made"), record_entropy(model):
        model(tokens(), **asked)
    assert len(model(tokens(), **asked).attentions) == 2
    with record_entropy(model) as recording:
        model(tokens(), output_attentions=False)
    assert len(recording) == 2


def test_matrices_that_a_model_makes_anyway_may_be_asked_for() -> None:
    model = sharpen(BloomForCausalLM(BLOOM))
    with record_entropy(model) as recording:
        matrices = model(tokens(), output_attentions=True).attentions
    for layer, matrix in zip(recording, matrices, strict=True):
        expected = torch.special.entr(matrix).sum(-1)
        torch.testing.assert_close(layer.entropy, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first", ["whole", "part"])
def test_a_layer_is_recorded_inside_a_model_that_is(first: str) -> None:
    model = llama().eval()
    layer = model.model.layers[1]
    pair = (model, layer) if first == "whole" else (layer, model)
    with record_entropy(pair[0]) as one, record_entropy(pair[1]) as other:
        model(tokens())
    whole, part = (one, other) if first == "whole" else (other, one)
    assert [each.name for each in part] == ["self_attn"]
    assert len(whole) == 2
    torch.testing.assert_close(part[0].entropy, whole[1].entropy)
    assert part[0].entropy.requires_grad
