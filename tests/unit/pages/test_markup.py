"""Markup that cannot be broken by what is put into it."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from server.pages.markup import Html, el, join, name, text


class First(HTMLParser):
    """The first tag's attributes, all data, and how many tags there were."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.attributes: dict[str, str | None] = {}
        self.data = ""
        self.tags = 0
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags += 1
        self.attributes = self.attributes or dict(attrs)

    def handle_data(self, data: str) -> None:
        self.data += data


@given(st.text(st.characters(min_codepoint=32, exclude_categories=("Cs", "Cc", "Cn"))))
def test_any_text_comes_back_from_an_element_and_an_attribute(value: str) -> None:
    found = First(el("p", value, title=value))
    assert (found.data, found.attributes, found.tags) == (value, {"title": value}, 1)


@given(st.text())
def test_every_text_can_be_sent(value: str) -> None:
    assert "<" not in text(value)
    text(value).encode()


def test_attributes_and_empty_elements() -> None:
    assert el("rect", x=1.04, y=10.0, class_="now", stroke_width=2, id=None, hidden=False) == (
        '<rect x="1" y="10" class="now" stroke-width="2"/>'
    )
    assert el("rect", el("title", "a")) == "<rect><title>a</title></rect>"
    assert el("input", checked=True) == '<input checked="">'
    assert join("<", None, Html("<b></b>")) == "&lt;<b></b>"


def test_long_names_keep_their_whole_on_hover() -> None:
    assert name("short") == "<bdi>short</bdi>"
    found = First(name("x" * 5000))
    assert len(found.data) == 72
    assert found.attributes == {"title": "x" * 1000}
