"""The embedding set: one row an item, zero rows for missing parts, resumed to the same bytes."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_train.config.options import EmbedConfig
from dist_train.config.training import (
    ImageEncoderOptions,
    ImageTraining,
    TextEncoderOptions,
    TextTraining,
)
from dist_train.distributed.runtime import row_blocks
from dist_train.embedding.embed import embed
from dist_train.embedding.store import EmbeddingSet, Rows, open_rows
from dist_train.encoders.batches import Batch, plan_batches, unit_vectors
from dist_train.encoders.encoder import load_encoder
from dist_train.matching.vectors import ItemVectors, ModalityVectors, read_rows
from dist_train.training.loop import train
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput, Corrupt, Failed, Stopped, Unfinished
from tests.support.damage import vouch_again

COMMON = {"epochs": 0, "batch_size": 16, "workers": 0, "device": "cpu", "precision": "fp32"}
CONFIG = EmbedConfig(batch_size=32, workers=0, device="cpu", precision="fp32")
NO_PHOTO, NO_TITLE, NOTHING = range(0, 300, 7), range(3, 300, 11), (1, 150)


@pytest.fixture(scope="module")
def holed(catalogue: Path, tmp_path_factory) -> Path:
    """The generated catalogue, photos and titles missing here and there, as a shard set."""
    out = tmp_path_factory.mktemp("holed")
    table = pd.read_csv(catalogue / "catalogue.csv", dtype=str, keep_default_na=False)
    table.loc[[*NO_PHOTO, *NOTHING], "image"] = ""
    table.loc[[*NO_TITLE, *NOTHING], "title"] = ""
    table.to_csv(out / "catalogue.csv", index=False)
    pack(out / "catalogue.csv", catalogue / "images", out / "shards", PackOptions(size=48))
    return out / "shards"


@pytest.fixture(scope="module")
def runs(holed: Path, tiny_vit: Path, tiny_bert: Path, tmp_path_factory) -> dict[str, Path]:
    """Real runs of no step: the tiny encoders as they were given."""
    out = tmp_path_factory.mktemp("runs")
    vit = ImageEncoderOptions(model=str(tiny_vit), image_size=32)
    bert = TextEncoderOptions(model=str(tiny_bert))
    train("image", holed, out / "image", ImageTraining(encoder=vit, **COMMON))
    train("text", holed, out / "text", TextTraining(encoder=bert, **COMMON))
    return {"image": out / "image", "text": out / "text"}


@pytest.fixture(scope="module")
def embedded(holed: Path, runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "emb"
    embed(holed, out, CONFIG, **runs)
    return out


def npy(folder: Path, modality: str) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f"{modality}-*.npy"))])


def test_every_posting_is_counted_once(holed, embedded, catalogue):
    written = pd.read_csv(catalogue / "catalogue.csv", dtype=str).posting_id
    postings = pd.read_parquet(embedded / "items.parquet")
    assert postings.posting_id.tolist() == written.tolist()
    lost = set(NOTHING) | set(NO_PHOTO) & set(NO_TITLE)
    rejected = postings.row == -1
    assert set(np.flatnonzero(rejected)) == lost
    assert set(postings.status[rejected]) == {"rejected"}
    assert set(postings.status[~rejected]) == {"embedded"}
    assert sorted(postings.row[~rejected]) == list(range(300 - len(lost)))
    counts = json.loads((embedded / "manifest.json").read_text())["counts"]
    assert (counts["postings"], counts["items"]) == (300, 300 - len(lost))
    for column in ("row", "posting_id", "label_group", "split", "title", "has_image", "has_text",
                   "status"):  # fmt: skip
        assert column in postings
    packed = ShardSet(holed).packed
    items = EmbeddingSet(embedded).items
    assert items.posting_id.tolist() == packed.posting_id.tolist()
    for column in ("label_group", "split", "title", "has_image", "has_text"):
        assert items[column].tolist() == packed[column].tolist()


@pytest.mark.parametrize("modality", ["image", "text"])
def test_rows_are_unit_or_zero_where_the_part_is_missing(embedded, modality):
    items, vectors = EmbeddingSet(embedded).items, npy(embedded, modality)
    assert vectors.shape == (len(items), 32)
    assert vectors.dtype == np.float16
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    here = items[f"has_{modality}"].to_numpy()
    assert 0 < here.sum() < len(here)
    np.testing.assert_allclose(norms[here], 1, atol=2e-3)
    assert not vectors[~here].any()


def test_parts_have_the_bounds_that_the_number_of_items_gives(embedded):
    items = len(EmbeddingSet(embedded).items)
    wanted = [len(block) for block in row_blocks(items)]
    assert len(wanted) == 2
    for modality in ("image", "text"):
        parts = [embedded / f"{modality}-{number:05d}.npy" for number in range(len(wanted))]
        assert sorted(embedded.glob(f"{modality}-*.npy")) == parts
        assert [len(np.load(part)) for part in parts] == wanted


@pytest.mark.parametrize("modality", ["image", "text"])
def test_every_row_is_that_item_encoded_alone(holed, runs, embedded, modality):
    encoder = load_encoder(runs[modality] / "encoder", modality)
    reader, inputs = ShardSet(holed).reader(), encoder.inputs()
    items, vectors = EmbeddingSet(embedded).items, npy(embedded, modality)
    for row in np.flatnonzero(items[f"has_{modality}"])[::3]:
        with torch.inference_mode():
            alone = encoder(*inputs([reader[int(row)]], [0]))[0]
        assert reader[int(row)].posting_id == items.posting_id[row]
        np.testing.assert_allclose(vectors[row], alone / alone.norm(), atol=1e-3)


@pytest.mark.parametrize("size", [1, 16, 500])
def test_batches_hold_every_item_once_with_titles_of_like_length(holed, size):
    reader = ShardSet(holed).reader()
    some = np.flatnonzero(ShardSet(holed).packed.has_text)[4::3]
    plans = plan_batches(reader, some, size)
    items = np.concatenate([plan.items for plan in plans])
    assert sorted(items) == some.tolist()
    lengths = [len(reader[int(n)].title.encode()) for n in items]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]
    sizes = [len(plan.items) for plan in plans]
    assert sizes == [size] * (len(some) // size) + [len(some) % size] * (len(some) % size > 0)
    assert not any(plan.seeds.any() for plan in plans)


def test_vectors_are_of_the_batches_asked_for_without_their_broken_items():
    torch.manual_seed(0)
    encoder = torch.nn.Linear(5, 3)
    wholes = [torch.randn(4, 5), torch.randn(0, 5), torch.randn(2, 5), torch.randn(3, 5)]
    batches = iter([
        Batch(np.arange(len(x)) + 10 * n, (x,), torch.zeros(len(x)), [], [])
        for n, x in enumerate(wholes)
    ])  # fmt: skip
    found = list(unit_vectors(encoder, batches, 3, torch.device("cpu")))
    assert [items.tolist() for items, _ in found] == [[0, 1, 2, 3], [20, 21]]
    for (_, vectors), x in zip(found, (wholes[0], wholes[2]), strict=True):
        wide = x.double().numpy() @ encoder.weight.detach().double().numpy().T
        wide += encoder.bias.detach().double().numpy()
        wide /= np.sqrt((wide**2).sum(axis=1, keepdims=True))
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, wide, atol=1e-6)
    assert next(batches).items.tolist() == [30, 31, 32]  # the next is for the next part


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [(torch.nan, BadInput, r"tensors hold NaN or Inf, the first"),
     (3e38, Failed, r"text block 0 has vectors with NaN or Inf.*is broken")],
)  # fmt: skip
def test_an_encoder_that_gives_no_numbers_fails_by_name(holed, runs, tmp_path, value, error, said):
    """NaN is found in the weights, before any title; what overflows only in the vectors."""
    shutil.copytree(runs["text"], tmp_path / "text")
    files = sorted((tmp_path / "text/encoder").rglob("*.safetensors"))
    assert files
    for file in files:
        held = {name: torch.full_like(x, value) if x.is_floating_point() else x
                for name, x in load_file(file).items()}  # fmt: skip
        save_file(held, file, metadata={"format": "pt"})
    vouch_again(tmp_path / "text")
    with pytest.raises(error, match=said):
        embed(holed, tmp_path / "out", CONFIG, image=None, text=tmp_path / "text")
    assert not list((tmp_path / "out").glob("*.npy"))


def test_a_cut_off_set_is_completed_to_the_same_bytes(holed, runs, embedded, tmp_path):
    out = embedded.with_name("resumed")
    shutil.copytree(embedded, out)
    for name in ("manifest.json", "items.parquet", "image-00001.npy", "text-00000.npy"):
        (out / name).unlink()
    kept = (out / "image-00000.npy").stat().st_mtime_ns
    with pytest.raises(Unfinished, match="resumed"):
        EmbeddingSet(out)
    embed(holed, out, CONFIG, **runs)
    assert (out / "image-00000.npy").stat().st_mtime_ns == kept
    for path in [*sorted(embedded.glob("*.npy")), embedded / "items.parquet"]:
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    first, second = (json.loads((p / "manifest.json").read_text()) for p in (embedded, out))
    assert first["fingerprint"] == second["fingerprint"]


@pytest.fixture
def signals_as_before():
    """The signal handlers that a stage installs go when the test ends, and their flag with them."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.usefixtures("signals_as_before")
