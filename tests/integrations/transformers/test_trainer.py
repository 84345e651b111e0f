"""EntropyRegularizedTrainer: accumulation, ranks, resuming, logs; plain Trainer with regularize."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
)
from transformers import TrainingArguments as Arguments

from entropy_regularization import EntropyRegularization, HeadThresholds
from entropy_regularization.integrations.transformers import (
    EntropyCallback,
    EntropyRegularizedTrainer,
    load_thresholds,
    regularize,
)
from entropy_regularization.monitoring.statistics import flatten

N = 12


def calibrated(across_ranks: bool = False) -> EntropyRegularization:
    return EntropyRegularization.calibrated(0.5, 0.02, across_ranks=across_ranks)


CALIBRATED = calibrated()


def build(family: str = "llama", dropout: float = 0.0):
    torch.manual_seed(0)
    if family == "gpt2":
        rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        config = GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=32, n_positions=32, **rates)
        return GPT2LMHeadModel(config)
    config = AutoConfig.for_model(
        family,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=32,
    )
    return AutoModelForCausalLM.from_config(config)


def data(rows: int = 32, uneven: bool = False) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 32, (rows, N), generator=torch.Generator().manual_seed(1))
    result = [{"input_ids": row, "labels": row} for row in ids]
    if uneven:  # three rows of four are short
        for number, row in enumerate(result):
            real = torch.arange(N) < (N if number % 4 == 0 else 3)
            row |= {"attention_mask": real.long(), "labels": row["labels"].where(real, -100)}
    return result


def arguments(folder: Path, batch: int = 8, accumulation: int = 1, **options) -> Arguments:
    defaults = {
        "max_steps": 4,
        "learning_rate": 0.02,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "sgd",
        "max_grad_norm": 1e9,
    }
    return Arguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **{**defaults, **options},
    )


def lines(trainer: Trainer, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def entropies(callback: EntropyCallback) -> list[float]:
    return [number for _, heads in callback.history for number in flatten(heads.entropy)]


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


ROADS = ["trainer", "regularize", "label smoothing", "loss function", "own loss", "derived"]


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_accumulation_changes_nothing(tmp_path: Path, road: str, family: str) -> None:
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model, options, extra = build(family), {}, {}
        if road == "label smoothing":
            options["label_smoothing_factor"] = 0.1
        if road == "loss function":
            extra["compute_loss_func"] = mean_loss
        args = arguments(tmp_path, batch, accumulation, **options)
        if road == "regularize":
            regularize(model, CALIBRATED)
            trainer = Trainer(model=model, args=args, train_dataset=data())
        else:
            kinds = {"own loss": Mixed, "derived": Derived}
            kind = kinds.get(road, EntropyRegularizedTrainer)
            trainer = kind(
                model=model, args=args, train_dataset=data(), regularization=CALIBRATED, **extra
            )
        trainer.train()
        found.append((weights(model), lines(trainer, "loss"), lines(trainer, "penalty")))
    (one, one_loss, one_penalty), (four, four_loss, four_penalty) = found
    torch.testing.assert_close(four, one, rtol=1e-4, atol=1e-6)
    assert four_loss == pytest.approx(one_loss, rel=1e-5)
    if road != "regularize":
        assert len(one_penalty) == 4
        assert min(one_penalty) > 0.02
        assert four_penalty == pytest.approx(one_penalty, rel=1e-4)
    plain = build(family)
    assert (weights(plain) - one[: weights(plain).numel()]).abs().max() > 1e-3  # it did train


def mean_loss(outputs, labels, num_items_in_batch):
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return total / num_items_in_batch


class LogitsTrainer(Trainer):
    """Makes the loss of something else than the model's, as the trainers of TRL do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert not return_outputs  # as TRL's GRPOTrainer has it
        outputs = model(**inputs)
        if num_items_in_batch is None:
            num_items_in_batch = inputs["labels"][:, 1:].numel()
        return mean_loss(outputs, inputs["labels"], num_items_in_batch)


