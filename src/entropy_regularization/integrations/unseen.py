"""Attention that no recorder hears: a softmax of one's own, or a function under another name.

Every softmax is followed to where its result multiplies other activations, which is what makes it
attention; a router's softmax, which is sorted and scattered, is not, nor is one that mixes streams
(``mixing``). What attends as attention is written most often, softmax(scores) @ values, is recorded
at that place; passes that are not watched know the softmax by the place in the code that called it.
"""

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from entropy_regularization.integrations.interception import (
    SOFTMAX_WRAPPERS,
    goes_around_wrapper,
)
from entropy_regularization.integrations.layouts import Layouts
from entropy_regularization.integrations.mixing import (
    SPLITS,
    TURNS,
    Mixtures,
    softmax_dimension,
    tensors_of,
)
from entropy_regularization.integrations.products import averages_values, weighs_shared_values
from entropy_regularization.integrations.softmaxes import Softmaxes
from entropy_regularization.integrations.source import OWN_SOFTMAX
from entropy_regularization.integrations.stack import calling_module
from entropy_regularization.integrations.weights import has_as_many, tells_layout

PRODUCTS = {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    torch.mm,
    Tensor.mm,
    torch.mv,
    Tensor.mv,
    torch.bmm,
    Tensor.bmm,
    torch.baddbmm,
    Tensor.baddbmm,
    torch.einsum,
    torch.linalg.matmul,
    torch.linalg.multi_dot,
    torch.tensordot,
    torch.inner,
    torch.addmm,
    Tensor.addmm,
    torch.addbmm,
    Tensor.addbmm,
    torch.sparse.mm,
    functional.linear,
}
AS_MANY = (
    f"{OWN_SOFTMAX}, over as many heads as batch entries, and nothing tells which of them come "
    "first (record a pass of another batch size before)"
)
FLEX = flex_attention.flex_attention.__code__  # computes everything where no watch sees it

# What may lie between the softmax and the product with the values: names of functions.
COPIES = "contiguous clone detach to type type_as float double half bfloat16"
KEEPING = frozenset(f"dropout view reshape flatten unflatten squeeze unsqueeze {COPIES}".split())
SCALINGS = {torch.mul, Tensor.mul, Tensor.__mul__, torch.multiply, Tensor.multiply}
# What may lie between the softmax and the product, where the number of elements may change.
CUTS = {
    Tensor.__getitem__,
    Tensor.expand,
    Tensor.repeat,
    torch.cat,
    torch.concat,
    torch.concatenate,
    torch.stack,
    torch.narrow,
    Tensor.narrow,
    torch.select,
    Tensor.select,
    torch.index_select,
    Tensor.index_select,
    torch.repeat_interleave,
    Tensor.repeat_interleave,
    torch.tile,
    Tensor.tile,
    functional.pad,
}


class Made(NamedTuple):
    """What came from a softmax.

    Attributes:
        name: of the module that called it.
        inner: how many dimensions, but for those of one, come after that of the softmax; None if
            that is not known.
    """

    name: str
    inner: int | None


@dataclass
class Heard:
    """A softmax by name, whose rows are recorded if it attends.

    Attributes:
        place: the class of the module, the code that called the softmax, and where in it.
        name: of the module.
        deposit: records the rows; None if they are not known.
        shape: of its weights.
        attends: whether that was done.
    """

    place: tuple[Any, ...]
    name: str
    deposit: Callable[[], None] | None
    shape: torch.Size
    attends: bool = False


class Judged(NamedTuple):
    """What a watched pass has found of the softmax at one place in the code.

    Attributes:
        attends: whether it does.
        layout_is_told: whether sizes have told which of four dimensions holds its heads.
    """

    attends: bool
    layout_is_told: bool


