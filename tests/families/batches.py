"""A batch of inputs for any tiny model, from the signature of its forward and its configuration."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

BATCH, TEXT, TARGET, PADDED = 2, 11, 7, 3
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
        if name in ("image_grid_thw", "image_sizes", "bbox", "input_points"):
            return True
        if name in ("pixel_values", "input_features"):
            return bool({"image", "audio"} & _modalities(self.model))
        return False

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
            with torch.no_grad():
                count = _count_features(function(**given)) // BATCH
            start = getattr(self.config, f"vision_start_token_id", None)
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
    if "image_grid_thw" in batches.parameters:
        patch = batches.field("patch_size", "spatial_patch_size", default=8)
        time = batches.field("temporal_patch_size", default=1)
        return batches.normal(BATCH * 16, channels * time * patch * patch)
    frames = batches.field("num_frames", default=0) if _is_video(batches.model) else 0
    return batches.normal(*[BATCH, *([frames] if frames else []), channels, size, size])


def _is_video(model: PreTrainedModel) -> bool:
    return _modalities(model) == {"video"}


def _boxes(batches: Batches) -> Tensor:
    length = TEXT
    corner = torch.randint(0, 50, (BATCH, length, 2), generator=batches.generator)
    return torch.cat([corner, corner + 20], dim=-1)


def _features(batches: Batches) -> Tensor:
    bins = batches.field(
        "num_mel_bins", "n_mels", "feature_projection_input_dim", "feature_size", "feat_dim", default=16
    )
    positions = batches.field("max_source_positions", default=0)
    if positions and "whisper" in type(batches.model).__module__ + batches.config.model_type:
        return batches.normal(BATCH, bins, 2 * positions)
    return batches.normal(BATCH, 40, bins)


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
    "input_values": lambda batches: batches.normal(BATCH, 400),
    "input_points": lambda batches: batches.normal(BATCH, 1, 1, 2).abs(),
}
PLACED = (
    ("image", "get_image_features", ("pixel_values", "image_grid_thw", "image_sizes")),
    ("audio", "get_audio_features", ("input_features",)),
)
