"""entropy-reg analyse: its numbers are those of the matrices, and what it cannot read it says."""

import contextlib
import errno
import inspect
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from entropy_regularization import record_entropy
from entropy_regularization.cli.evaluation import read_through
from entropy_regularization.cli.main import main
from entropy_regularization.data.text import Document
from entropy_regularization.data.tokenization import TokenBlocks, train_tokenizer
from entropy_regularization.recording.recording import EntropyRecording

TEXT = "".join(f"line {n} of {n * n}\n" for n in range(400))
VOCABULARY = 300
SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.3,
    **SPECIAL,
}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=2, **SPECIAL)
    ),
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(
            vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2, rotary_dim=8,
            **SPECIAL,
        )
    ),
    "body": lambda: GPT2Model(
        GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=1, n_head=2, **SPECIAL)
    ),
    "narrow": lambda: LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": 100})),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            num_key_value_heads=2, num_local_experts=4, output_router_logits=True,
            router_aux_loss_coef=1.0, **SMALL,
        )
    ),
    "bart": lambda: BartForCausalLM(
        BartConfig(
            vocab_size=VOCABULARY, d_model=32, decoder_layers=2, decoder_attention_heads=4,
            decoder_ffn_dim=32, max_position_embeddings=64, init_std=0.3, is_decoder=True,
            is_encoder_decoder=False,
        )
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "both ways": lambda: BertLMHeadModel(BertConfig(**SMALL)),  # is_decoder is false
    "roberta": lambda: RobertaForMaskedLM(
        RobertaConfig(**SMALL | {"max_position_embeddings": 66, "pad_token_id": 1})
    ),
    "classifier": lambda: Qwen2ForSequenceClassification(
        Qwen2Config(num_key_value_heads=2, **SMALL | {"pad_token_id": None})
    ),
    "choice": lambda: BertForMultipleChoice(BertConfig(**SMALL)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    ),
    "vit": lambda: ViTModel(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            image_size=8, patch_size=4,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small models, each with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([Document("text", TEXT)], VOCABULARY)
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT)
    return folder


def call(models: Path, *names: str, more: tuple[str, ...] = ()) -> Result:
    given = [f"--model={models / name}" for name in names]
    return CliRunner().invoke(main, ["analyse", *given, f"--data={models / 'text.txt'}", *more])


def analyse(models: Path, output: Path, *names: str, more: tuple[str, ...] = ()) -> list[Any]:
    """Return what is written of models."""
    done = call(models, *names, more=(f"--output={output}", "--contexts=3", *more))
    assert done.exit_code == 0, done.output
    content = json.loads((output / "analysis.json").read_text())
    assert content["version"] == 1
    found: list[Any] = content["models"]
    assert [each["model"] for each in found] == [str(models / name) for name in names]
    return found


def blocks_of(length: int) -> torch.Tensor:
    tokenizer = train_tokenizer([Document("text", TEXT)], VOCABULARY)
    return TokenBlocks(tokenizer, [Document("text", TEXT)], length, 3).blocks


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_numbers_are_those_of_the_attention_matrices(
    name: str, batch: int, models: Path, tmp_path: Path
) -> None:
    more = ("--context-length=40", f"--batch-size={batch}")
    (found,) = analyse(models, tmp_path / "out", name, more=more)
    ids = blocks_of(40)
    model = AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="eager")
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids, labels=ids, output_attentions=True, use_cache=False)
    assert found["perplexity"] == pytest.approx(wanted.loss.exp().item(), rel=1e-5)
    assert found["contexts"] == 3
    assert found["parameters"] == model.num_parameters()
    assert found["class"] == type(model).__name__
    keys = torch.arange(1, 41).double()
    assert found["keys"] == [1, 2, 4, 8, 16, 32]
    for layer, matrix in enumerate(wanted.attentions):
        rows = torch.special.entr(matrix.double()).sum(-1).transpose(0, 1)  # [heads, batch, rows]
        by_key = {key: torch.tensor(found[key][layer]) for key in ("entropy", "deviation")}
        torch.testing.assert_close(by_key["entropy"], rows.mean((1, 2)).float(), rtol=1e-5, atol=0)
        spread = rows.flatten(1).std(1, correction=0).float()
        torch.testing.assert_close(by_key["deviation"], spread, rtol=1e-5, atol=0)
        for head, entropy in enumerate(rows):
            several = entropy[:, 1:].flatten()
            slope = np.polyfit(keys[1:].log().repeat(len(ids)), several, 1)[0]
            assert found["growth"][layer][head] == pytest.approx(slope, rel=1e-4, abs=1e-6)
            means = [entropy[:, k - 1 : 2 * k - 1].mean().item() for k in found["keys"]]
            assert found["entropy_by_keys"][layer][head] == pytest.approx(means, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["mixtral", "bart"])
