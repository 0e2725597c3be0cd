"""The stages of a config: what each does, what it waits for, and the file that is there when done.

`dist-train run` calls them one after the other in this process, `dist-train submit` gives each to
Slurm as a command. What they need to work is imported when they are called: to submit takes none.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dist_train.config.options import (
    Config,
    EmbedConfig,
    IndexConfig,
    JoinConfig,
    MatchConfig,
    Modality,
    TrainingOptions,
    result_options,
)
from dist_train.decisions.threshold import given_threshold
from dist_train.evaluation.scores import Scores
from dist_train.matching.pairs import PairSet
from shards.catalogue.carried_columns import Carried
from shards.catalogue.rows import Catalogue
from shards.catalogue.split import split_of
from shards.photos.options import PackOptions
from shards.storage import stage_files
from shards.storage.errors import BadInput
from shards.storage.files import read_json

Options = PackOptions | TrainingOptions | EmbedConfig | IndexConfig | JoinConfig | MatchConfig


@dataclass(frozen=True)
class Stage:
    """One stage, as a call and as a command."""

    name: str
    section: str
    """Its section of the config's `slurm`."""
    words: tuple[str, ...]
    """The command after dist-train; %a is the number of a task of a Slurm array."""
    call: Callable[[], Any]
    """Does it in this process; returns what the stage returns."""
    result: Path
    """The file that is there when it is done."""
    options: Options | None = None
    """What the command reads with --config."""
    after: tuple[str, ...] = ()
    """Names of the stages whose results it reads."""
    one_process: bool = False
    """Several processes would gain nothing."""

    def options_text(self) -> str:
        """The options as YAML; those that are not given stay out."""
        assert self.options is not None
        return yaml.safe_dump(_plain(asdict(self.options)), sort_keys=False, allow_unicode=True)

    def check_same(self) -> None:
        """Raise BadInput when it was done, or begun, with other options than these."""
        folder = self.result.parent
        begun = (folder / stage_files.STAGE).exists() and stage_files.status_of(folder) != "failed"
        if self.options is None or not (begun or self.result.exists()):
            return
        known = read_json(folder / stage_files.STAGE)["config"]
        differing = [
            f"{name} {known.get(name)!r} there, {value!r} requested"
            for name, value in result_options(self.options).items()
            if known.get(name) != value
        ]
        if differing:
            raise BadInput(
                f"{folder}: was begun with other options ({'; '.join(differing)}); "
                "name another folder or remove this one"
            )


def stage_graph(config: Config) -> list[Stage]:
    """Every stage from the catalogue to the report, each after those it waits for.

    Raises BadInput for a catalogue that is not there or has not the columns, and for a file of a
    threshold that holds none: it is read here, once.
    """
    threshold = given_threshold(config.match).threshold
    stages = [_pack(config)]
    stages += [
        _train(config, modality, modality, config.training(modality))
        for modality in config.encoders
    ]
    stages.append(_embed(config, "", "embedding"))
    for name in config.compare:
        for modality in config.encoders:
            # The encoder is only exported: with its published weights, or with random ones.
            untrained = config.training(modality)
            encoder: Any = replace(untrained.encoder, pretrained=name == "untrained")
            untrained = replace(untrained, epochs=0.0, encoder=encoder)
            stage = _train(config, modality, f"{name}-{modality}", untrained)
            stages.append(replace(stage, one_process=True))
        stages.append(_embed(config, f"{name}-", f"{name}-embedding"))
    stages += [_index(config), _join(config, threshold), _match(config, threshold)]
    if has_test_products(config):
        return [*stages, _evaluate(config), _report(config, ("match", "evaluate"))]
    return [*stages, _report(config, ("match",))]


def has_test_products(config: Config) -> bool:
    """Some posting of the catalogue is of a test product: there may be something to score on."""
    catalogue = Catalogue(config.catalogue, config.columns)
    return any(
        split_of(label) == "test"
        for some in catalogue.postings(Carried())
        for label in some.label_group.unique()
    )


