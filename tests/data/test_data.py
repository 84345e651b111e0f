"""Text sources, their split, tokenizers trained on the spot, blocks of tokens."""

import errno
import glob
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from entropy_regularization.data.text import (
    DataError,
    Document,
    Text,
    load_corpus,
    load_text,
    split,
)
from entropy_regularization.data.tokenization import (
    END_OF_TEXT,
    NO_FRAME,
    Frame,
    TokenBlocks,
    frame_of,
    train_tokenizer,
)


def test_standard_library_is_split_by_file() -> None:
    corpus = load_corpus("stdlib")
    train, held_out = ({d.name for d in part} for part in (corpus.train, corpus.held_out))
    assert "json/decoder.py" in train | held_out
    assert not train & held_out
    assert len(held_out) > 10
    assert sum(len(d.text) for d in corpus.train) > 5_000_000
    assert load_corpus("stdlib") == corpus


def test_folder_glob_and_file(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"text number {number}")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    folder = load_corpus(str(tmp_path))
    assert len(folder.train) + len(folder.held_out) == 60
    assert 0 < len(folder.held_out) < 15
    assert (folder.text.found, folder.text.left_out) == (61, 1)
    some = load_corpus(str(tmp_path / "1*.txt"))
    assert len(some.train) + len(some.held_out) >= 11
    one = load_corpus(str(tmp_path / "7.txt"))
    assert one.train[0].text + one.held_out[0].text == "text number 7"


def test_a_glob_with_several_wildcards_for_folders_reads_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "text.txt").write_text("text number 7")
    corpus = load_corpus(f"{tmp_path}/**/**/*.txt")  # which glob.glob finds three times
    assert corpus.text.found == 1
    (train,), (held_out,) = corpus.train, corpus.held_out  # nothing is in both
    assert train.text + held_out.text == "text number 7"


def test_equal_names_in_several_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "a [1]*"
    for number in range(60):
        folder = base / "same" / f"part{number}"
        folder.mkdir(parents=True)
        (folder / "text.txt").write_text(f"text number {number}")
    monkeypatch.chdir(base)
    whole = load_corpus("same")
    assert 0 < len(whole.held_out) < 15
    escaped = glob.escape(str(base))
    for pattern in ("same/*/text.txt", "./same/p*/t*.txt", f"{escaped}/same/**/*.txt"):
        some = load_corpus(pattern)
        assert (some.train, some.held_out) == (whole.train, whole.held_out)
    assert {d.name for d in load_corpus("*/part[12]/text.txt").train} == {
        "same/part1/text.txt",
        "same/part2/text.txt",
    }


def test_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for name in ("a", "b"):
        (tmp_path / name).write_text("to be or not to be")
    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    for source in (tmp_path, tmp_path / "?", tmp_path / "a"):
        with pytest.raises(DataError, match=r"/a cannot be read \(Permission denied\); pass a re"):
            load_corpus(str(source))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    (tmp_path / "closed").mkdir()
    (tmp_path / "text").write_text("to be or not to be")
    monkeypatch.setattr(os, "scandir", refuse)  # root may list everything
    with pytest.raises(DataError, match=r"/closed cannot be read \(Permission denied\); pass a fo"):
        load_corpus(str(tmp_path))


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / os.fsdecode(b"\xe4%d.txt" % number)).write_text(f"text number {number}")
    corpus = load_corpus(str(tmp_path))
    assert len(corpus.train) + len(corpus.held_out) == 60
    assert 0 < len(corpus.held_out) < 15


def test_places_without_files(tmp_path: Path) -> None:
    (tmp_path / "empty" / "below").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"no file is found in the folder .*/empty; pass one with t"
    ):
        load_corpus(str(tmp_path / "empty"))
    for source in ("nowhere", "emp*"):
        with pytest.raises(DataError, match="is no file, folder or glob that matches a file; pass"):
            load_corpus(str(tmp_path / source))


def test_single_document_is_cut_at_its_end() -> None:
    corpus = split(Text([Document("a", "x" * 1000)]))
    assert len(corpus.train[0].text) == 950
    assert len(corpus.held_out[0].text) == 50


