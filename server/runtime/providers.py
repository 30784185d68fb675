"""Which execution providers a session is asked for, in which order and with which options. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from server.errors import ModelLoadError
from server.runtime.base import Provider

ORT_NAMES: Final = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_SHORT_NAMES: Final = {long: short for short, long in ORT_NAMES.items()}
#: What takes the nodes that a provider does not: ONNX Runtime adds nothing but the CPU on its own.
_BACKSTOPS: Final = {"tensorrt": ("cuda", "cpu"), "cuda": ("cpu",)}
_DEVICE_PROVIDERS: Final = frozenset({"cuda", "tensorrt"})


@dataclass(slots=True, frozen=True)
class ProviderPlan:
    """``entries`` as ONNX Runtime takes them; ``required`` must be in the session; ``notes`` tells what was dropped."""

    entries: tuple[tuple[str, dict[str, str]], ...]
    required: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def on_device(self) -> bool:
        """Whether the first provider computes on a device with memory of its own."""
        return short_name(self.entries[0][0]) in _DEVICE_PROVIDERS


def short_name(ort_name: str) -> str:
    return _SHORT_NAMES.get(ort_name, ort_name)


def plan(
    wanted: Sequence[Provider],
    broken: Mapping[str, str],
    allow_fallback: bool,
    device_id: int | None = None,
    engine_cache: Path | None = None,
) -> ProviderPlan:
    """Order and options for one session.

    ``broken`` maps short names of the providers that do not work here to the reason. ``device_id`` goes to every
    device provider that has none in its options. Raises ModelLoadError when a wanted provider is unknown, or is
    broken and falling back is not allowed.
    """
    chosen: dict[str, dict[str, str]] = {}
    notes: list[str] = []
    for provider in wanted or (Provider("cpu"),):
        name = _known(provider.name)
        if name not in broken:
            chosen[name] = dict(provider.options)
        elif allow_fallback:
            notes.append(f"execution provider {name} does not work here ({broken[name]}): going on without it")
        else:
            raise ModelLoadError(f"Execution provider {name} is wanted but does not work here: {broken[name]}.")
    required = tuple(chosen)
    for name in [*required, "none of them"]:
        for backstop in _BACKSTOPS.get(name, ("cpu",)):
            if backstop not in broken:
                chosen.setdefault(backstop, {})
    for name, options in chosen.items():
        _complete(name, options, device_id, engine_cache)
    entries = tuple((ORT_NAMES[name], chosen[name]) for name in _ordered(chosen))
    return ProviderPlan(entries, required, tuple(notes))


def _known(name: str) -> str:
    short = short_name(name)
    if short not in ORT_NAMES:
        raise ModelLoadError(f"Unknown execution provider '{name}': known are {', '.join(ORT_NAMES)}.")
    return short


def _ordered(chosen: Mapping[str, object]) -> list[str]:
    """As the operator wrote them, but the CPU last: behind it no provider would get a node."""
    return [*(name for name in chosen if name != "cpu"), "cpu"]


def _complete(name: str, options: dict[str, str], device_id: int | None, engine_cache: Path | None) -> None:
    if name in _DEVICE_PROVIDERS and device_id is not None:
        options.setdefault("device_id", str(device_id))
    if name == "tensorrt" and engine_cache is not None:
        options.setdefault("trt_engine_cache_enable", "1")
        options.setdefault("trt_engine_cache_path", str(engine_cache))
        options.setdefault("trt_timing_cache_enable", "1")
        options.setdefault("trt_timing_cache_path", str(engine_cache))
