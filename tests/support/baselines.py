"""The baselines of the generated catalogue: python tests/support/baselines.py ITEMS (not a test).

Each matcher's best mean per-item F1 over all items, the threshold chosen on the same items.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from dist_train.evaluation.baselines import same_photo_pairs, title_pairs
from dist_train.evaluation.f1_curve import f1_curve
from dist_train.evaluation.metrics import per_item_scores
from dist_train.synthetic.catalogue import generate
from shards.storage.files import sha256_file


def main() -> None:
    """Generate with photos, score the three baselines."""
    items = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        generate(out, items, workers=2)
        table = pd.read_csv(out / "catalogue.csv", dtype=str, keep_default_na=False)
        groups = table.label_group.to_numpy(str)
        hashes = np.array([sha256_file(out / "images" / name) for name in table.image])
    nothing = np.zeros(0, np.int64)
    print(f"{items} items, self-match: {per_item_scores(groups, nothing, nothing)[0].mean():.4f}")
    print(f"same file: {per_item_scores(groups, *same_photo_pairs(hashes))[0].mean():.4f}")
    threshold, f1 = f1_curve(groups, *title_pairs(table.title.to_numpy())).best()
    print(f"word TF-IDF: {f1:.4f} at {threshold:.3f}")


if __name__ == "__main__":
    main()
