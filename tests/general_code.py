"""Machine code of the general CUDA kernel, made without a card; in a process of its own, where nothing is simulated."""

import numpy as np

import attn_numba as an
from attn_numba.gpu import forward_general as general
from attn_numba.gpu.hooks import bind
from attn_numba.problem import check
from attn_numba.rules import Softmax
from machine_code import report

SEEN = np.ones((100, 100), bool)
KERNELS = {  # architecture, dtype, head and value size, registers that it may take, arguments of `attention`
    "full": ((9, 0), "float32", 64, 168, {}),
    "causal": ((8, 0), "float32", 128, 255, {"mask": an.Causal()}),
    "array and soft cap": ((9, 0), "float32", 64, 168, {"mask": an.Dense(SEEN), "modifiers": an.SoftCap(3.0)}),
    "double precision": ((8, 0), "float64", 64, 255, {"mask": an.Causal(), "dropout": an.Dropout(0.3, 1)}),
    "search": ((9, 0), "float32", 128, 255, {"mask": an.Causal(), "normalizer": an.Entmax15()}),
}


def compile_kernels():
    for name, (capability, dtype, size, most, arguments) in KERNELS.items():
        x = np.zeros((1, 2, 100, size), dtype)
        problem = check(x, x, x, **arguments)
        softmax = isinstance(problem.normalizer, Softmax)
        program = general.program(problem, bind(problem), lse=softmax, stats=softmax, weights=not softmax)
        found = report(program, capability)
        print(name, found.registers, found.instructions.total())
        assert (found.stack, found.spill_stores, found.spill_loads) == (0, 0, 0), (name, found)
        assert found.registers <= most, (name, found)
        tile, multiply = general.tile_of(problem), "DFMA" if dtype == "float64" else "FFMA"
        products = tile.depth * tile.row_part * (tile.key_part + tile.value_part)
        assert found.instructions[multiply] >= products, (name, found)  # unrolled, and joined
        assert found.instructions["BAR"] > 4, (name, found)
        assert {"LDL", "STL"}.isdisjoint(found.instructions), (name, found)