def _pack(config: Config) -> Stage:
    out = config.out / "shards"
    words = ["pack", str(config.catalogue), "--out", str(out)]
    if config.images is not None:
        words += ["--images", str(config.images)]
    if config.columns:
        words += ["--columns", ",".join(f"{ours}={name}" for ours, name in config.columns.items())]
    tasks = config.slurm.job("pack").tasks or 1
    if tasks > 1:
        words += ["--task", "%a", "--of", str(tasks)]

    def call() -> None:
        from shards.pack.pack import pack

        pack(config.catalogue, config.images, out, config.pack, config.columns)

    return Stage("pack", "pack", tuple(words), call, out / stage_files.MANIFEST, config.pack)


def _train(config: Config, modality: Modality, name: str, options: TrainingOptions) -> Stage:
    shards, out = config.out / "shards", config.out / name
    words = ("train", modality, "--shards", str(shards), "--out", str(out))

    def call() -> None:
        from dist_train.training.loop import train

        train(modality, shards, out, options)

    return Stage(name, modality, words, call, out / stage_files.MANIFEST, options, ("pack",))


def _embed(config: Config, prefix: str, name: str) -> Stage:
    shards, out = config.out / "shards", config.out / name
    runs = {modality: config.out / f"{prefix}{modality}" for modality in config.encoders}
    words = ["embed", "--shards", str(shards), "--out", str(out)]
    for modality, run in runs.items():
        words += [f"--{modality}", str(run)]

    def call() -> None:
        from dist_train.embedding.embed import embed

        embed(shards, out, config.embed, runs.get("image"), runs.get("text"))

    result, after = out / stage_files.MANIFEST, tuple(run.name for run in runs.values())
    return Stage(name, "embed", tuple(words), call, result, config.embed, after)


def _index(config: Config) -> Stage:
    embedding, out = config.out / "embedding", config.out / "index"
    words = ("index", str(embedding), "--out", str(out))

    def call() -> None:
        from dist_train.matching.index import build_index

        build_index(embedding, out, config.index)

    result = out / stage_files.MANIFEST
    return Stage("index", "index", words, call, result, config.index, ("embedding",))


def _join(config: Config, threshold: float | None) -> Stage:
    embedding, index, out = (config.out / name for name in ("embedding", "index", "pairs"))
    words = ("join", str(embedding), "--index", str(index), "--out", str(out))
    options = _join_options(config.join, out, threshold)

    def call() -> None:
        from dist_train.matching.build_pairs import build_pairs

        build_pairs(embedding, index, out, options)

    return Stage("join", "join", words, call, out / stage_files.MANIFEST, options, ("index",))


def _join_options(options: JoinConfig, out: Path, threshold: float | None) -> JoinConfig:
    """The options of the join, which keeps all pairs from a given threshold on.

    Where finished pairs reach down to the threshold, theirs: another threshold costs no join.
    """
    limit, finished = options.max_score_floor, (out / stage_files.MANIFEST).exists()
    if limit is None and finished and (threshold is None or PairSet(out).reaches(threshold)):
        limit = read_json(out / stage_files.STAGE)["config"]["max_score_floor"]
    elif threshold is not None:
        limit = threshold if limit is None else min(limit, threshold)
    return replace(options, max_score_floor=limit)


def _match(config: Config, threshold: float | None) -> Stage:
    pairs, out = config.out / "pairs", config.out / "matches"
    words = ("match", str(pairs), "--out", str(out))
    options = MatchConfig(threshold=threshold)

    def call() -> None:
        from dist_train.decisions.match import match

        match(pairs, out, options)

    return Stage("match", "match", words, call, out / stage_files.MANIFEST, options, ("join",))


def _evaluate(config: Config) -> Stage:
    matches = config.out / "matches"
    others: dict[str, Path] = {name: config.out / f"{name}-embedding" for name in config.compare}
    words = ["evaluate", str(matches)]
    for name, folder in others.items():
        words += ["--compare", f"{name}={folder}"]

    def call() -> Scores:
        from dist_train.decisions.score import evaluate

        return evaluate(matches, others)

    after = ("match", *(folder.name for folder in others.values()))
    return Stage("evaluate", "evaluate", tuple(words), call, matches / "metrics.json", after=after)


def _report(config: Config, after: tuple[str, ...]) -> Stage:
    matches = config.out / "matches"

    def call() -> Path:
        from dist_train.report.html import write_report

        return write_report(matches)

    words, result = ("report", str(matches)), matches / "report.html"
    return Stage("report", "report", words, call, result, after=after)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
