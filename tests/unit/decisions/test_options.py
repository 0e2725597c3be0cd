"""Every option of embed, index, join, match, evaluate and report has an effect that is seen."""

import io
import json
import logging
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dist_train import cli
from dist_train.config.training import (
    ImageEncoderOptions,
    ImageTraining,
    TextEncoderOptions,
    TextTraining,
)
from dist_train.training.loop import train
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.storage.errors import BadInput, Failed, NoGPU
from shards.storage.files import read_json
from tests.support.damage import flip_photos
from tests.support.tiny_models import add_code
from tests.unit.decisions.test_match import MANY_PRODUCTS, write_set

FEW = 60
"""Postings that are embedded."""
ALIKE, APART = ("p1", "p22"), ("p1", "p2")
"""Postings of one product, and of two, in the embedding set that is written by hand."""


@dataclass
class Done:
    """What a verb left behind."""

    out: Path
    log: str = ""
    error: str | None = None
    """The kind of what it ended with."""
    batches: list[int] = field(default_factory=list)
    """Items of every batch that an encoder saw."""
    helpers: int = 0
    """Processes beside this one while it did."""

    def told(self, name: str) -> Any:
        return read_json(self.out / name)

    def vectors(self, name: str = "image-00000.npy") -> np.ndarray:
        return np.load(self.out / name)


# What is seen


def folder(done: Done) -> str:
    return done.out.name if (done.out / "manifest.json").exists() else "nothing"


def outcome(done: Done) -> str | None:
    return done.error


def device(done: Done) -> str:
    """Where no GPU is, or where this process has begun on the CPU, cuda is refused."""
    return "cuda" if done.error in ("NoGPU", "BadInput") or "cuda" in done.log else "cpu"


def compared(done: Done) -> list[str]:
    rows = done.told("metrics.json")["rows"]
    return [row["name"] for row in rows if row["kind"] == "compare"]


def most_neighbours(done: Done) -> int:
    return int(pd.read_parquet(done.out / "nearest.parquet").groupby("i").size().max())


def decision(done: Done) -> Any:
    return done.told("threshold.json")["form"]


def precision(done: Done) -> float:
    """Mean precision of the val postings at the threshold, as the curve has it."""
    decided = done.told("threshold.json")
    curve = pd.DataFrame(decided["curve"])
    return float(curve.precision[curve.threshold >= decided["threshold"]].iloc[-1])


def fewest_candidates(done: Done) -> int:
    """Of a posting that was not rejected, as two were."""
    return int(pd.read_parquet(done.out / "matches.parquet").degree.nsmallest(3).iloc[-1])


def largest_group(done: Done) -> int:
    return int(pd.read_parquet(done.out / "groups.parquet").group_id.value_counts().max())


def grouped(done: Done, postings: tuple[str, str]) -> bool:
    groups = pd.read_parquet(done.out / "groups.parquet").set_index("posting_id").group_id
    return bool(groups[postings[0]] == groups[postings[1]])


@dataclass(frozen=True)
class Option:
    """Values of an option with what is to be seen of each, ANY where it only must differ.

    All options of a verb are given together, the first value of each and then the second, but for
    those that are tried `alone`.
    """

    seen: Callable[[Done], Any]
    values: dict[str, Any]
    alone: dict[str, str] | None = None
    """What is given beside BASE."""


