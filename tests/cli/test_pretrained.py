"""entropy-reg train --model FOLDER: what others saved is trained as it is, or refused in a line."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CTRLConfig,
    CTRLLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from entropy_regularization.cli.evaluation import Evaluation
from entropy_regularization.cli.main import main
from entropy_regularization.data.text import Document
from entropy_regularization.data.tokenization import train_tokenizer
from entropy_regularization.monitoring.statistics import HeadStatistics

TEXT = "".join(f"line {n} of {n * n}\n" for n in range(400))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small GPT-2 and its tokenizer of 300."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = train_tokenizer([Document("text", TEXT)], 300)
    tokenizer.save_pretrained(folder)
    config = GPT2Config(vocab_size=300, n_positions=32, n_layer=2, n_embd=16, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(path: Path, **changed: Any) -> None:
    """Change a JSON file; None takes a key out."""
    content = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def train(model: Path, *more: str) -> tuple[int, str, str]:
    """Train for two steps in the folder beside a model."""
    text = model.parent / "words.txt"
    text.write_text(TEXT)
    done = CliRunner().invoke(
        main,
        ["train", f"--model={model}", f"--data={text}", f"--output={model.parent / 'run'}",
         "--steps=2", "--context-length=16", "--batch-size=2", "--evaluation-blocks=2", *more],
    )  # fmt: skip
    return done.exit_code, done.stdout, done.stderr


def refused(model: Path) -> str:
    """Return the sentence with which a model is refused before a run is begun."""
    code, _, errors = train(model)
    assert code == 1, errors
    (line,) = errors.splitlines()
    assert line.startswith(f"entropy-reg: --model {model}")
    assert not (model.parent / "run").exists()
    return line


@pytest.mark.parametrize("penalty", ["calibrated", "none"])
def test_tokenizer_without_a_padding_token(penalty: str, model: Path) -> None:
    change(model / "tokenizer_config.json", pad_token=None)
    code, _, errors = train(model, f"--penalty={penalty}")
    assert code == 0, errors


def test_contexts_begin_as_the_tokenizer_begins_a_text(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<b> $A <e>", special_tokens=[("<b>", 7), ("<e>", 8)]
    )
    tokenizer.save_pretrained(model)
    seen: list[torch.Tensor] = []
    forward = GPT2LMHeadModel.forward
    monkeypatch.setattr(
        GPT2LMHeadModel,
        "forward",
        lambda self, input_ids, **rest: (
            seen.append(input_ids) or forward(self, input_ids=input_ids, **rest)
        ),
    )
    code, _, errors = train(model)
    assert code == 0, errors
    contexts = torch.cat([ids for ids in seen if ids.shape[1] == 16])
    assert len(contexts) == 2 + 2 * 2 + 2  # evaluations, and two steps between them
    assert (contexts[:, 0] == 7).all()
    assert not (contexts[:, 1:] == 7).any()
    assert not (contexts == 8).any()


def test_labels_that_are_not_shifted(model: Path) -> None:
    config = BartConfig(
        vocab_size=300, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
        max_position_embeddings=32, is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    BartForCausalLM(config).save_pretrained(model)
    assert "BartForCausalLM does not shift its labels, so that it would learn" in refused(model)


def test_no_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "holds no tokenizer; put the files" in refused(model)


def test_tokenizer_that_cannot_be_loaded(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    line = refused(model)
    assert "holds no tokenizer that can be loaded (Couldn't instantiate the backend tok" in line
    assert "need to have sentencepiece or tiktoken installed" in line
    assert line.endswith("; put the files that save_pretrained of its tokenizer writes beside the "
                         "model.")  # fmt: skip


@pytest.mark.parametrize("content", ["{}", "[]", '{"added_tokens": [], "model": null}'])
def test_tokenizer_of_another_schema(content: str, model: Path) -> None:
    (model / "tokenizer.json").write_text(content)
    assert "holds no tokenizer that can be loaded (" in refused(model)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model_type": "mytype"}, "model type `mytype` but Transformers does not recognize this"),
        ({"model_type": "mytype"}, "with the command `pip install --upgrade transformers`."),
        ({"model_type": "t5"}, "AutoModelForCausalLM. Pass a causal language model."),
        ({"n_layer": "two"}, "Field 'n_layer' expected int, got str (value: 'two')."),
        ({"n_head": 3}, "must be divisible by num_heads"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "optimum"),
    ],
    ids=str,
)
def test_configuration_that_cannot_be_used(
    changed: dict[str, Any], sentence: str, model: Path
) -> None:
    change(model / "config.json", **changed)
    line = refused(model)
    assert "cannot be used: " in line
    assert sentence in line
    assert len(line) < 700


def test_model_without_attention(model: Path) -> None:
    config = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(model)
    assert "nothing in it was seen to attend" in refused(model)


def test_model_that_sees_what_it_is_to_predict(model: Path) -> None:
    config = BertConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    BertLMHeadModel(config).save_pretrained(model)
    assert "the tokens of BertLMHeadModel see those that they are to predict; pass a" in refused(
        model
    )
    change(model / "config.json", is_decoder=True)
    code, _, errors = train(model)
    assert code == 0, errors


def test_model_that_cannot_checkpoint(model: Path) -> None:
    config = CTRLConfig(vocab_size=300, n_positions=32, n_layer=1, n_embd=16, n_head=2, dff=16)
    CTRLLMHeadModel(config).save_pretrained(model)
    code, _, errors = train(model, "--gradient-checkpointing")
    assert code == 2
    sentence = "--gradient-checkpointing: CTRLLMHeadModel cannot do it; leave it out."
    assert errors == f"entropy-reg: {sentence}\n"
    assert not (model.parent / "run").exists()


@pytest.mark.parametrize("size", [100, 299])
def test_tokenizer_larger_than_the_model(size: int, model: Path) -> None:
    config = GPT2Config(vocab_size=size, n_positions=32, n_layer=2, n_embd=16, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(model)
    assert f"embeds the tokens 0 to {size - 1}, but its tokenizer gave 299;" in refused(model)


def test_weights_that_do_not_fit_the_configuration(model: Path) -> None:
    change(model / "config.json", n_embd=32)
    line = refused(model)
    assert "do not fit its config.json: transformer.h.0.attn.c_attn.bias is (48,) in pla" in line
    assert "is (48,) in place of (96,), transformer.h.0." in line
    assert " and 25 more; put back the two files that were saved together." in line


@pytest.mark.parametrize(
    ("removed", "changed", "sentence"),
    [
        (["transformer.wpe.weight"], {}, "config.json: transformer.wpe.weight; put back the two"),
        (["transformer.wte.weight"], {}, "transformer.wte.weight"),
        ([], {"n_layer": 3}, "transformer.h.2.attn.c_proj.bias and 9 more; put back the two"),
        ([], {"tie_word_embeddings": False}, "config.json: lm_head.weight; put back the two"),
    ],
    ids=str,
)
def test_missing_weights_are_not_made_up(
    removed: list[str], changed: dict[str, Any], sentence: str, model: Path
) -> None:
    weights = load_file(model / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if name not in removed}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    change(model / "config.json", **changed)
    line = refused(model)
    assert "lacks weights of its config.json: " in line
    assert sentence in line


def test_masks_that_old_files_of_gpt2_hold(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    code, said, errors = train(model)
    assert code == 0, errors
    assert "thresholds" not in said


@pytest.mark.parametrize("penalty", ["calibrated", "none"])
def test_thresholds_of_an_earlier_run_are_not_used_and_it_is_said(
    penalty: str, model: Path
) -> None:
    weights = load_file(model / "model.safetensors")
    weights["entropy_thresholds.fraction_bias"] = torch.full((2, 2), 0.9)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    code, said, errors = train(model, "--threshold=0.3", f"--penalty={penalty}")
    assert code == 0, errors
    sentence = f"the thresholds saved with {model} are not used: --threshold starts them at 0.3"
    assert said.splitlines().count(sentence) == (penalty != "none")


def test_weights_that_are_no_numbers(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["transformer.ln_f.bias"][3] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert "has weights that are infinite or NaN: transformer.ln_f.bias; pass" in refused(model)


def test_model_whose_loss_is_not_finite_before_training(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["transformer.ln_f.weight"].fill_(3e38)
    weights["transformer.wte.weight"].fill_(3e38)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    code, said, errors = train(model)
    assert code == 1
    assert "held-out perplexity before training: nan" in said
    (line,) = errors.splitlines()
    assert "the loss is nan at step 1, before any weight was changed; pass another --model" in line
    assert "--learning-rate" not in line


def test_positions_before_that_of_padding_are_not_used(model: Path) -> None:
    config = AutoConfig.for_model(
        "roberta",
        is_decoder=True,
        vocab_size=400,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=18,
        pad_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    code, _, errors = train(model, "--context-length=17")
    assert code == 2
    assert "is longer than the 16 positions of" in errors
    assert train(model)[0] == 0  # 16 tokens


def result_of(run: Path) -> Any:
    return json.loads((run / "result.json").read_text())["after"]


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral"])
def test_resumed_model_whose_weights_are_saved_under_other_names(family: str, model: Path) -> None:
    """The head of GPT-NeoX and the experts of Mixtral, of which Trainer finds none."""
    more = {"num_key_value_heads": 2, "num_local_experts": 2} if family == "mixtral" else {}
    config = AutoConfig.for_model(
        family,
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        **more,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    code, _, errors = train(model, "--steps=4", "--checkpoint-steps=2", "--learning-rate=0.01")
    assert code == 0, errors
    run = model.parent / "run"
    whole = result_of(run)
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    done = CliRunner().invoke(main, ["train", "--resume", f"--output={run}"])
    assert done.exit_code == 0, done.output
    assert "going on from step 2" in done.stdout
    assert result_of(run)["loss"] == pytest.approx(whole["loss"], rel=0, abs=1e-6)


def test_perplexity_of_a_loss_that_is_no_number() -> None:
    statistics = HeadStatistics([], [], [], [])
    losses = (math.nan, math.inf, 800.0, 0.0)
    found = [Evaluation(loss, 1, statistics, 0.0).perplexity for loss in losses]
    assert math.isnan(found[0])
    assert found[1:] == [math.inf, math.inf, 1.0]
