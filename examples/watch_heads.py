"""Look at the attention heads of a checkpoint on a text: a table of classes and a heat-map.

    python examples/watch_heads.py --model gpt2 --text my.txt --picture heads.png

No attention matrix is stored, so the text may be as long as the model takes.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from entropy_regularization import EntropyMonitor, record_entropy
from entropy_regularization.monitoring.plots import save_heatmaps


def main(arguments: list[str] | None = None) -> None:
    """Print one line per layer and draw the map."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2", help="a folder or a hub name")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--picture", type=Path, default=Path("heads.png"))
    options = parser.parse_args(arguments)
    if options.picture.is_dir() or not options.picture.parent.is_dir():
        parser.error(
            f"--picture {options.picture} is no file in a folder that is there; pass another place."
        )

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModel.from_pretrained(options.model).eval()
    longest = getattr(model.config, "max_position_embeddings", None) or options.length
    if not 0 < options.length <= longest:
        parser.error(
            f"--length {options.length} is not between 1 and the {longest} positions of "
            f"{options.model}; pass one that is."
        )
    try:
        text = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--text {options.text} cannot be read ({error}); pass a file in UTF-8.")
    if not text.strip():
        parser.error(f"--text {options.text} is empty; pass a file with text in it.")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]

    monitor = EntropyMonitor()
    for window in ids.split(options.length, dim=1):
        with torch.no_grad(), record_entropy(model, gradient=False) as recording:
            model(input_ids=window)
        monitor.update(recording)

    statistics = monitor.summary()
    for name, heads in zip(statistics.layers, statistics.utilisation, strict=True):
        print(name, " ".join(f"{share:4.0%}" for share in heads))
    print(statistics.classify())
    print(save_heatmaps(options.picture, statistics.entropy))


if __name__ == "__main__":
    main()
