"""The laws of loss and growth: their derivatives, their special cases, and values that are known."""

import numpy as np
import pytest

from scaling.laws import LAWS, find
from scaling.laws.data_constrained import ENDLESS
from scaling.laws.farseer import PUBLISHED, as_published, from_published
from scaling.laws.growth_timing import PUBLISHED as TIMING
from scaling.laws.nesting import NESTINGS, same_as

OWN = [
    "over_training", "data_constrained", "farseer", "parscale", "parscale_tokens", "recurrence", "reuse", "reuse_sizes",
    "joint", "growth_timing", "size_only", "data_only",
]  # fmt: skip
CHINCHILLA = {"E": 1.7, "A": 400.0, "B": 2000.0, "alpha": 0.34, "beta": 0.36}


def inputs(rows=40, seed=0):
    generator = np.random.default_rng(seed)
    size, tokens = np.exp(generator.uniform(np.log(1e8), np.log(1e10), rows)), 10 ** generator.uniform(9.5, 12, rows)
    share = generator.uniform(0.2, 0.8, rows)
    return {
        "N": size, "D": tokens, "C": 6 * size * tokens, "U": tokens * generator.uniform(0.05, 1.2, rows),
        "N_once": share * size, "N_rec": (1 - share) * size, "r": generator.integers(1, 9, rows).astype(float),
        "P": 2.0 ** generator.integers(0, 4, rows), "D1": tokens * generator.choice([0.0, 0.1, 1.0, 5.0], rows),
    }  # fmt: skip


def drawn(law, count, seed=0):
    """Coordinates between a law's starts."""
    generator = np.random.default_rng(seed)
    ends = np.array([[float(each.coordinate(end)) for end in each.starts] for each in law.parameters])
    return generator.uniform(ends[:, 0], ends[:, 1], (count, len(ends)))


@pytest.mark.parametrize("name", OWN)
def test_the_derivatives_are_those_of_finite_differences(name):
    law, x = find(name), inputs()
    coordinates = drawn(law, 20)
    log, jacobian = law.evaluate(coordinates, x)
    assert log.shape == (20, 40) and jacobian.shape == (20, 40, len(law.parameters))
    for index, parameter in enumerate(law.parameters):
        step = 1e-5 * np.maximum(1.0, np.abs(coordinates[:, index : index + 1]))
        move = np.zeros_like(coordinates)
        move[:, index : index + 1] = step
        numeric = (law.log_value(coordinates + move, x) - law.log_value(coordinates - move, x)) / (2 * step)
        scale = np.abs(numeric).max()
        wrong = ~np.isclose(jacobian[..., index], numeric, rtol=1e-4, atol=1e-6 * max(scale, 1.0))
        assert not wrong.any(), (name, parameter.name, coordinates[wrong.any(axis=1)][0])
        assert scale > 0, f"{parameter.name} moves nothing"


@pytest.mark.parametrize("name", OWN)
def test_a_law_states_what_it_is(name):
    law = find(name)
    assert law.name == name and law.source and law.formula
    assert len({each.name for each in law.parameters}) == len(law.parameters)
    for each in law.parameters:
        assert each.lower <= each.starts[0] < each.starts[1] <= each.upper, each.name
        assert each.meaning, each.name
    values = law.values(drawn(law, 1)[0])
    assert np.allclose(law.coordinates(values), drawn(law, 1)[0])


@pytest.mark.parametrize("name", OWN)
def test_hopeless_starting_values_give_numbers(name):
    law, (low, high) = find(name), find(name).bounds()
    corners = np.random.default_rng(1).choice([0.0, 1.0], (50, len(low)))
    log, jacobian = law.evaluate(low + corners * (high - low), inputs())
    if name != "farseer":  # its exponent of an exponent has no end
        assert np.isfinite(log).all() and np.isfinite(jacobian).all()


@pytest.mark.parametrize("nesting", NESTINGS, ids=lambda each: f"{each.smaller}-in-{each.larger}")
def test_a_nested_law_is_the_larger_one_at_the_fixed_values(nesting):
    if {nesting.smaller, nesting.larger} - set(LAWS):
        pytest.skip(f"{nesting.smaller} or {nesting.larger} is not here")
    smaller, larger, x = find(nesting.smaller), find(nesting.larger), inputs()
    known = CHINCHILLA | {"k": 0.4, "phi": 0.5, "a": 700.0, "b": 3000.0, "eta": 0.15}
    values = {each.name: known[each.name] for each in smaller.parameters}
    lifted = nesting.values(values)
    assert set(lifted) >= {each.name for each in larger.parameters}
    for each in larger.parameters:
        assert each.lower <= lifted[each.name] <= each.upper
    ours = smaller.log_value(smaller.coordinates(values)[None], x)
    theirs = larger.log_value(larger.coordinates(lifted)[None], x)
    assert np.allclose(ours, theirs, rtol=0, atol=1e-7)
    # And the larger one is another law once it is free.
    if nesting.fixed:
        moved = lifted | {name: 0.3 if value < 10 else 3.0 for name, value in nesting.fixed.items()}
        assert not np.allclose(larger.log_value(larger.coordinates(moved)[None], x), ours, atol=1e-4)


