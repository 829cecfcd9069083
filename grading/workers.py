r"""Worker processes that can be killed: each item has a deadline, whatever the function does.

    with WorkerPool("grading.equality:equal_to_any", workers=2, deadline=5) as pool:
        outcome = pool.submit(r"\frac12", ["0.5"]).result()     # Outcome("ok", True, "", 0.003)

SymPy can't be interrupted from a thread and a user's reward can do anything, so items run in new
interpreters (no fork, no CUDA context, no torch) that read and write JSON lines. Each has a test:

- The deadline counts from the moment that a worker takes the item, not while it waits.
- An exception, a hang or a death of the worker is an Outcome; every Future is resolved.
- One spare has loaded the function already, so a kill costs the next item nothing.
- Memory is bounded (RLIMIT_AS). `submit` may be called from any thread.
- No worker outlives the pool or its parent, even one killed with SIGKILL, nor does what the
  function started, in whatever session (Linux; elsewhere: end of file, the process group).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib.util
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

IN_WORKER = False  # set in the worker: code that would start a pool runs directly there
START_SECONDS = 120  # a worker that hasn't loaded its function by then has failed to start
MARK = "GRADING_WORKER"  # environment variable that marks a worker and all that it starts
_ROOT = str(Path(__file__).resolve().parent.parent)


class Outcome(NamedTuple):
    status: str  # ok | timeout | error
    value: object = None  # what the function returned (JSON types)
    why: str = ""
    seconds: float = 0.0


class _Worker:
    """One process and its two pipes. One thread at a time uses it."""

    def __init__(self, function: str, memory_gb: float):
        # -c, so that the child's __main__ is neither this file nor the caller's script
        path = [_ROOT, os.getcwd()]
        code = f"import sys; sys.path[:0] = {path!r}; from grading import workers as w; w.serve()"
        self.mark, self.expired, self.spent = uuid.uuid4().hex, False, False
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, function, str(memory_gb), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: self.mark},
        )

    def ask(self, item: object, seconds: float) -> Outcome:
        """Send one item (None: only listen), read one reply. Sets `spent` if it must be replaced.

        The kill at the deadline closes the other ends of the pipes: no wait in here is longer.
        """
        self.spent, line, timer = True, b"", threading.Timer(seconds, self._expire)
        timer.start()
        try:
            if item is not None:
                self.process.stdin.write(json.dumps(item).encode() + b"\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            pass  # it died, and the line is empty
        except (TypeError, ValueError) as e:
            return Outcome("error", why=f"the arguments aren't JSON values: {e}")
        finally:
            timer.cancel()
            timer.join()
        if self.expired:
            return Outcome("timeout", why=f"killed after {seconds:g} s")
        if not line.endswith(b"\n"):
            return Outcome("error", why="the worker died (memory limit?)")
        reply = json.loads(line)
        self.spent = reply.pop("spent")
        return Outcome(**reply)

    def _expire(self) -> None:
        self.expired = True
        self.kill()

    def kill(self) -> None:
        """End the worker and what it started: its group, then whatever carries its mark."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        mark = f"{MARK}={self.mark}".encode()
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in entry.read_bytes():
                    os.kill(int(entry.parent.name), signal.SIGKILL)
        self.process.wait()


