"""Directories of runs, on disks and in a bucket that an emulator of the service holds."""

import http.server
import importlib.util
import json
import logging
import os
import threading
from pathlib import Path

import pytest
from etils import epath

from lip_jax.errors import UsageError
from lip_jax.training import config as config_lib
from lip_jax.training import workdir as workdir_lib
from lip_jax.training.bucket_sync import BucketSync
from lip_jax.training.metrics import MetricsWriter


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_paths_on_a_disk_become_absolute(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "real").mkdir()
  (tmp_path / "link").symlink_to("real")
  assert str(workdir_lib.absolute("link/run")) == str(tmp_path / "real" / "run")
  assert str(workdir_lib.absolute("~/run")) == os.path.realpath(Path.home() / "run")


def test_access_to_a_disk_is_tried_and_leaves_nothing(tmp_path):
  path = workdir_lib.check_access(tmp_path / "a" / "run")
  assert path.is_dir()
  assert list(path.iterdir()) == []
  (tmp_path / "file").write_text("")
  with pytest.raises(UsageError, match=r"cannot use .*/file/run: Not a directory; name a"):
    workdir_lib.check_access(tmp_path / "file" / "run")


def test_a_bucket_needs_an_extra(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find(name)
  )
  with pytest.raises(UsageError, match=r"in a bucket: pip install 'lip-jax\[gcs\]'"):
    workdir_lib.absolute("gs://bucket/run")


def test_other_urls_are_refused():
  for url in ("s3://bucket/run", "gs://bucket", "gs://bucket/", "gs:///run"):
    with pytest.raises(UsageError, match="write gs://BUCKET/DIRECTORY"):
      workdir_lib.absolute(url)


def test_a_bucket_takes_what_a_run_writes(bucket, messages):
  url = f"{bucket}/runs/first"
  path = workdir_lib.check_access(url + "/")
  assert str(path) == url
  assert not path.exists()  # nothing is left behind
  with pytest.raises(UsageError, match=f"no run in {url}"):
    config_lib.load(url)
  workdir_lib.write_text(path / "config.json", "{")
  with pytest.raises(UsageError, match=rf"{url}/config.json is damaged"):
    config_lib.load(url)

  with MetricsWriter(path, total_steps=9, start_step=0) as writer:
    for step in range(1, 6):
      writer.write(step, "train", {"loss": float(step)})
    assert not (path / "metrics.jsonl").exists()  # once a minute
    writer.flush()
    assert len(lines(path)) == 5
  with MetricsWriter(path, total_steps=9, start_step=3) as writer:
    writer.write(4, "train", {"loss": 40.0})
    writer.write(4, "validation", {"top1": 0.5})
  assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 4]
  assert len(list((path / "tensorboard").iterdir())) == 2  # one of each part of the run
  assert not messages()


def test_a_copy_that_fails_is_reported_and_made_up_for(tmp_path, caplog):
  sync = BucketSync(epath.Path(tmp_path / "remote"))
  (sync.local / "metrics.jsonl").write_text("1\n")
  with caplog.at_level(logging.WARNING, "lip_jax"):
    sync.flush()  # to where there is no directory
  assert f"cannot write {tmp_path}/remote/metrics.jsonl, will try again" in caplog.text
  (tmp_path / "remote").mkdir()
  sync.close()
  assert (tmp_path / "remote" / "metrics.jsonl").read_text() == "1\n"
  assert not sync.local.exists()


def test_a_bucket_that_does_not_exist_is_named(bucket):
  with pytest.raises(UsageError, match=r"there is no bucket 'elsewhere'; make it with `gcloud"):
    workdir_lib.check_access("gs://elsewhere/run")


def test_a_bucket_that_refuses_is_named(bucket, monkeypatch):
  """What the service says to an account without a role, by a server that says it to all."""

  class Refuse(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      self.rfile.read(int(self.headers.get("Content-Length", 0)))
      said = {"error": {"code": 403, "message": "someone@example.com does not have access."}}
      self.send_response(403)
      self.end_headers()
      self.wfile.write(json.dumps(said).encode())

    do_GET = do_PUT = do_POST  # noqa: N815

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    try:
      with pytest.raises(UsageError, match=r"does not have access.*give this account the role"):
        workdir_lib.check_access("gs://refusing/run")
    finally:
      server.shutdown()
      thread.join()


def test_without_credentials_a_bucket_is_not_tried(bucket, monkeypatch):
  monkeypatch.delenv("STORAGE_EMULATOR_HOST")
  monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent")
  with pytest.raises(UsageError, match="no Google credentials found; on a Cloud VM"):
    workdir_lib.check_access("gs://bucket/run")


def test_a_directory_is_for_one_run_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir_lib, "_LOCK_SECONDS", 0.3)
  path = workdir_lib.absolute(tmp_path)
  holder = f"is in use by process {os.getpid()} on .*; wait until"
  with workdir_lib.lock(path), pytest.raises(UsageError, match=holder), workdir_lib.lock(path):
    pass
  with workdir_lib.lock(path):
    pass
  assert list(tmp_path.iterdir()) == []
  # What a killed process left in it says nothing, and stays.
  (tmp_path / ".lock").write_text("process 1 on elsewhere\n")
  with workdir_lib.lock(path):
    assert str(os.getpid()) in (tmp_path / ".lock").read_text()
  assert (tmp_path / ".lock").read_text() == "process 1 on elsewhere\n"
