"""Label groups that can't be meant so: one product on two sides, all alone, one far too large."""

import logging
import sqlite3
from pathlib import Path

# The postings of each product in each split.
PRODUCTS = """
CREATE TABLE product AS SELECT label_group, split, COUNT(*) AS postings
    FROM {} WHERE label_group <> '' GROUP BY label_group, split
"""
TOTALS = """
SELECT COUNT(*), IFNULL(SUM(postings), 0), IFNULL(MAX(postings), 0), IFNULL(SUM(sides > 1), 0),
    IFNULL(SUM((sides > 1) * postings), 0)
    FROM (SELECT SUM(postings) AS postings, COUNT(*) AS sides FROM product GROUP BY label_group)
"""
ACROSS = """
SELECT label_group, GROUP_CONCAT(split, ' and ') FROM (SELECT * FROM product ORDER BY split DESC)
    GROUP BY label_group HAVING COUNT(*) > 1 ORDER BY label_group LIMIT 1
"""
LARGEST = """
SELECT label_group, SUM(postings) AS size FROM product GROUP BY label_group
    ORDER BY size DESC, label_group LIMIT 1
"""
MEDIAN = """
SELECT SUM(postings) AS size FROM product GROUP BY label_group ORDER BY size LIMIT 1 OFFSET ?
"""
VAL = "SELECT COUNT(*), IFNULL(MAX(postings), 0) FROM product WHERE split = 'val'"
ODD_SHARE, ODD_TIMES, ODD_POSTINGS = 0.1, 10, 10
"""A label looks like a placeholder when it has this share of the labelled postings, so many times
the postings of the median product, and so many postings."""
CHECK = "is label_group the column that says which postings are the same product?"
log = logging.getLogger("shards")


def log_label_remarks(database: sqlite3.Connection, table: str, path: Path) -> int:
    """Warn of what is odd about the products in `table` (label_group, split) of `path`.

    Returns the number of products that lie in several splits.
    """
    database.execute(PRODUCTS.format(table))
    products, postings, largest, across, across_postings = database.execute(TOTALS).fetchone()
    remarks = []
    if not products:
        remarks.append("no posting has a label_group: nothing can be learned or scored")
    elif largest == 1:
        remarks.append(
            f"no product has two postings: each of {products} labels stands once, so there is no "
            f"match to learn or to score, and F1 would be 1 for every matcher; {CHECK}"
        )
    elif products == 1:
        label = database.execute(LARGEST).fetchone()[0]
        remarks.append(
            f"all {postings} labelled postings are of one product, {label!r}: without "
            f"another nothing can be learned or scored; {CHECK}"
        )
    else:
        val, largest_val = database.execute(VAL).fetchone()
        if val < 2 or largest_val < 2:
            fault = "val holds one product" if val else "val holds no product"
            if val > 1:
                fault = f"none of the {val} val products has two postings"
            remarks.append(
                f"{fault}: no threshold can be chosen on it, so match will accept near-certain "
                "pairs alone or need --threshold T; label more products, or name their split in a "
                "column split"
            )
        median = database.execute(MEDIAN, (products // 2,)).fetchone()[0]
        if largest >= max(ODD_SHARE * postings, ODD_TIMES * median, ODD_POSTINGS):
            label = database.execute(LARGEST).fetchone()[0]
            remarks.append(
                f"label_group {label!r} has {largest} of {postings} labelled postings, the median "
                f"product {median}: if it stands for no product, empty these cells"
            )
    if across:
        label, splits = database.execute(ACROSS).fetchone()
        remarks.append(
            f"{across} products lie in several splits, {across_postings} postings (for example "
            f"{label!r} in {splits}); scores of test will be too good"
        )
    for remark in remarks:
        log.warning("%s: %s", path, remark)
    database.execute("DROP TABLE product")
    return across
