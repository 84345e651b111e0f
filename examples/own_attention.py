"""Attention of one's own with an entropy penalty: no transformers, no recording.

    python examples/own_attention.py

A causal attention layer learns to copy the token before; a penalty keeps its heads from collapsing.
"""

import torch
from torch import Tensor, nn

from entropy_regularization import attention_with_entropy


class CausalAttention(nn.Module):
    """Causal self-attention that also returns what share of its maximum each entropy is."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attend: [batch, length, width] -> the same, and [batch, heads, length - 1]."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.project(x).chunk(3, dim=-1)
        )
        result = attention_with_entropy(query, key, value, causal=True)
        # the first row sees one key: its entropy is 0 of at most 0
        share = result.entropy[..., 1:] / result.allowed_keys[..., 1:].log()
        return self.out(result.output.transpose(1, 2).flatten(2)), share


def train(coefficient: float, steps: int) -> tuple[float, float]:
    """Return the final loss and the smallest mean share of a head."""
    torch.manual_seed(0)
    embed, attention, read = nn.Embedding(16, 32), CausalAttention(32, 4), nn.Linear(32, 16)
    place = nn.Parameter(torch.randn(24, 32))
    modules = nn.ModuleList([embed, attention, read])
    optimizer = torch.optim.Adam([*modules.parameters(), place], lr=1e-2)
    for _ in range(steps):
        ids = torch.randint(16, (32, 24))
        hidden, share = attention(embed(ids) + place)
        loss = nn.functional.cross_entropy(read(hidden)[:, 1:].flatten(0, 1), ids[:, :-1].flatten())
        penalty = (0.3 - share).clamp(min=0).square().mean()
        (loss + coefficient * penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item(), share.mean((0, 2)).min().item()


def main(steps: int = 300) -> None:
    """Train without and with the penalty."""
    for coefficient in (0.0, 5.0):
        loss, share = train(coefficient, steps)
        print(f"penalty x {coefficient:4.1f}: loss {loss:.3f}, lowest head at {share:.0%}")


if __name__ == "__main__":
    main()
