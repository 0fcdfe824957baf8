"""Which of many names is the loss: held-out before smoothed before any other, and never a choice between equals."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from scaling.columns import normalised

HELD_OUT, SMOOTHED, PLAIN, OTHER, BITS, PERPLEXITY = range(6)
"""In the order in which they are preferred."""
HELD_OUT_WORDS = frozenset((
    "val", "valid", "validation", "validate", "eval", "evals", "evaluation", "evaluations", "test", "heldout", "held",
    "dev",
))  # fmt: skip
SMOOTH_WORDS = frozenset(("smooth", "smoothed", "ema", "avg", "averaged", "mean"))
NOT_A_LOSS = frozenset((
    "scale", "std", "stderr", "err", "error", "errors", "se", "sem", "sd", "var", "variance", "aux", "auxiliary",
    "balance", "balancing", "z", "zloss", "router", "load", "gap", "diff", "delta", "difference", "pred", "predicted",
    "prediction", "fit", "fitted", "residual", "weight", "count", "mask", "spike", "skipped", "vs", "kd",
    "distill", "distillation", "rank", "ratio", "coef", "coeff", "coefficient", "type", "kind", "fn", "function",
    "reduction", "window", "min", "max", "lower", "upper", "step", "steps", "time",
))  # fmt: skip
"""Words in the names of what is about a loss, or is another one than cross-entropy."""
AT_THE_END = re.compile(r"[\W_]*(?:at[\W_]*(?:the[\W_]*)?)?(?:final|last)[\W_]*(?:step|iteration)s?", re.I)
"""When a loss was measured, which is no other loss."""
PLAIN_NAMES = (
    "finalloss", "loss", "lmloss", "finallmloss", "trainloss", "trainingloss", "finaltrainloss", "trainlmloss",
    "lmlosstraining", "celoss", "crossentropyloss", "crossentropy", "endloss", "lastloss", "nll", "nllloss", "xent",
    "ce", "finalce",
)  # fmt: skip
GENERIC = HELD_OUT_WORDS | {
    "final", "end", "last", "loss", "lm", "ce", "cross", "entropy", "out", "train", "training", "nll", "the", "ppl",
    "perplexity", "metric", "metrics", "summary", "result", "results", "stats", "log", "logs",
}  # fmt: skip
"""Words that do not say on what data a loss was measured."""


@dataclass(frozen=True)
class Loss:
    """A name that may be the loss."""

    name: str
    tier: int

    @property
    def kind(self) -> str:
        """For the column loss_kind."""
        if self.tier == HELD_OUT:
            return f"held-out ({self.name})"
        if self.tier == SMOOTHED:
            return f"training, smoothed ({self.name})"
        if self.tier == BITS:
            return f"bits ({self.name})"
        return f"as given ({self.name})"


def words(name: str) -> list[str]:
    """The words of a name, in small letters: "valLoss", "val_loss" and "val/loss" are two."""
    return re.findall(r"[a-z]+|[0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def candidate(name: str) -> Loss | None:
    """What kind of a loss a name says it is; None for what is none."""
    bare = AT_THE_END.sub("", name)
    parts, whole = words(bare), normalised(bare)
    if NOT_A_LOSS.intersection(parts):
        return None
    if {"ppl", "perplexity"}.intersection(parts):
        return Loss(name, PERPLEXITY)
    if any(each in whole for each in ("bitsperbyte", "bitsperchar")) or {"bpb", "bpc"}.intersection(parts):
        return Loss(name, BITS)
    is_loss = "loss" in whole or whole in PLAIN_NAMES or name == "L" or parts[-1:] in (["nll"], ["ce"])
    if not is_loss:
        return None
    if HELD_OUT_WORDS.intersection(parts) or re.match(r"(final)?(val|valid|validation|eval|test|heldout)loss$", whole):
        return Loss(name, HELD_OUT)
    if SMOOTH_WORDS.intersection(parts) or whole in ("smoothloss", "smoothedloss"):
        return Loss(name, SMOOTHED)
    if whole in PLAIN_NAMES or name == "L" or normalised(re.split(r"[/.]", name)[-1]) in PLAIN_NAMES:
        return Loss(name, PLAIN)
    return Loss(name, OTHER)


def candidates(names: Iterable[str]) -> list[Loss]:
    """All losses among names, the preferred kinds first, in a kind as `preferred` would take them."""
    found = [loss for loss in map(candidate, names) if loss is not None]
    return sorted(found, key=lambda each: (each.tier, _order(each)))


def preferred(names: Iterable[str]) -> tuple[Loss | None, list[Loss]]:
    """The loss to take, and all others that there are. None of none.

    ValueError where two losses are of one kind and only their data tells them apart, such as loss_pile and loss_stack.
    """
    found = candidates(names)
    if not found:
        return None, []
    first = found[0]
    equals = [each for each in found if each.tier == first.tier]
    if len(equals) > 1 and not _is_generic(first):
        raise ValueError(f"several losses, of which one is to be chosen: {', '.join(each.name for each in equals)}")
    return first, found[1:]


def _is_generic(loss: Loss) -> bool:
    """Whether a name says nothing of the data it was measured on."""
    known = GENERIC | (SMOOTH_WORDS if loss.tier == SMOOTHED else frozenset())
    return loss.name == "L" or normalised(loss.name) in PLAIN_NAMES or set(words(loss.name)) <= known


def _order(loss: Loss) -> tuple:
    whole = normalised(loss.name)
    plain = PLAIN_NAMES.index(whole) if whole in PLAIN_NAMES else len(PLAIN_NAMES)
    is_test = bool({"test", "dev"}.intersection(words(loss.name)))
    is_held_out = bool(HELD_OUT_WORDS.intersection(words(loss.name)))
    return not _is_generic(loss), not is_held_out, is_test, "final" not in whole, plain
