"""Models that several ranks share: heads are joined, a divided sequence is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).parent / "two_ranks.py")
    done = subprocess.run([*LAUNCH, script, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return torch.load(folder / "found.pt")


def test_training_is_that_of_one_process(found: dict[str, Any]) -> None:
    """Tensor parallel, under checkpointing and the compiler too, and fully sharded."""
    expected = found["expected gradients"]
    assert "entropy_thresholds.fraction_bias" in expected
    for name, gradients in found["gradients"].items():
        torch.testing.assert_close(
            gradients, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_thresholds_of_a_model_in_half_precision_are_a_unit_of_their_own(
    found: dict[str, Any],
) -> None:
    name = "entropy_thresholds.fraction_bias"
    assert found["half"][name].dtype == torch.float32
    torch.testing.assert_close(found["half"], found["expected half"], rtol=0.05, atol=0.02)
    torch.testing.assert_close(
        found["half"][name], found["expected half"][name], rtol=0.01, atol=1e-3
    )


def test_every_rank_records_all_heads(found: dict[str, Any]) -> None:
    assert [tuple(rows.shape) for rows in found["entropies"]] == [(2, 4, 12)] * 2
    torch.testing.assert_close(found["entropies"], found["expected entropies"])


def test_weights_that_fsdp_divides_are_no_heads(found: dict[str, Any]) -> None:
    torch.testing.assert_close(found["sharded"], found["expected sharded"])


def test_thresholds_that_fsdp_divided_on_meta_are_reset(found: dict[str, Any]) -> None:
    torch.testing.assert_close(found["thresholds"], torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2))


def test_what_cannot_be_joined_is_refused(found: dict[str, Any]) -> None:
    refused = found["refused"]
    assert (
        "model.layers.0.self_attn attends with 2 heads on each of 2 ranks (tensor parallelism), "
        "and the model has 6" in refused.pop("uneven")
    )
    assert "with 1 heads on each of 2 ranks (tensor parallelism), and nothing tells" in (
        refused.pop("unknown heads")
    )
    assert "Written computes a softmax of its own" in refused.pop("own softmax")
    assert "HeadThresholds that FSDP has sharded with the model" in refused.pop("thresholds")
    assert len(refused) == 5
    for name, sentence in refused.items():
        assert "runs under context parallelism" in sentence, name
