"""Two "nodes" on one Linux machine: network namespaces with a cable between them, each with a host name of its own.

    python -m tests.graphs.two_nodes      # moe-ep decode under torchrun on both

Needs root (or a kernel that lets users make namespaces) and ``ip``. Nothing is left behind: all of it lives in
namespaces of the one command, which the kernel removes when its last process ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FIRST = "10.77.0.1"  # node 0's address; node 1 has the next one
PORT = "29511"

# Runs "$@" on both nodes with NODE_RANK set, output to $FOLDER/node<n>.{out,err}; exit status 1 if it failed on either.
SCRIPT = """
set -eu
mount -t tmpfs tmpfs /run; mkdir /run/netns
ip netns add node0; ip netns add node1
ip link add cable0 netns node0 type veth peer name cable1 netns node1
for n in 0 1; do
    ip -n node$n link set lo up
    ip -n node$n address add 10.77.0.$((n + 1))/24 dev cable$n
    ip -n node$n link set cable$n up
done
for n in 0 1; do
    export NODE_RANK=$n GLOO_SOCKET_IFNAME=cable$n
    { ip netns exec node$n unshare --uts sh -c 'hostname "node$NODE_RANK"; exec "$@"' sh "$@" \
        > "$FOLDER/node$n.out" 2> "$FOLDER/node$n.err" && : > "$FOLDER/done$n" || : > "$FOLDER/failed"; } &
done
# "wait -n" may miss a job that has already ended
until [ -e "$FOLDER/failed" ] || [ -e "$FOLDER/done0" -a -e "$FOLDER/done1" ]; do sleep 0.05; done
test ! -e "$FOLDER/failed"
"""


class NodeOutput(NamedTuple):
    """What a command printed on one node."""

    out: str
    err: str


def run_on_both(command: list[str], timeout_s: float) -> tuple[int, list[NodeOutput]]:
    """Run ``command`` on both nodes at once; exit status and what each printed. If one fails, the other is ended."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        settings = {"FOLDER": folder, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        # --kill-child with a process namespace: when the script ends, everything in it does
        nodes = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        if os.getuid() != 0:
            nodes += ["--user", "--map-root-user"]
        done = subprocess.run(
            [*nodes, "bash", "-c", SCRIPT, "nodes", *command],
            env=os.environ | settings, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
        outputs = [NodeOutput(*(_read(Path(folder) / f"node{n}.{kind}") for kind in ("out", "err"))) for n in (0, 1)]
        outputs[0] = NodeOutput(outputs[0].out, outputs[0].err + done.stderr)
        return done.returncode, outputs


def why_not() -> str | None:
    """The reason why there can be no nodes here, None if there can."""
    try:
        status, outputs = run_on_both(["true"], 30)
    except FileNotFoundError as error:
        return f"{error.filename} is not installed (packages util-linux and iproute2)"
    return outputs[0].err.strip() or f"exit status {status}" if status else None


def torchrun(ranks_per_node: int, *program: str) -> list[str]:
    """The command that a user starts on every node, here with the node's number from NODE_RANK."""
    line = (
        f'exec "$0" -m torch.distributed.run --nnodes 2 --node-rank "$NODE_RANK" --nproc-per-node {ranks_per_node} '
        f'--master-addr {FIRST} --master-port {PORT} "$@"'
    )
    return ["sh", "-c", line, sys.executable, *program]


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    result, both = run_on_both(torchrun(1, "-m", "graphs.cli", "decode", "--device", "cpu", *sys.argv[1:]), 600)
    print(*(f"node {n}\n{output.out}{output.err[-3000:]}" for n, output in enumerate(both)), sep="\n")
    sys.exit(result)