class Mixed(EntropyRegularizedTrainer, LogitsTrainer):
    pass


class Derived(EntropyRegularizedTrainer):
    compute_loss = LogitsTrainer.compute_loss


def test_own_losses_hold_the_penalty_once(tmp_path: Path) -> None:
    """Whether they are made of the model's loss or not, and logs say how much of them it is."""

    class Extended(EntropyRegularizedTrainer):
        def compute_loss(self, *args, **options):
            return super().compute_loss(*args, **options) + 3.0

    class Inner(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss + 3.0

    found = {}
    kinds = (EntropyRegularizedTrainer, Mixed, Extended)
    around = type("Around", (EntropyRegularizedTrainer, Inner), {})
    anew = type("Anew", (EntropyRegularizedTrainer,), {"compute_loss": Inner.compute_loss})
    for kind in (*kinds, around, anew):
        args = arguments(tmp_path, max_steps=2)
        trainer = kind(model=build(), args=args, train_dataset=data(), regularization=CALIBRATED)
        trainer.train()
        found[kind.__name__] = [lines(trainer, key) for key in ("loss", "penalty", "model_loss")]
    loss, penalty, own = found["EntropyRegularizedTrainer"]
    assert min(penalty) > 0.02
    for name, extra in {"Mixed": 0, "Extended": 3, "Around": 3, "Anew": 3}.items():
        assert found[name][0] == pytest.approx([each + extra for each in loss], rel=1e-5)
        assert found[name][1] == pytest.approx(penalty, rel=1e-4)
        assert found[name][2] == pytest.approx([each + extra for each in own], rel=1e-5)


def test_a_trainer_with_a_loss_of_its_own_is_refused(tmp_path: Path) -> None:
    """Or every step would silently be one without the penalty."""
    model = build()
    regularize(model, CALIBRATED)
    args = arguments(tmp_path, 2, 4)
    trainer = LogitsTrainer(model=model, args=args, train_dataset=data())
    with pytest.raises(ValueError, match="was trained through its outputs, not through the loss"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_every_model_of_model_init_is_regularized(tmp_path: Path) -> None:
    for thresholds in (None, HeadThresholds(2, 4, 0.3)):
        trainer = EntropyRegularizedTrainer(
            model_init=lambda: build(),
            args=arguments(tmp_path),
            train_dataset=data(),
            regularization=CALIBRATED,
            thresholds=thresholds,
        )
        losses = []
        for _ in range(2):  # each begins anew
            trainer.state.log_history.clear()
            trainer.train()
            losses.append(lines(trainer, "penalty"))
            assert trainer.model.entropy_thresholds is not thresholds  # which stays as it is
        assert losses[0] == losses[1]
        assert min(losses[0]) > 0.02


def test_logs_and_evaluation(tmp_path: Path) -> None:
    model = build()
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer = EntropyRegularizedTrainer(
        model=model,
        args=args,
        train_dataset=data(),
        eval_dataset=data(8),
        regularization=EntropyRegularization.calibrated(3.0, 0.0),
    )
    first = trainer.evaluate()["eval_loss"]
    own = build().eval()
    batch = {key: torch.stack([row[key] for row in data(8)]) for key in ("input_ids", "labels")}
    assert first == pytest.approx(own(**batch).loss.item(), rel=1e-5)
    trainer.train()
    for line in (line for line in trainer.state.log_history if "loss" in line):
        assert line["penalty"] > 0.1
        assert line["loss"] == pytest.approx(line["model_loss"] + line["penalty"])
        assert 0 < line["entropy/mean"] < torch.tensor(float(N)).log()
        assert 0 < line["entropy/utilisation"] <= 1
    assert lines(trainer, "penalty")[-1] < lines(trainer, "penalty")[0]


@pytest.mark.parametrize("filtered", [True, False])
def test_a_loss_that_is_not_finite_is_logged_as_trainer_logs_it(
    tmp_path: Path, filtered: bool
) -> None:
    """In float16 one overflows now and then, and the logs go on."""

    def loss_of_logits(outputs, labels, num_items_in_batch):
        overflows = trainer.state.global_step == 1
        return outputs.logits.square().mean() + (math.inf if overflows else 0.0)

    options = arguments(
        tmp_path, logging_nan_inf_filter=filtered, logging_steps=4, learning_rate=0.0
    )
    trainer = EntropyRegularizedTrainer(
        build(), options, train_dataset=data(), regularization=calibrated(), thresholds=0.5,
        compute_loss_func=loss_of_logits,
    )  # fmt: skip
    trainer.train()
    for key in ("loss", "penalty", "model_loss"):
        (logged,) = lines(trainer, key)
        assert math.isfinite(logged) == filtered
    if filtered:  # nothing was learned; what Trainer takes for a second step is half the first
        last = trainer.regularized.penalty.item()
        assert lines(trainer, "penalty") == pytest.approx([3.5 / 4 * last], rel=0.01)


def test_first_step_is_the_published_sum(tmp_path: Path) -> None:
    """With the published keywords, the first logged penalty is compute_loss on eager matrices."""
    args = arguments(tmp_path, batch=32, max_steps=1)
    settings = {"loss_coeff": 1e-3, "tolerance_margin_factor": 0.05, "context_size": 64}
    trainer = EntropyRegularizedTrainer(model=build(), args=args, train_dataset=data(), **settings)
    trainer.train()
    eager = build()
    eager.set_attn_implementation("eager")
    batch = {key: torch.stack([row[key] for row in data()]) for key in ("input_ids", "labels")}
    output = eager(**batch, output_attentions=True)
    wanted = EntropyRegularization(**settings).compute_loss(output.attentions, [0.5] * 4, 4, 2)
    assert lines(trainer, "penalty") == pytest.approx([wanted.item()], rel=1e-4)
    assert lines(trainer, "model_loss") == pytest.approx([output.loss.item()], rel=1e-4)


@pytest.mark.parametrize("trainer_class", [EntropyRegularizedTrainer, Trainer])
def test_thresholds_are_trained_without_weight_decay(tmp_path: Path, trainer_class: type) -> None:
    model = build()
    regularize(model, CALIBRATED)
    args = arguments(tmp_path, weight_decay=0.5, optim="adamw_torch")
    trainer = trainer_class(model=model, args=args, train_dataset=data())
    trainer.create_optimizer()
    parameter = model.entropy_thresholds.fraction_bias
    groups = [
        group
        for group in trainer.optimizer.param_groups
        if any(p is parameter for p in group["params"])
    ]
    assert [group["weight_decay"] for group in groups] == [0.0]
    trainer.train()
    assert (parameter != 0.5).all()


# save_pretrained gives the head of GPT-NeoX and the experts of Mixtral other names
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral"])
def test_resuming_equals_not_stopping(family: str, tmp_path: Path) -> None:
    def train(folder: Path, resume: str | None = None) -> tuple[torch.nn.Module, Trainer]:
        model = build(family)
        options = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
        args = arguments(folder, max_steps=4, **options)
        trainer = EntropyRegularizedTrainer(
            model=model, args=args, train_dataset=data(), regularization=CALIBRATED
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer

    whole, _ = train(tmp_path)
    checkpoint = tmp_path / "checkpoint-2"
    resumed, trainer = train(tmp_path / "again", str(checkpoint))
    assert torch.equal(resumed.entropy_thresholds(), whole.entropy_thresholds())
    assert torch.equal(weights(resumed), weights(whole))
    state = trainer.optimizer.state[resumed.entropy_thresholds.fraction_bias]
    assert state["step"] == 4  # the optimizer's moments went on, not anew
    resumed.load_state_dict(build(family).state_dict(), strict=False)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-4")
    trainer._load_best_model()
    assert torch.equal(weights(resumed), weights(whole))


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = build()
        args = arguments(
            tmp_path,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        trainer = EntropyRegularizedTrainer(
            model=model, args=args, train_dataset=data(), regularization=CALIBRATED
        )
        trainer.train()
        found.append(weights(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_bfloat16_autocast(tmp_path: Path) -> None:
    args = arguments(tmp_path, bf16=True)
    trainer = EntropyRegularizedTrainer(
        model=build(), args=args, train_dataset=data(), regularization=CALIBRATED
    )
    trainer.train()
    assert min(lines(trainer, "penalty")) > 0.02


@pytest.mark.parametrize("adapter", ["lora", "prompt tuning"])
def test_adapters(tmp_path: Path, adapter: str) -> None:
    if adapter == "lora":
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    else:
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build(), config)
    before = weights(model)
    trainer = EntropyRegularizedTrainer(
        model=model, args=arguments(tmp_path), train_dataset=data(), regularization=CALIBRATED
    )
    trainer.train()
    assert min(lines(trainer, "penalty")) > 0.02
    assert (weights(model)[: before.numel()] != before).any()
    (thresholds,) = (p for name, p in model.named_parameters() if name.endswith("fraction_bias"))
    assert (thresholds != 0.5).all()


def test_thresholds_are_saved_and_resumed_beside_adapters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(resume: Path | None = None, **options) -> EntropyRegularizedTrainer:
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(build(), config)
        settings = {"save_strategy": "steps", "save_steps": 2, "eval_steps": 2} | options
        args = arguments(tmp_path, lr_scheduler_type="constant", **settings)
        sets = {"train_dataset": data(), "eval_dataset": data(8)}
        trainer = EntropyRegularizedTrainer(
            model=model, args=args, regularization=CALIBRATED, **sets
        )
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer

    whole = train()
    checkpoint = tmp_path / "checkpoint-2"
    middle = load_thresholds(checkpoint)()
    assert (middle != 0.5).all()
    resumed = train(checkpoint)
    assert lines(resumed, "penalty")[-2:] == pytest.approx(lines(whole, "penalty")[-2:], rel=1e-5)
    found, wanted = (each.regularized.thresholds() for each in (resumed, whole))
    torch.testing.assert_close(found, wanted)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "greater_is_better": True}
    trainer = train(**best, metric_for_best_model="eval_loss")  # the earlier is the worse
    assert trainer.state.best_model_checkpoint == str(checkpoint)
    kept = load_thresholds(checkpoint)()
    assert torch.equal(trainer.regularized.thresholds(), kept)
    (checkpoint / "entropy_thresholds.safetensors").unlink()
    train(checkpoint)
    assert "has no entropy_thresholds.safetensors; the thresholds stay" in caplog.text


HEADS = ("entropy/mean", "entropy/utilisation", "entropy/overloaded")

RANKS = """
import gc, json, sys, torch
sys.path.insert(0, sys.argv[1])
from test_trainer import HEADS, arguments, build, calibrated, data, entropies, lines, weights
from entropy_regularization.integrations.transformers import (
    EntropyCallback, EntropyRegularizedTrainer)
def train():
    model = build()
    args = arguments(sys.argv[2], BATCH, ddp_backend="gloo", **json.loads(sys.argv[3]))
    callback = EntropyCallback()
    trainer = EntropyRegularizedTrainer(
        model=model, args=args, train_dataset=data(64, UNEVEN), regularization=calibrated(ACROSS),
        callbacks=[callback] if args.gradient_accumulation_steps == 1 else [])
    trainer.train()
    if trainer.is_world_process_zero():
        result = {key: lines(trainer, key) for key in ("loss", "penalty", *HEADS)}
        result["watched"] = entropies(callback)
        torch.save({**result, "weights": weights(model)}, sys.argv[4])
train()
gc.collect()  # the wrapped model holds the group, whose threads abort the end of the program
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("uneven", "across", "accumulation", "options"),
    [
        (True, False, 2, {}),
        (True, True, 1, {}),
        (False, False, 2, {"average_tokens_across_devices": False}),
        (False, False, 1, {"label_smoothing_factor": 0.1}),
    ],
)
def test_two_ranks_equal_one(
    tmp_path: Path, uneven: bool, across: bool, accumulation: int, options: dict
) -> None:
    model, callback = build(), EntropyCallback()
    trainer = EntropyRegularizedTrainer(
        model=model,
        args=arguments(tmp_path, 16, **options),
        train_dataset=data(64, uneven),
        regularization=CALIBRATED,
        callbacks=[callback] if accumulation == 1 else [],
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script, result = tmp_path / "rank.py", tmp_path / "result.pt"
    batch = f"{8 // accumulation}, {accumulation}"
    text = RANKS.replace("UNEVEN", str(uneven)).replace("ACROSS", str(across))
    script.write_text(text.replace("BATCH", batch))
    here = str(Path(__file__).parent)
    command = [sys.executable, str(script), here, str(tmp_path), json.dumps(options), str(result)]
    base = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **base, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, env={**environment, "OMP_NUM_THREADS": "1"}))
    trainer.train()
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    found = torch.load(result)
    torch.testing.assert_close(found["weights"], weights(model), rtol=1e-4, atol=1e-6)
    assert found["penalty"] == pytest.approx(lines(trainer, "penalty"), rel=1e-4)
    assert found["loss"] == pytest.approx(lines(trainer, "loss"), rel=1e-4)
    for key in HEADS:
        assert found[key] == pytest.approx(lines(trainer, key), rel=1e-4), key
    if accumulation == 1:  # the callback hears the first micro-batch alone
        assert found["watched"] == pytest.approx(entropies(callback), rel=1e-4)


def test_callback_watches_without_changing_anything(tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [EntropyCallback()]):
        model = build("gpt2")
        args = arguments(tmp_path, 4, 2, logging_steps=2)
        trainer = Trainer(model=model, args=args, train_dataset=data(), callbacks=callbacks)
        trainer.train()
        found.append(weights(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    (callback,) = callbacks
    assert [step for step, _ in callback.history] == [2, 4]
    statistics = callback.history[0][1]
    assert len(statistics.entropy) == 2
    assert len(statistics.entropy[0]) == 4
    logged = lines(trainer, "entropy/mean")
    assert logged == [numbers.metrics()["entropy/mean"] for _, numbers in callback.history]
    assert model.config._attn_implementation == "sdpa"


def test_callback_has_a_compiled_model_compiled_a_few_times(tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, callback = build(), EntropyCallback()
        options = {"torch_compile": compiled, "max_steps": 8}
        if compiled:
            options["torch_compile_backend"] = "eager"
        args = arguments(tmp_path, **options)
        Trainer(model=model, args=args, train_dataset=data(64), callbacks=[callback]).train()
        found.append([numbers.metrics()["entropy/mean"] for _, numbers in callback.history])
        assert model.config._attn_implementation == "sdpa"
        parts = [*model.modules()]
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # not one a logged step


def test_callback_leaves_out_what_is_generated_within_a_step(tmp_path: Path) -> None:
    class Generating(Trainer):
        generates = True

        def compute_loss(self, model, inputs, *args, **options):
            if self.generates:
                with torch.no_grad():
                    model.generate(inputs["input_ids"], max_new_tokens=3)
            return super().compute_loss(model, inputs, *args, **options)

    found = []
    for generates in (True, False):
        args, callback = arguments(tmp_path), EntropyCallback()
        trainer = Generating(model=build(), args=args, train_dataset=data(), callbacks=[callback])
        trainer.generates = generates
        trainer.train()
        found.append(lines(trainer, "entropy/mean"))
    assert found[0] == found[1]


class Batching(Trainer):
    batches = True

    def training_step(self, model, inputs, *args, **options):
        if self.batches:  # looks at the attention before any pass, as GRPO of TRL can have it
            config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1)
            limits = ContinuousBatchingConfig(num_blocks=8, block_size=16, max_batch_tokens=32)
            model.generate_batch(
                inputs["input_ids"][:2, :3].tolist(),
                generation_config=config,
                continuous_batching_config=limits,
                progress_bar=False,
            )
        return super().training_step(model, inputs, *args, **options)


class RegularizedBatching(Batching, EntropyRegularizedTrainer):
    pass


@pytest.mark.parametrize("logging_steps", [1, 2])
@pytest.mark.parametrize("watches", [True, False])
def test_text_is_generated_in_continuous_batches_between_checkpointed_passes(
    tmp_path: Path, watches: bool, logging_steps: int
) -> None:
    found = []
    for batches in (True, False):
        options = {"gradient_checkpointing": True, "logging_steps": logging_steps}
        args = arguments(tmp_path, 4, 2, **options)
        if watches:
            trainer = Batching(
                model=build(), args=args, train_dataset=data(), callbacks=[EntropyCallback()]
            )
        else:
            trainer = RegularizedBatching(
                model=build(), args=args, train_dataset=data(), regularization=CALIBRATED
            )
        trainer.batches = batches
        trainer.train()
        assert trainer.model.config._attn_implementation == "sdpa"
        found.append([lines(trainer, "loss"), lines(trainer, "entropy/mean")])
    assert found[0] == found[1]
    assert len(found[0][1]) == 4 // logging_steps


def test_callback_says_once_that_no_pass_trains_the_model(tmp_path: Path, caplog) -> None:
    class Probing(Trainer):  # trains a part that reads what the model says
        def compute_loss(self, model, inputs, *args, **options):
            with torch.no_grad():
                said = model(inputs["input_ids"], output_hidden_states=True).hidden_states[-1]
            return model.lm_head(said).square().mean()

    callback = EntropyCallback()
    args = arguments(tmp_path)
    trainer = Probing(model=build(), args=args, train_dataset=data(), callbacks=[callback])
    trainer.train()
    assert callback.history == []
    assert len(lines(trainer, "loss")) > 1
    assert caplog.text.count("no pass of the model had a gradient in a step that is logged") == 1


class OutOfMemoryOnce(Trainer):
    failed = False

    def compute_loss(self, *args, **options):
        found = super().compute_loss(*args, **options)
        if not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory.")
        return found


def test_callback_hears_nothing_after_a_step_that_failed(tmp_path: Path) -> None:
    model, callback = build(), EntropyCallback()
    args = arguments(tmp_path, auto_find_batch_size=True)
    trainer = OutOfMemoryOnce(model=model, args=args, train_dataset=data(), callbacks=[callback])
    trainer.train()
    assert [step for step, _ in callback.history] == [1, 2, 3, 4]
    trainer.failed = False
    trainer.args.auto_find_batch_size = False
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_hooks


def test_a_second_training_begins_its_own_window(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=3, logging_steps=2, learning_rate=0.0)
    rows = {"train_dataset": data(8), "regularization": CALIBRATED}
    trainer = EntropyRegularizedTrainer(model=build(), args=args, **rows)
    trainer.train()
    first = lines(trainer, "penalty"), lines(trainer, "model_loss")
    trainer.train()
    assert lines(trainer, "penalty") == pytest.approx(first[0])
    assert lines(trainer, "model_loss") == pytest.approx(first[1])


def test_refusals(tmp_path: Path) -> None:
    common = {"args": arguments(tmp_path), "train_dataset": data()}
    with pytest.raises(
        ValueError, match="loss_coeff and regularization were given; set loss_coeff"
    ):
        EntropyRegularizedTrainer(
            model=build(), loss_coeff=1.0, regularization=CALIBRATED, **common
        )
    model = build()
    regularize(model)
    with pytest.raises(ValueError, match="the model is regularized already; leave the settings"):
        EntropyRegularizedTrainer(model=model, thresholds=HeadThresholds(2, 4), **common)
    before = build()
    optimizer = torch.optim.SGD(before.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="does not train the thresholds of the heads; call regu"):
        EntropyRegularizedTrainer(
            model=before, regularization=CALIBRATED, optimizers=(optimizer, None), **common
        )
    with pytest.raises(ValueError, match="tolerance_margin_factor is -1; pass a finite number"):
        EntropyRegularizedTrainer(model=build(), tolerance_margin_factor=-1, **common)
