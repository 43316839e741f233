import itertools
import logging
import re
import time

from lip_jax.training.watchdog import Watchdog


def hang_here(until):
  deadline = time.monotonic() + 60
  while not until():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_reports_what_takes_too_long_and_where(caplog, messages):
  caplog.set_level(logging.INFO, "lip_jax")
  with Watchdog(seconds=0.5, first_seconds=60, factor=20) as watchdog:
    watchdog.doing("step 1")
    time.sleep(0.7)  # which compiles
    for step in range(2, 8):
      watchdog.doing(f"step {step}")
      time.sleep(0.005)
    assert not messages()
    watchdog.doing("step 8")
    hang_here(lambda: len(messages()) >= 2)
    watchdog.doing(None)
    hang_here(lambda: "has ended" in messages()[-1])
  *reports, end = messages()
  begun = r"step 8 takes (\d+\.\d) s so far \(usually 0\.0\d+ s\); it is at\nMainThread:"
  times = [float(re.match(begun, report)[1]) for report in reports]
  assert times[0] >= 0.5
  for before, after in itertools.pairwise(times):
    assert after >= 2 * before - 0.2  # for rounding
  for report in reports:
    assert "in hang_here" in report
  assert float(re.fullmatch(r"step 8 has ended, after about (\d+\.\d) s", end)[1]) >= times[-1]


def test_what_usually_takes_long_may_do_so(messages):
  with Watchdog(seconds=0.05, first_seconds=10, factor=20) as watchdog:
    for step in range(6):
      watchdog.doing(f"evaluation batch {step}")
      time.sleep(0.1)
  assert not messages()