def test_text_that_is_not_split_is_whole_and_in_order(tmp_path: Path) -> None:
    words = "to be or not to be, " * 40
    (tmp_path / "b.txt").write_text(words)
    assert load_text(str(tmp_path / "b.txt")).documents == [Document("b.txt", words)]
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    found = load_text(str(tmp_path))
    assert [document.name for document in found.documents] == ["b.txt"]
    assert (found.found, found.left_out, found.limited) == (3, 1, False)


def test_no_more_text_than_asked_for(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("x" * 100)
    some = load_corpus(str(tmp_path), limit_characters=1050)
    read = sum(len(document.text) for document in (*some.train, *some.held_out))
    assert read == 1100  # the document in which the limit falls is kept whole
    assert some.text.limited
    assert not load_corpus(str(tmp_path), limit_characters=3000).text.limited


def test_no_more_files_are_read_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(path: Path) -> bytes:
        read.append(path.name)
        with path.open("rb") as file:
            return file.read()

    read: list[str] = []
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("x" * 100)
    monkeypatch.setattr(Path, "read_bytes", count)
    for source in (tmp_path, tmp_path / "*.txt"):
        assert load_corpus(str(source), limit_characters=150).text.limited
        assert read == ["0.txt", "1.txt", "2.txt"]  # the third shows that there are more
        read.clear()


def test_hub_data_set_from_a_local_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    lines = [json.dumps({"content": f"def f{n}(): return {n}"}) for n in range(80)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    corpus = load_corpus(f"hf:{tmp_path}", text_column="content")
    assert len(corpus.train) + len(corpus.held_out) == 80
    with pytest.raises(DataError, match="has no column 'text' but content"):
        load_corpus(f"hf:{tmp_path}")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"entropy-regularization\[datasets\]"):
        load_corpus("hf:some/name")


def test_tokenizer_is_lossless_and_loads_again(tmp_path: Path) -> None:
    words = "def grüße(x):\n\treturn '東京' + x  # \N{SNOWMAN}\n"
    tokenizer = train_tokenizer([Document("a", words * 20)], 300)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    ids = again(words).input_ids
    assert again.decode(ids) == words
    assert len(again) <= 300
    assert again.eos_token == END_OF_TEXT
    with pytest.raises(DataError, match="256 bytes"):
        train_tokenizer([Document("a", words)], 100)


def test_blocks_keep_every_token_in_order() -> None:
    documents = [Document(str(n), f"document {n} ") for n in range(20)]
    tokenizer = train_tokenizer(documents, 260)
    blocks = TokenBlocks(tokenizer, documents, 8)
    ids = []
    for document in documents:
        ids += [*tokenizer(document.text).input_ids, tokenizer.eos_token_id]
    assert torch.equal(blocks.blocks.flatten(), torch.tensor(ids[: len(blocks) * 8]))
    assert len(TokenBlocks(tokenizer, documents, 8, limit=3)) == 3
    with pytest.raises(DataError, match="fewer than one context of 100000"):
        TokenBlocks(tokenizer, documents, 100_000)
    with pytest.raises(DataError, match="the text has 0 tokens, fewer than one context of 8"):
        TokenBlocks(tokenizer, [], 8)
    for length, limit, name in ((0, None, "length is 0"), (8, 0, "limit is 0")):
        with pytest.raises(ValueError, match=f"{name}; pass a positive integer"):
            TokenBlocks(tokenizer, documents, length, limit)


def test_blocks_begin_and_end_as_the_tokenizer_begins_and_ends_a_text() -> None:
    documents = [Document(str(n), f"document {n} ") for n in range(20)]
    tokenizer = train_tokenizer(documents, 260)
    assert frame_of(tokenizer) == NO_FRAME
    bare = TokenBlocks(tokenizer, documents, 6).blocks
    first, second, last = 1, 2, 3
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<1> <2> $A <3>", special_tokens=[("<1>", first), ("<2>", second), ("<3>", last)]
    )
    frame = frame_of(tokenizer)
    assert frame == Frame([first, second], [last])
    framed = TokenBlocks(tokenizer, documents, 9, frame=frame).blocks
    assert framed.shape[1] == 9
    assert torch.equal(framed[:, 2:-1], bare)
    assert framed[:, :2].tolist() == [[first, second]] * len(bare)
    assert framed[:, -1].tolist() == [last] * len(bare)
    with pytest.raises(DataError, match="a context of 3 holds no text beside the 3 tokens that"):
        TokenBlocks(tokenizer, documents, 3, frame=frame)
