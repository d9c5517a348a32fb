"""An S3 server in a process of its own, and samplers in others that use it."""

import hashlib
import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
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


class Proxy:
    """Between a client and the server: passes requests on, answers some with 503, or is not there."""

    def __init__(self, bucket: Bucket):
        self.failing, self.seen, proxy = 0, 0, self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.seen += 1
                if proxy.failing:
                    proxy.failing -= 1
                    self.answer(503, {}, b"")
                    return
                there = http.client.HTTPConnection("127.0.0.1", bucket.port, timeout=30)
                there.request(self.command, self.path, body, dict(self.headers))
                found = there.getresponse()
                self.answer(found.status, dict(found.getheaders()), found.read())
                there.close()

            def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                length = headers.get("Content-Length", str(len(content)))
                self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class FarWorlds:
    """A process that has imported everything and forks a child per run; `run` returns how it ended and its number of writes."""

    def __enter__(self) -> "FarWorlds":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "TQDM_DISABLE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def run(self, url: str, environment: dict[str, str], cache: Path, kill_at: int = -1, **settings: Any) -> tuple[int, int]:
        """Killed before the request of this number that writes or deletes an object."""
        self.start(url, environment, cache, kill_at, **settings)
        return self.end()

    def start(self, url: str, environment: dict[str, str], cache: Path, kill_at: int = -1, **settings: Any) -> None:
        assert self._process.stdin is not None
        asked = {"url": url, "environment": environment | {"DEVINTERP_CACHE": str(cache)}, "kill_at": kill_at}
        self._process.stdin.write(json.dumps(asked | {"settings": settings}) + "\n")
        self._process.stdin.flush()

    def end(self) -> tuple[int, int]:
        assert self._process.stdout is not None
        code, count = json.loads(self._process.stdout.readline())
        return code, count


# -- in the process of a world --

SETTINGS: dict[str, Any] = {
    "lr": 1e-3, "n_beta": 10.0, "localization": 5.0, "num_draws": 7, "num_chains": 2, "batch_size": 4, "num_burnin_steps": 3,
    "num_init_loss_batches": 2, "batches_per_draw": 1, "checkpoint_every": 0, "sampling_method": "leimkuhler_matthews",
    "progress": False,
}  # fmt: skip


def serve() -> None:
    sys.stdout, replies = sys.stderr, sys.stdout
    import torch
    from cases import TinyLM, random_tokens

    import devinterp
    from devinterp.store import mirror, schema

    torch.set_num_threads(1)
    schema.MOST_DRAWS_PER_CHUNK, schema.STEPS_PER_CHUNK = 3, 4
    mirror.COPIES.seconds = 0.005
    data, code = random_tokens(32), random_tokens(8, seed=1)
    for line in sys.stdin:
        asked = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            os.environ.update(asked["environment"])
            counts = count_writes(asked["kill_at"])
            try:
                devinterp.sample(TinyLM(), data, {"code": code}, output_path=asked["url"], **(SETTINGS | asked["settings"]))
                os.write(write, f"{counts[0]}\n".encode())
                os._exit(0)
            except BaseException as error:
                traceback.print_exception(error)
                os._exit(3)
        os.close(write)
        _, status = os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            counted = pipe.read().strip()
        replies.write(json.dumps([os.waitstatus_to_exitcode(status), int(counted or -1)]) + "\n")
        replies.flush()


def count_writes(kill_at: int) -> list[int]:
    import obstore

    counts, guard = [0], threading.Lock()

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            with guard:
                if counts[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                counts[0] += 1
            return function(*arguments, **options)

        return call

    obstore.put, obstore.delete = counted(obstore.put), counted(obstore.delete)
    return counts


if __name__ == "__main__":
    serve()
