"""The work behind entropy-reg analyse: models, a text, numbers, a page."""

import dataclasses
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from entropy_regularization.cli.console import PlainConsole
from entropy_regularization.cli.errors import RunProblem, UsageProblem
from entropy_regularization.cli.evaluation import perplexity_of, read_through
from entropy_regularization.cli.files import write_json
from entropy_regularization.cli.loading import (
    Saved,
    has_position_table,
    load_as_saved,
    positions_of,
    what_is_saved,
)
from entropy_regularization.cli.models import check_tokens, try_out
from entropy_regularization.cli.preparation import tell_of_text
from entropy_regularization.cli.surroundings import surroundings
from entropy_regularization.data.text import DataError, Document, load_text, split
from entropy_regularization.data.tokenization import Frame, TokenBlocks, frame_of
from entropy_regularization.monitoring.analysis import (
    Analysis,
    entropy_by_keys,
    figures_of,
    short_names,
)
from entropy_regularization.monitoring.analysis_page import write_page
from entropy_regularization.monitoring.lengths import LengthSums, length_sums
from entropy_regularization.monitoring.monitor import EntropyMonitor
from entropy_regularization.monitoring.plots import save_heatmaps
from entropy_regularization.monitoring.tables import counted

VERSION = 1  # of analysis.json
FILES = ("analysis.json", "heatmaps.png", "report.html")
LONGEST = 1024  # tokens of a context, unless more are asked for
SAY_EVERY = 30.0  # seconds, where there is no terminal to show a bar on


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is read of a text, and how; the options of entropy-reg analyse."""

    data: str
    text_column: str
    text_limit: int
    held_out: bool
    context_length: int
    contexts: int
    batch_size: int
    dtype: str
    device: str
    no_perplexity: bool

    def documents(self, console: Console) -> list[Document]:
        """Read the text.

        Raises:
            UsageProblem: if it cannot be read.
        """
        if not self.data.strip():
            raise UsageProblem("--data is empty; pass a file, a folder, a glob, or leave it out.")
        console.print(f"reading {self.data}")
        try:
            text = load_text(
                self.data,
                text_column=self.text_column,
                limit_characters=self.text_limit * 1_000_000,
            )
        except DataError as error:
            raise UsageProblem(f"--data {self.data}: {error}") from error
        tell_of_text(text, self.text_limit, console)
        return split(text).held_out if self.held_out else text.documents


def analyse_models(names: Sequence[str], options: dict[str, Any], output: Path | None) -> None:
    """Measure models on the same text, print what was found, and write it into a folder.

    Args:
        names: folders or names of the hub.
        options: what is read; device and context_length may be None.
        output: the folder; None writes nothing.

    Raises:
        UsageProblem: if options do not fit together, the models or the text.
        RunProblem: if a model cannot be used; what was found of those before it is written.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = PlainConsole()
    if len(set(names)) < len(names):
        raise UsageProblem("--model names one model twice; name it once.")
    device = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    saved = [what_is_saved(name) for name in names]  # a later one may be mistyped
    length = options["context_length"] or _common_length(saved)
    reading = Reading(**options | {"device": device, "context_length": length})
    was_there = output is None or output.exists()
    analyses: list[Analysis] = []
    try:
        if output is not None:
            _make_folder(output)
        documents = reading.documents(console)
        for each in saved:
            analyses.append(_analyse(each, reading, documents, console))
            if output is not None:
                _write_numbers(output, analyses, reading)
    finally:
        if analyses:  # those before the one that failed, too
            console.print(_table(analyses))
        elif output is not None and not was_there:
            with suppress(OSError):  # it could not be made
                output.rmdir()
    if output is not None:
        with _writing_in_words(output):
            _write_pictures(output, analyses, reading)
        console.print(f"the page about it: {output / 'report.html'}")


def _common_length(saved: Sequence[Saved]) -> int:
    """Choose the length of the contexts: a power of two that all models have positions for."""
    told = (getattr(each.config, "max_position_embeddings", None) for each in saved)
    least = min([LONGEST, *(n for n in told if isinstance(n, int) and n > 1)])
    return 1 << (least.bit_length() - 1)


