"""Whether attention is right on this machine: every implementation against the specification."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_regularization.attention.api import attention_with_entropy
from entropy_regularization.recording.recorder import record_entropy
from entropy_regularization.regularization import EntropyRegularization

IMPLEMENTATIONS = {"cpu": ("blockwise", "compiled"), "cuda": ("blockwise", "triton")}
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
CANNOT_RUN = "cannot run: "  # in what is said of an implementation that was asked for
# How many roundings of its largest number a result may be off; the sums have a hundred terms.
ROUNDINGS = {torch.float32: 64.0, torch.bfloat16: 4.0, torch.float16: 4.0}
NATS = 1e-4  # of the entropy, float32 whatever the inputs


class Problem(NamedTuple):
    """Attention with one option; sizes are odd on purpose.

    Attributes:
        name: of the option.
        options: of attention_with_entropy.
        n_queries: rows; there are 129 keys.
        dim: of a head.
    """

    name: str
    options: dict[str, Any]
    n_queries: int = 129
    dim: int = 64


class Agreement(NamedTuple):
    """How far an implementation is from the specification in float64.

    Attributes:
        implementation: its name.
        dtype: of its inputs.
        output: largest error, a share of the largest number.
        entropy: largest error, nats.
        gradient: largest error of one, a share of its largest number.
        agrees: problems in which all errors are within rounding.
        differs: those in which one is not.
        cannot: why it cannot run at all; None if it can.
    """

    implementation: str
    dtype: torch.dtype
    output: float
    entropy: float
    gradient: float
    agrees: list[str]
    differs: list[str]
    cannot: str | None


def problems(device: str) -> list[Problem]:
    """Return the problems, with their tensors on a device."""
    draw = torch.Generator().manual_seed(0)
    padding = torch.ones(2, 129, dtype=torch.bool)
    padding[0, :40] = False
    document = torch.arange(129).expand(2, -1) // 50
    allowed = torch.rand(2, 1, 129, 129, generator=draw) < 0.5
    bias = torch.randn(1, 4, 129, 129, generator=draw)
    sinks = torch.randn(4, generator=draw)
    return [
        Problem("every key", {}),
        Problem("causal", {"causal": True}),
        Problem("a cache", {"causal": True}, n_queries=7),
        Problem("window", {"causal": True, "window": (31, 0)}),
        Problem("padding", {"causal": True, "key_padding": padding.to(device)}),
        Problem("documents", {"causal": True, "document": document.to(device)}),
        Problem("sinks", {"causal": True, "sinks": sinks.to(device)}),
        Problem("softcap", {"causal": True, "softcap": 3.0}),
        Problem("bias", {"bias": bias.to(device)}),
        Problem("any mask", {"allowed": allowed.to(device)}),
        Problem("heads of 128", {"causal": True}, dim=128),
        Problem("heads of 72", {"causal": True}, dim=72),
    ]


def agreements(device: str) -> Iterator[Agreement]:
    """Yield how far every implementation of a device is from the specification.

    Args:
        device: "cpu" or "cuda".
    """
    for implementation in IMPLEMENTATIONS[device]:
        for dtype in PRECISIONS:
            yield agreement(implementation, dtype, device)


def agreement(implementation: str, dtype: torch.dtype, device: str) -> Agreement:
    """Return how far an implementation is from the specification, in all problems that it has."""
    output = entropy = gradient = 0.0
    agrees: list[str] = []
    differs: list[str] = []
    cannot = None
    for problem in problems(device):
        try:
            found = _errors(problem, implementation, dtype, device)
        except ValueError as error:
            if CANNOT_RUN not in str(error):
                raise
            cannot = str(error).split(CANNOT_RUN, 1)[1]
            continue
        output, entropy, gradient = map(max, (output, entropy, gradient), found)
        rounding = ROUNDINGS[dtype] * torch.finfo(dtype).eps
        within = found[0] <= rounding and found[1] <= NATS and found[2] <= rounding
        (agrees if within else differs).append(problem.name)
    cannot = None if agrees or differs else cannot
    return Agreement(implementation, dtype, output, entropy, gradient, agrees, differs, cannot)


def _errors(
    problem: Problem, implementation: str, dtype: torch.dtype, device: str
) -> tuple[float, float, float]:
    """Return the errors of output, entropy and gradients in one problem."""
    draw = torch.Generator().manual_seed(1)
    shapes = [(2, 4, problem.n_queries), (2, 2, 129), (2, 2, 129)]
    inputs = [
        (1.5 * torch.randn(*shape, problem.dim, generator=draw)).to(device, dtype)
        for shape in shapes
    ]
    options = {name: _in(dtype, value) for name, value in problem.options.items()}
    found = _results(inputs, options, implementation)
    wanted = _results(
        [tensor.double() for tensor in inputs],
        {name: _in(torch.float64, value) for name, value in options.items()},
        "reference",
    )
    shares = [_error(a, b) / b.abs().max().item() for a, b in zip(found, wanted, strict=True)]
    return shares[0], _error(found[1], wanted[1]), max(shares[2:])


def _results(inputs: list[Tensor], options: dict[str, Any], implementation: str) -> list[Tensor]:
    """Return output, entropy and all gradients, of both at once."""
    taken = [
        each.requires_grad_()
        for each in (*inputs, *options.values())
        if isinstance(each, Tensor) and each.is_floating_point()
    ]
    found = attention_with_entropy(*inputs, implementation=implementation, **options)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(2)
    upstream = [
        torch.randn(each.shape, generator=draw).to(inputs[0].dtype).to(each) for each in found[:2]
    ]
    gradients = torch.autograd.grad(found[:2], taken, upstream)
    return [found.output.detach(), found.entropy.detach(), *gradients]


def _in(dtype: torch.dtype, value: Any) -> Any:
    """Return an option in another precision, if it has one."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().to(dtype) if floating else value


