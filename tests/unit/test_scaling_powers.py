"""Laws that are products of powers: how they are read, and that they are what they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.laws import LAWS, find
from scaling.laws.powers import PowerLaw, parse, product
from scaling.laws.timescale import timescale, weight_decay_of

POWER_LAWS = [each for each in LAWS.values() if isinstance(each, PowerLaw)]
EXAMPLE = "lr = m * tokens^-a * hidden_size^-b * batch_tokens^0.5"


def some_inputs(law, rows=4):
    generator = np.random.default_rng(0)
    return {symbol: np.exp(generator.uniform(1, 20, rows)) for symbol in law.inputs}


def test_a_text_is_the_law_it_spells():
    law = find(EXAMPLE)
    values = {"m": 3.0, "a": 0.2, "b": 0.7}
    x = {"tokens": np.array([1e9]), "hidden_size": np.array([512.0]), "batch_tokens": np.array([2e5])}
    assert law.name == EXAMPLE and law.quantity == "lr"
    assert np.exp(law.log_value(law.coordinates(values)[None], x)) == pytest.approx(
        3.0 * 1e9**-0.2 * 512**-0.7 * 2e5**0.5
    )


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("lr = c * N^-a", {"c": 2.0, "a": 0.5}, 2.0 * 16**-0.5),
        ("lr = c / N^a", {"c": 2.0, "a": 0.5}, 2.0 * 16**-0.5),
        ("lr = c * N^(-0.5) * D**b", {"c": 2.0, "b": 2.0}, 2.0 * 16**-0.5 * 9.0),
        ("lr=0.01*N^a", {"a": 0.25}, 0.01 * 2.0),
        ("batch_tokens = c * D^b / N^b", {"c": 1.0, "b": 0.5}, (3 / 16) ** 0.5),
        ("lr = c * N / D", {"c": 1.0}, 16 / 3),
        ("lr = 2 * 5^-1 * my_column^k", {"k": 1.0}, 0.4 * 7.0),
    ],
)
def test_texts_are_read_as_arithmetic(text, values, expected):
    law = parse(text)
    x = {"N": np.array([16.0]), "D": np.array([3.0]), "my_column": np.array([7.0])}
    assert np.exp(law.log_value(law.coordinates(values)[None], x))[0, 0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr", "'='"),
        ("speed = c * N^a", "accepted is one of"),
        ("lr = ", "does not begin with a name"),
        ("lr = c N^a", "does not begin with '\\*'"),
        ("lr = c * k * N^a", "c, k cannot be told apart"),
        ("lr = 2 * c * N^a", "one constant"),
        ("lr = a * N^a", "each under its own name"),
        ("lr = 3 * N^2", "a constant or an exponent to fit"),
        ("lr = c * lr^a", "both sides"),
        ("batch_tokens = c * B^a", "both sides"),
        ("lr = N^a / c", "divides by the constant"),
        ("lr = c * N^1e9", "exponents up to 20"),
        ("lr = c * N^2 / N^2", "do not cancel"),
        ("lr = 0 * N^a", "no positive number"),
    ],
)
def test_texts_that_are_no_law_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse(text)


def test_columns_and_fixed_exponents_make_a_law():
    law = product("lr", ["tokens", "hidden_size"], {"hidden_size": -1.0})
    assert [each.name for each in law.parameters] == ["c", "k_tokens"]
    assert find(law.name).formula == law.formula
    with pytest.raises(ValueError, match="'width'"):
        product("lr", ["tokens"], {"width": 1.0})


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
def test_derivatives_are_those_of_the_formula(law):
    x = some_inputs(law)
    at = np.array([[np.mean([p.coordinate(each) for each in p.starts]) for p in law.parameters]])
    _, derivative = law.evaluate(at, x)
    for k in range(at.shape[1]):
        step = np.zeros_like(at)
        step[0, k] = 1e-6
        slope = (law.log_value(at + step, x) - law.log_value(at - step, x)) / 2e-6
        assert derivative[..., k] == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("law", [each for each in POWER_LAWS if not each.bends], ids=lambda law: law.name)
def test_formulas_are_the_laws(law):
    """A named law's formula, where it is a plain product, reads back as the law itself."""
    if "(" in law.formula:
        pytest.skip("a ratio under one exponent is no text that is read")
    again, x = parse(law.formula), some_inputs(law)
    at = np.linspace(0.1, 0.9, len(law.parameters))[None]
    assert again.log_value(at, x) == pytest.approx(law.log_value(at, x))


def test_published_values():
    """Step Law at 1B and 100B tokens; Kaplan's critical batch at a loss of 3."""
    x = {"N": np.array([1.0737e9]), "D": np.array([1e11])}
    law = find("step_law_lr")
    assert np.exp(law.log_value(law.coordinates({"c": 1.79, "a": -0.713, "b": 0.307})[None], x))[0, 0] == pytest.approx(
        1.79 * 1.0737e9**-0.713 * 1e11**0.307
    )
    law = find("critical_batch_loss")
    found = np.exp(law.log_value(law.coordinates({"B_star": 2e8, "alpha": 0.21})[None], {"loss": np.array([3.0])}))
    assert found[0, 0] == pytest.approx(2e8 / 3 ** (1 / 0.21))


def test_the_timescale_follows_tokens_for_each_parameter():
    law = find("weight_decay_timescale")
    at = law.coordinates({"c": 1.0, "b": -0.527})[None]
    x = {"N": np.array([1e9, 2e9]), "D": np.array([2e10, 4e10])}
    assert np.exp(law.log_value(at, x))[0] == pytest.approx([20**-0.527] * 2)


@given(st.floats(1e-3, 10), st.floats(1e4, 1e7), st.floats(1e-5, 1e-1), st.floats(1e8, 1e13))
def test_weight_decay_gives_its_timescale(tau, batch, lr, tokens):
    assert timescale(batch, lr, weight_decay_of(tau, batch, lr, tokens), tokens) == pytest.approx(tau)
