"""Source in, cubin out: NVRTC through CuPy's binding, or from its wheel where there is no CuPy.

Nothing here needs a GPU or a CUDA context. Headers travel in memory, so no include path exists.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from scfa_core.errors import BackendUnavailable, ScfaError

Constants = tuple[tuple[str, int], ...]


class CompileError(ScfaError, RuntimeError):
    """NVRTC refused one of this package's own sources; the message carries its log."""


class Compiled(NamedTuple):
    """One cubin and everything the compiler said about it."""

    cubin: bytes
    log: str


class Compiler(Protocol):
    """The little of NVRTC that is needed."""

    def version(self) -> tuple[int, int]:
        """Version of the library, such as (12, 9)."""

    def architectures(self) -> tuple[int, ...]:
        """Compute capabilities it can compile for, such as (80, 86, 90)."""

    def compile(
        self, name: str, source: str, headers: Mapping[str, str], options: Sequence[str]
    ) -> Compiled:
        """Compile one program; raises `CompileError` with the log."""


class CupyCompiler:
    """NVRTC as CuPy found it."""

    def __init__(self) -> None:
        from cupy_backends.cuda.libs import nvrtc

        self._nvrtc = nvrtc
        major, minor = nvrtc.getVersion()
        self._version = (int(major), int(minor))

    def version(self) -> tuple[int, int]:
        """Version of the library."""
        return self._version

    def architectures(self) -> tuple[int, ...]:
        """Compute capabilities it can compile for."""
        return tuple(self._nvrtc.getSupportedArchs())

    def compile(
        self, name: str, source: str, headers: Mapping[str, str], options: Sequence[str]
    ) -> Compiled:
        """Compile one program."""
        nvrtc = self._nvrtc
        bodies = [body.encode() for body in headers.values()]
        names = [header.encode() for header in headers]
        program = nvrtc.createProgram(source, name, bodies, names)
        try:
            try:
                nvrtc.compileProgram(program, tuple(options))
            except nvrtc.NVRTCError as error:
                raise _refused(name, options, nvrtc.getProgramLog(program)) from error
            # CuPy cuts the last byte of the image, a zero of the section table; put it back.
            return Compiled(nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program))
        finally:
            nvrtc.destroyProgram(program)


class WheelCompiler:
    """NVRTC from the nvidia-cuda-nvrtc wheel, called through ctypes."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path))

    def _check(self, status: int, what: str) -> None:
        if status:
            self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
            message = self._lib.nvrtcGetErrorString(status).decode()
            raise CompileError(f"NVRTC failed in {what}: {message}")

    def version(self) -> tuple[int, int]:
        """Version of the library."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "version")
        return major.value, minor.value

    def architectures(self) -> tuple[int, ...]:
        """Compute capabilities it can compile for."""
        count = ctypes.c_int()
        self._check(self._lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "architectures")
        values = (ctypes.c_int * count.value)()
        self._check(self._lib.nvrtcGetSupportedArchs(values), "architectures")
        return tuple(values)

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        get_size = getattr(self._lib, f"nvrtcGet{what}Size")
        self._check(get_size(program, ctypes.byref(size)), what)
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._lib, f"nvrtcGet{what}")(program, buffer), what)
        return buffer.raw

    def compile(
        self, name: str, source: str, headers: Mapping[str, str], options: Sequence[str]
    ) -> Compiled:
        """Compile one program."""

        def strings(items: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
            return (ctypes.c_char_p * max(len(items), 1))(*(item.encode() for item in items))

        program = ctypes.c_void_p()
        status = self._lib.nvrtcCreateProgram(
            ctypes.byref(program),
            source.encode(),
            name.encode(),
            len(headers),
            strings(list(headers.values())),
            strings(list(headers)),
        )
        self._check(status, "create")
        try:
            status = self._lib.nvrtcCompileProgram(program, len(options), strings(options))
            log = self._text(program, "ProgramLog").rstrip(b"\0").decode()
            if status:
                raise _refused(name, options, log)
            return Compiled(self._text(program, "CUBIN"), log)
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))


def _refused(name: str, options: Sequence[str], log: str) -> CompileError:
    return CompileError(f"NVRTC could not compile {name} with {' '.join(options)}:\n{log}")


@cache
def cupy_compiler() -> Compiler:
    """Return the NVRTC that CuPy found; any exception means that there is none."""
    return CupyCompiler()


@cache
def wheel_compiler() -> Compiler:
    """Return the NVRTC of the nvidia-cuda-nvrtc wheel.

    Raises
    ------
    BackendUnavailable
        The wheel is not installed.
    """
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        found = sorted(Path(root).glob("*/lib*/**/libnvrtc.so.*"))
        if found:
            return WheelCompiler(found[-1])
    raise BackendUnavailable(
        "no NVRTC: pip install nvidia-cuda-nvrtc-cu12, or cupy-cuda12x[ctk] / cupy-cuda13x[ctk]"
    )


def any_compiler() -> Compiler:
    """Return CuPy's NVRTC where there is CuPy, otherwise the wheel's."""
    try:
        return cupy_compiler()
    except (ImportError, OSError, RuntimeError):  # no CuPy, or it found no library
        return wheel_compiler()


@cache
def read_sources() -> dict[str, str]:
    """Return name -> text of every .cu and .cuh of this package, sorted by name."""
    folder = resources.files(__package__) / "cuda"
    files = (item for item in folder.iterdir() if item.name.endswith((".cu", ".cuh")))
    return {item.name: item.read_text("utf-8") for item in sorted(files, key=lambda f: f.name)}


def compile_options(constants: Constants, arch: str) -> tuple[str, ...]:
    """Return NVRTC's options; `arch` is such as "80" or "90a".

    -default-device: generic lambdas would otherwise be taken for functions of the host.
    """
    defines = tuple(f"-DSCFA_{key}={int(value)}" for key, value in constants)
    return ("-std=c++17", "-default-device", f"-arch=sm_{arch}", "--ptxas-options=-v", *defines)


def compile_to_cubin(
    source: str, constants: Constants, arch: str, compiler: Compiler | None = None
) -> Compiled:
    """Compile one file of ``cuda/``; needs neither a GPU nor CuPy.

    Parameters
    ----------
    source : str
        File name, such as ``"fwd.cu"``.
    constants : tuple of (str, int)
        Each becomes ``-DSCFA_<KEY>=<int>``.
    arch : str
        Such as ``"80"`` or ``"90a"``.
    compiler : Compiler, optional
        Default: CuPy's NVRTC, otherwise the wheel's.

    Returns
    -------
    Compiled
        The cubin, and the log with registers, spills and warnings.

    Raises
    ------
    CompileError
        The source does not compile.
    BackendUnavailable
        There is no NVRTC.
    """
    sources = read_sources()
    headers = {name: text for name, text in sources.items() if name.endswith(".cuh")}
    chosen: Any = compiler or any_compiler()
    compiled: Compiled = chosen.compile(
        source, sources[source], headers, compile_options(constants, arch)
    )
    return compiled
