"""The page: complete, escaped, without a network, for finished and unfinished runs."""

import json
import math
import re
import sys

import pytest
from pages import Page
from runs import make_run

from entropy_regularization.monitoring.records import RecordError, RecordWriter
from entropy_regularization.monitoring.report import write_report
from entropy_regularization.monitoring.run import read_run
from entropy_regularization.monitoring.statistics import HeadStatistics
from entropy_regularization.monitoring.tables import change_maps, digits, duration, percent


def page_of(folder, **options):
    path = write_report(folder, **options)
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def test_a_finished_run_with_a_baseline(tmp_path):
    run = make_run(tmp_path / "demo", layers=2, heads=3)
    make_run(run / "baseline", layers=2, heads=3, penalty=False)
    page, text = page_of(run)
    assert (run / "report.html").read_text(encoding="utf-8") == text
    assert page.row("held-out perplexity") == ["9,897", "44.7", "9,897", "44.7"]
    first, last = read_run(run).first, read_run(run).last
    mean = [digits(x.statistics.metrics()["entropy/mean"]) for x in (first, last)]
    assert page.row("mean entropy [nats]")[:2] == mean
    share = [percent(x.statistics.metrics()["entropy/in_band"]) for x in (first, last)]
    assert page.row("row entropies in the band")[:2] == share
    assert page.row("row entropies in the first band")[:2] == ["12.5 %", "62.5 %"]
    classes = last.statistics.classify()
    assert page.row("heads well-behaved")[1] == str(classes.well_behaved)
    spoken = "{} collapsed, {} well-behaved, {} overloaded".format(*classes)
    assert ("aria-label", spoken) in page.attributes
    assert page.row("tokens trained on") == ["245,760", "245,760"]
    assert page.row("duration of training") == ["27 s", "27 s"]
    assert page.row("penalty, first and last step")[2:] == ["–", "–"]  # noqa: RUF001
    for heading in ("with penalty", "without penalty", "finished", "Thresholds", "gpt2-tiny"):
        assert heading in page.text
    assert "without penalty: 0.5 for every head, not learned." in page.text
    assert text.count("<svg ") == 8  # loss, penalty, band; layers twice, mean; classes twice


def test_the_page_is_complete_without_a_network(tmp_path):
    page, text = page_of(make_run(tmp_path / "demo"))
    assert not re.search(r"https?://|@import|<script|<link|<img|<iframe", text)
    assert not [v for k, v in page.attributes if k in ("src", "href") and not v.startswith("#")]
    assert len(text) < 200_000


def test_a_page_of_a_thousand_heads_stays_small(tmp_path):
    _, text = page_of(make_run(tmp_path / "big", layers=32, heads=32, steps=5))
    assert len(text) < 1_000_000
    assert "map dense" in text


def test_numbers_of_a_map_are_not_cut_off_by_its_columns(tmp_path):
    # looked at in a browser: 12 heads, three maps beside each other, were cut to "+0."
    _, text = page_of(make_run(tmp_path / "many", layers=1, heads=12))
    _, few = page_of(make_run(tmp_path / "few", layers=1, heads=8))
    assert 'class="grid many"' in text
    assert 'class="grid many"' not in few
    for page, heads in ((text, 12), (few, 8)):
        assert f'<table class="map" style="--heads:{heads}">' in page
        assert re.search(r"\.map:not\(\.dense\) td \{ font-size: min\(.*100cqi.*--heads", page)


def test_every_class_has_a_style(tmp_path):
    page, text = page_of(make_run(tmp_path / "demo"))
    used = {name for key, value in page.attributes if key == "class" for name in value.split()}
    style = text[text.index("<style>") : text.index("</style>")]
    styled = set(re.findall(r"\.([a-z][a-z0-9]*)", style))
    assert used <= styled
    assert len([name for name in used if re.fullmatch(r"[sd]\d+", name)]) > 10


