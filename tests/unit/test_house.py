"""The house of the code: packaging, import contracts, constraints, image and documents keep their promises."""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import server
from server.cli.main import cli
from server.config.compile import compile_models
from server.config.load import load_config
from server.config.routing import compile_routing
from server.config.settings import ServerSettings
from server.telemetry.instruments import Telemetry
from server.transport.status import TABLE

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("server", "router", "monitor")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())

#: Modules that decide, by the architecture; some come with later parts. Those that exist must be under the contract.
DECISION_CORES = {
    "server.batching.planner",
    "router.table",
    "router.policy",
    "router.rollout.machine",
    "router.rollout.gates",
    "router.rollout.plan",
    "monitor.alarms",
    "monitor.retrain.trigger",
}
NUMBA_FREE = {"server", "router"} | {
    f"monitor.{name}" for name in ("drift", "estimate", "labels", "panes", "performance", "retrain", "tap")
}


def exists(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


# --- distribution ---


def foreign_owners(distributions: Iterable[Distribution]) -> set[tuple[str, str]]:
    """(package, distribution) for every distribution but ours that brings one of our top-level names."""
    found = set()
    for distribution in distributions:
        name = distribution.metadata["Name"] or ""
        tops = {Path(str(file)).parts[0].removesuffix(".py") for file in distribution.files or []}
        found |= {(package, name) for package in PACKAGES if package in tops and name != "tidegate"}
    return found


def test_no_other_distribution_owns_our_names() -> None:
    assert foreign_owners(importlib.metadata.distributions()) == set()


def test_a_distribution_that_owns_one_is_found(tmp_path: Path) -> None:
    info = tmp_path / "clash-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: clash\nVersion: 1.0\n")
    (info / "RECORD").write_text("router/__init__.py,,\nclash-1.0.dist-info/METADATA,,\n")
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "__init__.py").touch()  # from Python 3.12 on, files that are not there are left out
    assert foreign_owners(importlib.metadata.distributions(path=[str(tmp_path)])) == {("router", "clash")}


def test_package_files_are_empty_or_a_list_of_names() -> None:
    for path in (path for path in python_files(*PACKAGES) if path.name == "__init__.py"):
        body = ast.parse(path.read_text()).body
        if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]  # its docstring
        assigned = {ast.unparse(target) for node in body if isinstance(node, ast.Assign) for target in node.targets}
        assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign) for node in body), path
        assert assigned <= {"__all__", "__version__"}, path
        assert not body or "__all__" in assigned, f"{path} needs __all__"


def test_versions_agree() -> None:
    version = PROJECT["project"]["version"]
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == version == server.__version__


def test_python_versions_agree() -> None:
    """What is declared, what the set-up takes, and what the README promises."""
    project = PROJECT["project"]
    versions = [match[1] for line in project["classifiers"] if (match := re.search(r"Python :: (3\.\d+)$", line))]
    assert project["requires-python"] == f">={versions[0]}"
    set_up = (ROOT / "scripts" / "venv.sh").read_text()
    first, last = (version.replace(".", ", ") for version in (versions[0], versions[-1]))
    assert f"({first}) <= sys.version_info[:2] <= ({last})" in set_up
    assert re.findall(r"python(3\.\d+)", set_up) == versions
    assert f"Python {versions[0]} to {versions[-1]}" in (ROOT / "README.md").read_text()


def test_licence_is_the_one_declared() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def declared() -> dict[str, Requirement]:
    """Every requirement of pyproject.toml, extras included, by its canonical name."""
    project = PROJECT["project"]
    lines = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    requirements = (Requirement(line) for line in lines)
    return {canonicalize_name(r.name): r for r in requirements if r.name != "tidegate"}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("folders", [PACKAGES, ("tests", "loadtests", "scripts")], ids=["product", "tools"])
def test_what_is_imported_is_declared(folders: tuple[str, ...]) -> None:
    known = {*sys.stdlib_module_names, *PACKAGES, "tests", "loadtests", "scripts"}
    owners = importlib.metadata.packages_distributions()
    allowed = set(declared())
    if folders != PACKAGES:
        allowed.add("packaging")  # pytest and import-linter both stand on it
    for path in python_files(*folders):
        for name in set(imported(path)) - known:
            distributions = {canonicalize_name(owner) for owner in owners.get(name, [])}
            # What is not installed here (a client in its own environment) has no owner to look up.
            assert not distributions or distributions & allowed, f"{path} imports {name} of {distributions}"


# --- constraints ---

PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.+!]+)")


