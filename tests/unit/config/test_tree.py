"""Reading YAML strictly, with places. Runs on both parsers that PyYAML may have."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from server.config import tree
from server.config.tree import Complaint, Mark, YamlSyntaxError, read_tree, resolve_plain


@pytest.fixture(params=["CSafeLoader", "SafeLoader"], autouse=True)
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "_LOADER", getattr(yaml, request.param))


def plain(text: str) -> Any:
    root, complaints = read_tree(text)
    assert complaints == []
    return root.plain()


def complaints(text: str) -> list[Complaint]:
    return read_tree(text)[1]


def fatal(text: str) -> Complaint:
    with pytest.raises(YamlSyntaxError) as caught:
        read_tree(text)
    return caught.value.complaint


def test_values() -> None:
    text = "a: 1\nb: -2.5\nc: true\nd: FALSE\ne: ~\nf: text\ng: '1'\nh: [1, {i: j}]\nk:\n"
    assert plain(text) == {
        "a": 1, "b": -2.5, "c": True, "d": False, "e": None, "f": "text", "g": "1", "h": [1, {"i": "j"}], "k": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("0", 0),
        ("+5", 5),
        ("127.0.0.1:8000", "127.0.0.1:8000"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("y", "y"),
        ("n", "n"),
        ("=", "="),
        ("0x", "0x"),
        ("200ms", "200ms"),
        ("5%", "5%"),
        ("-", "-"),
        (".", "."),
        ("e5", "e5"),
    ],
)
def test_plain_words_that_mean_one_thing(text: str, value: object) -> None:
    assert resolve_plain(text) == (value, "")
    assert type(resolve_plain(text)[0]) is type(value)


@pytest.mark.parametrize("word", ["yes", "Yes", "YES", "no", "No", "NO", "on", "On", "off", "OFF"])
def test_words_that_are_booleans_in_yaml_1_1(word: str) -> None:
    (complaint,) = complaints(f"a:\n  b: {word}\n")
    assert complaint.mark == Mark(2, 6)
    assert complaint.path == ("a", "b")
    right = "true" if word.lower() in {"yes", "on"} else "false"
    assert complaint.message == (
        f"plain {word} is a boolean in some YAML versions: write {right}, or '{word}' in quotes for the text"
    )
    assert plain(f"a: '{word}'") == {"a": word}
    assert plain(f"{word}: 1") == {word: 1}


@pytest.mark.parametrize("word", ["010", "0o17", "0x1F", "0b101", "1_000", "1:30", "12:30:45", "-010", "00"])
def test_numbers_that_surprise(word: str) -> None:
    (complaint,) = complaints(f"a: {word}")
    assert "write a decimal number, or quote the text" in complaint.message
    assert plain(f"a: '{word}'") == {"a": word}


@pytest.mark.parametrize("word", [".inf", "-.INF", ".nan"])
def test_numbers_that_are_not_finite(word: str) -> None:
    assert complaints(f"a: {word}")[0].message == f"{word} is not a finite number"


@pytest.mark.parametrize("word", ["9" * 5000, "1e999", "-1e999"])
def test_numbers_too_large_to_hold(word: str) -> None:
    assert complaints(f"a: {word}")[0].message.endswith("is too large a number")


def test_places_of_values_and_keys() -> None:
    root, _ = read_tree('a: 1\nb:\n  - x\n  - {c: "d"}\n"q é": [y]\n')
    chain = root.chain(("b", 1, "c"))
    assert [node.mark for node in chain] == [Mark(1, 1), Mark(3, 3), Mark(4, 5), Mark(4, 9)]
    assert chain[2].keys == {"c": Mark(4, 6)}
    assert root.keys["q é"] == Mark(5, 1)
    assert root.chain(("q é", 0))[-1].mark == Mark(5, 9)
    assert len(root.chain(("b", 7, "c"))) == 2
    assert len(root.chain(("a", "x"))) == 2


def test_duplicate_keys_are_mistakes_at_the_second_one() -> None:
    (complaint,) = complaints("a: 1\nb: 2\na: 3\n")
    assert complaint == Complaint(Mark(3, 1), ("a",), "duplicate key, first given in line 1", spoils=False)


def test_anchors_aliases_and_merges() -> None:
    text = "base: &b {x: 1, y: 2}\nmore: &m {y: 3, z: 4}\none: {<<: *b, y: 9}\ntwo: {<<: [*b, *m]}\nsame: *b\n"
    read = plain(text)
    assert read["one"] == {"x": 1, "y": 9}
    assert read["two"] == {"x": 1, "y": 2, "z": 4}
    assert read["same"] == {"x": 1, "y": 2}
    root, _ = read_tree(text)
    assert root.chain(("one",))[-1].keys["x"] == Mark(1, 11)


def test_merge_of_something_else() -> None:
    (complaint,) = complaints("a: {<<: 5}")
    assert "wanted an alias of a mapping" in complaint.message


@pytest.mark.parametrize("tag", ["!!python/object:os.system", "!!binary", "!!set", "!custom", "!!timestamp"])
def test_other_tags_are_mistakes(tag: str) -> None:
    assert complaints(f"a: {tag} {{}}")[0].message == f"tag {tag} is not supported"
    assert complaints(f"a: {tag} x")[0].message == f"tag {tag} is not supported"


def test_core_tags_work() -> None:
    assert plain("a: !!str 8\nb: !!int '8'\nc: !!map {}\nd: !!seq []\ne: ! 8\n") == {
        "a": "8", "b": 8, "c": {}, "d": [], "e": "8",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "mark", "words"),
    [
        ("", Mark(1, 1), "file is empty"),
        ("# only a comment\n", Mark(1, 1), "file is empty"),
        ("---\n", Mark(1, 1), "file is empty"),
        ("a: b: c", Mark(1, 5), "mapping values are not allowed"),
        ("a: \x01", Mark(1, 4), "U+0001 is not allowed"),
        ("b: 2\né: \x07", Mark(2, 4), "U+0007 is not allowed"),
        ("a: 1\n---\nb: 1\n", Mark(2, 1), "a second document"),
        ("a: *x", Mark(1, 4), "no anchor &x"),
        ("&a [*a]", Mark(1, 5), "contains itself"),
        ("? [1]\n: 2\n", Mark(1, 3), "a key must be"),
        ("? {a: 1}\n: 2\n", Mark(1, 3), "a key must be"),
        ("[" * 200, Mark(1, 66), "levels deep"),
        ("{a: " * 200, Mark(1, 261), "levels deep"),
    ],
)
def test_what_stops_the_reading(text: str, mark: Mark, words: str) -> None:
    complaint = fatal(text)
    assert words in complaint.message
    assert complaint.mark == mark


@pytest.mark.parametrize(
    "text", ["a: [1, 2", "a: 'x", "a: {b", "a:\n\t- b", "- a\nb: c", "a: |x\n", "%BAD\n", "a: @x", "&", "!<"]
)
def test_syntax_errors_have_a_place(text: str) -> None:
    complaint = fatal(text)
    assert complaint.message.startswith("YAML syntax: ")
    assert complaint.mark >= Mark(1, 1)


def test_aliases_do_not_explode() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    assert "more than 100000 values" in fatal("\n".join(lines)).message


def test_merges_do_not_explode() -> None:
    lines = ["a0: &a0 {k0: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], k{n}: 1}}" for n in range(1, 30)]
    assert "more than 100000 values" in fatal("\n".join(lines)).message


@given(st.text(alphabet=st.sampled_from("ab:- \n{}[],&*!|>'\"#?%@`\t0\x00é~<=yes"), max_size=60))
def test_no_text_raises_anything_else(text: str) -> None:
    with contextlib.suppress(YamlSyntaxError):
        read_tree(text)[0].plain()


@given(
    st.recursive(
        st.text() | st.integers() | st.booleans() | st.none(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_reads_what_yaml_writes(value: Any) -> None:
    text = yaml.safe_dump({"v": value}, default_style='"')
    assert plain(text) == {"v": value}
