"""The page about analyses: complete, escaped, without a network, for one model and several."""

import math
import random
import re
from pathlib import Path

import pytest
import torch
from pages import Page
from recordings import recording_of

from entropy_regularization.monitoring.analysis import (
    Analysis,
    entropy_by_keys,
    figures_of,
    short_names,
)
from entropy_regularization.monitoring.analysis_page import write_page
from entropy_regularization.monitoring.lengths import LengthProfile, length_sums
from entropy_regularization.monitoring.statistics import HeadStatistics, head_statistics
from entropy_regularization.monitoring.tables import digits, percent
from entropy_regularization.recording.recording import EntropyRecording


def analysis_of(*heads: int, name: str = "a", queries: int = 40, seed: int = 0) -> Analysis:
    recording = recording_of(*heads, queries=queries, seed=seed)
    return Analysis(
        name, "GPT2LMHeadModel", 1234567, 8, head_statistics(recording),
        length_sums(recording).profile(), 12.5,
    )  # fmt: skip


def page_of(path: Path, *analyses: Analysis) -> tuple[Page, str]:
    options, environment = {"data": "<b>text</b>"}, {"torch": "2"}
    write_page(analyses, path, extent="<i>ext</i>", options=options, environment=environment)
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def test_one_model(tmp_path: Path) -> None:
    found = analysis_of(3, 3)
    page, text = page_of(tmp_path / "page.html", found)
    assert page.row("perplexity") == ["12.5"]
    assert page.row("parameters") == ["1,234,567"]
    assert page.row("contexts read") == ["8"]
    metrics = found.statistics.metrics("")
    assert page.row("mean entropy [nats]") == [digits(metrics["mean"])]
    assert page.row("share of the reachable maximum") == [percent(metrics["utilisation"])]
    maps = {
        "mean entropy [nats]": found.statistics.entropy,
        "share of the reachable maximum": found.statistics.utilisation,
        "standard deviation over rows [nats]": found.profile.deviation,
    }
    cells = [row[1:] for row in page.rows if len(row) == 4 and row[0] in "01" and "." in row[1]]
    numbers = [[f"{x:.2f}" for x in layer] for table in maps.values() for layer in table]
    growth = [[f"{round(x, 2) + 0.0:+.2f}" for x in layer] for layer in found.profile.growth]
    assert cells == numbers + growth
    layer = [digits(sum(head[5] for head in heads) / 3) for heads in found.profile.entropy]
    assert page.row("32 to 63") == layer
    assert text.count("<svg ") == 1
    assert "minus" not in page.text


def test_the_heads_at_the_ends(tmp_path: Path) -> None:
    found = analysis_of(12, 12)
    page, _ = page_of(tmp_path / "page.html", found)
    shares = [
        (share, f"layer {layer}, head {head}")
        for layer, heads in enumerate(found.statistics.utilisation)
        for head, share in enumerate(heads)
    ]
    named = [row for row in page.rows if row and row[0].startswith("layer ")]
    assert [row[0] for row in named[:8]] == [name for _, name in sorted(shares)[:8]]
    assert [row[0] for row in named[8:]] == [name for _, name in sorted(shares)[::-1][:8]]
    assert named[0][1] == percent(min(shares)[0])


def test_two_alike_show_their_difference(tmp_path: Path) -> None:
    one, other = analysis_of(2, 3, name="one"), analysis_of(2, 3, name="other", seed=1)
    page, text = page_of(tmp_path / "page.html", one, other)
    assert "other minus one" in page.text
    change = other.statistics.entropy[1][2] - one.statistics.entropy[1][2]
    assert f"{change:+.2f}" in text
    assert page.row("perplexity") == ["12.5", "12.5"]
    assert text.count("<svg ") == 2
    third = analysis_of(2, 3, name="third")
    page, _ = page_of(tmp_path / "page.html", one, other, third)
    assert not any("minus" in each for each in page.text)


def test_a_page_is_complete_and_everything_typed_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    page, text = page_of(tmp_path / "page.html", analysis_of(2, name=evil), analysis_of(1))
    assert not re.search(r"https?://|@import|<script|<link|<img|<iframe|<b>|<i>", text)
    assert not [v for k, v in page.attributes if k in ("src", "href") and not v.startswith("#")]
    used = {name for key, value in page.attributes if key == "class" for name in value.split()}
    style = text[text.index("<style>") : text.index("</style>")]
    assert used <= set(re.findall(r"\.([a-z][a-z0-9]*)", style))


def test_a_page_of_a_thousand_heads_stays_small(tmp_path: Path) -> None:
    _, text = page_of(tmp_path / "page.html", analysis_of(*[32] * 32))
    assert len(text) < 1_000_000


def test_what_no_row_tells_is_left_out(tmp_path: Path) -> None:
    recording = recording_of(2, queries=8)
    layer = recording[0]
    same = EntropyRecording([layer._map(torch.Tensor.detach)])
    object.__setattr__(same[0], "allowed_keys", torch.full_like(layer.allowed_keys, 8))
    found = Analysis(
        "a", "BertModel", 1, 1, head_statistics(same), length_sums(same).profile()
    )  # fmt: skip
    assert [label for label, _ in figures_of([found])] == [
        "parameters", "heads", "contexts read", "mean entropy [nats]",
        "share of the reachable maximum", "heads collapsed", "heads well-behaved",
        "heads overloaded",
    ]  # fmt: skip
    assert [label for label, _ in entropy_by_keys([found])] == ["8 to 15"]
    page, text = page_of(tmp_path / "page.html", found)
    assert "<svg" not in text
    assert not any("growth with log n" in each for each in page.text)
    both = entropy_by_keys([found, analysis_of(2, queries=70)])
    assert [label for label, _ in both][:4] == ["1", "2 to 3", "4 to 7", "8 to 15"]
    unknown = digits(math.nan)
    assert [cells[0] == unknown for _, cells in both] == [True] * 3 + [False] + [True] * 3


def test_a_head_that_is_not_finite_has_no_colour(tmp_path: Path) -> None:
    draw = random.Random(0)
    table = [[draw.random(), math.nan]]
    statistics = HeadStatistics(["x"], table, table, table)
    profile = LengthProfile(["x"], [1], [[1.0]], [[[0.0], [math.nan]]], table, table)
    page, _ = page_of(tmp_path / "page.html", Analysis("a", "K", 1, 1, statistics, profile))
    assert "no row" in page.text


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["gpt2", "user/model"], ["gpt2", "user/model"]),
        (["one/model", "two/model"], ["one/model", "two/model"]),
        (["x/one/model", "two/model"], ["one/model", "two/model"]),
        (["x/one/model", "one/model"], ["x/one/model", "one/model"]),
    ],
)
def test_folders_are_called_by_their_last_two_parts(
    given: list[str], wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one/model", "two/model", "x/one/model"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert short_names(given) == wanted
