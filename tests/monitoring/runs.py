"""Run folders made of numbers drawn at random, as entropy-reg train leaves them."""

import json
import math
import random
from pathlib import Path

from entropy_regularization.monitoring.records import RecordWriter
from entropy_regularization.monitoring.statistics import HeadStatistics

MAXIMUM = 4.06  # nats, the mean of log n over a causal context of 128


def heads_at(progress: float, *, layers: int, heads: int, penalty: bool, seed: int):
    """Heads that start near the maximum; some collapse, unless a penalty holds them."""
    draw = random.Random(seed)
    utilisation, threshold = [], []
    for _ in range(layers):
        ends = [draw.choice([0.06, 0.3, 0.5, 0.85]) for _ in range(heads)]
        goals = [draw.uniform(0.45, 0.6) for _ in range(heads)]
        threshold.append([0.5 + (g - 0.5) * progress for g in goals])
        targets = [0.8 * g + 0.2 * e if penalty else e for e, g in zip(ends, goals, strict=True)]
        utilisation.append([0.97 + (t - 0.97) * progress for t in targets])
    share = [[math.exp(-20 * (u - 0.5) ** 2) for u in layer] for layer in utilisation]
    return HeadStatistics(
        [f"transformer.h.{k}.attn" for k in range(layers)],
        [[u * MAXIMUM for u in layer] for layer in utilisation],
        [[MAXIMUM] * heads for _ in range(layers)],
        utilisation,
        share,
        threshold if penalty else [[0.5] * heads for _ in range(layers)],
    )


def make_run(
    folder: Path,
    *,
    layers: int = 4,
    heads: int = 4,
    steps: int = 60,
    penalty: bool = True,
    finished: bool = True,
    seed: int = 0,
    config: dict | None = None,
) -> Path:
    """Write a folder with every file that the page reads."""
    folder.mkdir(parents=True)
    shape = {"layers": layers, "heads": heads, "penalty": penalty, "seed": seed}
    noise = random.Random(seed)
    options = {
        "model": "gpt2-tiny",
        "data": "stdlib",
        "context_length": 128,
        "learning_rate": 1e-3,
        "penalty": {"kind": "calibrated" if penalty else "none", "tolerance": 0.1},
        "versions": {"entropy_regularization": "0.1.0", "torch": "2.13.0", "python": "3.11"},
    }
    (folder / "config.json").write_text(json.dumps(options if config is None else config))
    with RecordWriter(folder / "records.jsonl") as writer:
        for step in range(steps + 1):
            done = 1 - math.exp(-4 * step / max(steps, 1))
            statistics = heads_at(done, **shape)
            loss = 9.2 - 5.4 * done + noise.gauss(0, 0.05)
            if step == 0:
                writer.write(
                    "evaluation",
                    0,
                    statistics,
                    when="before",
                    loss=9.2,
                    perplexity=math.exp(9.2),
                    in_starting_band=0.125,
                )
                continue
            writer.write(
                "train",
                step,
                statistics,
                loss=loss,
                penalty=0.2 * (1 - done) if penalty else 0.0,
                learning_rate=1e-3,
                gradient_norm=1.0,
                tokens=4096 * step,
                tokens_per_second=9000 + noise.gauss(0, 100),
                elapsed=0.45 * step,
            )
        if finished:
            writer.write(
                "evaluation",
                steps,
                statistics,
                when="after",
                loss=3.8,
                perplexity=math.exp(3.8),
                in_starting_band=0.625,
            )
    if finished:
        (folder / "result.json").write_text(json.dumps({"perplexity_after": math.exp(3.8)}))
    return folder
