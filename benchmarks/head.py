"""The head beside its peers: python -m benchmarks.head [PART ...], see main for the parts.

One single-thread process a measurement of memory, contenders in turn within one process for time,
wall and CPU seconds beside each other: CPU seconds stay true on a busy machine. Problem: B = 512,
C = 200 000, D = 256, scale 64, margin 0.5, float32, forward + backward.
"""

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.server import Worker
from dist_train.heads.centres import RowAdamW
from dist_train.heads.class_parallel import MarginHead, arcface
from dist_train.heads.estimate import HeadEstimate

B, C, D, SCALE, MARGIN = 512, 200_000, 256, 64.0, 0.5
MATRIX = B * C * 4
CHUNK = 8192
GIB = 1 << 30
Step = Callable[[], None]


def batch(rows: int = B, classes: int = C) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (rows, D) that want a gradient, and labels."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(rows, D, generator=generator).requires_grad_()
    return embeddings, torch.randint(0, classes, (rows,), generator=generator)


def ours(classes: int = C) -> Step:
    """Forward and backward of MarginHead, all classes in this process."""
    head = MarginHead(classes=classes, width=D, loss="arcface", scale=SCALE, chunk=CHUNK, seed=0)
    embeddings, labels = batch(classes=classes)

    def step() -> None:
        head.weight.grad = embeddings.grad = None
        head(embeddings, labels, MARGIN).backward()

    return step


def plain(classes: int = C) -> Step:
    """The same loss as one B x C matrix and autograd."""
    weight = (torch.randn(classes, D) * 0.05).requires_grad_()
    embeddings, labels = batch(classes=classes)
    rows = torch.arange(B)

    def step() -> None:
        weight.grad = embeddings.grad = None
        cosine = F.linear(F.normalize(embeddings), F.normalize(weight))
        moved = cosine.index_put((rows, labels), arcface(cosine[rows, labels], MARGIN))
        F.cross_entropy(SCALE * moved, labels).backward()

    return step


def peer(classes: int = C) -> Step:
    """ArcFaceLoss of pytorch-metric-learning."""
    from pytorch_metric_learning.losses import ArcFaceLoss

    loss = ArcFaceLoss(classes, D, margin=MARGIN * 57.29578, scale=SCALE)
    embeddings, labels = batch(classes=classes)

    def step() -> None:
        loss.W.grad = embeddings.grad = None
        loss(embeddings, labels).backward()

    return step


CONTENDERS: dict[str, Callable[..., Step]] = {"ours": ours, "plain": plain, "peer": peer}


def seconds(rounds: int = 5) -> dict[str, tuple[float, float]]:
    """Least wall and CPU seconds of each contender, one after the other in every round."""
    steps = {name: make() for name, make in CONTENDERS.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: (min(w for w, _ in t), min(c for _, c in t)) for name, t in found.items()}


def peak_beyond(name: str) -> float:
    """Peak memory of a step beyond weights and their gradient, in B x C float32 matrices."""
    return in_process(_peak, name) / MATRIX


def _peak(name: str) -> float:
    step = CONTENDERS[name]()
    small = torch.randn(64, 64, requires_grad=True)
    (small @ small).sum().backward()  # libraries are loaded before the count begins
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before - C * D * 4


def estimate_error() -> tuple[float, float]:
    """Bytes a head and its steps take in a separate process, and the estimate."""
    estimate = HeadEstimate(classes=C, width=D, batch=B, world=1, chunk=CHUNK)
    return in_process(_growth), estimate.total


def _growth() -> int:
    step = _training_step(1000)  # libraries are loaded before the count begins
    step()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step = _training_step(C)
    for _ in range(2):
        step()
    return _status("VmHWM") - before


def _training_step(classes: int) -> Step:
    head = MarginHead(classes=classes, width=D, loss="arcface", scale=SCALE, chunk=CHUNK, seed=0)
    optimizer = RowAdamW(head.weight, lr=1e-3)
    embeddings, labels = batch(classes=classes)

    def step() -> None:
        optimizer.zero_grad()
        head(embeddings, labels, MARGIN).backward()
        optimizer.step()

    return step


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def fits(name: str, classes: int, limit: int) -> str:
    """What became of a step over `classes` in a process that may hold `limit` bytes of data."""
    return in_process(_limited, name, classes, limit)


def _limited(name: str, classes: int, limit: int) -> str:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        CONTENDERS[name](classes)()
    except (MemoryError, RuntimeError) as error:
        return f"fails: {str(error).splitlines()[0][:90]}"
    return f"runs, peak {_status('VmHWM') / GIB:.2f} GiB"


