"""A catalogue of 300 postings through every stage: the values it once gave, by 1 process and 2.

What --precision auto computes in depends on the processor, so the test reads the processor's flags.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.end_to_end import golden
from tests.end_to_end.golden import bfloat16_of_this_processor, differences, facts, results

pytestmark = pytest.mark.timeout(600)
NATIVE = bfloat16_of_this_processor()
TOLERANCE = {"curves": 1e-4}  # losses are above 10; all else that is compared is about 1
FOUND = ("tars", "items", "plan", "matches", "groups", "threshold", "figures", "report")


@pytest.fixture(scope="module")
def runs(
    catalogue: Path, tiny_vit: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """The folder of all stages by number of processes; 1 has also other precisions."""
    folder = tmp_path_factory.mktemp("golden")
    encoders = {
        modality: golden.plain_weights(Path(shutil.copytree(model, folder / modality)))
        for modality, model in (("image", tiny_vit), ("text", tiny_bert))
    }
    others = {1: ["auto", "bf16"] if NATIVE else ["auto"], 2: []}
    for world, precisions in others.items():
        golden.run_stages(world, catalogue, encoders, folder / str(world), precisions)
    return {world: folder / str(world) for world in others}


@pytest.fixture(scope="module")
def noted(runs: dict[int, Path]) -> dict[int, dict[str, Any]]:
    """What is noted of the runs in float32."""
    return {world: facts(out) | results(out) for world, out in runs.items()}


@pytest.fixture(scope="module")
def known(runs: dict[int, Path], noted: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What golden.json says, after it was recorded where that is wanted."""
    if golden.RECORDING in os.environ:
        kinds = golden.read_golden()["bfloat16"] if golden.GOLDEN.exists() else {}
        golden.write_golden(noted[1] | {"bfloat16": kinds | {NATIVE: facts(runs[1], "auto")}})
    return golden.read_golden()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("part", ["weights", "curves", "vectors", *FOUND])
def test_float32(
    part: str, world: int, known: dict[str, Any], noted: dict[int, dict[str, Any]]
) -> None:
    found = differences(known[part], noted[world][part], TOLERANCE.get(part, 1e-5), part)
    assert not found, "\n".join(found[:20])


@pytest.mark.parametrize("engine", golden.ENGINES)
@pytest.mark.parametrize("world", [1, 2])
def test_the_best_pairs(
    world: int, engine: str, known: dict[str, Any], runs: dict[int, Path]
) -> None:
    pairs = golden.pairs(runs[world], engine)
    found = {f"{p.posting} {p.other}": [p.score, p.image, p.text] for p in pairs.itertuples()}
    wrong = differences(known["pairs"], {k: found.get(k) for k in known["pairs"]}, 1e-5, "pairs")
    assert not wrong, "\n".join(wrong[:20])
    last = min(score for score, *_ in known["pairs"].values())
    assert {k for k, v in found.items() if v[0] > last + 1e-5} <= known["pairs"].keys()
    matched = {one: others for one, others in golden.matches(runs[world], engine).items() if others}
    assert matched == known["matches"]


@pytest.mark.parametrize("modality", golden.MODALITIES)
def test_auto_is_the_arithmetic_of_the_processor(modality: str, runs: dict[int, Path]) -> None:
    """To the bit: no tolerance would take float32 for bfloat16, or one for the other."""

    def trained(precision: str) -> list[bytes]:
        rows = golden.vectors(runs[1], precision)[modality].to_numpy(np.float16)
        return [
            part.tobytes()
            for part in (*golden.weights(runs[1], precision, modality).values(), rows)
        ]

    assert trained("auto") == trained("bf16" if NATIVE else "fp32")
    if NATIVE:
        assert not set(trained("auto")[-2:]) & set(trained("fp32")[-2:])  # centres and vectors


@pytest.mark.skipif(NATIVE is None, reason="this processor computes in float32: compared above")
@pytest.mark.parametrize("part", ["weights", "curves", "vectors"])
def test_bfloat16(part: str, known: dict[str, Any], runs: dict[int, Path]) -> None:
    if NATIVE not in known["bfloat16"]:
        pytest.skip(f"nothing is noted of {NATIVE} yet: python -m tests.end_to_end.golden")
    found = facts(runs[1], "auto")[part]
    wrong = differences(known["bfloat16"][NATIVE][part], found, TOLERANCE.get(part, 1e-5), part)
    assert not wrong, "\n".join(wrong[:20])
