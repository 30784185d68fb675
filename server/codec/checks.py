"""Checks that every wire form makes, in one wording. All of them raise InvalidArgument unless they say otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from server.errors import InvalidArgument
from server.types import ALL_DATATYPES, DATATYPES, ParameterValue, RequestedOutput, element_count

#: Bytes that no tensor may claim, whatever its zero dimensions: numpy and ONNX Runtime count in signed 64 bits.
_MAX_EXTENT: Final = 2**63 - 1
_SHOWN_CHARACTERS: Final = 100


def shown(value: object) -> str:
    """``repr``, shortened, of a value that a caller sent."""
    return _shortened(repr(value))


def kind_of(value: object) -> str:
    """What a value out of JSON is, in words of JSON's."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case list():
            return "a list" if value else "an empty list"
        case dict():
            return "an object"
        case _:
            return shown(value)


def dims(shape: Sequence[int]) -> str:
    """A shape as error messages write it: ``[2,3]``."""
    return _shortened(f"[{','.join(map(str, shape))}]")


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def check_limit(what: str, count: int, limit: int) -> None:
    """At most ``limit`` of ``what`` in one request."""
    if count > limit:
        raise InvalidArgument(f"too many {what}: at most {limit} are accepted, got {count}")


def check_id(identifier: str, limit: int) -> None:
    """``limit`` counts UTF-8 bytes."""
    size = len(identifier.encode())
    if size > limit:
        raise InvalidArgument(f"the request id is too long: at most {limit} bytes are accepted, got {size}")


def check_name(kind: str, name: str) -> None:
    if not name:
        raise InvalidArgument(f"every {kind} needs a name that is not empty")


def check_unique(kind: str, names: Sequence[str]) -> None:
    """No name may come twice; ``kind`` is "input" or "output"."""
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidArgument(f"{kind} {shown(name)} is given more than once")
        seen.add(name)


def check_datatype(name: str, datatype: str) -> None:
    if datatype not in ALL_DATATYPES:
        known = ", ".join([*DATATYPES, "BYTES"])
        raise InvalidArgument(f"input {shown(name)}: unknown datatype {shown(datatype)}; wanted one of {known}")


def check_shape(name: str, shape: tuple[int, ...], max_dims: int) -> int:
    """The element count of a shape whose rank, signs and extent are acceptable."""
    if len(shape) > max_dims:
        raise InvalidArgument(f"input {shown(name)}: at most {max_dims} dimensions are accepted, got {len(shape)}")
    if shape and min(shape) < 0:
        raise InvalidArgument(f"input {shown(name)}: shape {dims(shape)} has a negative dimension")
    count = element_count(shape)
    # A shape without a zero must match its data, which bounds it; one with a zero claims any extent for nothing.
    extent = count or element_count(tuple(dim or 1 for dim in shape))
    if extent * 8 > _MAX_EXTENT:
        raise InvalidArgument(f"input {shown(name)}: shape {dims(shape)} is over the 64-bit range")
    return count


def check_byte_size(name: str, datatype: str, shape: tuple[int, ...], size: int) -> None:
    """Raw contents of a fixed-size datatype have exactly the bytes that the shape asks for."""
    wanted = element_count(shape) * DATATYPES[datatype][1]
    if size != wanted:
        raise InvalidArgument(
            f"input {shown(name)}: {datatype} with shape {dims(shape)} wants {wanted} bytes of data, got {size}"
        )


def check_element_count(name: str, shape: tuple[int, ...], count: int) -> None:
    wanted = element_count(shape)
    if count != wanted:
        raise InvalidArgument(f"input {shown(name)}: shape {dims(shape)} wants {wanted} elements, got {count}")


def refuse_shared_memory(kind: str, name: str, parameters: Mapping[str, object]) -> None:
    """Raise InvalidArgument when a tensor's contents are said to lie in, or to go to, a shared memory region."""
    if "shared_memory_region" in parameters:
        raise InvalidArgument(f"{kind} {shown(name)}: shared memory regions are not offered by this server")


def requested_output(name: str, parameters: Mapping[str, ParameterValue]) -> RequestedOutput:
    """One entry of a request's ``outputs`` from its parameters ``binary_data`` and ``classification``."""
    refuse_shared_memory("output", name, parameters)
    binary = parameters.get("binary_data")
    if binary is not None and not isinstance(binary, bool):
        raise InvalidArgument(
            f"output {shown(name)}: parameter 'binary_data' must be true or false, got {shown(binary)}"
        )
    return RequestedOutput(name, binary, _class_count(name, parameters.get("classification", 0)))


def _class_count(name: str, value: ParameterValue) -> int:
    count = whole_number(value)
    if count is None or count < 0:
        raise InvalidArgument(
            f"output {shown(name)}: parameter 'classification' must be a whole number of at least 0, got {shown(value)}"
        )
    return count


def whole_number(value: object) -> int | None:
    """The integer a JSON number stands for, or None: some clients write every number as a float (``1.0``)."""
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    return None
