"""Tokenizers trained on the spot, and text cut into blocks of tokens."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from entropy_regularization.checks import check_positive_integer
from entropy_regularization.data.text import DataError, Document

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(documents: Sequence[Document], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which has no unknown token.

    Args:
        documents: the text to learn merges from.
        vocabulary: how many tokens to end with; at least 257.

    Returns:
        A tokenizer that ``save_pretrained`` and ``AutoTokenizer.from_pretrained`` understand.

    Raises:
        DataError: if the vocabulary is too small for the bytes.
    """
    if vocabulary < 257:
        raise DataError(
            f"a byte-level vocabulary of {vocabulary} cannot hold the 256 bytes and the end of "
            "text; pass at least 257."
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


class Frame(NamedTuple):
    """The tokens that a tokenizer puts around a text, which its model has never been without.

    Attributes:
        before: for instance the token of the beginning (Llama, Gemma) or ``[CLS]``.
        after: for instance ``[SEP]``.
    """

    before: list[int]
    after: list[int]


NO_FRAME = Frame([], [])


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Return what a tokenizer puts around a text."""
    framed = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        end = start + len(bare)
        if framed[start:end] == bare:
            return Frame(framed[:start], framed[end:])
    return NO_FRAME


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Blocks of one length, cut from documents joined by the end-of-text token.

    Args:
        tokenizer: what turns text into ids.
        documents: the text.
        length: tokens in a block.
        limit: keep at most this many blocks, evenly spaced over the text; None keeps all.
        frame: tokens around every block, which count into its length.

    Raises:
        TypeError: if length or limit is no integer.
        ValueError: if length or limit is below 1.
        DataError: if the text is shorter than one block, or the frame is as long.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        documents: Sequence[Document],
        length: int,
        limit: int | None = None,
        frame: Frame = NO_FRAME,
    ) -> None:
        length = check_positive_integer("length", length)
        if limit is not None:
            limit = check_positive_integer("limit", limit)
        around = len(frame.before) + len(frame.after)
        if (inside := length - around) < 1:
            raise DataError(
                f"a context of {length} holds no text beside the {around} tokens that the "
                "tokenizer puts around it; pass a larger --context-length."
            )
        end = tokenizer.eos_token_id
        chunks: list[Tensor] = []  # a list of integers would take several times the memory
        texts = [document.text for document in documents]
        for start in range(0, len(texts), 256):
            batch = tokenizer(texts[start : start + 256], add_special_tokens=False, verbose=False)
            for row in batch["input_ids"]:
                chunks.append(torch.tensor(row if end is None else [*row, end], dtype=torch.int64))
        ids = torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.int64)
        count = len(ids) // inside
        if count == 0:
            raise DataError(
                f"the text has {len(ids)} tokens, fewer than one context of {length}; pass more "
                "text or a smaller --context-length."
            )
        blocks = ids[: count * inside].view(count, inside)
        if limit is not None and count > limit:
            blocks = blocks[torch.linspace(0, count - 1, limit).long()]
        before, after = (ids.new_tensor(tokens).expand(len(blocks), -1) for tokens in frame)
        self.blocks = torch.cat([before, blocks, after], dim=1)

    @property
    def crc32(self) -> int:
        """CRC-32 of all tokens, as little-endian integers of eight bytes."""
        return zlib.crc32(self.blocks.numpy().astype("<i8", copy=False).data)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one block as a language-model example."""
        block = self.blocks[index]
        return {"input_ids": block, "labels": block}
