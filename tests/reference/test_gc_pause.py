import gc
import threading

import pytest
import torch

import reference
from reference import gc_pause
from reference.gc_pause import gc_paused, gc_paused_in_main_thread


@pytest.fixture(autouse=True)
def collector():
    assert not gc_pause._num_pauses, "some thread of an earlier test never ended its pause"
    gc.enable()
    yield
    gc.enable()


def test_the_collector_rests_and_goes_on():
    with gc_paused():
        assert not gc.isenabled()
        with gc_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_goes_on_after_an_error():
    with pytest.raises(KeyError), gc_paused():
        raise KeyError
    assert gc.isenabled()


def test_one_that_was_off_stays_off():
    gc.disable()
    with gc_paused():
        pass
    assert not gc.isenabled()


def test_the_last_of_several_threads_sets_it_going():
    entered, leave = threading.Barrier(2), threading.Event()

    def hold():
        with gc_paused():
            entered.wait()
            leave.wait()

    thread = threading.Thread(target=hold)
    with gc_paused():
        thread.start()
        entered.wait()
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_it_decorates():
    @gc_paused()
    def asked():
        return gc.isenabled()

    assert [asked(), gc.isenabled(), asked()] == [False, True, False]


def test_a_thread_that_may_wait_for_ever_pauses_nothing():
    seen = []

    def ask():
        with gc_paused_in_main_thread():
            seen.append(gc.isenabled())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    ask()
    assert seen == [True, False]


def test_a_step_that_waits_in_the_background_does_not_stop_the_collector(tmp_path):
    begun, go_on = threading.Event(), threading.Event()

    class Waiting(reference.FileSystemWriter):
        def prepare_local_plan(self, plan):
            begun.set()
            go_on.wait()
            return super().prepare_local_plan(plan)

    future = reference.async_save({"w": torch.ones(3)}, storage_writer=Waiting(tmp_path), no_dist=True)
    begun.wait()
    is_enabled = gc.isenabled()
    go_on.set()
    future.result()
    assert is_enabled
