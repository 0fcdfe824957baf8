"""The plateau: how far lr or batch may be from the best for a cost that does not matter."""

from collections.abc import Mapping, Sequence

import numpy as np

from scaling.results import Bowl, Plateau

NEIGHBOURS = 5


def plateau(value: float, curvature: float, cost: float = 1e-3) -> Plateau:
    """The range around the best `value` of one setting that costs less than `cost`, a share of the loss, while the
    other stays where it is; `curvature` is d2 ln loss / d ln value 2. What moves both along the valley costs less."""
    half = np.sqrt(2 * cost / curvature)
    return Plateau(float(value * np.exp(-half)), float(value * np.exp(half)), cost)


def curvature_at(target: Mapping[str, float], bowls: Sequence[Bowl], axes: Sequence[str]) -> np.ndarray | None:
    """Mean curvature (d, d) over `axes`, of lr and batch_tokens, of the bowls nearest to the target in logarithms.

    `target` by column, as the bowls' cells. None where no bowl is convex over these axes.
    """
    index = [("lr", "batch_tokens").index(each) for each in axes]
    near = []
    for bowl in bowls:
        if not bowl.curvature:
            continue
        a, b, c = bowl.curvature
        whole = np.array([[a, b], [b, c]])[np.ix_(index, index)]
        if np.isfinite(whole).all():
            shared = [name for name in target if bowl.cell.get(name, 0) > 0 and target[name] > 0]
            near.append((sum(np.log(target[name] / bowl.cell[name]) ** 2 for name in shared), len(near), whole))
    if not near:
        return None
    return np.mean([whole for _, _, whole in sorted(near)[:NEIGHBOURS]], axis=0)
