"""Signals: what is noted, what ends a process that hangs, and what is left alone."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fap.cli import signals
from fap.run import session
from fap.run.session import Interrupted, StopSignal


class Ended(Exception):  # noqa: N818
    pass


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which the listening thread would have ended this process."""
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise Ended

    monkeypatch.setattr(session.os, "_exit", end)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    return codes


class Clock:
    """The session's `time`, which passes when told."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def let_pass(self, seconds: float) -> None:
        """The listening thread, if it looks at the run's progress, looks meanwhile."""
        self.now += seconds
        time.sleep(0.05)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(session, "time", clock)
    monkeypatch.setattr(session, "LOOK_EVERY", 0.005)
    return clock


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.05)  # the handler runs, and the thread too


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the listening thread has said. capfd may lose what is printed while it is read."""
    said: list[str] = []
    say = session._say

    def say_and_note(message: str) -> None:
        say(message)
        said.append(message)

    monkeypatch.setattr(session, "_say", say_and_note)
    return said


def send_and_wait_for_an_answer(number: int, answers: list[str]) -> None:
    os.kill(os.getpid(), number)
    wait_for(lambda: any("saving and leaving" in answer for answer in answers))


def test_every_command_is_stopped_by_the_same_signals() -> None:
    assert signals.SIGNALS is session.SIGNALS


@pytest.mark.parametrize("number", session.SIGNALS)
def test_before_the_run_begins_a_signal_is_raised(number: int) -> None:
    before = signal.getsignal(number)
    with (
        pytest.raises(Interrupted, match=f"stopped by {signal.Signals(number).name}") as stopped,
        StopSignal(),
    ):
        send(number)
    assert stopped.value.exit_code == 128 + number
    assert not isinstance(
        stopped.value, Exception
    )  # what falls back on an error must not take it for one
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", session.SIGNALS)
def test_a_run_notes_the_first_signal_and_more_change_nothing(
    number: int, clock: Clock, ended: list[int], capfd
) -> None:
    with StopSignal() as stop:
        stop.run_begins()
        assert stop.number is None
        send(number, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1)
        assert stop.number == number
    assert ended == []
    said = capfd.readouterr().err
    assert f"{signal.Signals(number).name}: saving and leaving after this step" in said
    assert said.count("SIGTERM: already leaving") == 2


def test_a_late_signal_does_not_change_the_exit_code(ended: list[int]) -> None:
    before = {number: signal.getsignal(number) for number in session.SIGNALS}
    try:
        with pytest.raises(SystemExit), StopSignal() as stop:  # noqa: PT012
            stop.run_begins()
            send(signal.SIGTERM)
            sys.exit(143)
        assert {signal.getsignal(number) for number in session.SIGNALS} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with pytest.raises(SystemExit), StopSignal():
        sys.exit(1)  # for another reason
    assert {number: signal.getsignal(number) for number in session.SIGNALS} == before


@pytest.mark.parametrize(("seconds", "codes"), [(1.9, []), (2.1, [130])])
def test_a_second_ctrl_c_ends_at_once_unless_it_is_the_first_one_again(
    seconds: float, codes: list[int], clock: Clock, ended: list[int], answers: list[str]
) -> None:
    with StopSignal() as stop:
        stop.run_begins()
        send_and_wait_for_an_answer(signal.SIGINT, answers)
        clock.let_pass(seconds)
        send(signal.SIGINT)
    assert ended == codes


def test_a_run_without_progress_is_ended(
    clock: Clock, ended: list[int], answers: list[str], capfd
) -> None:
    with StopSignal(patience=10) as stop:
        stop.run_begins()
        stop.beat()
        send_and_wait_for_an_answer(signal.SIGTERM, answers)
        for _ in range(6):  # longer than its patience, but it moves
            clock.let_pass(1)
            stop.beat()
        clock.let_pass(11.9)  # twice the longest pause are added
        assert ended == []
        clock.let_pass(0.2)
        wait_for(lambda: ended == [143])
    said = capfd.readouterr().err
    assert "SIGTERM, but no progress for 12 s" in said
    assert "ending without a save, the last checkpoint stays" in said


def test_patience_follows_the_pauses_of_the_run_and_the_save(
    clock: Clock, ended: list[int], answers: list[str]
) -> None:
    """Steps of 4 s and a save of 2 minutes are no hang, though the patience is 1 s."""
    with StopSignal(patience=1) as stop:
        stop.run_begins()
        stop.beat()
        clock.let_pass(4)
        stop.beat()
        send_and_wait_for_an_answer(signal.SIGTERM, answers)
        clock.let_pass(8)
        stop.beat()
        with stop.saving():
            clock.let_pass(119)
        clock.let_pass(16)  # a save is no pause between steps: 1 + 2 * 8 s
        assert ended == []
        clock.let_pass(2)
        wait_for(lambda: ended == [143])


def test_what_the_process_was_told_to_ignore_it_goes_on_to_ignore() -> None:
    """`nohup fap-train` goes on when its terminal closes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            send(signal.SIGHUP)
            assert stop.number is None
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_and_files_are_given_back() -> None:
    gc.collect()  # files that earlier tests left open are not closed meanwhile
    before = {s: signal.getsignal(s) for s in session.SIGNALS}, len(os.listdir("/proc/self/fd"))
    with StopSignal():
        assert any(signal.getsignal(s) is not handler for s, handler in before[0].items())
    assert (
        {s: signal.getsignal(s) for s in session.SIGNALS},
        len(os.listdir("/proc/self/fd")),
    ) == before
    assert signal.set_wakeup_fd(-1) == -1


HANGS = """
import ctypes, sys
from fap.run.session import StopSignal
with StopSignal(patience=0.5) as stop:
    stop.run_begins()
    print("ready", flush=True)
    libc = ctypes.CDLL(None)
    everything = (ctypes.c_ulong * 16)(*[2**64 - 1] * 16)
    # So that nothing wakes the main thread, which then sleeps in C code.
    libc.pthread_sigmask(0, everything, None)
    libc.sleep(100)
"""


@pytest.mark.slow
def test_a_process_that_hangs_in_c_code_is_ended() -> None:
    root = str(Path(__file__).parents[2])
    child = subprocess.Popen(
        [sys.executable, "-c", HANGS],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 143
    assert "SIGTERM, but no progress for" in said
