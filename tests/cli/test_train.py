"""entropy-reg train: a run from start to end, stopped by signals and kills, and gone on with."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropy_regularization.integrations.transformers import load_thresholds
from entropy_regularization.monitoring.records import read_records
from entropy_regularization.monitoring.report import write_report
from entropy_regularization.monitoring.statistics import flatten

TINY = [
    "--model=gpt2-nano", "--width=16", "--vocabulary=300", "--context-length=32",
    "--batch-size=2", "--evaluation-blocks=4", "--logging-steps=2", "--checkpoint-steps=4",
    "--tolerance=0.1", "--dropout=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text: the source of a few standard modules, cut short."""
    folder = tmp_path_factory.mktemp("text")
    for module in (json, subprocess, signal, tempfile_module()):
        source = Path(str(module.__file__))
        (folder / f"{source.parent.name}-{source.name}").write_text(
            source.read_text("utf-8")[:12_000], "utf-8"
        )
    return folder


def tempfile_module():
    import tempfile

    return tempfile


def command(text: Path, output: Path, *more: str) -> list[str]:
    start = [sys.executable, "-m", "entropy_regularization", "train"]
    return [*start, f"--data={text}", f"--output={output}", *TINY, *more]


# Files are UTF-8 where the locale is not, as on Windows. (Operators of torch cannot be registered
# there from a path that the locale cannot write.)
FOREIGN = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
ENVIRONMENT = {**os.environ, **(FOREIGN if __file__.isascii() else {}), "OMP_NUM_THREADS": "1"}


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 16 steps that nothing interrupted."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = run(command(text, output, "--steps=16"))
    assert done.returncode == 0, done.stderr
    assert "step 16/16" in done.stdout
    assert "perplexity after training" in done.stdout
    return output


def test_folder_of_a_run(whole: Path) -> None:
    for name in ("config.json", "records.jsonl", "result.json", "heatmaps.png", "model"):
        assert (whole / name).exists(), name
    config = json.loads((whole / "config.json").read_text())
    assert config["options"]["width"] == 16
    assert config["options"]["loss_coeff"] is None
    assert config["in_effect"]["loss_coeff"] == 1.0
    assert "loss_coeff" in write_report(whole, output=whole.parent / "page.html").read_text("utf-8")
    assert config["versions"]["torch"] == metadata.version("torch")
    records = read_records(whole)
    assert [line.step for line in records.train] == [1, 2, 4, 6, 8, 10, 12, 14, 16]
    before, after = records.evaluation("before"), records.evaluation("after")
    assert before is not None
    assert after is not None
    assert after["perplexity"] < before["perplexity"]
    line = records.train[-1]
    assert line["penalty"] > 0
    assert line["tokens"] == 16 * 2 * 32
    assert len(line.statistics.entropy) == 2
    assert all(0 < value < 4 for row in line.statistics.entropy for value in row)


