"""`python3 -m sglang.launch_server` of the test image: SGLang's parser and outward behaviour, with vLLM behind it."""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import os
import signal
import socket
import sys
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, web

HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}
METRICS = {
    "vllm:num_requests_running": "sglang:num_running_reqs",
    "vllm:num_requests_waiting": "sglang:num_queue_reqs",
    "vllm:generation_tokens": "sglang:generation_tokens",
    "vllm:prompt_tokens": "sglang:prompt_tokens",
    "vllm:prefix_cache_hits": "sglang:cached_tokens",
    "vllm:iteration_tokens_total_sum": "sglang:realtime_tokens_total",
}
# Flags that vLLM takes under the same name, besides those that are named below.
PASSED = ("tool_call_parser", "reasoning_parser")


def parse(argv: list[str]) -> argparse.Namespace:
    """By SGLang's own parser; a flag that it does not know ends the program, as in SGLang."""
    from sglang.srt.server_args import ServerArgs  # noqa: PLC0415 - slow, and only here

    parser = argparse.ArgumentParser(prog="launch_server.py")
    ServerArgs.add_cli_args(parser)
    return parser.parse_args(argv)


def vllm_command(args: argparse.Namespace, port: int) -> list[str]:
    command = ["vllm", "serve", "--model", args.model_path, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", args.served_model_name or args.model_path, "--enable-auto-tool-choice"]
    for name in PASSED:
        if getattr(args, name):
            command += [f"--{name.replace('_', '-')}", getattr(args, name)]
    if args.enable_cache_report:
        command.append("--enable-prompt-tokens-details")
    if args.context_length:
        command += ["--max-model-len", str(args.context_length)]
    return [*command, "--trust-remote-code"]


def vllm_environment() -> dict[str, str]:
    """With vLLM's own name for the address of the workers' ports."""
    address = os.environ.get("SGLANG_HOST_IP")
    return {**os.environ, **({"VLLM_HOST_IP": address} if address else {})}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """What a client of SGLang sees."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.name = args.served_model_name or args.model_path
        self.port = free_port()
        self.ready = False
        self.draining = asyncio.Event()
        self.running = 0
        self.active: collections.Counter[tuple[str, str]] = collections.Counter()  # as SGLang's middleware counts
        self.idle = asyncio.Event()
        self.idle.set()
        self.session: ClientSession

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def health(self, _: web.Request) -> web.Response:
        """One token generated, within 20 s."""
        if not self.ready or self.draining.is_set():
            return web.Response(status=503)
        body = {"model": self.name, "prompt": "ok", "max_tokens": 1}
        try:
            async with self.session.post(self.url("/v1/completions"), json=body, timeout=ClientTimeout(20)) as answer:
                return web.Response(status=200 if answer.status == 200 else 503)
        except (ClientError, asyncio.TimeoutError):
            return web.Response(status=503)

    async def metrics(self, _: web.Request) -> web.Response:
        if not self.args.enable_metrics:
            raise web.HTTPNotFound
        async with self.session.get(self.url("/metrics")) as answer:
            text = await answer.text()
        for name, other in METRICS.items():
            text = text.replace(name, other)
        lines = (line for line in text.splitlines() if "sglang:" in line)
        # SGLang shows this counter from the first hit on.
        kept = [line for line in lines if "sglang:cached_tokens" not in line or not line.endswith(" 0.0")]
        for (endpoint, method), count in self.active.items():
            kept.append(f'sglang:http_requests_active{{endpoint="{endpoint}",method="{method}"}} {count:.1f}')
        return web.Response(text="\n".join(kept) + "\n", content_type="text/plain")

    async def forward(self, request: web.Request) -> web.StreamResponse:
        if not self.ready:
            raise web.HTTPServiceUnavailable
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        body: Any = await request.read()
        if request.content_type == "application/json" and body:
            with contextlib.suppress(ValueError):
                parsed = await request.json()
                if isinstance(parsed, dict) and "model" in parsed:
                    parsed["model"] = self.name  # any name is answered
                    body = web.json_response(parsed).body
        self.running += 1
        self.active[request.path, request.method] += 1
        self.idle.clear()
        try:
            async with self.session.request(
                request.method, self.url(request.path_qs), headers=headers, data=body
            ) as answer:
                kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
                response = web.StreamResponse(status=answer.status, headers=kept)
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response
        finally:
            self.running -= 1
            self.active[request.path, request.method] -= 1
            if not self.running:
                self.idle.set()

    async def wait_until_ready(self, child: asyncio.subprocess.Process) -> None:
        while child.returncode is None:
            with contextlib.suppress(ClientError, asyncio.TimeoutError):
                async with self.session.get(self.url("/health"), timeout=ClientTimeout(5)) as answer:
                    if answer.status == 200:
                        self.ready = True
                        print(f"Uvicorn running on http://{self.args.host}:{self.args.port}", flush=True)
                        print("The server is fired up and ready to roll!", flush=True)
                        return
            await asyncio.sleep(0.5)

    async def run(self) -> int:
        application = web.Application(client_max_size=1 << 30)
        for path in ("/health", "/health_generate"):
            application.router.add_get(path, self.health)
        application.router.add_get("/metrics", self.metrics)
        application.router.add_route("*", "/{path:.*}", self.forward)
        self.session = ClientSession(timeout=ClientTimeout(total=None), auto_decompress=False)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, self.args.host, self.args.port).start()
        print("Load weight begin.", flush=True)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.draining.set)
        # A group of its own: SIGTERM is for this process, which drains first.
        child = await asyncio.create_subprocess_exec(
            *vllm_command(self.args, self.port), env=vllm_environment(), start_new_session=True
        )
        starting = asyncio.create_task(self.wait_until_ready(child))
        ended = asyncio.create_task(child.wait())
        told = asyncio.create_task(self.draining.wait())
        await asyncio.wait({ended, told}, return_when=asyncio.FIRST_COMPLETED)
        starting.cancel()
        if not ended.done():
            print("Gracefully exiting... Remaining number of requests", self.running, flush=True)
            await self.idle.wait()
            child.terminate()
            await ended
        await runner.cleanup()
        await self.session.close()
        return 0 if told.done() else child.returncode or 1


def main() -> int:
    argv = [word for word in sys.argv[1:] if word != "--check"]
    args = parse(argv)
    if len(argv) < len(sys.argv) - 1:
        return 0
    return asyncio.run(serve(args))


async def serve(args: argparse.Namespace) -> int:
    return await Server(args).run()


if __name__ == "__main__":
    sys.exit(main())
