"""What is typed wrong for an example gives one sentence."""

import runpy
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_regularization.data.text import Document
from entropy_regularization.data.tokenization import train_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


def refused(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    main = runpy.run_path(str(EXAMPLES / name))["main"]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer([Document("a", "to be or not to be")], 257)
    config = GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    for part in (tokenizer, GPT2LMHeadModel(config)):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_heads_of_a_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("to be")
    start = [f"--model={model}", f"--text={text}", f"--picture={tmp_path / 'heads.png'}"]
    for length in (0, 17):
        line = refused("watch_heads.py", [*start, f"--length={length}"], capsys)
        assert f"--length {length} is not between 1 and the 16 positions" in line
    text.write_text(" ")
    line = refused("watch_heads.py", [*start, "--length=16"], capsys)
    assert f"--text {text} is empty; pass a file with text in it." in line
    text.write_text("to be or not to be, " * 9)
    runpy.run_path(str(EXAMPLES / "watch_heads.py"))["main"]([*start, "--length=16"])
    assert (tmp_path / "heads.png").is_file()


def test_training_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused("train_with_penalty.py", [f"--output={tmp_path}"], capsys)
    assert f"--output {tmp_path} is there already; choose another one." in line


def test_picture_at_a_place_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (tmp_path / "nowhere" / "heads.png", tmp_path):
        arguments = ["--model=nowhere", f"--text={tmp_path}/none", f"--picture={place}"]
        line = refused("watch_heads.py", arguments, capsys)
        assert f"--picture {place} is no file in a folder that is there; pass another" in line


def test_training_on_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    for option, sentence in (
        ("--steps=0", "--steps 0 and --context-length 128: pass at least 1 step and 2 tokens"),
        ("--context-length=1", "--steps 100 and --context-length 1: pass at least 1 step"),
        (f"--data={tmp_path}", f"--data {tmp_path}: no file is found in the folder"),
    ):
        line = refused("train_with_penalty.py", [f"--output={output}", option], capsys)
        assert sentence in line
        assert not output.exists()
