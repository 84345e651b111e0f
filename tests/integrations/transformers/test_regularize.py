"""regularize(model): the same numbers as the published module on eager matrices, and no matrix."""

import copy
import gc
import inspect
import logging
import threading
from pathlib import Path

import accelerate
import peft
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from entropy_regularization import EntropyRegularization, HeadThresholds, record_entropy
from entropy_regularization.integrations.transformers import load_thresholds, regularize
from entropy_regularization.integrations.transformers.accumulation import share_of_step
from entropy_regularization.integrations.transformers.regularized import handle_of
from entropy_regularization.thresholds import without_weight_decay

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS = {
    "gpt2": GPT2Config(
        n_embd=16, n_layer=2, n_head=4, vocab_size=32, n_positions=128, **NO_DROPOUT
    ),
    "llama": LlamaConfig(**SHAPE, intermediate_size=24, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SHAPE, intermediate_size=24, num_key_value_heads=2),
}
OWN_SOFTMAX = {  # no attention but their own, which makes matrices
    "bloom": BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=4),
    "gpt_neo": GPTNeoConfig(
        vocab_size=32,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=5,
        max_position_embeddings=64,
        attention_dropout=0.0,
        embed_dropout=0.0,
        resid_dropout=0.0,
    ),
}
SETTINGS = {"loss_coeff": 0.01, "tolerance_margin_factor": 0.05}


def build(family: str, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy((CONFIGS | OWN_SOFTMAX)[family])
    attention = "eager" if family in OWN_SOFTMAX else attention
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():  # freshly drawn weights attend uniformly, which would prove nothing
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(12.0)
    return model.train()


def batch_of(n: int = 13, batch: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 32, (batch, n))
    return {"input_ids": ids, "labels": ids}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        difference = (found[name] - gradient).abs().max()
        assert difference <= 1e-5 * gradient.abs().max() + 1e-9, name


def published(family: str, batch: dict, regularization: EntropyRegularization):
    """Return loss, penalty and gradients by eager attention and compute_loss on its matrices."""
    model = build(family, "eager")
    thresholds = torch.full((4,), 0.5, requires_grad=True)
    output = model(**batch, output_attentions=True)
    penalty = regularization.compute_loss(output.attentions, thresholds, 4, 2)
    loss = output.loss + penalty
    loss.backward()
    return loss.detach(), penalty.detach(), gradients(model), thresholds.grad


@pytest.mark.parametrize("family", [*CONFIGS, *OWN_SOFTMAX])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_compute_loss_on_eager_matrices(family: str, padded: bool) -> None:
    batch = batch_of()
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, 9:] = 0
    regularization = EntropyRegularization(**SETTINGS)
    wanted, penalty, wanted_gradients, threshold_gradient = published(family, batch, regularization)
    assert penalty > 0.02 * wanted  # else the comparison below would not see it
    model = build(family)
    seen = regularize(model, regularization)
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(seen.penalty, penalty, rtol=1e-5, atol=0)
    torch.testing.assert_close(seen.loss + seen.added, loss.detach())
    found = gradients(model)
    per_layer = found.pop("entropy_thresholds.fraction_bias")
    torch.testing.assert_close(per_layer.sum(0), threshold_gradient, rtol=1e-4, atol=1e-7)
    assert_near(found, wanted_gradients)


def test_comparison_notices_a_missing_penalty() -> None:
    batch, regularization = batch_of(), EntropyRegularization(**SETTINGS)
    _, _, wanted, _ = published("gpt2", batch, regularization)
    model = build("gpt2")
    model(**batch).loss.backward()
    with pytest.raises(AssertionError):
        assert_near(gradients(model), wanted)


