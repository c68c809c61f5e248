"""What benchmarks on a CUDA card share: arrays and clocks of the card, turns, and the file that results go to."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from attn_numba.workloads import named_dtype
from timing import machine, save

PACKAGES = ("numba-cuda", "cuda-core", "cuda-bindings", "torch", "triton")

CLOSE = {"bfloat16": 3e-3, "float16": 4e-4, "float32": 5e-6, "float64": 1e-14}
"""How large a relative error may be: a half more than rounding to 16 bits costs, ten times what wider dtypes lose."""

Run = Callable[[int], Any]
"""Makes so many calls and returns the last one's result, which may not be there yet."""


def relative_error(result: np.ndarray, exact: np.ndarray) -> float:
    """Return the norm of the difference over that of the exact result; infinite where a result is not finite."""
    found = float(np.linalg.norm(result.astype(np.float64) - exact) / np.linalg.norm(exact))
    return found if math.isfinite(found) else math.inf


class Card:
    """What is timed and how: a card by its events, or for the smoke test the host by its clock."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.device, self.backend = torch, device, "cuda" if device == "cuda" else "cpu"
        self.cache = 0  # bytes
        if device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            self.cache = int(getattr(properties, "L2_cache_size", 64 * 2**20))
            self.about = {
                "name": properties.name,
                "memory": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
                "capability": f"{properties.major}.{properties.minor}",
                "cache": self.cache,
                "state": driver_says(),
            }
        else:
            self.about = {"name": "no card"}

    def random(self, *shape: int, dtype: str) -> Any:
        """Return normally distributed numbers."""
        return self.torch.randn(*shape, device=self.device).to(getattr(self.torch, dtype))

    def host(self, x: Any) -> np.ndarray:
        """Return a NumPy copy; bfloat16 as ml_dtypes has it."""
        if isinstance(x, np.ndarray):
            return x
        x = x.detach().cpu().contiguous()
        if x.dtype == self.torch.bfloat16:
            return x.view(self.torch.int16).numpy().view(named_dtype("bfloat16"))
        return x.numpy()

    def tensor(self, x: Any) -> Any:
        """Return a result as a tensor."""
        return self.torch.from_numpy(x) if isinstance(x, np.ndarray) else x

    def synchronize(self) -> None:
        """Wait until all is done."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def time(self, run: Run, count: int) -> tuple[float, float]:
        """Return seconds per call by the card's clock and by the host's, of `count` calls after one that is not timed.

        The card is still busy with that one when the first event is recorded, so that a late launch costs nothing.
        """
        if self.device != "cuda":
            run(1)
            start = time.perf_counter()
            run(count)
            taken = (time.perf_counter() - start) / count
            return taken, taken
        first, last = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        start = time.perf_counter()
        run(1)
        first.record()
        run(count)
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / count, (time.perf_counter() - start) / (count + 1)


def driver_says() -> str:
    """Return driver, clocks and power limit as nvidia-smi reads them; nothing is changed."""
    asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown: {type(error).__name__}"


class Measured:
    """What has been found so far, in a file that is whole at any time, and how much time is left."""

    def __init__(self, card: Card, arguments: argparse.Namespace) -> None:
        self.card, self.turns, self.seconds = card, arguments.turns, arguments.seconds
        self.end = time.monotonic() + arguments.limit
        self.rows: list[dict[str, Any]] = []
        self.figures: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.red: list[str] = []
        self.folder = arguments.folder
        name = "".join(c if c.isalnum() else "-" for c in card.about["name"].lower())
        self.name = f"cuda-{name}-{date.today().isoformat()}"
        self.machine = machine(os.cpu_count() or 1, *PACKAGES) | {"card": card.about}

    def in_time(self, what: str, needed: float = 5.0) -> bool:
        """Return whether there is time for something more; what there is none for is written down."""
        if time.monotonic() + needed < self.end:
            return True
        self.left_out.append(what)
        return False

    def figure(self, part: str, what: str, figure: float, unit: str) -> None:
        """Keep one number."""
        self.figures.append({"part": part, "what": what, "figure": figure, "unit": unit})
        print(f"{what}: {figure:.4g} {unit}", flush=True)
        self.save()

    def wrong(self, what: str, why: str) -> None:
        """Keep that there is no number."""
        self.red.append(f"{what}: {why}")
        print(f"RED {what}: {why}", flush=True)
        self.save()

    def save(self) -> Path:
        """Write all of it."""
        content = {
            "command": " ".join(["python", "benchmarks/bench_cuda.py", *sys.argv[1:]]),
            "turns": self.turns,
            "machine": self.machine,
            "rows": self.rows,
            "figures": self.figures,
            "red": self.red,
            "left_out": self.left_out,
        }
        return save(self.name, content, self.folder)

    def interleave(self, runs: Mapping[str, Run]) -> dict[str, list[float]]:
        """Return seconds per call of each, one entry a turn, the calls in turns and in both orders.

        Raises
        ------
        RuntimeError
            If the events of long calls say much less than the host's clock: they do not see where these run.
        """
        counts = {name: self._count(run) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        waited: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(self.turns):
            for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
                by_card, by_host = self.card.time(runs[name], counts[name])
                times[name].append(by_card)
                waited[name].append(by_host)
        for name in runs:
            by_card, by_host = statistics.median(times[name]), statistics.median(waited[name])
            if by_host > 2e-3 and by_card < by_host / 10:
                raise RuntimeError(f"{name}: events say {1e3 * by_card:.3f} ms a call, the host {1e3 * by_host:.3f} ms")
        return times

    def _count(self, run: Run) -> int:
        """Return how many calls take about the seconds of a turn."""
        self.card.time(run, 1)
        taken, _ = self.card.time(run, 3)
        return max(2, min(1000, math.ceil(self.seconds / max(taken, 1e-7))))