def _error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference; infinite if one is not finite."""
    difference = (found.detach().double() - wanted.detach().double()).abs()
    return float(difference.nan_to_num(nan=torch.inf).max())


class ModelAgreement(NamedTuple):
    """How far a recorded model is from the published module on its attention matrices.

    Attributes:
        entropy: largest error of a row, nats.
        loss: error of the penalty, a share of it.
        gradient: largest error of a parameter's gradient, a share of its largest number.
        agrees: whether all are within rounding.
    """

    entropy: float
    loss: float
    gradient: float
    agrees: bool


def model_agreement(device: str) -> ModelAgreement:
    """Return how far a small GPT-2 is from ``compute_loss`` on ``output_attentions=True``.

    The penalty is that of Jha & Reagen (2025), in float32.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=100, n_positions=128, n_embd=64, n_layer=3, n_head=4, initializer_range=0.3,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(device)  # type: ignore[arg-type]
    ids = torch.randint(0, 100, (2, 97), generator=torch.Generator().manual_seed(0)).to(device)
    thresholds = torch.full((3, 4), 0.5, device=device)
    regularization = EntropyRegularization(1.0, 0.1, context_size=97)
    with record_entropy(model) as recording:
        model(input_ids=ids, use_cache=False)
    ours = regularization(recording, thresholds)
    found = torch.autograd.grad(ours, list(model.parameters()), materialize_grads=True)
    model.set_attn_implementation("eager")
    matrices = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    theirs = regularization.compute_loss(matrices, thresholds, num_heads=4, num_layers=3)
    wanted = torch.autograd.grad(theirs, list(model.parameters()), materialize_grads=True)
    rows = [EntropyRegularization.compute_entropy(matrix) for matrix in matrices]
    entropy = max(map(_error, recording.entropies, rows))
    loss = _error(ours, theirs) / abs(theirs.item())
    gradient = max(
        _error(a, b) / (b.abs().max().item() or 1.0)  # 0 of what attention does not depend on
        for a, b in zip(found, wanted, strict=True)
    )
    return ModelAgreement(entropy, loss, gradient, max(entropy, loss, gradient) <= NATS)
