"""load_thresholds: a place without thresholds is told as it is."""

from pathlib import Path

import huggingface_hub
import pytest

from entropy_regularization.integrations.transformers import load_thresholds


@pytest.mark.parametrize(
    ("place", "error", "sentence"),
    [
        ("nope", ValueError, r"nope is no folder here, its model\.safetensors is not in the cache"),
        ("/nope/at/all", ValueError, "/nope/at/all is neither a folder here nor"),
        (None, TypeError, "name_or_path is a NoneType; pass a folder or a name on the hub"),
        (3, TypeError, "name_or_path is a int; pass a folder or a name on the hub"),
    ],
)
def test_what_is_no_model_is_one_sentence(
    place: object,
    error: type[Exception],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=sentence):
        load_thresholds(place, cache_dir=tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"model\.safetensors is broken .*; save the model again"):
        load_thresholds(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is no index of weights; save the model"):
        load_thresholds(tmp_path)
