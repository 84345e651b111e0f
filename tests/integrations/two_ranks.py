"""What one of two ranks does in test_sharding.py: python two_ranks.py FOLDER."""

import copy
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from entropy_regularization import EntropyRegularization, HeadThresholds, record_entropy
from entropy_regularization.integrations.transformers import regularize

TOKENS = 12
SAVED = ("mm", "all_reduce", "all_gather_into_tensor", "wait_tensor")


class Attention(nn.Module):
    """Attends by torch's own function, in heads of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.projection(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


class Written(Attention):
    """Attends by a softmax of its own."""

    def forward(self, x: Tensor) -> Tensor:
        heads = self.projection(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        return torch.softmax(heads @ heads.mT, -1) @ heads


def ids() -> Tensor:
    return torch.randint(64, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=TOKENS,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(
    folder: Path,
    change: Callable[[PreTrainedModel], Any] = lambda model: None,
    given: slice = slice(None),
    **options: Any,
) -> dict[str, Tensor]:
    """Return the gradients of a step with the penalty, thresholds learned."""
    model = LlamaForCausalLM.from_pretrained(folder, **options).train()
    regularize(model, EntropyRegularization.calibrated(10.0, 0.0))
    changed = change(model)
    run = model if changed is None else changed
    run(input_ids=ids()[given], labels=ids()[given], use_cache=False).loss.backward()
    return {name: whole(each.grad) for name, each in model.named_parameters()}


def saves(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    chosen = operator.__name__.partition(".")[0] in SAVED
    return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_selectively(model: PreTrainedModel) -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts, saves)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def shard_fully(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def shard_parts(model: PreTrainedModel) -> None:
    for part in model.children():
        fully_shard(part)


def shard_in_half_precision(model: PreTrainedModel) -> None:
    fully_shard(model.entropy_thresholds)  # float32
    shard_fully(model)


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "plain": lambda model: None,
    "checkpointed": lambda model: model.gradient_checkpointing_enable(),
    "checkpointed selectively": checkpoint_selectively,
    "compiled": lambda model: torch.compile(model, backend="aot_eager"),
}


def entropies(model: nn.Module, *given: Tensor, **options: Any) -> list[Tensor]:
    with record_entropy(model, gradient=False) as recording:
        model(*given, **options)
    return [layer.entropy for layer in recording]


def sentence(call: Callable[[], Any]) -> str:
    try:
        return f"nothing was refused: {call()}"
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error)


def in_context_parallel(
    model: nn.Module, given: Tensor, inside: bool
) -> Callable[[], list[tuple[int, ...]]]:
    """Return what records a model whose sequence is divided."""
    mesh = init_device_mesh("cpu", (2,))

    def divided(tensor: Tensor) -> AbstractContextManager[None]:
        return context_parallel(mesh, buffers=[tensor], buffer_seq_dims=[1])

    def run() -> list[tuple[int, ...]]:
        own = given.clone()
        if inside:
            with divided(own):
                return [tuple(rows.shape) for rows in entropies(model, own)]
        with record_entropy(model) as recording, divided(own):
            model(own)
        return [tuple(layer.entropy.shape) for layer in recording]

    return run


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    if distributed.get_rank() == 0:
        save_model(folder)
    distributed.barrier()
    found: dict[str, Any] = {"gradients": {}, "refused": {}}

    found["expected gradients"] = gradients(folder)
    for name, change in CHANGES.items():
        found["gradients"][name] = gradients(folder, change, tp_plan="auto")

    own = slice(distributed.get_rank(), distributed.get_rank() + 1)  # a text for every rank
    found["gradients"]["fully sharded"] = gradients(folder, shard_fully, own)
    found["gradients"]["sharded by parts"] = gradients(folder, shard_parts, own)
    half = {"dtype": torch.bfloat16}
    found["expected half"] = gradients(folder, **half)
    found["half"] = gradients(folder, shard_in_half_precision, own, **half)

    model = LlamaForCausalLM.from_pretrained(folder)
    found["expected entropies"] = entropies(model, ids())
    parallel = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    found["entropies"] = entropies(parallel, ids())
    parallel.config.num_attention_heads = 6
    found["refused"]["uneven"] = sentence(lambda: entropies(parallel, ids()))

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, attention = torch.randn(2, TOKENS, 16), Attention()
    part = Attention()
    parallelize_module(part, mesh, {"projection.0": ColwiseParallel()})
    found["refused"]["unknown heads"] = sentence(lambda: entropies(part, x))

    part = Written()
    parallelize_module(part, mesh, {"projection.0": ColwiseParallel()})
    found["refused"]["own softmax"] = sentence(lambda: entropies(part, x))

    found["expected sharded"], found["sharded"] = [], []
    for each in (attention, Written()):
        found["expected sharded"] += entropies(each, x)
        sharded = copy.deepcopy(each)
        sharded.config = LlamaConfig(num_attention_heads=4)  # as many as two ranks have
        fully_shard(sharded.projection, mesh=mesh)  # divided again when attention comes
        fully_shard(sharded, mesh=mesh)
        found["sharded"] += entropies(sharded, x)

    with torch.device("meta"):
        thresholds = HeadThresholds(2, 4, [0.1, 0.2, 0.3, 0.4])
    fully_shard(thresholds, mesh=mesh)
    thresholds.to_empty(device="cpu").reset_parameters()
    found["thresholds"] = whole(thresholds.fraction_bias.data)

    divided, own_thresholds = LlamaForCausalLM.from_pretrained(folder), HeadThresholds(2, 4)
    divided.thresholds = own_thresholds
    fully_shard(divided, reshard_after_forward=True)
    with record_entropy(divided) as recording:
        divided(ids())
    regularization = EntropyRegularization.calibrated()
    found["refused"]["thresholds"] = sentence(lambda: regularization(recording, own_thresholds))

    # Last: torch 2.11 does not leave it after an exception.
    compiled = torch.compile(model, backend="eager")
    for name, each, given, inside in (
        ("compiled", compiled, ids(), True),
        ("llama", model, ids(), True),
        ("llama", model, ids(), False),
        ("torch", attention, x, True),
        ("torch", attention, x, False),
    ):
        refused = sentence(in_context_parallel(each, given, inside))
        found["refused"][f"context parallel, {name}, {inside}"] = refused

    if distributed.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
