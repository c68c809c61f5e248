"""Machine code of the CUDA kernels of gradients, made without a card; in a process of its own, where nothing is
simulated."""

import numpy as np

import attn_numba as an
from attn_numba.gpu import backward_general as general, backward_rows, backward_rules, backward_sums as sums
from attn_numba.gpu.hooks import bind
from attn_numba.problem import check
from machine_code import report

LEARNED = [an.SoftCap(3.0), an.ALiBi(0.5)]
KERNELS = {  # architecture, dtype, head and value size, arguments of `attention`
    "causal": ((8, 0), "float32", 128, {"mask": an.Causal()}),
    "modifiers": ((9, 0), "float64", 64, {"modifiers": LEARNED, "query_offset": 0, "dropout": an.Dropout(0.3, 1)}),
}


def programs_of(problem):
    """Yield the kernels of a call, and how many products a step of each has."""
    bound = bind(problem, True)
    tile = backward_rows.tile_of(problem)
    yield backward_rows.program(problem, bound, False), 2 * tile.depth * tile.row_part * tile.key_part
    for of, scores in ((general.QUERIES, 2), (general.KEYS, 2), (general.VALUES, 1)):
        tile = general.tile_of(problem, general.columns_of(problem, of))
        products = tile.depth * tile.row_part * (scores * tile.key_part + tile.value_part)
        yield general.program(problem, bound, of, problem.dtype), products
    for n, kind in zip(
        range(len(bound.hooks.learned)),
        (backward_rules.BY_QUERY, backward_rules.BY_PAIR, backward_rules.BY_KEY),
        strict=False,
    ):
        tile = backward_rules.tile_of(problem)
        yield backward_rules.program(problem, bound, kind, n), 2 * tile.depth * tile.row_part * tile.key_part


def check_code(name, program, capability):
    found = report(program, capability)
    print(f"{name}: {program.name}, {found.registers} registers, {found.instructions.total()} instructions", flush=True)
    assert (found.stack, found.spill_stores, found.spill_loads) == (0, 0, 0), (name, found[:4])
    assert found.registers <= 255, (name, found[:4])
    assert {"LDL", "STL"}.isdisjoint(found.instructions), (name, program.name)
    assert found.instructions["ATOM"] == found.instructions["RED"] == 0, (
        name,
        program.name,
    )  # each number has one writer
    return found


def compile_kernels(part, parts):
    for name, (capability, dtype, size, arguments) in list(KERNELS.items())[part::parts]:
        x = np.zeros((1, 2, 100, size), dtype)
        for program, products in programs_of(check(x, x, x, **arguments)):
            found = check_code(name, program, capability)
            multiply = "DFMA" if dtype == "float64" else "FFMA"
            assert found.instructions[multiply] >= products, (name, program.name)  # unrolled, and joined
            assert found.instructions["BAR"] >= 4, (name, program.name)
    if part == 0:
        number = np.dtype(np.float32)
        for program in (
            sums.sums_program(number),
            sums.unit_slopes_program("float16", number, "float16"),
            sums.outer_program("bfloat16", number),
            sums.copies_program(number, "bfloat16"),
        ):
            check_code("small", program, (8, 0))
