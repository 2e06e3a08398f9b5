"""Signals that ask a run to end, and those that only pass the same on."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from pglpipe.app import signals as module
from pglpipe.app.signals import ENDING, SAVING, not_yet_saving, stopping


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Has Ctrl-C raise, as in the foreground; a shell has its background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_asks_and_its_echo_is_none(number: signal.Signals) -> None:
    asked: list[str] = []
    before = signal.getsignal(number)
    with stopping(lambda: asked.append("stop"), lambda: None) as caught:
        for each in (number, signal.SIGTERM, number):
            signal.raise_signal(each)
    assert asked == ["stop"] and caught == [number]
    assert signal.getsignal(number) is before


def test_a_later_one_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ECHO_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt), stopping(lambda: None, lambda: None):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_request_to_save_is_passed_on_each_time_and_ends_nothing() -> None:
    asked: list[str] = []
    with not_yet_saving() as early:
        signal.raise_signal(SAVING)
        with stopping(lambda: None, lambda: asked.append("save")) as caught:
            signal.raise_signal(SAVING)
            signal.raise_signal(SAVING)
        signal.raise_signal(SAVING)
    assert early == [SAVING] * 2 and asked == ["save"] * 2 and caught == []
    assert signal.getsignal(SAVING) == signal.SIG_DFL


@pytest.mark.parametrize("number", [*ENDING, SAVING])
def test_what_was_ignored_when_the_program_began_stays_so(
    number: signal.Signals,
) -> None:
    asked: list[str] = []
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with not_yet_saving() as early:
            with stopping(lambda: asked.append("stop"), lambda: asked.append("save")):
                signal.raise_signal(number)
            signal.raise_signal(number)
        assert (asked, early) == ([], []) and signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