class WatchShapes(TorchDispatchMode):
    """Collect the shapes of all tensors that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        return result

    def square(self, n: int) -> set[tuple[int, ...]]:
        return {shape for shape in self.shapes if len(shape) >= 2 and shape[-2:] == (n, n)}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("padded", [False, True])
def test_no_square_matrix_is_ever_built(family: str, padded: bool) -> None:
    n = 101  # no other size of the model
    batch = batch_of(n, 2)
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, 90:] = 0
    model = build(family)
    regularize(model, EntropyRegularization.calibrated())
    with WatchShapes() as watch:
        model(**batch).loss.backward()
    assert len(watch.shapes) > 10
    assert not watch.square(n)


def test_the_watch_sees_eager_matrices() -> None:
    with WatchShapes() as watch:
        build("gpt2", "eager")(**batch_of(101, 2)).loss.backward()
    assert watch.square(101)


def test_evaluation_and_no_labels_stay_the_models_own() -> None:
    batch, model = batch_of(), build("gpt2")
    plain = model.eval()(**batch)
    seen = regularize(model)
    output = model(**batch)
    assert torch.equal(output.loss, plain.loss)
    assert torch.equal(output.logits, plain.logits)
    assert seen.penalty is None
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        model.train()(**batch)
    assert seen.penalty is None


def test_evaluation_mode_with_labels_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = build("gpt2").eval(), batch_of()
    regularize(model)
    with caplog.at_level(logging.WARNING):
        with torch.no_grad():
            model(**batch)
        model(batch["input_ids"])
        assert "evaluation mode" not in caplog.text
        for _ in range(2):
            model(**batch)
    assert caplog.text.count("call model.train() to train with it") == 1


@pytest.mark.parametrize(
    ("layers", "calls"), [("*.attn", 2), (["*.h.1.attn"], 1), ("transformer.h.0.*", 1), ([1], 1)]
)
def test_patterns_are_counted_by_the_attention_they_match(layers: object, calls: int) -> None:
    model = build("gpt2")
    seen = regularize(model, layers=layers)
    model(**batch_of())
    assert seen.thresholds.layers == len(seen.recording) == calls


def test_no_loss_is_said_once_and_leaves_the_penalty(caplog: pytest.LogCaptureFixture) -> None:
    model = build("gpt2")
    seen = regularize(model, EntropyRegularization.calibrated(thresholds=0.2))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(batch_of()["input_ids"])
    assert caplog.text.count("returned no loss in a training pass") == 1
    seen.unadded.backward()
    assert model.transformer.h[0].attn.c_attn.weight.grad.abs().max() > 0
    model(**batch_of())
    assert seen.unadded is None


def test_tuple_output() -> None:
    batch, model = batch_of(), build("gpt2")
    wanted = model(**batch).loss
    seen = regularize(model, EntropyRegularization.calibrated(thresholds=0.2))
    place = list(inspect.signature(model.forward).parameters).index("labels")
    positional = [batch["input_ids"], *[None] * (place - 1), batch["labels"]]
    for output in (
        model(**batch, return_dict=False),
        model(*positional, return_dict=False),
        model(*positional),
    ):
        assert seen.penalty > 0
        torch.testing.assert_close(output[0], wanted + seen.penalty)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
@pytest.mark.parametrize(("layers", "whole"), [(True, False), (False, True), (True, True)])
def test_checkpointing_gives_the_same_gradients(layers: bool, whole: bool, family: str) -> None:
    """Of layers, and around the whole model as gradient caching has it: several passes a step."""
    found = []
    for checkpointing in (False, True):
        model = build(family)
        regularize(model, EntropyRegularization.calibrated(thresholds=0.2))
        if checkpointing and layers:
            model.gradient_checkpointing_enable({"use_reentrant": False})

        def loss(batch: dict, model: PreTrainedModel = model) -> torch.Tensor:
            return model(**batch).loss

        for _ in range(2):  # the second step starts while the first one's attention is still set
            losses = [
                checkpoint(loss, batch, use_reentrant=False)
                if checkpointing and whole
                else loss(batch)
                for batch in (batch_of(13), batch_of(9))
            ]
            torch.stack(losses).sum().backward()
        found.append(gradients(model))
    assert_near(found[1], found[0])


@pytest.mark.parametrize("recording", [False, True])
def test_passes_without_a_gradient_before_backward_computes_again(recording: bool) -> None:
    """Text that is generated, or a reference model that is the same without its adapter."""
    found = []
    for checkpointing in (False, True):
        model = build("llama")
        regularize(model, EntropyRegularization.calibrated(thresholds=0.2))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch_of()).loss
        seen = []
        hook = model.register_forward_pre_hook(
            lambda model, *_, seen=seen: seen.append(model.config._attn_implementation)
        )
        with torch.no_grad():
            model.generate(batch_of()["input_ids"], max_new_tokens=3, do_sample=False)
            with pytest.raises(IndexError):
                model(torch.full((1, 3), 999))
            if recording:
                with record_entropy(model) as inside:
                    model(**batch_of(7))
                assert len(inside) == 2
        hook.remove()
        assert set(seen[:3]) == {"sdpa"}  # its own attention
        loss.backward()
        found.append(gradients(model))
        model(**batch_of()).loss.backward()
        with torch.no_grad():
            model(**batch_of())
        model(**batch_of(5))
        model.eval()(**batch_of(5))
        assert model.config._attn_implementation == "sdpa"
    assert_near(found[1], found[0])


def test_a_reentrant_checkpoint_around_the_whole_model_is_refused() -> None:
    model = build("gpt2")
    regularize(model, EntropyRegularization.calibrated())

    def loss(anchor: torch.Tensor) -> torch.Tensor:
        return model(**batch_of()).loss + 0 * anchor

    with pytest.raises(RuntimeError, match=r"GPT2LMHeadModel runs without a gradient .*; use"):
        checkpoint(loss, torch.zeros((), requires_grad=True), use_reentrant=True)
    with torch.no_grad():  # no gradient to lose
        checkpoint(loss, torch.zeros((), requires_grad=True), use_reentrant=True)
        checkpoint_sequential([loss, nn.Identity()], 2, torch.zeros(()), use_reentrant=True)


def test_thresholds_are_saved_and_restored(tmp_path: Path) -> None:
    model = build("gpt2")
    regularize(model, EntropyRegularization(**SETTINGS))
    optimizer = torch.optim.AdamW(without_weight_decay(model, 1.0), lr=0.1)
    model(**batch_of()).loss.backward()
    optimizer.step()
    learned = model.entropy_thresholds().detach().clone()
    assert (learned != 0.5).all()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    regularize(loaded, EntropyRegularization(**SETTINGS), thresholds=load_thresholds(tmp_path))
    assert torch.equal(loaded.entropy_thresholds(), learned)
    torch.testing.assert_close(loaded(**batch_of()).loss, model(**batch_of()).loss)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert torch.equal(load_thresholds(tmp_path / "sharded")(), learned)
    build("gpt2").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no entropy thresholds in model"):
        load_thresholds(tmp_path / "plain")


def test_remove_leaves_the_model_as_it_was() -> None:
    model = build("gpt2")
    keys, wanted = set(model.state_dict()), model(**batch_of()).loss
    seen = regularize(model)
    assert handle_of(model) is seen
    model(**batch_of())
    seen.remove()
    assert set(model.state_dict()) == keys
    assert handle_of(model) is None
    assert torch.equal(model(**batch_of()).loss, wanted)


def test_copies_are_apart() -> None:
    model = build("gpt2")
    seen = regularize(model, EntropyRegularization.calibrated(thresholds=HeadThresholds(2, 4, 0.2)))
    clone = copy.deepcopy(model)
    clone(**batch_of()).loss.backward()
    assert seen.penalty is None
    assert handle_of(clone).penalty > 0
    names = [layer.name for layer in handle_of(clone).recording]
    assert names == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert clone.entropy_thresholds.fraction_bias.grad.abs().sum() > 0
    assert model.entropy_thresholds.fraction_bias.grad is None
    model(batch_of()["input_ids"])  # no labels: the penalty is left to the caller
    assert seen.unadded is not None
    assert handle_of(copy.deepcopy(model)).unadded is None


def hooks_of(model: nn.Module) -> int:
    return sum(len(p._forward_hooks) + len(p._forward_pre_hooks) for p in model.modules())


def adapter(kind: str) -> peft.PeftConfig:
    general = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    if kind == "lora":
        return peft.LoraConfig(**general, init_lora_weights=False)
    return peft.AdaLoraConfig(**general, total_step=9, orth_reg_weight=0.1)


def adapted(kind: str) -> peft.PeftModel:
    return peft.get_peft_model(build("llama"), adapter(kind))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "direct"), [("lora", False), ("lora", True), ("adalora", True)])
def test_adapters(
    kind: str, direct: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where PEFT calls the model's forward instead of the model: AdaLora, all before 0.21."""

    def around(self: nn.Module, *args: object, **kwargs: object) -> object:
        return self.model.forward(*args, **kwargs)

    def through(self: nn.Module, *args: object, **kwargs: object) -> object:
        return self.model(*args, **kwargs)

    tuner = peft.tuners.tuners_utils.BaseTuner
    monkeypatch.setattr(tuner, "forward", around if direct else through)
    settings, batch = EntropyRegularization(**SETTINGS), batch_of()
    model = adapted(kind)
    plain = copy.deepcopy(model)
    if checkpointing:
        for each in (model, plain):
            each.gradient_checkpointing_enable({"use_reentrant": False})
    hooks = hooks_of(model)
    handle = regularize(model, settings, thresholds=0.5)
    assert bool(model.base_model._forward_hooks) == direct  # a pass is not begun twice
    loss = model(**batch).loss
    loss.backward()
    with record_entropy(plain) as recording:
        expected = plain(**batch).loss
    penalty = settings(recording, 0.5)
    assert penalty > 0
    torch.testing.assert_close(handle.penalty, penalty.detach())
    torch.testing.assert_close(loss, expected + penalty)
    (expected + penalty).backward()
    assert_near(gradients(model), gradients(plain))
    handle.remove()
    model(**batch)  # ends what waited for backward to compute something again
    assert hooks_of(model) == hooks


