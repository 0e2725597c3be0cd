"""What a second rank brings, and what the ranks say: python -m benchmarks.scaling [PART ...].

ranks        one and two single-thread processes make the same training step on the same batch, in
             turn; beside them independent matrix products, which tell what the machine itself
             gives for a second process. Wall and CPU seconds: the latter stay true when it is busy.
collectives  every collective of a step as torch's profiler sees it: calls and bytes, beside the
             formula that docs/design/scale.md carries to 64 ranks.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile

from benchmarks.server import Worker
from dist_train.config.training import ImageEncoderOptions
from dist_train.encoders.encoder import ImageEncoder
from dist_train.heads.centres import RowAdamW
from dist_train.heads.class_parallel import MarginHead
from dist_train.heads.estimate import HeadEstimate
from dist_train.training.optimisation import clip_head

MODEL, PIXELS = "vit_tiny_patch16_224", 224
BATCH, CLASSES = 12, 20_000
ROUNDS = 5


class TrainingStep:
    """Encoder under DDP, sharded head, both optimizers and clips: what one rank does in a step."""

    def __init__(self, rank: int, world: int, batch: int = BATCH) -> None:
        torch.manual_seed(0)
        options = ImageEncoderOptions(model=MODEL, pretrained=False, image_size=PIXELS)
        self.encoder = ImageEncoder(options)
        self.network: Any = self.encoder
        if world > 1:
            self.network = DistributedDataParallel(self.encoder, broadcast_buffers=False)
        self.head = MarginHead(
            classes=CLASSES, width=self.encoder.width, loss="arcface", scale=32.0, chunk=8192,
            seed=0, rank=rank, world=world,
        )  # fmt: skip
        self.optimizers = [
            torch.optim.AdamW(self.encoder.parameters()),
            RowAdamW(self.head.weight, lr=1e-3),
        ]
        generator = torch.Generator().manual_seed(1)
        share = slice(rank * batch // world, (rank + 1) * batch // world)
        self.photos = torch.randn(batch, 3, PIXELS, PIXELS, generator=generator)[share]
        self.labels = torch.randint(0, CLASSES, (batch,), generator=generator)[share]

    def __call__(self) -> float:
        """The loss."""
        loss = self.head(self.network(self.photos), self.labels, 0.5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        clip_head(self.head, 5.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def parameters(self) -> int:
        """Numbers that DDP sums over ranks."""
        return sum(p.numel() for p in self.encoder.parameters() if p.requires_grad)


def predicted(step: TrainingStep, world: int, batch: int = BATCH) -> dict[str, int]:
    """Bytes of the collectives' whole tensors in one step, by formula."""
    head = HeadEstimate(classes=CLASSES, width=step.encoder.width, batch=batch, world=world)
    # Of each column the sum, the count and the squares about the mean; and their gradients.
    neck = 2 * 3 * step.encoder.width * 4
    return {"encoder": 4 * step.parameters(), "head": head.traffic[1], "neck": neck}


def products() -> Callable[[], None]:
    """Work that two processes share nothing of."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)

    def step() -> None:
        for _ in range(60):
            torch.mm(a, b)

    return step


def serve(rank: int, world: int, folder: str) -> Callable[[str], Any]:
    """Answers of one rank, for Worker."""
    torch.set_num_threads(1)
    if world > 1:
        rendezvous = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    steps: dict[str, Callable[[], Any]] = {
        "products": products(),
        "step": TrainingStep(rank, world),
    }

    def answer(what: str) -> Any:
        if what == "collectives":
            return seen_collectives(steps["step"])
        start, cpu = time.perf_counter(), time.process_time()
        steps[what]()
        return time.perf_counter() - start, time.process_time() - cpu

    return answer


def seen_collectives(step: Callable[[], Any]) -> list[tuple[str, int]]:
    """(name, numbers of the tensor it was given) of each collective of one step, by the profiler.

    Over gloo a reduce-scatter is seen, and done, as an all-reduce.
    """
    with profile(record_shapes=True) as seen:
        step()
    return [
        (
            event.name.removeprefix("gloo:"),
            sum(math.prod(shape) for shape in event.input_shapes if shape),
        )
        for event in seen.events()
        if event.name.startswith("gloo:")
    ]


def two_ranks() -> dict[str, dict[int, tuple[float, float]]]:
    """Least wall and CPU seconds of the slowest rank: of each kind of work, for one and two."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {"products": {}, "step": {}}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        alone = [stack.enter_context(Worker(serve, 0, 1, folder))]
        both = [stack.enter_context(Worker(serve, rank, 2, folder)) for rank in range(2)]
        for _ in range(ROUNDS):
            for what in found:
                for workers in (alone, both):
                    for worker in workers:
                        worker.ask(what)
                    took = [worker.answer() for worker in workers]
                    slowest = max(w for w, _ in took), max(c for _, c in took)
                    found[what].setdefault(len(workers), []).append(slowest)
    return {what: {n: (min(w for w, _ in times), min(c for _, c in times))
                   for n, times in by.items()} for what, by in found.items()}  # fmt: skip


def collectives(world: int) -> list[tuple[str, int]]:
    """What rank 0 of `world` calls in a step."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        workers = [stack.enter_context(Worker(serve, rank, world, folder)) for rank in range(world)]
        for what in ("step", "step", "collectives"):  # DDP settles its buckets in the first two
            for worker in workers:
                worker.ask(what)
            answer, *_ = [worker.answer() for worker in workers]
    return answer


def main(parts: list[str]) -> None:
    """Print the requested measurements, or all."""
    parts = parts or ["ranks", "collectives"]
    if "ranks" in parts:
        found = two_ranks()
        for what, times in found.items():
            (wall, cpu), (wall2, cpu2) = times[1], times[2]
            # Two processes make twice the products of one, and the same one step.
            more = 2 if what == "products" else 1
            print(f"{what}: one {wall:.3f} s wall, {cpu:.3f} s CPU; two {wall2:.3f} s, "
                  f"{cpu2:.3f} s each; x {more * wall / wall2:.2f} by wall, "
                  f"x {more * cpu / cpu2:.2f} by CPU", flush=True)  # fmt: skip
        of = found["products"], found["step"]
        gain = [b[1][1] / b[2][1] / (2 * a[1][1] / a[2][1]) for a, b in [of]]
        print(f"the step's share of what a second process brings, by CPU: {gain[0]:.2f}")
    if "collectives" in parts:
        for world in (2, 4):
            seen, formula = collectives(world), predicted(TrainingStep(0, 1), world)
            for name, numbers in seen:
                print(f"{world} ranks: {name} of {numbers} numbers")
            print(f"{world} ranks: {len(seen)} calls; by formula {formula} bytes", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
