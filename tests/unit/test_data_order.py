"""The global order: each epoch a permutation, quotas exact, cursors continuing across mixture changes."""

import json
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.data.mixture import MixtureHistory
from runtime.data.order import GlobalOrder
from runtime.data.permutation import Permutation
from runtime.data.quotas import Quotas


@dataclass(frozen=True)
class Corpus:
    """A source of so many windows."""

    fingerprint: str
    num_windows: int

    @property
    def path(self) -> str:
        return f"/data/{self.fingerprint}"

    def windows(self, seq_len: int) -> int:
        return self.num_windows


weights = st.lists(st.fractions(Fraction(1, 50), 20, max_denominator=50), min_size=1, max_size=7)
mixtures = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 9), min_size=1)
SIZES = {"a": 1, "b": 2, "c": 7, "d": 30, "e": 101}

GOLDEN = [(1, 22, 0), (0, 4, 0), (1, 1, 0), (1, 7, 0), (0, 2, 0), (1, 11, 0), (1, 29, 0), (0, 0, 0)]
GOLDEN_FAR = (0, 2, 47619047619)


def mixture(shares: dict[str, int]) -> list[tuple[Corpus, float]]:
    return [(Corpus(name, SIZES[name]), share) for name, share in shares.items()]


@given(st.integers(1, 3000), st.binary(max_size=8))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(n, key):
    assert sorted(Permutation(n, key)(np.arange(n)).tolist()) == list(range(n))


@given(st.integers(10**6, 10**15), st.data())
@settings(max_examples=30, deadline=None)
def test_permutation_needs_no_table(n, data):
    places = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True)))
    images = Permutation(n, b"key")(places)
    assert len(set(images.tolist())) == len(places)
    assert images.min() >= 0 and images.max() < n


@pytest.mark.parametrize("n", [2, 5, 12])
def test_permutation_has_no_preferred_places(n):
    """Chi-square of where each place goes over 4,000 keys: (n-1)^2 degrees of freedom, 6 deviations allowed."""
    images = np.array([Permutation(n, f"{k}".encode())(np.arange(n)) for k in range(4000)])
    counts = np.stack([np.bincount(images[:, place], minlength=n) for place in range(n)])
    freedom = (n - 1) ** 2
    assert ((counts - 4000 / n) ** 2 / (4000 / n)).sum() < freedom + 6 * (2 * freedom) ** 0.5


def test_neighbours_part():
    images = Permutation(100_000, b"key")(np.arange(100_000))
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(images, np.arange(100_000))[0, 1]) < 0.02


@given(weights, st.integers(0, 10**12))
@settings(deadline=None)
def test_quotas_stay_within_two_of_the_share(parts, start):
    quotas, total = Quotas(parts), sum(parts)
    for n in (*range(60), start, start + 1):
        counts = quotas.counts(n)
        assert sum(counts.values()) == n
        for source, part in enumerate(parts):
            assert abs(counts[source] - n * part / total) < 2


@given(weights)
@settings(deadline=None)
def test_draws_number_each_source_without_gaps(parts):
    quotas = Quotas(parts)
    drawn = Counter()
    for n in range(100):
        source, k = quotas.draw(n)
        assert k == drawn[source]
        drawn[source] += 1
        assert {source: count for source, count in quotas.counts(n + 1).items() if count} == drawn


