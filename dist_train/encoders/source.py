"""Where an encoder's model comes from: what `encoder.model` names and what lies in that folder."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from timm.models import is_model, split_model_name_tag
from transformers.utils import cached_file

from dist_train.config.training import Modality
from dist_train.distributed.stage import RUN
from shards.read.location import Folder
from shards.storage.errors import BadInput, Corrupt
from shards.storage.files import read_json
from shards.storage.stage_files import STAGE

Pooling = Literal["mean", "cls", "last"]
OURS, NECK = "dist_train.json", "neck.safetensors"
ENCODER_FILES = "encoder/*"
"""The files of a run's manifest that are its encoder."""
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
WANTED = {
    "image": "wanted is a timm model: config.json with its architecture, and model.safetensors",
    "text": "wanted is a transformers model: config.json with its model_type, model.safetensors "
    "and the files of its tokenizer, such as tokenizer.json",
}
POOLINGS: dict[str, Pooling] = {
    "cls_token": "cls",
    "cls": "cls",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean",
    "mean": "mean",
    "lasttoken": "last",
}
"""Poolings of sentence-transformers that are offered, without their prefix pooling_mode_. The root
of the length, by which one divides, falls away where vectors are scaled to length one."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A model as the user named it, and where its libraries find it."""

    model: str
    folder: Path | None
    """Folder with config.json; None for a published model."""
    published: str = ""
    """Name that timm or transformers downloads it by."""
    ours: dict[str, Any] | None = None
    """dist_train.json of a folder that an earlier training wrote."""
    beside: Path | None = None
    """Folder that holds what sentence-transformers adds, often the same as `folder`."""

    def __str__(self) -> str:
        named = self.model in (str(self.folder), "")
        where = f" ({self.folder})" if self.folder and not named else ""
        return f"encoder.model {self.model}{where}"

    @property
    def path(self) -> str:
        """What transformers opens."""
        return str(self.folder or self.published)

    def read_beside(self, name: str) -> Any:
        """A JSON file that may lie beside the model; None when it does not."""
        if self.folder is None:
            missing = ("missing_entries", "gated_repo", "connection_errors")
            quiet: Any = {f"_raise_exceptions_for_{kind}": False for kind in missing}
            found = cached_file(self.published, name, **quiet)
            return read_json(Path(found)) if found else None
        file = (self.beside or self.folder) / name
        return read_json(file) if file.is_file() else None

    @property
    def width(self) -> int:
        """Numbers of a vector of an encoder that is loaded."""
        return int(self.ours["width"]) if self.ours else 0

    def trained_options(self) -> dict[str, Any]:
        """The encoder's options of an earlier training; empty without one."""
        return self.ours["options"] if self.ours else {}

    def text_pooling(self) -> Pooling:
        """How the model was trained to be pooled, as far as its files say so; otherwise mean."""
        if self.ours:
            return self.trained_options()["pooling"]
        modules = _modules(self.read_beside("modules.json"), self)
        if unused := [path for kind, path in modules if kind not in KNOWN_MODULES]:
            log.warning("%s: the layers in %s are not used", self, " and ".join(unused))
        paths = [path for kind, path in modules if kind == "Pooling"]
        config = self.read_beside(f"{paths[0] if paths else '1_Pooling'}/config.json") or {}
        modes = [k[len("pooling_mode_") :] for k, v in config.items() if v is True]
        modes += [config["pooling_mode"]] if isinstance(config.get("pooling_mode"), str) else []
        modes = [mode for mode in modes if mode]
        if len(modes) > 1 or any(mode not in POOLINGS for mode in modes):
            log.warning("%s: its pooling, %s, is not offered; mean is used", self, "+".join(modes))
            return "mean"
        return POOLINGS[modes[0]] if modes else "mean"

    def text_prefix(self) -> str:
        """The text that the model wants before every title, by its own files."""
        if self.ours:
            return self.trained_options().get("prefix") or ""
        config = self.read_beside("config_sentence_transformers.json") or {}
        prompts = {k: v for k, v in (config.get("prompts") or {}).items() if v}
        default = config.get("default_prompt_name")
        if prompts and default not in prompts:
            listed = ", ".join(f"{name}: {text!r}" for name, text in prompts.items())
            log.warning("%s: names prefixes (%s), none by default; give one with "
                        "--encoder.prefix, or '' for none", self, listed)  # fmt: skip
        return prompts.get(default, "")

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Every error of the libraries that open the model as one line of BadInput."""
        try:
            yield
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(f"{self}: {self._reason(error)}") from None

    def _reason(self, error: Exception) -> str:
        kind, text = type(error).__name__, str(error)
        if "trust_remote_code" in text:
            return (
                "brings Python code that would have to be run; read it, and if you trust it give "
                "--encoder.trust-remote-code"
            )
        first = first_line(error)
        if self.folder is not None:
            return f"cannot be opened ({kind}: {first})"
        if isinstance(error, OSError) or "offline" in text.lower() or "hub" in kind.lower():
            return (
                f"no folder of that name here, and the hub does not give it ({kind}); name a local "
                "folder: --encoder.model FOLDER"
            )
        return (
            f"cannot be built ({kind}: {first}); name another model, or a local folder: "
            "--encoder.model FOLDER"
        )


KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
"""What a sentence-transformers model may consist of without losing a layer here."""


def find_model(model: str, modality: Modality, pretrained: bool) -> Source:
    """What `model` names, looked at before it is opened.

    An encoder's folder, its run, and the layouts of timm, transformers and sentence-transformers
    go. Raises BadInput, which says what is in the folder and what is wanted.
    """
    name = model.removeprefix("local-dir:")
    folder = local_path(name)
    if folder is None:
        return Source(model, None, name if modality == "text" else _timm_name(name))
    below = folder / "encoder"
    if (below / OURS).is_file() or (below.is_dir() and (folder / STAGE).is_file()):
        folder = below
    compare_with_run(folder)
    source = Source(model, folder)
    if (folder / OURS).is_file():
        ours = read_json(folder / OURS)
        if (found := ours.get("modality")) != modality:
            raise BadInput(f"{folder}: an encoder of {found}, wanted {modality}")
        source = Source(model, folder, ours=ours)
    elif modality == "text" and not (folder / "config.json").is_file():
        # The older layout of sentence-transformers keeps the model one folder below.
        modules = _modules(source.read_beside("modules.json"), source)
        below = folder / (modules[0][1] if modules else "0_Transformer")
        if (below / "config.json").is_file():
            source = Source(model, below, beside=folder)
    _check_layout(source, modality)
    if pretrained:
        _check_weights(source, modality)
    return source


def compare_with_run(folder: Path) -> None:
    """Compare the encoder folder of a run with the run's manifest, each file once a process.

    Nothing is known of other folders. Raises Unfinished for a run that is not done, and Corrupt for
    a file that is missing, not as training wrote it, or no part of the run, which the libraries
    that open a folder would take into account.
    """
    if folder.name != "encoder" or not (folder.parent / STAGE).is_file():
        return
    run = Folder(folder.parent, RUN)
    names = run.names(ENCODER_FILES)
    run.compare(names)
    for path in files_of(folder):
        if str(path.relative_to(run.path)) not in names:
            raise Corrupt(f"{path}: no part of this run, training did not write it; move it away")


def files_of(folder: Path) -> list[Path]:
    """The files below an encoder's folder, without those that are being written."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.match(".*.tmp-*"))


