"""The whole of QEMU's recipe, driven by the package qemu.qmp as it comes from PyPI.

recipe.py PROGRAM DIR: makes a template in DIR with PROGRAM, and runs two clones of it.
"""

import asyncio
import os
import sys

from qemu.qmp import ExecuteError, QMPClient


async def connect(path):
    client = QMPClient("pando")
    for _ in range(600):
        try:
            await client.connect(path)
            return client
        except Exception:  # the machine is still starting
            await asyncio.sleep(0.05)
    raise SystemExit(f"no monitor at {path}")


async def migrated(client):
    while True:
        answer = await client.execute("query-migrate")
        if answer.get("status") in ("completed", "failed"):
            assert answer["status"] == "completed", answer
            return
        await asyncio.sleep(0.01)


async def start(program, name, *options):
    socket = f"{name}.sock"
    process = await asyncio.create_subprocess_exec(
        program, "qemu", "-nodefaults", "-nographic", "-m", "64M", *options,
        "-qmp", f"unix:{socket},server=on,wait=off",
    )
    return process, await connect(socket)


def memory(how):
    return (
        "-object", f"memory-backend-file,id=pc.ram,mem-path=template,size=64M,{how}",
        "-machine", "q35,memory-backend=pc.ram",
    )


async def quit(process, client):
    await client.execute("quit")
    assert await process.wait() == 0
    try:
        await client.disconnect()
    except Exception:
        pass  # it was ended from the other side


async def template(program):
    process, client = await start(
        program, "t", *memory("share=on"), "-kernel", "embedded", "-serial", "file:serial")
    while "pando guest ready" not in open("serial", encoding="ascii").read():
        await asyncio.sleep(0.01)
    with client.listener(("STOP", "MIGRATION")) as events:
        await client.execute("stop")
        assert (await asyncio.wait_for(events.get(), 60))["event"] == "STOP"
        capabilities = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
        await client.execute("migrate-set-capabilities", {"capabilities": capabilities})
        await client.execute("migrate", {"uri": "file:state"})
        while True:
            event = await asyncio.wait_for(events.get(), 60)
            if event["data"]["status"] == "completed":
                break
    await migrated(client)
    assert (await client.execute("query-status"))["status"] == "postmigrate"
    try:
        await client.execute("no-such-command")
        raise SystemExit("a command that does not exist was done")
    except ExecuteError as error:
        assert error.error_class == "CommandNotFound", error
    commands = {command["name"] for command in await client.execute("query-commands")}
    schema = await client.execute("query-qmp-schema")
    known = {entity["name"] for entity in schema if entity["meta-type"] == "command"}
    assert commands == known, commands ^ known
    await quit(process, client)


async def clone(program, name):
    process, client = await start(
        program, name, *memory("share=off,readonly=on,rom=off"), "-incoming", "defer")
    assert (await client.execute("query-status"))["status"] == "inmigrate"
    await client.execute(
        "migrate-set-capabilities", {"capabilities": [{"capability": "x-ignore-shared", "state": True}]})
    await client.execute("migrate-incoming", {"uri": "file:state"})
    await migrated(client)
    assert (await client.execute("query-status"))["status"] == "paused"
    with client.listener("RESUME") as events:
        await client.execute("cont")
        await asyncio.wait_for(events.get(), 60)
    assert await client.execute("query-status") == {"status": "running", "running": True}
    return process, client


async def main(program, directory):
    os.chdir(directory)
    await template(program)
    clones = [await clone(program, name) for name in ("c1", "c2")]
    for process, client in clones:
        await quit(process, client)
    print("done")


asyncio.run(main(*sys.argv[1:]))