def test_perplexity_is_of_the_next_tokens_whatever_the_loss_of_a_model_holds(
    name: str, models: Path, tmp_path: Path
) -> None:
    (found,) = analyse(models, tmp_path / "out", name, more=("--context-length=40",))
    ids = blocks_of(40)
    model = AutoModelForCausalLM.from_pretrained(models / name).eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found["perplexity"] == pytest.approx(wanted.exp().item(), rel=1e-5)


def test_numbers_are_those_that_training_ended_with(models: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = CliRunner().invoke(
        main,
        ["train", "--model=gpt2-nano", "--vocabulary=300", "--context-length=32", "--batch-size=4",
         "--steps=3", "--evaluation-blocks=5", f"--data={models / 'text.txt'}", f"--output={run}"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    wanted = json.loads((run / "result.json").read_text())["after"]
    more = ("--held-out", "--contexts=5", "--batch-size=4", f"--data={models / 'text.txt'}")
    (found,) = analyse(run, tmp_path / "out", "model", more=more)
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-6)
    assert np.mean(found["entropy"]) == pytest.approx(wanted["mean_entropy"], rel=1e-6)
    assert np.mean(found["utilisation"]) == pytest.approx(wanted["utilisation"], rel=1e-6)
    assert found["overloaded"] == wanted["overloaded"]


@pytest.mark.parametrize("kind", [BertForMaskedLM, LlamaForCausalLM])
def test_an_encoder_reads_all_that_its_tokenizer_writes_and_a_decoder_what_begins_a_text(
    kind: type[PreTrainedModel], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer([Document("text", TEXT)], VOCABULARY)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<c> $A <s>", special_tokens=[("<c>", 7), ("<s>", 8)]
    )
    seen: list[torch.Tensor] = []
    forward = kind.forward

    def listening(self: Any, input_ids: torch.Tensor, **rest: Any) -> Any:
        seen.append(input_ids)
        return forward(self, input_ids=input_ids, **rest)

    listening.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    encodes = kind is BertForMaskedLM
    MODELS["bert" if encodes else "llama"]().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(kind, "forward", listening)
    more = (f"--data={models / 'text.txt'}",)
    (found,) = analyse(tmp_path, tmp_path / "out", "model", more=more)
    assert found["keys"][-1] == 64  # what its positions allow
    contexts = torch.cat([ids for ids in seen if ids.shape[1] > 2])
    assert contexts.shape == (3, 64)
    assert (contexts[:, 0] == 7).all()
    assert (contexts[:, -1] == 8).all() == encodes
    page = (tmp_path / "out" / "report.html").read_text()
    if encodes:
        assert found["perplexity"] is None
        assert found["growth"] == [[None] * 4] * 2  # all rows see all keys
    assert ("Entropy and length" not in page) == encodes
    assert ("<h3>perplexity" not in page) == encodes


def test_positions_that_padding_takes_are_not_counted(models: Path, tmp_path: Path) -> None:
    (found,) = analyse(models, tmp_path / "out", "roberta")
    assert found["keys"][-1] == 64
    done = call(models, "roberta", more=("--context-length=65",))
    assert done.exit_code == 2
    assert "--context-length 65 is longer than the 64 positions of" in done.stderr


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_read_on_the_model_that_they_are_for(
    dora: bool, models: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(models / "llama")
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, use_dora=dora))
    for name, weight in adapted.named_parameters():
        if "magnitude" in name:
            weight.data *= 1.5
    adapted.save_pretrained(tmp_path / "adapters")
    merged = tmp_path / "merged"
    adapted.merge_and_unload().save_pretrained(merged)
    train_tokenizer([Document("text", TEXT)], VOCABULARY).save_pretrained(merged)
    more = (f"--data={models / 'text.txt'}",)
    one, other = analyse(tmp_path, tmp_path / "out", "adapters", "merged", more=more)
    (without,) = analyse(models, tmp_path / "without", "llama")
    assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
    torch.testing.assert_close(*map(torch.tensor, (one["entropy"], other["entropy"])))
    assert one["layers"] == other["layers"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{tmp_path.name}/merged minus {tmp_path.name}/adapters</h3>" in page
    assert one["perplexity"] != pytest.approx(without["perplexity"], rel=1e-3)


def test_adapters_that_cannot_be_read_are_one_sentence(models: Path, tmp_path: Path) -> None:
    def told(name: str) -> str:
        done = call(tmp_path, name, more=(f"--data={models / 'text.txt'}",))
        assert done.exit_code == 1
        (line,) = done.stderr.splitlines()
        return line

    base = AutoModelForCausalLM.from_pretrained(models / "llama")
    get_peft_model(base, LoraConfig(r=2)).save_pretrained(tmp_path / "lora")
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, tmp_path / "lora" / "adapter_model.safetensors")
    assert "lora lacks weights of its adapter_config.json; put back the two files" in told("lora")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    assert "lora holds no adapter_model.safetensors; put back what" in told("lora")
    config = tmp_path / "lora" / "adapter_config.json"
    content = json.loads(config.read_text()) | {"base_model_name_or_path": None}
    config.write_text(json.dumps(content))
    assert "lora holds adapters that do not say which model they are for" in told("lora")

    base = AutoModelForCausalLM.from_pretrained(models / "llama")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, prompt).save_pretrained(tmp_path / "prompt")
    assert "prompt was trained by PROMPT_TUNING, which adds keys that are no text" in told("prompt")


