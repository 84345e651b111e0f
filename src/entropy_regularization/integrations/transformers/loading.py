"""load_thresholds: read the thresholds that were saved with a model."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import Tensor

from entropy_regularization.thresholds import HeadThresholds

THRESHOLDS = "entropy_thresholds"  # the submodule of the model that holds learnable thresholds


def load_thresholds(name_or_path: str | Path, **hub_options: Any) -> HeadThresholds:
    """Read the thresholds that were saved with a model.

    Args:
        name_or_path: a folder that ``save_pretrained`` or Trainer wrote, or a name on the hub.
        **hub_options: ``revision``, ``token``, ``cache_dir`` and so on, for the hub.

    Returns:
        The thresholds, learnable; pass them to regularize.

    Raises:
        ValueError: if there are none.
    """
    place = str(name_or_path)
    index = _find_file(place, "model.safetensors.index.json", hub_options)
    names = ["model.safetensors"]
    if index is not None:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        path = _find_file(place, name, hub_options)
        values = None if path is None else _read_thresholds(path)
        if values is not None:
            thresholds = HeadThresholds(*values.shape)
            with torch.no_grad():  # what was learned may lie outside [0, 1]
                thresholds.fraction_bias.copy_(values)
            return thresholds
    raise ValueError(
        f"{place} holds no entropy thresholds in model.safetensors; pass a folder that a "
        "regularized model was saved to."
    )


def _find_file(place: str, name: str, hub_options: dict[str, Any]) -> Path | None:
    if Path(place).is_dir():
        path = Path(place, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(place, name, **hub_options))
    except EntryNotFoundError:
        return None


def _read_thresholds(path: Path) -> Tensor | None:
    with safe_open(path, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a dict
            if f".{key}".endswith(f".{THRESHOLDS}.fraction_bias"):
                values: Tensor = weights.get_tensor(key)
                return values
    return None
