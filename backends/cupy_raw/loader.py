"""Kernels by name: compiled on first use, kept on disk, launched by one call.

A kernel takes one argument, a struct passed by value, so that a launch is one pointer. Nothing here
knows what a kernel computes.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import addressof, c_char_p
from functools import cache, partial
from importlib import metadata
from typing import Any

from scfa_core.backends.cupy_raw import disk_cache, nvrtc
from scfa_core.backends.cupy_raw.nvrtc import Constants, compile_to_cubin

from scfa_core.environment import Choice
from scfa_core.errors import BackendUnavailable

__all__ = [
    "Kernel",
    "compile_to_cubin",
    "compute_capability",
    "get_kernel",
    "preload",
    "shared_limit",
    "side_by_side",
]

_LOG = logging.getLogger("scfa_core")
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_DEFAULT_SHARED_LIMIT = 48 * 1024
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_MAJOR, _MINOR = 75, 76  # cudaDevAttrComputeCapability{Major,Minor}
_SHARED_OPTIN = 97  # cudaDevAttrMaxSharedMemoryPerBlockOptin
_MULTIPROCESSORS = 16  # cudaDevAttrMultiProcessorCount
_sanitize = Choice("SCFA_CUPY_SANITIZE", "0", "1")
_limit_lock = threading.Lock()  # of kernels' limits of shared memory


# Illegal address, launch timeout, assert, and what else a kernel may do that nothing survives.
_BREAK_THE_CONTEXT = (700, 702, 710, *range(714, 720))


def _cuda_error(what: str, error: Any) -> Exception:
    """Turn CuPy's driver error into one that says what was being done."""
    if getattr(error, "status", None) == _OUT_OF_MEMORY:
        return MemoryError(
            f"the GPU has no memory left {what}; free some and call again (the process is fine)"
        )
    cure = ""
    if getattr(error, "status", None) in _BREAK_THE_CONTEXT:
        cure = (
            ". Every later call on this GPU fails in this process: start a new one. The cause may "
            "lie in an earlier kernel of any library; CUDA_LAUNCH_BLOCKING=1 shows which"
        )
    return RuntimeError(f"CUDA failed {what}: {error}{cure}")


class Kernel:
    """One compiled kernel on one device.

    Attributes
    ----------
    name : str
        Symbol in the cubin.
    device : int
        CUDA ordinal it is loaded on.
    """

    def __init__(self, name: str, cubin: bytes, device: int) -> None:
        import cupy
        from cupy_backends.cuda.api import driver

        self.name = name
        self.device = device
        self._driver = driver
        self._device = cupy.cuda.Device(device)
        self._shared_limit = _DEFAULT_SHARED_LIMIT
        with self._device:
            cupy.cuda.runtime.free(0)  # makes the primary context current on this thread
            self._context = driver.ctxGetCurrent()
            try:
                self._module = driver.moduleLoadData(cubin)  # lives as long as the process
                self._function = driver.moduleGetFunction(self._module, name)
            except driver.CUDADriverError as error:
                raise _cuda_error(f"while loading {name}", error) from error

    def attribute(self, number: int) -> int:
        """Return one CU_FUNC_ATTRIBUTE of the kernel, such as 4 for registers per thread."""
        with self._device:
            return int(self._driver.funcGetAttribute(number, self._function))

    def _allow_shared(self, shared_bytes: int) -> None:
        """Raise the kernel's limit of dynamic shared memory; never lower what a thread has set."""
        with _limit_lock:
            if shared_bytes > self._shared_limit:
                self._driver.funcSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared_bytes)
                self._shared_limit = shared_bytes

    def launch(
        self,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        stream: int,
        params: Any,
    ) -> None:
        """Enqueue the kernel; returns at once and never synchronises.

        Parameters
        ----------
        grid : tuple of three int
            Blocks along x, y, z.
        block : int
            Threads per block, all along x.
        shared_bytes : int
            Dynamic shared memory of a block; beyond 48 KB the limit is raised here.
        stream : int
            Raw stream handle of this kernel's device.
        params : bytes or NumPy scalar
            The kernel's only argument; read before this returns.

        Raises
        ------
        MemoryError
            The device has no memory left for the launch.
        RuntimeError
            The driver refused the launch, or an earlier kernel of the process had failed.
        """
        params = params if type(params) is bytes else params.tobytes()
        self.bind(grid, block, shared_bytes)(stream, params)

    def bind(
        self, grid: tuple[int, int, int], block: int, shared_bytes: int
    ) -> Callable[[int, bytes], None]:
        """Return `launch` with all but the stream and the argument settled.

        A caller's thread may be on another device, or on none yet: nothing but the context changes
        meanwhile. Runtime calls could wait, create contexts, or break a capture under way.
        """
        driver, context, function = self._driver, self._context, self._function
        get_current, launch_kernel = driver.ctxGetCurrent, driver.launchKernel
        x, y, z = grid

        def enqueue(stream: int, params: bytes) -> None:
            pointer = c_char_p(params)  # to the bytes themselves, which outlive the launch
            current = get_current()
            if current != context:
                driver.ctxSetCurrent(context)
            try:
                if shared_bytes > self._shared_limit:
                    self._allow_shared(shared_bytes)
                at = addressof(pointer)
                launch_kernel(function, x, y, z, block, 1, 1, shared_bytes, stream, at, 0)
            except driver.CUDADriverError as error:
                what = f"while launching {self.name} with {grid=}, {block=}, {shared_bytes=}"
                raise _cuda_error(what, error) from error
            finally:
                if current != context:
                    driver.ctxSetCurrent(current)

        return enqueue


