"""What a shard set holds, in numbers."""

from typing import Any

import pandas as pd

from shards.split import SPLITS


def counts_of(items: pd.DataFrame) -> dict[str, Any]:
    """Postings, packed ones, products and classes of a table like items.parquet."""
    packed = items[items.status == "packed"]
    return {
        "postings": len(items),
        "packed": len(packed),
        "rejected": int((items.status == "rejected").sum()),
        "with_reason": int((items.reason != "").sum()),
        "photos": int(packed.has_image.sum()),
        "titles": int(packed.has_text.sum()),
        "items": {split: int((packed.split == split).sum()) for split in SPLITS},
        "products": {s: int(packed.label_group[packed.split == s].nunique()) for s in SPLITS},
        "classes": int(items.class_id.max()) + 1,
    }
