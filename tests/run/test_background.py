import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gmarpp.run.background import BackgroundTasks


@pytest.fixture
def tasks():
    tasks = BackgroundTasks(processes=2, limit=3)
    yield tasks
    tasks.close()


def fail():
    raise OSError(28, "No space left on device", "a.png")


def wait_for(gate, done=None):
    """Ends when a file exists, and then makes another."""
    while not gate.exists():
        time.sleep(0.01)
    if done is not None:
        done.touch()


def fail_after(gate):
    wait_for(gate)
    fail()


def write_process(path):
    path.with_suffix(".tmp").write_text(str(os.getpid()))
    path.with_suffix(".tmp").replace(path)


def has_ended(process):
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_all_tasks_are_done_after_waiting(tasks, tmp_path):
    for number in range(20):
        tasks.submit(write_process, tmp_path / str(number))
    tasks.wait()
    processes = {int(path.read_text()) for path in tmp_path.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {str(number) for number in range(20)}
    assert os.getpid() not in processes
    assert len(processes) <= 2


def test_submitting_blocks_while_the_queue_is_full(tasks, tmp_path):
    gate = tmp_path / "gate"
    for _ in range(3):
        tasks.submit(wait_for, gate)
    fourth = threading.Thread(target=tasks.submit, args=(wait_for, gate))
    fourth.start()
    fourth.join(0.2)
    assert fourth.is_alive()
    gate.touch()
    fourth.join()


def test_an_error_reaches_the_caller_with_its_file(tasks):
    tasks.submit(fail)
    with pytest.raises(OSError, match="No space left") as error:
        tasks.wait()
    assert error.value.filename == "a.png"


def test_an_error_stops_what_is_submitted_later(tasks, tmp_path):
    tasks.submit(fail)
    while not tasks.failed:
        time.sleep(0.01)
    with pytest.raises(OSError, match="No space left"):
        tasks.submit(write_process, tmp_path / "later")
    with pytest.raises(OSError, match="No space left"):
        tasks.submit_last(write_process, tmp_path / "last")
    tasks.close()
    assert list(tmp_path.iterdir()) == []


def test_the_last_task_waits_for_all_earlier_ones_in_this_process(tasks, tmp_path):
    gate, seen = tmp_path / "gate", []
    for number in range(2):
        tasks.submit(wait_for, gate, tmp_path / f"{number}.done")
    tasks.submit_last(lambda: seen.extend(sorted(path.name for path in tmp_path.glob("*.done"))))
    time.sleep(0.1)
    assert seen == []
    gate.touch()
    tasks.wait()
    assert seen == ["0.done", "1.done"]


def test_an_error_that_comes_late_stops_the_last_task(tasks, tmp_path):
    done = []
    tasks.submit(fail_after, tmp_path / "gate")
    tasks.submit_last(done.append, "last")
    assert not tasks.failed
    (tmp_path / "gate").touch()
    with pytest.raises(OSError, match="No space left"):
        tasks.wait()
    assert done == []


def test_a_killed_process_raises(tmp_path):
    # Lightning handles the signal by which the pool ends the processes that are left.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    tasks = BackgroundTasks(processes=2, limit=3)
    try:
        tasks.submit(write_process, tmp_path / "process")
        tasks.wait()
        tasks.submit(wait_for, tmp_path / "never")
        tasks.submit(wait_for, tmp_path / "never")
        os.kill(int((tmp_path / "process").read_text()), signal.SIGKILL)
        with pytest.raises(ChildProcessError, match=r"process that draws pictures was killed.*out of memory"):
            tasks.wait()
        with pytest.raises(ChildProcessError, match="was killed"):
            tasks.submit(write_process, tmp_path / "later")
        assert tasks.failed
    finally:
        signal.signal(signal.SIGTERM, previous)
        (tmp_path / "never").touch()
        tasks.close()


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not tell who sent a signal")
@pytest.mark.parametrize("number", ["INT", "TERM"])
def test_a_signal_to_the_whole_group_does_not_end_the_processes(tasks, tmp_path, number):
    tasks.submit(write_process, tmp_path / "process")
    tasks.wait()
    tasks.submit(wait_for, tmp_path / "gate", tmp_path / "done")
    subprocess.run(["kill", f"-{number}", (tmp_path / "process").read_text()], check=True)
    time.sleep(0.2)
    (tmp_path / "gate").touch()
    tasks.wait()
    assert (tmp_path / "done").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_the_processes_end_with_one_that_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\nsys.path.append(sys.argv[1])\n"
        "from test_background import BackgroundTasks, wait_for, write_process\n"
        "if __name__ == '__main__':\n"
        "    tasks, folder = BackgroundTasks(processes=2, limit=9), Path(sys.argv[2])\n"
        "    for number in range(2):\n"
        "        tasks.submit(write_process, folder / f'{number}.process')\n"
        "        tasks.submit(wait_for, folder / 'never')\n"
        "    tasks.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, script, Path(__file__).parent, tmp_path])
    while not (files := list(tmp_path.glob("*.process"))):
        assert parent.poll() is None
        time.sleep(0.05)
    processes = [int(path.read_text()) for path in files]
    parent.kill()
    parent.wait()
    while not all(map(has_ended, processes)):
        time.sleep(0.05)
