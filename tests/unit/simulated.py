"""Run a test file as a program in numba's CUDA simulator: it is chosen before numba is imported."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path


def report_of(file):
    """What `file`, run as a program, prints last: JSON."""
    done = subprocess.run(
        [sys.executable, str(Path(file).resolve())],
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def by_turns():
    """Let the threads of a block run one at a time, each up to where it waits for others.

    The simulator lets all of them run and asks each, again and again, whether it waits; that, and
    not the kernels, takes most of the time. Of threads that may go on, the last that waited does:
    each turn goes through them in the order opposite to the one before.
    """
    from numba.cuda.simulator import kernel
    from scfa_core.backends.numba_cuda import plan_twins

    class Block(kernel.BlockManager):
        def run(self, grid_point, *arguments):
            places = list(kernel.np.ndindex(*self._block_dim))
            rest = (self, grid_point)
            self.ready = [
                Thread(lambda: self._f(*arguments), *rest, place, self._debug)
                for place in reversed(places)
            ]
            self.left, self.waiting, self.error = len(places), [], None
            self.ended = threading.Lock()
            self.ended.acquire()
            self.pass_on(None)
            self.ended.acquire()
            if self.error:
                raise self.error[0].with_traceback(self.error[1])

        def pass_on(self, thread):
            """Let a thread go on now that `thread` waits or has ended; whether it is `thread`."""
            if not self.ready and len(self.waiting) == self.left:
                self.ready, self.waiting = self.waiting, []
            if self.left and not self.ready:
                self.error = self.error or (RuntimeError("lanes wait for others of a warp"), None)
            if self.error or not self.left:
                self.ended.release()  # those who wait after an error wait for ever
                return False
            following = self.ready.pop()
            if following is not thread:
                following.go_on()
            return following is thread

    class Thread(kernel.BlockThread):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.turn = threading.Lock()
            self.turn.acquire()

        def go_on(self):
            if self.ident is None:
                self.start()
            else:
                self.turn.release()

        def run(self):
            super().run()
            block = self._manager
            block.left -= 1
            block.error = self.exception
            block.pass_on(self)

        def wait(self):
            if not self._manager.pass_on(self):
                self.turn.acquire()

        def syncthreads(self):
            self._manager.waiting.append(self)
            self.wait()

    class Warp(plan_twins._Warp):
        def __init__(self):
            super().__init__()
            self.barrier, self.waiting = self, []

        def wait(self):
            thread = threading.current_thread()
            self.waiting.append(thread)
            if len(self.waiting) == plan_twins.LANES:
                thread._manager.ready += self.waiting
                self.waiting.clear()
            thread.wait()

    kernel.BlockManager, plan_twins._Warp = Block, Warp
