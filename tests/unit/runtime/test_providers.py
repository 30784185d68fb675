from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import ModelLoadError
from server.runtime.base import Provider
from server.runtime.providers import plan


def names(*wanted: str, broken: dict[str, str] | None = None, fallback: bool = False) -> list[str]:
    return [name for name, _ in plan([Provider(name) for name in wanted], broken or {}, fallback).entries]


def test_what_a_provider_does_not_take_goes_to_the_next() -> None:
    assert names("cpu") == ["CPUExecutionProvider"]
    assert names() == ["CPUExecutionProvider"]
    assert names("cuda") == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert names("tensorrt") == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


def test_the_cpu_comes_last_whatever_the_order() -> None:
    assert names("cpu", "cuda") == ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_full_names_are_known_too() -> None:
    assert names("CUDAExecutionProvider") == names("cuda")


def test_only_what_was_asked_for_is_required() -> None:
    assert plan([Provider("tensorrt")], {}, False).required == ("tensorrt",)


def test_options_are_passed_and_the_device_is_filled_in() -> None:
    wanted = [Provider("cuda", (("gpu_mem_limit", "100"), ("device_id", "3"))), Provider("tensorrt")]
    entries = dict(plan(wanted, {}, False, device_id=1, engine_cache=Path("/cache")).entries)
    assert entries["CUDAExecutionProvider"] == {"gpu_mem_limit": "100", "device_id": "3"}
    assert entries["TensorrtExecutionProvider"] == {
        "device_id": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "/cache",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": "/cache",
    }
    assert entries["CPUExecutionProvider"] == {}


def test_a_broken_provider_is_an_error_naming_it_and_the_reason() -> None:
    with pytest.raises(ModelLoadError) as caught:
        plan([Provider("cuda")], {"cuda": "no driver"}, False)
    assert caught.value.message == "Execution provider cuda is wanted but does not work here: no driver."


def test_a_declared_fallback_goes_on_and_says_so() -> None:
    found = plan([Provider("tensorrt"), Provider("cuda")], {"tensorrt": "no library", "cuda": "no driver"}, True)
    assert [name for name, _ in found.entries] == ["CPUExecutionProvider"]
    assert not found.on_device
    assert found.required == ()
    assert found.notes == (
        "execution provider tensorrt does not work here (no library): going on without it",
        "execution provider cuda does not work here (no driver): going on without it",
    )


def test_tensorrt_alone_needs_no_cuda_behind_it() -> None:
    assert names("tensorrt", broken={"cuda": "x"}) == ["TensorrtExecutionProvider", "CPUExecutionProvider"]


def test_an_unknown_provider_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="Unknown execution provider 'gpu': known are cpu, cuda, tensorrt"):
        plan([Provider("gpu")], {}, True)
