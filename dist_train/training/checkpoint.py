"""Checkpoints: complete or absent, hashed, without pickle, loadable by any number of ranks.

step-00001000/encoder.safetensors          weights and buffers
              optimizer.safetensors        AdamW's moments by parameter name
              head-<first>-<last>.safetensors   centres and moments of these classes
              average.safetensors          the moving average of the encoder, where there is one
              best.safetensors             the best encoder so far, where it is to be kept
              state.json                   step, classes, place in the order, counts, scores
              manifest.json                sizes and sha256 of all of them, written last
"""

import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dist_train.heads.store import load_head, save_head
from dist_train.runtime import Clock, Runtime
from dist_train.training.optimizer_state import load_moments, moments
from dist_train.training.whole import load_whole, whole_state
from shards.errors import BadInput, Failed
from shards.files import atomic_path, read_json, sha256_file, sync, write_json
from shards.order_state import check_equal

FORMAT = 3
ALWAYS = {"encoder.safetensors", "optimizer.safetensors", "state.json"}
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Path, keep: int, runtime: Runtime, grace: float = math.inf) -> None:
        """`grace`: seconds that a save may take before it is warned of."""
        self.run, self.folder = run, run / "checkpoints"
        self.keep, self.runtime, self.grace = keep, runtime, grace

    def save(self, training: Any, step: int) -> float:
        """Write the checkpoint of `step`; all ranks call it at the same step. The seconds it took.

        Raises Failed on all ranks when one cannot write; the checkpoints before it are whole.
        """
        final, clock = self.folder / f"step-{step:08d}", Clock()
        if self.runtime.tell_all(final.exists()):
            return 0.0
        self.runtime.check_newest(self.run)
        # Each life has its own: one that was cut off may still write into its.
        temporary = self.folder / f".{final.name}.tmp-{self.runtime.life.get('life', '')}"
        tensors = _replicated(training)
        self._on_main(self._remove_unfinished, temporary)
        self._on_main(lambda: _write(temporary, tensors, _state(training, step)), temporary)
        self._on_all(
            lambda: save_head(temporary, training.head, training.head_optimizer), temporary
        )
        self._on_main(lambda: self._finish(temporary, final), temporary)
        seconds = self.runtime.tell_all(clock.seconds())
        log.info("%s: written in %.1f s", final, seconds)
        if seconds > self.grace and self.runtime.is_main:
            log.warning("%s: took %.0f s, a stop signal leaves %.0f (--grace): give more (Slurm: "
                        "--signal) or a faster disk", final, seconds, self.grace)  # fmt: skip
        return seconds

    def _on_main(self, action: Callable[[], None], temporary: Path) -> None:
        self._on_all(action if self.runtime.is_main else lambda: None, temporary)

    def _on_all(self, action: Callable[[], None], temporary: Path) -> None:
        """Have every rank do its `action`; where one cannot write, all of them fail alike."""
        fault = ""
        try:
            action()
        except (OSError, SafetensorError) as error:
            fault = f"rank {self.runtime.rank}: {error}"
        faults = [one for one in self.runtime.from_all(fault) if one]
        if faults:
            if self.runtime.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise Failed(self._cannot_write(temporary, faults[0]))

    def _cannot_write(self, temporary: Path, fault: str) -> str:
        free = shutil.disk_usage(self.run).free / 1e6
        newest = max((path.name for path in self.folder.glob("step-*")), default="none")
        return (
            f"{temporary}: cannot be written ({fault}; {free:.0f} MB free there); the newest whole "
            f"checkpoint is {newest}; make room (--keep 1 needs that of two), and the same command "
            "goes on from it"
        )

    def _finish(self, temporary: Path, final: Path) -> None:
        _seal(temporary)
        self.runtime.check_newest(self.run)
        os.replace(temporary, final)
        sync(self.folder)
        self._remove_old()

    def load_newest(self, training: Any) -> int:
        """Load the newest whole checkpoint, or nothing; the step to go on with.

        Raises BadInput when the ranks, or the checkpoint and this training, differ in their order.
        """
        check_equal(self.runtime.from_all(training.order.to_json()))
        step = self._load_whole(training)
        position = step * training.order.batch
        check_equal(self.runtime.from_all(training.order.at(position).to_json()))
        return step

    def _load_whole(self, training: Any) -> int:
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            fault = self.runtime.tell_all(_fault(folder) if self.runtime.is_main else "")
            if not fault:
                return self._load(folder, training)
            log.warning("%s: %s; it is removed, going back to the one before", folder, fault)
            self.runtime.barrier()
            if self.runtime.is_main:
                shutil.rmtree(folder)
        return 0

    def _load(self, folder: Path, training: Any) -> int:
        state = _checked_state(folder, training)
        step = int(state["step"])
        load_whole(training.encoder, load_file(folder / "encoder.safetensors"))
        best = folder / "best.safetensors"
        kept = load_file(best) if best.exists() and self.runtime.is_main else {}
        training.progress.take(state["progress"], kept)
        saved = load_file(folder / "optimizer.safetensors")
        load_moments(training.prepared, training.optimizer, saved, training.progress.updates)
        if training.average is not None:
            training.average.module.load_state_dict(load_file(folder / "average.safetensors"))
        load_head(folder, training.head, training.head_optimizer)
        log.info("%s: going on from step %d", folder, step)
        return step

    def _remove_old(self) -> None:
        for folder in sorted(self.folder.glob("step-*"))[: -self.keep]:
            shutil.rmtree(folder)

    def _remove_unfinished(self) -> None:
        # Before anything is written: of a disk that has no room for two, none would ever fit.
        for folder in self.folder.glob(".step-*.tmp*"):
            shutil.rmtree(folder, ignore_errors=True)  # its life may still be writing


