"""The stages of a config: what each does, which it waits for, and the file that shows it is done.

`dist-train run` calls them one after the other, `dist-train submit` gives each to Slurm as a
command. Each imports what it needs only when it is called, so that submitting loads no torch.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dist_train.config.options import Config, EmbedConfig, IndexConfig, JoinConfig, MatchConfig
from dist_train.config.training import Modality, TrainingOptions, as_json, result_options
from dist_train.decisions.threshold import Given, check_same_score, given_threshold
from dist_train.distributed.launcher import under_launcher
from dist_train.evaluation.scores import Scores
from dist_train.matching.pairs import PairSet
from shards.catalogue.rows import Carried, Catalogue
from shards.photos.options import PackOptions
from shards.storage import stage_files
from shards.storage.errors import BadInput, Stopped
from shards.storage.stops import stops_interrupt

Options = PackOptions | TrainingOptions | EmbedConfig | IndexConfig | JoinConfig | MatchConfig
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One stage, as a call and as a command."""

    name: str
    section: str
    """Its section of the config's `slurm`."""
    arguments: tuple[str | Path, ...]
    """The command after dist-train; %a stands for the number of a task of a Slurm array."""
    call: Callable[[], Any]
    """Runs it in this process; returns what the stage returns."""
    result: Path
    """The file that exists once it is done."""
    options: Options | None = None
    """What the command reads with --config."""
    after: tuple[str, ...] = ()
    """Names of the stages whose results it reads."""
    one_process: bool = False
    """Several processes would gain nothing."""

    def options_text(self) -> str:
        """The options as YAML, without those that are not given."""
        assert self.options is not None
        options = as_json(asdict(self.options), without_none=True)
        return yaml.safe_dump(options, sort_keys=False, allow_unicode=True)

    def check_same(self) -> None:
        """Raise BadInput if it was done, or begun, with other options than these."""
        folder = self.result.parent
        begun = (folder / stage_files.STAGE).exists() and stage_files.status_of(folder) != "failed"
        if self.options is None or not (begun or self.result.exists()):
            return
        known = stage_files.read_stage(folder)["config"]
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


def run(config: Config) -> Scores | None:
    """Run every stage into `config.out`, skipping those that are done.

    Returns the scores on the test products, None without any. Raises BadInput as early as it can be
    known that a later stage would, and Stopped after a signal in
    whatever stage; the same call goes on.
    """
    from dist_train.planning.preflight import check_after_pack, check_batches, check_match_files

    if under_launcher():
        raise BadInput("run starts its stages itself; under a launcher start them one by one")
    began, results = time.monotonic(), dict[str, Any]()
    stages = stage_graph(config)
    for stage in stages:
        stage.check_same()
    check_batches(config, dict.fromkeys(config.encoders, 1))
    check_match_files(config)
    if stages[-2].name != "evaluate":
        log.info("no posting is of a test product, so there is nothing to score on")
    for stage in stages:
        folder = stage.result.parent
        try:
            with stops_interrupt():
                log.info("── %s: %s", stage.name, folder)
                results[stage.name] = stage.call()
                if stage.name == "pack":
                    check_after_pack(config, trainings_left(stages))
        except KeyboardInterrupt:
            raise Stopped(
                f"{folder}: stopped by a signal in {stage.name}; the same command goes on"
            ) from None
    log.info("all done in %.0f s; report: %s", time.monotonic() - began, results["report"])
    return results.get("evaluate")


def trainings_left(stages: list[Stage]) -> dict[str, TrainingOptions]:
    """Options of the trainings that are not done, by the name of their stage."""
    return {
        stage.name: stage.options
        for stage in stages
        if isinstance(stage.options, TrainingOptions) and not stage.result.exists()
    }


def stage_graph(config: Config) -> list[Stage]:
    """Every stage from the catalogue to the report, each after those it waits for.

    Raises BadInput for a catalogue that does not exist or lacks columns, and for a threshold file
    without a threshold or of another score; that file is read only here.
    """
    given = given_threshold(config.match)
    check_same_score(given, config.match.threshold_from, config.score_weights)
    stages = [_pack(config)]
    for modality in config.encoders:
        stages.append(_train(config, modality, modality, config.training(modality)))
    stages.append(_embed(config, ""))
    for name in config.compare:
        for modality in config.encoders:
            # Exports the encoder with its published weights, or with random weights.
            options = config.training(modality)
            encoder: Any = replace(options.encoder, pretrained=name == "untrained")
            options = replace(options, epochs=0.0, encoder=encoder)
            stage = _train(config, modality, f"{name}-{modality}", options)
            stages.append(replace(stage, one_process=True))
        stages.append(_embed(config, f"{name}-"))
    return stages + _matching(config, given) + _scoring(config)


