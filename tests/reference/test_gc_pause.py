import gc
import threading

import pytest

from reference.gc_pause import gc_paused


@pytest.fixture(autouse=True)
def collector():
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