def pins(file: str) -> dict[str, str]:
    """Canonical name -> version; fails on a line that is anything but an exact version (a host, a path, a hash)."""
    found: dict[str, str] = {}
    for line in (ROOT / file).read_text().splitlines():
        if line and not line.startswith("#"):
            match = PIN.fullmatch(line)
            assert match, f"{file}: {line!r} is not NAME==VERSION"
            found[canonicalize_name(match["name"])] = match["version"]
    return found


def test_constraints_pin_every_declared_requirement_inside_its_bounds() -> None:
    constraints = pins("constraints.txt")
    for name, requirement in declared().items():
        assert name in constraints, f"{name} is not in constraints.txt; run `make constraints`"
        assert requirement.specifier.contains(constraints[name]), f"{requirement} but {constraints[name]}"


def stood_on() -> set[str]:
    """Canonical names of all that the declared requirements ask for, and those in turn, with this interpreter."""
    found: set[str] = set()
    # With the extra that a requirement's marker may name.
    asked = [(requirement, "") for requirement in declared().values()]
    seen: set[tuple[str, str]] = set()
    while asked:
        requirement, extra = asked.pop()
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            name = canonicalize_name(requirement.name)
            found.add(name)
            new = {(name, wanted) for wanted in ("", *requirement.extras)} - seen
            seen |= new
            lines = importlib.metadata.requires(name) or []
            asked += [(Requirement(line), wanted) for _, wanted in new for line in lines]
    return found


def test_constraints_pin_all_that_development_stands_on() -> None:
    """What a requirement requires too, by the markers of this interpreter: nothing is left to what is newest today."""
    assert stood_on() - set(pins("constraints.txt")) == set()


def test_constraints_keep_the_onnx_release_that_ships_the_node_tests() -> None:
    assert pins("constraints.txt")["onnx"] == "1.22.0"


def test_both_builds_of_onnxruntime_are_the_same_release() -> None:
    constraints = pins("constraints.txt")
    assert constraints["onnxruntime"] == constraints["onnxruntime-gpu"]


def test_nothing_installed_asks_for_the_cpu_build_beside_the_gpu_build() -> None:
    askers = set()
    installed = list(importlib.metadata.distributions())
    for distribution in installed:
        for line in distribution.requires or []:
            requirement = Requirement(line)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if canonicalize_name(requirement.name) == "onnxruntime" and applies:
                askers.add(distribution.metadata["Name"])
    names = {canonicalize_name(distribution.metadata["Name"] or "") for distribution in installed}
    assert not {"onnxruntime", "onnxruntime-gpu"} <= names
    assert "onnxruntime-gpu" not in names or not askers


def test_clients_live_with_an_older_protobuf() -> None:
    clients = pins("constraints-clients.txt")
    lines = (ROOT / "requirements-clients.txt").read_text().splitlines()
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        assert requirement.specifier.contains(clients[canonicalize_name(requirement.name)])
    assert clients["protobuf"] in SpecifierSet("<7")


# --- import contracts ---


def contract(name: str) -> dict[str, Any]:
    contracts: list[dict[str, Any]] = PROJECT["tool"]["importlinter"]["contracts"]
    return next(entry for entry in contracts if entry["name"] == name)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_logo=True, no_cache=True))"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=50, check=False)