class WorkerPool(contextlib.AbstractContextManager):
    """`workers` killable processes, and one spare, behind one queue.

    function: "module:name" or "path/file.py:name" of a function of JSON values, or of a class whose
    instance is called. deadline: seconds per item. memory_gb: address space of a worker. counters:
    started, ok, timeout, error, kills. Raises ValueError if the function can't be loaded.
    """

    def __init__(
        self, function: str, workers: int = 2, deadline: float = 5.0, memory_gb: float = 4.0
    ):
        if workers < 1 or deadline <= 0:
            raise ValueError(f"needs workers >= 1 and deadline > 0, got {workers} and {deadline}")
        self.function, self.deadline, self.memory_gb = function, deadline, memory_gb
        self.counters: Counter[str] = Counter()
        self._pid, self._lock, self._closed = os.getpid(), threading.Lock(), threading.Event()
        self._items, self._first = queue.SimpleQueue(), queue.SimpleQueue()
        self._alive: set[_Worker] = set()
        self._failure = ""  # why the last worker that didn't start didn't
        self._turns = threading.Semaphore(workers)  # one thread more than that waits: the spare
        self._threads = []
        for _ in range(workers + 1):
            self._threads.append(threading.Thread(target=self._serve, daemon=True))
            self._threads[-1].start()
        atexit.register(self.close)
        if self._first.get() is None:
            why = self._failure  # before close, which kills those that are still starting
            self.close()
            raise ValueError(f"reward function {function!r} can't be loaded: {why}")

    def submit(self, *args: object) -> Future:
        """Queue function(*args). The result is an Outcome; cancelled if the pool closes before."""
        if os.getpid() != self._pid:
            raise RuntimeError("this pool belongs to another process; make one after the fork")
        future: Future = Future()
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("the worker pool is closed")
            self._items.put((future, args))
        return future

    def close(self) -> None:
        """Kill the workers and cancel what waits. Safe to call twice, from any thread."""
        with self._lock:
            self._closed.set()
            alive = list(self._alive)
        for worker in alive:  # ends the wait of the thread that uses it
            worker.kill()
        for _ in self._threads:
            self._items.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)
        atexit.unregister(self.close)

    def __exit__(self, *exc: object) -> None:
        self.close()

    def pids(self) -> list[int]:
        with self._lock:
            return [w.process.pid for w in self._alive]

    def _serve(self) -> None:
        """One thread for one process: it lives as long, since its end is the parent's death."""
        worker = self._living(None)
        self._first.put(worker)
        while True:
            with self._turns:
                if (entry := self._items.get()) is None:
                    return self._discard(worker)
                future, args = entry
                if self._closed.is_set() or not future.set_running_or_notify_cancel():
                    future.cancel()
                    continue
                worker = self._living(worker, tries=3)  # it may have died while idle
                begin, outcome = time.monotonic(), Outcome("error", why=self._failure)
                if worker:
                    outcome = worker.ask(args, self.deadline)
                outcome = outcome._replace(seconds=time.monotonic() - begin)
                with self._lock:
                    self.counters[outcome.status] += 1
                    self.counters["kills"] += bool(worker and worker.spent)
                future.set_result(outcome)
            worker = self._living(worker)

    def _living(self, worker: _Worker | None, tries: int = 0) -> _Worker | None:
        """The worker, or a new one in its place; None if none starts: after `tries` (0: any number,
        as long as another lives), or at once where none has ever started."""
        while worker is None or worker.spent or worker.process.poll() is not None:
            self._discard(worker)
            worker, tries = self._start(), tries - 1
            last = tries == 0 or not self._alive or not self.counters["started"]
            if worker is None and (last or self._closed.wait(1)):
                break
        return worker

    def _start(self) -> _Worker | None:
        try:
            worker = _Worker(self.function, self.memory_gb)
        except Exception as e:  # noqa: BLE001  no process, no memory, no file descriptor
            self._failure = f"no worker could be started: {e}"
            return None
        with self._lock:
            self._alive.add(worker)
            late = self._closed.is_set()  # close() hasn't seen this one
        hello = worker.ask(None, 0 if late else START_SECONDS)
        if hello.status == "ok":
            self.counters["started"] += 1
            return worker
        self._failure = hello.why
        self._discard(worker)
        return None

    def _discard(self, worker: _Worker | None) -> None:
        if worker:
            worker.kill()
            with self._lock:
                self._alive.discard(worker)


# ------------------------------------------------------------------------------ inside the worker
def serve() -> None:
    """argv: function, memory in GB, pid of the parent. Replies to each line; ends with the pipe."""
    global IN_WORKER
    IN_WORKER = True
    name, memory, parent = sys.argv[1], int(float(sys.argv[2]) * 2**30), int(sys.argv[3])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before the signal was asked for
        os._exit(1)
    with contextlib.suppress(ValueError, OSError):  # a lower limit, or macOS
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies, items = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0), "r")
    os.dup2(2, 1)  # a print in a user's reward goes to stderr, not into the replies
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    loaded: list[Callable] = []
    if _reply(replies, lambda: loaded.append(load(name))):
        for line in items:
            _reply(replies, loaded[0], *json.loads(line))


def _reply(stream, function: Callable, *args: object) -> bool:
    reply = dict(status="ok", value=None, why="", spent=False)
    try:
        text = json.dumps(reply | {"value": function(*args)}, default=float)  # scalars of numpy
    except (Exception, SystemExit) as e:  # noqa: BLE001
        place = traceback.extract_tb(e.__traceback__)[-1]
        why = f"{type(e).__name__}: {str(e)[:400]}"
        why += f" ({os.path.basename(place.filename)}:{place.lineno})"
        reply |= dict(status="error", why=why, spent=isinstance(e, MemoryError))
        text = json.dumps(reply)
    stream.write(text + "\n")
    stream.flush()
    return reply["status"] == "ok"


def load(name: str) -> Callable:
    """`package.module:name` or `path/file.py:name` → the function, or an instance of the class."""
    module, _, attribute = name.rpartition(":")
    if not module or not attribute:
        raise ValueError(f"{name!r} must read module:function or file.py:function")
    if module.endswith(".py"):
        file = Path(module).resolve()
        sys.path.append(str(file.parent))  # so that it can import its neighbours
        spec = importlib.util.spec_from_file_location(f"user_{file.stem}", file)
        loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    else:
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as e:
            looked = f"looked for in {os.getcwd()}, {_ROOT} and the installed packages"
            raise ValueError(f"{e} ({looked}; a file is given as path/file.py:name)") from None
    function = getattr(loaded, attribute, None)
    if not callable(function):
        raise ValueError(f"{module!r} has no function or class {attribute!r}")
    function = function() if isinstance(function, type) else function
    getattr(function, "warm_up", int)()  # what should be done once, outside any deadline
    return function
