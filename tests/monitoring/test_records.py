"""records.jsonl: what is written is read, and what cannot be read is said."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_regularization.monitoring.records import (
    RecordError,
    RecordWriter,
    read_records,
    truncate_records,
)
from entropy_regularization.monitoring.statistics import HeadStatistics

PLAIN = HeadStatistics(["a", "b"], [[1.0, 2.0], [3.0]], [[4.0, 4.0], [4.0]], [[0.25, 0.5], [0.75]])


def write_steps(path, *steps, statistics=PLAIN):
    with RecordWriter(path) as writer:
        for step in steps:
            writer.write("train", step, statistics, loss=10.0 / (step + 1))


def steps_of(path):
    return [line.step for line in read_records(path).lines]


numbers = st.floats(-1e3, 1e3, width=32) | st.just(math.nan)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(numbers, min_size=1, max_size=4), min_size=1, max_size=3))
def test_statistics_survive_the_file(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("run") / "records.jsonl"
    names = [f"layer.{k}" for k in range(len(table))]
    statistics = HeadStatistics(names, table, table, table, table, None)
    with RecordWriter(path) as writer:
        writer.write("evaluation", 3, statistics, when="before", loss=0.1, perplexity=math.inf)
    (line,) = read_records(path).lines
    assert (line.kind, line.when, line.step) == ("evaluation", "before", 3)
    assert line["loss"] == 0.1
    assert math.isnan(line["perplexity"])
    assert math.isnan(line["missing"])
    assert line.statistics.threshold is None
    for got, wanted in zip(line.statistics.utilisation, table, strict=True):
        assert got == pytest.approx(wanted, rel=1e-6, abs=1e-30, nan_ok=True)


def test_the_file_is_plain_json_with_null_for_what_is_not_finite(tmp_path):
    path = tmp_path / "records.jsonl"
    bad = HeadStatistics(["a"], [[math.nan, 1.0]], [[2.0, 2.0]], [[math.inf, 0.5]])
    with RecordWriter(path) as writer:
        writer.write("train", 1, bad, loss=math.nan, tokens=512)
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert line == {
        "version": 1,
        "kind": "train",
        "step": 1,
        "loss": None,
        "tokens": 512,
        "layers": ["a"],
        "entropy": [[None, 1.0]],
        "reachable_maximum": [[2.0, 2.0]],
        "utilisation": [[None, 0.5]],
        "in_band": None,
        "threshold": None,
    }


def test_every_line_is_on_disk_when_the_process_is_killed(tmp_path):
    path = tmp_path / "records.jsonl"
    script = f"""
import os, signal
from test_records import PLAIN
from entropy_regularization.monitoring.records import RecordWriter
writer = RecordWriter({str(path)!r})
for step in range(3):
    writer.write("train", step, PLAIN)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == -9
    assert steps_of(path) == [0, 1, 2]


def test_a_torn_last_line_is_left_out_said_and_removed_by_the_next_writer(tmp_path):
    path = tmp_path / "records.jsonl"
    write_steps(path, 1, 2)
    path.write_bytes(path.read_bytes()[:-20])
    records = read_records(tmp_path)
    assert records.torn
    assert [line.step for line in records.train] == [1]
    write_steps(path, 2)
    assert not read_records(path).torn
    assert steps_of(path) == [1, 2]


def test_a_run_that_continues_writes_no_step_twice(tmp_path):
    path = tmp_path / "records.jsonl"
    with RecordWriter(path) as writer:
        writer.write("evaluation", 0, PLAIN, when="before")
        for step in (1, 2, 3, 4):
            writer.write("train", step, PLAIN)
        writer.write("evaluation", 2, PLAIN, when="after")
    with RecordWriter(path, keep_until=2) as writer:
        writer.write("train", 3, PLAIN)
    records = read_records(path)
    assert [(line.kind, line.step) for line in records.lines] == [
        ("evaluation", 0),
        ("train", 1),
        ("train", 2),
        ("train", 3),
    ]
    assert records.evaluation("before").step == 0
    assert records.evaluation("after") is None


