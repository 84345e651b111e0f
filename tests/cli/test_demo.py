"""entropy-reg demo: both arms, the table, the page; again without training again."""

import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from entropy_regularization.cli import demo as demo_module
from entropy_regularization.cli.main import main
from entropy_regularization.cli.options import TrainOptions
from entropy_regularization.cli.runs import RunFolder
from entropy_regularization.cli.signals import StopSignals


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
    page = (output / "report.html").read_text("utf-8")
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


@pytest.mark.usefixtures("small")
def test_run_with_other_options_is_no_arm(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    for folder, penalty in ((output, "published"), (output / "baseline", "calibrated")):
        options = {**demo_module.options_of("none", 4).as_dict(), "penalty": penalty}
        folder.mkdir(parents=True)
        RunFolder(folder).write_config("train", options, options, {})
        refused = CliRunner().invoke(main, ["demo", f"--output={output}", "--steps=4"])
        assert refused.exit_code == 2
        assert f"{folder} holds a run with --penalty {penalty} in place of" in refused.stderr
        assert "choose another --output" in refused.stderr
        (folder / "config.json").unlink()


@pytest.mark.usefixtures("small")
def test_other_steps_are_not_mixed(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    assert CliRunner().invoke(main, ["demo", f"--output={output}", "--steps=2"]).exit_code == 0
    refused = CliRunner().invoke(main, ["demo", f"--output={output}", "--steps=3"])
    assert refused.exit_code == 2
    assert "--steps 2 in place of 3" in refused.stderr


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("steps", "more"), [(4, " --steps 4"), (demo_module.STEPS, "")])
def test_advice_after_ctrl_c_goes_on_with_both_arms(
    steps: int, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def came_to_any(signals: StopSignals, device: object) -> bool:
        signals.number = signal.SIGINT
        return True

    monkeypatch.setattr(StopSignals, "came_to_any", came_to_any)
    output = tmp_path / "demo"
    stopped = CliRunner().invoke(main, ["demo", f"--output={output}", f"--steps={steps}"])
    assert stopped.exit_code == 130
    assert f"go on with: entropy-reg demo --output {output}{more}\n" in stopped.stderr
