"""Every link of the documentation to a file, a heading or a folder of this repository leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"`((?:docs|tests|benchmarks|moe_ops|lowering|graphs|examples)/[\w./-]+)`")


def anchors(page: str) -> set[str]:
    """What headings can be linked to, as GitHub names them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", FENCED.sub("", page), re.MULTILINE):
        text = LINK.sub("]", heading).lower()
        slug, number = re.sub(r"[^\w\- ]", "", text).replace(" ", "-"), 0
        while slug + (f"-{number}" if number else "") in found:
            number += 1
        found.add(slug + (f"-{number}" if number else ""))
    return found


def broken(page: Path, text: str) -> Iterator[str]:
    """Links of ``text``, which stands in ``page``, and files that it names, that lead nowhere."""
    for target in LINK.findall(FENCED.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue  # another site
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(text if file == page else file.read_text()):
            yield f"{target}: no such heading"
    names = (name for name in NAMED.findall(text) if "foo" not in name)  # of an op that a guide invents
    yield from (f"`{name}`: no such file" for name in names if not (ROOT / name).exists())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    found = list(broken(page, page.read_text()))
    assert not found, "\n".join(found)


def test_a_broken_link_is_found():
    page = ROOT / "docs" / "index.md"
    text = """# Time-outs, `x` & _more_
## Again
## Again
[ok](#time-outs-x--_more_) [ok](#again-1) [ok](protocol.md#memory) [ok](../README.md) [ok](https://a.b/c.md#d)
[no](#again-2) [no](protocol.md#no-heading) [no](no-page.md) `tests/conftest.py` `tests/no_file.py`
"""
    assert list(broken(page, text)) == [
        "#again-2: no such heading", "protocol.md#no-heading: no such heading", "no-page.md: no such file",
        "`tests/no_file.py`: no such file",
    ]  # fmt: skip
