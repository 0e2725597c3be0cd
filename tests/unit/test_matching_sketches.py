"""First passes: what a sketch leaves out is never wanted, however the rows are made."""

import logging
import re
import threading
import time

import numpy as np
import pytest
import torch

from dist_train.config import IndexConfig, JoinConfig
from dist_train.embedding.store import EmbeddingSet
from dist_train.matching import find as finding
from dist_train.matching.choosing import Choice, choose_sketch, faiss_nanoseconds
from dist_train.matching.find import set_up
from dist_train.matching.index import build_index, indexed_views
from dist_train.matching.kernels import kernels_for
from dist_train.matching.passes import FirstPass, Side, left_of_tile
from dist_train.matching.sketches import Sketch
from dist_train.matching.work import Work
from dist_train.runtime import Runtime
from tests.distributed.planted import planted, write_set

KERNELS = {kernel.name: kernel for kernel in kernels_for(torch.device("cpu"), bf16=True)}
PAIR = [KERNELS["float32"], KERNELS["int8"]]
D, k = 160, 96


def axes(seed: int = 0, off: float = 0.0) -> np.ndarray:
    """Axes (D, k) of a subspace, some of them `off` the right angle."""
    rng = np.random.default_rng(seed)
    made, _ = np.linalg.qr(rng.standard_normal((D, k)))
    return (made + off * rng.standard_normal((D, k))).astype(np.float32)


CUTS = {
    "all": None,
    "columns": np.arange(k),
    "axes": axes(),
    "axes that are off": axes(off=1e-6),
}