def _replicated(training: Any) -> dict[str, dict[str, torch.Tensor]]:
    """What rank 0 writes, by name of the file; all ranks call it."""
    tensors = {
        "encoder": whole_state(training.encoder),
        "optimizer": moments(training.prepared, training.optimizer),
    }
    if training.average is not None:
        tensors["average"] = training.average.module.state_dict()
    if training.progress.best_weights:
        tensors["best"] = training.progress.best_weights
    return tensors


def _write(folder: Path, tensors: dict[str, Any], state: dict[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, values in tensors.items():
        _save(folder / f"{name}.safetensors", values)
    write_json(folder / "state.json", state)


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary)


def _seal(folder: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
    }
    write_json(folder / "manifest.json", {"format": FORMAT, "files": files})


def _fault(folder: Path) -> str:
    """What is wrong with a checkpoint; empty when it is whole."""
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
        return _difference(folder, manifest["format"], manifest["files"])
    except BadInput as error:
        return str(error)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return f"{path}: not as it was written ({type(error).__name__}: {error})"


def _difference(folder: Path, written: int, files: dict[str, Any]) -> str:
    """How the files differ from what the manifest says of them; empty when they do not."""
    if missing := sorted(ALWAYS - files.keys()):
        return f"{folder / 'manifest.json'}: says nothing of {missing[0]}"
    for name, facts in files.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != facts["bytes"]:
            return f"{path}: missing or cut short"
        if sha256_file(path) != facts["sha256"]:
            return f"{path}: bytes differ from their sha256"
    # Where both say the same other format, it is whole and of another version: that is refused.
    if written != (said := read_json(folder / "state.json")["format"]):
        return f"{folder / 'manifest.json'}: of format {written}, its state.json of {said}"
    return ""


def _state(training: Any, step: int) -> dict[str, Any]:
    order = training.order.at(step * training.order.batch)
    classes = {"classes": training.head.classes, "class_names": training.class_names}
    progress = {"progress": training.progress.to_json()}
    return {"format": FORMAT, "step": step, "order": order.to_json()} | classes | progress


def _checked_state(folder: Path, training: Any) -> dict[str, Any]:
    """A checkpoint's state.json; BadInput when it is of another training."""
    state = read_json(folder / "state.json")
    if state["format"] != FORMAT or state["classes"] != training.head.classes:
        raise BadInput(f"{folder}: of another format or number of classes; start a new run")
    step = int(state["step"])
    position = training.order.check_goes_on(state["order"], str(folder))
    if position != step * training.order.batch:
        raise BadInput(f"{folder}: {step} steps took {position} items, with another batch_size "
                       "than now; go on with that one, or start a new run")  # fmt: skip
    return state