@given(mixtures, st.integers(0, 2**63 - 1))
@settings(max_examples=50, deadline=None)
def test_every_epoch_holds_every_window_once(shares, seed):
    order = GlobalOrder(mixture(shares), seed, seq_len=8)
    samples = order.samples(0, 400)
    for k, source in enumerate(order.sources):
        own = [sample for sample in samples if sample.source == k]
        assert [sample.epoch for sample in own] == [i // source.num_windows for i in range(len(own))]
        for epoch in range(len(own) // source.num_windows):
            assert sorted(s.window for s in own if s.epoch == epoch) == list(range(source.num_windows))
    assert order.cursors(400) == {
        source.fingerprint: sum(sample.source == k for sample in samples) for k, source in enumerate(order.sources)
    }


def test_epochs_and_seeds_are_shuffled_afresh():
    def epoch(seed, number):
        return [s.window for s in GlobalOrder([(Corpus("e", 101), 1)], seed, 8).samples(number * 101, 101)]

    orders = [tuple(epoch(seed, number)) for seed in (0, 1) for number in (0, 1, 2)]
    assert len(set(orders)) == 6


@given(mixtures, st.integers(0, 500), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_a_sample_depends_on_its_number_alone(shares, first, count):
    order = GlobalOrder(mixture(shares), 3, seq_len=8)
    assert order.samples(first, count) == [order.sample(i) for i in range(first, first + count)]


@given(mixtures, st.randoms())
@settings(max_examples=30, deadline=None)
def test_listing_and_scale_of_weights_do_not_matter(shares, random):
    order = GlobalOrder(mixture(shares), 3, seq_len=8)
    shuffled = [(source, weight * 3) for source, weight in mixture(shares)]
    random.shuffle(shuffled)
    other = GlobalOrder(shuffled, 3, seq_len=8)
    assert other.fingerprint == order.fingerprint

    def named(order):
        return [(order.sources[s.source].fingerprint, s.window, s.epoch) for s in order.samples(0, 60)]

    assert named(order) == named(other)


def test_the_order_is_fixed_for_good():
    """A run resumed with a later version must meet the same samples."""
    order = GlobalOrder(mixture({"c": 1, "d": 2}), seed=42, seq_len=8)
    assert [tuple(sample) for sample in order.samples(0, 8)] == GOLDEN
    assert tuple(order.sample(10**12)) == GOLDEN_FAR


@pytest.mark.parametrize("change", ["seed", "seq_len", "weight", "source"])
def test_fingerprint_tells_orders_apart(change):
    first = GlobalOrder([(Corpus("a", 9), 1), (Corpus("b", 9), 2)], 0, 8)
    second = GlobalOrder(
        [(Corpus("c" if change == "source" else "a", 9), 1), (Corpus("b", 9), 3 if change == "weight" else 2)],
        1 if change == "seed" else 0,
        9 if change == "seq_len" else 8,
    )
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ([], "at least one source"),
        ([(Corpus("a", 5), 0)], "0 is not the weight"),
        ([(Corpus("a", 5), -1.5)], "-1.5 is not the weight"),
        ([(Corpus("a", 5), float("nan"))], "nan is not the weight"),
        ([(Corpus("a", 5), float("inf"))], "inf is not the weight"),
        ([(Corpus("a", 0), 1)], r"/data/a.bin: shorter than one sequence of 8 tokens"),
        ([(Corpus("a", 5), 1), (Corpus("a", 5), 2)], "/data/a: holds the same data as /data/a"),
    ],
)
def test_impossible_mixtures_are_refused(sources, complaint):
    with pytest.raises(ValueError, match=complaint):
        GlobalOrder(sources, 0, 8)


def test_weights_mean_what_is_written():
    """0.1, 0.2 and 0.7 are tenths: ten samples give exactly 1, 2 and 7."""
    order = GlobalOrder([(Corpus("c", 7), 0.1), (Corpus("d", 30), 0.2), (Corpus("e", 101), 0.7)], 0, 8)
    for tens in (1, 10, 10**12):
        assert order.cursors(10 * tens) == {"c": tens, "d": 2 * tens, "e": 7 * tens}


@given(mixtures, st.lists(st.tuples(st.integers(0, 90), mixtures), max_size=4), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_a_mixture_change_continues_every_source(first, changes, seed):
    changes = sorted(changes, key=lambda change: change[0])
    history = MixtureHistory(mixture(first), seed, 8)
    before = history.samples(0, 300)
    for at, shares in changes:
        history.change(at, mixture(shares))
        assert history.samples(0, at) == before[:at]
        before = history.samples(0, 300)
        allowed = {history.sources[sample.source].fingerprint for sample in before[at:]}
        assert allowed <= set(shares)

    for k, source in enumerate(history.sources):
        alone = GlobalOrder([(source, 1)], seed, 8)
        own = [(sample.window, sample.epoch) for sample in before if sample.source == k]
        assert own == [(sample.window, sample.epoch) for sample in alone.samples(0, len(own))]
        for at in (0, 40, 90, 300):
            drawn = sum(sample.source == k for sample in before[:at])
            assert history.cursors(at).get(source.fingerprint, 0) == drawn


@given(mixtures, st.lists(st.tuples(st.integers(0, 90), mixtures), max_size=3))
@settings(max_examples=30, deadline=None)
def test_a_history_survives_json(first, changes):
    history = MixtureHistory(mixture(first), 7, 8)
    for at, shares in sorted(changes, key=lambda change: change[0]):
        history.change(at, mixture(shares))
    saved = json.loads(json.dumps(history.to_json()))
    opened = []

    def reopen(path):
        opened.append(path)
        return Corpus(path[-1], SIZES[path[-1]])

    again = MixtureHistory.from_json(saved, reopen)
    assert again.samples(0, 200) == history.samples(0, 200)
    assert (again.fingerprint, again.to_json()) == (history.fingerprint, history.to_json())
    assert sorted(opened) == sorted(each["path"] for each in saved["stages"][-1]["sources"])


def test_a_source_that_changed_is_refused_and_one_left_behind_may_be_gone():
    history = MixtureHistory(mixture({"c": 1}), 7, 8)
    history.change(10, mixture({"d": 1}))
    saved = history.to_json()
    with pytest.raises(ValueError, match=r"/data/d\.bin, \.idx: not the data this run was trained on"):
        MixtureHistory.from_json(saved, lambda path: Corpus("x", 30))
    again = MixtureHistory.from_json(saved, lambda path: None)
    assert again.samples(0, 20) == history.samples(0, 20)
    with pytest.raises(ValueError, match=r"/data/c\.bin: needed for a sample before"):
        again.sources[0].read(0, 8)


def test_history_is_not_rewritten():
    history = MixtureHistory(mixture({"c": 1}), 7, 8)
    history.change(10, mixture({"d": 1}))
    with pytest.raises(ValueError, match="cannot change at sample 9: it already did at sample 10"):
        history.change(9, mixture({"c": 1}))
