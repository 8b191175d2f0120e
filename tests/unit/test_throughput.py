"""Phases of a start and the throughput meter."""

import pytest

from sana_kit.throughput import PhaseClock, ThroughputMeter


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_phases_of_a_start_add_up():
    now = [10.0]
    phases = PhaseClock(started=8.0, clock=lambda: now[0])
    phases.mark("imports")
    now[0] = 13.5
    phases.mark("model")
    now[0] = 14.0
    phases.mark("imports")
    assert phases.seconds == {"imports": 2.5, "model": 3.5}
    assert str(phases) == "6.0 s: imports 2.5, model 3.5"


def test_meter_leaves_out_pauses_and_the_first_lap():
    clock = Clock()
    meter = ThroughputMeter(images_per_step=16, clock=clock)
    meter.start()
    clock.now += 50  # warm-up: the first step takes 50 s
    meter.step()
    assert meter.lap() == pytest.approx(16 / 50)
    for _ in range(4):
        clock.now += 2
        meter.step()
        with meter.paused():
            clock.now += 1000  # a validation ...
            with meter.paused():
                clock.now += 500  # ... that saves a checkpoint
    assert meter.lap() == pytest.approx(8.0)
    assert meter.lap() is None  # no step in between
    clock.now += 4
    meter.step(2)
    assert meter.lap() == pytest.approx(8.0)
    assert meter.steady_reason is None
    assert meter.steady_images_per_second() == pytest.approx(8.0)
    assert meter.steady_steps_per_second() == pytest.approx(0.5)
    assert meter.steps == 7
    assert meter.steps_per_second == pytest.approx(7 / 62)
    assert meter.images_per_second == pytest.approx(16 * 7 / 62)


def test_meter_says_why_a_short_run_has_no_steady_state():
    clock = Clock()
    meter = ThroughputMeter(images_per_step=2, clock=clock)
    assert meter.steps_per_second is None
    with pytest.raises(RuntimeError, match="start"):
        meter.step()
    meter.start()
    assert meter.steady_images_per_second() is None and "too short" in meter.steady_reason
    clock.now += 1
    meter.step(3)
    meter.lap()
    assert meter.steady_images_per_second() is None and "3 step(s) in 1 lap(s)" in meter.steady_reason
    assert meter.images_per_second == pytest.approx(6.0)
    with pytest.raises(ValueError, match="images_per_step=0"):
        ThroughputMeter(0)


def test_a_failing_pause_still_ends():
    clock = Clock()
    meter = ThroughputMeter(1, clock)
    meter.start()
    with pytest.raises(KeyError), meter.paused():
        clock.now += 9
        raise KeyError
    clock.now += 1
    assert meter.active_seconds == pytest.approx(1.0)