@pytest.fixture
def copy_of_the_code(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_import_contracts_are_kept() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("server/batching/planner.py", "import time", "decision cores do no I/O"),
        ("server/gateway.py", "import grpc", "frameworks stay at the edge"),
        ("router/__init__.py", "import monitor", "server composes; router and monitor never meet"),
        ("server/types.py", "from server import gateway", "inside server"),
        ("server/unseated.py", "", "inside server"),
        ("server/transport/native/wire.py", "import ngh2", "ngh2 stays behind the native session"),
    ],
)
def test_a_planted_breach_is_reported(copy_of_the_code: Path, module: str, line: str, broken: str) -> None:
    with (copy_of_the_code / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(copy_of_the_code)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{broken} BROKEN" in result.stdout


def test_modules_that_come_later_join_their_contracts() -> None:
    cores = set(contract("decision cores do no I/O")["source_modules"])
    assert cores == {module for module in DECISION_CORES if exists(module)}
    free = set(contract("numba lives in kernels")["source_modules"])
    assert free == {module for module in NUMBA_FREE if exists(module)}


# --- image ---


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of the Dockerfile, comments dropped and continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def last_stage() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, rest in instructions():
        if name == "FROM":
            found = {}
        found.setdefault(name, []).append(rest)
    return found


def test_image_has_stages_on_a_base_chosen_by_argument() -> None:
    steps = instructions()
    assert steps[0] == ("ARG", "BASE_IMAGE=python:3.11-slim-bookworm")
    stages = [rest for name, rest in steps if name == "FROM"]
    assert stages[0] == "${BASE_IMAGE} AS base"
    assert len(stages) > 2
    assert "en_US.UTF-8" in " ".join(rest for name, rest in steps if name == "RUN")
    assert any(name == "ENV" and "LC_ALL=en_US.UTF-8" in rest for name, rest in steps)


def test_image_runs_as_nobody_in_particular_with_a_read_only_root() -> None:
    stage = last_stage()
    uid, _, gid = stage["USER"][-1].partition(":")
    assert int(uid) > 0
    assert int(gid) > 0
    environment = dict(pair.split("=", 1) for pair in shlex.split(" ".join(stage["ENV"])))
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    (volume,) = json.loads(stage["VOLUME"][0])
    assert environment["NUMBA_CACHE_DIR"].startswith(f"{volume}/")
    entry = json.loads(stage["ENTRYPOINT"][0])
    assert entry[entry.index("--state-dir") + 1] == volume


def test_image_listens_outside_by_flags_that_exist() -> None:
    stage = last_stage()
    entry = json.loads(stage["ENTRYPOINT"][0])
    assert entry[:2] == ["tidegate", "serve"]
    flags = dict(zip(entry[2::2], entry[3::2], strict=True))
    ports = {flags[flag].removeprefix("0.0.0.0:") for flag in ("--http", "--grpc", "--metrics")}
    assert ports == set(stage["EXPOSE"][0].split())
    known = cli_help("serve")
    for flag in [*flags, *(word for word in json.loads(stage["CMD"][0]) if word.startswith("--"))]:
        assert re.search(rf"{flag}\b", known), f"tidegate serve has no {flag}"


def test_image_health_check_asks_for_readiness_with_the_standard_library() -> None:
    check = last_stage()["HEALTHCHECK"][0]
    program, flag, code = json.loads(check[check.index("[") :])
    assert (program, flag) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")
    assert "/v2/health/ready" in code
    modules = {
        alias.name.partition(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert modules <= sys.stdlib_module_names


def test_what_the_image_copies_exists_and_reaches_the_builder() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from="):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in let_through, f".dockerignore keeps {source} from the builder"


# --- documents and commands ---

TEXT = {".py", ".md", ".toml", ".txt", ".sh", ".proto", ".yaml", ".yml", ".json", ".pyi", ""}
FOLDERS = (*PACKAGES, "tests", "loadtests", "scripts", "docs", "proto", ".ci")
#: Folders of the machines that this is built on: nothing committed may name them.
MACHINE_PATHS = re.compile(r"(?<![\w.>}])/(?:work|root|home/\w+|tmp/\w+)/")


def texts() -> Iterator[tuple[Path, str]]:
    roots = [path for path in ROOT.iterdir() if path.is_file()]
    inner = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in roots + inner:
        if path.suffix in TEXT and "__pycache__" not in path.parts and "results" not in path.parts:
            yield path, path.read_text()


def test_no_machine_paths() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}" for path, text in texts() for match in MACHINE_PATHS.finditer(text)
    ]
    assert found == []


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


def code_in(path: Path) -> str:
    """Everything a document sets as code, inline or in a block."""
    text = path.read_text()
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join(blocks + re.findall(r"`([^`\n]+)`", text))


@cache
def cli_help(*command: str) -> str:
    result = CliRunner().invoke(cli, [*command, "--help"], terminal_width=200, prog_name="tidegate")
    assert result.exit_code == 0, result.output
    return result.output


def test_make_targets_in_documents_exist() -> None:
    named = {
        name for path in documents() for name in re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", code_in(path), re.MULTILINE)
    }
    assert {"demo", "test", "check", "bench"} <= named
    assert named <= makefile_targets()


def test_commands_in_documents_exist() -> None:
    named = {
        name
        for path in documents()
        for name in re.findall(r"(?:^|\s)tidegate ([a-z][a-z-]*)", code_in(path), re.MULTILINE)
    }
    listed = set(re.findall(r"^  ([a-z][a-z-]*) ", cli_help(), re.MULTILINE))
    assert {"serve", "demo"} <= named
    assert named <= listed


def test_flags_in_the_readme_exist() -> None:
    lines = "".join(code_in(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    groups = "|".join(("audit", "data", "experiment", "gate", "hook", "monitor", "registry", "rollout"))
    for command, line in set(re.findall(rf"^tidegate ((?:(?:{groups}) )?[a-z-]+)(.*)$", lines, re.MULTILINE)):
        known = cli_help(*command.split())
        for flag in re.findall(r"--[a-z-]+", line.partition("#")[0]):
            assert re.search(rf"{flag}\b", known), f"tidegate {command} has no {flag}"


def rows(document: str, heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its head."""
    section = (ROOT / document).read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_error_table_in_the_protocol_is_the_one_served() -> None:
    documented = {code.strip("`"): (int(http), grpc) for code, http, grpc in rows("docs/protocol.md", "Errors")}
    assert documented == {code: (status.http, status.grpc_name) for code, status in TABLE.items()}


def test_errors_in_the_readme_are_answers_that_exist() -> None:
    served = {(str(status.http), status.grpc_name) for status in TABLE.values()}
    documented = {(http.split()[0], grpc) for _, http, grpc in rows("README.md", "Errors")}
    assert documented <= served


def test_limits_in_the_readme_are_the_defaults() -> None:
    settings = ServerSettings()
    bounds = settings.limits
    defaults = {
        "max_body": bounds.max_body_bytes,
        "max_headers": bounds.max_header_bytes,
        "max_id": bounds.max_id_bytes,
        "max_json_depth": bounds.max_json_depth,
        "max_inputs": bounds.max_inputs,
        "max_outputs": bounds.max_outputs,
        "max_dims": bounds.max_dims,
        "max_parameters": bounds.max_parameters,
        "max_chunks": bounds.max_chunks,
        "max_pending": settings.max_pending,
        "max_unsent": settings.max_unsent_bytes,
        "max_connections": settings.max_connections,
        "max_concurrent_streams": settings.max_concurrent_streams,
    }
    units = {"": 1, "KiB": 1024, "MiB": 1024**2}
    documented: dict[str, int] = {}
    for _, amount, keys in rows("README.md", "Limits on by default"):
        number, _, unit = amount.replace(",", "").removesuffix(" each").partition(" ")
        documented |= dict.fromkeys(re.findall(r"`(\w+)`", keys), int(number) * units[unit])
    assert documented == defaults


def metrics_named_in(*places: str) -> set[str]:
    """Names of metrics that these modules, or those in these folders, have as constants."""
    files = [file for place in places for file in [ROOT / place, *(ROOT / place).glob("*.py")] if file.is_file()]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    constants = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {text for text in constants if re.fullmatch("tidegate_[a-z_]+", text)}


def test_metrics_in_documents_are_served() -> None:
    telemetry = Telemetry.create("1")
    telemetry.model("m", "1")
    page = telemetry.metrics.render().decode()
    served = set(re.findall(r"^# TYPE (\w+)", page, re.MULTILINE))
    # Those that collectors make of what is monitored and delivered, which here is nothing.
    served |= metrics_named_in(
        "server/monitoring", "server/delivery", "server/control/rollouts", "server/capture", "server/retraining.py",
        "server/wiring.py", "server/listening.py", "server/codec/process",
    )  # fmt: skip
    for path in documents():
        for name in re.findall(r"\b((?:tidegate|nv_inference)_[a-z_]*[a-z])\b", code_in(path)):
            assert name in served, f"{path.relative_to(ROOT)} speaks of {name}"


def test_configuration_in_the_readme_is_valid(tmp_path: Path) -> None:
    texts = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    found: list[str] = []
    for text in texts:
        (tmp_path / "config.yaml").write_text(text)
        config = load_config(tmp_path / "config.yaml")
        found += [*compile_models(config), *compile_routing(config)]
    assert found == ["digits", "fraud", "digits"]


def test_links_between_documents_lead_somewhere() -> None:
    for path in documents():
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


def test_every_record_is_in_the_index() -> None:
    folder = ROOT / "docs" / "adr"
    index = (folder / "README.md").read_text()
    records = sorted(path.name for path in folder.glob("[0-9]*.md"))
    assert [name[:4] for name in records] == [f"{number:04}" for number in range(1, len(records) + 1)]
    assert all(f"({name})" in index for name in records)


@pytest.mark.parametrize(
    "target", ["demo", "test", "test-slow", "test-gpu", "check", "fmt", "proto", "bench", "constraints", "clean"]
)
def test_make_target_can_be_planned_and_says_what_it_does(target: str) -> None:
    plan = subprocess.run(
        ["make", "-n", "-B", target], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
    )
    assert plan.returncode == 0, plan.stderr
    assert 'echo "== ' in plan.stdout


def test_ci_runs_the_documented_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    for command in ("make check", "make test", "make test-compiled", "make test-slow"):
        assert re.search(rf"^step \d+m {command}$", script, re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    minutes = sum(int(limit) for limit in re.findall(r"^step (\d+)m make", script, re.MULTILINE))
    assert minutes <= 75
