"""Which pairs to show: a few of each kind, spread over products."""

import numpy as np
import pandas as pd

from dist_train.evaluation.baselines import same_photo_pairs

SHOWN = 12
SHOWN_A_PRODUCT = 2
# Of a product with more items than this only the first are looked at for pairs never scored;
# two of its pairs are shown at most, so the rest would only cost time.
ITEMS_A_PRODUCT = 30


def right_pairs(matched: pd.DataFrame, product: np.ndarray) -> tuple[int, pd.DataFrame]:
    """Matches of one product, from the surest to the closest call in even steps.

    matched: columns i, j, score; product: (N,) int64 by row. Returns (how many there are,
    those to show).
    """
    right = _by_score(matched[_same(matched, product)])
    turn = right.groupby(product[right["i"]]).cumcount()
    spread = right[turn < SHOWN_A_PRODUCT]
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

    scored: columns i, j, score, kept down to the floor; shown: (N,) bool, the items looked at.
    As `right_pairs`, with nan scores for pairs never scored.
    """
    sizes = np.bincount(product[shown])
    total = int((sizes * (sizes - 1) // 2).sum()) - int(_same(matched, product).sum())
    near = _by_score(scored[_same(scored, product)])
    far = _same_product(product, shown)
    far = far[~_isin(far, scored, len(product))]
    candidates = pd.concat([near[["i", "j", "score"]], far], ignore_index=True)
    return total, _spread(candidates[~_isin(candidates, matched, len(product))], product)


def best_pairs(matched: pd.DataFrame, product: np.ndarray) -> pd.DataFrame:
    """The matches of highest score, for a catalogue without labels."""
    return _spread(_by_score(matched), product)


def _by_score(pairs: pd.DataFrame) -> pd.DataFrame:
    return pairs.sort_values(["score", "i", "j"], ascending=[False, True, True])


def _same(pairs: pd.DataFrame, product: np.ndarray) -> np.ndarray:
    return product[pairs["i"]] == product[pairs["j"]]


def _isin(pairs: pd.DataFrame, others: pd.DataFrame, items: int) -> np.ndarray:
    """Which of the pairs (i < j) are among the others."""
    keys = pairs["i"].to_numpy() * items + pairs["j"].to_numpy()
    return np.isin(keys, others["i"].to_numpy() * items + others["j"].to_numpy())


def _same_product(product: np.ndarray, shown: np.ndarray) -> pd.DataFrame:
    rows = np.flatnonzero(shown)
    rows = rows[pd.Series(product[rows]).groupby(product[rows]).cumcount() < ITEMS_A_PRODUCT]
    # pairs of equal products are found as pairs of equal hashes are
    i, j = same_photo_pairs(product[rows].astype(str))
    return pd.DataFrame({"i": rows[i], "j": rows[j], "score": np.nan})


def _spread(pairs: pd.DataFrame, product: np.ndarray) -> pd.DataFrame:
    """The first pairs such that no product is seen more than twice."""
    seen: dict[int, int] = {}
    kept = []
    for position, pair in enumerate(zip(pairs["i"], pairs["j"], strict=True)):
        products = {int(product[row]) for row in pair}
        if all(seen.get(one, 0) < SHOWN_A_PRODUCT for one in products):
            seen.update({one: seen.get(one, 0) + 1 for one in products})
            kept.append(position)
        if len(kept) == SHOWN:
            break
    return pairs.iloc[kept]
