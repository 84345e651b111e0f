"""The trainers of TRL, which make losses of their own, mixed with EntropyRegularizedTrainer."""

from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entropy_regularization import EntropyRegularization, record_entropy
from entropy_regularization.integrations.transformers import EntropyRegularizedTrainer, regularize

trl = pytest.importorskip("trl", reason="in the dev extra, not in the tests extra")

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(29))]
SETTINGS = EntropyRegularization.calibrated(0.5, 0.02, thresholds=0.2)
COMMON = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.0,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "disable_tqdm": True,
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>")
    core = Tokenizer(words)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(WORDS[:3])
    special = dict(zip(("pad_token", "eos_token", "unk_token"), WORDS, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def text(start: int, length: int) -> str:
    return " ".join(f"w{(7 * start + place * place) % 29}" for place in range(length))


def trainer_of(kind: str, folder: Path, checkpointing: bool, **extra: Any) -> Any:
    """Return a trainer, mixed with EntropyRegularizedTrainer if it is given a regularization."""
    rows: list[dict[str, str]] = [{"prompt": text(i, 3 + i % 4)} for i in range(8)]
    if kind == "SFT":
        rows = [{"text": text(i, 6 + i % 5)} for i in range(8)]
    elif kind == "DPO":  # the reference model is the same without its adapter
        for i, row in enumerate(rows):
            row |= {"chosen": f" {text(i + 1, 4)}", "rejected": f" {text(i + 2, 3 + i % 3)}"}
        extra["peft_config"] = peft.LoraConfig(
            target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
    options = {**COMMON, "gradient_checkpointing": checkpointing}
    if kind == "GRPO":  # generates within the step
        options |= {"num_generations": 2, "max_completion_length": 5, "beta": 0.0}
        extra["reward_funcs"] = lambda completions, **_: [len(set(c.split())) for c in completions]
    made = getattr(trl, f"{kind}Trainer")
    if "regularization" in extra:
        made = type("Mixed", (EntropyRegularizedTrainer, made), {})
    return made(
        model=build(),
        args=getattr(trl, f"{kind}Config")(output_dir=str(folder), **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        **extra,
    )


def logged(trainer: Any) -> dict[str, float]:
    torch.manual_seed(1)
    trainer.train()
    line: dict[str, float] = trainer.state.log_history[0]
    return line


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_mixed_trainers_add_the_penalty(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    plain = logged(trainer_of(kind, tmp_path, checkpointing))
    mixed = trainer_of(kind, tmp_path, checkpointing, regularization=SETTINGS)
    found = logged(mixed)
    assert found["penalty"] > 0.02
    assert found["model_loss"] == pytest.approx(plain["loss"], abs=1e-5)
    assert found["loss"] == pytest.approx(plain["loss"] + found["penalty"], abs=1e-5)
    assert found["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)


def test_the_penalty_is_that_of_the_batches(tmp_path: Path) -> None:
    trainer = trainer_of("SFT", tmp_path, False, regularization=SETTINGS)
    compute_loss, batches, expected = trainer.compute_loss, [], []

    def listening(model: Any, inputs: dict[str, torch.Tensor], *args: Any, **options: Any) -> Any:
        batches.append(dict(inputs))
        return compute_loss(model, inputs, *args, **options)

    trainer.compute_loss = listening
    found = logged(trainer)["penalty"]
    assert len(batches) == 2
    for batch in batches:
        model = build().train()
        with record_entropy(model) as recording:
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
        expected.append(SETTINGS(recording).item())
    assert found == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_regularize_alone_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of("SFT", tmp_path, False)
    regularize(trainer.model, SETTINGS)
    message = r"mix the trainer: class MyTrainer\(EntropyRegularizedTrainer, SFTTrainer\)"
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_copied_reference_model_needs_fixed_thresholds(tmp_path: Path) -> None:
    """TRL goes over the parameters of both models, of which there would not be as many."""
    words = {"prompt": text(0, 3), "chosen": text(1, 4), "rejected": text(2, 5)}
    options = {**COMMON, "sync_ref_model": True, "ref_model_sync_steps": 1}
    mixed = type("Mixed", (EntropyRegularizedTrainer, trl.DPOTrainer), {})

    def train(thresholds: object) -> Any:
        trainer = mixed(
            model=build(),
            ref_model=build(),
            args=trl.DPOConfig(output_dir=str(tmp_path), **options),
            train_dataset=datasets.Dataset.from_list([words] * 8),
            processing_class=tokenizer(),
            regularization=EntropyRegularization.calibrated(0.5, 0.02),
            thresholds=thresholds,
        )
        return logged(trainer)

    assert train(0.2)["penalty"] > 0.02
    with pytest.raises(ValueError, match="sync_ref_model=True copies all parameters of the model"):
        train(None)
