"""regularize: add the penalty to the loss that a transformers model returns."""

import inspect

from torch import nn
from transformers import PreTrainedModel

from entropy_regularization.integrations.layers import Wanted, attending, heads_of
from entropy_regularization.integrations.modules import qualified_names
from entropy_regularization.integrations.sharding import is_data_parallel
from entropy_regularization.integrations.transformers.recorder import names_of, outermost
from entropy_regularization.integrations.transformers.regularized import Regularized, handle_of
from entropy_regularization.recording.recorder import Layers
from entropy_regularization.regularization import EntropyRegularization
from entropy_regularization.thresholds import HeadThresholds, as_tensor, check_fixed


def regularize(
    model: nn.Module,
    regularization: EntropyRegularization | None = None,
    *,
    thresholds: object = None,
    layers: Layers = None,
    allow_partial: bool = False,
) -> Regularized:
    """Make the loss that a model returns in training include the entropy penalty.

    Any training loop that calls ``backward`` on the model's loss then trains with the penalty:
    transformers.Trainer, Accelerate, Lightning, one's own. Only documented hooks are used; the
    model's class, forward and configuration stay as they are. In evaluation mode nothing is added
    and the model runs its own attention.

    A loop that makes its loss from other outputs (TRL's trainers do) does not see what was added to
    the model's loss; the next training pass refuses that. Give the model no labels there and add
    the handle's ``unadded``, or derive from EntropyRegularizedTrainer. A part of the model that is
    trained by itself (``get_text_features`` of CLIP) gets no penalty; the log says so.

    Learnable thresholds become a submodule ``entropy_thresholds`` of the model, so that they are
    optimised (without weight decay by Trainer, see HeadThresholds), moved, sharded, saved by
    ``save_pretrained`` and restored by ``Trainer(...).train(resume_from_checkpoint=...)`` with it.
    ``from_pretrained`` builds a model that does not know them yet (and says that a key is not
    used), so attach them again:

        model = AutoModelForCausalLM.from_pretrained(folder)
        regularize(model, regularization, thresholds=load_thresholds(folder))

    Call it before the optimizer is made and before DistributedDataParallel or FSDP wraps the model,
    but after PEFT does, which freezes whatever the model has (the log warns of frozen thresholds).
    Thresholds are float32 in a model of any precision; ``fully_shard`` takes one precision a unit,
    so shard ``model.entropy_thresholds`` by itself first if the model has another.
    PEFT saves its adapters alone: EntropyRegularizedTrainer saves the thresholds beside them; with
    another trainer keep ``model.entropy_thresholds.state_dict()``.

    When Trainer normalises the loss over the tokens of all accumulated micro-batches and ranks
    (``num_items_in_batch``), the penalty of a micro-batch is weighted with its share of these
    tokens, so that the weights of a step add up to 1.

    Args:
        model: a transformers model, wrapped (PEFT) or not.
        regularization: settings; EntropyRegularization() unless given.
        thresholds: HeadThresholds to learn; or a number, ``[heads]`` or ``[layers, heads]``, which
            stay fixed. None takes those of the regularization, and if it has none, learnable
            ones that start at 0.5, one per head of every attention call.
        layers: which layers to penalise: indices in the order of the calls or name patterns, see
            record_entropy; all unless given.
        allow_partial: accept that some attention modules cannot be seen, see record_entropy.

    Returns:
        A handle: the last loss, penalty and recording, and ``remove()``.

    Raises:
        TypeError: if the model holds no transformers model, regularization is something else, or
            allow_partial not True or False.
        ValueError: if the model is regularized already, wrapped by data parallelism or holds
            several, its configuration does not tell its heads, or thresholds cannot be used; the
            first training pass raises it if its attention cannot be recorded, or thresholds are for
            another number of calls or heads.
    """
    inside = outermost(qualified_names(model)) if isinstance(model, nn.Module) else {}
    if not inside:
        raise TypeError(
            f"model is a {type(model).__name__} without a transformers model inside; for any other "
            "model add regularization(recording) to the loss, see record_entropy."
        )
    if len(inside) > 1:
        raise ValueError(
            f"{type(model).__name__} holds several transformers models ({', '.join(inside)}); "
            "regularize each of them, or add regularization(recording) to the loss, see "
            "record_entropy."
        )
    (found,) = inside.values()
    if regularization is None:
        regularization = EntropyRegularization()
    if not isinstance(regularization, EntropyRegularization):
        raise TypeError(
            f"regularization is a {type(regularization).__name__}; pass an EntropyRegularization."
        )
    if handle_of(found) is not None:
        raise ValueError(
            f"{type(found).__name__} is regularized already; call remove() on what regularize "
            "returned before."
        )
    wanted = Wanted(layers)
    wanted.check(found, names_of)
    chosen = thresholds if thresholds is not None else regularization.thresholds
    if chosen is None:
        chosen = HeadThresholds(*_layers_and_heads(found, wanted))
    check_fixed(chosen, "thresholds")
    if not isinstance(chosen, HeadThresholds) and as_tensor(chosen, "thresholds").requires_grad:
        raise ValueError(
            "thresholds is a tensor that requires a gradient, which no optimizer of the model "
            "would find; pass HeadThresholds(layers, heads, initial=tensor)."
        )
    wrapper = next((part for part in model.modules() if is_data_parallel(part)), None)
    learned = isinstance(chosen, HeadThresholds) and chosen.fraction_bias.requires_grad
    if wrapper is not None and learned:
        raise ValueError(
            f"the model is wrapped by {type(wrapper).__name__}, which learns of no thresholds that "
            "are added now, so that every rank would learn its own; call regularize before it "
            "wraps, or pass fixed thresholds."
        )
    return Regularized(
        found,
        regularization,
        chosen,
        around=_tuners_of(model, found),
        layers=layers,
        allow_partial=allow_partial,
    )


