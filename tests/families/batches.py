"""A batch of inputs for any tiny model, from the signature of its forward and its configuration."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

BATCH, TEXT, TARGET, PADDED = 2, 11, 7, 3
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
PADDINGS = ("none", "left", "right")


class Batches:
    """Makes the inputs of one model.

    Args:
        model: the model.
        generator: the source of all numbers.
    """

    def __init__(self, model: PreTrainedModel, generator: torch.Generator) -> None:
        self.model = model
        self.config = model.config
        self.generator = generator
        self.parameters = inspect.signature(model.forward).parameters

    def make(self, padding: str) -> dict[str, Any]:
        """Return the keywords of a forward pass.

        Raises:
            ValueError: if the model wants an input that is not known here.
        """
        batch: dict[str, Any] = {}
        for name, maker in MAKERS.items():
            if name in self.parameters and self._wanted(name):
                batch[name] = maker(self)
        required = [
            name
            for name, parameter in self.parameters.items()
            if parameter.default is inspect.Parameter.empty
            and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            and name not in batch
        ]
        if required:
            raise ValueError(f"no maker for the inputs {', '.join(required)}")
        self._end_texts(batch)
        self._place_features(batch)
        self._pad(batch, padding)
        return batch

    def _wanted(self, name: str) -> bool:
        parameter = self.parameters[name]
        if parameter.default is inspect.Parameter.empty or name == self.model.main_input_name:
            return True
        if name == "input_ids":
            return "text" in _modalities(self.model) or "decoder_input_ids" in self.parameters
        if name.startswith("decoder_"):
            return bool(getattr(self.config, "is_encoder_decoder", False))
        if name == "image_sizes":
            vision = getattr(self.config, "vision_config", None)
            pixtral = getattr(vision, "model_type", None) == "pixtral"
            return pixtral or hasattr(self.config, "image_grid_pinpoints")
        if name in ALWAYS:
            return True
        if name == "pixel_attention_mask":
            return "spatial_shapes" in self.parameters
        if name in ("pixel_values", "input_features"):
            return bool({"image", "audio"} & _modalities(self.model))
        return False

    def _end_texts(self, batch: dict[str, Any]) -> None:
        """End every text before its padding: some models pool the row of the end token."""
        end = self.field("eos_token_id", default=-1)
        if "input_ids" in batch and end >= 0:
            batch["input_ids"][:, -PADDED - 1] = end

    # Text, and the places in it where features of images and sounds go.

    def _place_features(self, batch: dict[str, Any]) -> None:
        if "input_ids" not in batch:
            return
        for token, asked, inputs in PLACED:
            identifier = getattr(self.config, f"{token}_token_id", None)
            if identifier is None:
                identifier = getattr(self.config, f"{token}_token_index", None)
            function = getattr(self.model, asked, None)
            given = {name: batch[name] for name in inputs if name in batch}
            if identifier is None or function is None or not given:
                continue
            asks = inspect.signature(function).parameters
            given = {name: value for name, value in given.items() if name in asks}
            with torch.no_grad():
                count = _count_features(function(**given)) // BATCH
            start = getattr(self.config, "vision_start_token_id", None)
            marks = [identifier] * count if start is None else [start, *[identifier] * count]
            inserted = torch.tensor([marks] * BATCH)
            text = batch["input_ids"]
            batch["input_ids"] = torch.cat([text[:, :5], inserted, text[:, 5:]], dim=1)
        if "mm_token_type_ids" in self.parameters:
            image = getattr(self.config, "image_token_id", -1)
            batch["mm_token_type_ids"] = (batch["input_ids"] == image).long()

    def _pad(self, batch: dict[str, Any], padding: str) -> None:
        """Pad the first text of the batch, on the side asked for."""
        if padding == "none" or "input_ids" not in batch:
            return
        mask = torch.ones_like(batch["input_ids"])
        place = slice(0, PADDED) if padding == "left" else slice(-PADDED, None)
        mask[0, place] = 0
        fill = getattr(self.config, "pad_token_id", None) or 0
        batch["input_ids"] = batch["input_ids"].masked_fill(mask == 0, fill)
        batch["attention_mask"] = mask
        if "decoder_input_ids" in batch and "decoder_attention_mask" in self.parameters:
            decoder = torch.ones_like(batch["decoder_input_ids"])
            decoder[0, : 2 if padding == "left" else 0] = 0
            decoder[0, decoder.shape[1] - (2 if padding == "right" else 0) :] = 0
            batch["decoder_attention_mask"] = decoder

    # Numbers.

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


def _modalities(model: PreTrainedModel) -> set[str]:
    said = getattr(model, "input_modalities", None) or ("text",)
    return {said} if isinstance(said, str) else set(said)


def _with_parts(config: Any) -> list[Any]:
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *[each for part in parts if part is not None for each in _with_parts(part)]]


def _count_features(found: Any) -> int:
    """Count the feature vectors that a model made of its images."""
    if hasattr(found, "pooler_output") and found.pooler_output is not None:
        found = found.pooler_output
    elif hasattr(found, "last_hidden_state"):
        found = found.last_hidden_state
    if isinstance(found, Tensor):
        return found.numel() // found.shape[-1]
    return sum(_count_features(part) for part in found)


def _images(batches: Batches) -> Tensor:
    size = batches.field("image_size", "img_size", default=32)
    channels = batches.field("num_channels", "in_channels", "in_chans", "num_input_channels", default=3)
    patch = batches.field("patch_size", "spatial_patch_size", default=8)
    family = batches.config.model_type
    if {"image_grid_thw", "grid_thw"} & set(batches.parameters):
        time = batches.field("temporal_patch_size", default=1)
        return batches.normal(BATCH * PATCHES, channels * time * patch * patch)
    if "spatial_shapes" in batches.parameters:
        return batches.normal(BATCH, PATCHES, channels * patch * patch)
    if family == "mllama":
        return batches.normal(BATCH, 1, 4, channels, size, size)
    if hasattr(batches.config, "image_grid_pinpoints"):
        return batches.normal(BATCH, 2, channels, size, size)  # the whole and its only tile
    if family in TILED:
        return batches.normal(BATCH, 1, channels, size, size)
    if family in FILMED or "pixel_values_videos" == batches.model.main_input_name:
        return batches.normal(BATCH, batches.field("num_frames", default=2), channels, size, size)
    return batches.normal(BATCH, channels, size, size)


def _sounds(batches: Batches) -> Tensor:
    family = batches.config.model_type
    if family == "audio-spectrogram-transformer":
        return batches.normal(BATCH, batches.config.max_length, batches.config.num_mel_bins)
    length = 4000 if family.startswith("moonshine") else 400
    return batches.normal(BATCH, *[1] * (family in CODECS), length)


def _boxes(batches: Batches) -> Tensor:
    length = TEXT
    corner = torch.randint(0, 50, (BATCH, length, 2), generator=batches.generator)
    return torch.cat([corner, corner + 20], dim=-1)


def _features(batches: Batches) -> Tensor:
    bins = batches.field(
        "num_mel_bins", "n_mels", "feature_projection_input_dim", "feature_size", "feat_dim", default=16
    )
    positions = batches.field("max_source_positions", default=0)
    if batches.config.model_type in HIGH:
        return batches.normal(BATCH, bins, FRAMES)
    if positions and batches.config.model_type not in ("speech_to_text", "speech-encoder-decoder"):
        return batches.normal(BATCH, bins, 2 * positions)
    return batches.normal(BATCH, FRAMES, bins)


def _sound_mask(batches: Batches) -> Tensor:
    return torch.ones(BATCH, FRAMES, dtype=torch.int64)


def _grid(batches: Batches) -> Tensor:
    return torch.tensor([[1, 4, 4]] * BATCH)


def _sizes(batches: Batches) -> Tensor:
    size = batches.field("image_size", default=32)
    return torch.tensor([[size, size]] * BATCH)


MAKERS: dict[str, Callable[[Batches], Any]] = {
    "input_ids": lambda batches: batches.tokens(TEXT),
    "decoder_input_ids": lambda batches: batches.tokens(TARGET),
    "pixel_values": _images,
    "pixel_values_videos": _images,
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "image_sizes": _sizes,
    "bbox": _boxes,
    "input_features": _features,
    "input_values": _sounds,
    "hidden_states": lambda batches: batches.normal(
        BATCH * PATCHES,
        batches.field("in_channels", "in_chans", "num_channels", default=3)
        * batches.field("temporal_patch_size", default=1)
        * batches.field("patch_size", "spatial_patch_size", default=8) ** 2,
    ),
    "input_features_mask": _sound_mask,
    "feature_attention_mask": _sound_mask,
    "pixel_attention_mask": lambda batches: torch.ones(BATCH, PATCHES, dtype=torch.bool),
    "spatial_shapes": lambda _: torch.tensor([[4, 4]] * BATCH),
    "qformer_input_ids": lambda batches: batches.tokens(TEXT),
    "image_merge_sizes": lambda _: torch.tensor([1] * BATCH),
    "merge_sizes": lambda _: torch.tensor([1] * BATCH),
    "visual_feats": lambda batches: batches.normal(
        BATCH, 5, batches.field("visual_feat_dim", default=16)
    ),
    "visual_pos": lambda batches: batches.normal(BATCH, 5, 4),
    "aspect_ratio_ids": lambda _: torch.ones(BATCH, 1, dtype=torch.int64),
    "aspect_ratio_mask": lambda _: torch.ones(BATCH, 1, 4, dtype=torch.int64),
    "flattened_patches": lambda batches: batches.normal(BATCH, PATCHES, 2 + 3 * 64),
    "past_values": lambda batches: batches.normal(
        BATCH, batches.field("context_length", default=32), 1
    ),
    "query_embeds": lambda batches: batches.normal(BATCH, 8, 64),
    "encoder_hidden_states": lambda batches: batches.normal(BATCH, 9, 64),
    "audio_mel": _features,
    "audio_mel_mask": lambda _: torch.zeros(BATCH, FRAMES, dtype=torch.bool),
    "decoder_input_values": lambda batches: batches.normal(BATCH, TARGET, 16),
    "task_inputs": lambda batches: batches.tokens(TEXT),
    "input_points": lambda batches: batches.normal(BATCH, 1, 1, 2).abs(),
}
IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "image_sizes",
    "image_merge_sizes",
    "spatial_shapes",
    "pixel_attention_mask",
)
SOUNDS = ("input_features", "input_features_mask", "feature_attention_mask")
ALWAYS = set(
    "image_grid_thw grid_thw bbox input_points input_features_mask feature_attention_mask "
    "spatial_shapes image_merge_sizes visual_feats visual_pos aspect_ratio_ids "
    "aspect_ratio_mask".split()
)
PLACED = (
    ("image", "get_image_features", IMAGES),
    ("audio", "get_audio_features", SOUNDS),
)
