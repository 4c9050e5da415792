"""The backend ``s3``: torch's fsspec storage through s3fs, on an S3 server of its own on the loopback interface.

The server is moto's; it keeps its objects in memory and ends with the run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from dcpbench.backends.protocol import StorageBackend

try:
    import s3fs
    from moto.server import ThreadedMotoServer
except ImportError as error:
    raise ImportError(f"{error.name} is missing: pip install 'dcpbench[s3]'") from error

__all__ = ["BACKEND", "moto_bucket"]

_BUCKET = "checkpoints"


@contextmanager
def moto_bucket() -> Iterator[str]:
    """Starts an S3 server with an empty bucket on a free port, and yields the bucket's URL."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it prints a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="dcpbench",
        AWS_SECRET_ACCESS_KEY="dcpbench",  # noqa: S106  (the server takes any)
        AWS_DEFAULT_REGION="us-east-1",
    )
    try:
        s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).mkdir(_BUCKET)
        yield f"s3://{_BUCKET}"
    finally:
        server.stop()


BACKEND = StorageBackend("s3", FsspecWriter, FsspecReader, location=moto_bucket)
