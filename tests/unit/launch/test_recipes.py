"""The recipes: each loads, its header's command is one, and what the header says is so."""

import re
import shlex
from pathlib import Path

import pytest

from dist_train import cli, cli_pipeline
from dist_train.config.options import Config
from dist_train.heads.estimate import HeadEstimate
from dist_train.synthetic.demo import demo_config

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
WIDTH = 768
"""Of ViT-B and of BERT-base."""


def header(recipe: Path) -> str:
    """The comment at the top, as one line without its marks."""
    lines = recipe.read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(" ".join(line.lstrip("#") for line in lines[:first]).split())


def command(recipe: Path) -> list[str]:
    """The words of the header's command after dist-train: an indented line and what goes on."""
    text = recipe.read_text().replace("\\\n#", " ")
    return shlex.split(re.search(r"^#   dist-train (.*)$", text, re.MULTILINE)[1])


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Config:
    """What `dist-train run` takes from a recipe and a command line; nothing is run."""
    taken = []
    monkeypatch.setattr(cli_pipeline, "run_stages", taken.append)
    monkeypatch.chdir(ROOT)
    cli.app.meta(
        ["run", *words], exit_on_error=False, print_error=False, result_action="return_value"
    )
    return taken[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_command_in_the_header_is_taken(recipe, monkeypatch):
    verb, *words = command(recipe)
    assert verb in ("run", "submit")
    assert words[0] == f"launch/recipes/{recipe.name}"
    config = parsed(words, monkeypatch)
    assert str(config.out) in words
    assert str(config.catalogue) in words


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_header_says_what_to_expect(recipe):
    assert re.search(r"Expected.*F1", header(recipe))
    assert re.search(r"minutes|hours|time", header(recipe))


def test_there_is_one_for_each_encoder(monkeypatch):
    models = {}
    for recipe in RECIPES:
        config = parsed([str(recipe), "--catalogue", "c.csv", "--out", "out"], monkeypatch)
        models[recipe.stem] = (config.image.encoder.model, config.text.encoder.model)
    assert models["shopee"] == ("vit_base_patch16_224", "cahya/bert-base-indonesian-522M")
    assert models["shopee-indobert"][1] == "indobenchmark/indobert-base-p1"
    assert models["cpu"] == tuple(
        f"$DIST_TRAIN_WEIGHTS/{name}" for name in ("mobilenetv2_100", "all-minilm-l6-v2")
    )
    assert set(models) >= {"grocery", "offers", "large"}


def test_the_large_catalogue_takes_what_its_header_says(monkeypatch):
    recipe = ROOT / "launch" / "recipes" / "large.yaml"
    config = parsed(command(recipe)[1:], monkeypatch)
    world = config.slurm.nodes * config.slurm.gpus
    for training in (config.image, config.text):
        head = training.head
        estimate = HeadEstimate(
            classes=1_000_000, width=WIDTH, batch=training.batch_size, world=world,
            centres=head.centres, sample=head.sample, chunk=head.chunk,
        )  # fmt: skip
        assert str(estimate) in header(recipe)
        held = world * (estimate.weights + estimate.moments)
        assert f"{held / 1e9:.1f} GB for all ranks" in header(recipe)
        assert training.batch_size % (world * training.photos_per_product) == 0
    assert (ROOT / config.slurm.accelerate).is_file()


def test_the_demo_trains_with_the_recipe_for_cpus(monkeypatch, tmp_path):
    monkeypatch.setenv("DIST_TRAIN_WEIGHTS", str(tmp_path))
    words = [str(ROOT / "launch/recipes/cpu.yaml"), "--catalogue", "c.csv", "--out", "out"]
    recipe, demo = parsed(words, monkeypatch), demo_config(tmp_path / "demo", 4)
    assert (recipe.image, recipe.text) == (demo.image, demo.text)
    assert (recipe.embed, recipe.compare) == (demo.embed, demo.compare)
    assert recipe.pack.size == demo.pack.size
