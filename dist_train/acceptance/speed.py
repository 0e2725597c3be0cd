"""How fast a device is at what the stages do, beside the limits in its data sheet."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from dist_train.config.training import ImageEncoderOptions, Modality, TrainingOptions
from dist_train.distributed.memory import device_peak_bytes, reset_peak
from dist_train.distributed.precision import supports_bf16
from dist_train.doctor.all_reduce import BACKEND, bus_bandwidth
from dist_train.encoders.batches import BatchPlan, Inputs, load
from dist_train.encoders.encoder import ImageEncoder, new_encoder
from dist_train.matching.kernels import kernels_for
from dist_train.training.optimisation import encoder_optimizer
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput

PEAKS = {
    "H100 PCIe": (756, 2000),
    "H100": (989, 3350),
    "H200": (989, 4800),
    "A100": (312, 2039),
    "L40S": (362, 864),
    "L4": (121, 300),
    "V100": (125, 900),
}
"""Dense bfloat16 (V100: float16) TFLOP/s and GB/s of memory, from NVIDIA's data sheets (80 GB
versions); the first name that the device's name contains is used."""
LARGEST, FORWARD_SECONDS = 64, 0.1
"""The largest batch of an encoder that is measured for a plan, in items and in forward seconds."""
VIT_B_FLOPS = 2 * 17.56e9
"""Operations of a forward pass on one photo of 224 pixels: 17.56 G multiply-adds (Dosovitskiy et
al., 2021; timm's table of models)."""


class Rate(NamedTuple):
    """A measured rate; `limit` in the same unit if it is known."""

    value: float
    unit: str
    limit: float | None = None


@dataclass(frozen=True)
class EncoderRates:
    """Seconds to load an encoder, and to decode an item on one core without and with augmentation;
    seconds of a batch, and bytes at the peak on top of the program, as lines over its items."""

    width: int
    parameters: int
    load_seconds: float
    read_seconds: float
    augment_seconds: float
    forward_seconds: np.poly1d
    forward_bytes: np.poly1d
    step_seconds: np.poly1d
    step_bytes: np.poly1d


def peaks(name: str) -> tuple[float | None, float | None]:
    """Dense TFLOP/s in 16 bits and GB/s of the device `name`; None if it is not known."""
    return next((found for key, found in PEAKS.items() if key in name), (None, None))