ANY = object()
GIVEN = "given"
"""The value of a switch that is given."""
ARGUMENT = "argument"
"""The argument without a name."""
TABLE: dict[str, dict[str, Option]] = {
    "embed": {
        "--out": Option(folder, {"{tmp}/a": "a", "{tmp}/b": "b"}),
        "--shards": Option(
            lambda done: done.told("manifest.json")["counts"]["items"],
            {"{shards}": FEW, "{half}": FEW // 2},
        ),
        "--image": Option(
            lambda done: (done.out / "image-00000.npy").exists(),
            {"{image}": True, "": False}, {"--text": "{text}"},
        ),
        "--text": Option(
            lambda done: (done.out / "text-00000.npy").exists(), {"{text}": True, "": False}
        ),
        "--dtype": Option(
            lambda done: done.vectors().dtype.name, {"float16": "float16", "float32": "float32"}
        ),
        "--precision": Option(
            lambda done: done.vectors().tobytes(), {"fp32": ANY, "bf16": ANY},
            {"--dtype": "float32"},
        ),
        "--batch-size": Option(lambda done: max(done.batches), {"7": 7, "16": 16}),
        "--max-unreadable": Option(
            outcome, {"0.01": "Failed", "0.5": None}, {"--shards": "{broken}"}
        ),
        "--workers": Option(lambda done: done.helpers, {"0": 0, "2": 2}),
        "--trust-remote-code": Option(
            outcome, {"": "BadInput", GIVEN: None}, {"--text": "{coded}", "--image": ""}
        ),
        "--device": Option(device, {"cpu": "cpu", "cuda": "cuda"}, {}),
    },
    "index": {
        "--out": Option(folder, {"{tmp}/a": "a", "{tmp}/b": "b"}),
        "--modality": Option(
            lambda done: done.told("index.json")["modalities"],
            {"image": ["image"], "text": ["text"], "both": ["image", "text"]}, {},
        ),
        "--image-weight": Option(
            lambda done: done.told("index.json")["image_weight"], {"0.3": 0.3, "0.6": 0.6}
        ),
        "--kind": Option(
            lambda done: done.told("index.json")["factory"], {"SQfp16": "SQfp16", "HNSW8": "HNSW8"}
        ),
        "--memory": Option(
            lambda done: done.told("index.json")["factory"], {"8GB": "Flat", "35kB": "SQfp16"}, {}
        ),
        "--recall-rows": Option(
            lambda done: done.told("index.json")["recall"].get("rows"), {"10": 10, "40": 40}
        ),
    },
    "join": {
        "--out": Option(folder, {"{tmp}/a": "a", "{tmp}/b": "b"}),
        "--index": Option(
            lambda done: done.told("proof.json")["weights"],
            {"{index}": {"image": 0.5, "text": 0.5}, "{texts}": {"text": 1.0}},
        ),
        "--engine": Option(
            lambda done: done.told("proof.json")["engine"], {"gemm": "gemm", "faiss": "faiss"}
        ),
        "--max-score-floor": Option(
            lambda done: done.told("proof.json")["score_floor"], {"0.1": 0.1, "0.2": 0.2}
        ),
        "--pairs-per-item": Option(
            lambda done: done.told("manifest.json")["counts"]["pairs"] / 300,
            {"3": pytest.approx(3, rel=0.25), "20": pytest.approx(20, rel=0.25)}, {},
        ),
        "--neighbours": Option(most_neighbours, {"2": 2, "7": 7}),
        "--memory": Option(outcome, {"4GB": None, "700MB": "BadInput"}, {}),
        "--audit-rows": Option(
            lambda done: done.told("proof.json")["audit"]["rows"], {"10": 10, "90": 90}
        ),
        "--device": Option(device, {"cpu": "cpu", "cuda": "cuda"}, {}),
    },
    "match": {
        "--out": Option(folder, {"{tmp}/a": "a", "{tmp}/b": "b"}),
        "--threshold": Option(
            lambda done: done.told("threshold.json")["threshold"], {"0.5": 0.5, "0.75": 0.75}
        ),
        "--threshold-from": Option(
            lambda done: done.told("threshold.json")["threshold"],
            {"{low}": 0.25, "{high}": 0.875}, {},
        ),
        "--plain": Option(
            decision, {"": "pair model", GIVEN: "score"}, {ARGUMENT: "{titled}"}
        ),
        "--precision": Option(
            precision,
            {"0.6": pytest.approx(0.6, abs=0.02), "0.95": pytest.approx(0.95, abs=0.02)},
            {ARGUMENT: "{titled}", "--plain": GIVEN},
        ),
        "--candidates": Option(
            lambda done: fewest_candidates(done) >= 20, {"5": False, "20": True},
            {ARGUMENT: "{titled}"},
        ),
        "--features": Option(
            lambda done: "feature_brand" in done.told("pair_model.json")["features"],
            {"brand": True, "": False}, {ARGUMENT: "{titled}"},
        ),
        "--max-group": Option(largest_group, {"2": 2, "4": 4}),
        "--must-link": Option(
            lambda done: grouped(done, APART), {"{apart}": True, "": False},
        ),
        "--cannot-link": Option(
            lambda done: grouped(done, ALIKE), {"{alike}": False, "": True}, {"--plain": GIVEN},
        ),
    },
    "evaluate": {
        "--compare": Option(
            compared,
            {
                "x={other}": ["x: image", "x: text", "x: image + text"],
                "{other}": ["{other}: image", "{other}: text", "{other}: image + text"],
            }, {},
        ),
    },
    "report": {
        "--shards": Option(
            lambda done: "data:image/jpeg" in (done.out / "report.html").read_text(),
            {"{shards}": True, "": False}, {},
        ),
    },
}  # fmt: skip
BASE = {
    "embed": {"--shards": "{shards}", "--image": "{image}", "--workers": "0", "--device": "cpu",
              "--out": "{tmp}/out"},
    "index": {ARGUMENT: "{emb}", "--out": "{tmp}/out"},
    "join": {ARGUMENT: "{emb}", "--index": "{index}", "--pairs-per-item": "20", "--device": "cpu",
             "--out": "{tmp}/out"},
    "match": {ARGUMENT: "{pairs}", "--out": "{tmp}/out"},
    "evaluate": {ARGUMENT: "{matches}"},
    "report": {ARGUMENT: "{moved}/matches"},
}  # fmt: skip
CASES = [(name, option) for name, options in TABLE.items() for option in options]


@pytest.fixture(scope="module")
def place(catalogue: Path, tiny_vit: Path, tiny_bert: Path, tmp_path_factory) -> dict[str, Path]:
    """What the verbs work on, by name."""
    at = tmp_path_factory.mktemp("options")
    table = pd.read_csv(catalogue / "catalogue.csv", dtype=str)
    for name, rows in (("shards", FEW), ("half", FEW // 2)):
        table[:rows].to_csv(at / f"{name}.csv", index=False)
        pack(at / f"{name}.csv", catalogue / "images", at / name, PackOptions(size=48))
    shutil.copytree(at / "shards", at / "broken")
    assert len(flip_photos(at / "broken", ("train", "val", "test"), 4)) > 10  # more than a few
    common = {"epochs": 0, "workers": 0, "device": "cpu", "precision": "fp32"}
    vit = ImageEncoderOptions(model=str(tiny_vit), image_size=32)
    train("image", at / "shards", at / "image", ImageTraining(encoder=vit, **common))
    bert = TextEncoderOptions(model=str(tiny_bert))
    train("text", at / "shards", at / "text", TextTraining(encoder=bert, **common))
    shutil.copytree(tiny_bert, at / "code")
    own = TextEncoderOptions(model=str(add_code(at / "code")), trust_remote_code=True)
    train("text", at / "shards", at / "coded", TextTraining(encoder=own, **common))
    for name, seed in (("emb", 0), ("other", 1)):
        write_set(at / name, seed)
    for name, modality in (("index", "both"), ("texts", "text")):
        verb("index", [str(at / "emb"), "--out", str(at / name), "--modality", modality])
    verb("join", [str(at / "emb"), "--index", str(at / "index"), "--out", str(at / "pairs")])
    verb("match", [str(at / "pairs"), "--out", str(at / "matches")])
    write_set(at / "titles", products=MANY_PRODUCTS, title="thing model{product}")
    verb("index", [str(at / "titles"), "--out", str(at / "all")])
    given = ["--index", str(at / "all"), "--device", "cpu"]
    verb("join", [str(at / "titles"), *given, "--out", str(at / "titled")])
    for name, linked in (("alike", ALIKE), ("apart", APART)):
        (at / name).with_suffix(".csv").write_text(
            f"posting_id_1,posting_id_2\n{linked[0]},{linked[1]}\n"
        )
    matched_elsewhere(at)
    for name, threshold in (("low", 0.25), ("high", 0.875)):
        told = {"threshold": threshold, "weights": {"image": 0.5, "text": 0.5}}
        (at / name).write_text(json.dumps(told))
    names = ("shards", "half", "broken", "image", "text", "emb", "other", "index", "texts", "low",
             "high", "pairs", "matches", "coded", "titled")  # fmt: skip
    links = {name: at / f"{name}.csv" for name in ("alike", "apart")}
    return {name: at / name for name in names} | links | {"moved": at / "moved" / "chain"}


def matched_elsewhere(at: Path) -> None:
    """Match the shard set below `at`, and move all but the set to where the set is not beside."""
    emb, index, pairs, matches = (
        str(at / "chain" / name) for name in ("emb", "index", "pairs", "matches")
    )
    given = ["--image", str(at / "image"), "--text", str(at / "text"), "--workers", "0"]
    verb("embed", ["--shards", str(at / "shards"), "--out", emb, "--device", "cpu", *given])
    verb("index", [emb, "--out", index])
    verb("join", [emb, "--index", index, "--out", pairs, "--device", "cpu"])
    verb("match", [pairs, "--out", matches, "--threshold", "0.5"])
    (at / "moved").mkdir()
    (at / "chain").rename(at / "moved" / "chain")


def verb(name: str, words: list[str]) -> None:
    """As on the command line, in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.app([name, *words], exit_on_error=False, print_error=False)
    assert not ended.value.code


@contextmanager
def watched(done: Done) -> Iterator[None]:
    """Note what is logged and what encoders see: photos come to a convolution, titles do not."""
    before, logger = set(multiprocessing.active_children()), logging.getLogger("dist_train")

    def look(module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, nn.Conv2d):
            done.batches.append(len(inputs[0]))
            helpers = set(multiprocessing.active_children()) - before
            done.helpers = max(done.helpers, len(helpers))

    said = io.StringIO()
    handler, level = logging.StreamHandler(said), logger.level
    hook = register_module_forward_pre_hook(look)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        hook.remove()
        logger.removeHandler(handler)
        logger.setLevel(level)
        done.log = said.getvalue()


def done_by(name: str, given: dict[str, str], place: dict[str, Path], tmp: Path) -> Done:
    """A verb with these options beside those of BASE; an empty value: without the option."""
    tmp.mkdir()
    known = {key: str(path) for key, path in place.items()} | {"tmp": str(tmp)}
    options = {key: value.format(**known) for key, value in (BASE[name] | given).items()}
    words = [options.pop(ARGUMENT)] if ARGUMENT in options else []
    done = Done(Path(options["--out"] if "--out" in options else words[0]))
    for key, value in options.items():
        words += [key] if value == GIVEN else [key, value] if value else []
    with watched(done):
        try:
            verb(name, words)
        except (BadInput, Failed, NoGPU) as error:
            done.error = type(error).__name__
    return done


@pytest.fixture(scope="module")
def together(place, tmp_path_factory) -> Callable[[str], list[Done]]:
    """A verb with the first values of its options, and with the second."""

    @cache
    def both(name: str) -> list[Done]:
        tmp, shared = tmp_path_factory.mktemp(name), TABLE[name].items()
        return [
            done_by(name, {one: list(option.values)[number] for one, option in shared
                           if option.alone is None}, place, tmp / str(number))
            for number in (0, 1)
        ]  # fmt: skip

    return both


@pytest.mark.parametrize(("name", "option"), CASES)
def test_an_option_does_what_it_says(name, option, place, together, tmp_path):
    case = TABLE[name][option]
    if case.alone is None:
        said = [case.seen(done) for done in together(name)]
    else:
        said = []
        for number, value in enumerate(case.values):
            given = case.alone | {option: value}
            said.append(case.seen(done_by(name, given, place, tmp_path / str(number))))
    for one, wanted in zip(said, case.values.values(), strict=True):
        if isinstance(wanted, list):
            wanted = [text.format(**place) for text in wanted]
        assert wanted is ANY or one == wanted
    assert all(one != other for n, one in enumerate(said) for other in said[:n])


@pytest.mark.parametrize("name", TABLE)
def test_no_option_is_missing_here(name):
    arguments = cli.app[name].assemble_argument_collection()
    named = {argument.names[0] for argument in arguments}
    assert {one for one in named if one.startswith("--")} == set(TABLE[name])
