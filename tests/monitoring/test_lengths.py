"""Entropy by the number of keys of a row, against plain loops over rows and against numpy."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import recording_of

from entropy_regularization.monitoring.lengths import LengthProfile, LengthSums, length_sums
from entropy_regularization.recording.recording import EntropyRecording, LayerEntropy


def rows_of(layer: LayerEntropy, head: int) -> list[tuple[int, float]]:
    """Keys and entropy of every row of a head that counts, one at a time."""
    allowed = layer.allowed_keys.expand_as(layer.entropy)
    return [
        (int(allowed[sample, head, query]), layer.entropy[sample, head, query].item())
        for sample, query in layer.rows.nonzero().tolist()
        if allowed[sample, head, query] > 0
    ]


def profile_of(*recordings: EntropyRecording) -> LengthProfile:
    sums = LengthSums({})
    for recording in recordings:
        sums = sums.plus(length_sums(recording))
    return sums.profile()


def layer_of(entropy: torch.Tensor, allowed: torch.Tensor) -> LayerEntropy:
    """One layer of a batch of one whose rows all count."""
    rows = torch.ones(1, entropy.shape[-1], dtype=torch.bool)
    return LayerEntropy("a", "self", entropy, allowed, rows, int(allowed.max()))


@settings(max_examples=25, deadline=None)
@given(
    heads=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    queries=st.integers(4, 40),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3),
)
def test_every_number_is_that_of_a_loop_over_rows(
    heads: list[int], queries: int, seeds: list[int]
) -> None:
    recordings = [recording_of(*heads, queries=queries, seed=seed) for seed in seeds]
    found = profile_of(*recordings)
    assert found.layers == [f"layer.{k}" for k in range(len(heads))]
    assert found.keys == [2**k for k in range(queries.bit_length())]
    for k, head in [(k, head) for k, count in enumerate(heads) for head in range(count)]:
        rows = [row for recording in recordings for row in rows_of(recording[k], head)]
        for octave, start in enumerate(found.keys):
            inside = [h for n, h in rows if start <= n < 2 * start]
            assert found.entropy[k][head][octave] == pytest.approx(np.mean(inside), rel=1e-6)
        logs, entropies = np.log([n for n, _ in rows]), np.array([h for _, h in rows])
        slope = np.polyfit(logs[logs > 0], entropies[logs > 0], 1)[0]
        assert found.growth[k][head] == pytest.approx(slope, rel=1e-6, abs=1e-6)
        assert found.deviation[k][head] == pytest.approx(entropies.std(), rel=1e-5)
    for k in range(len(heads)):
        counts = np.concatenate([[n for n, _ in rows_of(each[k], 0)] for each in recordings])
        for octave, start in enumerate(found.keys):
            inside = counts[(start <= counts) & (counts < 2 * start)]
            wanted = math.exp(np.log(inside).mean())
            assert found.typical_keys[k][octave] == pytest.approx(wanted, rel=1e-6)


def test_a_head_that_spreads_grows_by_one_and_one_of_eight_keys_by_nothing() -> None:
    allowed = torch.arange(1, 4097)
    spread = allowed.float().log()
    fixed = allowed.clamp(max=8).float().log()
    layer = layer_of(torch.stack([spread, fixed])[None], allowed.view(1, 1, -1))
    longer = replace(  # rows of eight keys and more alone
        layer, entropy=layer.entropy[..., 7:], allowed_keys=allowed[7:].view(1, 1, -1),
        rows=layer.rows[:, 7:],
    )  # fmt: skip
    ((one, nothing),) = profile_of(EntropyRecording([longer])).growth
    assert one == pytest.approx(1.0, abs=1e-5)
    assert nothing == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 2**24 + 1, 2**31 - 1])
def test_rows_of_one_length_have_an_octave_and_no_slope(count: int) -> None:
    allowed = torch.full((1, 1, 1000), count)
    entropy = torch.rand(1, 2, 1000, generator=torch.Generator().manual_seed(0))
    found = profile_of(EntropyRecording([layer_of(entropy, allowed)]))
    octave = count.bit_length() - 1
    assert len(found.keys) == octave + 1
    assert found.typical_keys[0][octave] == pytest.approx(count, rel=1e-9)
    assert all(math.isnan(slope) for slope in found.growth[0])
    assert all(math.isnan(x) for head in found.entropy[0] for x in head[:octave])


def test_octaves_begin_at_powers_of_two_exactly() -> None:
    starts = 2 ** torch.arange(31)
    allowed = torch.stack([starts, 2 * starts - 1]).T.reshape(1, 1, -1)
    entropy = torch.arange(62.0).view(1, 1, -1)
    (((*means,),),) = profile_of(EntropyRecording([layer_of(entropy, allowed)])).entropy
    assert means == [2 * k + 0.5 for k in range(31)]


def test_masks_of_every_head_and_sample_and_rows_without_a_key() -> None:
    generator = torch.Generator().manual_seed(1)
    allowed = torch.randint(0, 9, (2, 3, 50), generator=generator)
    entropy = torch.rand(2, 3, 50, generator=generator)
    rows = torch.rand(2, 50, generator=generator) < 0.7
    entropy = entropy.masked_fill(~rows[:, None], math.nan)  # which means leave out
    layer = LayerEntropy("a", "self", entropy, allowed, rows, 9)
    found = profile_of(EntropyRecording([layer]))
    for head, octave in itertools.product(range(3), range(4)):
        inside = [h for n, h in rows_of(layer, head) if 2**octave <= n < 2 ** (octave + 1)]
        assert found.entropy[0][head][octave] == pytest.approx(np.mean(inside), rel=1e-6)


def test_other_heads_under_one_name_and_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer\.0 was recorded with 2 and with 3 heads"):
        length_sums(recording_of(2)).plus(length_sums(recording_of(3)))
    with pytest.raises(ValueError, match="there are no rows"):
        LengthSums({}).profile()
    with pytest.raises(TypeError, match="recording is a int; pass the EntropyRecording"):
        length_sums(3)  # type: ignore[arg-type]
