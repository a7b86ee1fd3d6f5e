"""MessagePack-RPC clients that others wrote, unchanged, against the real daemon.

Each lists and spawns processes, waits for them, and is told of an error in a way its user can read; most hear
of events too. A client that is not installed here is skipped, and says so.
"""

import os
import shutil
import socket
import subprocess
import sys

import msgpack
import pytest

PYNVIM = """
import sys
from pynvim.msgpack_rpc import socket_session

s = socket_session(sys.argv[1])
assert s.request("proc.list", {"all": True})["procs"][0]["program"] == "init"
sub = s.request("events.subscribe", {"types": ["exit"]})["sub"]
pid = s.request("proc.spawn", {"program": "demo", "prompt": "!say hello pynvim"})["pid"]
(ended,) = s.request("proc.wait", {"pids": [pid]})["procs"]
assert (ended["status"], ended["message"]) == (0, "hello pynvim"), ended
assert s.request("fd.read", {"pid": pid, "fd": 1})["data"].startswith(b"hello pynvim")
while True:
    note = s.next_message()
    assert (note.name, note.args[0]["sub"]) == ("event", sub)
    if any(event["pid"] == pid for event in note.args[0]["events"]):
        break
try:
    s.request("proc.signal", {"pid": 999999, "signal": "INT"})
except Exception as error:
    print(error)
"""

AIO = """
import asyncio, sys
from aio_msgpack_rpc.client import Client
from aio_msgpack_rpc.error import RPCResponseError

async def main():
    client = Client(*await asyncio.open_unix_connection(sys.argv[1]))
    assert (await client.call("proc.list", {"all": True}))["procs"][0]["pid"] == 1
    spawns = [client.call("proc.spawn", {"program": "demo", "prompt": f"!say hello {i}"}) for i in range(3)]
    pids = [spawned["pid"] for spawned in await asyncio.gather(*spawns)]
    ended = (await client.call("proc.wait", {"pids": pids}))["procs"]
    assert sorted(e["message"] for e in ended) == ["hello 0", "hello 1", "hello 2"], ended
    try:
        await client.call("proc.signal", {"pid": 999999, "signal": "INT"})
    except RPCResponseError as error:
        print(error)
    client.close()

asyncio.run(main())
"""

NVIM = """
local ch = vim.fn.sockconnect('pipe', os.getenv('SOCK'), { rpc = true })
assert(vim.rpcrequest(ch, 'hello', { errors = 'nvim', client = 'nvim' }).proto == 1)
assert(vim.rpcrequest(ch, 'proc.list', { all = true }).procs[1].program == 'init')
vim.rpcrequest(ch, 'events.subscribe', { types = { 'exit' } })
local pid = vim.rpcrequest(ch, 'proc.spawn', { program = 'demo', prompt = '!say hello nvim' }).pid
local ended = vim.rpcrequest(ch, 'proc.wait', { pids = { pid } }).procs[1]
assert(ended.status == 0 and ended.message == 'hello nvim', vim.inspect(ended))
assert(#vim.rpcrequest(ch, 'proc.history', { pid = pid }).messages == 2)
local ok, err = pcall(vim.rpcrequest, ch, 'proc.signal', { pid = 999999, signal = 'INT' })
assert(not ok)
assert(#vim.rpcrequest(ch, 'proc.list').procs == 0)
io.stdout:write(tostring(err) .. '\\n')
vim.cmd('qa!')
"""

MSGPACK5 = """
const net = require('net'), Session = require('msgpack5rpc'), assert = require('assert');
const socket = net.connect(process.env.SOCK), session = new Session();
session.attach(socket, socket);
let exits = 0;
session.on('notification', (method, args) => { if (method === 'event') exits += args[0].events.length; });
const call = (method, args) => new Promise((ok, no) =>
  session.request(method, args ? [args] : [], (error, result) => error ? no(error) : ok(result)));
(async () => {
  assert.equal((await call('proc.list', { all: true })).procs[0].program, 'init');
  await call('events.subscribe', { types: ['exit'] });
  const { pid } = await call('proc.spawn', { program: 'demo', prompt: '!say hello node' });
  const { procs } = await call('proc.wait', { pids: [pid] });
  assert.equal(procs[0].message, 'hello node');
  while (!exits) await new Promise(r => setTimeout(r, 5));
  await call('proc.signal', { pid: 999999, signal: 'INT' }).catch(error => {
    assert.equal(error[0], 3); assert.equal(error[2].name, 'ESRCH'); console.log(error[1]); });
  process.exit(0);
})().catch(error => { console.error(error); process.exit(1); });
"""


def run(argv: list[str], path: str) -> str:
    """What a client printed; it must have ended well."""
    done = subprocess.run(
        argv, env={**os.environ, "SOCK": path}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


@pytest.mark.parametrize(("package", "client"), [("pynvim", PYNVIM), ("aio_msgpack_rpc", AIO)])
def test_python_clients(daemon, package, client):
    """pynvim blocks and sends method names as bin, aio-msgpack-rpc has many requests under way."""
    pytest.importorskip(package)
    assert "ESRCH: no such process: 999999" in run(
        [sys.executable, "-c", client, daemon.socket], daemon.socket
    )


def test_neovim_itself(daemon, tmp_path):
    """The editor's own rpcrequest shows our errors once it has asked for its shape of them."""
    script = tmp_path / "client.lua"
    script.write_text(NVIM)
    argv = [need("nvim"), "--headless", "-u", "NONE", "-i", "NONE", "-c", f"luafile {script}", "-c", "cq"]
    assert "ESRCH: no such process: 999999" in run(argv, daemon.socket)


def test_a_javascript_client(daemon):
    """npm's msgpack5rpc hands the error over whole. `NODE_PATH` says where it is installed."""
    node = need("node")
    probe = [node, "-e", "require('msgpack5rpc')"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("npm's msgpack5rpc is not installed")
    assert "ESRCH: no such process: 999999" in run([node, "-e", MSGPACK5], daemon.socket)


def test_a_shell_without_any_library(daemon):
    """Fourteen bytes and a half-close, as `printf ... | socat` does."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(daemon.socket)
        sock.sendall(b"\x94\x00\x01\xa9proc.list\x90")
        sock.shutdown(socket.SHUT_WR)
        reply = b""
        while chunk := sock.recv(4096):
            reply += chunk
    assert msgpack.unpackb(reply) == [1, 1, None, {"procs": []}]


def test_a_subscription_is_known_before_its_first_event(daemon):
    """Old events are pushed too, but never before the reply: simple clients read one message a request."""
    with daemon.client() as client:
        client.finish("demo", "!say something to have happened")
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(daemon.socket)
            sock.sendall(msgpack.packb([0, 1, "events.subscribe", [{"after_seq": 0}]]))
            assert sock.recv(2)[1] == 1