@pytest.mark.parametrize(
    ("change", "code"),
    [({"architectures": ["pipeline"]}, 0), ({"dtype": "float8"}, 1), (None, 1)],
)
def test_a_config_that_says_something_odd(
    change: dict[str, Any] | None, code: int, models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "llama", tmp_path / "odd")
    config = tmp_path / "odd" / "config.json"
    content = None if change is None else json.loads(config.read_text()) | change
    config.write_text(json.dumps(content))
    done = call(tmp_path, "odd", more=(f"--data={models / 'text.txt'}", "--contexts=2"))
    assert done.exit_code == code, done.output
    assert ("odd cannot be used: " in done.stderr) == bool(code)


def test_without_perplexity_one_position_has_logits(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wanted,) = analyse(models, tmp_path / "with", "llama")
    lengths: list[int] = []
    head = torch.nn.Linear.forward

    def listening(self: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        if self.out_features == VOCABULARY:
            lengths.append(hidden.shape[1])
        return head(self, hidden)

    monkeypatch.setattr(torch.nn.Linear, "forward", listening)
    (found,) = analyse(models, tmp_path / "without", "llama", more=("--no-perplexity",))
    assert lengths[2:] == [1, 1, 1]
    assert found["perplexity"] is None
    assert found["entropy"] == wanted["entropy"]


def test_weights_are_as_they_were_saved_or_as_asked_for(models: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(models / "llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    train_tokenizer([Document("text", TEXT)], VOCABULARY).save_pretrained(tmp_path / "half")
    more = (f"--data={models / 'text.txt'}",)
    (half,) = analyse(tmp_path, tmp_path / "a", "half", more=more)
    (whole,) = analyse(tmp_path, tmp_path / "b", "half", more=(*more, "--dtype=float32"))
    assert half["entropy"] != whole["entropy"]
    torch.testing.assert_close(
        *(torch.tensor(each["entropy"]) for each in (half, whole)), rtol=0.02, atol=0.02
    )


def test_models_side_by_side_on_one_page(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call(models, "llama", "gpt2", more=(f"--output={out}", "--contexts=2"))
    assert done.exit_code == 0, done.output
    assert f"{models.name}/llama" in done.stdout
    assert "mean entropy [nats]" in done.stdout  # no markup of rich
    assert "64 to 127 keys" in done.stdout
    page = (out / "report.html").read_text()
    assert page.count("growth with log n</figcaption>") == 2
    assert "minus" not in page  # they have other heads
    assert f"<figcaption>{models.name}/llama [nats]</figcaption>" in page
    assert (out / "heatmaps.png").stat().st_size > 1000
    again = call(models, "llama", more=(f"--output={out}", "--contexts=2"))  # in its place
    assert again.exit_code == 0, again.output
    assert len(json.loads((out / "analysis.json").read_text())["models"]) == 1
    told = CliRunner().invoke(main, ["report", str(out)])
    assert told.exit_code == 2
    assert f"{out} holds an analysis, whose page is {out / 'report.html'}." in told.stderr


def test_what_was_found_before_a_failure_is_there(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    analyse(models, out, "gpt2")  # whose page must not stay beside other numbers
    more = (f"--output={out}", "--contexts=2", "--context-length=64")
    done = call(models, "llama", "gptj", more=more)
    assert done.exit_code == 2
    assert "--context-length 64 is longer than the 32 positions of" in done.stderr
    assert "growth with log n" in done.stdout
    (found,) = json.loads((out / "analysis.json").read_text())["models"]
    assert found["model"] == str(models / "llama")
    assert [each.name for each in out.iterdir()] == ["analysis.json"]


@pytest.mark.parametrize(
    ("large", "first"),
    [("layers.0.mlp", "model.layers.1.self_attn"), ("layers.1.mlp", "its logits")],
)
def test_numbers_that_overflow_are_told(
    large: str, first: str, models: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]()
    for name, weight in model.named_parameters():
        if large in name:
            weight.data *= 1e4
    model.half().save_pretrained(tmp_path / "large")
    train_tokenizer([Document("text", TEXT)], VOCABULARY).save_pretrained(tmp_path / "large")
    more = (f"--data={models / 'text.txt'}", "--contexts=2")
    done = call(tmp_path, "large", more=more)
    assert done.exit_code == 1
    assert f"gives NaN in float16, first in {first}; pass --dtype float32." in done.stderr
    assert "means over all heads" not in done.stdout
    assert call(tmp_path, "large", more=(*more, "--dtype=float32")).exit_code == 0


@pytest.mark.parametrize(("times", "code"), [(1, 0), (2, 1)])
def test_a_part_that_only_longer_texts_have_is_heard_again(
    times: int, code: int, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as record_entropy refuses the compressor of DeepSeek V4, which two tokens do not reach
    refusals = iter(range(times))

    @contextlib.contextmanager
    def record(*given: Any, **options: Any) -> Iterator[EntropyRecording]:
        with record_entropy(*given, **options) as recording:
            yield recording
        if next(refusals, None) is not None:
            raise ValueError("a part of its attention cannot be recorded")

    monkeypatch.setattr("entropy_regularization.cli.evaluation.record_entropy", record)
    done = call(models, "llama", more=("--contexts=2",))
    assert done.exit_code == code, done.output
    assert ("a part of its attention cannot be recorded" in done.stderr) == bool(code)


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_read(
    models: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    place = tmp_path / "mine.txt" / "out"
    done = call(models, "llama", more=(f"--output={place}", "--contexts=2"))
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert f"--output {place} cannot be written to (Not a directory); make room or access" in line
    assert done.stdout == ""


def test_a_full_disk_is_told_and_the_numbers_stay(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("entropy_regularization.cli.analysis.save_heatmaps", full)
    out = tmp_path / "out"
    done = call(models, "llama", more=(f"--output={out}", "--contexts=2"))
    assert done.exit_code == 1
    assert f"--output {out} cannot be written to (No space left on device);" in done.stderr
    assert "growth with log n" in done.stdout
    (found,) = json.loads((out / "analysis.json").read_text())["models"]
    assert found["model"] == str(models / "llama")
    assert [each.name for each in out.iterdir()] == ["analysis.json"]


def test_the_same_command_goes_on_after_an_interruption_while_writing(
    models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "analysis.json.new").write_text("{")
    done = call(models, "llama", more=(f"--output={out}", "--contexts=2"))
    assert done.exit_code == 0, done.output
    assert not (out / "analysis.json.new").exists()


def test_rotary_positions_have_no_end(models: Path, tmp_path: Path) -> None:
    more = ("--context-length=128", "--contexts=2")
    (found,) = analyse(models, tmp_path / "out", "llama", more=more)
    assert found["keys"][-1] == 128
    done = call(models, "llama", more=more)
    assert "llama was made for contexts of at most 64 tokens" in done.stdout


@pytest.mark.parametrize("name", ["classifier", "body", "both ways"])
def test_what_predicts_no_token_has_no_perplexity(name: str, models: Path, tmp_path: Path) -> None:
    (found,) = analyse(models, tmp_path / "out", name)
    assert found["perplexity"] is None
    if name == "both ways":
        assert found["growth"] == [[None] * 4] * 2
        return
    assert not any(math.isnan(x) for x in np.ravel(found["growth"]))


@pytest.mark.parametrize(
    ("names", "more", "code", "sentence"),
    [
        (["t5"], (), 1, "t5 takes two texts, not a text; measure it with record_entropy"),
        (["vit"], (), 1, "vit takes pixel_values, not a text; measure it with record_entropy"),
        (["choice"], (), 1, "BertForMultipleChoice does not run on a text alone (RuntimeError: "),
        (["llama", "vit"], (), 1, "vit takes pixel_values, not a text"),
        (["llama", "llama"], (), 2, "--model names one model twice; name it once."),
        (["."], (), 2, "is a folder without a config.json; pass one that save_pretrained wrote."),
        (["gpt2"], ("--context-length=65",), 2, "/gpt2; pass at most 64."),
        (["narrow"], (), 1, "embeds the tokens 0 to 99, but its tokenizer gave"),
        (
            ["llama"],
            ("--context-length=99999", "--output=OUT/new"),
            2,
            "fewer than one context of 99999",
        ),
        (["llama"], ("--device=tpu9",), 2, "--device tpu9 is not there; pass cpu,"),
        (["llama"], ("--data= ",), 2, "--data is empty; pass a file, a folder, a glob"),
        (
            ["llama"],
            ("--data=nowhere", "--output=OUT/new"),
            2,
            "nowhere is no file, folder or glob that matches",
        ),
        (["llama"], ("--output=OUT",), 2, "holds something else (mine.txt); pass a folder of its"),
        (["llama"], ("--output=OUT/mine.txt",), 2, "mine.txt is a file; pass a folder."),
        (["llama"], ("--batch-size=9999999999",), 2, "Add --no-perplexity, or pass a smaller"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(
    names: list[str], more: tuple[str, ...], code: int, sentence: str, models: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = call(models, *names, more=tuple(each.replace("OUT", str(tmp_path)) for each in more))
    assert done.exit_code == code, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("entropy-reg: ")
    assert sentence in line
    assert "means over all heads" not in done.stdout
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["", "gpt2-tiny", "gpt2-tiney"])
def test_names_that_are_no_model(name: str) -> None:
    done = CliRunner().invoke(main, ["analyse", f"--model={name}"])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("entropy-reg: --model ")


def test_a_model_is_read_as_it_is_used_and_then_is_as_it_was() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=99, **SPECIAL))
    model.train()  # with dropout
    ids = torch.arange(40).view(2, 20)
    one, other = ([loss for _, loss, _ in read_through(model, ids, 1, predicts=True)] for _ in "ab")
    assert one == other
    assert model.training
    assert all(part.training for part in model.modules())
