"""Checks: what a run proved about itself, kept for the report whether it passed or not."""

from dataclasses import dataclass
from typing import Literal

from toolkit.runtime import html

Status = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True)
class Check:
    """One statement that was tested: its name, what came out, and the figures after it."""

    name: str
    status: Status
    detail: str

    def _repr_html_(self) -> str:
        return html.card(f"{self.status}: {self.name}", html.paragraph(self.detail))


def check(name: str, holds: bool, detail: str) -> Check:
    """A check that applies: passed if it `holds`."""
    return Check(name, "passed" if holds else "failed", detail)
