"""A model is known to be compiled, whatever of it torch.compile was given."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from entropy_regularization.integrations.compiled import holds_compiled


class Decorated(nn.Module):
    @torch.compile
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def compile_forward(model: nn.Sequential) -> None:
    model[1].forward = torch.compile(model[1].forward)


COMPILE: dict[str, Callable[[nn.Sequential], object]] = {
    "a part": lambda model: model.append(torch.compile(model[1])),
    "a part in place": lambda model: model[1].compile(),
    "the forward of a part": compile_forward,
    "the forward of a class": lambda model: model.append(Decorated()),
}


@pytest.mark.parametrize("what", COMPILE)
def test_what_is_compiled_is_known(what: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    assert not holds_compiled(model)
    COMPILE[what](model)
    assert holds_compiled(model)
    assert holds_compiled(nn.ModuleList([model]))
