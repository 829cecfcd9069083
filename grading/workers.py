r"""Worker processes that can be killed: each item has a deadline, whatever the function does.

    with WorkerPool("grading.equality:equal_to_any", workers=2, deadline=5) as pool:
        outcome = pool.submit(r"\frac12", ["0.5"]).result()     # Outcome("ok", True, "", 0.003)

SymPy can't be interrupted from a thread and a user's reward can do anything, so items run in new
interpreters (no fork, no CUDA context, no torch) that read and write JSON lines. Each has a test:

- The deadline counts from the moment that a worker takes the item, not while it waits.
- An exception, a hang or a death of the worker is an Outcome; every Future is resolved.
- There is one worker more than asked for, so a kill costs the next item nothing.
- Memory is bounded (RLIMIT_AS). `submit` may be called from any thread.
- No worker outlives the pool or its parent, even one killed with SIGKILL, and a worker that is
  killed takes with it what it started, in whatever session (Linux; elsewhere: its group).
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import importlib
import json
import os
import queue
import resource
import runpy
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
import uuid
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
        self.mark, self.born = uuid.uuid4().hex, time.monotonic()
        self.loaded, self.expired, self.spent = None, False, False
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: self.mark}
        how = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env=env)
        try:
            command = [sys.executable, "-c", code, function, str(memory_gb)]
            self.process = subprocess.Popen(command, **how)
        except OSError as e:  # at a limit of processes or files: told when it is used
            self.process = None
            self.loaded = Outcome("error", why=f"no worker could be started: {e}")

    def __lt__(self, other: _Worker) -> bool:
        return self.born < other.born

    def load(self) -> Outcome:
        """Its first reply: has it loaded the function? Waits until it has; sets `spent` too."""
        if self.loaded is None:
            self.loaded = self.ask("", START_SECONDS)
        self.spent = self.loaded.status != "ok" or self.process.poll() is not None
        return self.loaded

    def ask(self, item: str, seconds: float) -> Outcome:
        """Send one line, read one reply. Sets `spent` if the worker must be replaced.

        The kill at the deadline closes the other ends of the pipes: no wait in here is longer.
        """
        line, begin, timer = b"", time.monotonic(), threading.Timer(seconds, self.kill, (True,))
        timer.start()
        with contextlib.suppress(BrokenPipeError):  # it died, and the line is empty
            self.process.stdin.write(item.encode())
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        timer.cancel()
        timer.join()
        reply = dict(status="error", why="the worker died (memory limit?)", spent=True)
        if self.expired:
            reply |= dict(status="timeout", why=f"killed after {seconds:g} s")
        elif line.endswith(b"\n"):
            reply = json.loads(line)
        self.spent = reply.pop("spent")
        return Outcome(**reply, seconds=time.monotonic() - begin)

    def kill(self, expired: bool = False) -> None:
        """End the worker and what it started: its group, then whatever carries its mark."""
        self.expired = expired
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}".encode() in entry.read_bytes():
                    os.kill(int(entry.parent.name), signal.SIGKILL)
        self.process.wait()


class WorkerPool(contextlib.AbstractContextManager):
    """`workers` + 1 killable processes, asked by `workers` threads.

    function: "module:name" or "path/file.py:name" of a function of JSON values, or of a class whose
    instance is called. deadline: seconds per item. memory_gb: address space of a worker. kills: how
    many items cost a worker. Raises ValueError if the function can't be loaded.
    """

    def __init__(self, function: str, workers: int = 2, deadline: float = 5, memory_gb: float = 4):
        if workers < 1 or deadline <= 0:
            raise ValueError(f"needs workers >= 1 and deadline > 0, got {workers} and {deadline}")
        self.function, self.workers = function, workers
        self.deadline, self.memory_gb = deadline, memory_gb
        self._lock, self._closed, self.kills = threading.Lock(), False, 0
        self._items, self._idle = queue.SimpleQueue(), queue.PriorityQueue()
        self._alive: set[_Worker] = set()
        for starts in [2] + [1] * (workers - 1):
            threading.Thread(target=self._serve, args=(starts,), daemon=True).start()
        self._idle.put(first := self._idle.get())
        if why := first.load().why:
            self.close()
            raise ValueError(f"reward function {function!r} can't be loaded: {why}")

    def submit(self, *args: object) -> Future:
        """Queue function(*args). The result is an Outcome; cancelled if the pool closes before."""
        future, item = Future(), json.dumps(args) + "\n"
        with self._lock:
            if self._closed:
                raise RuntimeError("the worker pool is closed")
            self._items.put((future, item))
        return future

    def close(self, *_: object) -> None:
        """Kill the workers and cancel what waits. Safe to call twice, from any thread."""
        with self._lock:
            self._closed = True
        for worker in list(self._alive):  # ends the wait of the thread that uses it
            worker.kill()
        for _ in range(self.workers):
            self._items.put(None)

    __exit__ = close

    def pids(self) -> list[int]:
        return [w.process.pid for w in list(self._alive) if w.process and w.process.poll() is None]

    def _serve(self, starts: int) -> None:
        """Lives as long as the pool: the end of this thread would kill the workers it started."""
        for _ in range(starts):
            self._idle.put(self._start())
        while entry := self._items.get():
            future, item = entry
            if self._closed or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            future.set_result(self._answer(item))

    def _start(self) -> _Worker:
        with self._lock:
            worker = _Worker(self.function, self.memory_gb)
            self._alive.add(worker)
        if self._closed:  # close() hasn't seen this one
            worker.kill()
        return worker

    def _answer(self, item: str) -> Outcome:
        """Ask the oldest idle worker, or the next one if it has died or can't load.

        Whoever takes one puts one back, and there are more workers than threads: none ever waits.
        """
        for _ in range(self.workers + 3):  # all may have died, and the next two not load
            worker = self._idle.get()
            outcome = worker.load()
            if asked := not worker.spent:
                outcome = worker.ask(item, self.deadline)
                with self._lock:
                    self.kills += worker.spent
            if worker.spent and not self._closed:
                worker.kill()
                self._alive.discard(worker)
                worker = self._start()
            self._idle.put(worker)
            if asked:
                return outcome
        return Outcome("error", why=outcome.why or "no worker could be started")


# ------------------------------------------------------------------------------ inside the worker
def serve() -> None:
    """argv: function, memory in GB. Replies to each line; ends with the pipe."""
    global IN_WORKER
    IN_WORKER = True
    name, memory = sys.argv[1], int(float(sys.argv[2]) * 2**30)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    with contextlib.suppress(ValueError, OSError):  # a lower limit, or macOS
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    replies, items = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0), "r")
    os.dup2(2, 1)  # a print in a user's reward goes to stderr, not into the replies
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    loaded: list[Callable] = []
    with contextlib.suppress(BrokenPipeError):  # the parent has ended
        if _reply(replies, lambda: loaded.append(load(name))):
            for line in items:
                _reply(replies, loaded[0], *json.loads(line))


def _reply(stream, function: Callable, *args: object) -> bool:
    reply = dict(status="ok", value=None, why="", spent=False)
    try:
        text = json.dumps(reply | {"value": function(*args)}, default=float)  # scalars of numpy
    except (Exception, SystemExit) as e:  # noqa: BLE001
        reply |= dict(status="error", why=in_words(e))
        text = json.dumps(reply | {"spent": isinstance(e, MemoryError)})
    print(text, file=stream, flush=True)
    return reply["status"] == "ok"


class NotLoadable(ValueError):
    """What is wrong with the name of a function, and how to fix it."""


def in_words(e: BaseException) -> str:
    """An error and the last line of the user's own code that it went through, before any of an
    installed package: "KeyError: 'a' (score.py:12)"."""
    if isinstance(e, NotLoadable):
        return str(e)
    if isinstance(e, SyntaxError) and os.path.isfile(e.filename or ""):  # not of an eval
        return f"{type(e).__name__}: {e.msg} ({os.path.basename(e.filename)}:{e.lineno})"
    installed = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    ours = ("<", __file__)  # <frozen importlib>, the <string> of an eval
    places = [p for p in traceback.extract_tb(e.__traceback__) if not p.filename.startswith(ours)]
    own = [p for p in places if not p.filename.startswith(installed)] or places
    where = "".join(f" ({os.path.basename(p.filename)}:{p.lineno})" for p in own[-1:])
    return f"{type(e).__name__}: {str(e)[:400]}{where}"


def load(name: str) -> Callable:
    """`package.module:name` or `path/file.py:name` → the function, or an instance of the class.
    Raises NotLoadable, or whatever the user's code does."""
    module, _, attribute = name.rpartition(":")
    if not module or not attribute:
        raise NotLoadable("write module:function or file.py:function")
    if module.endswith(".py"):
        file = Path(module).resolve()
        if not file.is_file():
            raise NotLoadable(f"{file}: no such file")
        sys.path.append(str(file.parent))  # so that it can import its neighbours
        found = runpy.run_path(str(file), run_name=f"user_{file.stem}")
    else:
        try:
            found = vars(importlib.import_module(module))
        except ModuleNotFoundError as e:
            if not f"{module}.".startswith(f"{e.name}."):  # one that it imports
                raise
            raise NotLoadable(f"no module {e.name!r} in {os.getcwd()}, nor installed") from None
    function = found.get(attribute)
    if not callable(function):
        near = difflib.get_close_matches(attribute, [n for n in found if callable(found[n])], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise NotLoadable(f"{module} has no function or class {attribute!r}{hint}")
    if isinstance(function, type) and not callable(function := function()):
        raise NotLoadable(f"an instance of class {attribute} can't be called: add __call__")
    getattr(function, "warm_up", int)()  # what should be done once, outside any deadline
    return function