def test_every_head_is_in_the_maps(tmp_path):
    run = make_run(tmp_path / "demo", layers=3, heads=2)
    page, _ = page_of(run)
    wanted = [[f"{x:.2f}" for x in layer] for layer in read_run(run).last.statistics.entropy]
    maps = [row for row in page.rows if len(row) == 3 and row[0] in "012"]
    assert [row[1:] for row in maps[3:6]] == wanted


def test_an_unfinished_run_says_so(tmp_path):
    run = make_run(tmp_path / "demo", finished=False, steps=7)
    page, _ = page_of(run)
    assert "not finished: as of step 7" in page.text
    assert "latest" in page.text
    assert "after" not in page.text
    # the loss of a training step is no held-out loss
    assert page.row("held-out loss [nats per token]") == ["9.2", "–"]  # noqa: RUF001


def test_the_band_of_an_unfinished_run_is_called_what_it_is(tmp_path):
    run = make_run(tmp_path / "demo", finished=False, steps=7)  # a training line knows one band
    page, text = page_of(run)
    cards = text[text.index("Key figures") : text.index("Before and after")]
    assert "row entropies in the band" in cards
    assert "first band" not in cards
    for share in page.row("row entropies in the band"):
        assert share in cards


def test_heads_that_are_all_collapsed_have_their_charts(tmp_path):
    run = tmp_path / "collapsed"
    run.mkdir()
    nothing = HeadStatistics(["a"], [[0.0]], [[4.0]], [[0.0]], [[0.0]])
    with RecordWriter(run / "records.jsonl") as writer:
        for step in (1, 2):
            writer.write("train", step, nothing, loss=1.0, penalty=0.0)
    page, _ = page_of(run)
    assert "row entropies in the band" in page.text
    assert page.text.count("all heads [nats]") == 1
    assert "penalty, as added to the loss" not in page.text


def test_a_run_that_diverged_says_so(tmp_path):
    run = make_run(tmp_path / "demo", layers=1, heads=1, steps=2)
    assert not read_run(run).diverged
    assert not any("not finite" in line for line in page_of(run)[0].text)
    with RecordWriter(run / "records.jsonl") as writer:
        statistics = read_run(run).last.statistics
        writer.write("train", 3, statistics, loss=math.inf, penalty=math.nan)
        writer.write("evaluation", 3, statistics, when="after", loss=800.0, perplexity=math.inf)
    page, _ = page_of(run)
    assert "Diverged: the last loss or perplexity is not finite." in page.text
    gaps = "The loss was not finite in 1 of 3 records, first at step 3: its line has gaps there."
    assert gaps in page.text
    assert page.row("penalty, first and last step") == ["0.027", "–"]  # noqa: RUF001


def test_a_run_killed_in_the_middle_of_its_second_record(tmp_path):
    run = make_run(tmp_path / "demo", steps=1, finished=False)
    records = run / "records.jsonl"
    records.write_bytes(records.read_bytes()[:-10])
    page, text = page_of(run)
    assert any("cut off when the run was killed" in line for line in page.text)
    assert "<h2>Training</h2>" not in text
    assert "Entropy of every head" in page.text


def test_layers_of_different_widths_and_unknown_numbers(tmp_path):
    run = tmp_path / "ragged"
    run.mkdir()
    table = [[1.0, math.nan], [2.0]]
    statistics = HeadStatistics(["a", "b"], table, [[4.0, 4.0], [4.0]], [[0.2, math.nan], [0.9]])
    with RecordWriter(run / "records.jsonl") as writer:
        for step in (1, 2, 3):
            writer.write("train", step, statistics, loss=math.nan)
    page, _ = page_of(run)
    assert page.row("heads collapsed") == ["1", "1"]
    assert page.row("heads overloaded") == ["1", "1"]
    assert "There is no config.json in the folder." in page.text
    assert "Thresholds" not in page.text


