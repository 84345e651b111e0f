"""The modules of a model are those that torch knows, and are asked as hasattr asks them."""

import torch
from torch import nn

from entropy_regularization.integrations.modules import having, qualified_names


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.second = nn.ModuleDict({"again": self.first, "part": self.first[0]})
        self.none = None
        self.register_module("nothing", None)
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
        self.second["whole"] = nn.ModuleList([self.second])  # a module inside itself


def test_names_are_those_of_torch_in_its_order() -> None:
    model = Shared()
    assert [(name, part) for part, name in qualified_names(model).items()] == list(
        model.named_modules()
    )


class HandsOn(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


def test_modules_are_asked_as_hasattr_asks() -> None:
    def of_class(value: object) -> nn.Module:
        return type("Other", (nn.Identity,), {"config": value})()

    own, plain = nn.Identity(), nn.Identity()
    own.config = None
    refuses = of_class(property(lambda self: self.missing))
    modules = [own, plain, of_class(1), of_class(property(lambda self: 1)), refuses]
    modules += [HandsOn(own), HandsOn(plain), torch.jit.script(nn.Identity())]
    assert having(modules, "config") == [each for each in modules if hasattr(each, "config")]
    plain.config = 1
    assert having(iter(modules), "config") == [each for each in modules if hasattr(each, "config")]
