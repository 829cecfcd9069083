"""grading/workers.py: a hang, a crash or a dead parent costs one answer, never the run, and leaves
no process behind."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from grading.workers import WorkerPool

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = """
import os, subprocess, sys, time

def double(x):
    return 2 * x

def slow_start(what):
    return act(what)

slow_start.warm_up = lambda: time.sleep(4)

def act(what):
    if what == "spin":
        while True:
            pass
    if what == "bignum":
        return len(str(9 ** 9 ** 9))  # one C call that holds the GIL: no thread could stop it
    if what == "sleep":
        time.sleep(1000)
    if what == "raise":
        raise KeyError("mine")
    if what == "memory":
        return len("x" * (1 << 40))
    if what == "exit":
        os._exit(3)
    if what == "sys.exit":
        sys.exit(3)
    if what == "print":
        print("not a reply")
        sys.stdout.flush()
        os.write(1, b"nor this")
    if what == "stdin":
        return sys.stdin.read()
    if what == "torch":
        return "torch" in sys.modules
    if what == "object":
        return object()
    if what == "pid":
        return os.getpid()
    if what == "session":
        return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid
    if what == "child":
        return subprocess.Popen(["sleep", "1000"]).pid
    return what
"""


def running(pid: int) -> bool:
    """A zombie counts as ended: it has no memory and no code, its new parent hasn't looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_gone(pids: list[int], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(map(running, pids)):
        time.sleep(0.05)
    return not any(map(running, pids))


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "bad_functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)  # a user's module lies in the current folder
    return tmp_path


def test_many_items_come_back_to_their_own_future(functions):
    """A reply read for the wrong item would give one problem's score to another."""
    with WorkerPool("bad_functions:double", workers=2) as pool:
        futures = [pool.submit(i) for i in range(500)]
        assert [f.result().value for f in futures] == [2 * i for i in range(500)]
        assert not pool.kills


@pytest.mark.parametrize(
    "what, status",
    [
        ("spin", "timeout"),
        ("bignum", "timeout"),
        ("sleep", "timeout"),
        ("raise", "error"),
        ("memory", "error"),
        ("exit", "error"),
        ("sys.exit", "error"),
        ("object", "error"),
    ],
)
def test_whatever_the_function_does_the_next_item_is_served(functions, what, status):
    """A stuck or dead worker that isn't replaced stops the run (the failure of every thread- or
    pool-based grader)."""
    deadline = 1 if status == "timeout" else 60
    with WorkerPool("bad_functions:act", workers=1, deadline=deadline, memory_gb=2) as pool:
        bad = pool.submit(what).result(90)
        pool.deadline = 60  # only what hangs must meet it, however busy the machine
        good = pool.submit("fine").result(90)
        assert bad.status == status and bad.why
        assert good == good._replace(status="ok", value="fine")
        assert pool.kills == (status == "timeout" or what in ("exit", "memory"))


def test_prints_and_reads_do_not_disturb_the_protocol(functions):
    """A print in a user's reward must not be read as the reply; reading stdin must not eat the next
    item."""
    with WorkerPool("bad_functions:act", workers=1) as pool:
        assert [pool.submit(w).result().value for w in ("print", "stdin", "fine")] == [
            "print",
            "",
            "fine",
        ]


def test_a_worker_imports_no_torch(functions):
    """Workers that import torch (or the caller's __main__) take seconds to start and gigabytes to
    hold."""
    with WorkerPool("bad_functions:act", workers=1) as pool:
        assert pool.submit("torch").result().value is False
    code = "import sys, rewards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_deadline_runs_from_the_taking_not_from_the_queueing(functions):
    """Items behind a stuck one must not be timed out unseen (false zeros for a whole batch)."""
    with WorkerPool("bad_functions:act", workers=1, deadline=4) as pool:  # the ints wait for 8 s
        futures = [pool.submit("sleep"), pool.submit("sleep"), *(pool.submit(i) for i in range(20))]
        assert [f.result().status for f in futures] == ["timeout"] * 2 + ["ok"] * 20


