"""Worker processes that can be killed: run `module:function` on items with a deadline each, whatever the
function does.

SymPy can't be interrupted from a thread and a user's reward can do anything, so each item runs in a process
that is killed (with everything it started) when the deadline passes, and a fresh one takes its place. The
workers are new interpreters (`subprocess`, not fork: no CUDA context, no torch, no copy of the caller's
`__main__`), read JSON lines and answer JSON lines.

    with Pool("rewards:grade_equality", workers=2, deadline=5) as pool:
        outcome = pool.submit("\\\\frac12", "0.5").result()      # Outcome("ok", True, "", 0.003)

Promises, each with a test: the deadline runs from the moment that a worker takes the item (never while it
queues or while the interpreter starts); a result comes at most about a second after it; an exception, a hang or
a death of the worker is an Outcome, never an exception; memory is bounded (RLIMIT_AS); `submit` may be called
from any thread; no worker outlives the pool, the interpreter, or a parent that was killed with SIGKILL (Linux:
parent-death signal; elsewhere: end of file on the pipe).
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
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
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

IN_WORKER = False  # set in the worker: code that would start a Pool runs directly there
START_SECONDS = 120  # a worker that hasn't imported its function by then is a configuration error
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Outcome(NamedTuple):
    """status: ok | timeout | error. value: what the function returned (JSON types). seconds: inside the worker."""

    status: str
    value: object
    why: str
    seconds: float


class WorkerDied(Exception):
    """The worker closed its pipe: killed for memory, os._exit, segmentation fault."""


class _Worker:
    """One child process and the two ends of its pipes. Used by one thread only."""

    def __init__(self, function: str, memory_gb: float):
        # -c with the folder on the path, so that the child's __main__ is neither this file nor the caller's script
        code = f"import sys; sys.path[:0] = [{_ROOT!r}, {os.getcwd()!r}]; from grading import workers; workers.worker_main()"
        env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, function, str(memory_gb), str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env=env, cwd=os.getcwd(),
        )  # fmt: skip
        self.buffer = b""
        os.set_blocking(self.process.stdout.fileno(), False)
        os.set_blocking(self.process.stdin.fileno(), False)

    def ask(self, item: object, seconds: float) -> dict | None:
        """Send one item, wait for one reply; None when the time is up. Raises WorkerDied."""
        end = time.monotonic() + seconds
        if item is not None and not self._write(json.dumps(item).encode() + b"\n", end):
            return None
        reader = self.process.stdout.fileno()
        while b"\n" not in self.buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([reader], [], [], left)[0]:
                return None
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                raise WorkerDied
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def _write(self, data: bytes, end: float) -> bool:
        """A long text doesn't fit in the pipe at once, and a stuck worker may never read the rest."""
        view, writer = memoryview(data), self.process.stdin.fileno()
        while view:
            left = end - time.monotonic()
            if left <= 0 or not select.select([], [writer], [], left)[1]:
                return False
            try:
                view = view[os.write(writer, view) :]
            except BrokenPipeError:
                raise WorkerDied from None
        return True

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(
                self.process.pid, signal.SIGKILL
            )  # its own session: also what the function started
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


