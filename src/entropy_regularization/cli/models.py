"""The model of a run: our own small GPT-2s from scratch, and what is asked of any model."""

import inspect
import os
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from entropy_regularization.cli.errors import RunProblem, UsageProblem
from entropy_regularization.cli.loading import check_name
from entropy_regularization.cli.options import SIZES, Size, TrainOptions
from entropy_regularization.recording.recorder import record_entropy
from entropy_regularization.recording.recording import EntropyRecording

# What models raise that want a picture, several choices or more tokens.
UNRUNNABLE = (
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    RuntimeError,
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
        check_name(options.model)
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
    recording, is_causal = try_out(model, name)
    # a model from scratch is in training mode, and its dropout is not the same in both
    if not (is_causal or model.training):
        raise RunProblem(
            f"--model {name}: the tokens of {type(model).__name__} see those that they are to "
            "predict; pass a causal language model (BERT and its like are one if is_decoder is "
            "true in config.json)."
        )
    return len(recording), max(layer.heads for layer in recording)


def try_out(model: PreTrainedModel, name: str) -> tuple[EntropyRecording, bool]:
    """Run a model once on two tokens.

    Args:
        model: any that takes ``input_ids``.
        name: as it was typed.

    Returns:
        What was recorded, and whether what the first token gives is the same for another second.

    Raises:
        RunProblem: if it does not run on tokens alone, or its attention cannot be recorded.
    """
    pair = torch.tensor([[0, 0], [0, 1]], device=device_of(model))
    options = {"use_cache": False} if takes(model, "use_cache") else {}
    given = []
    try:
        for ids in pair.split(1):  # a classifier may take one text at a time
            with torch.no_grad(), record_entropy(model, gradient=False) as recording:
                found = model(input_ids=ids, **options)
            # without labels some give their loss of the balance of experts first (Mixtral)
            given.append(getattr(found, "logits", found[0])[0, 0])
    except torch.OutOfMemoryError:
        raise
    except ValueError as error:
        raise RunProblem(f"--model {name}: {error}") from error
    except UNRUNNABLE as error:
        said = shorten(str(error), 200, placeholder=" ...")
        raise RunProblem(
            f"--model {name}: {type(model).__name__} does not run on a text alone "
            f"({type(error).__name__}: {said}); measure it with record_entropy in a program of "
            "your own."
        ) from error
    one, other = given
    return recording, torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss over the tokens after the first.

    A model's own may hold more (the balance of experts), or not shift its labels (BART's decoder).
    """
    predicted = logits[:, :-1].flatten(0, 1).float()
    return cross_entropy(predicted, ids[:, 1:].flatten().to(predicted.device))


def check_loss(model: PreTrainedModel, name: str) -> None:
    """Check that the loss of a model, which a Trainer lowers, is not that of its own tokens.

    Raises:
        RunProblem: if it is.
    """
    ids = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1]], device=model.device)
    with torch.no_grad():
        found = model(input_ids=ids, labels=ids, use_cache=False)
    of_given = cross_entropy(found.logits[0].float(), ids[0].to(found.logits.device))
    of_next = next_token_loss(found.logits, ids)
    if torch.isclose(found.loss, of_given) and not torch.isclose(found.loss, of_next):
        raise RunProblem(
            f"--model {name}: {type(model).__name__} does not shift its labels, so that it would "
            "learn to repeat its tokens; pass a model whose loss is that of the next tokens."
        )


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Tell whether a model's forward names an argument."""
    return argument in inspect.signature(model.forward).parameters


def device_of(model: PreTrainedModel) -> torch.device:
    """Return where tokens are put for a model; one that is spread over devices moves them on."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def check_tokens(name: str, model: PreTrainedModel, *blocks: Tensor) -> None:
    """Check that a model has an embedding for every token that it will be given.

    Args:
        name: of the model, as it was typed.
        model: any.
        *blocks: what it will be given.

    Raises:
        RunProblem: if it lacks one.
    """
    embedding: Any = model.get_input_embeddings()
    if not hasattr(embedding, "weight"):
        raise RunProblem(
            f"--model {name}: {type(model).__name__} has no table of tokens; measure it with "
            "record_entropy in a program of your own."
        )
    rows = embedding.weight.shape[0]
    largest = max(int(each.max()) for each in blocks)
    if largest >= rows:
        raise RunProblem(
            f"--model {name} embeds the tokens 0 to {rows - 1}, but its tokenizer gave "
            f"{largest}; put the tokenizer of this model beside it, or resize_token_embeddings "
            "first."
        )