def first_line(error: Exception) -> str:
    """The line of a library's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    mismatch = [line for line in lines if line.startswith("size mismatch")]
    return (mismatch or lines or [type(error).__name__])[0]


def _modules(modules: Any, source: Source) -> list[tuple[str, str]]:
    """(kind, folder) of each module of a sentence-transformers model.

    Raises BadInput for one that is not made of a transformers model.
    """
    found = [(entry["type"].split(".")[-1], Path(entry["path"]).name) for entry in modules or []]
    if found and found[0][0] != "Transformer":
        raise BadInput(f"{source}: begins with a {found[0][0]}; {WANTED['text']}")
    return found


def _timm_name(name: str) -> str:
    """The name timm knows a published model by; `timm/NAME` and OWNER/NAME are names of the hub."""
    short = name.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/")
    if "/" not in short and is_model(split_model_name_tag(short)[0]):
        return short
    return f"hf-hub:{name}" if "/" in name and ":" not in name else name


def _check_layout(source: Source, modality: Modality) -> None:
    """BadInput for a folder that holds something else than a model of the modality."""
    folder = source.folder
    assert folder is not None
    if (folder / "adapter_config.json").is_file():
        raise BadInput(
            f"{source}: a PEFT adapter, which is a change to another model; merge the two "
            "(merge_and_unload) and name the folder of the result"
        )
    config: Any = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not isinstance(config, dict):
        raise BadInput(f"{folder / 'config.json'}: not a JSON object; {WANTED[modality]}")
    wanted = {"image": "architecture", "text": "model_type"}[modality]
    if config.get(wanted):
        return
    names = sorted(path.name for path in folder.iterdir())
    if any(name.startswith("open_clip") for name in names):
        what = "an open_clip model; timm publishes the image half of many, as timm/NAME"
    elif config.get("architecture"):
        what = f"a timm model ({config['architecture']})"
    elif config.get("model_type"):
        what = f"a transformers model ({config['model_type']})"
        what += "; timm has most image architectures too, published as timm/NAME"
    elif "stage.json" in names:
        what = "a stage directory without an encoder; name a run that has finished"
    elif config:
        what = f"a config.json without {wanted}"
    else:
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        what = f"no config.json, but {listed}" if names else "nothing"
    raise BadInput(f"{source}: the folder holds {what}; {WANTED[modality]}")


def _check_weights(source: Source, modality: Modality) -> None:
    """BadInput when the folder has no weights, or not all bytes of them."""
    assert source.folder is not None
    files = [file for file in sorted(source.folder.iterdir()) if file.suffix in WEIGHTS]
    files = [file for file in files if file.name != NECK]
    if not files or (source.ours and not (source.folder / "model.safetensors").is_file()):
        raise BadInput(
            f"{source}: the folder has no model.safetensors; {WANTED[modality]} (or start from "
            "random weights: --no-encoder.pretrained)"
        )
    for file in files:
        with file.open("rb") as opened:
            pointer = opened.read(20).startswith(b"version https://git")
        if pointer:
            raise BadInput(
                f"{source}: {file}: a Git LFS pointer, not the weights; run git lfs pull there"
            )
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except SafetensorError as error:
                raise BadInput(
                    f"{source}: {file}: damaged or cut off ({error}); copy or download it again"
                ) from None


def local_path(text: str) -> Path | None:
    """The folder that a model option names, or None for the name of a published model.

    Variables and ~ are expanded. Raises BadInput if a variable is not set, a path has no folder or
    is that of a file.
    """
    expanded = os.path.expandvars(os.path.expanduser(text))
    if "$" in expanded:
        raise BadInput(f"model {text}: the variable is not set in the environment")
    if Path(expanded).is_dir():
        return Path(expanded)
    if Path(expanded).is_file():
        raise BadInput(f"model {text}: a file; name the folder that it lies in ({expanded})")
    if expanded != text or expanded.startswith((".", os.sep)):
        raise BadInput(f"model {text}: no such folder ({expanded})")
    return None