class Pool:
    """`workers` killable processes behind one queue. Raises ValueError at once if `function` can't be imported there.

    function: "module:function" of JSON values, called as function(*args). deadline: seconds per item.
    memory_gb: RLIMIT_AS of a worker. counters: taken, ok, timeout, error, kills.
    """

    def __init__(
        self, function: str, workers: int = 2, deadline: float = 5.0, memory_gb: float = 4.0
    ):
        if workers < 1 or deadline <= 0:
            raise ValueError(
                f"a pool needs workers >= 1 and deadline > 0, got {workers} and {deadline}"
            )
        self.function, self.deadline, self.memory_gb = function, deadline, memory_gb
        self.counters: Counter[str] = Counter()
        self.longest = (
            0.0  # seconds from the taking of an item to its result, kill included; the worst so far
        )
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._closed = threading.Event()
        self._alive: set[_Worker] = set()
        started: Future = Future()
        self._threads = [
            threading.Thread(target=self._run, args=(started,), daemon=True) for _ in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)
        try:
            started.result()  # the first worker is up, or says why it can't be
        except BaseException:
            self.close()
            raise

    def submit(self, *args: object) -> Future:
        """Queue function(*args); the Future's result is an Outcome (never an exception, except CancelledError
        after `close`).
        """
        future: Future = Future()
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this pool belongs to the process that made it; make one after the fork"
            )
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("the grading pool is closed")
            self._queue.put((future, args))
        return future

    def close(self) -> None:
        """Kill the workers, cancel what waits. Safe to call twice, from any thread."""
        with self._lock:
            first = not self._closed.is_set()
            self._closed.set()
        for _ in self._threads if first else ():
            self._queue.put(None)
        with self._lock:
            alive = list(self._alive)
        for worker in alive:  # ends the wait of the thread that owns it; that thread reaps it
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.process.pid, signal.SIGKILL)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)
        with contextlib.suppress(queue.Empty):
            while True:
                entry = self._queue.get_nowait()
                if entry is not None:
                    entry[0].cancel()
        atexit.unregister(self.close)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def pids(self) -> list[int]:
        with self._lock:
            return [w.process.pid for w in self._alive]

    # Each thread below owns one worker. The parent-death signal is tied to the thread that starts the child, so the
    # same thread starts, feeds and reaps it and lives as long as the pool.

    def _run(self, started: Future) -> None:
        worker = None
        try:
            while not self._closed.is_set():
                worker = worker or self._start(started)
                entry = self._queue.get()
                if entry is None:
                    return
                if self._closed.is_set():
                    entry[0].cancel()
                    return
                worker = self._serve(worker, *entry)
        finally:
            if worker is not None:
                self._reap(worker)

    def _start(self, started: Future) -> _Worker | None:
        """A worker that has imported the function; None if the pool closed or the import failed."""
        worker = None
        try:
            worker = _Worker(self.function, self.memory_gb)
            with self._lock:
                self._alive.add(worker)
            hello = None if self._closed.is_set() else worker.ask(None, START_SECONDS)
            problem = f"no answer in {START_SECONDS} s" if hello is None else hello["why"]
        except WorkerDied:
            problem = "the worker died on start (memory limit too low?)"
        except OSError as e:
            problem = f"no process could be started: {e}"
        if problem and worker is not None:
            self._reap(worker)
            worker = None
        with self._lock:
            if not started.done():
                if problem:
                    started.set_exception(
                        ValueError(f"reward function {self.function!r} can't be loaded: {problem}")
                    )
                else:
                    started.set_result(None)
        return worker

    def _serve(self, worker: _Worker | None, future: Future, args: tuple) -> _Worker | None:
        """One item through one worker; returns the worker, or None where it had to be killed."""
        if not future.set_running_or_notify_cancel():
            return worker
        begin = time.monotonic()
        try:
            reply = (
                worker.ask(args, self.deadline)
                if worker
                else {"status": "error", "value": None, "why": "no worker could be started"}
            )
            outcome = (
                Outcome("timeout", None, f"killed after {self.deadline:g} s", self.deadline)
                if reply is None
                else None
            )
        except WorkerDied:
            reply, outcome = (
                None,
                Outcome("error", None, "the worker died (memory limit?)", time.monotonic() - begin),
            )
        except (TypeError, ValueError) as e:  # what was submitted isn't JSON
            reply, outcome = None, Outcome("error", None, f"{type(e).__name__}: {e}", 0.0)
        outcome = outcome or Outcome(
            reply["status"], reply["value"], reply["why"], time.monotonic() - begin
        )
        spent = reply is None or reply.get("spent", False)
        if spent and worker is not None:
            self._reap(worker)
            worker = None
        with self._lock:
            self.counters["taken"] += 1
            self.counters[outcome.status] += 1
            self.counters["kills"] += spent
            self.longest = max(self.longest, time.monotonic() - begin)
        future.set_result(outcome)
        return worker

    def _reap(self, worker: _Worker) -> None:
        worker.kill()
        with self._lock:
            self._alive.discard(worker)


# ------------------------------------------------------------------------------------------------- inside the worker


def worker_main() -> None:
    """argv: function, memory in GB, pid of the parent. Replies {status, value, why} to every line; ends with
    the pipe.
    """
    global IN_WORKER
    IN_WORKER = True
    function_name, memory_gb, parent = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    _die_with_parent(parent)
    replies, items = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0), "r")
    os.dup2(2, 1)  # a print in a user's reward goes to stderr, not into the protocol
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    _limit_memory(memory_gb)
    try:
        function, why = load(function_name), ""
        getattr(function, "warm_up", int)()  # what a function wants done once, outside any deadline
    except Exception as e:
        function, why = None, f"{type(e).__name__}: {e}"
    _reply(replies, "ok" if function else "error", None, why)
    if function is None:
        return
    for line in items:
        args = json.loads(line)
        try:
            _reply(replies, "ok", function(*args), "")
        except MemoryError:
            _reply(
                replies, "error", None, "out of memory", spent=True
            )  # a fresh process serves the next item
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            _reply(
                replies,
                "error",
                None,
                f"{type(e).__name__}: {e} ({os.path.basename(where.filename)}:{where.lineno})"[
                    :500
                ],
            )


def load(name: str) -> Callable:
    """`module:function` -> the function. ValueError with the mend."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{name!r} must read module:function, e.g. my_rewards:score")
    function = getattr(importlib.import_module(module.removesuffix(".py")), attribute, None)
    if not callable(function):
        raise ValueError(f"module {module!r} has no function {attribute!r}")
    return function


def _reply(stream, status: str, value: object, why: str, spent: bool = False) -> None:
    try:
        text = json.dumps({"status": status, "value": value, "why": why, "spent": spent})
    except (TypeError, ValueError):
        text = json.dumps(
            {
                "status": "error",
                "value": None,
                "why": f"returned {type(value).__name__}, which isn't a JSON value",
            }
        )
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
