"""Analysis: what one text says of the heads of a model that is there."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_regularization.monitoring.lengths import LengthProfile, octave_name
from entropy_regularization.monitoring.statistics import HeadStatistics, flatten, mean_of_heads
from entropy_regularization.monitoring.tables import digits, percent


@dataclass(frozen=True)
class Analysis:
    """What one text says of a model.

    Attributes:
        name: of the model, as it was typed.
        kind: its class.
        parameters: how many it has.
        contexts: how many were read.
        statistics: of every head.
        profile: of every head by how many keys its rows see.
        perplexity: NaN of a model that does not predict the next token.
    """

    name: str
    kind: str
    parameters: int
    contexts: int
    statistics: HeadStatistics
    profile: LengthProfile
    perplexity: float = math.nan

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as JSON has them; DESIGN.md says what they are."""
        statistics, profile = self.statistics, self.profile
        return {
            "model": self.name,
            "class": self.kind,
            "parameters": self.parameters,
            "contexts": self.contexts,
            "perplexity": self.perplexity,
            **statistics.classify()._asdict(),
            "layers": statistics.layers,
            "entropy": statistics.entropy,
            "reachable_maximum": statistics.reachable_maximum,
            "utilisation": statistics.utilisation,
            "deviation": profile.deviation,
            "growth": profile.growth,
            "keys": profile.keys,
            "typical_keys": profile.typical_keys,
            "entropy_by_keys": profile.entropy,
        }


# What is said of a model as a whole.
FIGURES: tuple[tuple[str, Callable[[Analysis], str]], ...] = (
    ("parameters", lambda found: f"{found.parameters:,}"),
    ("heads", lambda found: f"{len(flatten(found.statistics.entropy)):,}"),
    ("contexts read", lambda found: f"{found.contexts:,}"),
    ("perplexity", lambda found: digits(found.perplexity)),
    ("mean entropy [nats]", lambda found: digits(mean_of_heads(found.statistics.entropy))),
    (
        "share of the reachable maximum",
        lambda found: percent(mean_of_heads(found.statistics.utilisation)),
    ),
    ("growth with log n", lambda found: digits(mean_of_heads(found.profile.growth))),
    ("heads collapsed", lambda found: f"{found.statistics.classify().collapsed:,}"),
    ("heads well-behaved", lambda found: f"{found.statistics.classify().well_behaved:,}"),
    ("heads overloaded", lambda found: f"{found.statistics.classify().overloaded:,}"),
)


def figures_of(analyses: Sequence[Analysis]) -> list[tuple[str, list[str]]]:
    """Return (what, one text per analysis), without lines that no analysis knows."""
    lines = [(label, [show(found) for found in analyses]) for label, show in FIGURES]
    unknown = digits(math.nan)
    return [(label, cells) for label, cells in lines if set(cells) != {unknown}]


def entropy_by_keys(analyses: Sequence[Analysis]) -> list[tuple[str, list[str]]]:
    """Return (keys that a row sees, mean entropy over all heads per analysis)."""
    lines = []
    octaves = max(len(found.profile.keys) for found in analyses)
    for k in range(octaves):
        means = [
            mean_of_heads([[head[k] for layer in found.profile.entropy for head in layer]])
            if k < len(found.profile.keys)
            else math.nan
            for found in analyses
        ]
        if not all(map(math.isnan, means)):
            lines.append((octave_name(k), [digits(mean) for mean in means]))
    return lines


def short_names(names: Sequence[str]) -> list[str]:
    """Return what models are called in tables: of a folder the last two parts, if these differ."""
    short = [
        "/".join(Path(name).resolve().parts[-2:]) if Path(name).is_dir() else name for name in names
    ]
    return short if len(set(short)) == len(short) else list(names)
