"""CUDA sources compiled as C++ of this machine, to run on the fibers of cuda_on_host.hpp."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from once import locked

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
NEEDS_COMPILER = pytest.mark.skipif(
    COMPILER is None, reason="no C++ compiler (g++ or clang++) here"
)
_MACHINE = (
    *("-std=c++17", "-w", "-fPIC", "-ffp-contract=off", "-fvisibility-inlines-hidden"),
    "-fno-exceptions",
    # fmaf and float16 as instructions, of the same results as the calls that they replace
    *(("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
OPTIONS = (  # of each variant
    # -Og compiles fastest, and what it makes is not slower than that of -O1
    *(*_MACHINE, "-Og"),
    *("-fsanitize=signed-integer-overflow,shift,bounds", "-fsanitize-undefined-trap-on-error"),
)
# The usual linker takes a tenth of a second for the symbols of libstdc++, for each variant.
LINKED = ("-shared", *(("-fuse-ld=gold",) if shutil.which("ld.gold") else ()))
HEADERS = sorted(HERE.glob("*_on_host.hpp"))
# What these declare, in parts of one source: each may use what is before it.
PLAYERS = [HERE / f"{x}_on_host.cpp" for x in ("cuda", "ptx", "memory", "products", "machine")]


def played(folder):
    """Object file of what the headers `*_on_host.hpp` declare: made once in `folder`."""
    options = *_MACHINE, "-O3", "-ffp-contract=fast"  # products of vectors, as fmaf rounds
    made = folder / f"{_digest(*options, *(x.read_text() for x in (*HEADERS, *PLAYERS)))}.o"
    with locked(made):
        if not made.exists():
            text = "".join(f'#include "{player}"\n' for player in PLAYERS)
            source = made.with_suffix(".cpp")
            source.write_text(text)
            _make(made, *options, "-c", source)
    return made


def _make(target, *arguments):
    """Whole or not there, should this process be killed."""
    part = target.with_name(f"{target.name}.part")
    command = [COMPILER, "-o", str(part), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    part.replace(target)


class HostCompiler:
    """Compiles each source once, several at a time; of each library, the function `run`."""

    def __init__(self, folder, sources):
        """`sources`: texts of headers and kernels by name, over those of this folder.

        Who has the same sources in the same `folder`, in this process or another, shares what is
        compiled.
        """
        texts = {header.name: header.read_text() for header in HEADERS} | sources
        self.folder = folder / _digest(
            *OPTIONS, *(x for pair in sorted(texts.items()) for x in pair)
        )
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._started: dict[tuple, Future] = {}
        self._played = self._pool.submit(played, folder)
        # Every source begins with it: it is parsed once.
        first = self.folder / "cuda_on_host.hpp"
        parsed = first.with_name(f"{first.name}.gch")
        with locked(self.folder):
            if not parsed.exists():
                self.folder.mkdir(exist_ok=True)
                for name, text in texts.items():
                    (self.folder / name).write_text(text)
                _make(parsed, *OPTIONS, "-x", "c++-header", first)

    def _compile(self, text, constants):
        defines = [f"-DSCFA_{key}={value}" for key, value in constants]
        source = self.folder / f"{_digest(text, *defines)}.cpp"
        target = source.with_suffix(".so")
        with locked(target):
            if not target.exists():
                source.write_text(text)
                first = ("-include", self.folder / "cuda_on_host.hpp")
                linked = self._played.result()
                _make(target, *OPTIONS, *LINKED, *first, *defines, source, linked)
        return ctypes.CDLL(str(target)).run

    def start(self, text, constants):
        """Promise of the function `run` of this source under these constants."""
        key = text, constants
        if key not in self._started:
            self._started[key] = self._pool.submit(self._compile, text, constants)
        return self._started[key]

    def close(self):
        """Wait for what is being compiled."""
        self._pool.shutdown(cancel_futures=True)


def _digest(*parts):
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def aligned_copy(x, alignment=16):
    """Copy whose data begin on a boundary of so many bytes."""
    room = np.empty(x.nbytes + alignment, np.uint8)
    start = -room.ctypes.data % alignment
    y = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    y[...] = x
    return y