def test_model_and_tokenizer_load_again(whole: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    words = "def main():\n    return 0\n"
    ids = tokenizer(words, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == words
    result = json.loads((whole / "result.json").read_text())
    assert model(input_ids=ids, labels=ids).loss < result["before"]["loss"]
    thresholds = load_thresholds(whole / "model")
    last = read_records(whole).evaluation("after")
    assert last is not None
    expected = torch.tensor(last.statistics.threshold)
    torch.testing.assert_close(thresholds(), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, torch.full_like(expected, 0.5))  # they were learned


def losses(folder: Path) -> list[tuple[int, float, float, str | None]]:
    return [
        (line.step, line["loss"], line["penalty"] if line.when is None else 0.0, line.when)
        for line in read_records(folder).lines
    ]


def assert_same_curve(folder: Path, whole: Path, tolerance: float = 1e-6) -> None:
    for ours, theirs in zip(losses(folder), losses(whole), strict=True):
        assert (ours[0], ours[3]) == (theirs[0], theirs[3])
        assert abs(ours[1] - theirs[1]) <= tolerance
        assert abs(ours[2] - theirs[2]) <= tolerance


@pytest.mark.parametrize("until", [0, 8])
def test_killed_run_goes_on_to_the_same_result(
    until: int, text: Path, whole: Path, tmp_path: Path
) -> None:
    """Kill -9 before the first checkpoint, and in the middle."""
    output = tmp_path / "killed"
    with subprocess.Popen(
        command(text, output, "--steps=16"), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"step {until + 2}/"):
                os.kill(process.pid, signal.SIGKILL)
                break
    assert not (output / "result.json").exists()
    if until:
        torn = output / "checkpoints" / "checkpoint-12"  # a save that was cut off
        torn.mkdir(exist_ok=True)
        (torn / "complete").unlink(missing_ok=True)
    done = run(command(text, output, "--resume"))
    assert done.returncode == 0, done.stderr
    assert (f"going on from step {until}" in done.stdout) == (until > 0)
    assert_same_curve(output, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_leaves_a_checkpoint(
    number: signal.Signals, code: int, text: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "stopped"
    with subprocess.Popen(
        command(text, output, "--steps=16"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("step 6/"):
                os.kill(process.pid, number)
                break
        process.stdout.read()
        errors = process.stderr.read()
        assert process.wait(timeout=120) == code
    last = [line for line in errors.splitlines() if line.startswith("entropy-reg:")]
    assert len(last) == 1
    assert f"go on with: entropy-reg train --resume --output {output}" in last[0]

    done = run(command(text, output, "--resume"))
    assert done.returncode == 0, done.stderr
    assert_same_curve(output, whole)


# Weights that overflow float32 in one update, or scores that do after a few.
@pytest.mark.parametrize(
    ("decay", "every", "what"),
    [("1e40", 1, "a weight became"), ("1e6", 1, "the loss became"), ("1e6", 2, "the loss became")],
)
def test_training_that_diverges_stops_and_keeps_the_last_good_checkpoint(
    decay: str, every: int, what: str, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "diverged"
    done = run(command(text, output, "--steps=400", "--learning-rate=10", "--warmup=0.02",
                       f"--weight-decay={decay}", f"--checkpoint-steps={every}"))  # fmt: skip
    assert done.returncode == 1
    sentence = done.stderr.strip().splitlines()[-1]
    assert what in sentence
    assert "is kept in" in sentence
    whole = list((output / "checkpoints").glob("checkpoint-*/complete"))
    assert whole
    for marker in whole:
        model = AutoModelForCausalLM.from_pretrained(marker.parent)
        assert all(weight.isfinite().all() for weight in model.parameters())
    assert not (output / "result.json").exists()


def test_options_of_a_resumed_run_cannot_change(text: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "half"
    output.mkdir()
    (output / "config.json").write_text((whole / "config.json").read_text())
    done = run(command(text, output, "--resume", "--seed=5"))
    assert done.returncode == 2
    assert "--seed 5 was given, but the run in" in done.stderr
    # what was left out stands for a value: that one contradicts nothing, another is told of it
    done = run(command(text, output, "--resume", "--loss-coeff=1", "--seed=5"))
    assert "--seed 5 was given, but the run in" in done.stderr
    done = run(command(text, output, "--resume", "--loss-coeff=2"))
    assert "--loss-coeff 2.0 was given, but the run in" in done.stderr
    assert "was started with 1.0;" in done.stderr


def test_report_at_a_place_that_is_not_there(whole: Path) -> None:
    report = [sys.executable, "-m", "entropy_regularization", "report", str(whole)]
    done = run([*report, "--output=/nowhere/page.html"])
    assert done.returncode == 1
    assert "/nowhere/page.html: No such file or directory; pass a place" in done.stderr


def test_finished_run_is_never_overwritten(text: Path, whole: Path) -> None:
    kept = (whole / "records.jsonl").read_bytes()
    for more in ([], ["--resume"]):
        done = run(command(text, whole, *more))
        assert done.returncode == 2
        assert "holds a finished run" in done.stderr
        assert done.stderr.count("\n") == 1
    assert (whole / "records.jsonl").read_bytes() == kept


def test_pretrained_model_without_penalty(text: Path, whole: Path, tmp_path: Path) -> None:
    """Fine-tune from a local folder: its own tokenizer, no penalty, in bfloat16."""
    output = tmp_path / "tuned"
    start = [sys.executable, "-m", "entropy_regularization", "train"]
    done = run([*start, f"--data={text}", f"--output={output}", f"--model={whole / 'model'}",
                "--context-length=32", "--steps=3", "--batch-size=2", "--evaluation-blocks=2",
                "--penalty=none", "--precision=bfloat16", "--accumulation=2",
                "--gradient-checkpointing", "--evaluation-steps=1"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    records = read_records(output)
    assert all(line["penalty"] == 0 for line in records.train)
    assert [line.step for line in records.lines if line.when == "during"] == [1, 2]
    acting = json.loads((output / "config.json").read_text())["in_effect"]
    assert not {"loss_coeff", "dropout", "vocabulary"} & acting.keys()


def test_two_ranks_are_two_micro_batches(text: Path, tmp_path: Path) -> None:
    """A step over two processes of torchrun is that of two accumulated micro-batches."""
    options = ["--steps=6", "--dropout=0"]
    together, alone = command(text, tmp_path / "ranks", *options), tmp_path / "alone"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = run([*launch, *together[1:]])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished:") == 1
    assert run(command(text, alone, *options, "--accumulation=2")).returncode == 0
    assert_same_curve(tmp_path / "ranks", alone, 1e-5)
    found, wanted = read_records(tmp_path / "ranks").lines, read_records(alone).lines
    for ours, theirs in zip(found, wanted, strict=True):  # texts differ by some 3e-6 this early
        entropy = flatten(theirs.statistics.entropy)
        assert flatten(ours.statistics.entropy) == pytest.approx(entropy, rel=0, abs=5e-7)


def test_a_machine_that_fails_is_told_in_a_sentence(
    text: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "blocked"
    output.mkdir()
    (output / "config.json").write_text((whole / "config.json").read_text())
    (output / "checkpoints").write_text("a file where a folder must be")
    done = run(command(text, output, "--resume"))
    assert done.returncode == 1
    assert "go on with: entropy-reg train --resume" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_accumulated_micro_batches_are_one_step(text: Path, tmp_path: Path) -> None:
    """The rows of a step are the same however they are cut into micro-batches."""
    options = ["--steps=3", "--dropout=0", "--logging-steps=1", "--learning-rate=0.3", "--width=64"]
    found = []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        output = tmp_path / str(batch)
        sizes = [f"--batch-size={batch}", f"--accumulation={accumulation}"]
        done = run(command(text, output, *options, *sizes))
        assert done.returncode == 0, done.stderr
        found.append(read_records(output).train)
    for lines in found[1:]:
        for ours, theirs in zip(lines, found[0], strict=True):
            for key in ("entropy", "reachable_maximum", "utilisation"):
                torch.testing.assert_close(
                    torch.tensor(getattr(ours.statistics, key)),
                    torch.tensor(getattr(theirs.statistics, key)),
                    rtol=1e-5,
                    atol=1e-5,
                )


def test_tokens_are_those_of_the_text(text: Path, tmp_path: Path) -> None:
    """An epoch that the steps do not divide, and a step that is longer than an epoch."""
    for options in (["--epochs=2", "--batch-size=5", "--accumulation=3"], ["--accumulation=5000"]):
        output = tmp_path / options[0]
        steps = [] if len(options) > 1 else ["--steps=2"]
        done = run(command(text, output, *options, *steps))
        assert done.returncode == 0, done.stderr
        (contexts,) = re.findall(r"([\d,]+) contexts of 32 tokens", done.stdout)
        result = json.loads((output / "result.json").read_text())
        assert result["tokens"] == 2 * 32 * int(contexts.replace(",", ""))


def test_stopped_in_the_last_evaluation_takes_no_further_step(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    shutil.copytree(whole, output)
    (output / "result.json").unlink()
    shutil.rmtree(output / "model")
    done = run([sys.executable, "-m", "entropy_regularization", "train", "--resume",
                f"--output={output}"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("result.json", "records.jsonl", "model/model.safetensors"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name


def test_recorded_loss_is_the_model_s_own(text: Path, tmp_path: Path) -> None:
    """A penalty a million times larger leaves no digit of the loss in their sum."""
    for strength in ("0", "1e9"):
        done = run(command(text, tmp_path / strength, "--steps=1", f"--loss-coeff={strength}"))
        assert done.returncode == 0, done.stderr
    small, large = (read_records(tmp_path / each).train[0] for each in ("0", "1e9"))
    assert large["penalty"] > 1e6
    assert large["loss"] == small["loss"]
