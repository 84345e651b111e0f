"""A model that others saved, and its tokenizer, loaded as they are or refused in a sentence."""

import difflib
import json
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from entropy_regularization.cli.errors import RunProblem, UsageProblem
from entropy_regularization.cli.options import SIZES, TrainOptions

ADAPTERS = "adapter_config.json"  # file that PEFT writes in place of a config.json
# What transformers raises for a model that is there and cannot be loaded.
UNUSABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)


def load_model(options: TrainOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a pretrained causal language model and its tokenizer from a folder or the hub.

    Raises:
        UsageProblem: if it is not there.
        RunProblem: if it is there and cannot be used.
    """
    model = _load(options.model, AutoModelForCausalLM, dtype=torch.float32)
    with _loading_in_words(options.model):
        tokenizer = _load_tokenizer(options.model)
    longest = positions_of(model)
    if longest is not None and options.context_length > longest:
        raise UsageProblem(
            f"--context-length {options.context_length} is longer than the {longest} positions of "
            f"{options.model}; pass at most {longest}."
        )
    return model, tokenizer


class Saved(NamedTuple):
    """A model that lies in a folder or on the hub.

    Attributes:
        name: as it was typed.
        kind: the class that it was saved as.
        config: what is said of its text.
        base: of adapters, the model that they were trained for; else the name.
    """

    name: str
    kind: Any
    config: PreTrainedConfig
    base: str


def what_is_saved(name: str) -> Saved:
    """Look at a model without loading it.

    Args:
        name: a folder or a name of the hub.

    Raises:
        UsageProblem: if it is not there.
        RunProblem: if it takes something else than one text.
    """
    if name in SIZES:
        raise UsageProblem(
            f"--model {name} is one of our own sizes, not a model that was trained; pass a folder "
            "that save_pretrained wrote, or a hub name."
        )
    if not (Path(name) / ADAPTERS).is_file():
        check_name(name)
    with _loading_in_words(name):
        base = _base_of(name) or name
        config = AutoConfig.from_pretrained(base)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        kind = AutoModelForCausalLM
    takes = getattr(kind, "main_input_name", "input_ids")
    if config.is_encoder_decoder or takes != "input_ids":
        what = "two texts" if config.is_encoder_decoder else takes
        raise RunProblem(
            f"--model {name} takes {what}, not a text; measure it with record_entropy in a program "
            "of your own."
        )
    return Saved(name, kind, config.get_text_config(), base)


def _base_of(name: str) -> str | None:
    """Return the model that adapters of PEFT in a folder or on the hub are for; None of others."""
    if (Path(name) / "config.json").is_file():
        return None
    path = find_adapter_config_file(name)
    if path is None:
        return None
    base: str | None = json.loads(Path(path).read_bytes())["base_model_name_or_path"]
    if base is None:
        raise RunProblem(
            f"--model {name} holds adapters that do not say which model they are for; write it as "
            "base_model_name_or_path into adapter_config.json."
        )
    return base


def load_as_saved(
    saved: Saved, *, dtype: str, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any model that reads text, as what it was saved, and its tokenizer.

    Args:
        saved: the model.
        dtype: of its weights; "auto" is the one in which they were saved.
        device: where it is put; "auto" spreads it over GPUs, memory and disk.

    Raises:
        RunProblem: if it cannot be used.
    """
    placed = {"device_map": "auto"} if device == "auto" else {}
    model = _load(saved.base, saved.kind, dtype=dtype, **placed)
    with _loading_in_words(saved.name):
        if saved.base != saved.name:
            model = _adapted(model, saved.name)
        has_own = (Path(saved.name) / "tokenizer_config.json").is_file()
        tokenizer = _load_tokenizer(saved.name if has_own else saved.base)
    return (model if placed else model.to(device)), tokenizer  # type: ignore[arg-type]


def _load(name: str, kind: Any, **options: Any) -> PreTrainedModel:
    """Load a model, and refuse weights that are not its own."""
    transformers_logging.set_verbosity_error()
    with _loading_in_words(name):
        model, found = kind.from_pretrained(
            name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    _check_weights(name, model, found)
    return model  # type: ignore[no-any-return]


def _adapted(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Put adapters into a model; load_adapter of transformers reads fewer kinds (no DoRA)."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(name)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise RunProblem(
            f"--model {name} was trained by {config.peft_type.value}, which adds keys that are no "
            "text; pass adapters that change weights, as LoRA does."
        )
    files = ("adapter_model.safetensors", "adapter_model.bin")
    if Path(name).is_dir() and not any((Path(name) / each).is_file() for each in files):
        raise RunProblem(
            f"--model {name} holds no {files[0]}; put back what save_pretrained wrote."
        )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted: Any = PeftModel.from_pretrained(model, name).get_base_model()
    if any("missing adapter keys" in str(each.message) for each in told):
        raise RunProblem(
            f"--model {name} lacks weights of its adapter_config.json; put back the two files that "
            "were saved together."
        )
    _check_finite(name, adapted)
    return adapted  # type: ignore[no-any-return]


def check_name(name: str) -> None:
    """Refuse what can be no model: a folder without one, a size of ours that was mistyped.

    Raises:
        UsageProblem: if it is that.
    """
    if not name.strip():
        raise UsageProblem("--model is empty; pass a folder or a hub name.")
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageProblem(
            f"--model {name} is a folder without a config.json; pass one that save_pretrained "
            "wrote."
        )
    if (folder / "model" / "config.json").is_file():
        raise UsageProblem(
            f"--model {name} is the folder of a run; pass its model, {folder / 'model'}."
        )
    near = difflib.get_close_matches(name, SIZES, n=1, cutoff=0.75)
    if near and not folder.is_dir() and name not in ("gpt2",):
        raise UsageProblem(f"--model {name} is no size of ours; did you mean {near[0]}?")


def positions_of(model: PreTrainedModel) -> int | None:
    """Return how many positions a model has, None if any number.

    Where one is that of padding, those before it are not used either (RoBERTa).
    """
    table = _position_table(model)
    longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is None or table is None or table.padding_idx is None:
        return longest
    return longest - table.padding_idx - 1


def has_position_table(model: PreTrainedModel) -> bool:
    """Tell whether a model has learned its positions, one by one, and has no further one."""
    return _position_table(model) is not None


def _position_table(model: PreTrainedModel) -> torch.nn.Embedding | None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = (part for part in model.modules() if isinstance(part, torch.nn.Embedding))
    of_tokens = model.get_input_embeddings()
    return next((t for t in tables if t.num_embeddings == longest and t is not of_tokens), None)


def _check_weights(name: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Refuse weights in whose place transformers has made up others, and what is no number."""
    wrong = [
        f"{key} is {tuple(saved)} in place of {tuple(wanted)}"
        for key, saved, wanted in sorted(found["mismatched_keys"])
    ]
    if wrong:
        raise RunProblem(
            f"--model {name} has weights that do not fit its config.json: {_first(wrong)}; put "
            "back the two files that were saved together."
        )
    buffers = {key for key, _ in model.named_buffers()}  # computed, not learned
    missing = sorted(set(found["missing_keys"]) - buffers)
    if missing:
        raise RunProblem(
            f"--model {name} lacks weights of its config.json: {_first(missing)}; put back the two "
            "files that were saved together."
        )
    _check_finite(name, model)


def _check_finite(name: str, model: PreTrainedModel) -> None:
    weights = [each for each in model.named_parameters() if not each[1].is_meta]  # on disk
    broken = [key for key, weight in weights if not weight.isfinite().all()]
    if broken:
        raise RunProblem(
            f"--model {name} has weights that are infinite or NaN: {_first(broken)}; pass one that "
            "was saved before it diverged."
        )


def _first(names: list[str]) -> str:
    """Return the first of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer; refuse the empty one that transformers makes up where there are no files.

    Raises:
        RunProblem: if there is none.
    """
    todo = "put the files that save_pretrained of its tokenizer writes beside the model."
    try:
        tokenizer = read_tokenizer(name)
    except ValueError as error:
        raise RunProblem(
            f"--model {name} holds no tokenizer that can be loaded ({_in_one_line(error)}); {todo}"
        ) from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise RunProblem(f"--model {name} holds no tokenizer; {todo}")
    return tokenizer


def read_tokenizer(place: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer of a folder or the hub.

    Raises:
        ValueError: if its files are not what a tokenizer is made of.
    """
    try:
        with _SchemaInWords():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return tokenizer


class _SchemaInWords:
    """Makes a ValueError of what tokenizers raises for a tokenizer.json of another schema.

    That is Exception itself: no subclass, which would be something else.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if kind is Exception:
            raise ValueError(str(error)) from error


@contextmanager
def _loading_in_words(name: str) -> Iterator[None]:
    """Turn what transformers says of a model that it cannot load into a sentence."""
    try:
        yield
    except OSError as error:
        raise UsageProblem(
            f"--model {name} cannot be loaded: {_in_one_line(error)}. Pass a folder that "
            "save_pretrained wrote, or a hub name."
        ) from None
    except UNUSABLE as error:
        raise RunProblem(f"--model {name} cannot be used: {_in_one_line(error)}.") from None


def _in_one_line(error: Exception) -> str:
    """Return all that an error says, but for a list of every class that transformers has."""
    said = re.sub("Model type should be one of .*", "Pass a causal language model", str(error))
    if isinstance(error, KeyError):  # which says the key alone
        said = f"KeyError: {said}"
    return textwrap.shorten(said, 600, placeholder=" ...").rstrip(".")
