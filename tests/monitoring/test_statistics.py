"""Statistics of heads against plain loops over rows."""

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import expected_of, recording_of
from torch import distributed, multiprocessing

from entropy_regularization.monitoring.monitor import EntropyMonitor
from entropy_regularization.monitoring.statistics import (
    Band,
    HeadClasses,
    HeadStatistics,
    HeadSums,
    flatten,
    head_statistics,
    head_sums,
)
from entropy_regularization.recording.recording import EntropyRecording, LayerEntropy
from entropy_regularization.regularization import EntropyRegularization
from entropy_regularization.thresholds import HeadThresholds


@pytest.mark.parametrize("heads", [(1,), (3, 3), (2, 5, 1)])
def test_every_statistic_equals_a_loop_over_rows(heads):
    recording = recording_of(*heads)
    initial = torch.linspace(0.4, 0.7, len(heads) * max(heads)).view(len(heads), -1)
    thresholds = HeadThresholds(len(heads), max(heads), initial=initial)
    statistics = head_statistics(recording, Band(thresholds, tolerance=0.25))
    assert statistics.layers == [f"layer.{k}" for k in range(len(heads))]
    for k, layer in enumerate(recording):
        for head in range(heads[k]):
            theta = initial[k, head].item()
            wanted = expected_of(layer, head, theta, 0.25)
            assert statistics.entropy[k][head] == pytest.approx(wanted.entropy, rel=1e-6)
            assert statistics.reachable_maximum[k][head] == pytest.approx(wanted.maximum, rel=1e-6)
            assert statistics.utilisation[k][head] == pytest.approx(wanted.utilisation, rel=1e-6)
            assert statistics.in_band[k][head] == pytest.approx(wanted.in_band, rel=1e-6)
            assert statistics.threshold[k][head] == pytest.approx(theta, rel=1e-6)


def test_context_maximum_counts_every_row_against_one_logarithm():
    recording = recording_of(2)
    layer = recording[0]
    for size in (None, 64):
        band = Band(0.3, tolerance=0.2, maximum="context", context_size=size)
        share = layer.entropy.detach() / math.log(size or layer.keys)
        rows = layer.rows[:, None].expand_as(share)
        inside = (share - 0.3).abs() <= 0.2
        wanted = [float(inside[:, h][rows[:, h]].float().mean()) for h in range(2)]
        assert head_statistics(recording, band).in_band[0] == pytest.approx(wanted)


@pytest.mark.parametrize(
    "regularization", [EntropyRegularization, EntropyRegularization.calibrated]
)
def test_the_band_of_a_regularization_is_where_it_penalises_nothing(regularization):
    layer = recording_of(3, queries=7)[0]
    chosen = regularization(1.0, 0.15)
    assert Band.of(chosen) == Band.of(chosen, 0.5)
    inside = head_statistics(EntropyRecording([layer]), Band.of(chosen)).in_band[0]
    rows = layer.rows.nonzero().tolist()
    for head, share in enumerate(inside):
        free, counted = 0, 0
        for sample, query in rows:
            one = LayerEntropy(
                "one",
                "self",
                layer.entropy[sample, head, query].view(1, 1, 1),
                layer.allowed_keys[:, :, query : query + 1],
                torch.ones(1, 1, dtype=torch.bool),
                layer.keys,
            )
            if chosen.maximum == "context" or query > 0:
                counted += 1
                free += chosen(EntropyRecording([one]), thresholds=0.5).item() == 0
        assert share == pytest.approx(free / counted)


def test_without_a_band_there_is_no_share_and_no_threshold():
    statistics = head_statistics(recording_of(2))
    assert statistics.in_band is None
    assert statistics.threshold is None