def test_adaption_prompt_is_refused_for_its_softmax_or_left_out() -> None:
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
    model, batch = peft.get_peft_model(build("llama"), config).train(), batch_of()
    handle = regularize(model, thresholds=0.5)
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn computes a softmax of its own; pass"
    ):
        model(**batch)
    handle.remove()
    with record_entropy(model, allow_partial=True) as recording:
        expected = model(**batch).loss
    handle = regularize(model, thresholds=0.5, allow_partial=True)
    torch.testing.assert_close(
        model(**batch).loss, expected + handle.regularization(recording, 0.5)
    )


def test_a_loss_that_is_not_used_is_refused_at_the_next_pass() -> None:
    model = build("llama")
    handle = regularize(model)
    model(**batch_of()).logits.logsumexp(-1).mean().backward()
    assert model.entropy_thresholds.fraction_bias.grad is None
    with pytest.raises(ValueError, match="LlamaForCausalLM was trained through its outputs, not"):
        model(**batch_of())
    output = model(**batch_of())  # said once
    assert handle.penalty > 0
    output.logits.square().mean().backward(retain_graph=True)
    output.loss.backward()  # in another order: it was used
    output = model(**batch_of())
    (output.loss + output.logits.square().mean()).backward()
    model(**batch_of())  # no backward
    for _ in range(2):  # through an outer checkpoint, and a penalty that one adds oneself
        checkpoint(lambda: model(**batch_of()).loss, use_reentrant=False).backward()
        output = model(batch_of()["input_ids"])
        with torch.no_grad():
            model(**batch_of())
        assert handle.unadded is not None
        (output.logits.square().mean() + handle.unadded).backward()


