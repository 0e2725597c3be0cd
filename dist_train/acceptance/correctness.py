"""What a device must compute correctly: each path beside the same computation on the CPU.

Every function returns the largest difference, the largest that is allowed, and of what.
"""

import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import BertConfig, BertModel, BertTokenizerFast

from dist_train.config.training import ImageEncoderOptions, TextEncoderOptions
from dist_train.distributed.stage import EMBEDDING
from dist_train.doctor.all_reduce import BACKEND, run_ranks
from dist_train.embedding.store import part_path
from dist_train.encoders.encoder import ImageEncoder, TextEncoder
from dist_train.heads.class_parallel import MarginHead
from dist_train.matching.faiss_library import faiss, gpus, on_gpu
from dist_train.matching.pairs import PairSet
from shards.storage import stage_files
from shards.storage.files import write_parquet

MINUTE = 60.0
CLASSES, BATCH, WIDTH = 2_000, 48, 64
JOINED, COLUMNS = 3_000, 64


class Proof(NamedTuple):
    """The largest difference from a reference, and the largest that is allowed."""

    difference: float
    allowed: float
    what: str


def image_encoder(device: torch.device, precision: str) -> Proof:
    """Unit vectors of a ViT with random weights, beside the CPU's in float32."""
    model = "vit_base_patch16_224" if device.type == "cuda" else "vit_tiny_patch16_224"
    options = ImageEncoderOptions(model=model, pretrained=False)
    torch.manual_seed(0)
    return _same_vectors(ImageEncoder(options), (torch.randn(4, 3, 224, 224),), device, precision)


