"""What entropy-reg train can be told: one field per option, with its help text and its default."""

import dataclasses
import glob
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click

from entropy_regularization.cli.errors import UsageProblem


def _option(default: Any, text: str, kind: Any = None) -> Any:
    """Declare a field that is also an option."""
    return dataclasses.field(default=default, metadata={"help": text, "type": kind})


POSITIVE = click.IntRange(min=1)
COUNT = click.IntRange(min=0)
AMOUNT = click.FloatRange(min=0.0)
SHARE = click.FloatRange(min=0.0, max=1.0)


class Size(NamedTuple):
    """Layers, width and heads of one of our own GPT-2s."""

    layers: int
    width: int
    heads: int


SIZES = {
    "gpt2-nano": Size(2, 64, 2),
    "gpt2-tiny": Size(4, 128, 4),
    "gpt2-mini": Size(6, 256, 8),
    "gpt2-small": Size(12, 768, 12),
}


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The options of a run, as written to RUN/config.json."""

    model: str = _option(
        "gpt2-tiny",
        "Local folder, hub name, or one of our own sizes, trained from scratch: gpt2-nano "
        "(2 layers, width 64, 2 heads), gpt2-tiny (4, 128, 4), gpt2-mini (6, 256, 8), "
        "gpt2-small (12, 768, 12).",
    )
    layers: int | None = _option(None, "Layers, in place of the size's.", click.IntRange(1, 1000))
    width: int | None = _option(None, "Width, in place of the size's.", click.IntRange(1, 65_536))
    heads: int | None = _option(None, "Heads, in place of the size's.", POSITIVE)
    vocabulary: int | None = _option(
        None,
        "Tokens of the byte-level BPE trained for a model from scratch. [default: 4096]",
        click.IntRange(1, 1_000_000),
    )
    data: str = _option(
        "stdlib",
        "stdlib (Python's own standard library source), a text file, a folder, a glob, or hf:NAME "
        "for a hub data set.",
    )
    text_column: str = _option("text", "Column of a hub data set that holds the text.")
    text_limit: int = _option(
        100,
        "Read no further document after this many million characters; a hub data set may hold far "
        "more.",
        POSITIVE,
    )
    context_length: int = _option(256, "Tokens in a context.", click.IntRange(min=2))
    batch_size: int = _option(8, "Contexts in a micro-batch.", POSITIVE)
    accumulation: int = _option(1, "Micro-batches in an optimizer step.", POSITIVE)
    steps: int | None = _option(None, "Optimizer steps. [default: 200, or --epochs]", POSITIVE)
    epochs: float | None = _option(
        None, "Passes over the text, in place of --steps.", click.FloatRange(0, 1e9, min_open=True)
    )
    learning_rate: float = _option(
        1e-3, "Highest learning rate.", click.FloatRange(0, 10, min_open=True)
    )
    warmup: float = _option(0.05, "Share of the steps with a rising learning rate.", SHARE)
    weight_decay: float = _option(0.01, "Weight decay, not of thresholds, norms, biases.", AMOUNT)
    dropout: float | None = _option(
        None, "Dropout of a model from scratch. [default: 0]", click.FloatRange(0, 1, max_open=True)
    )
    precision: str = _option(
        "float32", "Precision of the training.", click.Choice(["float32", "bfloat16", "float16"])
    )
    gradient_checkpointing: bool = _option(
        False, "Compute activations again in backward, to save memory."
    )
    seed: int = _option(
        0, "Seed of the weights, the order of the text and dropout.", click.IntRange(0, 2**32 - 1)
    )
    penalty: str = _option(
        "calibrated",
        "calibrated (the same strength for every length and batch), published (Jha & Reagen 2025, "
        "number for number), or none.",
        click.Choice(["calibrated", "published", "none"]),
    )
    loss_coeff: float | None = _option(
        None,
        "Strength of the penalty. [default: 1 calibrated, 1e-5 published]",
        click.FloatRange(0.0, 1e38),  # what float32 can hold
    )
    tolerance: float | None = _option(
        None,
        "Half the width of the band, a share of the maximum entropy. [default: 0.1 calibrated, "
        "0.2 published]",
        SHARE,
    )
    threshold: float = _option(0.5, "Where thresholds start, a share of the maximum.", SHARE)
    fixed_thresholds: bool = _option(False, "Do not learn the thresholds.")
    logging_steps: int = _option(10, "Steps between two records.", POSITIVE)
    evaluation_steps: int = _option(
        0, "Steps between two evaluations; 0 for before and after only.", COUNT
    )
    evaluation_blocks: int = _option(64, "Held-out contexts that an evaluation reads.", POSITIVE)
    checkpoint_steps: int = _option(50, "Steps between two checkpoints.", POSITIVE)

    def from_anywhere(self) -> "TrainOptions":
        """Return the options with local files named so that any working directory finds them."""
        data, model = self.data, self.model
        prefix = "hf:" if data.startswith("hf:") else ""
        place = data.removeprefix(prefix)
        if data != "stdlib" and (not prefix or Path(place).exists()):
            here = os.getcwd() if Path(place).exists() else glob.escape(os.getcwd())
            data = prefix + os.path.normpath(os.path.join(here, place))
        if model not in SIZES and Path(model).is_dir():
            model = os.path.abspath(model)
        return dataclasses.replace(self, data=data, model=model)

    @property
    def total_steps(self) -> int:
        """Steps for the Trainer: -1 where epochs decide."""
        if self.epochs is not None:
            return -1
        return 200 if self.steps is None else self.steps

    @property
    def tokens(self) -> int:
        """Size of the vocabulary of a model from scratch."""
        return 4096 if self.vocabulary is None else self.vocabulary

    @property
    def strength(self) -> float:
        """Coefficient of the penalty."""
        if self.loss_coeff is not None:
            return self.loss_coeff
        return 1e-5 if self.penalty == "published" else 1.0

    @property
    def band(self) -> float:
        """Half the width of the band."""
        if self.tolerance is not None:
            return self.tolerance
        return 0.2 if self.penalty == "published" else 0.1

    def check(self) -> None:
        """Check what one option alone cannot tell.

        Raises:
            UsageProblem: if a number is not finite, or options contradict each other.
        """
        for name, value in self.as_dict().items():
            option = "--" + name.replace("_", "-")
            if isinstance(value, str) and not value.strip():
                raise UsageProblem(f"{option} is empty; pass a value, or leave it out.")
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageProblem(f"{option} is {value}; pass a finite number.")
        if self.steps is not None and self.epochs is not None:
            raise UsageProblem(
                f"--steps {self.steps} and --epochs {self.epochs:g} were both given; choose one."
            )
        idle = "--loss-coeff" if self.loss_coeff is not None else "--fixed-thresholds"
        if self.penalty == "none" and (self.loss_coeff is not None or self.fixed_thresholds):
            raise UsageProblem(f"{idle} has no effect with --penalty none; leave one of them out.")
        if self.text_column != "text" and not self.data.startswith("hf:"):
            raise UsageProblem(
                f"--text-column {self.text_column} is for a data set of the hub, but --data is "
                f"{self.data}; leave it out."
            )

    @classmethod
    def of_config(cls, saved: dict[str, Any], path: Path) -> "TrainOptions":
        """Return the options that a config.json holds, checked as if they were typed.

        Args:
            saved: options by name; one that is missing has its default, others are passed over.
            path: of the file.

        Raises:
            UsageProblem: if one of them would be refused on the command line.
        """
        fields = [field for field in dataclasses.fields(cls) if field.name in saved]
        try:
            options = cls(**{field.name: _checked(field, saved[field.name]) for field in fields})
            options.check()
        except click.ClickException as error:
            raise UsageProblem(f"{path} was changed: {error.format_message()}") from None
        return options

    def in_effect(self) -> dict[str, Any]:
        """Return the options by name, with what those that were left out stand for."""
        stand_for = {
            "loss_coeff": self.strength,
            "tolerance": self.band,
            "dropout": 0.0,
            "vocabulary": self.tokens,
        }
        if self.epochs is None:
            stand_for["steps"] = self.total_steps
        return {
            name: stand_for.get(name) if value is None else value
            for name, value in self.as_dict().items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the options by name."""
        return dataclasses.asdict(self)


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return a value as its option on the command line would give it."""
    if value is None:
        if field.default is None:
            return None
        raise UsageProblem(f"{field.name} is null; put back what it was.")
    kind = field.metadata["type"] or (click.BOOL if field.default is False else click.STRING)
    if isinstance(value, bool) != (kind is click.BOOL) or isinstance(value, list | dict):
        raise UsageProblem(f"{value!r} is no value of {field.name}; put back what it was.")
    try:
        return kind.convert(str(value), None, None)
    except click.BadParameter as error:
        raise UsageProblem(f"{field.name}: {error.message} Put back what it was.") from None


def train_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a click command with every field of TrainOptions."""
    for field in reversed(dataclasses.fields(TrainOptions)):
        name = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if field.type == "bool" or isinstance(field.default, bool):
            option = click.option(name, is_flag=True, default=field.default, help=text)
        else:
            kind = field.metadata["type"] or str
            shown = field.default is not None
            option = click.option(
                name, type=kind, default=field.default, show_default=shown, help=text
            )
        function = option(function)
    return function