def test_layers_that_the_last_look_lacks_are_unknown(tmp_path):
    run = tmp_path / "dropout"
    run.mkdir()
    both = HeadStatistics(["a", "b"], *([[[1.0], [2.0]]] * 3))
    swapped = HeadStatistics(["c", "b"], *([[[9.0], [0.5]]] * 3))
    with RecordWriter(run / "records.jsonl") as writer:
        writer.write("train", 1, both, loss=1.0)
        writer.write("train", 2, swapped, loss=0.5)
    last = read_run(run).last.statistics
    assert last.layers == ["a", "b"]
    assert math.isnan(last.entropy[0][0])
    assert last.entropy[1] == [0.5]
    page, _ = page_of(run)
    assert ["0", "no row"] in page.rows


def test_everything_typed_by_a_person_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    config = {"model": evil, evil: [evil], "versions": {"torch": evil}, "empty": None}
    run = make_run(tmp_path / "a<b>&c", config=config, layers=1, heads=1, steps=2)
    page, text = page_of(run)
    assert "<script" not in text
    assert page.row("model") == page.row("torch") == [evil]
    assert page.row(evil) == [json.dumps([evil])]
    assert "empty" not in page.text  # an option left open


def test_another_run_can_be_set_beside(tmp_path):
    run = make_run(tmp_path / "one", layers=1, heads=2, steps=3)
    other = make_run(tmp_path / "two", layers=2, heads=1, steps=5, seed=1)
    page, _ = page_of(run, compare=other, output=tmp_path / "page.html")
    assert not (run / "report.html").exists()
    assert {"this run", "two"} <= set(page.text)
    assert page.row("tokens trained on") == ["12,288", "20,480"]


def test_a_name_is_shown_as_it_is(tmp_path):
    one, two = (
        make_run(tmp_path / name, layers=1, heads=1, steps=3, penalty=False, seed=seed)
        for seed, name in enumerate(("one", "myRun_B"))
    )
    page, _ = page_of(one, compare=two)
    assert "myRun_B: 0.5 for every head, not learned." in page.text


def test_the_page_is_written_again_to_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "demo", layers=1, heads=2, steps=3)
    assert page_of(run)[1] == page_of(run)[1]


def break_config(run):
    (run / "config.json").write_text("{")


def break_result(run):
    (run / "result.json").write_text("[]")


def empty_records(run):
    (run / "records.jsonl").write_text("")


def remove_records(run):
    (run / "records.jsonl").unlink()


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (break_config, RecordError, "config.json is not JSON; restore it"),
        (break_result, RecordError, "result.json is not a JSON object; restore it"),
        (empty_records, RecordError, "no complete record of a head yet; wait for"),
        (remove_records, FileNotFoundError, "there are no records at .*; pass the folder"),
    ],
)
def test_a_folder_that_is_no_run_is_one_sentence(tmp_path, harm, error, message):
    run = make_run(tmp_path / "demo", layers=1, heads=1, steps=1)
    harm(run)
    with pytest.raises(error, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(("package", "extra"), [("jinja2", "report"), ("matplotlib", "plots")])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, package, extra):
    run = make_run(tmp_path / "demo", layers=1, heads=1, steps=1)
    for name in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"entropy-regularization\[{extra}\]"):
        write_report(run)


def test_the_difference_of_other_heads_is_not_drawn():
    same = change_maps(["a"], [[1.0]], [[3.0]], end=4.0, when=("before", "after"))
    other = change_maps(["a"], [[1.0]], [[3.0, 1.0]], end=4.0, when=("before", "after"))
    assert [m.caption for m in same] == ["before", "after", "change: after minus before"]
    assert same[2].rows == [("a", [("d31", "+2.00")])]
    assert len(other) == 2


def test_changes_of_two_runs_share_their_colours(tmp_path):
    run = make_run(tmp_path / "demo", layers=2, heads=2)
    make_run(run / "baseline", layers=2, heads=2, penalty=False)
    _, text = page_of(run)
    section = text[text.index("<h2>Entropy of every head") : text.index("<h2>Collapsed")]
    ends = re.findall(
        r"<span>(-[\d.]+)</span><span class=\"ramp d\"></span><span>\+([\d.]+)<", section
    )
    assert len(ends) == 2
    assert ends[0] == ends[1]
    wanted = max(
        abs(a - b)
        for one in (read_run(run), read_run(run / "baseline"))
        for left, right in zip(
            one.first.statistics.entropy, one.last.statistics.entropy, strict=True
        )
        for a, b in zip(left, right, strict=True)
    )
    assert ends[0][1] == f"{wanted:.3g}"


