r"""Worker processes that can be killed: each item has a deadline, whatever the function does.

    with WorkerPool("grading.equality:equal_to_any", workers=2, deadline=5) as pool:
        outcome = pool.submit(r"\frac12", ["0.5"]).result()     # Outcome("ok", True, "", 0.003)

SymPy can't be interrupted from a thread and a user's reward can do anything, so items run in
processes of their own. One spare has loaded the function already and takes over after a kill.
Workers are new interpreters (no fork: no CUDA context, no torch, no copy of the caller's
`__main__`) that read and write JSON lines. Promises, each with a test:

- The deadline counts from the moment that a worker takes the item, not while it waits.
- An exception, a hang or a death of the worker is an Outcome; every Future is resolved.
- Memory is bounded (RLIMIT_AS). `submit` may be called from any thread.
- No worker outlives the pool or its parent, even one killed with SIGKILL (Linux: parent-death
  signal; elsewhere: end of file on the pipe).
- A worker's kill also ends what the function started, in whatever session (Linux: found by an
  environment variable; elsewhere only the worker's process group).
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import json
import os
import queue
import select
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
    value: object  # what the function returned (JSON types)
    why: str
    seconds: float


class WorkerDied(Exception):
    """The worker closed its pipe: out of memory, os._exit, segmentation fault."""


class _Worker:
    """One process and the two ends of its pipes. One thread at a time uses it."""

    def __init__(self, function: str, memory_gb: float):
        # -c, so that the child's __main__ is neither this file nor the caller's script
        path = [_ROOT, os.getcwd()]
        code = f"import sys; sys.path[:0] = {path!r}; from grading import workers as w; w.serve()"
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, function, str(memory_gb), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: self.mark},
        )
        self.buffer = b""
        for pipe in (self.process.stdin, self.process.stdout):
            os.set_blocking(pipe.fileno(), False)

    def ask(self, item: object, seconds: float) -> dict | None:
        """Send one item (None: only listen), wait for one reply; None when the time is up."""
        end = time.monotonic() + seconds
        unsent = memoryview(b"" if item is None else json.dumps(item).encode() + b"\n")
        reader, writer = self.process.stdout.fileno(), self.process.stdin.fileno()
        while unsent:  # a long text doesn't fit in the pipe at once
            if not _wait(writer, select.POLLOUT, end):
                return None
            try:
                unsent = unsent[os.write(writer, unsent) :]
            except BrokenPipeError:
                raise WorkerDied from None
        while b"\n" not in self.buffer:
            if not _wait(reader, select.POLLIN, end):
                return None
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                raise WorkerDied
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

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
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def _wait(fd: int, event: int, end: float) -> bool:
    """Is the pipe ready before `end`? poll, since select fails on file descriptors above 1,023."""
    poll = select.poll()
    poll.register(fd, event)
    left = end - time.monotonic()
    return left > 0 and bool(poll.poll(left * 1000))


class WorkerPool:
    """`workers` killable processes and one spare behind one queue.

    function: "module:name" or "path/file.py:name" of a function of JSON values, or of a class whose
    instance is called. deadline: seconds per item. memory_gb: address space of a worker. counters:
    taken, ok, timeout, error, kills. Raises ValueError if the function can't be loaded.
    """

    def __init__(
        self, function: str, workers: int = 2, deadline: float = 5.0, memory_gb: float = 4.0
    ):
        if workers < 1 or deadline <= 0:
            raise ValueError(f"needs workers >= 1 and deadline > 0, got {workers} and {deadline}")
        self.function, self.deadline, self.memory_gb = function, deadline, memory_gb
        self.counters: Counter[str] = Counter()
        self.longest = 0.0  # seconds from the taking of an item to its result, kill included
        self._pid, self._lock, self._closed = os.getpid(), threading.Lock(), threading.Event()
        self._items: queue.SimpleQueue = queue.SimpleQueue()
        self._wanted: queue.SimpleQueue = queue.SimpleQueue()  # one entry for each worker to start
        self._ready: queue.SimpleQueue = queue.SimpleQueue()  # workers, or why one couldn't start
        self._alive: set[_Worker] = set()
        for _ in range(workers + 1):
            self._wanted.put(True)
        # one thread starts all workers: the parent-death signal fires when that thread ends
        self._threads = [threading.Thread(target=self._start_workers, daemon=True)]
        self._threads[0].start()
        atexit.register(self.close)
        first = self._ready.get()
        if isinstance(first, str):
            self.close()
            raise ValueError(f"reward function {function!r} can't be loaded: {first}")
        self._ready.put(first)
        for _ in range(workers):
            self._threads.append(threading.Thread(target=self._serve_items, daemon=True))
            self._threads[-1].start()

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
            first = not self._closed.is_set()
            self._closed.set()
            alive = list(self._alive)
        for worker in alive:  # ends the wait of the thread that uses it
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.process.pid, signal.SIGKILL)
        for _ in self._threads if first else ():
            self._items.put(None)
            self._ready.put("the pool is closed")
        self._wanted.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)
        for worker in alive:
            self._discard(worker)
        with contextlib.suppress(queue.Empty):
            while True:
                if (entry := self._items.get_nowait()) is not None:
                    entry[0].cancel()
        atexit.unregister(self.close)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def pids(self) -> list[int]:
        with self._lock:
            return [w.process.pid for w in self._alive]

    def _start_workers(self) -> None:
        while self._wanted.get() and not self._closed.is_set():
            worker = None
            try:
                worker = _Worker(self.function, self.memory_gb)
                with self._lock:
                    self._alive.add(worker)
                hello = None if self._closed.is_set() else worker.ask(None, START_SECONDS)
                problem = hello["why"] if hello else f"no answer in {START_SECONDS} s"
            except WorkerDied:
                problem = "the worker died on start (memory limit too low?)"
            except Exception as e:  # noqa: BLE001  no process, no memory, no file descriptor
                problem = f"no worker could be started: {e}"
            if problem and worker:
                self._discard(worker)
            self._ready.put(problem or worker)

    def _serve_items(self) -> None:
        worker = None
        while entry := self._items.get():
            future, args = entry
            if self._closed.is_set() or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            worker = self._living(worker)
            begin = time.monotonic()
            outcome, spent = self._ask(worker, args)
            if spent and isinstance(worker, _Worker):
                self._replace(worker)
                worker = None
            seconds = time.monotonic() - begin
            with self._lock:
                self.counters.update(["taken", outcome.status])
                self.counters["kills"] += spent
                self.longest = max(self.longest, seconds)
            future.set_result(outcome._replace(seconds=seconds))

    def _living(self, worker: _Worker | str | None) -> _Worker | str:
        """The worker, or the next ready one if it died idle; why, if three don't start."""
        for _ in range(3):
            while isinstance(worker, _Worker) and worker.process.poll() is not None:
                self._replace(worker)
                worker = self._ready.get()
            if isinstance(worker, _Worker) or self._closed.is_set():
                break
            if isinstance(worker, str):
                self._wanted.put(True)
            worker = self._ready.get()
        return worker or "the pool is closed"

    def _ask(self, worker: _Worker | str, args: tuple) -> tuple[Outcome, bool]:
        """The Outcome of one item, and whether its worker must be replaced."""
        if isinstance(worker, str):
            return Outcome("error", None, worker, 0.0), False
        try:
            reply = worker.ask(args, self.deadline)
        except WorkerDied:
            return Outcome("error", None, "the worker died (memory limit?)", 0.0), True
        except Exception as e:  # noqa: BLE001  arguments that aren't JSON, a reply that isn't
            return Outcome("error", None, f"{type(e).__name__}: {e}", 0.0), True
        if reply is None:
            return Outcome("timeout", None, f"killed after {self.deadline:g} s", 0.0), True
        return Outcome(reply["status"], reply["value"], reply["why"], 0.0), reply["spent"]

    def _replace(self, worker: _Worker) -> None:
        self._wanted.put(True)
        self._discard(worker)

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        with self._lock:
            self._alive.discard(worker)