def test_a_signal_in_the_middle_of_a_part_is_heard_at_once(
    number, holed, runs, embedded, tmp_path, monkeypatch
):
    out, taken, inputs_on = embedded.with_name(f"stopped-{number}"), [], Batch.inputs_on

    def third_is_the_last(batch, device):
        taken.append(len(batch.items))
        if len(taken) == 3:
            os.kill(os.getpid(), number)
        return inputs_on(batch, device)

    monkeypatch.setattr(Batch, "inputs_on", third_is_the_last)
    with pytest.raises(Stopped, match="the same command goes on"):
        embed(holed, out, CONFIG, **runs)
    assert taken == [32, 32, 32]
    assert json.loads((out / "status.json").read_text())["status"] == "preempted"
    assert not list(out.glob("*.npy"))
    monkeypatch.undo()
    for installed in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(installed, signal.SIG_DFL)  # another process begins without a flag
    embed(holed, out, CONFIG, **runs)
    for path in [*sorted(embedded.glob("*.npy")), embedded / "items.parquet"]:
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_finished_set_is_left_as_it_is(holed, runs, embedded):
    before = {path: path.stat().st_mtime_ns for path in embedded.iterdir()}
    again = embed(holed, embedded, CONFIG, **runs)
    assert again == json.loads((embedded / "manifest.json").read_text())["counts"]
    assert {path: path.stat().st_mtime_ns for path in embedded.iterdir()} == before


