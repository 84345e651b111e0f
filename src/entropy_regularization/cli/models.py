"""The model of a run: our own small GPT-2s from scratch, or a pretrained one."""

import difflib
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from entropy_regularization.cli.errors import RunProblem, UsageProblem
from entropy_regularization.cli.options import SIZES, Size, TrainOptions
from entropy_regularization.recording.recorder import record_entropy

# What transformers raises for a model that is there and cannot be loaded.
UNUSABLE = (
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)


def size_of(options: TrainOptions) -> Size | None:
    """Return the size of a model from scratch, None for a pretrained one.

    Raises:
        UsageProblem: if heads do not divide the width, the model is larger than the machine, or
            the name is neither a size nor a model.
    """
    size = SIZES.get(options.model)
    changed = {"layers": options.layers, "width": options.width, "heads": options.heads}
    if size is None:
        _check_pretrained_name(options.model)
        others = {"vocabulary": options.vocabulary, "dropout": options.dropout}
        typed = [f"--{name}" for name, value in (changed | others).items() if value is not None]
        if typed:
            raise UsageProblem(
                f"{' and '.join(typed)}: for our own sizes alone ({', '.join(SIZES)}), but --model "
                f"is {options.model}; leave out what is not for it."
            )
        return None
    size = size._replace(**{name: value for name, value in changed.items() if value is not None})
    _check_memory(size, options)
    if size.width % size.heads:
        raise UsageProblem(
            f"{size.heads} heads do not divide a width of {size.width}; choose --heads and --width "
            "so that they do."
        )
    return size


def _check_memory(size: Size, options: TrainOptions) -> None:
    """Refuse a model whose weights, gradients and Adam moments (16 bytes each) cannot fit."""
    tables = options.tokens + options.context_length
    parameters = 12 * size.layers * size.width**2 + tables * size.width
    if not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 16 * parameters > memory:
        raise UsageProblem(
            f"{size.layers} layers of width {size.width} have {parameters:.3g} parameters, whose "
            f"training needs {16 * parameters / 1e9:,.0f} GB; this machine has "
            f"{memory / 1e9:,.0f} GB. Pass smaller --layers, --width, --vocabulary or "
            "--context-length."
        )


def _check_pretrained_name(name: str) -> None:
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


def build_model(
    options: TrainOptions, size: Size, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Build a GPT-2 with random weights that depend on the seed alone."""
    torch.manual_seed(options.seed)
    dropout = options.dropout or 0.0
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=options.context_length,
        n_layer=size.layers,
        n_embd=size.width,
        n_head=size.heads,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def load_model(options: TrainOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a pretrained model and its tokenizer from a folder or the hub.

    Raises:
        UsageProblem: if it is not there.
        RunProblem: if it is there and cannot be used.
    """
    transformers_logging.set_verbosity_error()
    with _loading_in_words(options.model):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            options.model,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
        tokenizer = _load_tokenizer(options.model)
    model, found = loaded
    _check_weights(options.model, model, found)
    longest = _positions(model)
    if longest is not None and options.context_length > longest:
        raise UsageProblem(
            f"--context-length {options.context_length} is longer than the {longest} positions of "
            f"{options.model}; pass at most {longest}."
        )
    return model, tokenizer


def _positions(model: PreTrainedModel) -> int | None:
    """Return how many positions a model has, None if any number.

    Where one is that of padding, those before it are not used either (RoBERTa).
    """
    longest: int | None = getattr(model.config, "max_position_embeddings", None)
    for part in model.modules():
        of_tokens = part is model.get_input_embeddings()
        if (
            isinstance(part, torch.nn.Embedding)
            and part.num_embeddings == longest
            and not of_tokens
        ):
            return longest if part.padding_idx is None else longest - part.padding_idx - 1
    return longest


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Have a model compute activations again in backward.

    Raises:
        UsageProblem: if it cannot.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # its name in transformers 5.17
        enable = model.gradient_checkpointing_enable
    try:
        # Reentrant checkpointing would lose the gradient of the penalty.
        enable({"use_reentrant": False})
    except ValueError:
        raise UsageProblem(
            f"--gradient-checkpointing: {type(model).__name__} cannot do it; leave it out."
        ) from None


def layers_and_heads(model: PreTrainedModel, name: str) -> tuple[int, int]:
    """Run a model once on two tokens and count its attention calls and their heads.

    Args:
        model: any.
        name: as it was typed.

    Raises:
        RunProblem: if its attention cannot be recorded, or a token sees the one that it is to
            predict.
    """
    ids = torch.tensor([[0, 0], [0, 1]], device=model.device)
    try:
        with torch.no_grad(), record_entropy(model, gradient=False) as recording:
            one, other = model(input_ids=ids, use_cache=False).logits[:, 0]
    except ValueError as error:
        raise RunProblem(f"--model {name}: {error}") from error
    # a model from scratch is in training mode, and its dropout is not the same in both
    near = torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
    if not (near or model.training):
        raise RunProblem(
            f"--model {name}: the tokens of {type(model).__name__} see those that they are to "
            "predict; pass a causal language model (BERT and its like are one if is_decoder is "
            "true in config.json)."
        )
    return len(recording), max(layer.heads for layer in recording)


def check_tokens(options: TrainOptions, model: PreTrainedModel, *blocks: Tensor) -> None:
    """Check that a model has an embedding for every token that it will be given.

    Args:
        options: name the model.
        model: any.
        *blocks: what it will be given.

    Raises:
        RunProblem: if it lacks one.
    """
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    largest = max(int(each.max()) for each in blocks)
    if largest >= rows:
        raise RunProblem(
            f"--model {options.model} embeds the tokens 0 to {rows - 1}, but its tokenizer gave "
            f"{largest}; put the tokenizer of this model beside it, or resize_token_embeddings "
            "first."
        )


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
    broken = [key for key, weight in model.named_parameters() if not weight.isfinite().all()]
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
            f"save_pretrained wrote, a hub name, or one of {', '.join(SIZES)}."
        ) from None
    except UNUSABLE as error:
        raise RunProblem(f"--model {name} cannot be used: {_in_one_line(error)}.") from None


def _in_one_line(error: Exception) -> str:
    """Return all that an error says, but for a list of every class that transformers has."""
    said = re.sub("Model type should be one of .*", "Pass a causal language model", str(error))
    return textwrap.shorten(said, 600, placeholder=" ...").rstrip(".")