def test_nothing_changed_is_no_negative_zero():
    (*_, change) = change_maps(["a"], [[1.001]], [[1.0]], end=1.0, when=("before", "after"))
    assert change.rows[0][1][0][1] == "+0.00"


def test_what_is_written_0_00_has_no_strong_colour():
    (*_, change) = change_maps(["a"], [[1.0, 1.0]], [[1.004, 0.996]], end=2.0, when=("a", "b"))
    assert change.ends == ("-0.1", "+0.1")
    assert [cell[1] for cell in change.rows[0][1]] == ["+0.00", "+0.00"]
    assert all(14 <= int(cell[0][1:]) <= 17 for cell in change.rows[0][1])  # of 0 to 31


def test_a_page_of_a_single_step(tmp_path):
    config = {"loss_coeff": 0.30000000000000004, "rate": 0.0010000000474974513, "tiny": 1e-05}
    run = make_run(tmp_path / "one", layers=1, heads=1, steps=1, config=config)
    page, text = page_of(run)
    assert any(line.startswith("1 head in 1 layer, 1 step, 4,096 tokens") for line in page.text)
    assert [page.row(name) for name in config] == [["0.3"], ["0.001"], ["1e-05"]]
    assert "0.96" not in text


def test_the_second_of_two_runs_is_dashed_in_the_legend_too(tmp_path):
    run = make_run(tmp_path / "demo", layers=1, heads=1, steps=3)
    make_run(run / "baseline", layers=1, heads=1, steps=3, penalty=False)
    _, text = page_of(run)
    assert '<span class="swatch line" style="--colour:var(--first)"></span>with penalty' in text
    assert '<span class="swatch dashed" style="--colour:var(--second)"></span>without' in text


def contrast(left: str, right: str) -> float:
    """Return the contrast of two colours (WCAG 2)."""

    def light(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05

    darker, brighter = sorted((light(left), light(right)))
    return brighter / darker


def test_every_line_is_seen_on_the_light_and_on_the_dark_card(tmp_path):
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    run = make_run(tmp_path / "deep", layers=12, heads=1, steps=2)
    _, text = page_of(run)
    cards = set(re.findall(r"--card: (#\w{6})", text))
    lines = set(re.findall(r'swatch line" style="--colour:(#\w{6})', text))
    assert len(cards) == 2
    assert len(lines) == 12
    assert min(contrast(line, card) for line in lines for card in cards) >= 3


def test_numbers_are_written_for_people():
    assert digits(1e20) == "1e+20"
    assert [digits(x) for x in (12345.6, 44.7012, 0.003663, 0.0)] == [
        "12,346",
        "44.7",
        "0.0037",
        "0",
    ]
    assert percent(0.9034) == "90.3 %"
    assert [duration(x) for x in (27.4, 95.0, 7260.0)] == ["27 s", "1 min 35 s", "2 h 01 min"]
    assert {digits(math.nan), percent(math.nan), duration(math.nan)} == {"–"}  # noqa: RUF001


def test_the_options_are_shown_by_name(tmp_path):
    run = make_run(tmp_path / "demo", layers=1, heads=1, steps=1)
    page, _ = page_of(run)
    assert page.row("penalty.tolerance") == ["0.1"]
    make_run(run / "baseline", layers=1, heads=1, steps=1, penalty=False)
    page, text = page_of(run)
    assert page.row("penalty.kind") == ["calibrated", "none"]
    assert text.count('<tr class="differs">') == 1
    assert page.row("torch") == ["2.13.0"]
    assert (
        json.loads((tmp_path / "demo" / "config.json").read_text())["penalty"]["tolerance"] == 0.1
    )
