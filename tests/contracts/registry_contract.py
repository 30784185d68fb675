"""What every ``router.registry.base.RegistryBackend`` owes its users, as tests to inherit.

Subclass ``RegistryContract`` in a test module and implement ``case``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from router.registry.base import InvalidName, NotInRegistry, RegistryBackend

Files = Mapping[str, bytes]
GRAPH = b"graph"


@dataclass(frozen=True)
class Case:
    """A backend, how a version comes to be in it (``add(model, files)`` returns its number), and what ends it all."""

    backend: RegistryBackend
    add: Callable[[str, Files], int]
    close: Callable[[], None] = lambda: None


def model_files(seed: int = 0) -> Files:
    return {"model.onnx": GRAPH + bytes([seed]), "weights.bin": bytes([seed]) * 1000}


class RegistryContract:
    def case(self, folder: Path) -> Case:
        raise NotImplementedError

    @pytest.fixture
    def subject(self, tmp_path: Path) -> Iterator[Case]:
        found = self.case(tmp_path)
        yield found
        found.close()

    def test_empty(self, subject: Case) -> None:
        backend = subject.backend
        assert backend.models() == ()
        assert backend.changes(0).models == frozenset()
        assert backend.changes(0).generation == backend.generation()

    def test_models_and_versions_are_listed_in_order(self, subject: Case) -> None:
        added = [subject.add("b", model_files(seed)) for seed in range(11)]
        subject.add("a", model_files())
        subject.backend.generation()
        assert subject.backend.models() == ("a", "b")
        assert [found.version for found in subject.backend.versions("b")] == added == list(range(1, 12))
        assert {found.model for found in subject.backend.versions("b")} == {"b"}
        assert subject.backend.version("b", 11).version == 11

    def test_generation_grows_with_changes_and_only_with_them(self, subject: Case) -> None:
        start = subject.backend.generation()
        assert subject.backend.generation() == start
        subject.add("a", model_files())
        first = subject.backend.generation()
        assert first > start
        assert subject.backend.generation() == first
        subject.add("b", model_files())
        assert subject.backend.generation() > first

    def test_changes_name_what_changed_since(self, subject: Case) -> None:
        subject.add("a", model_files())
        subject.backend.generation()
        cursor = subject.backend.changes(0)
        assert cursor.models == {"a"}
        subject.add("b", model_files())
        subject.backend.generation()
        assert subject.backend.changes(cursor.generation).models == {"b"}
        assert subject.backend.changes(0).models == {"a", "b"}
        latest = subject.backend.changes(0).generation
        assert subject.backend.changes(latest).models == frozenset()

    def test_fetch_gives_the_bytes_and_their_digests(self, subject: Case) -> None:
        files = model_files(5)
        version = subject.add("a", files)
        subject.backend.generation()
        fetched = subject.backend.fetch("a", version)
        assert {entry.path: (fetched.folder / entry.path).read_bytes() for entry in fetched.files} == files
        for entry in fetched.files:
            assert entry.sha256 == hashlib.sha256(files[entry.path]).hexdigest()
            assert entry.size == len(files[entry.path])
        assert [entry.path for entry in fetched.files if entry.role == "model"] == ["model.onnx"]
        assert subject.backend.fetch("a", version) == fetched

    def test_digest_stands_for_the_bytes(self, subject: Case) -> None:
        one, two = subject.add("a", model_files(1)), subject.add("a", model_files(2))
        subject.backend.generation()
        assert subject.backend.fetch("a", one).digest != subject.backend.fetch("a", two).digest

    def test_references(self, subject: Case) -> None:
        version = subject.add("a", model_files())
        subject.backend.generation()
        assert subject.backend.resolve("a", str(version)).version == version
        with pytest.raises(NotInRegistry, match="champion"):
            subject.backend.resolve("a", "@champion")
        for reference in ("", "@", "@A", "0", "-1", "01", "1.0", "champion", "99999999999999999999", "@a/b", "@é", "²"):
            with pytest.raises(InvalidName):
                subject.backend.resolve("a", reference)

    def test_what_is_not_there_is_named(self, subject: Case) -> None:
        subject.add("a", model_files())
        subject.backend.generation()
        backend = subject.backend
        for ask in (backend.versions, backend.aliases, backend.triggered, lambda name: backend.version(name, 1)):
            with pytest.raises(NotInRegistry, match="nobody"):
                ask("nobody")
        for get in (backend.version, backend.fetch):
            with pytest.raises(NotInRegistry, match="'a' has no version 9"):
                get("a", 9)
            for wrong in (0, -1, 2**63, True, "1"):
                with pytest.raises(InvalidName):
                    get("a", wrong)
        with pytest.raises(NotInRegistry):
            backend.resolve("a", "9")

    def test_no_alias_without_being_asked(self, subject: Case) -> None:
        subject.add("a", model_files())
        subject.backend.generation()
        assert dict(subject.backend.aliases("a")) == {}

    def test_no_trigger_without_being_named(self, subject: Case) -> None:
        subject.add("a", model_files())
        subject.backend.generation()
        assert dict(subject.backend.triggered("a")) == {}

    def test_closing_twice_is_fine(self, subject: Case) -> None:
        subject.backend.close()
        subject.backend.close()
