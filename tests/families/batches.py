"""A batch of inputs for any tiny model, from the signature of its forward and its configuration."""

import inspect
from typing import Any

import torch
from given import GIVEN
from makers import BATCH, FIRST_TOKEN, MAKERS, Source
from torch import Tensor
from transformers import PreTrainedModel

PADDED = 3
PADDINGS = ("none", "left", "right")
ALWAYS = set(
    "image_grid_thw grid_thw bbox input_points input_features_mask feature_attention_mask "
    "spatial_shapes image_merge_sizes visual_feats visual_pos aspect_ratio_ids "
    "aspect_ratio_mask image_attention_mask image_embeds_position_mask past_time_features "
    "past_observed_mask future_values future_time_features".split()
)
PLACED = (
    ("image", "get_image_features", "pixel_values"),
    ("audio", "get_audio_features", "input_features"),
)


class Batches:
    """Makes the inputs of one model.

    Args:
        model: the model.
        generator: the source of all numbers.
    """

    def __init__(self, model: PreTrainedModel, generator: torch.Generator) -> None:
        self.model = model
        self.config = model.config
        self.source = Source(model, generator)
        self.parameters = self.source.parameters

    def make(self, padding: str) -> dict[str, Any]:
        """Return the keywords of a forward pass.

        Raises:
            ValueError: if the model wants an input that is not known here.
        """
        given = GIVEN.get(self.config.model_type, {})
        batch: dict[str, Any] = {}
        for name, maker in {**MAKERS, **given}.items():
            wanted = name in given or (name in self.parameters and self._wanted(name))
            if wanted and maker is not None:
                batch[name] = maker(self.source)
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
        if "input_ids" not in given:
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
        config = {"pixel_values": "vision_config", "input_features": "audio_config"}.get(name)
        if config is not None and getattr(self.config, config, True) is None:
            return False
        if name in ("pixel_values", "input_features"):
            return bool({"image", "audio"} & _modalities(self.model))
        return False

    def _end_texts(self, batch: dict[str, Any]) -> None:
        """End every text before its padding: some models pool the row of the end token."""
        end = self.source.field("eos_token_id", default=-1)
        if "input_ids" in batch and end >= 0:
            batch["input_ids"][:, -PADDED - 1] = end

    # Text, and the places in it where features of images and sounds go.

    def _place_features(self, batch: dict[str, Any]) -> None:
        if "input_ids" not in batch:
            return
        for token, asked, main in PLACED:
            identifier = self.source.field(f"{token}_token_id", f"{token}_token_index", default=-1)
            parts = (getattr(part, asked, None) for part in self.model.modules())
            function = next(filter(None, parts), None)
            if identifier < 0 or function is None or main not in batch:
                continue
            asks = inspect.signature(function).parameters
            given = {name: value for name, value in batch.items() if name in asks}
            with torch.no_grad():
                count = _count_features(function(**given)) // BATCH
            start = getattr(self.config, "vision_start_token_id", None)
            marks = [identifier] * count if start is None else [start, *[identifier] * count]
            inserted = torch.tensor([marks] * BATCH)
            text = batch["input_ids"]
            batch["input_ids"] = torch.cat([text[:, :5], inserted, text[:, 5:]], dim=1)
        if "mm_token_type_ids" in self.parameters:
            image = self.source.field("image_token_id", default=-1)
            batch["mm_token_type_ids"] = (batch["input_ids"] == image).long()

    def _pad(self, batch: dict[str, Any], padding: str) -> None:
        """Pad the first text of the batch, on the side asked for."""
        if "input_ids" not in batch:
            return
        mask = _unmasked(batch["input_ids"])
        if padding == "none":
            if self.config.model_type == "qwen2_audio":  # the only one that insists on a mask
                batch["attention_mask"] = mask
            return
        place = slice(0, PADDED) if padding == "left" else slice(-PADDED, None)
        mask[0, place] = 0
        fill = getattr(self.config, "pad_token_id", None) or 0
        fill = fill if fill < FIRST_TOKEN else 0  # some wholes say what their text part does not
        codes = [1] * (batch["input_ids"].dim() - 2)
        hidden = (mask == 0).reshape(*mask.shape, *codes)
        batch["input_ids"] = batch["input_ids"].masked_fill(hidden, fill)
        batch["attention_mask"] = mask
        if "decoder_input_ids" in batch and "decoder_attention_mask" in self.parameters:
            decoder = _unmasked(batch["decoder_input_ids"])
            decoder[0, : 2 if padding == "left" else 0] = 0
            decoder[0, decoder.shape[1] - (2 if padding == "right" else 0) :] = 0
            batch["decoder_attention_mask"] = decoder


def _unmasked(texts: Tensor) -> Tensor:
    """Return the mask of texts whose tokens may be several codes each, side by side or stacked."""
    return torch.ones(BATCH, texts.shape[1], dtype=torch.int64)


def _modalities(model: PreTrainedModel) -> set[str]:
    said = getattr(model, "input_modalities", None) or ("text",)
    return {said} if isinstance(said, str) else set(said)


def _count_features(found: Any) -> int:
    """Count the feature vectors that a model made of its images."""
    if hasattr(found, "pooler_output") and found.pooler_output is not None:
        found = found.pooler_output
    elif hasattr(found, "last_hidden_state"):
        found = found.last_hidden_state
    if found is None:
        return 0
    if isinstance(found, Tensor):
        return found.numel() // found.shape[-1]
    return sum(_count_features(part) for part in found)
