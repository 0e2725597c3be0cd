"""The list of what a machine with GPUs must compute correctly, and of what is timed on it."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from dist_train.acceptance import correctness, speed
from dist_train.acceptance.outcomes import Proof, Rate
from dist_train.matching.faiss_library import gpus

Check = tuple[str, Callable[[], Proof | Rate]]


def checks(device: torch.device, world: int) -> Iterator[Check]:
    """Names and functions, correctness before speed; on 1, 2, 4, ... and all `world` ranks."""
    on_cpu = device.type == "cpu"
    for precision in ("fp32", "bf16"):
        yield f"image encoder {precision}", partial(correctness.image_encoder, device, precision)
        yield f"text encoder {precision}", partial(correctness.text_encoder, device, precision)
    for ranks in rank_counts(world):
        yield f"head, {ranks} ranks", partial(correctness.head, device, ranks)
        for name in ("all_gather", "reduce_scatter"):
            yield f"{name}, {ranks} ranks", partial(correctness.collective, name, device, ranks)
    if on_cpu or gpus():
        for kind in ("flat", "IVF"):
            yield f"FAISS {kind}", partial(correctness.faiss_index, device, kind)
        yield "FAISS knn of tensors", partial(correctness.faiss_knn, device)
    else:
        yield "FAISS", _no_faiss_gpu
    for engine in ("gemm", "faiss"):
        yield f"join by {engine}", partial(correctness.join, device, engine)

    size, numbers = (512, 1 << 22) if on_cpu else (8192, 1 << 28)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        yield f"product {name}", partial(speed.product, device, dtype, size)
    yield "memory", partial(speed.memory, device, numbers)
    yield "from host", partial(speed.from_host, device, numbers)
    model, batch = ("vit_tiny_patch16_224", 2) if on_cpu else ("vit_base_patch16_224", 64)
    for name, training in (("embed", False), ("train", True)):
        yield f"{name} {model}", partial(speed.encoder, device, model, batch, training)
    yield "join", partial(speed.join, device, size, 128 if on_cpu else 768)
    yield f"all_reduce, {world} ranks", partial(speed.all_reduce, device, world, numbers // 4)


def rank_counts(world: int) -> list[int]:
    """1, 2, 4, ... below `world`, and `world`."""
    return [*(2**n for n in range(world.bit_length()) if 2**n < world), world]


def _no_faiss_gpu() -> Proof:
    raise RuntimeError("FAISS is built for the CPU: dist-train doctor shows how to change it")
