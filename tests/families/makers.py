"""Makers of inputs: one function for every name that a forward pass may ask for."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

BATCH, TEXT, TARGET = 2, 11, 7
FRAMES, PATCHES = 40, 16
# Families whose images come in tiles or frames, which no signature tells.
TILED = set(
    "idefics2 idefics3 smolvlm modernvbert colmodernvbert ultravbert mllama idefics "
    "granite_docling lightglue superglue".split()
)
# Codecs hear one channel of samples; other models hear frames with the bins first.
CODECS = set(
    "dac encodec mimi mimi_encoder pe_audio pe_audio_encoder neucodec xcodec xcodec2 "
    "pocket_tts_audio_tokenizer pocket_tts_audio_tokenizer_encoder".split()
)
HIGH = set("glmasr glmasr_encoder voxtral_realtime voxtral_realtime_encoder clvp".split())
FILMED = set("timesformer vivit videomae vjepa2 videoprism tvp xclip xclip_vision_model".split())
FIRST_TOKEN, TOKENS = 5, 90  # no special token is drawn


class Source:
    """The numbers of one model's inputs.

    Args:
        model: the model.
        generator: the source of all randomness.
    """

    def __init__(self, model: PreTrainedModel, generator: torch.Generator) -> None:
        self.model = model
        self.config = model.config
        self.generator = generator
        self.parameters = inspect.signature(model.forward).parameters

    def normal(self, *shape: int) -> Tensor:
        """Draw a tensor in the model's dtype."""
        return torch.randn(shape, generator=self.generator).to(self.model.dtype)

    def tokens(self, length: int) -> Tensor:
        """Draw texts without special tokens."""
        shape = (BATCH, length)
        return torch.randint(FIRST_TOKEN, FIRST_TOKEN + TOKENS, shape, generator=self.generator)

    def field(self, *names: str, default: int) -> int:
        """Find a number in the configuration or, failing that, in its parts."""
        for name in names:
            for config in _with_parts(self.config):
                value = getattr(config, name, None)
                value = value[0] if isinstance(value, list | tuple) and value else value
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return default


def _with_parts(config: Any) -> list[Any]:
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *[each for part in parts if part is not None for each in _with_parts(part)]]


def _images(source: Source) -> Tensor:
    size = source.field("image_size", "img_size", default=32)
    channels = source.field(
        "num_channels", "in_channels", "in_chans", "num_input_channels", default=3
    )
    patch = source.field("patch_size", "spatial_patch_size", default=8)
    family = source.config.model_type
    if {"image_grid_thw", "grid_thw"} & set(source.parameters):
        time = source.field("temporal_patch_size", default=1)
        return source.normal(BATCH * PATCHES, channels * time * patch * patch)
    if "spatial_shapes" in source.parameters or family == "fuyu":
        return source.normal(BATCH, PATCHES, channels * patch * patch)
    if family == "mllama":
        return source.normal(BATCH, 1, 4, channels, size, size)
    if hasattr(source.config, "image_grid_pinpoints"):
        return source.normal(BATCH, 2, channels, size, size)  # the whole and its only tile
    if family in TILED:
        return source.normal(BATCH, 1, channels, size, size)
    if family in FILMED or source.model.main_input_name == "pixel_values_videos":
        return source.normal(BATCH, source.field("num_frames", default=2), channels, size, size)
    return source.normal(BATCH, channels, size, size)


def _sounds(source: Source) -> Tensor:
    family = source.config.model_type
    if family == "audio-spectrogram-transformer":
        return source.normal(BATCH, source.config.max_length, source.config.num_mel_bins)
    length = 4000 if family.startswith("moonshine") else 400
    return source.normal(BATCH, *[1] * (family in CODECS), length)


def _boxes(source: Source) -> Tensor:
    length = TEXT
    corner = torch.randint(0, 50, (BATCH, length, 2), generator=source.generator)
    return torch.cat([corner, corner + 20], dim=-1)


