"""Splits, classes and places of postings: pure functions of the catalogue."""

import json
import tempfile
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.catalogue.rows import Catalogue
from shards.catalogue.split import SPLITS, split_of
from shards.pack.plan import Plan, make_plan
from shards.photos.options import PackOptions
from shards.storage.errors import BadInput


def table_of(groups: list[str]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "posting_id": [f"p{n}" for n in range(len(groups))],
            "image": "",
            "title": "a title",
            "label_group": groups,
        }
    )


def plan_of(table: pd.DataFrame, options: PackOptions) -> pd.DataFrame:
    """The table with the split, class, shard and slot that a plan on disk gives its rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_dict("records")))
        make_plan(path.with_suffix(".sqlite"), Catalogue(path), options, "a test")
        plan = Plan(path.with_suffix(".sqlite"), "a test")
        found = [
            {"shard": shard.number, "split": shard.split, **row._asdict()}
            for shard in plan.shards()
            for row in plan.rows(shard.first, shard.items)
        ]
        assert len(plan) == len(found) == len(table)
    planned = pd.DataFrame(found).sort_values("row").set_index(table.index)
    assert planned.row.tolist() == list(range(1, len(table) + 1))
    assert planned.posting_id.tolist() == table.posting_id.tolist()
    return planned


def shard_size(items: int, options: PackOptions) -> int:
    """Items of one tar: a split has eight shards, unless they would hold fewer than 64."""
    return min(options.shard_items, max(64, -(-items // 8)))


def plan_in_memory(table: pd.DataFrame, options: PackOptions) -> pd.DataFrame:
    """The plan as the docstring of make_plan defines it, with dictionaries."""
    split = [split_of(group) for group in table.label_group]
    trained = [g for g, s in zip(table.label_group, split, strict=True) if s == "train"]
    class_of = {group: number for number, group in enumerate(dict.fromkeys(trained))}
    keys = [
        blake2b(posting.encode(), digest_size=8, key=str(options.seed).encode()).hexdigest()
        for posting in table.posting_id
    ]
    planned = pd.DataFrame({"split": split, "key": keys}, table.index)
    planned["class_id"] = [class_of.get(group, -1) for group in table.label_group]
    place = planned.groupby("split").key.rank(method="first").astype(int) - 1
    size = planned.groupby("split").key.transform("size").map(lambda n: shard_size(n, options))
    return planned.assign(shard=place // size, slot=place % size)


FROZEN = {
    "a": "train",
    "b": "train",
    "c": "train",
    "d": "val",
    "e": "train",
    "f": "train",
    "g": "train",
    "h": "train",
    "i": "test",
    "j": "train",
}


# ── split


def test_products_split_60_20_20() -> None:
    counts = Counter(split_of(f"group {n}") for n in range(20_000))
    for split, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        assert abs(counts[split] / 20_000 - share) < 0.015
    assert counts["unlabelled"] == 0


def test_postings_without_a_label_are_unlabelled() -> None:
    assert split_of("") == "unlabelled"


def test_split_is_frozen() -> None:
    # Another function would move products between splits of sets that are packed already.
    letters = {c: split_of(c) for c in "abcdefghij"}
    assert letters == FROZEN


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=20))
def test_any_text_has_one_split(group: str) -> None:
    assert split_of(group) == split_of(group) != "unlabelled"


# ── plan


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["", *"abcdefghijklmnop"]), min_size=1, max_size=60))
def test_class_ids_count_train_groups_by_first_appearance(groups: list[str]) -> None:
    plan = plan_of(table_of(groups), PackOptions())
    expected: dict[str, int] = {}
    for group in groups:
        if group and split_of(group) == "train":
            expected.setdefault(group, len(expected))
    assert plan.class_id.tolist() == [expected.get(group, -1) for group in groups]
    assert plan.split.tolist() == [split_of(group) for group in groups]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.text("ab\0é", max_size=6), st.sampled_from(["", *"abcdefgh", "a\0"])),
             min_size=1, max_size=200, unique_by=lambda pair: pair[0]),
    st.sampled_from([1, 7, 5000]),
    st.integers(0, 3),
)  # fmt: skip
def test_the_plan_on_disk_says_what_dictionaries_say(
    rows: list[tuple[str, str]], shard_items: int, seed: int
) -> None:
    table = table_of([group for _, group in rows])
    table["posting_id"] = [f"p{posting}" for posting, _ in rows]
    options = PackOptions(shard_items=shard_items, seed=seed)
    ours, theirs = plan_of(table, options), plan_in_memory(table, options)
    for column in ("split", "class_id", "shard", "slot"):
        assert ours[column].tolist() == theirs[column].tolist()


def test_the_plan_of_another_pack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("posting_id,title\n1,t\n")
    make_plan(tmp_path / "p", Catalogue(tmp_path / "c.csv"), PackOptions(), "one")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["c.csv", "p"]
    with pytest.raises(BadInput, match="p: the plan of another pack"):
        Plan(tmp_path / "p", "other")


@pytest.mark.parametrize(("count", "size"), [(1, 5), (7, 1), (100, 10), (101, 10), (64, 64)])
def test_a_sample_takes_from_the_whole_plan(count: int, size: int, tmp_path: Path) -> None:
    lines = [f"{n},t" for n in range(count)]
    (tmp_path / "c.csv").write_text("\n".join(["posting_id,title", *lines]))
    make_plan(tmp_path / "p", Catalogue(tmp_path / "c.csv"), PackOptions(), "one")
    plan = Plan(tmp_path / "p", "one")
    places = [row.row for shard in plan.shards() for row in plan.rows(shard.first, shard.items)]
    sample = [places.index(row.row) for row in plan.sample(size)]
    assert min(size, count) // 2 < len(sample) <= size
    assert len(set(sample)) == len(sample)
    assert np.ptp(sample) >= (count - 1) * (1 - 2 / size) - 1


def test_classes_are_numbered_by_appearance_and_not_by_name() -> None:
    train = [g for g in map(str, range(60)) if split_of(g) == "train"]
    backwards = sorted(train, reverse=True)
    plan = plan_of(table_of(backwards + train), PackOptions())
    assert plan.class_id.tolist()[: len(train)] == list(range(len(train)))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 700])
@pytest.mark.parametrize("shard_items", [1, 50, 5000])
def test_places_fill_shards_without_gap_or_repeat(count: int, shard_items: int) -> None:
    options = PackOptions(shard_items=shard_items)
    plan = plan_of(table_of([f"g{n // 2}" for n in range(count)]), options)
    for _, rows in plan.groupby("split"):
        size = shard_size(len(rows), options)
        places = np.sort(rows.shard.to_numpy() * size + rows.slot.to_numpy())
        assert places.tolist() == list(range(len(rows)))
        assert rows.slot.max() < size <= shard_items


def test_a_split_has_eight_shards_where_each_keeps_64_items() -> None:
    for items, shard_items, size in ((512, 5_000, 64), (100, 5_000, 64), (8_000, 5_000, 1_000),
                                     (8_000, 300, 300)):  # fmt: skip
        plan = plan_of(table_of([""] * items), PackOptions(shard_items=shard_items))
        assert plan.groupby("shard").size().max() == size


def test_plan_does_not_depend_on_the_order_of_the_rows_but_for_classes() -> None:
    table = table_of([f"g{n % 40}" for n in range(300)])
    mixed = table.sample(frac=1, random_state=1).reset_index(drop=True)
    one, other = (plan_of(t, PackOptions()).set_index("posting_id") for t in (table, mixed))
    placed = ["split", "shard", "slot"]
    assert one[placed].equals(other.loc[one.index, placed])


def test_another_seed_gives_another_order_in_the_same_splits() -> None:
    table = table_of([f"g{n % 40}" for n in range(300)])
    one, other = (plan_of(table, PackOptions(seed=seed)) for seed in (0, 1))
    assert one.split.equals(other.split)
    assert one.class_id.equals(other.class_id)
    assert (one.slot != other.slot).mean() > 0.5


def test_items_do_not_lie_in_the_catalogues_order() -> None:
    plan = plan_of(table_of([""] * 500), PackOptions(shard_items=5000))
    place = plan.shard * shard_size(500, PackOptions()) + plan.slot
    assert abs(np.corrcoef(np.arange(500), place)[0, 1]) < 0.25


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(["", *"abcdefgh"]), min_size=1, max_size=30),
    st.lists(st.sampled_from(["", *"abcdefghijkl"]), max_size=30),
)
def test_appending_postings_never_moves_a_product_or_renumbers_a_class(
    before: list[str], added: list[str]
) -> None:
    old = plan_of(table_of(before), PackOptions())
    new = plan_of(table_of(before + added), PackOptions()).iloc[: len(before)]
    assert new.split.tolist() == old.split.tolist()
    assert new.class_id.tolist() == old.class_id.tolist()


@pytest.mark.parametrize("group", ["a\0", "\0", "a ", " a", "inf", "Nona", "é", "e\u0301", "🏷"])
def test_odd_label_groups_keep_split_and_class(group: str) -> None:
    # NumPy's fixed-width text drops trailing NULs, pandas takes some words for missing values.
    plan = plan_of(table_of(["x", group, "a", group]), PackOptions())
    assert plan.split.iloc[1] == plan.split.iloc[3] == split_of(group)
    assert plan.class_id.iloc[1] == plan.class_id.iloc[3]
    assert set(plan.split) <= set(SPLITS)