def test_calls_of_one_layer_are_merged_by_name():
    first, second = recording_of(3, seed=1)[0], recording_of(3, seed=2)[0]
    merged = head_statistics(EntropyRecording([first, second]), Band([[0.2] * 3, [0.6] * 3]))
    apart = [head_statistics(EntropyRecording([c])).entropy[0] for c in (first, second)]
    assert merged.layers == ["layer.0"]
    assert merged.entropy[0] == pytest.approx([(a + b) / 2 for a, b in zip(*apart, strict=True)])
    assert merged.threshold[0] == pytest.approx([0.4] * 3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_window_of_steps_equals_one_large_batch(batches):
    parts = [recording_of(2, 1, batch=2, seed=k).detach() for k in batches]
    monitor = EntropyMonitor(Band(0.5, tolerance=0.2))
    for part in parts:
        monitor.update(part)
    whole = head_statistics(EntropyRecording.concatenate(parts), monitor.band)
    for name in ("entropy", "reachable_maximum", "utilisation", "in_band", "threshold"):
        got, wanted = getattr(monitor.summary(), name), getattr(whole, name)
        assert flatten(got) == pytest.approx(flatten(wanted), rel=1e-6)
    assert monitor.updates == len(batches)


def test_layers_that_only_some_steps_have_are_kept():
    monitor = EntropyMonitor()
    both = recording_of(2, 3)
    monitor.update(EntropyRecording([both[1]]))
    monitor.update(both)
    assert monitor.summary().layers == ["layer.1", "layer.0"]
    assert monitor.summary().entropy[0] == pytest.approx(head_statistics(both).entropy[1])


def one_of_two_ranks(rank, folder):
    distributed.init_process_group("gloo", f"file://{folder}/met", rank=rank, world_size=2)
    parts = [recording_of(2, 3, batch=k + 2, seed=k).detach() for k in range(2)]
    both, second, nobody = (EntropyMonitor(Band(0.4)) for _ in range(3))
    parts[1].layers.pop()  # a layer that only the first rank came to
    both.update(parts[rank])
    if rank == 1:
        second.update(parts[1])
    alone = EntropyMonitor(both.band)
    for part in parts:
        alone.update(part)
    assert both.summary(over_ranks=True) == alone.summary()
    assert second.summary(over_ranks=True) == head_statistics(parts[1], both.band)
    with pytest.raises(ValueError, match="has seen no recording"):
        nobody.summary(over_ranks=True)
    distributed.destroy_process_group()


def test_ranks_are_parts_of_one_batch(tmp_path):
    multiprocessing.spawn(one_of_two_ranks, (tmp_path,), nprocs=2)


def test_rows_without_keys_and_heads_without_rows_are_in_no_mean():
    layer = recording_of(2)[0]
    allowed = layer.allowed_keys.expand(2, 2, -1).clone()
    allowed[:, 0] = 0  # head 0 sees nothing
    allowed[:, 1, 1:] = 1  # head 1 sees one key everywhere: an entropy, but no utilisation
    statistics = head_statistics(EntropyRecording([replace(layer, allowed_keys=allowed)]))
    assert math.isnan(statistics.entropy[0][0])
    assert math.isnan(statistics.utilisation[0][0])
    assert math.isnan(statistics.utilisation[0][1])
    assert statistics.entropy[0][1] > 0
    assert statistics.classify() == HeadClasses(0, 0, 0)
    assert all(math.isnan(share) for share in statistics.classify().shares())


def test_nothing_of_the_graph_is_kept():
    sums = head_sums(recording_of(2), Band(HeadThresholds(1, 2)))
    assert not any(table.requires_grad for table in sums.layers.values())


def test_counts_stay_exact_beyond_float32():
    assert head_sums(recording_of(2)).layers["layer.0"].dtype == torch.float64


def of_utilisation(*layers):
    table = [list(layer) for layer in layers]
    return HeadStatistics([str(k) for k in range(len(table))], table, table, table)


def test_classes_follow_the_bounds():
    statistics = of_utilisation((0.0, 0.25, 0.2499), (0.75, 0.7501, math.nan))
    assert statistics.classify() == HeadClasses(collapsed=2, well_behaved=2, overloaded=1)
    assert statistics.classify().shares() == (0.4, 0.4, 0.2)
    everything = statistics.classify(collapsed_below=0.0, overloaded_above=1.0)
    assert everything == HeadClasses(0, 5, 0)


def test_metrics_are_means_over_heads():
    metrics = of_utilisation((0.1, 0.5), (0.9, math.nan)).metrics("e.")
    assert metrics["e.mean"] == metrics["e.utilisation"] == pytest.approx(0.5)
    assert metrics["e.collapsed"] == pytest.approx(1 / 3)
    assert "e.in_band" not in metrics
    assert head_statistics(recording_of(1), Band(0.5)).metrics()["entropy/in_band"] >= 0


def different_heads():
    layer = recording_of(2)[0]
    return EntropyRecording([layer, replace(recording_of(3)[0], name=layer.name)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: head_sums(EntropyRecording()), "holds no attention call; run the model inside"),
        (lambda: head_sums(different_heads()), "layer.0 was recorded with 2 and with 3 heads"),
        (
            lambda: head_sums(recording_of(1)).plus(head_sums(recording_of(1), Band(0.5))),
            "only one of the sums has a band",
        ),
        (lambda: EntropyMonitor().summary(), "has seen no recording; call update"),
        (lambda: HeadSums({}).statistics(), "there are no rows to take a mean of; add those of"),
        (lambda: Band(0.5, tolerance=-0.1), "tolerance is -0.1; pass a finite number"),
        (lambda: Band(0.5, maximum="log"), "maximum is 'log'; choose one of reachable"),
        (lambda: Band(0.5, tolerance="x"), "tolerance is 'x'; pass a number, 0 or larger"),
        (lambda: Band(0.5, 0.1, "context", 0), "context_size is 0; pass at least 2, or None"),
        (lambda: Band.of(3), "regularization is a int; pass an EntropyRegularization, or"),
        (lambda: EntropyMonitor(0.5), "band is a float; pass Band(thresholds), or Band.of(reg"),
        (lambda: EntropyMonitor(EntropyRegularization()), "band is a EntropyRegularization; pass"),
        (lambda: EntropyMonitor().update(None), "recording is a NoneType; pass the EntropyRec"),
        (lambda: EntropyMonitor().update([recording_of(1)]), "recording is a list; pass the"),
        (lambda: of_utilisation((0.5,)).classify(collapsed_below=0.8), "the bounds are 0.8 and"),
        (lambda: head_sums(recording_of(3), Band([0.5])), "1 thresholds a layer but 3 heads"),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call()


def test_reset_starts_a_new_window():
    monitor = EntropyMonitor()
    monitor.update(recording_of(2, seed=1))
    monitor.reset()
    monitor.update(recording_of(2, seed=2))
    assert monitor.updates == 1
    assert monitor.summary() == head_statistics(recording_of(2, seed=2))


def test_a_first_call_with_one_key_has_its_place_in_a_band():
    """As the first token of a text that is generated has."""
    one, more = (recording_of(2, queries=n).detach()[0] for n in (1, 5))
    one = replace(one, allowed_keys=one.allowed_keys.clamp(max=1), keys=1)
    recording = EntropyRecording([one, more])
    alone = head_statistics(EntropyRecording([more]), Band(0.4, 0.2))
    assert head_statistics(recording, Band(0.4, 0.2)).in_band == alone.in_band
