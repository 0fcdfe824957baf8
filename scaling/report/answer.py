"""What a reader wants first: the chosen laws, the proposals, and what to be wary of."""

from typing import NamedTuple

from scaling.laws import find
from scaling.report.words import interval, label, number, percent, plain, target, written
from scaling.results import Analysis, Decision, Estimate, Fit, Verdict

_ORDER = {"failure": 0, "warning": 1, "ok": 2}


class Warning(NamedTuple):
    """A verdict, and what it is about."""

    about: str
    verdict: Verdict


def chosen(analysis: Analysis) -> list[Fit]:
    """The first fit of each quantity."""
    quantities = dict.fromkeys(fit.quantity for fit in analysis.fits)
    return [fit for quantity in quantities if (fit := analysis.best(quantity)) is not None]


def law(fit: Fit) -> str:
    """One law as a formula with its numbers, such as lr = m N^a D^b with m = 1.8 [1.2, 2.6], a = ..."""
    numbers = ", ".join(
        f"{plain(name)} = {number(value.value)} (fixed)" if name in fit.fixed else f"{plain(name)} = {interval(value)}"
        for name, value in fit.parameters.items()
    )
    return f"{plain(find(fit.law).formula)} with {numbers}"


def standing(fit: Fit) -> str:
    """What a law rests on, in one sentence."""
    said = f"{label(fit.size)}; fitted to {fit.rows} rows in {fit.clusters} clusters, residual sd {percent(fit.noise)}"
    return said if fit.identified else f"{said}; not identified by these runs"


def proposal(decision: Decision) -> str:
    """One decision as a sentence."""
    asked = target(decision.target)
    if not decision.proposal:
        return f"For {asked}: no proposal."
    parts = []
    for name, value in decision.proposal.items():
        if name not in decision.target:
            parts.append(f"{label(name)} {_settled(name, value, decision)}")
    regret = f"; expected regret {percent(decision.regret)} of the loss" if decision.regret == decision.regret else ""
    return f"For {asked}: {'; '.join(parts)}{regret}."


def _settled(name: str, value: Estimate, decision: Decision) -> str:
    write = written(name)
    said = interval(value, write)
    if (plateau := decision.plateau.get(name)) is not None:
        said += f", anything from {write(plateau.low)} to {write(plateau.high)} costs under {percent(plateau.cost)}"
    return said


def warnings(analysis: Analysis, is_short: bool = False) -> list[Warning]:
    """All that is not as it should be, failures first; the short list leaves out laws that were not chosen."""
    picked = chosen(analysis)
    found = [Warning("the table", each) for each in analysis.gates]
    for decision in analysis.decisions:
        found += [Warning(target(decision.target), each) for each in decision.verdicts]
    for fit in picked:
        found += [Warning(f"{fit.quantity}: {plain(fit.law)}", each) for each in fit.verdicts]
    found.sort(key=lambda each: _ORDER[each.verdict.level])
    if not is_short:
        others = [fit for fit in analysis.fits if not any(fit is each for each in picked)]
        found += [Warning(f"{fit.quantity}: {plain(fit.law)}, not chosen", v) for fit in others for v in fit.verdicts]
    return [each for each in found if each.verdict.level != "ok"]