def test_what_a_law_becomes_with_idle_parameters_has_a_name():
    assert same_as("joint", {"phi": 0.0, "R_D": ENDLESS}) == "parscale_tokens"
    assert same_as("joint", {"phi": 0.0}) is None
    assert same_as("chinchilla", {}) is None


@pytest.mark.parametrize(
    ("size", "tokens", "published"),
    [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9)],
)
def test_the_timing_law_gives_the_published_tokens(size, tokens, published):
    law = find("growth_timing")
    x = {"N": np.array([size]), "C": np.array([6 * size * tokens])}
    assert np.exp(law.log_value(law.coordinates(TIMING)[None], x)[0, 0]) == pytest.approx(published, rel=1e-3)


def test_farseer_is_the_published_formula():
    law, x, c = find("farseer"), inputs(), PUBLISHED
    values = from_published(c)
    loss = np.exp(c["s"] * x["N"] ** c["q"] + c["S"]) + np.exp(c["B"] * x["N"] ** c["b"] + c["Q"]) * x["D"] ** -np.exp(
        c["A"] * x["N"] ** c["a"] + c["E"]
    )
    assert np.allclose(np.exp(law.log_value(law.coordinates(values)[None], x)[0]), loss, rtol=1e-12)
    assert as_published(values) == pytest.approx(c, rel=1e-9)
    with pytest.raises(ValueError, match="beta_bend = 0"):
        as_published(values | {"beta_bend": 0.0})


def test_a_bend_of_zero_is_a_power_of_size():
    law, x = find("farseer"), inputs()
    values = from_published(PUBLISHED) | {"E_bend": 0.0, "B_bend": 1e-9, "beta_bend": -1e-9}
    log, jacobian = law.evaluate(law.coordinates(values)[None], x)
    nearby = law.log_value(law.coordinates(values | {"E_bend": 1e-3})[None], x)
    assert np.allclose(nearby, log + 1e-3 * jacobian[..., 2], atol=1e-7)


def test_repetitions_fade_as_published():
    """Muennighoff's D': after R_D* = 15.39 repetitions 1 - 1/e of their worth is had, at endless ones U (1 + R_D*)."""
    law = find("data_constrained")
    values = CHINCHILLA | {"R_D": 15.39, "R_N": 5.31}
    size, unique = 1e6, 1e9  # smaller than is optimal for that data, so that size counts in full

    def data_at(repetitions):
        x = {"N": np.array([size]), "D": np.array([unique * (1 + repetitions)]), "U": np.array([unique])}
        loss = np.exp(law.log_value(law.coordinates(values)[None], x)[0, 0])
        of_data = loss - values["E"] - values["A"] * size ** -values["alpha"]
        return (of_data / values["B"]) ** (-1 / values["beta"]) / unique

    assert data_at(0.0) == pytest.approx(1.0)
    assert data_at(15.39) == pytest.approx(1 + 15.39 * (1 - np.exp(-1)))
    assert data_at(1e4) == pytest.approx(16.39)


def test_recurrence_counts_unrolled_parameters_at_phi_one():
    law, x = find("recurrence"), inputs()
    unrolled = x | {"N_once": x["N_once"] + x["r"] * x["N_rec"], "N_rec": np.zeros_like(x["N"])}
    ours = law.log_value(law.coordinates(CHINCHILLA | {"phi": 1.0})[None], x)
    assert np.allclose(ours, law.log_value(law.coordinates(CHINCHILLA | {"phi": 0.2})[None], unrolled))


def test_reuse_is_the_published_power_of_the_parents_tokens_at_a_scale_of_one_token():
    law, x = find("reuse"), inputs()
    x = x | {"D1": x["D1"] + 1e9}
    published = 1.5 + 1e6 * x["D1"] ** -0.3 * x["D"] ** (-0.4 + 0.008 * np.log(x["D1"]))
    values = {"E": 1.5, "B": 1e6, "beta": 0.4, "a1": 0.3, "a3": 0.008, "D0": 1.0}
    assert np.allclose(np.exp(law.log_value(law.coordinates(values)[None], x)[0]), published, rtol=1e-7)


def test_reuse_is_training_from_the_beginning_without_a_parent():
    law, x = find("reuse_sizes"), inputs()
    scratch = x | {"D1": np.zeros_like(x["D1"])}
    values = CHINCHILLA | {"a1": 0.1, "a3": 0.02, "D0": 1e9}
    log, jacobian = law.evaluate(law.coordinates(values)[None], scratch)
    loss = 1.7 + 400 * x["N"] ** -0.34 + 2000 * x["D"] ** -0.36
    assert np.allclose(np.exp(log[0]), loss) and np.isfinite(jacobian).all()
    little = law.log_value(law.coordinates(values)[None], x | {"D1": np.full_like(x["D1"], 1.0)})
    assert np.allclose(little, log, atol=1e-8)
