"""The examples run and do what they say."""

import importlib.util
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    tested = set(re.findall(r'load\("(\w+)"\)', Path(__file__).read_text()))
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_train_with_penalty_leaves_records_and_a_page(tmp_path, capsys):
    from entropy_regularization.monitoring.records import read_records

    text = tmp_path / "text.py"
    text.write_text("".join(f"def f{k}(x):\n    return x + {k}\n\n" for k in range(600)))
    run = tmp_path / "run"
    load("train_with_penalty").main(
        ["--output", str(run), "--data", str(text), "--steps", "12", "--context-length", "32"]
    )
    lines = read_records(run).train
    assert [line.step for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["penalty"] < lines[0]["penalty"]
    assert lines[-1].statistics.threshold != lines[0].statistics.threshold  # they are learned
    assert str(run / "report.html") in capsys.readouterr().out
    assert (run / "report.html").is_file()


def test_watch_heads_prints_every_layer(tmp_path, capsys):
    from transformers import GPT2Config, GPT2Model

    from entropy_regularization.data.text import Document
    from entropy_regularization.data.tokenization import train_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("every head has an entropy " * 20)
    tokenizer = train_tokenizer([Document("text", text.read_text())], 300)
    tokenizer.save_pretrained(tmp_path / "model")
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    GPT2Model(config).save_pretrained(tmp_path / "model")
    picture = tmp_path / "heads.png"
    arguments = ["--model", tmp_path / "model", "--text", text, "--picture", picture]
    load("watch_heads").main([*map(str, arguments), "--length", "32"])
    out = capsys.readouterr().out
    assert re.search(r"^h\.0\.attn +\d+% +\d+%$", out, re.MULTILINE)
    assert re.search(r"^h\.1\.attn +\d+% +\d+%$", out, re.MULTILINE)
    assert "overloaded=4" in out  # at random initialisation a head attends almost evenly
    assert picture.stat().st_size > 1000
    text.write_bytes(b"\xff\xfe every head")
    for unreadable in (text, tmp_path / "missing.txt"):
        with pytest.raises(SystemExit, match="2"):
            load("watch_heads").main([*map(str, arguments[:3]), str(unreadable), "--length", "32"])
        assert f"--text {unreadable} cannot be read (" in capsys.readouterr().err


def test_own_attention_keeps_its_heads_from_collapsing():
    train = load("own_attention").train
    (loss, share), (_, held) = train(0.0, 60), train(5.0, 60)
    assert loss < 2.0
    assert held > share