# ------------------------------------------------------------------------------ inside the worker
def serve() -> None:
    """argv: function, memory in GB, pid of the parent. Replies to each line; ends with the pipe."""
    global IN_WORKER
    IN_WORKER = True
    name, memory_gb, parent = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    _die_with_parent(parent)
    replies, items = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0), "r")
    os.dup2(2, 1)  # a print in a user's reward goes to stderr, not into the replies
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    _limit_memory(memory_gb)
    try:
        function = load(name)
        getattr(function, "warm_up", int)()  # what should be done once, outside any deadline
    except Exception as e:  # noqa: BLE001
        return _reply(replies, "error", why=f"{type(e).__name__}: {e}")
    _reply(replies, "ok")
    for line in items:
        try:
            _reply(replies, "ok", function(*json.loads(line)))
        except MemoryError:
            _reply(replies, "error", why="out of memory", spent=True)
        except (Exception, SystemExit) as e:  # noqa: BLE001
            where = traceback.extract_tb(e.__traceback__)[-1]
            place = f"({os.path.basename(where.filename)}:{where.lineno})"
            _reply(replies, "error", why=f"{type(e).__name__}: {str(e)[:400]} {place}")


def load(name: str) -> Callable:
    """`package.module:name` or `path/file.py:name` → the function, or an instance of the class."""
    module, _, attribute = name.rpartition(":")
    if not module or not attribute:
        raise ValueError(f"{name!r} must read module:function or file.py:function")
    if module.endswith(".py"):
        file = Path(module).resolve()
        if not file.is_file():
            raise ValueError(f"there is no file {file}")
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
    return function() if isinstance(function, type) else function


def _reply(stream, status: str, value: object = None, why: str = "", spent: bool = False) -> None:
    reply = dict(status=status, value=value, why=why, spent=spent)
    try:  # numpy and torch scalars are numbers
        text = json.dumps(reply, default=lambda scalar: scalar.item())
    except Exception:  # noqa: BLE001
        why = f"returned {type(value).__name__}, which isn't a JSON value"
        text = json.dumps(dict(status="error", value=None, why=why, spent=spent))
    stream.write(text + "\n")
    stream.flush()


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before the signal was asked for
        os._exit(1)


def _limit_memory(memory_gb: float) -> None:
    import resource

    wanted = int(memory_gb * 2**30)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
