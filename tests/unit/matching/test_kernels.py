"""The coarse pass: what a kernel leaves out is never wanted, however the rows are made."""

import logging
import re
import threading
import time

import numpy as np
import pytest
import torch

from dist_train.config.options import IndexConfig, JoinConfig
from dist_train.distributed.runtime import Runtime
from dist_train.embedding.store import EmbeddingSet
from dist_train.matching import build_pairs as stage_join
from dist_train.matching.build_pairs import set_up
from dist_train.matching.index import build_index, indexed_vectors
from dist_train.matching.kernels import (
    Chunk,
    CoarsePassStats,
    Form,
    candidates_of,
    kernels_for,
)
from dist_train.matching.sampling import KernelTime, faiss_nanoseconds, time_kernels
from dist_train.matching.vectors import vectors_of_array
from dist_train.matching.work_folder import WorkFolder
from tests.support.planted import planted, write_set

KERNELS = {kernel.name: kernel for kernel in kernels_for(torch.device("cpu"), bf16=True)}
D = 160


def hard_rows(kind: str) -> np.ndarray:
    """Unit rows float32 (200, D) that are bad for one thing or another."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((200, D))
    if kind == "one large column":
        rows[:, 3] *= 40
    elif kind == "signs":  # the largest sums that integers of eight bits see
        rows = np.where(rng.random((200, D)) < 0.97, 1.0, -1.0)
    elif kind == "nearly parallel":
        rows = rows[0] + 0.05 * rows
    elif kind == "in few directions":
        rows = rows[:, :24] @ rng.standard_normal((24, D))
    elif kind == "opposed":
        rows[100:] = -rows[:100]
    elif kind == "twins":
        rows = np.repeat(rows[:20], 10, axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if kind == "with zero rows":
        rows[::7] = 0
    return rows.astype(np.float32)


KINDS = (
    "random",
    "one large column",
    "signs",
    "nearly parallel",
    "in few directions",
    "opposed",
    "twins",
    "with zero rows",
)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_product_is_further_off_than_its_margin(name, kind):
    rows, kernel = hard_rows(kind), KERNELS[name]
    one, other = kernel.prepare(rows[:90], "query"), kernel.prepare(rows, "database")
    truth = rows[:90].astype(np.float64) @ rows.T.astype(np.float64)
    products, margin = kernel.product(one, other).numpy(), kernel.margin(one, other)
    top = np.minimum(truth, 1.02)  # where integers of eight bits end
    assert (products >= kernel.to_products(top - margin)).all()
    assert (kernel.to_scores(products) <= truth + margin).all()
    assert margin < 0.3


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_leaves_all_that_is_wanted_and_little_else(name, kind):
    rows, kernel = hard_rows(kind), KERNELS[name]
    truth, seen = rows.astype(np.float64) @ rows.T.astype(np.float64), CoarsePassStats()
    forms: tuple[Form, ...] = ("query", "database")
    one, two = (Chunk(np.arange(200), kernel.prepare(rows, form), [(1.0, rows)]) for form in forms)
    for floor in np.quantile(truth, [0.5, 0.99, 1.0]):
        at, by, values = candidates_of(kernel, one, two, True, float(floor), None, seen)
        found = set(zip(at.tolist(), by.tolist(), strict=True))
        assert len(found) == len(at) == len(values)
        i, j = np.triu_indices(200, 1)
        wanted = truth[i, j] >= floor
        assert set(zip(i[wanted].tolist(), j[wanted].tolist(), strict=True)) <= found
        assert (truth[at, by] >= floor - 1e-4).all()
    assert seen.error <= seen.margin


def rows_in_few_directions(rows: int, width: int) -> np.ndarray:
    """Unit rows float32 that lie nearly in 24 directions."""
    rng = np.random.default_rng(2)
    made = rng.standard_normal((rows, 24)) @ rng.standard_normal((24, width))
    made += 0.5 * rng.standard_normal((rows, width))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("k", [0, 5])
def test_the_fastest_kernel_comes_first(k):
    item_vectors, kernels = (
        vectors_of_array(rows_in_few_directions(9000, 64)),
        list(KERNELS.values()),
    )
    choices = time_kernels(item_vectors, 0.8, k, kernels)
    assert {choice.kernel for choice in choices} == set(kernels)
    spent = [choice.nanoseconds for choice in choices]
    assert spent == sorted(spent)
    assert spent[0] > 0


def test_of_few_items_or_one_kernel_nothing_is_measured():
    few = vectors_of_array(rows_in_few_directions(800, 64))
    assert time_kernels(few, 0.8, 5, list(KERNELS.values())) == [
        KernelTime(KERNELS["float32"], 0.0)
    ]
    many = vectors_of_array(rows_in_few_directions(9000, 64))
    assert time_kernels(many, 0.8, 5, [KERNELS["int8"]]) == [KernelTime(KERNELS["int8"], 0.0)]


# The engine, and setting up


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """A folder with an index, and the item_vectors."""
    folder = tmp_path_factory.mktemp("indexed")
    write_set(folder / "emb", planted(800, 32))
    build_index(folder / "emb", folder / "Flat", IndexConfig(kind="Flat"))
    return folder, indexed_vectors(folder / "Flat", EmbeddingSet(folder / "emb"))


@pytest.mark.parametrize(
    ("kind", "ours", "engine", "why"),
    [
        ("Flat", 0.0, "gemm", "800 items take either engine no time"),
        ("Flat", 1e-3, "gemm", r"gemm takes 0\.00 ns a pair, faiss \d+\.\d+ \(measured"),
        ("Flat", 1e9, "faiss", r"gemm takes 10+\.00 ns a pair, faiss \d+\.\d+ \(measured"),
        ("IVF", 1.0, "gemm", "it is exact, the index of kind IVF is not"),
    ],
)
def test_the_engine_is_chosen_by_measurement(indexed, monkeypatch, kind, ours, engine, why):
    choices, (folder, item_vectors) = [KernelTime(KERNELS["float32"], ours)], indexed
    monkeypatch.setattr(stage_join, "time_kernels", lambda *_: choices)
    monkeypatch.setattr(stage_join, "read_index_json", lambda _: {"kind": kind})
    config = JoinConfig(max_score_floor=0.6)
    plan = stage_join._plan(item_vectors, folder / "Flat", config, Runtime("cpu"), [])
    assert plan["engine"] == engine
    assert re.match(why, plan["reason"])


def test_faiss_is_timed_on_the_sample():
    rows = rows_in_few_directions(4096, 64)
    assert 0 < faiss_nanoseconds(rows, "Flat", 0.9) < faiss_nanoseconds(rows, "SQfp16", 0.9)


def test_the_folder_is_not_cleared_under_one_who_sets_up(indexed, tmp_path, monkeypatch):
    """As when the last worker of another launch has just finished."""
    folder, item_vectors = indexed
    out, plan = tmp_path / "m", stage_join._plan

    def slowly(*arguments):
        clearing.start()
        time.sleep(0.3)
        return plan(*arguments)

    clearing = threading.Thread(target=WorkFolder(out).clear)
    monkeypatch.setattr(stage_join, "_plan", slowly)
    _, limits, _ = set_up(
        item_vectors, folder / "Flat", out, JoinConfig(max_score_floor=0.6), Runtime("cpu")
    )
    clearing.join(timeout=60)
    assert not clearing.is_alive()
    assert not (out / ".work").exists()
    assert limits.score_floor <= 0.6


def test_what_was_chosen_is_said_and_read_back(indexed, tmp_path, monkeypatch, caplog):
    folder, item_vectors = indexed
    choices = [KernelTime(KERNELS["int8"], 1e-3), KernelTime(KERNELS["float32"], 2.0)]
    monkeypatch.setattr(stage_join, "time_kernels", lambda *_: choices)
    for _ in range(2):  # the first decides, the second reads
        with caplog.at_level(logging.INFO, logger="dist_train"):
            engine, _, _ = set_up(
                item_vectors,
                folder / "Flat",
                tmp_path,
                JoinConfig(max_score_floor=0.6),
                Runtime("cpu"),
            )
        assert engine.kernel.name == "int8"
        monkeypatch.setattr(stage_join, "time_kernels", None)
    assert caplog.text.count("engine gemm (gemm takes 0.00 ns a pair, faiss") == 2
    assert "kernel int8, 0.00 ns a pair, rather than float32, 2.00 ns a pair" in caplog.text
