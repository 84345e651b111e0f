"""Training steps on CUDA devices that are not there: what happens where, without a number.

Tensors are fake: they know shape, dtype and device, and an operation on tensors of different
devices, or one whose result the host would wait for, raises. The host's part of the kernels runs up
to their launch. Run by test_fake_cuda.py in a process of its own.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from entropy_regularization import (
    EntropyMonitor,
    EntropyRegularization,
    HeadThresholds,
    attention_with_entropy,
    record_entropy,
)
from entropy_regularization.attention.masking import Structure
from entropy_regularization.attention.triton import launch, operators, support
from entropy_regularization.attention.triton.launch import Problem, Upstream
from entropy_regularization.attention.triton.skipping import Bounds
from entropy_regularization.attention.triton.tiles import LARGE_SHARED_BYTES
from entropy_regularization.integrations.transformers import regularize

Step = Callable[[], Any]
STEPS: dict[str, Step] = {}
BATCH, TOKENS, HEADS, VOCABULARY = 2, 24, 4, 50
SIZE = {"num_attention_heads": HEADS, "hidden_size": 32, "intermediate_size": 32}
SIZE |= {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": TOKENS}
launched: list[tuple[str, bool]] = []  # kernels, and whether a thread of a device launched them


def a_step(step: Step) -> Step:
    STEPS[step.__name__] = step
    return step


# The device


def tensors_in(*trees: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_iter(trees) if isinstance(leaf, torch.Tensor))


def note_launch(kernel: Any, programs: int, tiles: Any, arguments: dict[str, Any]) -> None:
    """Stand in for the launch: every tensor of a kernel must be on the same device."""
    devices = {str(tensor.device) for tensor in tensors_in(arguments)}
    assert len(devices) == 1, f"{kernel.__name__} is given tensors on {sorted(devices)}"
    assert devices.pop().startswith("cuda")
    launched.append((kernel.__name__, threading.current_thread() is not threading.main_thread()))


def problem_of(arguments: tuple[Any, ...]) -> Problem:
    query, key, value, allowed, padding, document, bias, sinks, seed, *rest = arguments[:17]
    *bounds, left, right, scale, softcap, dropout = rest
    structure = Structure(left, right, allowed, padding, document)
    return Problem(
        query, key, value, structure, scale, bias, softcap, sinks, dropout, seed, Bounds(*bounds)
    )


def launch_forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return launch.forward(problem_of(arguments))


def launch_backward(*arguments: Any) -> list[torch.Tensor]:
    saved, upstream, wanted = arguments[17:20], Upstream(*arguments[20:23]), arguments[23]
    found = launch.backward(problem_of(arguments), saved, upstream, tuple(wanted))
    return [gradient for gradient in found if gradient is not None]


def pretend_device() -> None:
    """Answer what is asked about a device that is not there, and run kernels up to their launch."""
    torch.cuda._lazy_init = lambda: None
    support.compute_capability = lambda index: (9, 0)
    launch.shared_bytes_of = lambda device: LARGE_SHARED_BYTES
    launch.start_kernel = note_launch
    for operator, function in (
        (operators.triton_forward, launch_forward),
        (operators.triton_backward, launch_backward),
    ):
        torch.library.register_fake(operator._schema.name, function, allow_override=True)


class NoWaiting(TorchDispatchMode):
    """Refuses copies between host and device that the host would wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and "copy" in func.__name__:
            moved = {tensor.device.type for tensor in tensors_in(args, result) if tensor.numel()}
            waits = not (kwargs or {}).get("non_blocking", False)
            assert len(moved) < 2 or not waits, f"the host waits for {func}"
        return result


# The steps. Models are made on their device; what runs later must find it by itself.


def make(kind: str, device: str = "cuda", **size: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**SIZE | size)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    config.decoder_start_token_id = 0
    heads = {"Bert": "ForMaskedLM", "T5": "ForConditionalGeneration"}
    with torch.device(device):
        model = getattr(transformers, kind + heads.get(kind, "ForCausalLM"))(config)
    return model.train()


def gpt2(**size: Any) -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=HEADS, n_positions=TOKENS, vocab_size=VOCABULARY,
        bos_token_id=0, eos_token_id=0, **size,
    )  # fmt: skip
    with torch.device("cuda"):
        return transformers.GPT2LMHeadModel(config).train()


def batch(padding: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long, device="cuda")
    given = {"input_ids": ids, "labels": ids}
    if padding:
        given["attention_mask"] = torch.ones_like(ids)
    return given


def train(model: nn.Module, *, padding: bool = True) -> None:
    for _ in range(2):  # the first is watched
        with NoWaiting():
            model(**batch(padding), **without_cache(model)).loss.backward()


def without_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


def record(model: nn.Module, regularization: EntropyRegularization) -> None:
    thresholds = HeadThresholds(2, HEADS)
    values = thresholds.fraction_bias.to("cuda").detach().requires_grad_()
    for given in (values, None, [0.5] * HEADS):
        with NoWaiting():
            with record_entropy(model) as recording:
                loss = model(**batch(), **without_cache(model)).loss
            (loss + regularization(recording, given)).backward()


@a_step
def gpt2_is_recorded() -> None:
    record(gpt2(), EntropyRegularization.calibrated())


