"""Ending a loop cleanly when the process is asked to stop: by a signal, or by the cloud."""

import http.client
import logging
import os
import signal
import threading
import urllib.request
from typing import Any, Self

log = logging.getLogger("lip_jax")

# Of a Google Cloud machine, a TPU VM for example. The answer comes when the value changes.
_METADATA_HOST = "metadata.google.internal"
_PREEMPTED = "http://{host}/computeMetadata/v1/instance/preempted"
_ANSWER_SECONDS = 300  # that one question may wait
_RETRY_SECONDS = 30.0


class StopRequest:
  """Turns the first SIGTERM or SIGINT, or a pre-emption notice, into `requested`.

  A second SIGINT acts as usual. Further SIGTERMs change nothing: schedulers, and scripts that pass
  on what the process has got itself, send more than one. Use as a context manager.

  Args:
    preemption_notice: ask this machine's metadata server, as Cloud TPU VMs have one, whether the
      machine is about to be taken away: that comes up to half a minute before its end.
  """

  def __init__(self, *, preemption_notice: bool = False):
    self.requested = False
    self._before: dict[int, Any] = {}
    self._over = threading.Event()
    self._ask = preemption_notice

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():  # signals can be set nowhere else
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._handle) or signal.SIG_DFL
    if self._ask:
      threading.Thread(target=self._wait_for_notice, name="lip-preemption", daemon=True).start()
    return self

  def _handle(self, number: int, _frame: Any) -> None:
    if not self.requested:
      self._request(signal.Signals(number).name)
    if before := self._before.pop(signal.SIGINT, None):
      signal.signal(signal.SIGINT, before)

  def _request(self, reason: str) -> None:
    self.requested = True
    log.warning("%s: saving a checkpoint and stopping", reason)

  def _restore(self) -> None:
    while self._before:
      signal.signal(*self._before.popitem())

  def __exit__(self, *_) -> None:
    self._over.set()
    self._restore()

  def _wait_for_notice(self) -> None:
    host = os.environ.get("GCE_METADATA_HOST", _METADATA_HOST)
    url = _PREEMPTED.format(host=host)  # the first answer comes at once
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine's
    while not self._over.is_set():
      request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
      try:
        with opener.open(request, timeout=2 * _ANSWER_SECONDS) as answer:
          preempted = answer.read().strip() == b"TRUE"
      except (OSError, http.client.HTTPException) as error:
        log.debug("no answer from the metadata server: %s", error)
        self._over.wait(_RETRY_SECONDS)
        continue
      if preempted:
        if not self._over.is_set():
          self._request("this machine is being pre-empted")
        return
      url = f"{_PREEMPTED.format(host=host)}?wait_for_change=true&timeout_sec={_ANSWER_SECONDS}"
