"""Every option of `train image`, `train text` and `export` does something.

For each option two values and what of a short run they tell apart. An option that stands in no
table is an error: whoever adds one adds how its effect is seen.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train import cli
from dist_train.monitor.metrics import read_metrics
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from tests.support.damage import flip_photos

Tell = Callable[["Outcome"], Any]


@dataclass
class Outcome:
    """What two short runs are compared by."""

    run: Path
    code: object
    log: str
    forks: int
    products: int
    """Matrix products, where they are counted."""
    compiled: int
    rows: list[dict[str, float]] = field(default_factory=list)

    def column(self, name: str) -> list[float]:
        """One value of every row of metrics.jsonl that has it."""
        return [row[name] for row in self.rows if name in row]

    def digest(self, pattern: str) -> dict[str, str]:
        """sha256 of the files of the run that match."""
        found = sorted(self.run.glob(pattern))
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

    def counts(self) -> dict[str, Any]:
        """Of the manifest."""
        return json.loads((self.run / "manifest.json").read_text())["counts"]


# ── what is looked at


def loss(outcome: Outcome) -> list[float]:
    return outcome.column("train/loss")


def first_loss(outcome: Outcome) -> float:
    return outcome.column("train/loss")[0]


def rates(outcome: Outcome) -> list[float]:
    return outcome.column("train/lr")


def head_rates(outcome: Outcome) -> list[float]:
    return outcome.column("train/lr_head")


def margins(outcome: Outcome) -> list[float]:
    return outcome.column("train/margin")


def norms(outcome: Outcome) -> list[float]:
    return outcome.column("train/grad_norm")


def encoder(outcome: Outcome) -> dict[str, str]:
    return outcome.digest("encoder/model.safetensors")


def both(outcome: Outcome) -> tuple[dict[str, str], dict[str, str]]:
    """Encoder and centres, each of which must differ."""
    return outcome.digest("encoder/model.safetensors"), outcome.digest("checkpoints/*/head*")


def steps(outcome: Outcome) -> list[float]:
    return [row["step"] for row in outcome.rows if "train/loss" in row]


def validations(outcome: Outcome) -> list[float]:
    return [row["step"] for row in outcome.rows if "val/f1" in row]


def checkpoints(outcome: Outcome) -> list[str]:
    return sorted(path.name for path in (outcome.run / "checkpoints").iterdir())


def products(outcome: Outcome) -> int:
    return outcome.products


def exported(outcome: Outcome) -> int:
    return outcome.counts()["exported_step"]


def ended(outcome: Outcome) -> str:
    return f"code {outcome.code}, {outcome.log.count('left out on all ranks')} steps left out"


# ── the tables: option → arguments of one run, arguments of the other, what tells them apart

STILL = ["--lr", 1e-12, "--head.lr", 1e-12, "--validate-every", 0.001, "--encoder.no-neck"]
"""Every validation of the run finds the same score."""
BROKEN = ["--shards", "DAMAGED", "--epochs", 1, "--log-every", 1]
STIRRED = ["--encoder.model", "ANOTHER"]
"""Not those that the seed gives a model that is not pretrained."""
EACH = ["--checkpoint-every", 1]
NAN = ["--lr", 1e30, "--warmup", 0]

SHARED: dict[str, tuple[list[object], list[object], Tell]] = {
    "--shards": ([], ["--shards", "OTHER"], loss),
    "--epochs": ([], ["--epochs", 0.15], lambda o: max(steps(o))),
    "--batch-size": ([], ["--batch-size", 16], lambda o: max(steps(o))),
    "--accumulation": ([], ["--accumulation", 2], products),
    "--order": ([], ["--order", "none"], first_loss),
    "--photos-per-product": ([], ["--photos-per-product", 2], first_loss),
    "--lr": ([], ["--lr", 2e-3], lambda o: max(rates(o))),
    "--layer-decay": ([], ["--layer-decay", 0.5], encoder),
    "--freeze": ([], ["--freeze", 0.4], lambda o: rates(o)[0]),
    "--weight-decay": ([], ["--weight-decay", 0.5], both),
    "--clip": ([], ["--clip", 1e-6], both),
    "--schedule": ([], ["--schedule", "one-cycle"], lambda o: (rates(o), head_rates(o))),
    "--warmup": ([], ["--warmup", 0.6], lambda o: (rates(o), head_rates(o))),
    "--head.loss": ([], ["--head.loss", "cosface"], first_loss),
    "--head.margin": ([], ["--head.margin", 0.3], margins),
    "--head.margin-of-largest": ([], ["--head.margin-of-largest", 0.1], first_loss),
    "--head.gradient": ([], ["--head.gradient", "detached"], norms),
    "--head.centres": ([], ["--head.centres", 2], first_loss),
    "--head.sample": ([], ["--head.sample", 0.3], first_loss),
    "--head.scale": ([], ["--head.scale", 16], first_loss),
    "--head.ramp": ([], ["--head.ramp", 0.9], margins),
    "--head.lr": ([], ["--head.lr", 1e-2], lambda o: max(head_rates(o))),
    "--head.warmup": ([], ["--head.warmup", 0.7], head_rates),
    "--head.start": ([], ["--head.start", "means"], first_loss),
    "--head.grow-from": ([], ["--head.grow-from", "EARLIER"], first_loss),
    "--head.chunk": ([], ["--head.chunk", 8], products),
    "--ema": ([], ["--ema", 0.9], encoder),
    "--keep-best": (STILL, [*STILL, "--no-keep-best"], exported),
    "--patience": (STILL, [*STILL, "--patience", 1], lambda o: max(steps(o))),
    "--precision": ([], ["--precision", "bf16"], first_loss),
    "--gradient-checkpointing": ([], ["--gradient-checkpointing"], products),
    "--compile": ([], ["--compile"], lambda o: o.compiled),
    "--checkpoint-every": ([], EACH, checkpoints),
    "--keep": (EACH, [*EACH, "--keep", 1], checkpoints),
    "--grace": ([], ["--grace", 1e-9], lambda o: "a stop signal leaves" in o.log),
    "--validate-every": ([], ["--validate-every", 0.001], validations),
    "--log-every": ([], ["--log-every", 2], steps),
    "--workers": ([], ["--workers", 2], lambda o: o.forks),
    "--max-skipped": ([*NAN, "--max-skipped", 1], NAN, ended),
    "--seed": ([], ["--seed", 1], first_loss),
    "--encoder.model": ([], ["--encoder.model", "ANOTHER"], first_loss),
    "--encoder.pretrained": (STIRRED, [*STIRRED, "--encoder.no-pretrained"], first_loss),
    "--encoder.pooling": ([], ["--encoder.pooling", "cls"], first_loss),
    "--encoder.neck": ([], ["--encoder.no-neck"], first_loss),
}  # fmt: skip
OF_IMAGES = {
    "--encoder.pooling": ([], ["--encoder.pooling", "mean"], first_loss),
    "--encoder.image-size": ([], ["--encoder.image-size", 40], first_loss),
    "--encoder.decode": ([], ["--encoder.decode", "exact"], first_loss),
    "--min-crop": ([], ["--min-crop", 0.2], first_loss),
    "--jitter": ([], ["--jitter", 0.6], first_loss),
    "--erase": ([], ["--erase", 1.0], first_loss),
    "--rand-augment": ([], ["--rand-augment", "rand-m9-mstd0.5-inc1"], first_loss),
    "--mixup": ([], ["--mixup", 0.5], first_loss),
    "--cutmix": ([], ["--cutmix", 1.0], first_loss),
    "--max-unreadable": (BROKEN, [*BROKEN, "--max-unreadable", 1], ended),
}  # fmt: skip
OF_TITLES = {
    "--encoder.max-length": ([], ["--encoder.max-length", 5], first_loss),
    "--encoder.prefix": ([], ["--encoder.prefix", "query: "], first_loss),
    "--encoder.dropout": ([], ["--encoder.dropout", 0.3], first_loss),
}
TABLES = {"image": SHARED | OF_IMAGES, "text": SHARED | OF_TITLES}
ELSEWHERE = {
    "--out": "every test of a run",
    "--config": "tests/unit/cli/test_parsing.py::"
        "test_yaml_fills_options_and_the_command_line_goes_before_it",
    "--device": "test_a_device_that_is_not_there_is_refused",
    "--compare-every":
        "tests/distributed/test_training_truth.py::test_replicas_are_compared_as_often_as_configured",
}  # fmt: skip
TITLES_ELSEWHERE = {
    "--max-unreadable": "the table of images: the code is one",
    "--encoder.trust-remote-code": "tests/unit/encoders/test_sources.py",
}


# ── the runs


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


_forks = Counter()
os.register_at_fork(before=lambda: _forks.update(["here"]))


@pytest.fixture(scope="module")
def places(tiny_vit, tiny_bert, shard_set, catalogue, tmp_path_factory) -> dict[str, dict]:
    """By kind of encoder: what the arguments in capitals stand for."""
    folder = tmp_path_factory.mktemp("options")
    head = (catalogue / "catalogue.csv").read_text().splitlines()[:91]
    (folder / "few.csv").write_text("\n".join(head))
    pack(folder / "few.csv", catalogue / "images", folder / "few", PackOptions(size=48))
    shutil.copytree(folder / "few", folder / "damaged")
    flip_photos(folder / "damaged", ("train",), 2)
    for name, model in (("vit", tiny_vit), ("bert", tiny_bert)):
        shutil.copytree(model, folder / name)
        file = folder / name / "model.safetensors"
        state = load_file(file)
        save_file({k: v * 1.5 for k, v in state.items()}, file, metadata={"format": "pt"})
    common = {"FEW": folder / "few", "OTHER": shard_set, "DAMAGED": folder / "damaged"}
    return {
        modality: common | {"MODEL": model, "ANOTHER": folder / other, "EARLIER": folder / modality}
        for modality, model, other in (("image", tiny_vit, "vit"), ("text", tiny_bert, "bert"))
    }


@pytest.fixture(scope="module")
def outcome(places, tmp_path_factory) -> Callable[..., Outcome]:
    """Trains by the verb, in this process; the same arguments once."""
    known: dict[tuple, Outcome] = {}

    def of(modality: str, arguments: list[object], count: bool = False) -> Outcome:
        key = (modality, count, *arguments)
        if key not in known:
            out = tmp_path_factory.mktemp(modality) / "run"
            if not arguments and not count:
                out = places[modality]["EARLIER"]
            known[key] = _train(
                modality, [places[modality].get(word, word) for word in arguments], out, count
            )
        return known[key]

    def _train(modality: str, arguments: list[object], out: Path, count: bool) -> Outcome:
        base = {
            "--shards": places[modality]["FEW"], "--out": out,
            "--encoder.model": places[modality]["MODEL"], "--epochs": 0.35, "--batch-size": 8,
            "--lr": 1e-3, "--precision": "fp32", "--workers": 0, "--log-every": 1,
            "--checkpoint-every": 9, "--keep": 9,
            "--validate-every": 0, "--device": "cpu",
        }  # fmt: skip
        base |= (
            {"--encoder.image-size": 32} if modality == "image" else {"--encoder.max-length": 24}
        )
        for option in arguments:
            base.pop(option, None)
        options = [word for pair in base.items() for word in pair]
        return _run(out, count, "train", modality, *options, *arguments)

    return of


def _run(out: Path, count: bool, *arguments: object) -> Outcome:
    recorder, counting, compiled = _LogLines(), _Counting(), []
    root, before = logging.getLogger(), _forks["here"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dist-train", *map(str, arguments)])
        patch.setattr(torch, "compile", lambda function, **_: compiled.append(1) or function)
        config = cli.app.config
        root.addHandler(recorder)
        code: object = 0
        try:
            with counting if count else nullcontext():
                cli.main()
        except SystemExit as ended:
            code = ended.code
        finally:
            root.removeHandler(recorder)
            cli.app.config = config
    products = sum(counting.calls[f"aten::{name}"] for name in ("mm", "addmm", "bmm"))
    log, forks = "\n".join(recorder.lines), _forks["here"] - before
    rows = read_metrics(out)
    return Outcome(out, code, log, forks, products, len(compiled), rows)


class _LogLines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


# ── the tests


def options_of(*verb: str) -> set[str]:
    """Those that its help lists."""
    app = cli.app
    for name in verb:
        app = app[name]
    names = {each.name for each in app.assemble_argument_collection() if each.show}
    return {"--config"} | {name for name in names if name.startswith("-")}


def test_every_option_of_the_trainings_and_of_export_is_in_a_table() -> None:
    assert options_of("train", "image") == {*TABLES["image"], *ELSEWHERE}
    assert options_of("train", "text") == {*TABLES["text"], *ELSEWHERE, *TITLES_ELSEWHERE}
    # tests/unit/encoders/test_onnx.py goes through the verb.
    assert options_of("export") == {"--onnx", "--config"}


CASES = [
    pytest.param(
        modality,
        option,
        marks=pytest.mark.full if (modality, option in SHARED) == ("text", True) else (),
    )
    for modality, table in TABLES.items()
    for option in table
]
"""What both trainings share is one code: on titles too only in the full run."""


@pytest.mark.parametrize(("modality", "option"), CASES)
def test_an_option_does_something(modality: str, option: str, outcome, places) -> None:
    one, other, tell = TABLES[modality][option]
    outcome(modality, [])  # the run that others grow from
    first, second = (outcome(modality, arguments, tell is products) for arguments in (one, other))
    if tell is not ended:
        assert (first.code, second.code) == (0, 0)
    seen, also = tell(first), tell(second)
    if isinstance(seen, tuple):
        assert all(a != b for a, b in zip(seen, also, strict=True))
    else:
        assert seen != also


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_device_that_is_not_there_is_refused(modality: str, outcome, places, tmp_path) -> None:
    assert outcome(modality, []).code == 0  # --device cpu
    assert outcome(modality, ["--device", "cuda"]).code == 4
