"""Programs that write down how they are called, and a verb that runs in this process."""

import os
import sys
from pathlib import Path

from dist_train import cli

HEAD = """#!/usr/bin/env bash
here={folder}
{{ printf '%s\\x1f' "${{0##*/}}" "$@"; printf '\\x1e'; }} >>"$here/calls"
"""


class Programs:
    """Stand-ins for other programs in the folder `bin`: each call is written down, in order."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder
        folder.mkdir(exist_ok=True)

    def add(self, name: str, body: str = "") -> None:
        """A program that goes on with the lines of bash `body`; `$here` is its folder."""
        program = self.bin / name
        program.write_text(HEAD.format(folder=self.bin) + body)
        program.chmod(0o755)

    def calls(self, *names: str) -> list[list[str]]:
        """Name and arguments of every call so far, of all programs or of these."""
        path = self.bin / "calls"
        texts = path.read_text().split("\x1e") if path.exists() else []
        calls = [text.split("\x1f")[:-1] for text in texts if text]
        return [call for call in calls if not names or call[0] in names]

    def forget(self) -> None:
        """Drop the calls so far."""
        (self.bin / "calls").unlink(missing_ok=True)

    @property
    def path(self) -> str:
        """PATH with these before all others."""
        return f"{self.bin}:{os.environ['PATH']}"


def call_verb(monkeypatch, capfd, *arguments: object) -> tuple[int, str, str]:
    """`dist-train ARGUMENTS` in this process: its exit code, its output and its errors."""
    config = cli.app.config
    monkeypatch.setattr(sys, "argv", ["dist-train", *map(str, arguments)])
    capfd.readouterr()
    code = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        cli.app.config = config
    return code, *capfd.readouterr()