def hard_rows(kind: str) -> np.ndarray:
    """Unit rows float32 (200, D) that are bad for one thing or another."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((200, D))
    if kind == "one large column":
        rows[:, 3] *= 40
    elif kind == "signs":  # the largest sums that integers of eight bits see
        rows = np.where(rng.random((200, D)) < 0.97, 1.0, -1.0)
    elif kind == "all in the rest":  # what is cut off is parallel: the bound is reached
        rows[:, :k] *= 0.05
        rows[:, k:] = rows[0, k:]
    elif kind == "nothing in the rest":
        rows = rows[:, :k] @ axes().T.astype(np.float64)
    elif kind == "opposed":
        rows[100:] = -rows[:100]
    elif kind == "twins":
        rows = np.repeat(rows[:20], 10, axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if kind == "with zero rows":
        rows[::7] = 0
    return rows.astype(np.float32)


KINDS = ("random", "one large column", "signs", "all in the rest", "nothing in the rest",
         "opposed", "twins", "with zero rows")  # fmt: skip


class Pairs:
    """Pairs from a floor on."""

    k = 0

    def __init__(self, floor: float) -> None:
        self.floor = floor

    def pair(self) -> float:
        return self.floor

    def nearest(self, rows: np.ndarray) -> None:
        return None


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_product_is_further_off_than_its_margin(kernel, cut, kind):
    rows, sketch = hard_rows(kind), Sketch(KERNELS[kernel], CUTS[cut])
    one, other = sketch.left(rows[:90]), sketch.right(rows)
    truth = rows[:90].astype(np.float64) @ rows.T.astype(np.float64)
    products, margin = sketch.kernel.product(one, other).numpy(), sketch.margin(one, other)
    top = np.minimum(truth, 1.02)  # where integers of eight bits end
    assert (products >= sketch.kernel.steps(top - margin)).all()
    assert margin < 0.3
    if not sketch.cuts:
        assert (sketch.kernel.value(products) <= truth + margin).all()
    elif kernel == "float32":  # and it is a bound worth having: what was cut, at the most
        z = (
            rows @ np.eye(D, dtype=np.float32)[:, CUTS[cut]]
            if cut == "columns"
            else rows @ CUTS[cut]
        )
        rest = np.sqrt(np.maximum(1 - (z * z).sum(1), 0)) * (rows.any(1))
        assert (products <= z[:90] @ z.T + np.outer(rest[:90], rest) + 0.01).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_leaves_all_that_is_wanted_and_little_else(kernel, cut, kind):
    rows, sketch = hard_rows(kind), Sketch(KERNELS[kernel], CUTS[cut])
    truth, seen = rows.astype(np.float64) @ rows.T.astype(np.float64), FirstPass()
    sides = [
        Side(np.arange(200), prepare(rows), [(1.0, rows)])
        for prepare in (sketch.left, sketch.right)
    ]
    for floor in np.quantile(truth, [0.5, 0.99, 1.0]):
        at, by, values = left_of_tile(sketch, *sides, True, Pairs(float(floor)), seen)
        found = set(zip(at.tolist(), by.tolist(), strict=True))
        assert len(found) == len(at) == len(values)
        i, j = np.triu_indices(200, 1)
        wanted = truth[i, j] >= floor
        assert set(zip(i[wanted].tolist(), j[wanted].tolist(), strict=True)) <= found
        assert (truth[at, by] >= floor - 1e-4).all()
    assert seen.error <= seen.margin


def long_and_flat(rows: int, width: int = 256) -> np.ndarray:
    """Unit rows that lie nearly in 24 directions, turned so that no column says so."""
    rng = np.random.default_rng(2)
    made = rng.standard_normal((rows, 24)) @ rng.standard_normal((24, width))
    made += 0.5 * rng.standard_normal((rows, width))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def test_few_axes_are_found_where_the_rows_lie_in_few_directions():
    rows = long_and_flat(4096)
    choices = choose_sketch(rows, PAIR, 0.8, 0.0, [256], 10**6)
    best = choices[0].sketch
    assert best.columns is not None
    assert best.columns.ndim == 2
    assert best.columns.shape[1] <= 128
    assert [c.nanoseconds for c in choices] == sorted(c.nanoseconds for c in choices)
    few = choose_sketch(rows, PAIR, 0.8, 0.0, [256], 1000)
    assert all(c.sketch.columns is None or c.sketch.columns.ndim == 1 for c in few)


def test_nothing_is_cut_off_for_neighbours_nor_where_all_is_wanted():
    rows = long_and_flat(4096)
    assert not any(c.sketch.cuts for c in choose_sketch(rows, PAIR, 0.8, 1e-3, [256], 10**6))
    assert not choose_sketch(rows, PAIR, -0.9, 0.0, [256], 10**6)[0].sketch.cuts


# The engine, and setting up


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """A folder with an index, and the views."""
    folder = tmp_path_factory.mktemp("indexed")
    write_set(folder / "emb", planted(800, 32))
    build_index(folder / "emb", folder / "Flat", IndexConfig(kind="Flat"))
    return folder, indexed_views(folder / "Flat", EmbeddingSet(folder / "emb"))


PARTS = (("image", "text"), ("image",), ("text",))


@pytest.mark.parametrize(
    ("kind", "ours", "engine", "why"),
    [
        ("Flat", 0.0, "gemm", "800 items are done at once by either"),
        ("Flat", 1e-3, "gemm", r"gemm takes 0\.00 ns a pair, faiss \d+\.\d+ \(measured"),
        ("Flat", 1e9, "faiss", r"gemm takes 10+\.00 ns a pair, faiss \d+\.\d+ \(measured"),
        ("IVF", 1.0, "gemm", "it is exact, the index of kind IVF is not"),
        (None, 1.0, "gemm", "there is no index"),
    ],
)
def test_the_engine_is_chosen_by_measurement(indexed, kind, ours, engine, why):
    passes = {parts: [Choice(Sketch(KERNELS["float32"]), ours, 0.0)] for parts in PARTS}
    chosen, reason = finding._faster_engine(indexed[1], kind, passes, 0.6, Runtime("cpu"))
    assert chosen == engine
    assert re.match(why, reason)


def test_faiss_is_timed_on_the_sample():
    rows = long_and_flat(4096, 64)
    assert 0 < faiss_nanoseconds(rows, "Flat", 0.9) < faiss_nanoseconds(rows, "SQfp16", 0.9)


def test_the_folder_is_not_cleared_under_one_who_sets_up(indexed, tmp_path, monkeypatch):
    """As when the last worker of another launch has just finished."""
    folder, views = indexed
    out, plan = tmp_path / "m", finding._plan

    def slowly(*arguments):
        clearing.start()
        time.sleep(0.3)
        return plan(*arguments)

    clearing = threading.Thread(target=Work(out).clear)
    monkeypatch.setattr(finding, "_plan", slowly)
    search = set_up(views, folder / "Flat", out, JoinConfig(max_score_floor=0.6), Runtime("cpu"))
    clearing.join(timeout=60)
    assert not clearing.is_alive()
    assert not (out / ".work").exists()
    assert search.wanted.floor <= 0.6


def test_what_was_chosen_is_said_and_read_back(indexed, tmp_path, monkeypatch, caplog):
    folder, views = indexed
    cut = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 40)))[0].astype(np.float32)
    some, both = Sketch(KERNELS["float32"], np.arange(8)), Sketch(KERNELS["int8"], cut)
    passes = {parts: [Choice(some, 1.0, 0.1)] for parts in PARTS}
    passes["image", "text"] = [Choice(both, 1e-3, 0.1)]
    monkeypatch.setattr(finding, "first_passes", lambda *_: passes)
    for _ in range(2):  # the first decides, the second reads
        with caplog.at_level(logging.INFO, logger="dist_train"):
            engine = set_up(
                views, folder / "Flat", tmp_path, JoinConfig(max_score_floor=0.6), Runtime("cpu")
            ).engine
        np.testing.assert_array_equal(engine.sketches["image", "text"].columns, cut)
        np.testing.assert_array_equal(engine.sketches[("text",)].columns, np.arange(8))
        assert engine.sketches["image", "text"].kernel.name == "int8"
    assert "engine gemm (gemm takes 0.00 ns a pair, faiss" in caplog.text
    assert "int8, 40 turned axes and a bound: 0.00 ns a pair" in caplog.text
