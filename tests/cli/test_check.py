"""entropy-reg check: what is right passes, and what is not is named."""

from typing import Any

import pytest
from click.testing import CliRunner, Result

from entropy_regularization.attention import api
from entropy_regularization.cli.main import main
from entropy_regularization.regularization import EntropyRegularization


def check() -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["check"])


def test_everything_agrees() -> None:
    done = check()
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("all agree\n")
    assert done.stdout.count("12 of 12 agree") == 3  # blockwise, in three precisions
    built = api.unbuilt_reason() is None
    assert done.stdout.count("9 of 9 agree") == (3 if built else 0)
    assert "torch 2." in done.stdout


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda entropy: entropy * 1.001, ["float32", "bfloat16", "float16"]),
        (lambda entropy: entropy.detach() + 1.01 * (entropy - entropy.detach()), ["float32"]),
    ],
    ids=["value", "gradient"],
)
def test_what_is_wrong_is_named(
    wrong: Any, named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = api._IMPLEMENTATIONS["blockwise"]

    def broken(*args: Any, **options: Any) -> Any:
        output, entropy, *rest = right(*args, **options)
        return output, wrong(entropy), *rest

    monkeypatch.setitem(api._IMPLEMENTATIONS, "blockwise", broken)
    done = check()
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    for precision in ("float32", "bfloat16", "float16"):
        told = f"blockwise in {precision} on cpu (every key)" in line
        assert told == (precision in named)
    assert "compiled in" not in line
    assert "all agree" not in done.stdout


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_a_recording_that_is_wrong_is_named(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, loss = EntropyRegularization.compute_entropy, EntropyRegularization.compute_loss

    def steeper(*args: Any, **options: Any) -> Any:
        found = loss(*args, **options)
        return found.detach() + 1.01 * (found - found.detach())

    if wrong == "value":
        changed = staticmethod(lambda matrix: rows(matrix) + 0.001)
        monkeypatch.setattr(EntropyRegularization, "compute_entropy", changed)
    else:
        monkeypatch.setattr(EntropyRegularization, "compute_loss", steeper)
    done = check()
    assert done.exit_code == 1
    assert "these differ by more than rounding: the recorded GPT-2 on cpu; use" in done.stderr


def test_what_cannot_run_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "unbuilt_reason", lambda: "there is no compiler.")
    done = check()
    assert done.exit_code == 0, done.output
    assert "compiled: there is no compiler." in done.stdout
