"""Products of powers: laws of the best learning rate and batch, which are linear in their coordinates.

ln quantity = ln c + sum of exponent x ln(inputs) + sum of bend x ln(inputs / at)^2
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from scaling.columns import NAMES
from scaling.laws.law import SYMBOLS, Inputs, Law, Parameter, Quantity


@dataclass(frozen=True)
class Power:
    """One factor: inputs to the powers of `weights`, all of it to an exponent: fitted if a name, fixed if a number."""

    exponent: str | float
    weights: Mapping[str, float]

    def logarithm(self, x: Inputs) -> np.ndarray:
        return sum(weight * np.log(x[symbol]) for symbol, weight in self.weights.items())


@dataclass(frozen=True)
class Bend:
    """A curvature of the law: `exponent` times the square of the logarithm of inputs over their value `at`."""

    exponent: str
    weights: Mapping[str, float]
    at: float

    def logarithm(self, x: Inputs) -> np.ndarray:
        return (sum(weight * np.log(x[symbol]) for symbol, weight in self.weights.items()) - np.log(self.at)) ** 2


class PowerLaw(Law):
    """quantity = constant x product of powers. The constant too is fitted if a name, fixed if a number."""

    def __init__(
        self,
        name: str,
        quantity: Quantity,
        formula: str,
        source: str,
        powers: Sequence[Power],
        bends: Sequence[Bend] = (),
        constant: str | float = "c",
    ) -> None:
        self.name, self.quantity, self.formula, self.source = name, quantity, formula, source
        self.powers, self.bends, self.constant = tuple(powers), tuple(bends), constant
        fitted = dict.fromkeys(each.exponent for each in self.terms if isinstance(each.exponent, str))
        self.inputs = tuple(dict.fromkeys(symbol for each in self.terms for symbol in each.weights))
        self.parameters = tuple(Parameter(name, -20.0, 20.0, (-1.0, 1.0), "exponent") for name in fitted)
        if isinstance(constant, str):
            self.parameters = (Parameter(constant, 1e-60, 1e60, (1e-6, 1e6), "constant", True), *self.parameters)

    @property
    def terms(self) -> tuple[Power | Bend, ...]:
        return (*self.powers, *self.bends)

    def design(self, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """The matrix A (n, K) and offset o (n,) of ln quantity = A @ coordinates + o."""
        rows = np.broadcast_shapes(*(np.shape(x[symbol]) for symbol in self.inputs), (1,))
        columns = {each.name: np.zeros(rows) for each in self.parameters}
        offset = np.zeros(rows)
        if isinstance(self.constant, str):
            columns[self.constant] += 1.0
        else:
            offset += np.log(self.constant)
        for each in self.terms:
            if isinstance(each.exponent, str):
                columns[each.exponent] += each.logarithm(x)
            else:
                offset += each.exponent * each.logarithm(x)
        return np.stack(list(columns.values()), axis=-1), offset

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        design, offset = self.design(x)
        return coordinates @ design.T + offset, np.broadcast_to(design, (len(coordinates), *design.shape))


STEP_LAW = "Li et al., Step Law, arXiv 2503.04715, eq. 1"
DEEPSEEK = "DeepSeek-AI, DeepSeek LLM, arXiv 2401.02954, eq. 1"
N_A, D_B, C_A = Power("a", {"N": 1}), Power("b", {"D": 1}), Power("a", {"C": 1})
B_G = Power("g", {"B": 1})
AT_BATCH = "the optimum at a given batch (Bjorck et al., arXiv 2409.19913, has N and D at one batch)"

STEP_LAW_LR = PowerLaw("step_law_lr", "lr", "lr = c * N^a * D^b", STEP_LAW, (N_A, D_B))
STEP_LAW_BATCH = PowerLaw("step_law_batch", "batch_tokens", "batch_tokens = c * D^b", STEP_LAW, (D_B,))
DEEPSEEK_LR = PowerLaw("deepseek_lr", "lr", "lr = c * C^a", DEEPSEEK, (C_A,))
DEEPSEEK_BATCH = PowerLaw("deepseek_batch", "batch_tokens", "batch_tokens = c * C^a", DEEPSEEK, (C_A,))
GENERAL_BATCH = PowerLaw(
    "general_batch", "batch_tokens", "batch_tokens = c * N^a * D^b", "Step Law's form with N kept", (N_A, D_B)
)
BATCH_FIXED_LR = PowerLaw("batch_fixed_lr", "lr", "lr = c * N^a * D^b * B^g", AT_BATCH, (N_A, D_B, B_G))
CURVED_LR = PowerLaw(
    "curved_lr",
    "lr",
    "lr = c * N^a * D^b * exp(q * ln(N D / 1e19)^2)",
    "Step Law's form, bent in compute as arXiv 2606.29158 reports at larger scale",
    (N_A, D_B),
    (Bend("q", {"N": 1, "D": 1}, 1e19),),
)
STABLE_LR = PowerLaw(
    "stable_lr", "max_lr", "max_lr = c * N^a * D^b * B^g", "where half of the runs diverge", (N_A, D_B, B_G)
)

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FACTOR = re.compile(
    rf"\s*(?P<base>[A-Za-z_]\w*|{_NUMBER})\s*"
    rf"(?:(?:\^|\*\*)\s*(?P<open>\()?\s*(?P<sign>[+-]?)\s*(?P<exponent>[A-Za-z_]\w*|{_NUMBER})\s*(?(open)\)))?\s*"
)
_OPERATOR = re.compile(r"\*(?!\*)|/")
_GRAMMAR = "such as 'lr = m * tokens^-a * hidden_size^-b * batch_tokens^0.5'"


def product(quantity: str, columns: Sequence[str], fixed: Mapping[str, float] = {}) -> PowerLaw:
    """quantity = c x product of powers of columns; the exponents of those in `fixed` are given, the others fitted.

    ValueError if a fixed column is none of them, or nothing is left to fit.
    """
    if other := next((name for name in fixed if name not in columns), None):
        raise ValueError(f"fixed exponent of {other!r}: accepted are the columns {', '.join(columns)}")
    powers = [f"{name}^{fixed[name]!r}" if name in fixed else f"{name}^k_{name}" for name in columns]
    return parse(f"{quantity} = " + " * ".join(["c", *powers]))


def parse(text: str) -> PowerLaw:
    """The law of a text such as "lr = m * tokens^-a * hidden_size^-b * batch_tokens^0.5", named by it.

    What has an exponent is an input: a column of the run table, or a symbol of formulas such as N and D. A number as
    exponent fixes it, a name leaves it to be fitted; a name used twice is one exponent. A name without an exponent
    that is no column is the constant. ValueError saying what is wrong with the text.
    """
    quantity, equals, right = (part.strip() for part in text.partition("="))
    if not equals or quantity not in get_args(Quantity):
        raise ValueError(
            f"law {text!r}: accepted is one of {', '.join(get_args(Quantity))}, '=' and a product, {_GRAMMAR}"
        )
    constants: list[str] = []
    number, powers = 1.0, {}
    for base, sign, exponent in _factors(text, right):
        if base[0] in ".0123456789":
            if not (exponent or "1")[0].isdigit() or float(base) <= 0:
                raise ValueError(f"law {text!r}: {base!r} is no positive number to a fixed power")
            number *= float(base) ** (sign * float(exponent or 1))
        elif exponent is None and base not in NAMES and base not in SYMBOLS and base != "N":
            constants.append(base)
            if sign < 0:
                raise ValueError(f"law {text!r}: it divides by the constant {base!r}; accepted is to multiply by it")
        elif base == quantity or SYMBOLS.get(base) == quantity:
            raise ValueError(f"law {text!r}: {quantity} stands on both sides")
        else:
            _add(powers, base, sign, exponent)
    weights = [weight for each in powers.values() for weight in each.values()]
    if not all(0 < abs(weight) <= 20 for weight in weights) or not 0 < number < float("inf"):
        raise ValueError(f"law {text!r}: accepted are exponents up to 20 that do not cancel, and a finite number")
    if len(constants) > 1 or (constants and number != 1.0):
        raise ValueError(f"law {text!r}: accepted is one constant; {', '.join(constants)} cannot be told apart")
    law = PowerLaw(
        text.strip(),
        quantity,
        text.strip(),
        "given at run time",
        tuple(Power(exponent, weights) for exponent, weights in powers.items()),
        constant=constants[0] if constants else number,
    )
    names = [each.name for each in law.parameters]
    if not names or not law.inputs or len(set(names)) < len(names):
        raise ValueError(
            f"law {text!r}: accepted is a constant or an exponent to fit, each under its own name, {_GRAMMAR}"
        )
    return law


def _factors(text: str, right: str) -> list[tuple[str, int, str | None]]:
    """Base, sign and exponent of each factor; the sign of what is divided by is turned."""
    found, position, sign = [], 0, 1
    while True:
        match = _FACTOR.match(right, position)
        if not match:
            raise ValueError(f"law {text!r}: {right[position:]!r} does not begin with a name or number, {_GRAMMAR}")
        found.append((match["base"], -sign if match["sign"] == "-" else sign, match["exponent"]))
        position = match.end()
        if position == len(right):
            return found
        operator = _OPERATOR.match(right, position)
        if not operator:
            raise ValueError(f"law {text!r}: {right[position:]!r} does not begin with '*' or '/', {_GRAMMAR}")
        sign, position = (1 if operator[0] == "*" else -1), operator.end()


def _add(powers: dict[str | float, dict[str, float]], symbol: str, sign: int, exponent: str | None) -> None:
    """A factor beside those of the same exponent; fixed exponents are collected under 1."""
    named = exponent is not None and not (exponent[0].isdigit() or exponent[0] == ".")
    weights = powers.setdefault(exponent if named else 1.0, {})
    weights[symbol] = weights.get(symbol, 0.0) + (sign if named else sign * float(exponent or 1))
