"""The GPU acceptance: that its checks can fail, that its logic holds on a CPU, that it says no."""

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.acceptance import acceptance, correctness, speed
from dist_train.acceptance.acceptance import Result, checks, table
from dist_train.acceptance.correctness import Proof
from dist_train.acceptance.speed import Rate
from dist_train.matching.faiss_library import gpus
from tests.support.launching import ROOT, environment

CPU = torch.device("cpu")
SCRIPT = ROOT / "launch/gpu_acceptance.sh"


def accept(out: Path, timeout: float, **env: str) -> subprocess.CompletedProcess[str]:
    """The command, as a person starts it."""
    words = ["bash", str(SCRIPT), str(out)]
    whole = {**environment(), "GLOO_SOCKET_IFNAME": "lo", **env}
    return subprocess.run(words, env=whole, capture_output=True, text=True, timeout=timeout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_ends_with_4(tmp_path: Path) -> None:
    done = accept(tmp_path / "told.json", 280)
    assert done.returncode == 4, done.stderr
    assert "no GPU answers here" in done.stderr
    assert not (tmp_path / "told.json").exists()


@pytest.mark.full
@pytest.mark.timeout(1000)
def test_every_check_holds_on_a_cpu(tmp_path: Path) -> None:
    done = accept(tmp_path / "told.json", 900, DEVICE="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["passed"] is True
    names = [result["name"] for result in told["results"]]
    assert names == [name for name, _ in checks(CPU, 2)]
    assert len(names) == len(set(names)) > 20
    assert done.stdout.count("\n") >= len(names)
    assert sum(result["seconds"] for result in told["results"]) < 480


@pytest.mark.parametrize("factory", ["Flat", "IVF64,Flat", ""], ids=["flat", "IVF", "knn"])
def test_faiss_beside_numpy(factory: str) -> None:
    found = correctness.best_ten(CPU, factory)
    assert 0 < found.difference <= found.allowed


@pytest.mark.skipif(gpus() > 0, reason="FAISS has GPUs here")
def test_a_faiss_without_gpus_is_one_check_that_fails() -> None:
    found = [(n, c) for n, c in checks(torch.device("cuda"), 1) if n.startswith("FAISS")]
    assert [name for name, _ in found] == ["FAISS"]
    with pytest.raises(RuntimeError, match="FAISS is built for the CPU: dist-train doctor"):
        found[0][1]()


def test_a_wrong_neighbour_or_score_is_seen() -> None:
    rng = np.random.default_rng(0)
    rows, queries = rng.standard_normal((50, 8)), rng.standard_normal((4, 8))
    products = queries @ rows.T
    ids = np.argsort(-products, axis=1)[:, :10]
    scores = np.take_along_axis(products, ids, 1)
    assert correctness.compare_best_ten(rows, queries, scores, ids).difference == 0
    worse = ids.copy()
    worse[2, 3] = np.argsort(-products[2])[20]
    wrong = correctness.compare_best_ten(
        rows, queries, np.take_along_axis(products, worse, 1), worse
    )
    assert wrong.difference > wrong.allowed
    assert correctness.compare_best_ten(rows, queries, scores + 0.1, ids).difference > wrong.allowed


def test_an_encoder_of_other_weights_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = correctness.image_encoder(CPU, "bf16")
    assert 0 < found.difference <= found.allowed

    class Moved(correctness.ImageEncoder):
        """Its weights suffer on their way to the device."""

        def to(self, *where, **how):
            with torch.no_grad():
                self.backbone.blocks[5].attn.qkv.weight.mul_(3)
            return super().to(*where, **how)

    monkeypatch.setattr(correctness, "ImageEncoder", Moved)
    off = correctness.image_encoder(CPU, "bf16")
    assert off.difference > off.allowed


def test_the_head_of_one_rank_is_its_own_truth() -> None:
    loss, items, centres = correctness.head_values(0, 1, CPU, "float64")
    small = correctness.head_values(0, 1, CPU, "float32")
    for one, other in zip((loss, items, centres), small, strict=True):
        assert 0 < np.abs(one - other).max() / np.abs(one).max() < 1e-4


@pytest.mark.parametrize(
    ("check", "passed"),
    [
        (lambda: Proof(0.5, 0.6, "x"), True),
        (lambda: Proof(0.7, 0.6, "x"), False),
        (lambda: Proof(math.nan, 0.6, "x"), False),
        (lambda: Rate(3.0, "GB/s", 6.0), True),
        (lambda: [][0], False),
    ],
    ids=["within", "beyond", "nan", "rate", "error"],
)
def test_what_passes(check, passed: bool) -> None:
    result = acceptance.run_check("it", check)
    assert result.passed is passed
    assert table([result]).startswith("ok" if passed else "FAIL")


def test_the_rate_is_told_beside_its_limit() -> None:
    result = acceptance.run_check("memory", lambda: Rate(3.0, "GB/s", 6.0))
    assert "of 6" in table([result])
    assert "50% of the limit" in table([result])
    assert speed.peaks("NVIDIA H100 80GB HBM3") == (989, 3350)
    assert speed.peaks("NVIDIA H100 PCIe") == (756, 2000)
    assert speed.peaks("NVIDIA L4") == (121, 300)
    assert speed.peaks("something new") == (None, None)


def test_rates_on_a_cpu() -> None:
    for rate in (
        speed.product(CPU, torch.float32, 64), speed.copy(CPU, 1 << 12, from_host=False),
        speed.copy(CPU, 1 << 12, from_host=True), speed.join(CPU, 64, 16),
    ):  # fmt: skip
        assert rate.value > 0
        assert rate.limit is None


def test_what_has_no_time_left_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "BUDGET", -1.0)
    results = acceptance.accept("cpu")
    assert results
    assert not any(result.passed for result in results)
    assert all(isinstance(result, Result) for result in results)


@pytest.mark.parametrize(
    ("world", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_ranks_are_doubled_up_to_all(world: int, counts: list[int]) -> None:
    heads = [name for name, _ in checks(CPU, world) if name.startswith("head")]
    assert heads == [f"head, {ranks} ranks" for ranks in counts]


def test_the_script_may_be_started() -> None:
    assert os.access(SCRIPT, os.X_OK)
