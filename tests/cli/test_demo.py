"""entropy-reg demo: both arms, the table, the page; again without training again."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from entropy_regularization.cli import demo as demo_module
from entropy_regularization.cli.main import main
from entropy_regularization.cli.options import TrainOptions


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("".join(f"line {n} of {n * n}\n" for n in range(4000)))

    def options_of(penalty: str, steps: int) -> TrainOptions:
        return TrainOptions(
            penalty=penalty, steps=steps, model="gpt2-nano", width=16, vocabulary=300,
            context_length=32, batch_size=2, evaluation_blocks=4, data=str(words),
        )  # fmt: skip

    monkeypatch.setattr(demo_module, "options_of", options_of)


@pytest.mark.usefixtures("small")
def test_both_arms_side_by_side_and_nothing_twice(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    first = CliRunner().invoke(main, ["demo", f"--output={output}", "--steps=4"])
    assert first.exit_code == 0, first.output
    for words in ("held-out perplexity", "without penalty", "with penalty", "(tokens/s)", "(nats)"):
        assert words in first.stdout
    page = (output / "report.html").read_text()
    assert "without penalty" in page
    assert (output / "baseline" / "result.json").is_file()
    kept = (output / "records.jsonl").read_bytes()
    again = CliRunner().invoke(main, ["demo", f"--output={output}", "--steps=4"])
    assert again.exit_code == 0
    assert "finished before" in again.stdout
    assert "held-out perplexity" in again.stdout
    assert (output / "records.jsonl").read_bytes() == kept


def test_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused = CliRunner().invoke(main, ["demo", f"--output={tmp_path}", "--steps=1"])
    assert refused.exit_code == 2
    assert "holds no run" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