def test_truncating_what_is_whole_changes_nothing(tmp_path):
    path = tmp_path / "records.jsonl"
    write_steps(path, 1, 2)
    before = path.stat()
    truncate_records(path)
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


GOOD = {
    "version": 1,
    "kind": "train",
    "step": 1,
    "layers": ["a"],
    "entropy": [[1.0]],
    "reachable_maximum": [[2.0]],
    "utilisation": [[0.5]],
}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .* is not JSON"),
        (b"\xff\xfe", "line 2 of .* is not JSON"),
        ("[1]", "is no record; pass a file that entropy-reg train wrote"),
        ({**GOOD, "version": 2}, "has version 2 but this package reads version 1"),
        ({**GOOD, "kind": "test"}, "lacks kind, step or layers"),
        ({**GOOD, "step": -1}, "lacks kind, step or layers"),
        ({**GOOD, "step": True}, "lacks kind, step or layers"),
        ({**GOOD, "layers": [1]}, "lacks kind, step or layers"),
        ({**GOOD, "entropy": None}, "lacks entropy"),
        ({**GOOD, "entropy": [[1.0], [2.0]]}, "entropy in line 2 of .* one list of numbers per"),
        ({**GOOD, "in_band": [["x"]]}, "in_band in line 2 of .* one list of numbers per layer"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, message):
    path = tmp_path / "records.jsonl"
    write_steps(path, 1)
    raw = (
        line
        if isinstance(line, bytes)
        else (line if isinstance(line, str) else json.dumps(line)).encode()
    )
    path.write_bytes(path.read_bytes() + raw + b"\n")
    with pytest.raises(RecordError, match=message):
        read_records(path)


def test_the_good_line_of_the_cases_is_good(tmp_path):
    (tmp_path / "records.jsonl").write_text(json.dumps(GOOD) + "\n")
    assert steps_of(tmp_path) == [1]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there are no records at .*records.jsonl; pass"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("kind", "when", "step"),
    [
        ("train", "before", 1),
        ("evaluation", None, 1),
        ("evaluation", "later", 1),
        ("other", None, 1),
        ("train", None, -1),
        ("train", None, 1.5),
        ("train", None, True),
    ],
)
def test_a_line_that_cannot_be_read_again_is_not_written(tmp_path, kind, when, step):
    writer = RecordWriter(tmp_path / "records.jsonl")
    with pytest.raises(ValueError, match="pass"):
        writer.write(kind, step, PLAIN, when=when)
    writer.close()
    assert steps_of(tmp_path) == []


@pytest.mark.parametrize(
    ("statistics", "numbers", "message"),
    [
        (PLAIN, {"version": 2.0}, "version is a key of every record; give the number another"),
        (PLAIN, {"entropy": 1.0}, "entropy is a key of every record"),
        (PLAIN, {"loss": "1"}, "loss is a str; pass a number"),
        (PLAIN, {"loss": None}, "loss is a NoneType; pass a number"),
        (PLAIN, {"loss": True}, "loss is a bool; pass a number"),
        (PLAIN, {"loss": torch.ones(2)}, "loss is a Tensor; pass a number"),
        (None, {}, "statistics is a NoneType; pass the HeadStatistics of a monitor"),
        (replace(PLAIN, layers="ab"), {}, "no list of names"),
        (replace(PLAIN, entropy=[[1.0]]), {}, "entropy of the statistics is not one list of num"),
        (replace(PLAIN, utilisation=None), {}, "utilisation of the statistics is not one list"),
        (replace(PLAIN, in_band=[["x"], [1.0]]), {}, "in_band of the statistics is not one list"),
        (replace(PLAIN, in_band=[[1.0], [1.0]]), {}, "the statistics have tables of different"),
        (replace(PLAIN, layers=["a", "a"]), {}, "no list of names, each once"),
    ],
)
def test_what_no_reader_would_take_is_not_written(tmp_path, statistics, numbers, message):
    writer = RecordWriter(tmp_path / "records.jsonl")
    with pytest.raises((TypeError, ValueError), match=message):
        writer.write("train", 1, statistics, **numbers)
    writer.close()
    assert steps_of(tmp_path) == []


