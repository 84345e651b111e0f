"""A transformers that is missing or too old is told in one sentence, where it is needed alone."""

import importlib
import sys

import pytest
import torch
from torch import nn

from entropy_regularization import record_entropy
from entropy_regularization.integrations import transformers as host
from entropy_regularization.integrations.transformers.support import unsupported_reason


def test_a_version_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("4.57.6", "5.9.0", "5.17.0rc1"):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        with pytest.raises(ImportError, match=rf"transformers {version} is installed, .* 5\.17 or"):
            importlib.reload(host)
    for version in ("5.17.0", "5.18.0.dev0", "6.0"):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        assert unsupported_reason() is None


def test_no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"need the package transformers; run: pip install 'ent"):
        importlib.reload(host)


def test_other_models_do_not_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "entropy_regularization.integrations.transformers"
    for each in (name, f"{name}.recorder"):
        monkeypatch.setitem(sys.modules, each, None)  # to import it is an error
    model = nn.MultiheadAttention(8, 2)
    x = torch.randn(3, 1, 8)
    with record_entropy(model) as recording:
        model(x, x, x)
    assert len(recording) == 1
