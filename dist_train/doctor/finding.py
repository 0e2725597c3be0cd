"""What a check found, and what to do about it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One result: a fault keeps work from running, a note may explain a symptom."""

    name: str
    message: str
    level: Literal["fine", "note", "fault"] = "fine"
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.level:5}  {self.name:16} {self.message}"
        return f"{line}\n{'':24}-> {self.remedy}" if self.remedy else line


def fault(name: str, message: str, remedy: str) -> Finding:
    """A finding that must be fixed."""
    return Finding(name, message, "fault", remedy)


def note(name: str, message: str, remedy: str = "") -> Finding:
    """A finding to know about."""
    return Finding(name, message, "note", remedy)
