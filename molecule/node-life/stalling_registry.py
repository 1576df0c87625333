"""Passes on what the registry at port 5001 answers; but the first large layer that is asked for stops in its middle.

For ever. Prints `stalled DIGEST` then, and `sent DIGEST` for each large layer that went through.
"""

from __future__ import annotations

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = 1 << 20
PASSED_ON = ("Accept", "Host", "Range")
first = threading.Semaphore()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        registry = http.client.HTTPConnection("127.0.0.1", 5001)
        headers = {name: self.headers[name] for name in PASSED_ON if name in self.headers}
        registry.request(self.command, self.path, headers=headers)
        answer = registry.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        size, digest = int(answer.headers.get("Content-Length", 0)), self.path.rpartition("/")[2]
        layer = self.command == "GET" and "/blobs/" in self.path and size > LARGE
        stall, sent = layer and first.acquire(blocking=False), 0
        while chunk := answer.read(1 << 16):
            self.wfile.write(chunk)
            sent += len(chunk)
            if stall and sent > size / 2:
                print("stalled", digest, flush=True)
                time.sleep(3600)
        if layer:
            print("sent", digest, flush=True)
        registry.close()

    do_HEAD = do_GET


if __name__ == "__main__":
    ThreadingHTTPServer(("", 5000), Handler).serve_forever()