def _check_device(device: str) -> None:
    """Refuse a device that is not there."""
    try:
        torch.empty(0, device="cpu" if device == "auto" else device)
    except (RuntimeError, AssertionError, NotImplementedError):  # of torch without CUDA, of others
        raise UsageProblem(
            f"--device {device} is not there; pass cpu, another device, or auto, or leave it out."
        ) from None


def _make_folder(folder: Path) -> None:
    """Make the folder, or refuse it, before anything is measured."""
    if folder.exists() and not folder.is_dir():
        raise UsageProblem(f"--output {folder} is a file; pass a folder.")
    with _writing_in_words(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = (each.name.removesuffix(".new") for each in folder.iterdir())  # of one interrupted
        others = [name for name in names if name not in FILES]
        if others:
            raise UsageProblem(
                f"--output {folder} holds something else ({sorted(others)[0]}); pass a folder of "
                "its own."
            )
    if not os.access(folder, os.W_OK):
        raise RunProblem(f"--output {folder} cannot be written to; make access, or pass another.")


def _analyse(
    saved: Saved, reading: Reading, documents: Sequence[Document], console: Console
) -> Analysis:
    """Load a model and read the text with it."""
    name = saved.name
    with _memory_in_words():
        model, tokenizer = load_as_saved(saved, dtype=reading.dtype, device=reading.device)
        _, is_causal = try_out(model, name)
        predicts = is_causal and type(model).can_generate() and not reading.no_perplexity
        blocks = _blocks(reading, tokenizer, documents, frame_of(tokenizer), causal=is_causal)
        check_tokens(name, model, blocks)
        _check_length(reading, model, name, console)
        if predicts:
            _check_memory(reading, model)
        console.print(
            f"{name}: {type(model).__name__}, {counted(len(blocks), 'context')} of "
            f"{reading.context_length:,} tokens"
        )
        monitor, lengths, losses = EntropyMonitor(), LengthSums({}), []
        batches = read_through(model, blocks, reading.batch_size, predicts=predicts)
        batches = _shown(batches, math.ceil(len(blocks) / reading.batch_size), console)
        with _reading_in_words(reading, model, name):
            for ids, loss, recording in batches:
                monitor.update(recording)
                lengths = lengths.plus(length_sums(recording))
                losses.append(loss * len(ids))
                _check_numbers(model, name, lengths, loss if predicts else 0.0)
    return Analysis(
        name,
        type(model).__name__,
        model.num_parameters(),
        len(blocks),
        monitor.summary(),
        lengths.profile(),
        perplexity_of(math.fsum(losses) / len(blocks)),
    )


def _blocks(
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    frame: Frame,
    *,
    causal: bool,
) -> torch.Tensor:
    """Cut the text into contexts; what a tokenizer puts at the end is for those who see it."""
    if causal:
        frame = Frame(frame.before, [])
    try:
        found = TokenBlocks(tokenizer, documents, reading.context_length, reading.contexts, frame)
    except DataError as error:
        raise UsageProblem(f"--data {reading.data}: {error}") from error
    return found.blocks


def _check_length(reading: Reading, model: PreTrainedModel, name: str, console: Console) -> None:
    """Refuse contexts that a model has no positions for; tell of those longer than it has seen."""
    longest = positions_of(model)
    if longest is None or reading.context_length <= longest:
        return
    if has_position_table(model):
        raise UsageProblem(
            f"--context-length {reading.context_length} is longer than the {longest} positions of "
            f"{name}; pass at most {longest}."
        )
    console.print(f"{name} was made for contexts of at most {longest:,} tokens")


def _check_numbers(model: PreTrainedModel, name: str, lengths: LengthSums, loss: float) -> None:
    """Refuse NaN, which means over heads would leave out; float16 ends at 65504."""
    broken = [layer for layer, sums in lengths.layers.items() if not sums[2].isfinite().all()]
    if math.isnan(loss):
        broken.append("its logits")
    if not broken:
        return
    dtype = str(model.dtype).removeprefix("torch.")
    todo = "pass one that was saved before it diverged"
    raise RunProblem(
        f"--model {name} gives NaN in {dtype}, first in {broken[0]}; "
        f"{todo if dtype == 'float32' else 'pass --dtype float32'}."
    )


@contextmanager
def _reading_in_words(reading: Reading, model: PreTrainedModel, name: str) -> Iterator[None]:
    """Turn what a model raises of a context that is too long for it, or unseen, into a sentence."""
    try:
        yield
    except ValueError as error:
        raise RunProblem(f"--model {name}: {error}") from error
    except (IndexError, RuntimeError) as error:
        longest = positions_of(model)
        fits = longest is None or reading.context_length <= longest
        if isinstance(error, torch.OutOfMemoryError) or fits:
            raise
        raise UsageProblem(
            f"--context-length {reading.context_length} is longer than the {longest} positions of "
            f"{name}, which cannot read on; pass at most {longest}."
        ) from error


def _check_memory(reading: Reading, model: PreTrainedModel) -> None:
    """Refuse logits that cannot fit into the memory of the machine, which would end the process."""
    if model.device.type != "cpu" or not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    vocabulary = model.config.get_text_config().vocab_size
    needed = 3 * 4 * reading.batch_size * reading.context_length * vocabulary
    if needed > memory / 2:
        raise UsageProblem(
            f"the logits of {reading.batch_size} contexts of {reading.context_length:,} tokens "
            f"need {needed / 1e9:,.0f} GB; this machine has {memory / 1e9:,.0f} GB. Add "
            "--no-perplexity, or pass a smaller --batch-size or --context-length."
        )


@contextmanager
def _memory_in_words() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunProblem(
            "the GPU ran out of memory; lower --batch-size or --context-length, add "
            "--no-perplexity, or pass --device auto."
        ) from error


def _shown(batches: Iterable[Any], total: int, console: Console) -> Iterator[Any]:
    """Show how far the reading is: a bar on a terminal, now and then a line elsewhere."""
    if console.is_terminal:
        yield from track(batches, "", total, console=console, transient=True)
        return
    said = time.monotonic()
    for done, batch in enumerate(batches, 1):
        yield batch
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            console.print(f"{done}/{total}")


def _table(analyses: Sequence[Analysis]) -> Table:
    table = Table(caption="means over all heads")
    table.add_column("")
    for name in short_names([found.name for found in analyses]):
        table.add_column(name, justify="right")
    for label, cells in figures_of(analyses):
        table.add_row(label, *cells)
    table.add_section()
    table.add_row("mean entropy of rows that see")
    for label, cells in entropy_by_keys(analyses):
        table.add_row(f"  {label} {'key' if label == '1' else 'keys'}", *cells)
    return table


def _write_numbers(folder: Path, analyses: Sequence[Analysis], reading: Reading) -> None:
    content = {
        "version": VERSION,
        "options": dataclasses.asdict(reading),
        "models": [found.as_dict() for found in analyses],
        **surroundings(),
    }
    with _writing_in_words(folder):
        write_json(folder / "analysis.json", content)
        for picture in FILES[1:]:  # of an earlier analysis, whose numbers are gone
            (folder / picture).unlink(missing_ok=True)


@contextmanager
def _writing_in_words(folder: Path) -> Iterator[None]:
    """Turn what the system says of a full disk or a forbidden place into a sentence."""
    try:
        yield
    except OSError as error:
        raise RunProblem(
            f"--output {folder} cannot be written to ({error.strerror or error}); make room or "
            "access, or pass another folder."
        ) from error


def _write_pictures(folder: Path, analyses: Sequence[Analysis], reading: Reading) -> None:
    """Write heat-maps and the page."""
    first = analyses[0].statistics.utilisation
    shapes = [[len(row) for row in found.statistics.utilisation] for found in analyses]
    second = analyses[1].statistics.utilisation if shapes[1:] == shapes[:1] else None
    save_heatmaps(
        folder / "heatmaps.png",
        first,
        second,
        quantity="mean H / log n",
        maximum=1.0,
        title="Entropy of every head, as a share of what its rows can reach",
        names=tuple(short_names([found.name for found in analyses])[:2]),
    )
    ran_on = surroundings()
    write_page(
        analyses,
        folder / "report.html",
        extent=f"Contexts of {reading.context_length:,} tokens of {reading.data}.",
        options={k: str(v) for k, v in dataclasses.asdict(reading).items()},
        environment={k: str(v) for part in ran_on.values() for k, v in part.items()},
    )