@a_step
def gpt2_is_recorded_as_published() -> None:
    record(gpt2(attn_pdrop=0.0), EntropyRegularization())


@a_step
def gpt2_is_recorded_with_checkpointing() -> None:
    model = gpt2()
    model.gradient_checkpointing_enable()
    record(model, EntropyRegularization.calibrated())


@a_step
def llama_is_regularized() -> None:
    model = make("Llama", num_key_value_heads=2)
    regularize(model, EntropyRegularization.calibrated(), thresholds=0.5)
    train(model, padding=False)
    train(model)


@a_step
def llama_is_regularized_with_checkpointing() -> None:
    model = make("Llama", num_key_value_heads=2)
    regularize(model, EntropyRegularization(), thresholds=0.5)
    model.gradient_checkpointing_enable()
    train(model)


@a_step
def llama_is_regularized_under_autocast() -> None:
    model = make("Llama", num_key_value_heads=2)
    regularize(model, EntropyRegularization.calibrated(), thresholds=0.5)
    with torch.autocast("cuda", torch.bfloat16):
        train(model)


@a_step
def layers_lie_on_two_devices() -> None:
    """Forward alone: fake tensors cannot be differentiated in two threads at once."""
    model = make("Llama", num_key_value_heads=2)
    second = make("Llama", "cuda:1", num_key_value_heads=2)
    model.model.layers[1] = second.model.layers[1]

    def move(part: nn.Module, args: Any, kwargs: Any) -> Any:
        return torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda tensor: tensor.to("cuda:1"), (args, kwargs)
        )

    model.model.layers[1].register_forward_pre_hook(move, with_kwargs=True)
    model.model.layers[1].register_forward_hook(lambda part, args, output: output.to("cuda:0"))
    with NoWaiting(), record_entropy(model) as recording:
        model(**batch(), use_cache=False)
    assert [str(layer.entropy.device) for layer in recording] == ["cuda:0", "cuda:1"]
    for regularization in (EntropyRegularization(), EntropyRegularization.calibrated()):
        with NoWaiting():
            assert regularization(recording).device == torch.device("cuda:0")


@a_step
def windows_and_softcaps() -> None:
    model = make("Gemma2", num_key_value_heads=2, head_dim=8, sliding_window=8)
    record(model, EntropyRegularization.calibrated())


@a_step
def an_encoder() -> None:
    record(make("Bert"), EntropyRegularization.calibrated())


@a_step
def biases_and_cross_attention() -> None:
    model = make("T5", d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=HEADS)
    with NoWaiting():
        with record_entropy(model) as recording:
            loss = model(**batch(), use_cache=False).loss
        (loss + EntropyRegularization.calibrated()(recording)).backward()


@a_step
def torch_layers_are_recorded() -> None:
    with torch.device("cuda"):
        layer = nn.TransformerEncoderLayer(32, HEADS, 32, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool, device="cuda")
    with NoWaiting():
        with record_entropy(model) as recording:
            output = model(torch.zeros(BATCH, TOKENS, 32, device="cuda"), None, padding)
        (output.sum() + EntropyRegularization.calibrated()(recording)).backward()


@a_step
def heads_are_watched() -> None:
    model, monitor = make("Llama", num_key_value_heads=2), EntropyMonitor()
    for _ in range(2):
        with NoWaiting():
            with record_entropy(model, gradient=False) as recording:
                model(**batch(), use_cache=False)
            for layer in recording:
                layer.mean_per_head()
            monitor.update(recording)


@a_step
def every_option() -> None:
    def gpu(*shape: int, **options: Any) -> torch.Tensor:
        return torch.ones(*shape, device="cuda", **options)

    query = gpu(BATCH, HEADS, 16, 32, requires_grad=True)
    key, value = (gpu(BATCH, 2, TOKENS, 32, requires_grad=True) for _ in range(2))
    mask = gpu(BATCH, TOKENS, dtype=torch.bool)
    for options in (
        {"causal": True},
        {"window": (3, 0)},
        {"key_padding": mask, "document": mask.long()},
        {"allowed": gpu(BATCH, 1, 16, TOKENS, dtype=torch.bool)},
        {"bias": gpu(1, HEADS, 16, TOKENS, requires_grad=True)},
        {"softcap": 3.0, "scale": 2.0},
        {"sinks": gpu(HEADS, requires_grad=True)},
        {"dropout": 0.1},
    ):
        for name in ("triton", "blockwise", "reference"):
            with NoWaiting():
                found = attention_with_entropy(query, key, value, implementation=name, **options)
                (found.output.sum() + found.entropy.sum() + found.log_normalizer.sum()).backward()


def main() -> None:
    transformers.logging.set_verbosity_error()
    pretend_device()
    results: dict[str, Any] = {}
    for name, step in STEPS.items():
        launched.clear()
        with FakeTensorMode(allow_non_fake_inputs=True):
            try:
                step()
            except Exception as error:  # noqa: BLE001 - all of a step is what is tested
                results[name] = {"error": f"{type(error).__name__}: {error}"}
                continue
        results[name] = {"launched": sorted(set(launched))}
    json.dump(results, sys.stdout)
    sys.stdout.flush()
    # A device's thread lets go of the modes of a backward pass after it has returned; where the
    # interpreter is ending by then, torch aborts the process.
    os._exit(0)


if __name__ == "__main__":
    main()