def test_another_config_or_other_runs_are_refused(holed, runs, embedded):
    other = EmbedConfig(dtype="float32", batch_size=32, workers=0, device="cpu", precision="fp32")
    with pytest.raises(BadInput, match="dtype 'float16' there, 'float32' requested"):
        embed(holed, embedded, other, **runs)
    with pytest.raises(BadInput, match="parents differs"):
        embed(holed, embedded, CONFIG, image=runs["image"], text=None)
    assert json.loads((embedded / "status.json").read_text())["status"] == "done"


def test_how_the_work_is_done_may_change(holed, runs, embedded):
    more = EmbedConfig(batch_size=32, workers=2, device="auto", precision="fp32")
    assert embed(holed, embedded, more, **runs)["items"] > 0


def test_one_modality_as_float32(holed, runs, embedded, tmp_path):
    out = tmp_path / "one"
    config = EmbedConfig(dtype="float32", batch_size=7, workers=0, device="cpu", precision="fp32")
    embed(holed, out, config, image=None, text=runs["text"])
    single = EmbeddingSet(out)
    assert single.modalities == ["text"]
    assert npy(out, "text").dtype == np.float32
    # Another batch size pads otherwise; no more than that.
    np.testing.assert_allclose(npy(out, "text"), npy(embedded, "text"), atol=1e-3)
    assert not list(out.glob("image-*"))


def test_what_cannot_be_embedded_is_refused_by_name(holed, runs, tmp_path):
    with pytest.raises(BadInput, match="--image RUN or --text RUN"):
        embed(holed, tmp_path / "a", CONFIG, None, None)
    with pytest.raises(BadInput, match="wanted image"):
        embed(holed, tmp_path / "b", CONFIG, runs["text"], None)
    with pytest.raises(BadInput, match="not a run directory"):
        embed(holed, tmp_path / "c", CONFIG, holed / "train", None)
    with pytest.raises(BadInput, match="wanted run"):
        embed(holed, tmp_path / "d", CONFIG, holed, None)
    assert not (tmp_path / "a").exists()


# What is broken, missing or of another length


@pytest.fixture
def unfinished(embedded, tmp_path) -> Path:
    """The set whose vectors all lie there, as a kill before the end leaves it."""
    out = embedded.with_name(tmp_path.name)  # beside the other: parents are told by relative path
    shutil.copytree(embedded, out)
    for name in ("manifest.json", "items.parquet"):
        (out / name).unlink()
    return out


