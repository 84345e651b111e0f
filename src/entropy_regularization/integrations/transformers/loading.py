"""What is read from files: thresholds saved with a model or beside adapters, renamed weights."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from entropy_regularization.thresholds import HeadThresholds

THRESHOLDS = "entropy_thresholds"  # the submodule of the model that holds learnable thresholds
BESIDE = f"{THRESHOLDS}.safetensors"  # in a folder of adapters, which PEFT saves alone


def load_thresholds(name_or_path: str | Path, **hub_options: Any) -> HeadThresholds:
    """Read the thresholds that were saved with a model.

    Args:
        name_or_path: a folder that ``save_pretrained`` or Trainer wrote, or a name on the hub.
        **hub_options: ``revision``, ``token``, ``cache_dir`` and so on, for the hub.

    Returns:
        The thresholds, learnable; pass them to regularize.

    Raises:
        TypeError: if name_or_path is neither a name nor a path.
        ValueError: if there are none, no such folder or name, or a file is broken.
    """
    if not isinstance(name_or_path, str | Path):
        raise TypeError(
            f"name_or_path is a {type(name_or_path).__name__}; pass a folder or a name on the hub."
        )
    place = str(name_or_path)
    beside = _find_file(place, BESIDE, hub_options)
    if beside is not None:
        return read_beside(beside)
    index = _find_file(place, "model.safetensors.index.json", hub_options)
    for name in ["model.safetensors"] if index is None else _files_of(index):
        path = _find_file(place, name, hub_options, needed=True)
        values = None if path is None else _read_thresholds(path)
        if values is not None:
            return _thresholds_of(values)
    raise ValueError(
        f"{place} holds no entropy thresholds in model.safetensors or {BESIDE}; pass a folder that "
        "a regularized model was saved to."
    )


def load_renamed_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint that holds weights under other names than the model's own.

    save_pretrained gives those of GPT-NeoX and of experts their older names, by which Trainer does
    not find them when it resumes.

    Args:
        model: as the one that this checkpoint was saved from.
        checkpoint: folder that Trainer wrote.
    """
    names: set[str] = set()
    for path in checkpoint.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            names.update(weights.keys())
    if names <= model.state_dict().keys() or not isinstance(model, PreTrainedModel):
        return
    saved = type(model).from_pretrained(
        checkpoint,
        config=copy.deepcopy(model.config),
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # Trainer refuses them
    )
    model.load_state_dict(saved.state_dict(), strict=False)  # it lacks the thresholds


def save_beside(folder: Path, values: Tensor) -> None:
    """Write thresholds into a folder of adapters."""
    tensor = values.detach().cpu().contiguous()
    save_file({f"{THRESHOLDS}.fraction_bias": tensor}, folder / BESIDE)


def read_beside(path: Path) -> HeadThresholds:
    """Read what save_beside wrote.

    Raises:
        ValueError: if the file is broken.
    """
    values = _read_thresholds(path)
    if values is None:
        raise ValueError(f"{path} holds no entropy thresholds; save the model again.")
    return _thresholds_of(values)


def _thresholds_of(values: Tensor) -> HeadThresholds:
    thresholds = HeadThresholds(*values.shape)
    with torch.no_grad():  # what was learned may lie outside [0, 1]
        thresholds.fraction_bias.copy_(values)
    return thresholds


def _files_of(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights; save the model again.") from error


def _find_file(
    place: str, name: str, hub_options: dict[str, Any], *, needed: bool = False
) -> Path | None:
    if Path(place).is_dir():
        path = Path(place, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(place, name, **hub_options))
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(
            f"{place} is neither a folder here nor, at this revision and with this token, a name "
            "on the hub; pass a folder that a regularized model was saved to."
        ) from error
    except EntryNotFoundError as error:
        # Without the hub what is not in the cache is not known: a model in one file has no index.
        if needed and isinstance(error, LocalEntryNotFoundError):
            raise ValueError(
                f"{place} is no folder here, its {name} is not in the cache of the hub, and the "
                "hub cannot be reached; pass a folder that a regularized model was saved to."
            ) from error
        return None


def _read_thresholds(path: Path) -> Tensor | None:
    try:
        with safe_open(path, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - not a dict
                if f".{key}".endswith(f".{THRESHOLDS}.fraction_bias"):
                    values: Tensor = weights.get_tensor(key)
                    return values
    except SafetensorError as error:
        raise ValueError(f"{path} is broken ({error}); save the model again.") from error
    return None