@cache
def compute_capability(device: int) -> tuple[int, int]:
    """Return (major, minor) of a CUDA device."""
    from cupy.cuda import runtime

    read = runtime.deviceGetAttribute
    return int(read(_MAJOR, device)), int(read(_MINOR, device))


@cache
def shared_limit(device: int) -> int:
    """Return the bytes of shared memory that a block may have."""
    from cupy.cuda import runtime

    return int(runtime.deviceGetAttribute(_SHARED_OPTIN, device))


@cache
def multiprocessors(device: int) -> int:
    """Return the multiprocessors of a card."""
    from cupy.cuda import runtime

    return int(runtime.deviceGetAttribute(_MULTIPROCESSORS, device))


@cache
def _target(device: int, arch_suffix: str) -> str:
    """Return the architecture to compile for: the card's own, or an older one of its family.

    A cubin runs on every later card of the same major number, unless it has a suffix.
    """
    major, minor = compute_capability(device)
    known = nvrtc.cupy_compiler().architectures()
    usable = [arch for arch in known if arch // 10 == major and arch % 10 <= minor]
    if not usable or (arch_suffix and max(usable) != 10 * major + minor):
        version = ".".join(map(str, nvrtc.cupy_compiler().version()))
        raise BackendUnavailable(
            f"NVRTC {version} cannot compile for compute capability {major}.{minor}: install a "
            "newer CuPy and CUDA runtime (pip install --upgrade 'cupy-cuda13x[ctk]')"
        )
    return f"{max(usable)}{arch_suffix}"


@cache
def _package_version() -> str:
    try:
        return metadata.version("scfa-core")
    except metadata.PackageNotFoundError:
        return "unknown"


@cache
def _sources_digest() -> str:
    """Return a digest of every source file: a header edit renews all cubins."""
    digest = hashlib.sha256()
    for name, text in nvrtc.read_sources().items():
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()


def cache_key(source: str, constants: Constants, arch: str, version: tuple[int, int]) -> str:
    """Return the file stem of a cubin: readable front, digest of all that shapes the code."""
    options = nvrtc.compile_options(constants, arch)
    parts = (_sources_digest(), source, *options, str(version), _package_version())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return f"{source.removesuffix('.cu')}-sm_{arch}-{digest}"


def _cubin(source: str, constants: Constants, arch: str) -> bytes:
    """Return the cubin from disk, or compile it and keep it there."""
    compiler = nvrtc.cupy_compiler()
    key = cache_key(source, constants, arch, compiler.version())
    cubin = disk_cache.load(key)
    if cubin is not None:
        return cubin
    told = ", ".join(f"{name}={value}" for name, value in constants)
    _LOG.info("compiling %s (sm_%s, %s), about 5 s, once per machine", source, arch, told)
    start = time.perf_counter()
    cubin = compile_to_cubin(source, constants, arch, compiler).cubin
    _LOG.debug("compiled %s in %.1f s", key, time.perf_counter() - start)
    disk_cache.store(key, cubin)
    return cubin


def _of_this_build(constants: Constants, arch_suffix: str) -> Constants:
    """Return the constants of a kernel in the build that $SCFA_CUPY_SANITIZE asks for.

    "1" is Hopper's kernels made of what compute-sanitizer can follow: kSanitize in mbarrier.cuh.
    """
    asked = _sanitize.word(_sanitize.get()) == "1"
    return (*constants, ("SANITIZE", 1)) if arch_suffix and asked else constants


_kernels: dict[tuple[str, str, Constants, int, str], Kernel] = {}
_locks: dict[tuple[str, str, Constants, int, str], threading.Lock] = {}
_registry_lock = threading.Lock()


def get_kernel(
    name: str, source: str, constants: Constants, device: int, *, arch_suffix: str = ""
) -> Kernel:
    """Return a kernel, compiling it the first time any process of this machine asks for it.

    >>> kernel = get_kernel("scfa_fwd", "fwd.cu", (("HEAD_DIM", 64),), 0)

    Parameters
    ----------
    name : str
        The ``extern "C"`` symbol.
    source : str
        File name under ``cuda/``.
    constants : tuple of (str, int)
        Each becomes ``-DSCFA_<KEY>=<int>``.
    device : int
        CUDA ordinal.
    arch_suffix : str, optional
        ``"a"`` compiles for sm_90a instead of sm_90.

    Returns
    -------
    Kernel
        The same object for the same arguments. Threads that ask at once wait for one compilation.

    Raises
    ------
    BackendUnavailable
        NVRTC does not know the card, or $SCFA_CUPY_SANITIZE is neither 0 nor 1.
    CompileError
        The source does not compile.
    MemoryError
        The card has no memory left for the code.
    """
    constants = _of_this_build(constants, arch_suffix)
    request = (name, source, constants, device, arch_suffix)
    kernel = _kernels.get(request)
    if kernel is not None:
        return kernel
    with _registry_lock:
        lock = _locks.setdefault(request, threading.Lock())
    with lock:
        kernel = _kernels.get(request)
        if kernel is None:
            cubin = _cubin(source, constants, _target(device, arch_suffix))
            kernel = _kernels[request] = Kernel(name, cubin, device)
    return kernel


_met: set[Hashable] = set()


def side_by_side(what: Hashable, makers: Sequence[Callable[[], object]]) -> None:
    """Call all `makers` of kernels at once, in threads, the first time that `what` is named.

    A kernel takes seconds to compile, and NVRTC lets other threads run meanwhile.
    """
    if what not in _met:
        _call_all(makers, len(makers))
        _met.add(what)


def _call_all(makers: Iterable[Callable[[], object]], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        jobs: list[Future[object]] = []
        for make in makers:
            try:
                jobs.append(pool.submit(make))
            except RuntimeError:  # the system gives no further thread
                make()  # made once, though a thread that is there may ask for it as well
        for job in jobs:
            job.result()


def preload(
    requests: Iterable[tuple[str, str, Constants, str]], device: int, threads: int = 8
) -> None:
    """Compile and load several kernels side by side.

    Each request is (name, source, constants, arch_suffix) as for `get_kernel`.
    """
    makers = [
        partial(get_kernel, name, source, constants, device, arch_suffix=suffix)
        for name, source, constants, suffix in requests
    ]
    _call_all(makers, threads)