def two_ranks(rounds: int = 7) -> tuple[float, float]:
    """How many times as fast two processes are as one: independent GEMMs, and our head.

    The one and the two take turns, so that both meet the same machine; the least time counts.
    """
    with TemporaryDirectory() as folder, ExitStack() as stack:
        alone = [stack.enter_context(Worker(_serve, 0, 1, folder))]
        both = [stack.enter_context(Worker(_serve, rank, 2, folder)) for rank in range(2)]
        found: dict[tuple[str, int], list[float]] = {}
        for _ in range(rounds):
            for what in ("gemm", "head"):
                for workers in (alone, both):
                    took = _take_time(workers, what)
                    found.setdefault((what, len(workers)), []).append(took)
    least = {key: min(times) for key, times in found.items()}
    gemm = 2 * least["gemm", 1] / least["gemm", 2]  # two do twice the work of one
    return gemm, least["head", 1] / least["head", 2]


def _take_time(workers: list[Worker], what: str) -> float:
    for worker in workers:
        worker.ask(what)
    return max(worker.answer() for worker in workers)


def _serve(rank: int, world: int, folder: str) -> Callable[[str], float]:
    torch.set_num_threads(1)
    if world > 1:
        rendezvous = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    steps = {"gemm": _gemms(), "head": _share_of_head(rank, world)}

    def answer(what: str) -> float:
        start = time.perf_counter()
        steps[what]()
        return time.perf_counter() - start

    return answer


def _gemms() -> Step:
    rows, columns = torch.randn(CHUNK, D), torch.randn(D, B)
    out = torch.empty(CHUNK, B)

    def step() -> None:
        for _ in range(2 * C // CHUNK):
            torch.mm(rows, columns, out=out)

    return step


def _share_of_head(rank: int, world: int) -> Step:
    head = MarginHead(
        classes=C, width=D, loss="arcface", scale=SCALE, chunk=CHUNK, seed=0, rank=rank,
        world=world,
    )  # fmt: skip
    embeddings, labels = batch()
    share = slice(rank * B // world, (rank + 1) * B // world)
    mine, own = embeddings.detach()[share].requires_grad_(), labels[share]

    def step() -> None:
        head.weight.grad = mine.grad = None
        head(mine, own, MARGIN).backward()

    return step


def non_finite(count: int = 10_000) -> dict[str, int]:
    """Rows of bad gradients, for embeddings along, against and at their own centre, and zero."""
    from pytorch_metric_learning.losses import ArcFaceLoss

    torch.manual_seed(0)
    head = MarginHead(classes=1000, width=64, loss="arcface", scale=SCALE, chunk=CHUNK, seed=0)
    loss = ArcFaceLoss(1000, 64, margin=MARGIN * 57.29578, scale=SCALE)
    loss.W.data = head.weight.data.T.clone()
    labels = torch.randint(0, 1000, (count,))
    own = head.weight.detach()[labels]
    kinds = torch.stack([3 * own, -3 * own, torch.zeros_like(own), own])
    rows = kinds[torch.arange(count) % 4, torch.arange(count)]
    mine, theirs = (rows.clone().requires_grad_() for _ in range(2))
    head(mine, labels, MARGIN).backward()
    loss(theirs, labels).backward()
    gradients = {"ours": mine.grad, "peer": theirs.grad}
    return {name: int((~torch.isfinite(g)).any(1).sum()) for name, g in gradients.items()}


def in_process(function: Callable, *arguments: object):
    """`function` in a separate process with one thread."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
        return pool.apply(function, arguments)


def main(parts: list[str]) -> None:
    """Print the requested measurements, or all."""
    parts = parts or ["time", "memory", "million", "ranks", "gradients", "estimate"]
    torch.set_num_threads(1)
    if "time" in parts:
        times = seconds()
        for name, (wall, cpu) in times.items():
            ratios = times["ours"][0] / wall, times["ours"][1] / cpu
            print(f"time {name:6} wall {wall:.2f} s, CPU {cpu:.2f} s; ours / it: "
                  f"wall {ratios[0]:.2f}, CPU {ratios[1]:.2f}", flush=True)  # fmt: skip
    if "memory" in parts:
        for name in CONTENDERS:
            print(f"memory {name:6} {peak_beyond(name):.2f} B x C matrices", flush=True)
    if "million" in parts:
        for name in ("ours", "plain"):
            became = fits(name, 1_000_000, 4_000_000_000)
            print(f"1M classes in 4 GB, {name:6} {became}", flush=True)
    if "ranks" in parts:
        gemm, head = two_ranks()
        print(f"two processes: GEMM x {gemm:.2f}, head x {head:.2f}, ratio {head / gemm:.2f}")
    if "estimate" in parts:
        took, estimate = estimate_error()
        print(f"a training step takes {took / 1e6:.0f} MB, estimated {estimate / 1e6:.0f} MB, "
              f"ratio {took / estimate:.3f}", flush=True)  # fmt: skip
    if "gradients" in parts:
        for name, count in non_finite().items():
            print(f"adversarial embeddings, {name}: {count} of 10000 gradients are not finite")


if __name__ == "__main__":
    main(sys.argv[1:])
