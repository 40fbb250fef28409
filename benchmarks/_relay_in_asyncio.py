"""A relay on asyncio's streams, with its own loop or uvloop's; prints the port it listens on."""

from __future__ import annotations

import asyncio
import contextlib
import sys


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):  # the peer has closed
        writer.write_eof()


async def serve(backend: int) -> None:
    # Once a client has sent its end, the loop no longer refers to its transport, and nothing else
    # to the task: the garbage collection would end both.
    held = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        held.add(task)
        back_reader, back_writer = await asyncio.open_connection("127.0.0.1", backend)
        # Both have TCP_NODELAY: the loops set it.
        with contextlib.closing(writer), contextlib.closing(back_writer):
            both = pump(reader, back_writer), pump(back_reader, writer)
            with contextlib.suppress(ConnectionError):
                await asyncio.gather(*both)
        held.discard(task)

    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    name, backend = sys.argv[1], int(sys.argv[2])
    if name == "uvloop":
        import uvloop

        uvloop.install()
    asyncio.run(serve(backend))


if __name__ == "__main__":
    main()
