"""Inputs of real life that once went wrong, each with the outcome that a user would demand.

Each is written here in small. Where the folder `cases` lies beside DIST_TRAIN_DATA, with the inputs
as they were reported, those are tried too. Several outcomes count as right where both keep a user
from a silently wrong result: a message is looked for by the facts it must name, not its words.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards.catalogue.split import split_of
from tests.support.launching import ROOT, environment, free_port
from tests.support.tars import write_tar
from tests.support.verbs import Said, call

GIVEN = Path(os.environ.get("DIST_TRAIN_DATA", "/nowhere")).parent / "cases"
SHOP = "posting_id,image,title,label_group\n"
Input = Callable[..., Path]


@pytest.fixture(params=["small", "reported"])
def case(request: pytest.FixtureRequest, photos: Path, tmp_path: Path) -> Input:
    """`case(name, write)`: a folder of its own with the input, and photos p0.jpg to p7.jpg."""

    def make(name: str, write: Callable[[Path], object], where: str = "photos") -> Path:
        folder = tmp_path / "case"
        if request.param == "reported":
            if not (GIVEN / name).is_dir():
                pytest.skip("the inputs as they were reported are not there")
            shutil.copytree(GIVEN / name, folder, symlinks=True)
            subprocess.run(["chmod", "-R", "u+w", folder], check=True)
            return folder
        (folder / where).mkdir(parents=True)
        for number in range(8):
            shutil.copy(photos / f"p{number}.jpg", folder / where)
        write(folder)
        return folder

    return make


def packed(out: Path) -> pd.DataFrame:
    """items.parquet of a shard set, without None."""
    return pd.read_parquet(out / "items.parquet").fillna({"reason": "", "label_group": ""})


def lines(path: Path, *rows: str, head: str = SHOP) -> None:
    path.write_text(head + "".join(f"{row}\n" for row in rows))


def untrained(shards: Path, tiny_bert: Path, out: Path) -> Said:
    options = ["--shards", shards, "--epochs", 0, "--batch-size", 8, "--workers", 0]
    return call("train", "text", *options, "--encoder.model", tiny_bert, "--out", out)


def test_all_single(case: Input, tiny_bert: Path, tmp_path: Path) -> None:
    folder = case(
        "all_single",
        lambda f: lines(f / "c.csv", *(f"p{n},,title {n},g{n}" for n in range(40))),
    )
    said = call("pack", folder / "c.csv", "--out", tmp_path / "s").text
    said += untrained(tmp_path / "s", tiny_bert, tmp_path / "r").text
    assert re.search(r"no product .*two|none of the .*products|every .*(once|alone|unique)", said)


def test_binary_parquet(case: Input, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        rows = {"posting_id": [b"1", b"2"], "image": [b"p0.jpg", b"p1.jpg"]}
        rows |= {"title": [b"red", "café".encode()], "label_group": [b"1", b"1"]}
        columns = {name: pa.array(values, pa.binary()) for name, values in rows.items()}
        pq.write_table(pa.table(columns), folder / "c.parquet")

    folder = case("binary_parquet", write)
    words = [folder / "c.parquet", "--images", folder / "photos", "--out", tmp_path / "s"]
    said = call("pack", *words)
    if said.code == 2:
        assert re.search(r"column \w+", said.text)
        assert "row 1" in said.text
        return
    items = packed(tmp_path / "s")
    assert items.posting_id.tolist() == ["1", "2"]
    assert items.title.tolist() == ["red", "café"]
    assert items.label_group.tolist() == ["1", "1"]
    assert items.has_image.all()


def test_column_not_found(case: Input, tmp_path: Path) -> None:
    head = "posting_id,image_path,title,product_id\n"
    rows = [f"a{n},p{n}.jpg,red shoe {n},{n // 2}" for n in range(8)]
    folder = case("column_not_found", lambda f: lines(f / "c.csv", *rows, head=head))
    photos = ["--images", folder / "photos"]
    said = call("pack", folder / "c.csv", *photos, "--out", tmp_path / "s")
    assert said.code == 2, said.text
    for fact in ("image", "image_path", "product_id", "--columns"):
        assert fact in said.text
    mapped = ["--columns", "image=image_path,label_group=product_id"]
    assert call("pack", folder / "c.csv", *photos, *mapped, "--out", tmp_path / "s").code == 0
    assert packed(tmp_path / "s").has_image.all()


ENCODINGS = {
    "cp1252.csv": (SHOP + "a,,Café,1\n").encode("cp1252"),
    "semicolon.csv": (SHOP + "a,,x,1\n").replace(",", ";").encode(),
    "sep.csv": ("sep=;\n" + (SHOP + "a,,x,1\n").replace(",", ";")).encode(),
    "utf16.csv": (SHOP + "a,,Café,1\n").replace(",", "\t").encode("utf-16"),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings(name: str, case: Input, tmp_path: Path) -> None:
    folder = case("encodings", lambda f: (f / name).write_bytes(ENCODINGS[name]))
    said = call("pack", folder / name, "--out", tmp_path / "s")
    if said.code == 2:
        remedy = "separat.*;" if name in ("semicolon.csv", "sep.csv") else "UTF-8"
        assert re.search(remedy, said.text)
        assert name != "cp1252.csv" or "row 1" in said.text
        return
    assert said.code == 0, said.text
    (item,) = packed(tmp_path / "s").itertuples()
    assert (item.posting_id, item.label_group) == ("a", "1")
    assert item.title in ("x", "Café")


def test_float_label_csv(case: Input, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        head = "posting_id,title,label_group\n"
        rows = [(f"p{n},title {n}", n // 2) for n in range(40)]
        before = [f"{row},{label}" for row, label in rows]
        after = [*(f"{row},{label}.0" for row, label in rows), "new,a title,"]
        lines(folder / "before.csv", *before, head=head)
        lines(folder / "after.csv", *after, head=head)

    folder, found = case("float_label_csv", write), []
    for name in ("before", "after"):
        said = call("pack", folder / f"{name}.csv", "--out", tmp_path / name)
        assert said.code == 0, said.text
        found.append(packed(tmp_path / name).set_index("posting_id"))
    before, after = found
    assert (after.split[before.index] == before.split).all()
    assert (after.label_group[before.index] == before.label_group).all()


KEYS = {
    "dsbatch.json": {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 32},
    "dsopt.json": {"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}},
    "dssched.json": {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}},
    "clip.json": {"gradient_clipping": 0.5},
    "passes.json": {"gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize(
    "name", [n if n.startswith("ds") else pytest.param(n, marks=pytest.mark.full) for n in KEYS]
)
def test_launcher(name: str, shard_set: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """Keys of DeepSpeed's JSON that are the training's own: one line that names the key."""
    shipped = ROOT / "launch" / "accelerate"
    base = json.loads((shipped / "deepspeed_zero2.json").read_text())
    (tmp_path / name).write_text(json.dumps(base | KEYS[name]))
    config = (shipped / "deepspeed_zero2.yaml").read_text()
    config = config.replace("launch/accelerate/deepspeed_zero2.json", str(tmp_path / name))
    (tmp_path / "accelerate.yaml").write_text(config)
    ended = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
         tmp_path / "accelerate.yaml", "--num_processes", "1", "--main_process_port",
         str(free_port()), "-m", "dist_train", "train", "text", "--shards", shard_set,
         "--encoder.model", tiny_bert, "--out", tmp_path / "run", "--epochs", "0.1",
         "--batch-size", "16", "--workers", "0"],
        cwd=ROOT, text=True, capture_output=True, timeout=250,
        env=environment() | {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"},
    )  # fmt: skip
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("dist-train")]
    assert len(said) == 1, ended.stderr[-3000:]
    assert next(iter(KEYS[name])) in said[0]
    assert not (tmp_path / "run" / "encoder").exists()


def test_links_out(case: Input, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "photos").mkdir()
        for number in range(8):
            link = folder / "photos" / f"p{number}.jpg"
            link.symlink_to(f"../blobs/p{number}.jpg")
        lines(folder / "c.csv", *(f"a{n},p{n}.jpg,t {n},{n // 2}" for n in range(8)))

    folder = case("links_out", write, "blobs")
    # A copy may have made files that hold the path of the link.
    for number in range(8):
        link = folder / "photos" / f"p{number}.jpg"
        if not link.is_symlink():
            target = link.read_text()
            link.unlink()
            link.symlink_to(target)
    words = ["pack", folder / "c.csv", "--images", folder / "photos", "--out", tmp_path / "s"]
    said = call(*words)
    assert said.code == 2, said.text
    assert re.search(r"row \d: .*p\d\.jpg", said.text)
    assert "--follow-links" in said.text
    said = call(*words, "--follow-links")
    assert said.code == 0, said.text
    assert packed(tmp_path / "s").has_image.all()


def test_macos_tar(case: Input, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        members = []
        for number in range(3):
            photo = (folder / "photos" / f"p{number}.jpg").read_bytes()
            members += [(f"._{number}.jpg", b"\0\5\26\7"), (f"{number}.jpg", photo)]
        write_tar(folder / "0.tar", members)
        shutil.rmtree(folder / "photos")

    folder = case("macos_tar", write)
    said = call("index-tars", folder)
    if said.code:
        assert "COPYFILE_DISABLE" in said.text
        said = call("index-tars", folder, "--leave", "._*")
    assert said.code == 0, said.text
    assert packed(folder).has_image.tolist() == [True] * 3


def test_no_labels_untrained(case: Input, tiny_bert: Path, tmp_path: Path) -> None:
    folder = case("no_labels_untrained", lambda f: lines(f / "c.csv", "a,,red,", "b,,blue,"))
    assert call("pack", folder / "c.csv", "--out", tmp_path / "s").code == 0
    said = untrained(tmp_path / "s", tiny_bert, tmp_path / "r")
    assert said.code == 0, said.text
    assert (tmp_path / "r" / "encoder" / "model.safetensors").exists()


def test_null_label(case: Input, tmp_path: Path) -> None:
    rows = [f"p{n},,thing {n},{'NULL' if n % 4 else f'g{n // 8}'}" for n in range(36)]
    folder = case("null_label", lambda f: lines(f / "c.csv", *rows))
    said = call("pack", folder / "c.csv", "--out", tmp_path / "s")
    assert said.code == 0, said.text
    count = (pd.read_csv(folder / "c.csv", keep_default_na=False).label_group == "NULL").sum()
    assert "NULL" in said.text
    assert str(count) in said.text
    assert "NULL" not in set(packed(tmp_path / "s").label_group)


def test_own_split(case: Input, tmp_path: Path) -> None:
    head = "posting_id,title,label_group,split\n"
    rows = ["a,x,1,train", "b,y,1,train", "c,z,2,test", "d,w,2,test"]
    folder = case("own_split", lambda f: lines(f / "c.csv", *rows, head=head))
    assert call("pack", folder / "c.csv", "--out", tmp_path / "s").code == 0
    assert packed(tmp_path / "s").split.tolist() == ["train", "train", "test", "test"]


CELLS = {
    "case": ("P{0}.JPG", ""), "noext": ("p{0}", ""), "slash": ("/p{0}.jpg", ""),
    "windows": ("photos\\p{0}.jpg", ""), "several": ("p{0}.jpg|p0.jpg", "|"),
    "url": ("https://cdn.shop.example/p{0}.jpg", "cdn.shop.example"),
}  # fmt: skip


@pytest.mark.parametrize("name", CELLS)
def test_photo_messages(name: str, case: Input, tmp_path: Path) -> None:
    """All photos are found, or one is named with its own reason; never lost silently."""
    cell, fact = CELLS[name]
    rows = [f"a{n},{cell.format(n)},t {n},{n // 2}" for n in range(8)]
    folder = case("photo_messages", lambda f: lines(f / f"{name}.csv", *rows))
    words = [folder / f"{name}.csv", "--images", folder / "photos", "--out", tmp_path / "s"]
    said = call("pack", *words)
    assert said.code == (2 if fact else 0), said.text
    if said.code == 2:
        assert fact in said.text
        assert re.search(r"row \d: .*p\d\.jpg", said.text)
        assert "is --images the folder" not in said.text
    else:
        assert packed(tmp_path / "s").has_image.all()


REJECTED = """
encoders: [text]
text: {epochs: 0, batch_size: 8, workers: 0, encoder: {max_length: 16}}
embed: {workers: 0}
"""


def test_report_rejected(case: Input, tiny_bert: Path, tmp_path: Path) -> None:
    rows = [f"p{n}_{k},,thing {n} nr {k},g{n}" for n in range(12) for k in range(3)]
    folder = case(
        "report_rejected", lambda f: lines(f / "with_one_rejected.csv", *rows, "last,,,g0")
    )
    (folder / "c.yaml").write_text(REJECTED)
    said = call(
        "run", folder / "c.yaml", "--catalogue", folder / "with_one_rejected.csv",
        "--text.encoder.model", tiny_bert, "--out", tmp_path / "o",
    )  # fmt: skip
    assert said.code == 0, said.text
    embedded = pd.read_parquet(tmp_path / "o" / "embedding" / "items.parquet")
    assert embedded.row.tolist() == [*embedded.row[:-1], -1]
    assert len(pd.read_parquet(tmp_path / "o" / "matches" / "matches.parquet")) == 37
    assert "of 37 postings found a match" in (tmp_path / "o/matches/report.html").read_text()


def test_run_columns(case: Input, tiny_bert: Path, tmp_path: Path) -> None:
    folder = case("run_columns", lambda f: lines(f / "c.csv", "a,x,1", "b,y,2", head="sku,name\n"))
    rows = [f"s{n},thing {n // 2},g{n // 2}" for n in range(40)]
    lines(folder / "more.csv", *rows, head="sku,name,label_group\n")
    (folder / "c.yaml").write_text(REJECTED)
    said = call(
        "run", folder / "c.yaml", "--catalogue", folder / "more.csv", "--text.encoder.model",
        tiny_bert, "--columns", "posting_id=sku,title=name", "--out", tmp_path / "o",
    )  # fmt: skip
    assert said.code == 0, said.text
    assert packed(tmp_path / "o" / "shards").title.tolist()[0] == "thing 0"


def test_sliver_photo(photos: Path, tmp_path: Path) -> None:
    """A line of pixels: its memory is bounded wherever it is decoded, or it is refused."""
    line = np.random.default_rng(0).integers(0, 256, (1, 30_000, 3), np.uint8)
    Image.fromarray(line).save(tmp_path / "line.jpg")
    shutil.copy(photos / "p0.jpg", tmp_path)
    lines(tmp_path / "c.csv", "a,line.jpg,x,1", "b,p0.jpg,y,1")
    words = [tmp_path / "c.csv", "--images", tmp_path, "--out", tmp_path / "s"]
    assert call("pack", *words).code == 0
    program = (
        "import sys, resource\n"
        "from shards.read.shard_set import ShardSet\n"
        "from shards.photos.decode import decode_photo\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for item in map(ShardSet(sys.argv[1]).reader().read, range(2)):\n"
        "    for recipe in ('exact', 'balanced', 'fast'):\n"
        "        item.photo and decode_photo(item.photo, 224, recipe)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)\n"
    )
    limit = 6 << 30  # so that a failure does not take the machine with it
    ended = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "s"], cwd=ROOT, text=True, capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)), timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert int(ended.stdout) < 300_000, f"{ended.stdout} kB above the start"


def test_the_splits_of_these_labels_are_known() -> None:
    """The small inputs rely on what the hash of a label gives: some products of every split."""
    assert {split_of(f"g{n}") for n in range(12)} >= {"train", "val"}
