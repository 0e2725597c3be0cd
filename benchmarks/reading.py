"""Raw reading beside webdataset: python -m benchmarks.reading

10,000 items of a photo of about 25 kB, their titles and classes, in the same tars, by one thread,
CPU time: ours by position in a random order with every crc checked, and the id and title returned,
webdataset as a stream of bytes, in the order of the tars and through its shuffle buffer.
"""

from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import webdataset

from benchmarks.paired import report, seconds
from benchmarks.pictures import catalogue, originals, real_photos
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet

ITEMS, PHOTOS, ROUNDS = 10_000, 2_000, 7
OURS = "by position, random"
PEER, SHUFFLED = "webdataset as it lies", "webdataset, shuffle(1000)"


def main() -> None:
    """Measure and print, the last line as JSON."""
    with TemporaryDirectory() as folder:
        photos = (path.read_bytes() for path in islice(real_photos(), PHOTOS))
        found = photos if real_photos() else originals(PHOTOS, 260)
        table = catalogue(Path(folder) / "catalogue", found, each=ITEMS // PHOTOS)
        options = PackOptions(keep=True, shard_items=1_000)
        pack(table, table.parent / "images", Path(folder) / "shards", options)
        tars = sorted(str(tar) for tar in (Path(folder) / "shards").glob("*/*.tar"))
        reader = ShardSet(Path(folder) / "shards").reader()
        order = np.random.default_rng(0).permutation(ITEMS).tolist()

        def ours() -> None:
            assert sum(len(reader[position].photo or b"") > 0 for position in order) == ITEMS

        def stream(shuffled: int) -> None:
            found = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
            found = found.shuffle(shuffled) if shuffled else found
            assert sum(len(sample["jpg"]) > 0 for sample in found) == ITEMS

        ways = {OURS: ours, PEER: lambda: stream(0), SHUFFLED: lambda: stream(1_000)}
        rows = [{"ours": OURS, "peer": peer, "wanted": 8} for peer in (PEER, SHUFFLED)]
        report("reading", ITEMS, seconds(ways, ROUNDS), rows)


if __name__ == "__main__":
    main()