def _pack(config: Config) -> Stage:
    out = config.out / "shards"
    words: list[str | Path] = ["pack", config.catalogue, "--out", out]
    if config.images is not None:
        words += ["--images", config.images]
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
    words = ("train", modality, "--shards", shards, "--out", out)

    def call() -> None:
        from dist_train.training.loop import train

        train(modality, shards, out, options)

    return Stage(name, modality, words, call, out / stage_files.MANIFEST, options, ("pack",))


def _embed(config: Config, prefix: str) -> Stage:
    """Embed with the trained encoders, or with those to compare with whose names have a prefix."""
    shards, out = config.out / "shards", config.out / f"{prefix}embedding"
    runs = {modality: config.out / f"{prefix}{modality}" for modality in config.encoders}
    words: list[str | Path] = ["embed", "--shards", shards, "--out", out]
    for modality, run in runs.items():
        words += [f"--{modality}", run]

    def call() -> None:
        from dist_train.embedding.embed import embed

        embed(shards, out, config.embed, runs.get("image"), runs.get("text"))

    result, after = out / stage_files.MANIFEST, tuple(run.name for run in runs.values())
    return Stage(out.name, "embed", tuple(words), call, result, config.embed, after)


def _matching(config: Config, given: Given) -> list[Stage]:
    """Index, join and match."""
    names = ("embedding", "index", "pairs", "matches")
    embedding, index, pairs, matches = (config.out / name for name in names)
    indexed, joined, matched = (out / stage_files.MANIFEST for out in (index, pairs, matches))
    done, limit, threshold = joined.exists(), config.join.max_score_floor, given.score_threshold
    # The join keeps all pairs from a given threshold on. If finished pairs reach down to it, their
    # limit stays, so that another threshold costs no join.
    if limit is None and done and (threshold is None or PairSet(pairs).reaches(threshold)):
        limit = stage_files.read_stage(pairs)["config"]["max_score_floor"]
    elif threshold is not None:
        limit = threshold if limit is None else min(limit, threshold)
    join_options = replace(config.join, max_score_floor=limit)
    match_options = config.match
    if given.model is None:  # the number of a file, which may be replaced before the match
        match_options = replace(match_options, threshold=given.threshold, threshold_from=None)

    def call() -> None:
        from dist_train.matching.index import build_index

        build_index(embedding, index, config.index)

    words = ("index", embedding, "--out", index)
    stages = [Stage("index", "index", words, call, indexed, config.index, ("embedding",))]

    def call() -> None:
        from dist_train.matching.build_pairs import build_pairs

        build_pairs(embedding, index, pairs, join_options)

    words = ("join", embedding, "--index", index, "--out", pairs)
    stages.append(Stage("join", "join", words, call, joined, join_options, ("index",)))

    def call() -> None:
        from dist_train.decisions.match import match

        match(pairs, matches, match_options)

    words = ("match", pairs, "--out", matches)
    return [*stages, Stage("match", "match", words, call, matched, match_options, ("join",))]


def _scoring(config: Config) -> list[Stage]:
    """Evaluate, if some posting is of a test product, and report."""
    matches, stages = config.out / "matches", []
    chunks = Catalogue(config.catalogue, config.columns).postings(Carried())
    if any((chunk.split == "test").any() for chunk in chunks):
        others: dict[str, Path] = {
            name: config.out / f"{name}-embedding" for name in config.compare
        }
        words: list[str | Path] = ["evaluate", matches]
        for name, folder in others.items():
            words += ["--compare", f"{name}={folder}"]

        def call() -> Scores:
            from dist_train.decisions.score import evaluate

            return evaluate(matches, others)

        result, after = matches / "metrics.json", ("match", *(out.name for out in others.values()))
        stages = [Stage("evaluate", "evaluate", tuple(words), call, result, after=after)]

    def call() -> Path:
        from dist_train.report.html import write_report

        return write_report(matches)

    after = ("match", *(stage.name for stage in stages))
    result = matches / "report.html"
    return [*stages, Stage("report", "report", ("report", matches), call, result, after=after)]