def test_more_than_a_thousand_open_files(functions):
    """select() fails on descriptors above 1,023: the pool hung in a process with many open
    files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3000:
        pytest.skip(f"the limit of open files is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3000, hard))
    files = [open(os.devnull) for _ in range(1200)]
    try:
        with WorkerPool("bad_functions:act", workers=1, deadline=1) as pool:
            assert pool.submit("spin").result(60).status == "timeout"
            pool.deadline = 60
            assert pool.submit("fine").result(90).status == "ok"
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_workers_that_die_while_they_wait_are_replaced(functions):
    """The out-of-memory killer takes an idle worker: the next item must not pay for it."""
    with WorkerPool("bad_functions:double", workers=2) as pool:
        assert pool.submit(1).result(60).value == 2
        for _ in range(3):
            before = pool.pids()
            for pid in before:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert all_gone(before)
            results = [pool.submit(i).result(60) for i in range(4)]
            assert [r.value for r in results] == [0, 2, 4, 6]


def test_the_item_after_a_kill_goes_to_a_warm_spare(functions):
    """A spare has loaded the function already: the item after a kill waits for no interpreter."""
    with WorkerPool("bad_functions:slow_start", workers=1, deadline=1) as pool:
        warm = set(pool.pids())
        assert len(warm) == 2  # the worker and its spare
        assert pool.submit("spin").result(60).status == "timeout"
        pool.deadline = 60
        assert pool.submit("pid").result(90).value in warm


def test_a_child_in_a_session_of_its_own_is_killed_too(functions):
    """killpg doesn't reach it: a reward that starts a server would leave one behind at each
    kill."""
    with WorkerPool("bad_functions:act", workers=1, deadline=60) as pool:
        pids = [pool.submit(what).result(60).value for what in ("session", "child")]
        pool.deadline = 1
        assert all(map(running, pids)) and pool.submit("spin").result(60).status == "timeout"
        assert all_gone(pids)


UNLOADABLE = (
    """
def missing_colon()
    return 1
""",
    """
import no_such_package
""",
    """
import helper
""",
    """
class NeedsUrl:
    def __init__(self, url):
        self.url = url

class Silent:
    pass
""",
)


@pytest.mark.parametrize(
    "name, said",
    [
        ("bad_functions:nothing", "bad_functions has no function or class 'nothing'"),
        ("bad_functions:doubel", "has no function or class 'doubel'; did you mean double?"),
        ("not_there:f", "no module 'not_there' in "),
        ("just_a_name", "write module:function or file.py:function"),
        ("a/gone.py:score", "a/gone.py: no such file"),
        ("syntax.py:missing_colon", "SyntaxError: expected ':' (syntax.py:2)"),
        ("syntax:missing_colon", "SyntaxError: expected ':' (syntax.py:2)"),
        ("imports.py:f", "ModuleNotFoundError: No module named 'no_such_package' (imports.py:2)"),
        (
            "indirect.py:f",
            "JSONDecodeError: Expecting value: line 1 column 1 (char 0) (helper.py:2)",
        ),
        ("classes.py:NeedsUrl", "NeedsUrl.__init__() missing 1 required positional argument"),
        ("classes.py:Silent", "an instance of class Silent can't be called: add __call__"),
    ],
)
def test_a_function_that_can_not_be_loaded_is_named_at_once(functions, name, said):
    """A mistake in --reward must stop the run before any GPU time, not zero every reward; and say
    which line of the user's is wrong, not of Python's or of ours."""
    for file, text in zip(("syntax", "imports", "indirect", "classes"), UNLOADABLE):
        (functions / f"{file}.py").write_text(text)
    (functions / "helper.py").write_text("import json\nx = json.loads('x')\n")
    with pytest.raises(ValueError) as error:
        WorkerPool(name, workers=1)
    assert said in str(error.value) and not re.search("workers.py|frozen", str(error.value))


def test_an_error_in_an_evaluated_answer_names_the_users_line(functions):
    """It named <string>:1, a line of the model's answer."""
    (functions / "evals.py").write_text("def score(x):\n    return eval(x)\n")
    with WorkerPool("evals:score", workers=1, deadline=60) as pool:
        whys = [pool.submit(x).result(60).why for x in ("1 +* 2", "1 / 0")]
    assert whys == [
        "SyntaxError: invalid syntax (<string>, line 1) (evals.py:2)",
        "ZeroDivisionError: division by zero (evals.py:2)",
    ]


def test_an_item_ends_where_no_worker_can_be_started_any_more(functions):
    """The reward file breaks during the run and the idle workers die: the next item waited for a
    start that can't succeed, for ever."""
    file = functions / "breaks.py"
    file.write_text("open('loads', 'a').write('x')\ndef score(x):\n    return x\n")
    with WorkerPool("breaks:score", workers=1, deadline=60) as pool:
        assert pool.submit("fine").result(60).value == "fine"
        while (functions / "loads").stat().st_size < 2:  # the worker and its spare
            time.sleep(0.05)
        file.write_text("1 / 0")
        before = pool.pids()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert all_gone(before)
        outcome = pool.submit("fine").result(60)
        assert outcome.status == "error" and "ZeroDivisionError" in outcome.why


