"""Being asked to stop; on real trainings in tests/e2e."""

import http.server
import signal
import threading
import time

import pytest

from lip_jax.training.preemption import StopRequest


def test_a_preemption_notice_is_a_request_to_stop(monkeypatch, caplog):
  """In the machine's metadata server's place one that answers when the value changes."""
  preempted, asked = threading.Event(), []

  class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append((self.path, self.headers["Metadata-Flavor"]))
      if len(asked) == 1:
        self.send_error(503)
        return
      if "wait_for_change" in self.path:
        preempted.wait(20)
      self.send_response(200)
      self.end_headers()
      self.wfile.write(b"TRUE" if preempted.is_set() else b"FALSE")

    def log_message(self, *_):
      pass

  monkeypatch.setattr("lip_jax.training.preemption._RETRY_SECONDS", 0.01)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    with StopRequest(preemption_notice=True) as stop:
      deadline = time.monotonic() + 20
      while len(asked) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
      assert not stop.requested
      preempted.set()
      while not stop.requested:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.shutdown()
  path = "/computeMetadata/v1/instance/preempted"
  assert [p for p, _ in asked[:2]] == [path] * 2
  assert asked[2] == (f"{path}?wait_for_change=true&timeout_sec=300", "Google")


@pytest.fixture
def usual_sigint():
  """A shell's background processes, as these tests may be, ignore it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_sigint")
def test_a_second_sigterm_changes_nothing_and_a_second_sigint_acts_as_usual():
  before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  with StopRequest() as stop:
    for _ in range(3):
      signal.raise_signal(signal.SIGTERM)  # else it would end this process
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
