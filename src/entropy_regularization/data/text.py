"""Text of the standard library, a file, a folder or glob, or a hub data set."""

import glob
import hashlib
import importlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

HELD_OUT_SHARE = 0.05
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "idlelib", "test", "tests"}


class DataError(ValueError):
    """Text that cannot be used; the sentence says what came, what was expected, what to do."""


class NotText(DataError):  # noqa: N818
    """A file that holds something else."""


class Document(NamedTuple):
    """One text and where it came from."""

    name: str
    text: str


class Text(NamedTuple):
    """Documents of one source.

    Attributes:
        documents: in the order of the source; none of them is blank.
        limited: whether the source holds more text than was read.
        found: files or rows of the source that were looked at.
        left_out: those among them that are not UTF-8 text, as pictures beside it are.
    """

    documents: list[Document]
    limited: bool = False
    found: int = 0
    left_out: int = 0


class Corpus(NamedTuple):
    """Documents to train on and others to measure perplexity on; no document is in both.

    Attributes:
        train: documents to train on.
        held_out: documents to measure perplexity on.
        text: both as they were read.
    """

    train: list[Document]
    held_out: list[Document]
    text: Text


def load_text(
    source: str, *, text_column: str = "text", limit_characters: int | None = None
) -> Text:
    """Read text.

    Args:
        source: "stdlib" (Python's own standard library source), "hf:NAME" (a hub data set or a
            local folder in its layout), a file, a folder, or a glob of files.
        text_column: the column of a hub data set that holds the text.
        limit_characters: stop after the document in which this many characters are reached; None
            reads everything.

    Raises:
        DataError: if nothing is there, or what is there is empty, not text, or cannot be read.
    """
    documents: Iterable[Document | None]
    if source == "stdlib":
        documents = _standard_library()
    elif source.startswith("hf:"):
        documents = _hub(source.removeprefix("hf:"), text_column)
    else:
        documents = _files(source)
    kept, limited = _limited(documents, limit_characters)
    texts = [document for document in kept if document is not None]
    filled = [document for document in texts if document.text.strip()]
    if not filled:
        raise DataError(f"{source} holds no text; pass a file, folder or glob with text in it.")
    return Text(filled, limited, len(kept), len(kept) - len(texts))


def load_corpus(
    source: str, *, text_column: str = "text", limit_characters: int | None = None
) -> Corpus:
    """Read text and split it, by document, into train and held-out.

    The split depends only on the documents' names, so that it is the same on every machine: a
    file is named by its place in the folder, or below what precedes a glob's first wildcard. A
    single document is cut: its last twentieth is held out.

    Args and errors are those of load_text.
    """
    text = load_text(source, text_column=text_column, limit_characters=limit_characters)
    return split(text)


def _limited(
    documents: Iterable[Document | None], limit: int | None
) -> tuple[list[Document | None], bool]:
    """Return the first documents, None for what is no text, and whether there are more."""
    kept: list[Document | None] = []
    size = 0
    for document in documents:
        if document is not None:
            if limit is not None and size >= limit:
                return kept, True
            size += len(document.text)
        kept.append(document)
    return kept, False


def split(text: Text) -> Corpus:
    """Split documents by a hash of their names; cut the longest if that parts nothing."""
    documents = text.documents
    held_out = [d for d in documents if _is_held_out(d.name)]
    if not held_out or len(held_out) == len(documents):
        # Too few documents for the hash to part them: cut the longest.
        longest = max(documents, key=lambda document: len(document.text))
        at = len(longest.text) - max(1, int(len(longest.text) * HELD_OUT_SHARE))
        rest = [document for document in documents if document is not longest]
        train = [*rest, Document(longest.name, longest.text[:at])]
        return Corpus(train, [Document(longest.name + " (end)", longest.text[at:])], text)
    return Corpus([d for d in documents if not _is_held_out(d.name)], held_out, text)


def _is_held_out(name: str) -> bool:
    # Python gives the bytes of a file name that are not UTF-8 as surrogates.
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )
    if not paths:
        raise DataError(
            f"no Python source lies in {root}; this Python was installed without its library "
            "source, pass --data with a file or folder of text."
        )
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few modules are written in another encoding on purpose
        yield Document(path.relative_to(root).as_posix(), text)


def _files(source: str) -> Iterator[Document | None]:
    """Yield the documents of a file, folder or glob, None for a file among others not of text."""
    path = Path(source)
    if path.is_file():
        yield Document(path.name, _read(path))
        return
    root = path
    if path.is_dir():
        found = sorted(each for each in _below(path) if each.is_file())
    else:
        root = _root(source)
        # several ** find a file several times
        found = sorted({Path(each) for each in glob.glob(source, recursive=True)})
        found = [each for each in found if each.is_file()]
    if not found and path.is_dir():
        raise DataError(f"no file is found in the folder {source}; pass one with text in it.")
    if not found:
        raise DataError(
            f"{source} is no file, folder or glob that matches a file; pass one, 'stdlib', or "
            "'hf:NAME' for a hub data set."
        )
    left_out = 0
    for each in found:
        try:
            yield Document(each.relative_to(root).as_posix(), _read(each))
        except NotText:
            left_out += 1
            yield None  # a folder may hold pictures beside its text
    if left_out == len(found):
        raise DataError(f"none of the {len(found)} files of {source} is UTF-8 text; pass text.")


def _below(folder: Path) -> Iterator[Path]:
    """Walk over the files of a folder and of those in it."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}); pass a folder whose folders can."
        )

    for inside, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(inside, name) for name in names)


def _root(pattern: str) -> Path:
    """Return the folder that all matches of a glob lie in, from which they are named."""
    before = re.match(r"([^*?[]|\[[*?[]\])*", pattern)  # up to a wildcard that is not escaped
    assert before is not None
    return Path(re.sub(r"\[(.)\]", r"\1", os.path.dirname(before[0])))


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); pass a readable file."
        ) from None
    if b"\0" in data:
        raise NotText(f"{path} is a binary file; pass UTF-8 text.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise NotText(f"{path} is not UTF-8 text; convert it first.") from None


def _hub(name: str, column: str) -> Iterable[Document]:
    if not name.strip():
        raise DataError(
            "hf: names no data set; pass hf:NAME, for instance hf:roneneldan/TinyStories."
        )
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f"hf:{name} needs the package datasets; install entropy-regularization[datasets]."
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"the data set {name} cannot be loaded ({first}); check its name and the network."
        ) from None
    for number, row in enumerate(rows):
        if column not in row:
            raise DataError(
                f"the data set {name} has no column {column!r} but {', '.join(row)}; pass "
                "--text-column."
            )
        yield Document(f"{name}/{number}", str(row[column]))