def _features(source: Source) -> Tensor:
    bins = source.field(
        "num_mel_bins",
        "n_mels",
        "feature_projection_input_dim",
        "feature_size",
        "feat_dim",
        default=16,
    )
    positions = source.field("max_source_positions", default=0)
    if source.config.model_type in HIGH:
        return source.normal(BATCH, bins, FRAMES)
    if positions and source.config.model_type not in ("speech_to_text", "speech-encoder-decoder"):
        return source.normal(BATCH, bins, 2 * positions)
    return source.normal(BATCH, FRAMES, bins)


def _sound_mask(source: Source) -> Tensor:
    return torch.ones(BATCH, FRAMES, dtype=torch.int64)


def _grid(source: Source) -> Tensor:
    return torch.tensor([[1, 4, 4]] * BATCH)


def _has_lags(source: Source) -> bool:
    return hasattr(source.config, "lags_sequence")


def _past(source: Source) -> int:
    return int(source.config.context_length) + max(source.config.lags_sequence)


def _series(source: Source) -> tuple[int, int, int]:
    return BATCH, source.field("context_length", default=32), 1


def _sizes(source: Source) -> Tensor:
    size = source.field("image_size", default=32)
    return torch.tensor([[size, size]] * BATCH)


MAKERS: dict[str, Callable[[Source], Any]] = {
    "input_ids": lambda source: source.tokens(TEXT),
    "decoder_input_ids": lambda source: source.tokens(TARGET),
    "pixel_values": _images,
    "pixel_values_videos": _images,
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "image_sizes": _sizes,
    "bbox": _boxes,
    "input_features": _features,
    "input_values": _sounds,
    "hidden_states": lambda source: source.normal(
        BATCH * PATCHES,
        source.field("in_channels", "in_chans", "num_channels", default=3)
        * source.field("temporal_patch_size", default=1)
        * source.field("patch_size", "spatial_patch_size", default=8) ** 2,
    ),
    "input_features_mask": _sound_mask,
    "feature_attention_mask": _sound_mask,
    "pixel_attention_mask": lambda source: torch.ones(BATCH, PATCHES, dtype=torch.bool),
    "spatial_shapes": lambda _: torch.tensor([[4, 4]] * BATCH),
    "qformer_input_ids": lambda source: source.tokens(TEXT),
    "image_merge_sizes": lambda _: torch.tensor([1] * BATCH),
    "merge_sizes": lambda _: torch.tensor([1] * BATCH),
    "visual_feats": lambda source: source.normal(
        BATCH, 5, source.field("visual_feat_dim", default=16)
    ),
    "visual_pos": lambda source: source.normal(BATCH, 5, 4),
    "aspect_ratio_ids": lambda _: torch.ones(BATCH, 1, dtype=torch.int64),
    "aspect_ratio_mask": lambda _: torch.ones(BATCH, 1, 4, dtype=torch.int64),
    "image_attention_mask": lambda _: torch.ones(BATCH, TEXT, 1, dtype=torch.int64),
    "image_embeds_position_mask": lambda _: (torch.arange(TEXT) < 8).repeat(BATCH, 1),
    "flattened_patches": lambda source: source.normal(BATCH, PATCHES, 2 + 3 * 64),
    "past_values": lambda source: source.normal(
        *((BATCH, _past(source)) if _has_lags(source) else _series(source))
    ),
    "past_time_features": lambda source: source.normal(BATCH, _past(source), 1),
    "past_observed_mask": lambda source: torch.ones(
        (BATCH, _past(source)) if _has_lags(source) else _series(source), dtype=source.model.dtype
    ),
    "future_values": lambda source: source.normal(BATCH, 4),
    "future_time_features": lambda source: source.normal(BATCH, 4, 1),
    "query_embeds": lambda source: source.normal(BATCH, 8, 64),
    "encoder_hidden_states": lambda source: source.normal(BATCH, 9, 64),
    "audio_mel": _features,
    "audio_mel_mask": lambda _: torch.zeros(BATCH, FRAMES, dtype=torch.bool),
    "decoder_input_values": lambda source: source.normal(BATCH, TARGET, 16),
    "task_inputs": lambda source: source.tokens(TEXT),
    "input_points": lambda source: source.normal(BATCH, 1, 1, 2).abs(),
}
