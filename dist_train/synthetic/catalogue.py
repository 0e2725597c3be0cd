"""The generated catalogue: catalogue.csv and images/, frozen as version 1."""

import csv
import io
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from dist_train.synthetic.photos import photo_number, photograph
from dist_train.synthetic.products import BLOCK, Product, products_of_block
from dist_train.synthetic.randomness import VERSION, Dice
from dist_train.synthetic.titles import title_of
from shards.storage.errors import BadInput
from shards.storage.files import atomic_path, names_in, remove_abandoned, sync, write_json
from shards.storage.workers import each

COLUMNS = ("posting_id", "image", "title", "label_group")
_FACTS, _TABLE, _IMAGES, _PARTIAL = "generated.json", "catalogue.csv", "images", ".partial"


class Plan(NamedTuple):
    """What is asked for; a catalogue is a pure function of it."""

    out: Path
    items: int
    seed: int
    photos: bool

    def facts(self) -> dict:
        return {
            **{"version": VERSION, "items": self.items},
            **{"seed": self.seed, "photos": self.photos},
        }


class Posting(NamedTuple):
    """One row of the catalogue: the `serial`-th posting of a product."""

    row: int
    product: Product
    serial: int

    @property
    def posting_id(self) -> str:
        return f"p{self.row:08d}"

    @property
    def image(self) -> str:
        return f"{self.row // BLOCK:05d}/{self.posting_id}.jpg"


def generate(
    out: Path, items: int, *, seed: int = 1, photos: bool = True, workers: int = 1
) -> None:
    """Write OUT/catalogue.csv with `items` rows and, with `photos`, OUT/images/.

    Memory does not grow with `items`: rows are made in
    blocks of BLOCK, and the first blocks of a large catalogue are those of a small one.
    A killed run goes on where it was when called again; a finished one is left as it is.
    `workers` above 1 starts that many processes (by spawn, so a script that calls this
    needs its `if __name__ == "__main__"`); the bytes are the same for any number.

    Raises BadInput when `out` holds anything else, or a number is below 1.
    """
    if items < 1 or workers < 1:
        raise BadInput(f"items={items}, workers={workers}: give at least 1 of each")
    plan = Plan(Path(out), items, seed, photos)
    _claim(plan)
    if (plan.out / _TABLE).exists():
        return
    blocks = range(-(-items // BLOCK))
    with atomic_path(plan.out / _TABLE) as temporary, temporary.open("wb") as table:
        table.write(_csv([COLUMNS]))
        with closing(each(_make_block, ((plan, block) for block in blocks), workers)) as made:
            for lines in made:
                table.write(lines)


def postings_of_block(seed: int, block: int) -> list[Posting]:
    """The BLOCK postings of a block in catalogue order: products are shuffled together."""
    found = [(p, serial) for p in products_of_block(seed, block) for serial in range(p.postings)]
    Dice(seed, "order", block).shuffle(found)
    return [Posting(block * BLOCK + place, *one) for place, one in enumerate(found)]


def _claim(plan: Plan) -> None:
    """Make the folder ours: empty, new, or begun earlier by the same plan."""
    if plan.out.exists() and not plan.out.is_dir():
        raise BadInput(f"{plan.out} is a file; give another --out for the catalogue's folder")
    plan.out.mkdir(parents=True, exist_ok=True)
    remove_abandoned(plan.out)
    facts = plan.out / _FACTS
    if facts.exists():
        _compare(plan, facts)
        return
    foreign = sorted(names_in(plan.out))
    if foreign:
        raise BadInput(
            f"{plan.out} already holds something else ({foreign[0]}); "
            "give another --out, or empty this one"
        )
    write_json(facts, plan.facts())


def _compare(plan: Plan, facts: Path) -> None:
    try:
        found = json.loads(facts.read_text(encoding="utf-8"))
    except ValueError:
        found = "a file that is not JSON"
    if found != plan.facts():
        raise BadInput(
            f"{plan.out} already holds another generated catalogue: {facts.name} says {found}, "
            f"asked for is {plan.facts()}; give another --out, or delete this folder"
        )


def _make_block(plan: Plan, block: int) -> bytes:
    """Write the photos of a block, unless they are there, and give its rows of the table."""
    wanted = plan.items - block * BLOCK
    postings = postings_of_block(plan.seed, block)[:wanted]
    if plan.photos:
        _write_photos(plan.out / _IMAGES / f"{block:05d}", postings)
    return _csv(_row(posting, plan.photos) for posting in postings)


def _row(posting: Posting, photos: bool) -> tuple[str, str, str, str]:
    title = title_of(posting.product, posting.serial)
    image = posting.image if photos else ""
    return posting.posting_id, image, title, posting.product.label_group


def _csv(rows: Iterable[tuple]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _write_photos(folder: Path, postings: list[Posting]) -> None:
    """All photos of a block under a temporary name, then the folder's own: whole or not there."""
    if folder.exists():
        return
    partial_folder = folder.with_name(folder.name + _PARTIAL)
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    for posting, photo in _photographed(postings):
        (partial_folder / f"{posting.posting_id}.jpg").write_bytes(photo)
    # Synced after all are written: by then most have reached the disk, and no call waits long.
    for path in [*partial_folder.iterdir(), partial_folder]:
        sync(path)
    partial_folder.rename(folder)
    sync(folder.parent)


def _photographed(postings: list[Posting]) -> Iterator[tuple[Posting, bytes]]:
    """Every posting with its JPEG, product by product so that a pack is drawn once."""
    taken: dict[tuple[int, int], bytes] = {}
    for posting in sorted(postings, key=lambda p: (p.product.number, p.serial)):
        key = posting.product.number, photo_number(posting.product, posting.serial)
        if key not in taken:
            taken = {k: photo for k, photo in taken.items() if k[0] == key[0]}
            taken[key] = photograph(posting.product, key[1])
        yield posting, taken[key]