def test_losses_of_several_passes_that_are_not_used_are_refused() -> None:
    """As a preference loss by hand would train; a teacher's pass beside a loss is let pass."""
    model = build("llama")
    regularize(model)
    first, second = model(**batch_of()), model(**batch_of())
    (second.loss + (first.logits - second.logits.detach()).square().mean()).backward()
    chosen, rejected = model(**batch_of()).logits, model(**batch_of()).logits
    (rejected - chosen).logsumexp(-1).mean().backward()
    with pytest.raises(ValueError, match="LlamaForCausalLM was trained through its outputs, not"):
        model(**batch_of())
    model(**batch_of()).loss.backward()  # said once
    model(**batch_of())


def test_thresholds_that_an_offloading_hook_loads() -> None:
    batch, found = batch_of(), []
    for offloads in ("no", "after", "before"):
        model = build("llama")
        if offloads == "before":
            model = accelerate.cpu_offload(model, torch.device("cpu"))
        regularize(model, EntropyRegularization(**SETTINGS))
        if offloads == "after":
            model = accelerate.cpu_offload(model, torch.device("cpu"))
        found.append(model(**batch).loss.detach())
    assert found[0] == found[1] == found[2]


def test_a_configuration_whose_layers_differ_tells_no_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As that of dots3_note, which raises an error of its own when asked."""

    def refuse(config: object) -> int:
        raise RuntimeError("'num_attention_heads' is a per-layer attribute")

    model = build("llama")
    monkeypatch.setattr(type(model.config), "num_attention_heads", property(refuse), raising=False)
    with pytest.raises(ValueError, match="pass thresholds=HeadThresholds"):
        regularize(model)
    regularize(model, thresholds=HeadThresholds(2, 4))
    assert torch.isfinite(model(**batch_of()).loss)


def test_a_model_that_data_parallelism_has_wrapped_is_refused() -> None:
    class DistributedDataParallel(nn.Module):  # the real one needs a process group
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: torch.Tensor) -> object:
            return self.module(**inputs)

    model = DistributedDataParallel(build("llama"))
    with pytest.raises(ValueError, match="wrapped by DistributedDataParallel, which learns of no"):
        regularize(model)
    for fixed in (0.5, HeadThresholds(2, 4, learnable=False)):
        handle = regularize(model, thresholds=fixed)
        assert torch.isfinite(model(**batch_of()).loss)
        assert handle.penalty > 0
        handle.remove()


def test_thresholds_that_are_frozen_later_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    regularize(model)
    model.requires_grad_(False).model.layers.requires_grad_()  # as PEFT does
    model(**batch_of())
    model(**batch_of())
    (record,) = caplog.records
    assert record.getMessage().startswith("the entropy thresholds of LlamaForCausalLM are frozen")
    other, fixed = adapted("lora"), build("llama")
    regularize(other)
    other(**batch_of())
    regularize(fixed, thresholds=HeadThresholds(2, 4, learnable=False))
    fixed(**batch_of())
    assert len(caplog.records) == 1


def test_a_forward_around_the_hooks_is_refused() -> None:
    model = build("llama")
    handle = regularize(model, EntropyRegularization(**SETTINGS))
    message = "the forward of LlamaForCausalLM was called directly, around the hooks that add"
    with pytest.raises(ValueError, match=message):
        model.forward(**batch_of())
    around = peft.get_peft_model(model, adapter("adalora"))
    with pytest.raises(ValueError, match=message):
        around(**batch_of())
    with torch.no_grad():
        around(**batch_of())
    around.eval()(**batch_of())
    model.train().model(batch_of()["input_ids"])  # a part alone is no pass of the model
    model.model.compile(backend="aot_eager", fullgraph=True)
    model.model(batch_of()["input_ids"])
    assert handle.penalty is None
    assert model(**batch_of()).loss > handle.loss


def test_training_a_part_alone_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = build("llama"), batch_of()["input_ids"]
    regularize(model)
    with torch.no_grad():
        model.model(ids)  # nothing is trained
    with record_entropy(model):
        model.model(ids)  # whoever records it penalises it
    model.lm_head(torch.zeros(1, model.config.hidden_size))  # attends nothing
    model.model.requires_grad_(False)
    model.model(ids)
    assert not caplog.records
    model.model.requires_grad_()
    for _ in range(2):
        model.model(ids)
    (record,) = caplog.records
    assert record.getMessage() == (
        "the LlamaModel of LlamaForCausalLM was called by itself in training, where no entropy "
        "penalty is added; call the model itself, or record the part with record_entropy and add "
        "regularization(recording) to your loss."
    )


def test_an_exception_inside_forward_leaves_the_model_usable() -> None:
    model = build("gpt2")
    seen = regularize(model, EntropyRegularization.calibrated())
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 999), labels=torch.zeros(1, 3).long())
    assert model.config._attn_implementation == "sdpa"
    model(**batch_of()).loss.backward()
    assert seen.penalty is not None


def test_an_interrupt_inside_forward_leaves_the_model_usable() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    gc.collect()  # a model of another test may still wait for its backward
    functional.scaled_dot_product_attention(*torch.zeros(3, 1, 1, 1))
    model = build("gpt2")
    seen = regularize(model, EntropyRegularization.calibrated(thresholds=0.2))
    wanted = model(**batch_of()).loss
    for after in ("a pass", "remove"):
        hook = model.transformer.h[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch_of())
        hook.remove()
        if after == "a pass":
            torch.testing.assert_close(model(**batch_of()).loss, wanted)
        else:
            seen.remove()
        assert model.config._attn_implementation == "sdpa"
        assert functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_inside_a_recording() -> None:
    model = build("gpt2")
    seen = regularize(model, EntropyRegularization.calibrated())
    with record_entropy(model) as recording:
        model(**batch_of())
    assert len(recording) == len(seen.recording) == 2
    torch.testing.assert_close(recording[0].entropy.detach(), seen.recording[0].entropy)


def test_a_regularized_model_is_exported_in_evaluation_mode() -> None:
    model, batch = build("llama"), batch_of()
    given = {"input_ids": batch["input_ids"], "use_cache": False}
    handle = regularize(model, EntropyRegularization(**SETTINGS))
    message = "exported while its entropies are recorded, .* leave record_entropy first, and if the"
    with pytest.raises(NotImplementedError, match=message):
        torch.export.export(model, (), {**given, "labels": batch["labels"]})
    model.eval()
    with record_entropy(model), pytest.raises(NotImplementedError, match=message):
        torch.export.export(model, (), given)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="or strict=True, or call remove"):
        torch.export.export(model, (), given, strict=True)
    exported = torch.export.export(model, (), given).module()
    torch.testing.assert_close(exported(**given).logits, model(**given).logits)
    assert model.config._attn_implementation == "sdpa"
    handle.remove()
    torch.export.export(model, (), given, strict=True)


def test_compiled_model_has_the_same_gradients_and_is_compiled_once() -> None:
    model, compiled = build("llama"), build("llama")
    for each in (model, compiled):
        regularize(each, EntropyRegularization.calibrated(thresholds=0.2))
    torch._dynamo.reset()
    forward = torch.compile(compiled, backend="eager")
    forward(**batch_of()).loss.backward()
    for each in (model, compiled):
        each.zero_grad()
    model(**batch_of()).loss.backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        forward(**batch_of()).loss.backward()
    assert_near(gradients(compiled), gradients(model))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_half_precision_model(family: str) -> None:
    model = build(family).bfloat16()
    seen = regularize(model, EntropyRegularization.calibrated(thresholds=0.1))
    output = model(**batch_of())
    output.loss.backward()
    assert output.loss.isfinite()
    assert seen.recording[0].entropy.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_encoder_decoder_counts_its_calls() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 32}
    layers = {"encoder_layers": 2, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(**sizes, **layers, **heads, decoder_start_token_id=2, pad_token_id=1)
    model = BartForConditionalGeneration(config).train()
    seen = regularize(model, EntropyRegularization.calibrated())
    model(input_ids=batch_of()["input_ids"], labels=batch_of(7)["labels"]).loss.backward()
    assert [layer.kind for layer in seen.recording].count("cross") == 1
    assert seen.thresholds().shape == (4, 4)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="model is a Linear without a transformers model inside"):
        regularize(torch.nn.Linear(2, 2))
    model = build("gpt2")
    with pytest.raises(TypeError, match="regularization is a float; pass an EntropyRegularization"):
        regularize(model, 0.1)
    with pytest.raises(ValueError, match="thresholds is a tensor that requires a gradient"):
        regularize(model, thresholds=torch.full((4,), 0.5, requires_grad=True))
    with pytest.raises(
        ValueError, match=r"layers pattern '\*\.h\.9\.\*' matches no module of GPT2LM"
    ):
        regularize(model, layers="*.h.9.*", thresholds=0.5)
    with pytest.raises(ValueError, match=r"'\*\.mlp' matches no attention module of GPT2LM"):
        regularize(model, layers="*.mlp")
    with pytest.raises(TypeError, match="layers is 0; pass a list of indices"):
        regularize(model, layers=0)
    assert handle_of(model) is None
    regularize(model, thresholds=HeadThresholds(3, 4))
    with pytest.raises(ValueError, match=r"made 2 attention calls .*HeadThresholds\(2, 4\)"):
        model(**batch_of())
    with pytest.raises(ValueError, match="GPT2LMHeadModel is regularized already; call remove"):
        regularize(model)
    with pytest.raises(ValueError, match="num_items_in_batch was given but neither labels nor"):
        share_of_step(model, {"num_items_in_batch": 5})


def test_share_of_step() -> None:
    labels = torch.tensor([[5, 5, 5, -100], [5, 5, -100, -100]])
    model = build("llama")
    assert share_of_step(model, {"labels": labels}) == 1.0
    inputs = {"labels": labels, "num_items_in_batch": torch.tensor(12)}
    assert share_of_step(model, inputs) == 0.25  # the first label of a row is no target
    assert share_of_step(model, {**inputs, "shift_labels": labels}) == 5 / 12
    assert share_of_step(build("gpt2"), inputs) == 5 / 12  # Trainer counts every label of GPT-2


def test_an_attention_that_is_set_meanwhile_stays() -> None:
    """Backward of a checkpointed pass computes the entropy again, so that its attention waits."""
    model = build("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    handle = regularize(model)
    model(**batch_of(), use_cache=False).loss.backward()
    handle.remove()
    model.set_attn_implementation("eager")
    for _ in range(2):
        with torch.no_grad():
            assert len(model.eval()(**batch_of(), output_attentions=True).attentions) == 2
    assert model.config._attn_implementation == "eager"


def dropping_bart() -> BartForConditionalGeneration:
    """Return three layers of an encoder and one of a decoder, which training drops at times."""
    config = BartConfig(
        d_model=16, encoder_layers=3, decoder_layers=1, encoder_attention_heads=2, vocab_size=32,
        decoder_attention_heads=4, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1,
        max_position_embeddings=32, encoder_layerdrop=0.3, decoder_layerdrop=0.3, dropout=0.0,
    )  # fmt: skip
    return BartForConditionalGeneration(config).train()


def test_layers_that_a_pass_drops_keep_their_thresholds() -> None:
    torch.manual_seed(0)
    model = dropping_bart()
    order = [f"model.encoder.layers.{k}.self_attn" for k in range(3)]
    order += [f"model.decoder.layers.0.{name}" for name in ("self_attn", "encoder_attn")]
    initial = torch.rand(5, 4)
    held = HeadThresholds(5, 4, initial)
    handle = regularize(model, EntropyRegularization.calibrated(1.0, 0.0), thresholds=held)
    passes, batch = [], batch_of()
    for _ in range(15):
        held.fraction_bias.grad = None
        model(**batch).loss.backward()
        recording = handle.recording
        rows = [order.index(layer.name) for layer in recording]
        passes.append(rows)
        fixed = initial[rows, : max(layer.heads for layer in recording)]
        torch.testing.assert_close(handle.penalty, handle.regularization(recording, fixed))
        moved = held.fraction_bias.grad.abs().sum(1).nonzero().flatten().tolist()
        assert moved == sorted(rows)
    assert len(passes[0]) < 5  # the first one has dropped some
    assert [0, 1, 2, 3, 4] in passes
    assert any(4 not in rows for rows in passes)  # the whole decoder was


def test_the_first_passes_may_drop_all_layers_of_a_kind() -> None:
    model = dropping_bart()
    initial = torch.rand(5, 4)
    handle = regularize(model, thresholds=HeadThresholds(5, 4, initial))
    for layerdrop, calls in ((1.0, 3), (1.0, 3), (0.0, 5)):
        model.model.encoder.layerdrop, model.model.decoder.layerdrop = 0.0, layerdrop
        model(**batch_of()).loss.backward()
        recording = handle.recording
        assert len(recording) == calls
        fixed = initial[:calls, : max(layer.heads for layer in recording)]
        torch.testing.assert_close(handle.penalty, handle.regularization(recording, fixed))


def test_calls_whose_number_follows_the_batch_are_refused() -> None:
    model = build("llama")
    handle = regularize(model, thresholds=HeadThresholds(2, 4))
    model(**batch_of(), use_cache=False).loss.backward()
    model.model.layers.append(model.model.layers[1])
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="other passes made another number; choose"):
        model(**batch_of(), use_cache=False)
    assert handle.thresholds.layers == 2


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_pass_beside_a_training_pass_is_refused(elsewhere: bool) -> None:
    """The one that was there first keeps its penalty."""
    model = build("llama")
    handle = regularize(model, EntropyRegularization.calibrated(1.0))
    expected = model(**batch_of()).loss
    sentences = []

    def infer() -> None:
        try:
            with torch.no_grad():
                model(**batch_of())
        except RuntimeError as error:
            sentences.append(str(error))

    def beside(*_: object) -> None:
        thread = threading.Thread(target=infer)
        (thread.start(), thread.join()) if elsewhere else infer()

    hook = model.model.layers[1].register_forward_hook(beside)
    torch.testing.assert_close(model(**batch_of()).loss, expected)
    assert "LlamaForCausalLM was called while a training pass of it runs" in sentences[0]
    hook.remove()
    infer()
    assert len(sentences) == 1
    assert handle.penalty > 0