def without_vector(out: Path, modality: str, rows: np.ndarray) -> None:
    """Make the vectors of some rows those of items whose bytes are broken."""
    first = 0
    for path in sorted(out.glob(f"{modality}-*.npy")):
        part = np.load(path)
        part[[row - first for row in rows if first <= row < first + len(part)]] = 0
        np.save(path, part)
        first += len(part)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_an_item_whose_bytes_are_broken_has_no_such_part(
    holed, runs, embedded, unfinished, modality
):
    before = EmbeddingSet(embedded).items
    broken = np.flatnonzero(before[f"has_{modality}"])[::40]
    without_vector(unfinished, modality, broken)
    counts = embed(holed, unfinished, CONFIG, **runs)
    items = EmbeddingSet(unfinished).items
    assert counts == {"postings": 300, "items": 294, "unreadable": len(broken)}
    assert np.flatnonzero(items.status == "unreadable").tolist() == broken.tolist()
    assert (
        np.flatnonzero(items[f"has_{modality}"] != before[f"has_{modality}"]).tolist()
        == broken.tolist()
    )
    other = {"image": "text", "text": "image"}[modality]
    assert items[f"has_{other}"].tolist() == before[f"has_{other}"].tolist()


@pytest.mark.parametrize(
    ("budget", "broken", "whole"),
    [(0.2, 58, True), (0.2, 59, False), (0.0, 10, True), (0.0, 11, False), (0.03, 10, True)],
)
def test_the_budget_is_a_share_of_the_items(
    holed, runs, embedded, unfinished, budget, broken, whole
):
    """Of 300 postings 294 are items (a fifth is 58.8), of which about 250 have a photo."""
    rows = np.flatnonzero(EmbeddingSet(embedded).items.has_image)
    assert 0.2 * len(rows) < 58
    without_vector(unfinished, "image", rows[:broken])
    config = replace(CONFIG, max_unreadable=budget)
    if whole:
        assert embed(holed, unfinished, config, **runs)["unreadable"] == broken
    else:
        told = rf"{broken} of 294 items have a broken image, the first '\w+'.*--max-unreadable"
        with pytest.raises(Failed, match=told):
            embed(holed, unfinished, config, **runs)
        assert not (unfinished / "manifest.json").exists()


@pytest.mark.parametrize("rows", [-1, 1])
def test_vectors_that_are_not_one_an_item_are_refused(holed, runs, unfinished, rows):
    path = unfinished / "text-00001.npy"
    part = np.load(path)
    np.save(path, part[:rows] if rows < 0 else np.concatenate([part, part[:rows]]))
    with pytest.raises(BadInput, match=f"{294 + rows} text rows for 294 items; remove it"):
        embed(holed, unfinished, CONFIG, **runs)
    assert not (unfinished / "manifest.json").exists()


@pytest.mark.parametrize("change", ["missing", "shorter", "longer"])
@pytest.mark.parametrize("name", ["image-00000.npy", "text-00001.npy", "items.parquet"])
def test_a_finished_set_that_lacks_a_part_is_refused(embedded, tmp_path, change, name):
    out = Path(shutil.copytree(embedded, tmp_path / "emb"))
    data = (out / name).read_bytes()
    (out / name).write_bytes({"shorter": data[:-1], "longer": data + b"\0", "missing": b""}[change])
    if change == "missing":
        (out / name).unlink()
    with pytest.raises(Corrupt, match=f"{name}: missing or not as long as it was written"):
        EmbeddingSet(out)


def test_rows_over_several_parts():
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((23, 4)).astype(np.float16)
    rows = Rows([whole[:5], whole[5:6], whole[6:20], whole[20:]])
    assert (len(rows), rows.width) == (23, 4)
    for start in range(23):
        for stop in range(start + 1, 24):
            block = read_rows(rows, range(start, stop))
            assert block.dtype == np.float16
            np.testing.assert_array_equal(block, whole[start:stop])
    some = rng.integers(0, 23, 50)
    vectors = ItemVectors({"image": ModalityVectors(rows, np.ones(23, bool), 1.0)})
    taken = vectors.stored_rows("image", some)
    assert taken.dtype == np.float64
    np.testing.assert_array_equal(taken, whole[some].astype(np.float64))
    assert vectors.stored_rows("image", np.zeros(0, np.int64)).shape == (0, 4)


@pytest.mark.parametrize(
    "part", [np.zeros(4, np.float32), np.zeros((4, 2)), np.zeros((4, 0), np.float16)]
)
def test_a_file_that_is_no_block_of_vectors_is_named(part, tmp_path):
    np.save(tmp_path / "good.npy", np.zeros((3, 2), np.float32))
    np.save(tmp_path / "bad.npy", part)
    good = open_rows([tmp_path / "good.npy"])
    assert (len(good), good.width) == (3, 2)
    with pytest.raises(Corrupt, match=r"bad\.npy: .* is no block of vectors"):
        open_rows([tmp_path / "bad.npy", tmp_path / "good.npy"])