def _tuners_of(model: nn.Module, found: PreTrainedModel) -> list[nn.Module]:
    """Return the module of PEFT right around a model if it calls its forward, and so no hooks.

    What this misses is refused in training, see ``_check``.
    """
    return [
        part
        for part in model.modules()
        if type(part).__module__.startswith("peft.")
        and found in part.children()
        and (
            "forward" in inspect.unwrap(type(part).forward).__code__.co_names
            or getattr(part.forward, "__self__", None) is found  # AdaptionPrompt
        )
    ]


def _layers_and_heads(model: PreTrainedModel, layers: Wanted) -> tuple[int, int]:
    """Return how many attention calls the configuration promises, and the most heads of one.

    Patterns are held against the modules that are attention by the names of their classes.
    """
    config = model.config.get_text_config()
    heads = heads_of(config)
    if isinstance(heads, list | tuple):
        heads = max(heads)
    calls = getattr(config, "num_hidden_layers", None)
    if getattr(config, "is_encoder_decoder", False):
        encoder = getattr(config, "encoder_layers", None) or calls
        decoder = getattr(config, "decoder_layers", None) or getattr(
            config, "num_decoder_layers", None
        )
        # one call a layer of the encoder, self and cross of the decoder
        calls = encoder + 2 * decoder if encoder and decoder else None
    if layers.given is not None:
        indices = sum(not isinstance(want, str) for want in layers)
        calls = indices + sum(layers.takes(-1, name) for name in attending(names_of(model)))
        if calls == 0:
            raise ValueError(
                f"layers={layers.given!r} matches no attention module of {type(model).__name__}; "
                "pass patterns of their names, or thresholds=HeadThresholds(calls, heads)."
            )
    if not isinstance(heads, int) or not isinstance(calls, int):
        wanted = "how many attention calls it makes"
        raise ValueError(
            f"the configuration of {type(model).__name__} does not tell {wanted} and of how many "
            "heads; pass thresholds=HeadThresholds(calls, heads)."
        )
    return calls, heads
