"""An S3 server in a process of its own, and samplers in others that use it."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

SERVER = "import sys, logging; logging.disable(); from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"
KILLED = -signal.SIGKILL


class Bucket:
    """As a context: the server, with one bucket, and the environment by which it is found."""

    def __enter__(self) -> "Bucket":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.endpoint = f"http://127.0.0.1:{self.port}"
        for _ in range(300):
            try:
                request = urllib.request.Request(f"{self.endpoint}/bucket", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        else:
            raise RuntimeError("no S3 server has started")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "the-key-id", "AWS_SECRET_ACCESS_KEY": "the-secret",
        }  # fmt: skip


def digests(url: str) -> dict[str, str]:
    """Of all objects under a folder."""
    import obstore
    from devinterp.store.objects import Objects

    objects = Objects.of(url)
    names = [name for name in objects.list(objects.name) if name.startswith(f"{objects.name}/")]
    read = {name: bytes(obstore.get(objects._store, name).bytes()) for name in names}
    return {name.removeprefix(f"{objects.name}/"): hashlib.md5(content).hexdigest() for name, content in read.items()}


def sampled(path: Any, environment: dict[str, str], cache: Path, **how: Any) -> subprocess.CompletedProcess[str]:
    """A small run in a process of its own. `how`: kill_at (before the request of this number), pause, settings of sample()."""
    environment = os.environ | environment | {"DEVINTERP_CACHE": str(cache), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, __file__, str(path), repr(how)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
