"""Whether what is recorded of one family is what its own eager attention computes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from compare import (
    Pairs,
    Rows,
    gradient_error,
    output_error,
    padding_counted,
    pair_by_name,
    pair_returned,
    random_loss,
)
from eager import Eager, run_eager
from torch import nn
from zoo import Case, NotBuiltError, build

from entropy_regularization import record_entropy
from entropy_regularization.recording.recording import EntropyRecording

OUTPUT_TOLERANCE, ENTROPY_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-4, 1e-3
INTERFACE, FUSED, OWN, NONE = (
    "attention interface",
    "scaled_dot_product_attention",
    "a softmax of its own",
    "no attention",
)
NO_WEIGHTS = "recorded calls have no eager weights"
RUN_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


@dataclass
class Result:
    """What came of one family under one padding.

    Attributes:
        outcome: "exact", "partial", "refused", "wrong", "no attention" or "not built".
        way: how the model's attention is called.
        layers: recorded attention calls.
        reference: where the eager weights came from.
        errors: the worst of "output", "entropy", "returned" and "gradient", relative where that
            has a meaning; and "padding", the number of layers that count rows of it.
        unseen: modules with attention that was not recorded, ``name (class)``; all of them where
            nothing was recorded.
        note: why, where the outcome is not exact.
    """

    family: str
    padding: str
    outcome: str = "exact"
    way: str = NONE
    layers: int = 0
    reference: str = ""
    dtype: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    note: str = ""


class NotFiniteError(NotBuiltError):
    """A family whose own eager attention gives no numbers."""


@dataclass
class Recorded:
    """A recorded forward pass."""

    model: nn.Module
    recording: EntropyRecording
    output: Any


def check(
    family: str, padding: str = "none", record: Callable[..., Any] = record_entropy
) -> Result:
    """Compare a recording of a tiny model of a family with its eager attention.

    Args:
        family: a model type.
        padding: "none", "left" or "right".
        record: record_entropy, or something wrong in its place, to see this function notice.
    """
    result = Result(family, padding)
    try:
        case, eager = _run_reference(family, padding, result)
    except NotBuiltError as error:
        result.outcome, result.note = "not built", str(error)
        return result
    subject = _describe(result, case, eager)
    if result.way == NONE:
        result.outcome = "no attention"
        return result
    implementations = _implementations(subject.model)
    try:
        torch.manual_seed(0)
        with record(subject.model) as recording:
            output = subject.model(**subject.batch)
    except ValueError as error:
        result.outcome, result.note = "refused", str(error)
        return result
    except RUN_ERRORS as error:
        refused = "use_reentrant" in str(error)  # hrm_text runs layers under no_grad by design
        result.outcome = "refused" if refused else "wrong"
        result.note = f"{type(error).__name__}: {error}"[:300]
        return result
    if _implementations(subject.model) != implementations:
        result.outcome, result.note = "wrong", "the attention implementation was not put back"
        return result
    recorded = Recorded(subject.model, recording, output)
    _compare(result, case, eager, recorded)
    if subject is not case and NO_WEIGHTS in result.note:
        # Eager matrices of another shape (sam): the weights beside the fused calls must do.
        result = Result(family, padding, way=result.way, dtype=result.dtype)
        _compare(result, subject, run_eager(subject.model, subject.batch), recorded)
    if result.outcome == "wrong":
        return _compare_empty(result, case, recorded)
    return result


def _compare_empty(first: Result, case: Case, recorded: Recorded) -> Result:
    """Compare again, where rows that see no key give 0 in the eager model too.

    They matter only where a model lets real rows see padding (diffusion_gemma), or has rows without
    keys that are no padding (blt).
    """
    result = Result(first.family, first.padding, way=first.way, dtype=first.dtype)
    torch.manual_seed(0)
    eager = run_eager(case.model, case.batch, empty=True, output_attentions=True, return_dict=True)
    _compare(result, case, eager, recorded)
    if result.outcome == "wrong":
        return first
    said = "a row that sees no key is 0, as with sdpa; eager gives it the mean of all values"
    result.note = "; ".join(filter(None, [result.note, said]))
    return result


def _run_reference(family: str, padding: str, result: Result) -> tuple[Case, Eager]:
    """Run the model eagerly, in float64 if it can.

    A few families misread their own mask when they are eager, so that nothing is finite. The
    reference of those is sdpa, whose weights are computed beside it.
    """
    try:
        return _run_as(family, padding, result, "eager")
    except NotFiniteError as error:
        try:
            case, eager = _run_as(family, padding, result, "sdpa")
        except NotBuiltError:
            raise error from None
        result.note = "its own eager attention is not finite: compared with sdpa"
        return case, eager


def _run_as(family: str, padding: str, result: Result, implementation: str) -> tuple[Case, Eager]:
    for dtype in (torch.float64, torch.float32):
        try:
            case = build(family, padding, dtype, implementation)
            eager = _run(case, implementation)
            finite = _finite(eager)
            if dtype == torch.float64 and not finite:
                continue  # a mask of float64's lowest number is -inf to a softmax in float32
            if "attention_mask" not in case.batch and not finite:
                raise NotFiniteError("its own eager attention is not finite: nothing to compare")
        except NotBuiltError:
            if dtype == torch.float32:
                raise
        except (*RUN_ERRORS, ValueError, NotImplementedError) as error:
            if dtype == torch.float32:
                said = (str(error).strip().splitlines() or [""])[-1][:200]
                raise NotBuiltError(f"does not run: {type(error).__name__}: {said}") from error
        else:
            result.dtype = str(dtype).removeprefix("torch.")
            return case, eager
    raise AssertionError("unreachable")


def _run(case: Case, implementation: str) -> Eager:
    """Run a model and watch it; ask for the attention matrices where it can give them."""
    asked: dict[str, Any] = {"return_dict": True}
    if implementation == "eager":
        asked["output_attentions"] = True
    torch.manual_seed(0)
    try:
        return run_eager(case.model, case.batch, **asked)
    except (*RUN_ERRORS, ValueError):
        torch.manual_seed(0)
        return run_eager(case.model, case.batch, return_dict=True)


def _finite(eager: Eager) -> bool:
    seen = [weights for _, weights in eager.kept] + eager.returned()
    return all(bool(weights.isfinite().all()) for weights in seen)


def _describe(result: Result, case: Case, eager: Eager) -> Case:
    """Say how the attention is called; return the model to record."""
    recorded = case
    if eager.called:
        result.way = INTERFACE
        own = {each.name for each in eager.softmaxes if _is_attention(each)} - {*eager.called}
        fused = _fused(case, result.padding, eager) if own else None
        if fused is not None and own & {name for name, _ in eager.fused}:
            result.way, recorded = f"{INTERFACE} and {FUSED}", fused  # a part beside the interface
    elif (fused := _fused(case, result.padding, eager)) or eager.fused:
        result.way, recorded = FUSED, fused or case
    elif eager.returned() or any(_is_attention(each) for each in eager.softmaxes):
        result.way = OWN
    result.unseen = _unseen(set(), eager)
    return recorded


def _fused(case: Case, padding: str, eager: Eager) -> Case | None:
    """Return the same model made to call scaled_dot_product_attention; None if it never does.

    Who calls it is added to what is known of the eager pass.
    """
    try:
        other = build(case.family, padding, case.model.dtype, "sdpa")
        torch.manual_seed(0)
        found = run_eager(other.model, other.batch)
    except (NotBuiltError, *RUN_ERRORS, ValueError):
        return None
    eager.fused += found.fused
    return other if found.fused else None


def _is_attention(softmax: Any) -> bool:
    name = softmax.module.lower()
    return "att" in name


def _implementations(model: nn.Module) -> list[Any]:
    configs = [getattr(part, "config", None) for part in model.modules()]
    return [getattr(config, "_attn_implementation", None) for config in configs]


def _compare(result: Result, case: Case, eager: Eager, recorded: Recorded) -> None:
    recording, output = recorded.recording, recorded.output
    rows = Rows(case.batch, [weights for _, weights in eager.kept] or eager.returned())
    pairs = pair_by_name(recording, eager.made())
    returned = pair_returned(recording, eager.returned(), rows)
    result.layers = len(recording)
    result.unseen = _unseen({layer.name for layer in recording}, eager)
    result.reference = " and ".join(
        name for name, found in (("kept", pairs), ("returned", returned)) if found.layers
    )
    result.errors["output"] = output_error(eager.output, output, rows)
    result.errors["padding"] = padding_counted(recording, case.batch)
    for name, found in (("entropy", pairs), ("returned", returned)):
        if found.layers:
            result.errors[name] = found.error(rows)
    best = pairs if len(pairs.layers) >= len(returned.layers) else returned
    losses = (
        random_loss(eager.output, best.theirs(), rows, best.layers),
        random_loss(output, best.ours(), rows, best.layers),
    )
    models = (case.model, recorded.model)
    result.errors["gradient"] = gradient_error(*models, *losses)
    _judge(result, recording, pairs, returned, best)


def _judge(
    result: Result, recording: EntropyRecording, pairs: Pairs, returned: Pairs, best: Pairs
) -> None:
    limits = {
        "output": OUTPUT_TOLERANCE,
        "entropy": ENTROPY_TOLERANCE,
        "returned": ENTROPY_TOLERANCE,
        "gradient": GRADIENT_TOLERANCE,
        "padding": 0,
    }
    if len(pairs.layers) == len(recording):
        limits["returned"] = torch.inf  # some return other matrices than act (informer, t5gemma2)
    off = [f"{k} {v:.1e}" for k, v in result.errors.items() if not v <= limits[k]]
    if len(best.layers) < len(recording):
        off.append(f"{len(recording) - len(best.layers)} {NO_WEIGHTS}")
    if off:
        result.outcome, result.note = "wrong", "; ".join(off)
    elif result.unseen or recording.missing:
        result.outcome = "partial"
        result.note = "not recorded: " + ", ".join(result.unseen or recording.missing)
    elif returned.unmatched:
        result.note = f"{returned.unmatched} returned matrices are none of the recorded"
    elif result.errors.get("returned", 0.0) > ENTROPY_TOLERANCE:
        result.note = "the matrices that the model returns are not those that act"


def _unseen(recorded: set[str], eager: Eager) -> list[str]:
    """Return the modules that compute attention and do not stand in the recording."""
    own = [(each.name, each.module) for each in eager.softmaxes if _is_attention(each)]
    silent = dict.fromkeys(
        f"{name} ({module})" for name, module in (*own, *eager.fused) if name not in recorded
    )
    named = {each.split(" (")[0] for each in silent}
    silent |= dict.fromkeys(
        name for name in eager.called if name not in recorded and name not in named
    )
    return list(silent)