def product(device: torch.device, dtype: torch.dtype, size: int) -> Rate:
    """TFLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    limit = peaks(_name(device))[0] if dtype != torch.float32 else None
    return Rate(2 * size**3 / seconds(lambda: a @ b, device) / 1e12, "TFLOP/s", limit)


def copy(device: torch.device, numbers: int, from_host: bool) -> Rate:
    """GB/s of a copy to the device: from the host, out of pinned memory if the device is a GPU, or
    inside its own memory, where every byte is read and written."""
    source = torch.randn(numbers, device="cpu" if from_host else device)
    source = source.pin_memory() if from_host and device.type == "cuda" else source
    out = torch.empty(numbers, device=device)
    took = seconds(lambda: out.copy_(source, non_blocking=from_host), device)
    each, limit = (4, None) if from_host else (8, peaks(_name(device))[1])
    return Rate(each * numbers / took / 1e9, "GB/s", limit)


def encoder(device: torch.device, model: str, batch: int, training: bool) -> Rate:
    """Photos of 224 pixels a second through an image encoder, or through a training step of it."""
    network = ImageEncoder(ImageEncoderOptions(model=model, pretrained=False)).to(device)
    network.precision = "auto"
    pixels = torch.randn(batch, 3, 224, 224, device=device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0) if training else None
    peak = peaks(_name(device))[0] if model == "vit_base_patch16_224" else None
    limit = None if peak is None else peak * 1e12 / ((3 if training else 1) * VIT_B_FLOPS)
    took = seconds(encoder_step(network, (pixels,), optimizer), device)
    return Rate(batch / took, "photos/s", limit)


def encoder_step(
    network: nn.Module, inputs: tuple[torch.Tensor, ...], optimizer: Optimizer | None
) -> Callable[[], None]:
    """A forward pass over a batch or, with an optimizer, a training step, to be timed."""
    network.train(optimizer is not None)

    def step() -> None:
        with torch.inference_mode(optimizer is None):
            out = network(*inputs)
        if optimizer is not None:
            out.sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure_encoder(
    modality: Modality, options: TrainingOptions, shards: Path, rows: int, device: torch.device
) -> EncoderRates:
    """Run the encoder on items of a packed sample, in batches of 2 and of at most `rows` items.

    Raises BadInput if no item has the modality, and what the training would raise.
    """
    shard_set = ShardSet(shards)
    numbers = np.flatnonzero(shard_set.packed[f"has_{modality}"])
    if not len(numbers):
        raise BadInput(f"no posting of a sample has {modality}: leave {modality} out of encoders")
    reset_peak(device)
    before, began = device_peak_bytes(device), time.process_time()
    network = new_encoder(options.encoder, options.seed).to(device)
    loading = time.process_time() - began
    network.precision = options.precision
    if modality == "image":
        network.to(memory_format=torch.channels_last)
    if options.gradient_checkpointing:
        network.recompute_activations()
    optimizer = encoder_optimizer(network, options)

    def decode(prepare: Inputs, size: int) -> tuple[tuple[torch.Tensor, ...], float]:
        began, seeds = time.process_time(), np.zeros(size, np.int64)
        batches = load(shard_set.reader(), prepare, [BatchPlan(np.resize(numbers, size), seeds)], 0)
        return next(batches).inputs_on(device), (time.process_time() - began) / size

    def cost(size: int, optimizer: Optimizer | None) -> tuple[float, int]:
        reset_peak(device)
        work = encoder_step(network, tuple(x[:size] for x in inputs), optimizer)
        took = seconds(work, device, least=0.1, tries=2)
        return took, device_peak_bytes(device) - before

    small, most = 2, max(3, min(rows, LARGEST))
    plain, augmented = network.inputs(), network.inputs(options)
    decode(augmented, small)  # the first loads libraries
    _, read_seconds = decode(plain, most)
    inputs, augment_seconds = decode(augmented, most)
    low = cost(small, None)
    large = max(3, min(most, int(FORWARD_SECONDS * small / low[0])))
    # Both forward passes come before the first step, which leaves the optimizer's moments behind.
    high = cost(large, None)
    low, high = low + cost(small, optimizer), high + cost(large, optimizer)
    lines = np.polyfit((small, large), (low, high), 1).clip(0).T
    parameters = sum(weight.numel() for weight in network.parameters())
    fixed = (network.width, parameters, loading, read_seconds, augment_seconds)
    return EncoderRates(*fixed, *map(np.poly1d, lines))


def join(device: torch.device, rows: int, width: int) -> Rate:
    """TFLOP/s of the join's product by its fastest kernel, compared with a score floor."""
    values = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    took = float("inf")
    for kernel in kernels_for(device, supports_bf16(device)):
        product = partial(
            kernel.product, kernel.prepare(values, "query"), kernel.prepare(values, "database")
        )
        least = kernel.to_products(np.array(0.5)).item()
        took = min(took, seconds(lambda p=product, f=least: (p() >= f).any(1), device))
    return Rate(2 * rows**2 * width / took / 1e12, "TFLOP/s", peaks(_name(device))[0])


def all_reduce(device: torch.device, world: int, numbers: int) -> Rate:
    """Bus bandwidth of an all-reduce among `world` ranks of this machine."""
    bandwidth = bus_bandwidth(BACKEND[device.type], world, numbers, seconds=120)
    return Rate(bandwidth, "GB/s")


def seconds(
    step: Callable[[], object], device: torch.device, least: float = 0.3, tries: int = 4
) -> float:
    """Seconds of one step, the best of at least `tries` and of `least` seconds.

    On a CPU the processor seconds of a thread, so that other work on the machine does not count.
    """

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()

    best, spent, count = float("inf"), 0.0, 0
    while spent < least or count < tries:
        start = now()
        step()
        took = now() - start
        best, spent, count = min(best, took), spent + took, count + 1
    return best


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
