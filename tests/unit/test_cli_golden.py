"""check-config looks at the golden requests that a configuration names, and says where a bad one is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from server.cli.main import cli

TENSOR = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
GOOD = json.dumps({"requests": [{"inputs": [TENSOR], "outputs": [TENSOR]}]})


def check(folder: Path, golden: str) -> tuple[int, list[dict[str, object]]]:
    file = folder / "c.yaml"
    file.write_text(f"apiVersion: tidegate/v1\nmodels:\n  m:\n    source: m.onnx\n    golden: {golden}\n")
    result = CliRunner().invoke(cli, ["check-config", str(file), "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_good_ones_pass(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(GOOD)
    assert check(tmp_path, "good.json") == (0, [])
    assert check(tmp_path, "[good.json, good.json]") == (0, [])


@pytest.mark.parametrize(
    ("golden", "key", "column"),
    [("bad.json", "models.m.golden", 13), ("[good.json, bad.json]", "models.m.golden[1]", 25)],
)
@pytest.mark.parametrize(
    ("content", "words"), [(None, "No such file"), ("{", "wanted JSON"), ('{"requests": []}', "1 to 1000 requests")]
)
def test_bad_ones_are_shown_where_they_are_named(
    tmp_path: Path, golden: str, key: str, column: int, content: str | None, words: str
) -> None:
    (tmp_path / "good.json").write_text(GOOD)
    if content is not None:
        (tmp_path / "bad.json").write_text(content)
    code, (problem,) = check(tmp_path, golden)
    assert code == 2
    assert (problem["line"], problem["column"], problem["key"]) == (5, column, key)
    assert str(problem["message"]).startswith("bad.json: ")
    assert words in str(problem["message"])
