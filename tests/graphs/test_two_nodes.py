"""The same program on two machines: torchrun in two network namespaces, joined by a cable, over gloo."""

from __future__ import annotations

import json
import os

import pytest

from tests.graphs.two_nodes import run_on_both, torchrun, why_not

RANKS_PER_NODE = 2


@pytest.fixture(scope="module", autouse=True)
def nodes_can_be_made() -> None:
    """Where they cannot, the tests say so; in CI (where ``CI`` is set) they fail, so that they run somewhere."""
    if (reason := why_not()) is not None:
        message = f"NOT SHOWN HERE: two network namespaces on one machine cannot be made: {reason}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


def test_nodes_reach_each_other_and_nothing_else():
    script = "hostname; cat /proc/net/dev | grep -c :; exec python3 - <<'END'\n" + PROBE + "END"
    status, nodes = run_on_both(["sh", "-c", script], 60)
    assert status == 0, nodes
    assert [node.out.split() for node in nodes] == [["node0", "2", "got", "hello"], ["node1", "2", "got", "hello"]]


# Node 0 listens; each sends the other a word. The interfaces are a loopback and the cable.
PROBE = """
import os, socket, time
if os.environ["NODE_RANK"] == "0":
    peer = socket.create_server(("10.77.0.1", 29600)).accept()[0]
else:
    for _ in range(200):
        try:
            peer = socket.create_connection(("10.77.0.1", 29600), 5)
            break
        except OSError:
            time.sleep(0.05)
peer.sendall(b"hello")
print("got", peer.recv(5).decode())
"""


def test_a_node_that_fails_ends_the_other():
    status, nodes = run_on_both(["sh", "-c", "test $NODE_RANK = 0 || exit 3; sleep 60"], 30)
    assert status == 1 and nodes[0].out == ""


def test_decode_on_two_nodes_equals_one_process_per_batch():
    """Every rank decodes its own prompts; each token is compared with plain Hugging Face on one process."""
    program = ("-m", "graphs.cli", "decode", "--device", "cpu", "--tokens", "8", "--batch", "2", "--json")
    status, (first, second) = run_on_both(torchrun(RANKS_PER_NODE, *program), 280)
    assert status == 0, first.err[-4000:] + second.err[-4000:]
    report = json.loads(first.out)
    assert second.out == "", "only rank 0 reports"
    assert (report["ranks"], report["transport"]) == (2 * RANKS_PER_NODE, "gloo")
    assert report["matches_reference"] is True
    assert (report["graph_breaks"], report["recompiles"]) == (0, 0)
