"""Checkpoints: complete or absent, hashed, without pickle, loadable by any number of ranks.

step-00001000/encoder.safetensors          weights and buffers
              optimizer.safetensors        AdamW's moments by parameter name
              head-<first>-<last>.safetensors   centres and moments of these classes
              state.json                   step, classes, where the run stands in its order
              manifest.json                sizes and sha256 of all of them, written last
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dist_train.heads.store import load_head, save_head
from dist_train.runtime import Runtime
from dist_train.training.optimizer_state import load_moments, moments
from dist_train.training.whole import load_whole, whole_state
from shards.errors import BadInput
from shards.files import atomic_path, read_json, sha256_file, sync, write_json
from shards.order_state import check_equal

FORMAT = 2
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Path, keep: int, runtime: Runtime) -> None:
        self.folder, self.keep, self.runtime = run / "checkpoints", keep, runtime

    def save(self, training: Any, step: int) -> None:
        """Write the checkpoint of `step`; all ranks call it at the same step."""
        final = self.folder / f"step-{step:08d}"
        if final.exists():
            return
        temporary = self.folder / f".{final.name}.tmp"
        encoder = whole_state(training.encoder)
        encoder_moments = moments(training.prepared, training.optimizer)
        if self.runtime.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _save(temporary / "encoder.safetensors", encoder)
            _save(temporary / "optimizer.safetensors", encoder_moments)
            write_json(temporary / "state.json", _state(training, step))
        self.runtime.barrier()
        save_head(temporary, training.head, training.head_optimizer)
        self.runtime.barrier()
        if self.runtime.is_main:
            _seal(temporary)
            os.replace(temporary, final)
            sync(self.folder)
            self._remove_old()
        self.runtime.barrier()

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
                return _load(folder, training)
            log.warning("%s: %s; it is removed, going back to the one before", folder, fault)
            self.runtime.barrier()
            if self.runtime.is_main:
                shutil.rmtree(folder)
        return 0

    def _remove_old(self) -> None:
        unfinished = self.folder.glob(".step-*.tmp")
        for folder in [*sorted(self.folder.glob("step-*"))[: -self.keep], *unfinished]:
            shutil.rmtree(folder)


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
    try:
        manifest = read_json(folder / "manifest.json")
    except BadInput as error:
        return str(error)
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.exists() or path.stat().st_size != facts["bytes"]:
            return f"{path}: missing or cut short"
        if sha256_file(path) != facts["sha256"]:
            return f"{path}: bytes differ from their sha256"
    return ""


def _state(training: Any, step: int) -> dict[str, Any]:
    order = training.order.at(step * training.order.batch)
    classes = {"classes": training.head.classes, "class_names": training.class_names}
    return {"format": FORMAT, "step": step, "order": order.to_json()} | classes


def _load(folder: Path, training: Any) -> int:
    state = read_json(folder / "state.json")
    if state["format"] != FORMAT or state["classes"] != training.head.classes:
        raise BadInput(f"{folder}: of another format or number of classes; start a new run")
    step = int(state["step"])
    position = training.order.check_goes_on(state["order"], str(folder))
    if position != step * training.order.batch:
        raise BadInput(f"{folder}: {step} steps took {position} items, with another batch_size "
                       "than now; go on with that one, or start a new run")  # fmt: skip
    load_whole(training.encoder, load_file(folder / "encoder.safetensors"))
    load_moments(
        training.prepared, training.optimizer, load_file(folder / "optimizer.safetensors"), step
    )
    load_head(folder, training.head, training.head_optimizer)
    log.info("%s: going on from step %d", folder, step)
    return step
