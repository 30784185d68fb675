"""A reference profile among the files to be published: found, read, and held against the model it goes with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from router.registry.directory import DEFAULT_FILENAME
from router.registry.manifest import MODEL, PROFILE, Description
from router.registry.sources import each_file, roles_of
from server.errors import InvalidArgument, ModelLoadError, TidegateError

if TYPE_CHECKING:
    from monitor.profile import ReferenceProfile
    from monitor.types import Column
    from server.types import TensorSpec

SUFFIX: Final = ".tgp"
FILENAME: Final = "profile" + SUFFIX


def files_to_publish(source: Path, profile: Path | None) -> tuple[Path | dict[str, Path], dict[str, str]]:
    """(source for the registry, role of the profile) of a model file or folder and the profile given beside it.

    Without ``profile`` the only ``.tgp`` file of a folder is it. Raises PublishRefused, or InvalidArgument for two.
    """
    paths: list[str] = []
    each_file(source, lambda path, _: paths.append(path))
    found = [path for path in paths if path.endswith(SUFFIX)]
    if profile is None:
        if len(found) > 1:
            raise InvalidArgument(
                f"{source.name} has {len(found)} profiles, {', '.join(sorted(found)[:3])}: wanted one"
            )
        return source, dict.fromkeys(found, PROFILE)
    if found:
        raise InvalidArgument(f"{source.name} has the profile {found[0]} already: leave out --profile, or the file")
    files = {path: source / path for path in paths} if source.is_dir() else dict.fromkeys(paths, source)
    return {**files, FILENAME: profile}, {FILENAME: PROFILE}


def check_profile(source: Path | Mapping[str, Path], roles: Mapping[str, str], about: Description | None) -> None:
    """Refuse a profile that cannot be read, or that watches what the model does not have.

    The signature is the description's, else the model's own, which is loaded for it. Raises InvalidArgument.
    """
    path = next((path for path, role in roles.items() if role == PROFILE), None)
    if path is None:
        return
    if about is not None and about.profile is not None:
        raise InvalidArgument("the description has a profile inline and there is a profile file: wanted one of them")
    profile = _read(source[path] if isinstance(source, Mapping) else source / path)
    inputs, outputs = _signature(source, roles, about)
    for found in profile.columns:
        column = found.column
        tensors = inputs if column.source == "input" else outputs
        if column.tensor not in tensors:
            have = ", ".join(tensors) or "none"
            raise InvalidArgument(
                f"the profile watches the {column.source} '{column.tensor}', the model has the {column.source}s {have}"
            )
        _check_column(column, tensors[column.tensor])


def _check_column(column: Column, spec: TensorSpec) -> None:
    what = f"the profile's {column.source} '{column.tensor}'"
    if column.datatype != spec.datatype:
        raise InvalidArgument(f"{what} is {column.datatype}, the model's is {spec.datatype}")
    tail = spec.shape[1:]
    if not any(dim < 0 for dim in tail) and math.prod(tail) != column.width:
        raise InvalidArgument(f"{what} has {column.width} elements a row, the model's has {math.prod(tail)}")


def _read(path: Path) -> ReferenceProfile:
    from monitor.errors import MonitorError
    from monitor.profile import ReferenceProfile

    try:
        return ReferenceProfile.load(path)
    except MonitorError as error:
        raise InvalidArgument(str(error)) from error
    except OSError as error:
        raise TidegateError(f"{path} cannot be read: {error.strerror or error}") from error


def _signature(
    source: Path | Mapping[str, Path], roles: Mapping[str, str], about: Description | None
) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Inputs and outputs by name, the batch their first dimension."""
    from server.tabular import load
    from server.types import TensorSpec

    if about is not None and about.signature is not None:
        sides = about.signature.inputs, about.signature.outputs
        inputs, outputs = (
            {tensor.name: TensorSpec(tensor.name, tensor.datatype, tensor.shape) for tensor in side} for side in sides
        )
        return inputs, outputs
    model = _model(source, roles)
    try:
        engine = load(model)
    except ModelLoadError as error:
        raise InvalidArgument(f"the model cannot be loaded to check its profile: {error.message}") from error
    engine.close()
    return {tensor.name: tensor for tensor in engine.spec.inputs}, {t.name: t for t in engine.spec.outputs}


def _model(source: Path | Mapping[str, Path], roles: Mapping[str, str]) -> Path:
    """The file that has the role of the model."""
    if isinstance(source, Path) and not source.is_dir():
        return source
    paths: list[str] = []
    each_file(source, lambda path, _: paths.append(path))
    known = roles_of(paths, {path: role for path, role in roles.items() if path in paths})
    name = next((path for path, role in known.items() if role == MODEL), DEFAULT_FILENAME)
    return source[name] if isinstance(source, Mapping) else source / name
