"""The stages of a config as commands: what each reads, what says that it is done."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dist_train.config import Config, TrainingOptions, View, result_options
from shards import stage_files
from shards.carried import Carried
from shards.catalogue import Catalogue
from shards.errors import BadInput
from shards.files import read_json, write_atomic


@dataclass(frozen=True)
class Step:
    """One command of the road."""

    name: str
    stage: str
    """Its section of the config's `slurm`."""
    words: tuple[str, ...]
    """What stands after dist-train; %a is the number of an array's task."""
    made: Path
    """The file that is there when it is done."""
    options: Any = None
    """Dataclass that the command reads with --config."""
    after: tuple[str, ...] = ()
    """Names of the steps whose result it reads."""
    alone: bool = False
    """One process will do."""

    def options_text(self) -> str:
        """The options as YAML; those that are not given stay out."""
        return yaml.safe_dump(_plain(asdict(self.options)), sort_keys=False, allow_unicode=True)

    def check_same(self) -> None:
        """Raises BadInput when it was done, or begun, with other options than these."""
        folder = self.made.parent
        begun = (folder / stage_files.STAGE).exists() and stage_files.status_of(folder) != "failed"
        if self.options is None or not (begun or self.made.exists()):
            return
        known = read_json(folder / stage_files.STAGE)["config"]
        wanted = result_options(self.options)
        if getattr(self.options, "threshold_from", None) is not None:
            del wanted["threshold"]
        told = [f"{k} {known.get(k)!r} there, {v!r} asked" for k, v in wanted.items()
                if known.get(k) != v]  # fmt: skip
        if told:
            raise BadInput(f"{folder}: was begun with other options ({'; '.join(told)}); "
                           "name another folder or remove this one")  # fmt: skip


def road(config: Config) -> list[Step]:
    """Every step from the catalogue to the report, each after those it waits for.

    Raises BadInput for a catalogue that is not there or has not the columns.
    """
    out = config.out
    steps = [_pack(config)]
    steps += [_train(config, view, view, _training(config, view)) for view in config.encoders]
    steps.append(_embed(config, "", "embedding"))
    for name in config.compare:
        for view in config.encoders:
            start = without_training(_training(config, view), name)
            steps.append(replace(_train(config, view, f"{name}-{view}", start), alone=True))
        steps.append(_embed(config, f"{name}-", f"{name}-embedding"))
    index = ("index", str(out / "embedding"), "--out", str(out / "index"))
    steps.append(_step(config, "index", index, "index", config.index, "embedding"))
    match = ("match", str(out / "embedding"), "--index", str(out / "index"))
    match = (*match, "--out", str(out / "matches"))
    steps.append(_step(config, "match", match, "matches", config.match, "index"))
    scored = _is_labelled(config)
    if scored:
        steps.append(_evaluate(config))
    steps.append(Step("report", "report", ("report", str(out / "matches")),
                      out / "matches" / "report.html",
                      after=("match", *(("evaluate",) if scored else ()))))  # fmt: skip
    return steps


def without_training(training: TrainingOptions, name: str) -> TrainingOptions:
    """The options of an encoder that is only exported: `untrained` (published) or `random`."""
    encoder: Any = replace(training.encoder, pretrained=name == "untrained")
    return replace(training, epochs=0.0, encoder=encoder)


def _step(
    config: Config, stage: str, words: tuple[str, ...], folder: str, options: Any, *after: str,
    name: str = "",
) -> Step:  # fmt: skip
    made = config.out / folder / stage_files.MANIFEST
    return Step(name or stage, stage, words, made, options, after)


def _pack(config: Config) -> Step:
    words = ["pack", str(config.catalogue), "--out", str(config.out / "shards")]
    if config.images is not None:
        words += ["--images", str(config.images)]
    if config.columns:
        words += ["--columns", ",".join(f"{ours}={name}" for ours, name in config.columns.items())]
    tasks = config.slurm.job("pack").tasks or 1
    if tasks > 1:
        words += ["--task", "%a", "--of", str(tasks)]
    return _step(config, "pack", tuple(words), "shards", config.pack)


def _train(config: Config, view: View, name: str, options: TrainingOptions) -> Step:
    out = config.out
    words = ("train", view, "--shards", str(out / "shards"), "--out", str(out / name))
    return _step(config, view, words, name, options, "pack", name=name)


def _embed(config: Config, prefix: str, name: str) -> Step:
    out, runs = config.out, [f"{prefix}{view}" for view in config.encoders]
    words = ["embed", "--shards", str(out / "shards"), "--out", str(out / name)]
    for view, run in zip(config.encoders, runs, strict=True):
        words += [f"--{view}", str(out / run)]
    return _step(config, "embed", tuple(words), name, config.embed, *runs, name=name)


def _evaluate(config: Config) -> Step:
    words = ["evaluate", str(config.out / "matches")]
    others = [f"{name}-embedding" for name in config.compare]
    for name, folder in zip(config.compare, others, strict=True):
        words += ["--compare", f"{name}={config.out / folder}"]
    made = config.out / "matches" / "metrics.json"
    return Step("evaluate", "evaluate", tuple(words), made, after=("match", *others))


def _training(config: Config, view: View) -> TrainingOptions:
    return config.image if view == "image" else config.text


def _is_labelled(config: Config) -> bool:
    """Some posting has a label_group: there may be something to score on."""
    catalogue = Catalogue(config.catalogue, config.columns)
    return any((some.label_group != "").any() for some in catalogue.postings(Carried()))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def write_options(step: Step, path: Path) -> None:
    """Write the options of `step` for its --config."""
    write_atomic(path, step.options_text().encode())
