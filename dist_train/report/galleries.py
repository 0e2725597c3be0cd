"""Which pairs to show: a few of each kind, spread over products."""

from typing import Literal

import numpy as np
import pandas as pd

from dist_train.evaluation.baselines import same_photo_pairs

SHOWN = 12
SHOWN_A_PRODUCT = 2
ITEMS_A_PRODUCT = 30
"""So many items of a product are paired for pairs never scored: two pairs are shown at most,
so the others would only cost time."""
Kind = Literal["right", "wrong", "missed", "matches"]
"""matches is that of a catalogue without labels."""
Chosen = tuple[Kind, int | None, pd.DataFrame]
"""A kind of pairs, how many there are (None: only the best are known), and those to show."""


def choose_pairs(
    matched: pd.DataFrame, scored: pd.DataFrame, product: np.ndarray, shown: np.ndarray | None
) -> list[Chosen]:
    """The pairs to show of every kind, at most two of a product.

    right: matches of one product, from the surest to the closest call in even steps; wrong:
    matches across two products, the highest score first; missed: pairs of one product that are no
    match, the highest score first, then with NaN those never scored.
    matched, scored: columns i, j (i < j) and score, the latter kept down to the score floor;
    product: (N,) int64 by row; shown: (N,) bool, the rows whose pairs these are. Without labels it
    is None, and the best matches are chosen.
    """
    matched = _by_score(matched)
    if shown is None:
        return [("matches", None, _spread(matched, product))]
    is_right = _is_same(matched, product)
    right, wrong = matched[is_right], matched[~is_right]
    few = right[right.groupby(product[right["i"]]).cumcount() < SHOWN_A_PRODUCT]
    even = np.linspace(0, len(few) - 1, min(SHOWN, len(few))).round().astype(int)
    near = _by_score(scored[_is_same(scored, product)])
    rows = np.flatnonzero(shown)
    rows = rows[pd.Series(product[rows]).groupby(product[rows]).cumcount() < ITEMS_A_PRODUCT]
    # Pairs of equal products are found as pairs of equal hashes are.
    i, j = same_photo_pairs(product[rows].astype(str))
    every = pd.DataFrame({"i": rows[i], "j": rows[j], "score": np.nan})
    far = every[~_isin(every, scored, len(product))]
    missed = pd.concat([near[["i", "j", "score"]], far], ignore_index=True)
    missed = missed[~_isin(missed, matched, len(product))]
    sizes = np.bincount(product[shown])
    return [
        ("right", len(right), few.iloc[even]),
        ("wrong", len(wrong), _spread(wrong, product)),
        ("missed", int((sizes * (sizes - 1) // 2).sum()) - len(right), _spread(missed, product)),
    ]


def _by_score(pairs: pd.DataFrame) -> pd.DataFrame:
    """The highest score first."""
    return pairs.sort_values(["score", "i", "j"], ascending=[False, True, True])


def _is_same(pairs: pd.DataFrame, product: np.ndarray) -> np.ndarray:
    """Which of the pairs are of one product, (P,) bool."""
    return product[pairs["i"]] == product[pairs["j"]]


def _isin(pairs: pd.DataFrame, others: pd.DataFrame, items: int) -> np.ndarray:
    """Which of the pairs (i < j) are one of the others, (P,) bool."""
    keys = pairs["i"].to_numpy() * items + pairs["j"].to_numpy()
    return np.isin(keys, others["i"].to_numpy() * items + others["j"].to_numpy())


def _spread(pairs: pd.DataFrame, product: np.ndarray) -> pd.DataFrame:
    """The first SHOWN pairs such that no product is shown more than SHOWN_A_PRODUCT times."""
    used: dict[int, int] = {}
    kept = []
    for position, pair in enumerate(zip(pairs["i"], pairs["j"], strict=True)):
        products = {int(product[row]) for row in pair}
        if all(used.get(one, 0) < SHOWN_A_PRODUCT for one in products):
            used.update({one: used.get(one, 0) + 1 for one in products})
            kept.append(position)
        if len(kept) == SHOWN:
            break
    return pairs.iloc[kept]
