"""Training over two hosts, each with a torchrun of its own, tokens crossing once a node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.hosts import LINK, Host, counters, network, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

LIMIT_S = 120
RUN = {
    "mesh.pp": 1,
    "mesh.dp": 4,
    "mesh.ep": 4,
    "schedule.name": "1f1b",
    "model.num_hidden_layers": 2,
    "train.steps": 2,
    "train.warmup_steps": 1,
    "train.constant_steps": 1,
    "train.cosine_steps": 0,
    "train.eval_batches": 1,
    "run.timeout_s": LIMIT_S,
}


def torchrun(host: Host, rank: int, master: str, folder: Path) -> subprocess.Popen[str]:
    """One host's two ranks."""
    options = [text for key, value in RUN.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--node-rank", str(rank), "--nproc-per-node", "2", "--master-addr", master]
    command += ["--master-port", "29500", "-m", "counterflow", "train"]  # all ports are free there
    command += ["--run.name", "hosts", "--run.folder", str(folder), *options]
    environ = {**os.environ, "GLOO_SOCKET_IFNAME": LINK, "OMP_NUM_THREADS": "1"}
    return host.call(
        lambda: subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    )


def test_two_hosts_train_and_say_what_crossed_between_them(tmp_path: Path) -> None:
    with network(2, link_mbit=2000) as hosts:
        before = [host.call(lambda: counters(LINK)) for host in hosts]
        master = hosts[0].address
        runs = [torchrun(host, rank, master, tmp_path) for rank, host in enumerate(hosts)]
        try:
            said = [run.communicate(timeout=LIMIT_S)[0] for run in runs]
        finally:
            for run in runs:
                run.kill()
                run.wait()
        sent = [
            host.call(lambda: counters(LINK)).since(was).tx_bytes
            for host, was in zip(hosts, before, strict=True)
        ]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    assert "on 2 nodes, cpu" in said[0]
    dispatch = json.loads((tmp_path / "hosts" / "result.json").read_text())["dispatch"]
    assert dispatch["backend"] == "two_hop"
    assert dispatch["why"] == "an expert group spans 2 nodes with 2 ranks on each"
    # Gradients and the ranks' meeting cross as well.
    assert 0 < dispatch["crossed_bytes"] < sum(sent)
    assert dispatch["crossed_bytes"] < dispatch["sent_bytes"]
