"""Every file of every finished stage directory is damaged, and every verb that reads it is called.

Each call ends as bad input that names the file, or with the result of the intact directory.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_train.config.options import EmbedConfig, IndexConfig, JoinConfig, MatchConfig
from dist_train.config.training import ImageEncoderOptions, ImageTraining, TextEncoderOptions
from dist_train.decisions.match import match
from dist_train.decisions.score import evaluate
from dist_train.embedding.embed import embed
from dist_train.encoders.encoder import new_encoder
from dist_train.matching.build_pairs import build_pairs
from dist_train.matching.index import build_index
from dist_train.report.html import write_report
from dist_train.slurm.status import status
from dist_train.training.loop import train
from shards.read.verify import verify
from shards.storage.errors import BadInput
from shards.storage.files import sha256_file
from shards.storage.stage_files import MANIFEST, STAGE, STATUS

pytestmark = pytest.mark.timeout(3600)
EMBED = EmbedConfig(workers=0, device="cpu", precision="fp32", dtype="float32")
JOIN = JoinConfig(engine="faiss", device="cpu", neighbours=3, pairs_per_item=10)
OWN = (STAGE, STATUS, MANIFEST)


def results(out: Path) -> dict[str, str]:
    """sha256 of what a stage wrote, of a run its weights, without the files that hold times."""
    return {
        str(path.relative_to(out)): sha256_file(path)
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in OWN
        if not (out / "encoder").exists() or path.match("encoder/*.safetensors")
    }


def verified(shards: Path) -> None:
    """What the verb verify does, its lines as one."""
    if faults := verify(shards):
        raise BadInput("; ".join(faults))


def weights(options: ImageEncoderOptions | TextEncoderOptions) -> dict[str, bytes]:
    """The weights with which a training from a run would begin."""
    state = new_encoder(options, 0).state_dict()
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


class Pipeline:
    """Every stage directory of a small catalogue, and the verbs that read each of them."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.out = root, root / "new"
        options = ImageTraining(
            encoder=ImageEncoderOptions(model=str(model), image_size=32),
            batch_size=24, epochs=0.2, precision="fp32", workers=0, device="cpu",
        )  # fmt: skip
        shards, image, text, embedding, index, pairs, matches = (
            root / name for name in DIRECTORIES
        )

        def written(stage: Callable[[Path], object]) -> Callable[[], object]:
            def call() -> dict[str, str]:
                stage(self.out)
                return results(self.out)

            return call

        runs = {"image": image, "text": text}
        self.verbs: dict[str, Callable[[], object]] = {
            "verify": lambda: verified(shards),
            "train": written(lambda out: train("image", shards, out, options)),
            "embed": written(lambda out: embed(shards, out, EMBED, **runs)),
            "index": written(lambda out: build_index(embedding, out, IndexConfig())),
            "join": written(lambda out: build_pairs(embedding, index, out, JOIN)),
            "match": written(lambda out: match(pairs, out, MatchConfig())),
            "evaluate": lambda: evaluate(matches),
            "report": lambda: write_report(matches).read_text(),
            "start image": lambda: weights(ImageEncoderOptions(model=str(image), image_size=32)),
            "start text": lambda: weights(TextEncoderOptions(model=str(text))),
            # The same commands once more, whose directories are finished.
            "embed again": lambda: embed(shards, embedding, EMBED, **runs),
            "index again": lambda: build_index(embedding, index, IndexConfig()),
            "join again": lambda: build_pairs(embedding, index, pairs, JOIN),
            "match again": lambda: match(pairs, matches, MatchConfig()),
        }
        self.verbs |= {f"status {name}": lambda name=name: status(root / name) for name in READERS}

    def restore(self, snapshot: dict[Path, bytes]) -> None:
        """Bring the files below the root back to what they were."""
        shutil.rmtree(self.out, ignore_errors=True)
        for path in self.root.rglob("*"):
            if path.is_file() and path not in snapshot:
                path.unlink()
        for path, data in snapshot.items():
            if not path.exists() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)


READERS = {
    "shards": ["verify", "embed", "train", "report"],
    "image": ["embed", "start image"],
    "text": ["embed", "start text"],
    "embedding": ["index", "join", "match", "evaluate", "report", "embed again"],
    "index": ["join", "index again"],
    "pairs": ["match", "evaluate", "report", "join again"],
    "matches": ["evaluate", "report", "match again"],
}
DIRECTORIES = tuple(READERS)
"""In the order of the stages."""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, shard_set, image_run, text_run, tiny_vit) -> Pipeline:
    root = tmp_path_factory.mktemp("pipeline")
    for name, made in (("shards", shard_set), ("image", image_run), ("text", text_run)):
        shutil.copytree(made, root / name, ignore=shutil.ignore_patterns("checkpoints"))
    found = Pipeline(root, tiny_vit)
    for verb in ("embed again", "index again", "join again", "match again", "evaluate", "report"):
        found.verbs[verb]()
    return found


