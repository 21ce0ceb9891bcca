import threading

import pytest

from gmarpp.callbacks.background import BackgroundTasks


def test_all_tasks_are_done_after_waiting():
    tasks, done = BackgroundTasks(3), []
    for number in range(20):
        tasks.submit(done.append, number)
    tasks.wait()
    tasks.close()
    assert sorted(done) == list(range(20))


def test_submitting_blocks_while_the_queue_is_full():
    tasks, gate = BackgroundTasks(2), threading.Event()
    tasks.submit(gate.wait)
    tasks.submit(gate.wait)
    third = threading.Thread(target=tasks.submit, args=(gate.wait,))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    gate.set()
    third.join(10)
    assert not third.is_alive()
    tasks.close()


def test_an_error_reaches_the_caller():
    def fail():
        raise OSError("disk full")

    tasks = BackgroundTasks(2)
    tasks.submit(fail)
    with pytest.raises(OSError, match="disk full"):
        tasks.wait()
    tasks.close()


def test_an_error_stops_what_is_submitted_later():
    failed = threading.Event()

    def fail():
        failed.set()
        raise OSError("disk full")

    tasks = BackgroundTasks(1)
    tasks.submit(fail)
    failed.wait(10)
    tasks.close()
    with pytest.raises(OSError, match="disk full"):
        tasks.submit(fail)


def test_the_last_task_waits_for_all_earlier_ones():
    tasks, gate, done = BackgroundTasks(9), threading.Event(), []
    for number in range(5):
        tasks.submit(lambda number: (gate.wait(10), done.append(number)), number)
    tasks.submit_last(done.append, "last")
    gate.set()
    tasks.wait()
    tasks.close()
    assert len(done) == 6
    assert done[-1] == "last"


def test_the_last_task_is_not_run_after_an_error_which_stays():
    def fail():
        raise OSError("disk full")

    tasks, done = BackgroundTasks(9), []
    tasks.submit(fail)
    with pytest.raises(OSError, match="disk full"):
        tasks.wait()
    with pytest.raises(OSError, match="disk full"):
        tasks.submit_last(done.append, "last")
    assert tasks.failed
    tasks.close()
    assert done == []


def test_an_error_that_comes_late_stops_the_last_task():
    gate, done = threading.Event(), []

    def fail():
        gate.wait(10)
        raise OSError("disk full")

    tasks = BackgroundTasks(9)
    tasks.submit(fail)
    tasks.submit_last(done.append, "last")
    assert not tasks.failed
    gate.set()
    with pytest.raises(OSError, match="disk full"):
        tasks.wait()
    tasks.close()
    assert done == []
