"""Which pairs to show: a few of each kind, spread over products."""

import numpy as np
import pandas as pd

from dist_train.evaluation.baselines import same_photo_pairs

SHOWN = 12
SHOWN_A_PRODUCT = 2
ITEMS_A_PRODUCT = 30
"""Of a product only so many items are paired for pairs never scored: two pairs are shown at most,
so the others would only cost time."""


def right_pairs(matched: pd.DataFrame, product: np.ndarray) -> tuple[int, pd.DataFrame]:
    """Matches of one product, from the surest to the closest call in even steps.

    matched: columns i, j (i < j) and score; product: (N,) int64 by row. Returns how many there
    are, and those to show.
    """
    right = _by_score(matched[_same(matched, product)])
    place = right.groupby(product[right["i"]]).cumcount()
    spread = right[place < SHOWN_A_PRODUCT]
    even = np.linspace(0, len(spread) - 1, min(SHOWN, len(spread))).round().astype(int)
    return len(right), spread.iloc[even]


def wrong_pairs(matched: pd.DataFrame, product: np.ndarray) -> tuple[int, pd.DataFrame]:
    """Matches across two products, the highest score first; as `right_pairs`."""
    wrong = _by_score(matched[~_same(matched, product)])
    return len(wrong), _spread(wrong, product)


def missed_pairs(
    matched: pd.DataFrame, scored: pd.DataFrame, product: np.ndarray, shown: np.ndarray
) -> tuple[int, pd.DataFrame]:
    """Pairs of one product that are no match: the highest score first, never scored last.

    scored: columns i, j and score, kept down to the score floor; shown: (N,) bool, the items whose
    pairs are shown. As `right_pairs`, with NaN scores for pairs never scored.
    """
    sizes = np.bincount(product[shown])
    total = int((sizes * (sizes - 1) // 2).sum()) - int(_same(matched, product).sum())
    near = _by_score(scored[_same(scored, product)])
    rows = np.flatnonzero(shown)
    rows = rows[pd.Series(product[rows]).groupby(product[rows]).cumcount() < ITEMS_A_PRODUCT]
    # Pairs of equal products are found as pairs of equal hashes are.
    i, j = same_photo_pairs(product[rows].astype(str))
    every = pd.DataFrame({"i": rows[i], "j": rows[j], "score": np.nan})
    far = every[~_isin(every, scored, len(product))]
    candidates = pd.concat([near[["i", "j", "score"]], far], ignore_index=True)
    return total, _spread(candidates[~_isin(candidates, matched, len(product))], product)


def best_pairs(matched: pd.DataFrame, product: np.ndarray) -> pd.DataFrame:
    """The matches of highest score, for a catalogue without labels."""
    return _spread(_by_score(matched), product)


def _by_score(pairs: pd.DataFrame) -> pd.DataFrame:
    """The highest score first."""
    return pairs.sort_values(["score", "i", "j"], ascending=[False, True, True])


def _same(pairs: pd.DataFrame, product: np.ndarray) -> np.ndarray:
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
