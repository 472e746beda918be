"""Runs a test file as several processes, one per rank, which are joined over gloo on this machine."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def run_ranks(file: str, folder: Path, statuses: Sequence[int], timeout: float, weights_only: bool = True) -> list:
    """Run ``python file rank folder`` for every rank, and assert on the exit statuses.

    Returns the content of the ``folder/<rank>.pt`` that each rank saved.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "LCW_OPS_CACHE_DIR": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, file, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(len(statuses))
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == list(statuses), "\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt", weights_only=weights_only) for rank in range(len(statuses))]
