"""Every check of this machine, with the facts that each needs."""

import os
import resource
import sys
import time
from pathlib import Path

import torch
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE
from torch.utils.cpp_extension import get_default_build_root

from dist_train.config.training import Device, ImageTraining
from dist_train.doctor import machine, services, software
from dist_train.doctor.all_reduce import all_reduce
from dist_train.doctor.finding import Finding, fault
from shards.read.cache import Cache

PORT = 29500
"""The default port of accelerate and torchrun."""
AHEAD = 3
"""Batches that a worker holds at a time: two wait (prefetch), one is being built."""


def examine(device: Device, out: Path) -> list[Finding]:
    """Every finding on this machine, for stages that write to `out` on `device`."""
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    bus = Path("/sys/bus/pci/devices")
    gpu = software.gpu(bus, software.driver_cuda(), torch.version.cuda, device)
    if gpu.level == "fine" and device == "cuda" and not gpus:
        gpu = fault("GPU", f"{gpu.message}; but torch sees none", "check CUDA_VISIBLE_DEVICES")
    findings = [software.versions(), software.faiss_wheels(sys.path, gpus), gpu]

    loader = ImageTraining()
    batch = loader.batch_size * 3 * loader.encoder.image_size**2 * 4  # bytes of float32 photos
    build = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    infiniband = len(list(Path("/sys/class/infiniband").glob("*")))
    findings += [
        machine.shared_memory(Path("/dev/shm"), max(1, gpus) * loader.workers * AHEAD * batch),
        machine.open_files(resource.getrlimit(resource.RLIMIT_NOFILE)),
        machine.locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], infiniband),
        machine.free_disk(out),
        machine.writable("model cache", Path(HF_HUB_CACHE), "HF_HOME"),
        machine.writable("shard cache", Cache().folder, "DIST_TRAIN_CACHE"),
        machine.writable("extensions", build, "TORCH_EXTENSIONS_DIR"),
        machine.extension_locks(build, time.time()),
        machine.port(os.environ.get("MASTER_PORT", str(PORT))),
        machine.writable("output", out, "--out"),
    ]
    if findings[-1].level == "fine":
        ahead = machine.ahead_of_files(machine.existing(out))
        findings.append(machine.clock(ahead, f"the file system of {out}"))

    hub, ahead = services.hub(ENDPOINT, HF_HUB_OFFLINE)
    findings += [hub] if ahead is None else [hub, machine.clock(ahead, "the hub")]
    configured = "SLURM_CONF" in os.environ or Path("/etc/slurm/slurm.conf").exists()
    findings.append(services.slurm(configured))
    findings.append(all_reduce("nccl", gpus) if gpus else all_reduce("gloo", 2))
    return findings