def test_a_reward_that_never_loads_is_told_at_the_first_failure(functions):
    """Each worker fails at another time: the pool restarted one as long as another was loading, and
    in the end named the kill as the reason."""
    (functions / "slow.py").write_text(
        "import time\n"
        "with open('starts', 'a+') as file:\n    file.write('x')\n    n = file.tell()\n"
        "time.sleep(n if n < 9 else 0)\nraise ImportError('my own reason')\n"
    )
    with pytest.raises(ValueError, match="my own reason"):
        WorkerPool("slow:score", workers=2)
    assert (functions / "starts").stat().st_size <= 3


def test_closing_ends_workers_children_and_waiting_items(functions):
    """Leftover processes hold memory and cores of the next run; a Future that never ends holds this
    one."""
    pool = WorkerPool("bad_functions:act", workers=2, deadline=100)
    child = pool.submit("child").result().value
    stuck = [pool.submit("spin"), pool.submit("spin"), pool.submit("never reached")]
    pids = pool.pids()
    pool.close()
    assert all_gone(pids) and pool.pids() == []
    with pytest.raises(CancelledError):
        stuck[2].result(10)
    for future in stuck[:2]:  # taken: an error; not yet taken: cancelled
        with contextlib.suppress(CancelledError):
            assert future.result(10).status == "error"
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("more")
    pool.close()
    with contextlib.suppress(ProcessLookupError):
        assert all_gone([child])


def test_an_exception_in_the_with_block_ends_the_workers(functions):
    """A crash of the training loop must not leave graders behind."""
    with pytest.raises(ZeroDivisionError):
        with WorkerPool("bad_functions:act", workers=2, deadline=100) as pool:
            pool.submit("spin")
            pids = pool.pids()
            raise ZeroDivisionError
    assert all_gone(pids)


def test_many_threads_may_submit(functions):
    """Decoding threads submit while the main thread collects."""
    results: dict[int, list[int]] = {}
    with WorkerPool("bad_functions:double", workers=2) as pool:

        def work(k: int) -> None:
            results[k] = [pool.submit(i + 1000 * k).result().value for i in range(50)]

        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
    assert results == {k: [2 * (i + 1000 * k) for i in range(50)] for k in range(8)}


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_a_killed_parent(functions, end):
    """kill -9 of a rank runs no handler: workers stuck in an item must still die (Ctrl-C and
    SIGTERM alike)."""
    script = textwrap.dedent("""
        import signal, sys, time
        from grading.workers import WorkerPool
        # a shell's background job starts with Ctrl-C ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pool = WorkerPool("bad_functions:act", workers=2, deadline=1000)
        futures = [pool.submit("bignum"), pool.submit("sleep")]
        time.sleep(0.3)
        print(*pool.pids(), flush=True)
        futures[0].result()
    """)
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=env,
        text=True,
    )
    pids = [int(p) for p in parent.stdout.readline().split()]
    assert len(pids) >= 2 and all(map(running, pids))
    parent.send_signal(end)
    parent.wait(30)
    assert all_gone(pids)


def test_an_exit_without_close_is_clean(functions):
    """A script that forgets to close must end, at once and without a traceback."""
    code = "from grading.workers import WorkerPool; p = WorkerPool('bad_functions:act', 2, 100); "
    code += "p.submit('spin'); print(*p.pids())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        done.returncode == 0
        and done.stderr == ""
        and all_gone([int(p) for p in done.stdout.split()])
    )


def no_more_processes(*args, **settings):
    raise OSError("no more processes")


def test_where_no_process_can_be_started_it_says_why(functions, monkeypatch):
    """In a container at its limit of processes: the run hung before its first step, or at the first
    kill."""
    pool = WorkerPool("bad_functions:act", 1, deadline=60)
    with monkeypatch.context() as m:
        m.setattr(subprocess, "Popen", no_more_processes)
        with pytest.raises(ValueError, match="can't be loaded: .*no more processes"):
            WorkerPool("bad_functions:act", 2)
        for worker in list(pool._alive):
            worker.kill()
        outcome = pool.submit("ok").result(60)
        assert outcome.status == "error" and "no more processes" in outcome.why
    assert pool.submit("ok").result(120).status == "ok"  # the next item tries again
    pool.close()
