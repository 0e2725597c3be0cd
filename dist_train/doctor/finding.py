"""What a check found, and what to do about it."""

import json
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: a fault keeps work from running, a note may explain a wonder."""

    name: str
    said: str
    level: Literal["fine", "note", "fault"] = "fine"
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.level:5}  {self.name:16} {self.said}"
        return f"{line}\n{'':24}-> {self.remedy}" if self.remedy else line


def fault(name: str, said: str, remedy: str) -> Finding:
    """Something that must be mended."""
    return Finding(name, said, "fault", remedy)


def note(name: str, said: str, remedy: str = "") -> Finding:
    """Something to know."""
    return Finding(name, said, "note", remedy)


def as_json(findings: list[Finding]) -> str:
    """All of them, and whether none is a fault."""
    fine = all(finding.level != "fault" for finding in findings)
    found = [asdict(finding) for finding in findings]
    return json.dumps({"fine": fine, "findings": found}, indent=1, ensure_ascii=False)
