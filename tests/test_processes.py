import signal
import subprocess
import sys

import pytest

from gmarpp.processes import follow_parent

# A process that works for another one and reports, as the standard library does in its threads, that it lost it.
SCRIPT = """
import multiprocessing, sys, threading, time
from gmarpp.processes import follow_parent

def listen(connection, kept):
    try:
        connection.recv()
    except EOFError:
        sys.excepthook(*sys.exc_info())

def work(connection, other):
    other.close()
    follow_parent()
    threading.Thread(target=listen, args=(connection, other)).start()
    time.sleep(0.1)
    print("ready", flush=True)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    worker = context.Process(target=work, args=(there, here))
    worker.start()
    there.close()
    if sys.argv[1] == "close":
        here.close()
    worker.join()
    time.sleep(60 * (sys.argv[1] == "kill"))
"""


def start(what):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_process_whose_parent_was_killed_ends_in_silence():
    process = start("kill")
    assert process.stdout.readline() == "ready\n"
    process.kill()
    # The streams end with the last process that holds them.
    assert process.communicate() == ("", "")
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_errors_of_a_process_whose_parent_lives_are_told():
    output, errors = start("close").communicate()
    assert output == "ready\n"
    assert errors.count("Traceback") == 1


def test_a_process_that_nobody_started_follows_none():
    with pytest.raises(RuntimeError, match="multiprocessing started"):
        follow_parent()