@pytest.fixture(scope="module")
def snapshot(pipeline: Pipeline) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in pipeline.root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def truth(pipeline: Pipeline, snapshot: dict[Path, bytes]) -> dict[str, object]:
    found = {}
    for verb, call in pipeline.verbs.items():
        found[verb] = call()
        pipeline.restore(snapshot)
    return found


# ── damage: each changes `path`, `neighbour` being the next file of its directory


def flipped(path: Path, neighbour: Path) -> None:
    data = bytearray(path.read_bytes())
    draw = random.Random(str(path.name))
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncated(path: Path, neighbour: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swapped(path: Path, neighbour: Path) -> None:
    one, other = path.read_bytes(), neighbour.read_bytes()
    path.write_bytes(other)
    neighbour.write_bytes(one)


def deleted(path: Path, neighbour: Path) -> None:
    path.unlink()


def random_bytes(path: Path, neighbour: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def nested(path: Path, neighbour: Path) -> None:
    path.write_bytes(b"[" * 100_000)


DAMAGES = (flipped, truncated, swapped, deleted, random_bytes, nested)
IN_EVERY_RUN = {
    ("shards", flipped), ("image", deleted), ("text", swapped), ("embedding", flipped),
    ("index", random_bytes), ("pairs", truncated), ("matches", nested),
}  # fmt: skip


def trials(directory: Path) -> Iterator[tuple[Path, Path]]:
    """Every file of a directory with its neighbour: one of its kind where there is one."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in files:
        alike = [file for file in files if file.suffix == path.suffix and file != path]
        others = alike or [file for file in files if file != path]
        yield path, next((file for file in others if file > path), others[0])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, marks=() if (name, damage) in IN_EVERY_RUN else pytest.mark.full)
        for name in DIRECTORIES
        for damage in DAMAGES
    ],
)
def test_damage_is_refused_by_name_or_changes_nothing(
    pipeline: Pipeline, snapshot: dict, truth: dict, request, name: str, damage: Callable
) -> None:
    is_full = (name, damage) not in IN_EVERY_RUN
    wrong = []
    for path, neighbour in trials(pipeline.root / name):
        below = str(path.relative_to(pipeline.root))
        if path.suffix == ".html" or "tensorboard" in below:
            continue  # written for people: nothing reads it
        for verb in [*READERS[name], f"status {name}"]:
            if verb == "train" and not is_full and path.name != "items.parquet":
                continue  # seconds each
            damage(path, neighbour)
            try:
                same = pipeline.verbs[verb]() == truth[verb]
                if not same and not is_known(below, damage, verb):
                    wrong.append(f"{verb}: another result after {damage.__name__} {below}")
            except BadInput as error:
                names = [str(path), str(neighbour)] if damage is swapped else [str(path)]
                if path.name in OWN or neighbour.name in OWN:
                    names.append(str(pipeline.root / name))
                if not any(one in str(error) for one in names) or "\n" in str(error):
                    wrong.append(f"{verb}: {damage.__name__} {below} gives {error}")
            except Exception as error:
                wrong.append(f"{verb}: {damage.__name__} {below} gives {error!r}")
            pipeline.restore(snapshot)
    assert not wrong, "\n".join(wrong)


def is_known(below: str, damage: Callable, verb: str) -> bool:
    """What is another result by intention, and not silent."""
    return (below, damage, verb) in {
        ("matches/metrics.json", deleted, "report"),  # as where evaluate was never run
        ("shards/stage.json", deleted, "report"),  # it says that there are no photos, and why
        # A stage without its manifest is not done.
    } or (verb.startswith("status") and below.endswith(MANIFEST) and damage is deleted)


def test_what_training_did_not_write_is_not_taken_for_a_part_of_the_encoder(
    pipeline: Pipeline, snapshot: dict
) -> None:
    added = pipeline.root / "text" / "encoder" / "added_tokens.json"
    added.write_text('{"sabun": 3}')
    with pytest.raises(BadInput, match=r"added_tokens\.json: no part of this run"):
        pipeline.verbs["embed"]()
    pipeline.restore(snapshot)


def test_scores_of_other_matches_are_refused(pipeline: Pipeline, snapshot: dict) -> None:
    other = pipeline.root / "other"
    match(pipeline.root / "pairs", other, MatchConfig(threshold=0.99))
    shutil.copy(pipeline.root / "matches" / "metrics.json", other / "metrics.json")
    with pytest.raises(BadInput, match=r"metrics\.json: is of other matches; run dist-train eval"):
        write_report(other)
    evaluate(other)
    write_report(other)
    shutil.rmtree(other)
    pipeline.restore(snapshot)
