"""A tiny random model of any transformers family, with a batch that fits it."""

import functools
import importlib
import random
from dataclasses import dataclass
from typing import Any

import torch
from batches import PADDINGS, Batches
from huggingface_hub.errors import StrictDataclassError
from overrides import HEADS, OVERRIDES
from shrink import shrink
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto
from weights import draw

SEED = 7
# Bases first: they return the attentions of all their parts. Heads only where there is no base.
_FIRST = ("MODEL_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@dataclass
class Case:
    """A model and the keywords it is called with."""

    family: str
    model: PreTrainedModel
    batch: dict[str, Any]


class NotBuiltError(Exception):
    """A family of which no tiny model could be made; the message says why."""


def families() -> list[str]:
    """Return the model types for which transformers names a model class."""
    return sorted(_classes())


def build(
    family: str,
    padding: str = "none",
    dtype: torch.dtype = torch.float32,
    implementation: str = "eager",
) -> Case:
    """Build a model of a family, in eval mode, and a batch for it.

    Args:
        family: a model type, for instance ``"gpt2"``.
        padding: "none", "left" or "right"; the last two only matter to text.
        dtype: of the weights.
        implementation: of attention, "eager" or "sdpa"; some families choose their modules by it.

    Raises:
        NotBuiltError: if the model or the batch cannot be made.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding is {padding!r}; pass one of {', '.join(PADDINGS)}.")
    torch.manual_seed(SEED)
    random.seed(SEED)
    try:
        model = _model(family, implementation)
        draw(model, SEED)
        model = model.to(dtype).eval()
        batch = Batches(model, torch.Generator().manual_seed(SEED)).make(padding)
    except BUILD_ERRORS as error:
        lines = str(error).strip().splitlines() or [""]
        raise NotBuiltError(f"{type(error).__name__}: {lines[-1][:200]}") from error
    return Case(family, model, batch)


def _model(family: str, implementation: str) -> PreTrainedModel:
    config = shrink(CONFIG_MAPPING[family], OVERRIDES, family)
    config._attn_implementation = implementation
    model_class = _class(family, type(config))
    model: nn.Module = model_class(config)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{model_class.__name__} is no PreTrainedModel")
    return model


def _class(family: str, config_class: type) -> type[nn.Module]:
    """Return the first class of a family that is made of its own configuration and attends."""
    if family in HEADS:
        return _named(family, HEADS[family])
    found = [_named(family, name) for name in _classes()[family]]
    fitting = [each for each in found if getattr(each, "config_class", None) is config_class]
    return (fitting or found)[0]


def _named(family: str, name: str) -> type[nn.Module]:
    """Find a model class; some are not exported."""
    public = importlib.import_module("transformers")
    if hasattr(public, name):
        return getattr(public, name)
    module = CONFIG_MAPPING[family].__module__.replace(".configuration_", ".modeling_")
    return getattr(importlib.import_module(module), name)


@functools.cache
def _classes() -> dict[str, list[str]]:
    """Return the class names to build for every family, the one to prefer first."""
    others = sorted(
        name
        for name in vars(modeling_auto)
        if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING_NAMES") and name not in _FIRST
    )
    found: dict[str, list[str]] = {}
    for mapping in (*_FIRST, *others):
        for family, name in getattr(modeling_auto, mapping).items():
            if family in CONFIG_MAPPING:
                names = found.setdefault(family, [])
                names.append(name if isinstance(name, str) else name[0])
    return found