def test_numbers_of_torch_and_numpy_are_written_as_numbers(tmp_path):
    numbers = {"loss": torch.tensor(1.5), "penalty": np.float32(0.25), "tokens": np.int64(512)}
    with RecordWriter(tmp_path / "records.jsonl") as writer:
        writer.write("train", np.int64(3), PLAIN, **numbers, huge=10**400)
    text = (tmp_path / "records.jsonl").read_text()
    assert '"step":3,"loss":1.5,"penalty":0.25,"tokens":512,"huge":null' in text
    assert read_records(tmp_path).lines[0]["loss"] == 1.5


def test_a_file_of_later_steps_is_not_written_into(tmp_path):
    path = tmp_path / "records.jsonl"
    write_steps(path, 1, 2, 3)
    with pytest.raises(ValueError, match=r"step is 1 but .* held step 3 .* write to another file"):
        write_steps(path, 1)
    assert steps_of(path) == [1, 2, 3]
    with RecordWriter(path, keep_until=0) as writer:
        writer.write("train", 1, PLAIN)
    assert steps_of(path) == [1]


def test_a_place_that_cannot_hold_records_is_named(tmp_path):
    for place in (tmp_path, tmp_path / "missing" / "records.jsonl"):
        with pytest.raises(FileNotFoundError, match="cannot be written; pass a file such as rec"):
            RecordWriter(place)
    with pytest.raises(TypeError, match=r"keep_until is 1\.5; pass a step, or None"):
        RecordWriter(tmp_path / "records.jsonl", keep_until=1.5)


@pytest.mark.parametrize("text", ["# Read me\n\nText.\n", "[1]\n", "\n"])
def test_a_file_of_something_else_is_named_as_such(text: str, tmp_path: Path) -> None:
    other = tmp_path / "README.md"
    other.write_text(text)
    with pytest.raises(RecordError, match=r"README\.md holds no records; pass a run"):
        read_records(other)


def test_a_broken_first_line_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path / "records.jsonl", 2)
    raw = (tmp_path / "records.jsonl").read_bytes()
    (tmp_path / "records.jsonl").write_bytes(b"\0" * 20 + b"\n" + raw)
    with pytest.raises(RecordError, match=r"line 1 of .* is not JSON; remove that line"):
        read_records(tmp_path / "records.jsonl")


@pytest.mark.parametrize("text", ['{"step": 5, "best": 0.1}', "my only copy", '{"version"', "\0\0"])
def test_only_what_may_be_a_torn_record_is_removed(text: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    if text.startswith('{"version"') or not text.strip("\0"):
        RecordWriter(path).close()
        assert path.read_bytes() == b""
        return
    with pytest.raises(RecordError, match=r"line 1 of .* is no record that was cut off"):
        RecordWriter(path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[4.0,4.0]", "[4.0]", "has tables of different heads"),
        ('["a","b"]', '["a","a"]', "lacks kind, step or layers"),
        ('"step":1', f'"step":{10**30}', "lacks kind, step or layers"),
        ("[3.0]", "[" * 20_000, "is not JSON"),
    ],
)
def test_lines_that_nobody_wrote_are_named(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "records.jsonl"
    write_steps(path, 1)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(RecordError, match=message):
        read_records(path)


def test_numbers_beyond_all_floats_are_not_known(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_steps(path, 1)
    text = path.read_text().replace('"loss":5.0', f'"loss":{10**400}').replace("3.0", "Infinity")
    path.write_text(text)
    (line,) = read_records(path).lines
    assert math.isnan(line["loss"])
    assert math.isnan(line.statistics.entropy[1][0])


def test_models_of_different_heads_need_files_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    more = [[1.0] * 3, [3.0]]
    write_steps(path, 1)
    write_steps(path, 2, statistics=HeadStatistics(["a", "b"], more, more, more))
    with pytest.raises(RecordError, match="has 2 and 3 heads of a; give each model a file"):
        read_records(path)
