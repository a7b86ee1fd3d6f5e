"""Run by a tool: makes the calls of its argument and prints what came of each, as JSON.

`self` as a pid stands for the process whose tool this is.
"""

import json
import os
import socket
import sys

import msgpack


def main(calls):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(os.environ["LLMPROC_SOCKET"])
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=False)
    found = []
    for msgid, (method, params) in enumerate(calls):
        named = {
            key: int(os.environ["LLMPROC_PID"]) if value == "self" else value for key, value in params.items()
        }
        sock.sendall(msgpack.packb([0, msgid, method, [named]]))
        found.append(answer(sock, unpacker))
    print(json.dumps(found, default=bytes.decode))


def answer(sock, unpacker):
    while True:
        for _, _, error, result in unpacker:
            return result if error is None else {"error": error[2]["name"], "text": error[1]}
        unpacker.feed(sock.recv(1 << 18))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
