"""The reference of the configuration is what the models say, and every link in it leads to a section."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Literal

import pytest
from pydantic import Field

from scripts.config_reference import TARGET, Reference, comments, introduction, mentions
from server.config.schema import config_schema
from server.config.section import Section


class Sample(Section):
    """What is kept. Nothing by default.

    ``rate``: how many of them. It is drawn anew each time. ``size`` and ``age`` bound it. More than ``limit`` is
    refused.
    """

    rate: int = 0
    size: int = 0
    #: Since the first one,
    #: by the clock.
    age: int = 0
    limit: int = 0
    # Not for the reader.
    kind_: Literal["a", "b"] = Field(default="a", alias="kind")


def headings(document: str) -> list[str]:
    """The addresses of the headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", document, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found]


def test_the_document_is_fresh() -> None:
    assert TARGET.read_text() == Reference().render(), "run python -m scripts.config_reference"


def test_the_script_finds_it_fresh() -> None:
    command = [sys.executable, "-m", "scripts.config_reference", "--check"]
    result = subprocess.run(command, cwd=TARGET.parent.parent, capture_output=True, text=True, timeout=30, check=False)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_every_link_leads_to_a_section_of_its_own() -> None:
    document = TARGET.read_text()
    anchors = headings(document)
    links = re.findall(r"\[section\]\(#([^)]*)\)", document)
    assert len(set(anchors)) == len(anchors)
    assert len(links) > 50
    assert set(links) <= set(anchors)


def test_every_key_has_a_row_with_four_cells() -> None:
    rows = [line for line in TARGET.read_text().splitlines() if line.startswith("| `")]
    schema = config_schema()
    keys = [key for section in (schema, *schema["$defs"].values()) for key in section["properties"]]
    assert sorted(re.findall(r"^\| `(\w+)` \|", "\n".join(rows), re.MULTILINE)) == sorted(keys)
    assert all(len(re.split(r"(?<!\\)\|", row)) == 6 for row in rows)
    assert not [row for row in rows if re.search(r"\|\s+\|", row)]


@pytest.mark.parametrize(
    "row",
    [
        "| `max_queue_delay` | duration, `0s` to `60s` | `0s` | ",
        "| `batch_sizes` | list: whole number, 1 to 65536 (at least 1) | `[1]` | ",
        "| `private_key` | path | required | ",
        "| `profile` | path or `registry` | *none* | ",
        "| `overload_status` | `429` or `503` | `503` | ",
        "| `versions` | mapping of version: [section](#modelsnameversionsversion) | *none* | ",
        "| `breaker` | [section](#modelsnameresiliencebreaker) | *none* | ",
        "| `limits` | [section](#serverlimits) | *its own* | ",
    ],
)
def test_forms_and_defaults_are_in_the_words_of_the_file(row: str) -> None:
    assert f"\n{row}" in TARGET.read_text()


def test_sections_that_stand_at_several_places_say_so() -> None:
    document = TARGET.read_text()
    assert document.count("### models.NAME.batching\n") == 1
    assert "The same keys stand at `defaults.batching`." in document
    assert "### defaults.batching" not in document


def test_what_a_docstring_says_of_keys_is_told_from_what_it_says_of_the_section() -> None:
    general, meanings = introduction(Sample)
    assert general == ["What is kept.", "Nothing by default.", "More than ``limit`` is refused."]
    assert meanings == {
        "rate": "How many of them. It is drawn anew each time.",
        "size": "``size`` and ``age`` bound it.",
        "age": "``size`` and ``age`` bound it.",
    }
    assert mentions(Sample, "limit") == "More than ``limit`` is refused."
    assert not mentions(Sample, "kind")


def test_comments_of_keys_are_found_by_their_names_in_the_file() -> None:
    assert comments(Sample) == {"age": "Since the first one, by the clock."}
