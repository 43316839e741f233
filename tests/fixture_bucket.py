"""A bucket on this machine, which all clients use that training uses: gcsfs and TensorStore."""

import contextlib
import os
import socket
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def local_bucket(name: str = "bucket") -> Iterator[str]:
  """gs://NAME, empty, in the memory of this process; the variables that lead clients to it are set.

  TensorStore looks at them once in a process, and gcsfs keeps its connection: one bucket for each.
  """
  from gcp_storage_emulator.server import create_server

  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  address = f"http://127.0.0.1:{port}"
  variables = {
    "STORAGE_EMULATOR_HOST": address,
    "TENSORSTORE_GCS_HTTP_URL": address,
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks the real service
  }
  server = create_server("127.0.0.1", port, in_memory=True, default_bucket=name)
  with mock.patch.dict(os.environ, variables):
    server.start()
    try:
      yield f"gs://{name}"
    finally:
      server.stop()
