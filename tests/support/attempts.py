"""A training in several attempts: starts of the same command that end or are ended early."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.launching import CPU, command, environment


@dataclass(frozen=True)
class Attempt:
    """One start: where its ranks log what they are served, and how many ranks there are."""

    log: Path
    world: int = 1
    launcher: str = CPU
    fate: str = "none"
    """What happens to one rank: see tests.support.dying_rank."""

    def start(self, *verb: object) -> subprocess.Popen:
        """The verb, running."""
        arguments = command(self.world, *verb, launcher=self.launcher)
        at = arguments.index("dist_train")
        arguments[at : at + 1] = ["tests.support.dying_rank", str(self.log), self.fate]
        env = environment()
        if self.launcher != CPU:
            env |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
        return subprocess.Popen(
            arguments, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def finish(self, *verb: object) -> "Attempt":
        """Run the verb to its end, which must be a success."""
        process = self.start(*verb)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        return self

    def rows(self, rank: int) -> list:
        """The first step of a rank, then the posting ids of every batch that it was served."""
        path = self.log.with_name(f"{self.log.name}-{rank}.jsonl")
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def begun(self) -> bool:
        """Every rank came as far as its first step."""
        return all(self.rows(rank) for rank in range(self.world))

    @property
    def first_step(self) -> int:
        """The same on all ranks."""
        (step,) = {self.rows(rank)[0] for rank in range(self.world)}
        return step

    def served(self, step: int, passes: int) -> list[str]:
        """Posting ids of a global step of this attempt: of each forward pass, rank by rank."""
        of_ranks = [self.rows(rank)[1:] for rank in range(self.world)]
        first = (step - self.first_step) * passes
        return [
            posting_id
            for number in range(first, first + passes)
            for rows in of_ranks
            for posting_id in rows[number]
        ]


def served(attempts: list[Attempt], steps: int, passes: int) -> list[list[str]]:
    """Posting ids of every step that counts: those before the first step of the next attempt."""
    attempts = [attempt for attempt in attempts if attempt.begun()]
    ends = [attempt.first_step for attempt in attempts[1:]] + [steps]
    return [
        attempt.served(step, passes)
        for attempt, end in zip(attempts, ends, strict=True)
        for step in range(attempt.first_step, end)
    ]
