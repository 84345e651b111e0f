"""What entropy-reg train says about its text."""

from pathlib import Path

from click.testing import CliRunner, Result

from entropy_regularization.cli.main import main

NANO = (
    "--model=gpt2-nano", "--width=16", "--vocabulary=300", "--context-length=16", "--batch-size=2",
    "--evaluation-blocks=4", "--steps=2", "--checkpoint-steps=1",
)  # fmt: skip


def train(data: Path, output: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["train", f"--data={data}", f"--output={output}", *NANO, *more])


def test_files_that_are_left_out(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("to be or not to be, " * 90)
    done = train(tmp_path / "*.txt", tmp_path / "all")
    assert done.exit_code == 0, done.output
    assert "left out" not in done.stdout
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    done = train(tmp_path / "*.txt", tmp_path / "some")
    assert done.exit_code == 0, done.output
    assert "left out 1 of 5 files, which are not UTF-8 text\n" in done.stdout
