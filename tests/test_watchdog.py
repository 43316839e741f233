import logging
import re
import time

from lip_jax.watchdog import Watchdog


def hang_here(seconds):
  time.sleep(seconds)


def test_reports_what_takes_too_long_and_where(caplog):
  caplog.set_level(logging.INFO, "lip_jax")
  logging.getLogger("lip_jax").propagate = True
  with Watchdog(seconds=0.2, first_seconds=10, factor=20) as watchdog:
    watchdog.doing("step 1")
    hang_here(0.4)  # which compiles
    for step in range(2, 8):
      watchdog.doing(f"step {step}")
      time.sleep(0.005)
    assert not caplog.records
    watchdog.doing("step 8")
    hang_here(1.1)
    watchdog.doing(None)
    time.sleep(0.5)
  *reports, end = [record.getMessage() for record in caplog.records]
  assert 2 <= len(reports) <= 3  # at 0.2, 0.4 and 0.8 s
  for report in reports:
    assert re.match(r"step 8 takes 0\.\d s so far \(usually 0\.00\d+ s\)", report), report
    assert "MainThread" in report
    assert "in hang_here" in report
  assert re.match(r"step 8 has ended, after about 1\.\d s", end)


def test_what_usually_takes_long_may_do_so(caplog):
  with Watchdog(seconds=0.05, first_seconds=10, factor=20) as watchdog:
    for step in range(6):
      watchdog.doing(f"evaluation batch {step}")
      time.sleep(0.1)
  assert not caplog.records


def test_costs_little():
  with Watchdog() as watchdog:
    begin = time.perf_counter()
    for step in range(20_000):
      watchdog.doing(f"step {step}")
    assert (time.perf_counter() - begin) / 20_000 < 50e-6  # about 3 us on an idle machine
