"""Train a small GPT-2 with the calibrated entropy penalty, in a plain PyTorch loop.

    python examples/train_with_penalty.py --output runs/example
    entropy-reg report runs/example

`regularize` puts the penalty into the loss that the model returns, so the loop is an ordinary one.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_regularization import EntropyMonitor, EntropyRegularization
from entropy_regularization.data.text import DataError, load_corpus
from entropy_regularization.data.tokenization import TokenBlocks, train_tokenizer
from entropy_regularization.integrations.transformers import regularize
from entropy_regularization.monitoring.records import RecordWriter
from entropy_regularization.monitoring.report import write_report
from entropy_regularization.monitoring.statistics import Band
from entropy_regularization.thresholds import HeadThresholds, without_weight_decay


def main(arguments: list[str] | None = None) -> None:
    """Train, write a record per step, and end with a page about the heads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/example"))
    parser.add_argument("--data", default="stdlib", help="'stdlib', a file, a folder or a glob")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--context-length", type=int, default=128)
    options = parser.parse_args(arguments)
    if options.output.exists():
        parser.error(f"--output {options.output} is there already; choose another one.")
    if options.steps < 1 or options.context_length < 2:
        parser.error(
            f"--steps {options.steps} and --context-length {options.context_length}: pass at least "
            "1 step and 2 tokens in a context."
        )
    torch.manual_seed(0)

    try:
        corpus = load_corpus(options.data, limit_characters=2_000_000)
        tokenizer = train_tokenizer(corpus.train, 1024)
        blocks = TokenBlocks(tokenizer, corpus.train, options.context_length)
    except DataError as error:
        parser.error(f"--data {options.data}: {error}")
    options.output.mkdir(parents=True)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=options.context_length,
            n_embd=128,
            n_layer=4,
            n_head=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )

    regularization = EntropyRegularization.calibrated(loss_coeff=1.0)
    thresholds = HeadThresholds(layers=4, heads=4, initial=0.5)
    regularized = regularize(model, regularization, thresholds=thresholds)
    optimizer = torch.optim.AdamW(without_weight_decay(model, 0.01), lr=1e-3)
    monitor = EntropyMonitor(Band.of(regularization, thresholds))

    with RecordWriter(options.output / "records.jsonl") as records:
        for step, ids in zip(range(1, options.steps + 1), _batches(blocks), strict=False):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.update(regularized.recording)
            statistics = monitor.summary()
            monitor.reset()
            loss, penalty = regularized.loss.item(), regularized.added.item()
            records.write("train", step, statistics, loss=loss, penalty=penalty)
            if step % 10 == 0:
                classes = statistics.classify()
                print(f"step {step}: loss {loss:.3f}, penalty {penalty:.4f}, {classes}")
    print(write_report(options.output))


def _batches(blocks: TokenBlocks) -> Iterator[torch.Tensor]:
    while True:
        for batch in DataLoader(blocks, batch_size=8, shuffle=True):
            yield batch["input_ids"]


if __name__ == "__main__":
    main()