def text_encoder(device: torch.device, precision: str) -> Proof:
    """Unit vectors of a BERT with random weights over single letters; some titles are padded."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    layers, width = (12, 768) if device.type == "cuda" else (2, 64)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
    )
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(words))
        BertTokenizerFast(f"{folder}/vocab.txt").save_pretrained(folder)
        BertModel(config).save_pretrained(folder)
        encoder = TextEncoder(TextEncoderOptions(model=folder))
    tokens = torch.randint(5, 60, (4, 24), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(24) < torch.tensor([[24], [11], [3], [17]])).long()
    return _same_vectors(encoder, (tokens, mask), device, precision)


def _same_vectors(
    encoder: ImageEncoder | TextEncoder,
    inputs: tuple[torch.Tensor, ...],
    device: torch.device,
    precision: str,
) -> Proof:
    encoder.eval()
    with torch.inference_mode():
        encoder.precision = "fp32"
        truth = F.normalize(encoder(*inputs).double(), dim=1)
        encoder.to(device).precision = precision
        found = F.normalize(encoder(*(x.to(device) for x in inputs)).double().cpu(), dim=1)
    # bf16 keeps 8 bits; a dozen layers of such roundings turn a vector by some hundredths of 1 rad.
    allowed = 1e-4 if precision == "fp32" else 1e-2
    return Proof(float((1 - (truth * found).sum(1)).max()), allowed, "1 - cosine")


def head(device: torch.device, world: int) -> Proof:
    """Loss and gradients of the softmax sharded over `world` ranks, beside float64 on one CPU."""
    truth = head_values(0, 1, torch.device("cpu"), "float64")
    work = partial(head_values, dtype="float32")
    found = run_ranks(work, BACKEND[device.type], world, 3 * MINUTE)
    items, centres = (np.concatenate([values[n] for values in found]) for n in (1, 2))
    # DDP takes the mean over ranks, so each rank's gradient of its items is W times as large.
    joined = (found[0][0], items / world, centres)
    worst = max(
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(joined, truth, strict=True)
    )
    return Proof(worst, 1e-4, "loss and gradients, relative to the largest")


def head_values(
    rank: int, world: int, device: torch.device, dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, gradient of this rank's items and gradient of its centres, of a fixed batch."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(BATCH, WIDTH, generator=generator)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    mine = items[share].to(device, getattr(torch, dtype)).requires_grad_()
    shape = {"classes": CLASSES, "width": WIDTH, "chunk": 512, "rank": rank, "world": world}
    sharded = MarginHead(loss="arcface", scale=32.0, seed=0, **shape)
    sharded.to(device, getattr(torch, dtype))
    loss = sharded(mine, labels[share].to(device), 0.5)
    loss.backward()
    assert mine.grad is not None
    assert sharded.weight.grad is not None
    values = (loss.detach().reshape(1), mine.grad, sharded.weight.grad)
    return tuple(x.double().cpu().numpy() for x in values)  # pyrefly: ignore[bad-return]


def collective(name: str, device: torch.device, world: int) -> Proof:
    """all_gather or reduce_scatter on `world` ranks, of numbers whose sum is exact."""
    work = partial(collective_error, name=name)
    worst = max(run_ranks(work, BACKEND[device.type], world, 3 * MINUTE))
    return Proof(worst, 0.0, f"{name} of {world} ranks")


def collective_error(rank: int, world: int, device: torch.device, name: str) -> float:
    """Largest difference from the correct result of collective `name`."""
    each = 1 << 16
    values = torch.arange(world * each, dtype=torch.float32, device=device) % 1024
    part = values[rank * each : (rank + 1) * each].clone()
    if name == "all_gather":
        out = torch.empty_like(values)
        dist.all_gather_into_tensor(out, part)
        return float((out - values).abs().max())
    out = torch.empty_like(part)
    dist.reduce_scatter_tensor(out, values * (rank + 1))
    return float((out - part * (world * (world + 1) // 2)).abs().max())


def best_ten(device: torch.device, factory: str) -> Proof:
    """Scores of the 10 best by a FAISS index, or by brute force if `factory` is "", beside NumPy's.

    On a GPU brute force takes torch tensors, without a copy through the host.
    """
    if device.type == "cuda" and not gpus():
        raise RuntimeError("FAISS is built for the CPU: dist-train doctor shows how to change it")
    rows, queries = _unit_rows(20_000, 64), _unit_rows(64, 64, seed=1)
    metric = faiss.METRIC_INNER_PRODUCT
    if factory:
        index = faiss.index_factory(64, factory, metric)
        index.train(rows)
        if device.type == "cuda":
            index = on_gpu(index)
        index.add(rows)
        if "IVF" in factory:
            index.nprobe = 64  # with all lists IVF is exact too
        found = index.search(queries, 10)
    elif device.type == "cuda":
        import_module("faiss.contrib.torch_utils")  # makes knn_gpu take tensors
        resources = faiss.StandardGpuResources()
        places = (torch.from_numpy(x).to(device) for x in (queries, rows))
        tensors = faiss.knn_gpu(resources, *places, 10, metric=metric)
        found = (x.cpu().numpy() for x in tensors)
    else:
        found = faiss.knn(queries, rows, 10, metric)
    return compare_best_ten(rows, queries, *found)


def compare_best_ten(
    rows: np.ndarray, queries: np.ndarray, scores: np.ndarray, ids: np.ndarray
) -> Proof:
    """Scores of the 10 neighbours `ids` of each query, beside those of a float64 product."""
    products = queries.astype(np.float64) @ rows.astype(np.float64).T
    best = -np.sort(-products, axis=1)[:, :10]
    exact = np.take_along_axis(products, ids.astype(np.int64), 1)
    worst = max(np.abs(scores - exact).max(), np.abs(exact - best).max())
    return Proof(float(worst), 1e-3, "scores")


def join(device: torch.device, engine: str) -> Proof:
    """Pairs of index and join on the device that differ from those of gemm on the CPU."""
    with TemporaryDirectory() as name:
        embedding, index = Path(name) / "embedding", Path(name) / "index"
        # As embed writes them: vectors of both modalities, in threes that are near each other.
        stage_files.begin(embedding, EMBEDDING, {"by": "acceptance"}, {})
        files = [embedding / "items.parquet"]
        for modality, seed in (("image", 2), ("text", 3)):
            centres = _unit_rows(JOINED // 3, COLUMNS, seed=seed)
            rows = np.repeat(centres, 3, axis=0) + 0.3 * _unit_rows(JOINED, COLUMNS, seed=seed + 9)
            files.append(part_path(embedding, modality, 0))
            rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
            np.save(files[-1], rows)
        ids = [f"p{n}" for n in range(JOINED)]
        columns = {"row": np.arange(JOINED), "posting_id": ids, "title": ids, "label_group": ""}
        columns |= {"split": "unlabelled", "status": "embedded", "has_image": True}
        columns |= {"has_text": True, "sha256": "", "phash": "", "photo_group": -1}
        write_parquet(files[0], pd.DataFrame(columns))
        stage_files.finish(embedding, {"postings": JOINED, "items": JOINED}, files)

        _verb("index", embedding, "--out", index, "--kind", "Flat")
        found = []
        for number, (where, by) in enumerate(((device.type, engine), ("cpu", "gemm"))):
            out = Path(name) / f"pairs-{number}"
            arguments = (embedding, "--index", index, "--out", out, "--max-score-floor", 0.8)
            _verb("join", *arguments, "--device", where, "--engine", by)
            found.append(PairSet(out).select().set_index(["i", "j"]))
    ours, theirs = found
    if not len(theirs):
        raise RuntimeError("the CPU found no pair: there is nothing to compare")
    apart = len(ours.index.symmetric_difference(theirs.index))
    both = ours.join(theirs, rsuffix="_cpu", how="inner")
    differing = apart + float((both.score != both.score_cpu).sum())
    return Proof(differing, 0.0, f"of {len(theirs)} pairs")


def _verb(*arguments: object) -> None:
    # In another process: one that has begun on the CPU cannot change to a GPU.
    line = [sys.executable, "-m", "dist_train", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=4 * MINUTE)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")


def _unit_rows(rows: int, width: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)
