"""Scanning real folders: layouts, names, versions, links, fingerprints, version policies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from router.registry.directory import ScanProblem, is_model_name, is_version, scan, select_versions


def put(root: Path, *names: str, content: bytes = b"onnx") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def versions(root: Path) -> dict[str, dict[str, str]]:
    """{model: {version: path below the root}}"""
    found = scan(root)
    return {
        name: {number: str(version.path.relative_to(root)) for number, version in model.versions.items()}
        for name, model in found.models.items()
    }


def test_triton_layout(tmp_path: Path) -> None:
    put(tmp_path, "b/1/model.onnx", "a/2/model.onnx", "a/10/model.onnx", "a/config.pbtxt", "a/labels.txt", "a/warmup/x")
    assert versions(tmp_path) == {"a": {"2": "a/2/model.onnx", "10": "a/10/model.onnx"}, "b": {"1": "b/1/model.onnx"}}
    assert list(versions(tmp_path)) == ["a", "b"]
    assert list(versions(tmp_path)["a"]) == ["2", "10"]
    model = scan(tmp_path).models["a"]
    assert model.config == tmp_path / "a/config.pbtxt"
    assert model.folder == tmp_path / "a"
    assert scan(tmp_path).models["b"].config is None
    assert scan(tmp_path).problems == []


def test_model_folder_without_versions(tmp_path: Path) -> None:
    put(tmp_path, "a/model.onnx", "a/config.pbtxt")
    assert versions(tmp_path) == {"a": {"1": "a/model.onnx"}}


def test_version_folders_win_over_a_bare_file(tmp_path: Path) -> None:
    put(tmp_path, "a/model.onnx", "a/3/model.onnx")
    assert versions(tmp_path) == {"a": {"3": "a/3/model.onnx"}}


def test_flat_files(tmp_path: Path) -> None:
    put(tmp_path, "digits.onnx", "flights.onnx", "README.md")
    assert versions(tmp_path) == {"digits": {"1": "digits.onnx"}, "flights": {"1": "flights.onnx"}}
    assert scan(tmp_path).models["digits"].folder is None


@pytest.mark.parametrize(
    ("file", "root", "name", "version"),
    [
        ("digits.onnx", "digits.onnx", "digits", "1"),
        ("digits/model.onnx", "digits/model.onnx", "digits", "1"),
        ("digits/7/model.onnx", "digits/7/model.onnx", "digits", "7"),
        ("digits/model.onnx", "digits", "digits", "1"),
        ("digits/7/model.onnx", "digits", "digits", "7"),
        ("my model/model.onnx", "my model/model.onnx", "model", "1"),
        ("my model/1/model.onnx", "my model", "model", "1"),
    ],
)
def test_a_root_that_is_one_model(tmp_path: Path, file: str, root: str, name: str, version: str) -> None:
    put(tmp_path, file)
    found = scan(tmp_path / root)
    assert [(model, list(entry.versions)) for model, entry in found.models.items()] == [(name, [version])]
    assert found.models[name].versions[version].path == tmp_path / file
    assert found.problems == []


def test_relative_root_has_its_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "digits/1/model.onnx", "digits/config.pbtxt")
    monkeypatch.chdir(tmp_path / "digits")
    model = scan(Path()).models["digits"]
    assert model.config is not None
    assert model.config.parent.name == "digits"


def test_root_model_beside_other_models(tmp_path: Path) -> None:
    root = tmp_path / "models"
    put(root, "model.onnx", "config.pbtxt", "warmup/data", "other/1/model.onnx", "flat.onnx")
    assert versions(root) == {
        "flat": {"1": "flat.onnx"},
        "models": {"1": "model.onnx"},
        "other": {"1": "other/1/model.onnx"},
    }
    assert scan(root).problems == []


def test_a_folder_of_numbered_models_is_not_one_model(tmp_path: Path) -> None:
    put(tmp_path, "1/1/model.onnx", "2/1/model.onnx")
    assert versions(tmp_path) == {"1": {"1": "1/1/model.onnx"}, "2": {"1": "2/1/model.onnx"}}


def test_model_file_that_is_a_folder(tmp_path: Path) -> None:
    put(tmp_path, "a/1/model.onnx/model.onnx", "a/1/model.onnx/weights.bin")
    assert versions(tmp_path) == {"a": {"1": "a/1/model.onnx/model.onnx"}}
    before = scan(tmp_path).models["a"].versions["1"].fingerprint
    put(tmp_path, "a/1/model.onnx/weights.bin", content=b"longer than before")
    assert scan(tmp_path).models["a"].versions["1"].fingerprint != before


def test_filename_comes_from_the_configuration(tmp_path: Path) -> None:
    put(tmp_path, "a/1/net.onnx", "a/config.pbtxt", "b/1/model.onnx")
    found = scan(tmp_path, filename_of=lambda config: "net.onnx" if config == tmp_path / "a/config.pbtxt" else "never")
    assert found.models["a"].versions["1"].path == tmp_path / "a/1/net.onnx"
    assert found.models["b"].versions["1"].path == tmp_path / "b/1/model.onnx"


def test_configuration_that_cannot_be_used_spoils_its_model_only(tmp_path: Path) -> None:
    put(tmp_path, "a/1/model.onnx", "a/config.pbtxt", "b/1/model.onnx")

    def refuse(_: Path) -> str:
        raise ValueError("config.pbtxt:1:1: no")

    found = scan(tmp_path, filename_of=refuse)
    assert list(found.models) == ["b"]
    assert found.problems == [ScanProblem("a", "", "config.pbtxt:1:1: no")]


@pytest.mark.parametrize("filename", ["../x.onnx", "/etc/passwd", "a\\b", "..", "", "x\0"])
def test_filename_must_stay_in_the_folder(tmp_path: Path, filename: str) -> None:
    put(tmp_path, "a/1/model.onnx", "a/config.pbtxt")
    found = scan(tmp_path, filename_of=lambda _: filename)
    assert found.models == {}
    assert "must be the name of a file" in found.problems[0].message


def test_one_bad_version_spoils_no_other(tmp_path: Path) -> None:
    put(tmp_path, "a/1/model.onnx", "a/2/notes.txt", "a/3/resnet.onnx", "a/9")
    found = scan(tmp_path)
    assert list(found.models["a"].versions) == ["1"]
    problems = {problem.version: problem.message for problem in found.problems}
    assert set(problems) == {"2", "3", "9"}
    assert problems["2"] == "no model.onnx in the version folder"
    assert "found resnet.onnx" in problems["3"]
    assert "this is a file" in problems["9"]


@pytest.mark.parametrize("folder", ["0", "007", "9" * 19])
def test_numbers_that_are_no_versions_are_passed_over(tmp_path: Path, folder: str) -> None:
    put(tmp_path, f"a/{folder}/model.onnx", "a/6/model.onnx", f"b/{folder}/model.onnx")
    found = scan(tmp_path)
    assert list(found.models) == ["a"]
    assert list(found.models["a"].versions) == ["6"]
    assert [(p.model, p.version) for p in found.problems] == [("a", ""), ("b", ""), ("b", "")]
    assert "passed over: a version is a positive integer" in found.problems[0].message


def test_model_whose_versions_are_all_bad_is_still_known(tmp_path: Path) -> None:
    put(tmp_path, "a/2/notes.txt")
    found = scan(tmp_path)
    assert found.models["a"].versions == {}
    assert [(p.model, p.version) for p in found.problems] == [("a", "2")]


def test_empty_folder_and_bad_names_are_problems(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path, "bad name/1/model.onnx", "x" * 240 + ".onnx", "ü/1/model.onnx", "fine/1/model.onnx")
    found = scan(tmp_path)
    assert set(found.models) == {"fine", "x" * 240}
    assert {problem.model for problem in found.problems} == {"empty", "bad name", "ü"}


def test_name_that_is_no_text_at_all(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    (problem,) = scan(tmp_path).problems
    assert "must be letters" in problem.message
    assert problem.model == r"\xff\xfe"
    problem.message.encode()


def test_hidden_entries_are_ignored(tmp_path: Path) -> None:
    put(tmp_path, ".git/1/model.onnx", ".hidden.onnx", "a/.5/model.onnx", "a/1/model.onnx", "a/1/.DS_Store")
    assert versions(tmp_path) == {"a": {"1": "a/1/model.onnx"}}
    assert scan(tmp_path).problems == []


def test_folder_and_file_of_one_name(tmp_path: Path) -> None:
    put(tmp_path, "a/1/model.onnx", "a.onnx")
    assert versions(tmp_path) == {"a": {"1": "a/1/model.onnx"}}
    assert [problem.model for problem in scan(tmp_path).problems] == ["a.onnx"]


def test_links_that_lead_outside_are_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    put(outside, "1/model.onnx", "model.onnx", "config.pbtxt")
    put(root, "fine/1/model.onnx", "file/2/keep", "folder/keep", "config/1/model.onnx")
    (root / "model").symlink_to(outside)
    (root / "flat.onnx").symlink_to(outside / "model.onnx")
    (root / "file/1").mkdir()
    (root / "file/1/model.onnx").symlink_to(outside / "model.onnx")
    (root / "folder/1").symlink_to(outside / "1")
    (root / "config/config.pbtxt").symlink_to(outside / "config.pbtxt")
    found = scan(root)
    assert {name for name, model in found.models.items() if model.versions} == {"fine"}
    outside_links = {(p.model, p.version) for p in found.problems if "outside" in p.message}
    assert outside_links == {("model", ""), ("flat.onnx", ""), ("file", "1"), ("folder", "1"), ("config", "")}


def test_a_folder_with_a_shared_prefix_is_outside(tmp_path: Path) -> None:
    put(tmp_path, "root-2/1/model.onnx", "root/fine/1/model.onnx")
    (tmp_path / "root/a").symlink_to(tmp_path / "root-2")
    assert list(scan(tmp_path / "root").models) == ["fine"]


def test_links_inside_the_root_work(tmp_path: Path) -> None:
    """A mounted volume publishes its files through a hidden folder that is switched over as a whole."""
    put(tmp_path, "..2024/model.onnx", "..2024/a.onnx")
    (tmp_path / "..data").symlink_to("..2024")
    (tmp_path / "a.onnx").symlink_to("..data/a.onnx")
    assert versions(tmp_path) == {"a": {"1": "a.onnx"}}


def test_broken_and_circular_links_are_problems(tmp_path: Path) -> None:
    put(tmp_path, "fine/1/model.onnx")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    found = scan(tmp_path)
    assert list(found.models) == ["fine"]
    assert {problem.model for problem in found.problems} == {"gone", "loop"}
    assert all("cannot be read" in problem.message for problem in found.problems)


def test_a_pipe_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "a/1").mkdir(parents=True)
    os.mkfifo(tmp_path / "a/1/model.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    assert [(p.model, "not a regular file" in p.message) for p in scan(tmp_path).problems] == [
        ("a", True),
        ("pipe.onnx", True),
    ]
    with pytest.raises(OSError, match="neither a folder nor a regular file"):
        scan(tmp_path / "pipe.onnx")


def test_root_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        scan(tmp_path / "nowhere")


def test_fingerprints_change_with_what_they_cover(tmp_path: Path) -> None:
    put(tmp_path, "a/1/model.onnx", "a/2/model.onnx", "a/config.pbtxt")
    before = scan(tmp_path).models["a"]
    assert scan(tmp_path).models["a"] == before

    put(tmp_path, "a/2/weights.bin")
    after = scan(tmp_path).models["a"]
    assert after.versions["1"].fingerprint == before.versions["1"].fingerprint
    assert after.versions["2"].fingerprint != before.versions["2"].fingerprint
    assert after.fingerprint == before.fingerprint

    put(tmp_path, "a/config.pbtxt", content=b"max_batch_size: 4")
    assert scan(tmp_path).models["a"].fingerprint != before.fingerprint


def test_replacing_a_file_by_rename_shows_even_with_equal_size_and_time(tmp_path: Path) -> None:
    put(tmp_path, "a/1/model.onnx", "new", content=b"same")
    model = tmp_path / "a/1/model.onnx"
    before = scan(tmp_path).models["a"].versions["1"].fingerprint
    os.utime(tmp_path / "new", ns=(0, model.stat().st_mtime_ns))
    (tmp_path / "new").rename(model)
    after = scan(tmp_path).models["a"].versions["1"].fingerprint
    assert [entry[:3] for entry in after] == [entry[:3] for entry in before]
    assert after != before


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "1", "-x", "a..b", "x" * 255])
def test_good_names(name: str) -> None:
    assert is_model_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "a/b", "a\\b", "a b", "a\n", "ü", "x" * 256, "a\0", "a:b", "%2e"]
)
def test_bad_names(name: str) -> None:
    assert not is_model_name(name)


@pytest.mark.parametrize(("text", "good"), [("1", True), (str(2**63 - 1), True), (str(2**63), False), ("0", False)])
@pytest.mark.parametrize("decorate", ["{}", "0{}", "+{}", "{}\n", "{} "])
def test_versions(text: str, good: bool, decorate: str) -> None:
    assert is_version(decorate.format(text)) == (good and decorate == "{}")


@pytest.mark.parametrize("text", ["", "-1", "1.0", "1e3", "\u0661", "\u00b2", "1_0", "9" * 19, "9" * 5000])
def test_texts_that_are_no_versions(text: str) -> None:
    assert not is_version(text)


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        (("latest", "1"), ["10"]),
        (("latest", "2"), ["9", "10"]),
        (("latest", "99"), ["2", "9", "10"]),
        (("all",), ["2", "9", "10"]),
        (("specific", "10", "2", "7"), ["2", "10"]),
    ],
)
def test_version_policies(policy: tuple[str, ...], chosen: list[str]) -> None:
    assert select_versions(policy, ["10", "2", "9", "9"]) == chosen
    assert select_versions(policy, []) == []


@pytest.mark.parametrize(
    "policy", [(), ("latest",), ("latest", "0"), ("latest", "x"), ("specific",), ("specific", "a"), ("newest", "1")]
)
def test_unknown_policies(policy: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="unknown version policy"):
        select_versions(policy, ["1"])
