"""A bucket on this machine, which all clients use that training uses: gcsfs and TensorStore."""

import contextlib
from collections.abc import Iterator

from fixture_ports import free_port


@contextlib.contextmanager
def local_bucket(name: str = "bucket") -> Iterator[tuple[str, dict[str, str]]]:
  """gs://NAME, empty, in the memory of this process, and the variables that lead clients to it.

  TensorStore looks at them once in a process, and gcsfs keeps its connection: one bucket for each.
  """
  from gcp_storage_emulator.server import create_server

  port = free_port()
  address = f"http://127.0.0.1:{port}"
  server = create_server("127.0.0.1", port, in_memory=True, default_bucket=name)
  server.start()
  try:
    yield (
      f"gs://{name}",
      {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks the real service
      },
    )
  finally:
    server.stop()