class UnseenAttention(TorchFunctionMode):
    """Watches what runs inside; changes nothing.

    Args:
        names: the modules of the model and their names.

    Attributes:
        found: the modules that attend unheard, each with how.
        heard: the softmaxes that are heard, whether they attend or not.
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.heard: list[Heard] = []
        self.names = names
        self._kinds = {name: type(part).__name__.lower() for part, name in names.items()}
        self._linears = {name for part, name in names.items() if isinstance(part, nn.Linear)}
        self._softmaxes = Softmaxes()
        self._weights = WeakIdKeyDictionary()  # tensors that came from a softmax -> Made
        self._mixtures = Mixtures(PRODUCTS, CUTS)
        self._layouts = Layouts()
        self._whole = WeakIdKeyDictionary()  # weights as the softmax made them -> Heard

    def hear(self, weights: Tensor, heard: Heard) -> None:
        """Take the weights of a softmax."""
        self.heard.append(heard)
        self._whole[weights] = heard

    def judged(self) -> dict[tuple[Any, ...], Judged]:
        """Return what the softmaxes at every place in the code are.

        One that is both attention and something else is in ``found``.
        """
        judged: dict[tuple[Any, ...], Judged] = {}
        for each in self.heard:
            before = judged.get(each.place, Judged(each.attends, False))
            if each.attends != before.attends:
                self.found[each.name] = "takes one softmax for attention and for other things"
            told = before.layout_is_told or tells_layout(each.shape)
            judged[each.place] = Judged(before.attends, told)
        return judged

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch; note where softmaxes come from and go to."""
        kwargs = kwargs or {}
        around = goes_around_wrapper(func, args, kwargs)
        result = func(*args, **kwargs)
        self._layouts.follow(func, args, kwargs, result)
        if sys._getframe(1).f_code is FLEX:
            self._note(calling_module(self.names), "calls flex_attention")
        if func in SOFTMAX_WRAPPERS or self._softmaxes.made(func, args, kwargs, result):
            name = calling_module(self.names)
            # Scores of one are noisy; the other would not be heard where nothing watches.
            if func is functional.gumbel_softmax or around:
                self._whole.pop(result, None)
            if name is not None:
                self._weights[result] = Made(name, _inner(args, kwargs, result))
                self._mixtures.softmax(args, kwargs, result)
        elif around:
            self._note(calling_module(self.names), f"calls {func.__name__} by another name")
        else:
            self._mixtures.follow(func, args, kwargs, result)
            if self._weights:
                self._follow(func, args, tensors_of(args, kwargs), result)
        return result

    def _follow(
        self, func: Callable[..., Any], args: Any, tensors: list[Tensor], result: Any
    ) -> None:
        source = next((each for each in tensors if each in self._weights), None)
        if source is None:
            return
        self._follow_whole(func, tensors[0], source, result)
        if func is Tensor.__setitem__ and tensors[0].dim() == 4:  # block by block
            self._weights[tensors[0]] = self._weights[source]
        if func in SPLITS:
            for part in tensors_of([result], {}):
                self._weights[part] = self._weights[source]
        if not isinstance(result, Tensor):
            return
        if func in PRODUCTS:
            self._multiply(func, args, tensors, source, result)
        elif func in SCALINGS and self._scale(tensors, source, result):
            return
        elif (
            func in CUTS
            or result.numel() == source.numel()
            # heads that a convolution mixes into more or fewer
            or (source.dim() == result.dim() == 4 and source.shape[2:] == result.shape[2:])
        ):
            made = self._weights[source]
            self._weights[result] = made._replace(inner=None) if func in TURNS else made

    def _scale(self, tensors: list[Tensor], weights: Tensor, result: Tensor) -> bool:
        """Weights scale something: tell whether that is what they weigh; note it if they attend."""
        name = self._weights[weights].name
        widens = result.numel() > weights.numel()
        if self._weighs_shared_values(tensors, weights):
            self._note(name, OWN_SOFTMAX)
            return True
        # Deformable attention weighs the values that it samples; so does a mixture of experts.
        if widens and any(word in self._kinds.get(name, "") for word in ("attention", "attn")):
            self._note(name, "weighs sampled values by a softmax of its own")
        return widens

    def _follow_whole(
        self, func: Callable[..., Any], first: Tensor, source: Tensor, result: Any
    ) -> None:
        """Weights stay what a softmax made of them through copies and dropout alone."""
        made = first if func is Tensor.__setitem__ else result
        if not isinstance(made, Tensor):
            return
        if source in self._whole and _keeps_weights(func, source, made):
            self._whole[made] = self._whole[source]
        else:
            self._whole.pop(made, None)  # changed in place

    def _multiply(
        self,
        func: Callable[..., Any],
        args: Any,
        tensors: list[Tensor],
        source: Tensor,
        result: Tensor,
    ) -> None:
        """Weights meet another matrix: activations, unless it is one of these."""
        if all(
            each in self._weights and self._mixtures.is_without_scores(each) for each in tensors
        ):
            self._weights[result] = self._weights[source]  # a kernel made of two
        elif source in self._mixtures:
            return
        elif not (
            self._are_learned(tensors, source)
            # The weight of a layer that is sharded, cast, or stood in for is no parameter.
            or (func is functional.linear and calling_module(self.names) in self._linears)
        ):
            self._attend(func, args, tensors, source)
        elif source.dim() == 4 and result.shape == source.shape:
            self._weights[result] = self._weights[source]  # heads that talk to each other

    def _are_learned(self, tensors: list[Tensor], weights: Tensor) -> bool:
        """Tell whether weights meet what is learned alone; a router meets its tokens beside it."""
        learned = [isinstance(each, nn.Parameter) for each in tensors if each is not weights]
        return all(learned) or (any(learned) and self._mixtures.is_without_scores(weights))

    def _weighs_shared_values(self, tensors: list[Tensor], weights: Tensor) -> bool:
        """Tell whether weights meet values that their rows share, in a product that is summed.

        Without scores of queries and keys they may mix what is learned, which batch entries share.
        """
        values = next((each for each in tensors if each is not weights), weights)
        if values.layout is not torch.strided or isinstance(
            values._base if values._is_view() else values, nn.Parameter
        ):
            return False
        of_batch = weights.dim() == values.dim() and weights.shape[0] == values.shape[0]
        if self._mixtures.is_without_scores(weights) and not of_batch:
            return False
        inner = self._weights[weights].inner
        return weights not in self._mixtures and weighs_shared_values(weights, values, inner)

    def _attend(
        self, func: Callable[..., Any], args: Any, tensors: list[Tensor], weights: Tensor
    ) -> None:
        """Weights attend: record their rows, or note that they are not known."""
        heard = self._whole.get(weights)
        if (
            heard is None
            or self._mixtures.is_without_scores(weights)
            or any(each in self._weights for each in tensors if each is not weights)
            or not averages_values(func, args, tensors, weights)
            or self._has_overtaken(heard)
        ):
            self._note(self._weights[weights].name, OWN_SOFTMAX)
            return
        if heard.deposit is None:
            self._note(heard.name, OWN_SOFTMAX)
        elif not self._may_have_heads_second(heard, weights):
            known = self._layouts.heads_of(weights) is not None
            self._note(heard.name, OWN_SOFTMAX if known else AS_MANY)
        elif not heard.attends:
            heard.deposit()
        heard.attends = True

    def _may_have_heads_second(self, heard: Heard, weights: Tensor) -> bool:
        """Tell whether heads come second, where sizes do not tell: as many as batch entries.

        In transformers they do unless something else is known, as ``tests/families`` has checked.
        """
        if not has_as_many(heard.shape):
            return True
        heads = self._layouts.heads_of(weights)
        return heads == 1 or (
            heads is None and heard.place[0].__module__.startswith("transformers.")
        )

    def _has_overtaken(self, heard: Heard) -> bool:
        """Tell whether weights attend after others that were made later; they are first later."""
        since = reversed(self.heard)
        return any(each.attends for each in itertools.takewhile(lambda e: e is not heard, since))

    def _note(self, name: str | None, how: str) -> None:
        if name is not None:
            self.found[name] = how


def _inner(args: Any, kwargs: Mapping[str, Any], weights: Tensor) -> int | None:
    """Return how many dimensions, but for those of one, come after that of a softmax."""
    dimension = softmax_dimension(args, kwargs)
    if dimension is None:
        return None
    return sum(size > 1 for size in weights.shape[weights.dim() + dimension + 1 :])


def _keeps_weights(func: Callable[..., Any], weights: Tensor, result: Tensor) -> bool:
    """Tell whether a function leaves weights what they are, rows of keys, but for dropout."""
    same = result.numel() == weights.numel() and result.shape[-1] == weights.shape[-1]
    return same and getattr(func, "__name__", "").strip("_") in KEEPING
