"""Commands and reports: reports survive their trip as text, unknown ones are never made."""

from __future__ import annotations

import json

import pytest

from pglpipe.messages.commands import (
    COMMANDS,
)
from pglpipe.messages.reports import (
    EvaluationReport,
    ExitCount,
    FinalReport,
    Report,
    StepReport,
    TrainReport,
    decode_report,
    encode_report,
)

STEP = StepReport(7, 1, "local", 32, {2: 0.1, 3: 2.5e-8}, 0.25, 0.125, 0.0625)

REPORTS: list[Report] = [
    TrainReport(1, [STEP, STEP], 123456),
    TrainReport(0, [], 0),
    EvaluationReport(
        2, 40, 3, {4: ExitCount(100, 37, 12.5, 100.0), 5: ExitCount(9, None, 0.1, 9.0)}
    ),
    FinalReport(
        rank=3,
        stages=[6, 7],
        digests=[["a.weight", "00ff"], ["b.bias", "11ee"]],  # type: ignore[list-item]
        step_seconds={"local": 0.1},
        train_seconds=12.5,
        samples=640,
        wait_recv_fraction=0.25,
        wait_send_fraction=0.0,
        peak_memory_bytes=1 << 40,
        peak_activation_bytes={"local": 10, "global": 0},
        bytes_sent_forward=3,
        bytes_sent_backward=4,
    ),
]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
def test_a_report_comes_back_from_one_line_of_text(report: Report) -> None:
    text = encode_report(report)
    assert "\n" not in text
    assert decode_report(text) == report


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_a_loss_that_has_blown_up_can_be_told(value: float) -> None:
    step = StepReport(0, 0, "local", 1, {0: value}, 1.0, 0.0, 0.0)
    back = decode_report(encode_report(TrainReport(0, [step], 0)))
    assert isinstance(back, TrainReport) and back.steps[0].losses == {0: value}


def test_nothing_but_reports_is_ever_made_from_text() -> None:
    for kind in ("Stop", "Popen", "StepReport", ""):
        with pytest.raises(KeyError):
            decode_report(json.dumps({"type": kind, "args": ["ls"]}))


def test_waiting_is_waiting_in_either_direction() -> None:
    assert STEP.waited == 0.1875


def test_every_command_has_one_code() -> None:
    assert len(set(COMMANDS)) == len(COMMANDS)
