"""Who may import whom, read off the sources; and what a process has loaded once it has imported the package."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import attn_numba
import attn_numba.reference

PACKAGE = Path(attn_numba.__file__).parent
REFERENCE = Path(attn_numba.reference.__file__).parent

# part -> the parts it may import; "" is attn_numba/__init__.py, which holds the version and the state of a process
ALLOWED = {
    "": set(),
    "rules": {"rules"},
    "parallel": set(),
    "cluster": set(),
    "problem": {"rules"},
    "partition": {"rules"},
    "partial": {"rules", "problem", "parallel", "api", "cpu"},
    "profiles": {"files", "cpu"},
    "cpu": {"", "rules", "problem", "parallel", "profiles", "cpu"},
    "gpu": {"", "rules", "problem", "gpu", "integrations"},
    "reference": {"rules", "reference"},
    "environment": {"", "rules", "cluster", "parallel", "profiles", "cpu", "gpu"},
    "api": {"", "rules", "problem", "partition", "environment", "cpu", "gpu", "reference"},
    "layers": {"rules", "problem", "api"},
    "rotations": {"rules", "problem"},
    "projections": {"rules", "integrations"},
    "layer_results": {"rules", "problem"},
    "multi_head": {"rules", "problem", "api", "files", "layer_results", "projections", "rotations"},
    "recurrent": {"rules", "problem", "api"},
    "caches": {"rules", "problem", "files", "cpu", "caches"},
    "explain": {"rules", "problem", "api", "cpu", "reference"},
    "packing": {"rules", "problem"},
    "ragged": {"rules", "problem", "api", "packing", "cpu"},
    "decoding": {"rules", "problem", "api", "cpu", "gpu"},
    "sequences": {"rules"},
    "gradient_checks": {"rules", "api", "comparison", "reference"},
    "testing": {"rules", "problem", "api", "environment", "comparison", "gradient_checks", "reference"},
    "averages": {"rules", "problem", "explain"},
    "panels": {"rules", "averages"},
    "selection": {"integrations"},
    "learning": {"rules", "api", "projections", "sequences", "learning"},
    "integrations": {
        "rules",
        "problem",
        "api",
        "cluster",
        "environment",
        "job",
        "partial",
        "sequences",
        "averages",
        "panels",
        "files",
        "learning",
        "selection",
        "integrations",
    },
    "files": {"integrations"},
    "workloads": {"rules", "integrations"},
    "job": {"rules", "problem"},
    "comparison": {"rules", "problem", "api", "environment", "job", "workloads", "reference"},
    "tuning": {"api", "cpu", "parallel", "profiles", "workloads"},
    "tune_kernels_command": {"rules", "files", "options", "profiles", "tuning", "workloads"},
    "options": {"parallel", "job", "files"},
    "tune_command": {"files", "options", "selection", "integrations"},
    "plotting": {"rules", "averages", "panels", "explain", "job", "files", "options", "integrations"},
    "cli": {
        "",
        "rules",
        "api",
        "cluster",
        "environment",
        "cpu",
        "gpu",
        "parallel",
        "job",
        "files",
        "workloads",
        "comparison",
        "options",
        "plotting",
        "tune_command",
        "tune_kernels_command",
        "integrations",
    },
    "__main__": {"cli"},
}
WHEN_CALLED = {
    "cpu",
    "gpu",
    "integrations",
    "reference",
}  # imported inside functions only, but by themselves and each other
MAY_LOAD_REFERENCE = {
    "comparison",
    "gradient_checks",
    "testing",
    "reference",
}  # at import; the others when they are called
LIBRARIES = {
    "rules": {"numpy", "scipy"},  # SciPy in `adapt` alone, when it is called
    "cpu": {"numpy", "numba", "llvmlite", "scipy"},
    "gpu": {"numpy", "numba", "llvmlite", "cuda"},
    "sequences": {"numpy", "scipy"},
    "learning": {"numpy", "scipy"},  # SciPy when it is called
    "integrations": {"numpy"},  # and the one library that the file or the folder is named after
    "integrations/mpi": {"numpy", "mpi4py"},
    "integrations/sklearn": {"numpy", "joblib"},  # which scikit-learn is built on
}


class Import:
    """One import: the part and file it stands in, the dotted name that is imported, whether it runs on loading."""

    def __init__(self, part: str, path: Path, name: str, line: int, on_loading: bool) -> None:
        self.part, self.path, self.name, self.line, self.on_loading = part, path, name, line, on_loading

    @property
    def target(self) -> str:
        """The part of the package that is imported."""
        words = self.name.split(".")
        return words[1] if len(words) > 1 else ""

    def __repr__(self) -> str:
        return f"{self.path.name}:{self.line} imports {self.name}"


def sources() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE).parts
        if inside[0] != "reference":
            yield ("" if inside == ("__init__.py",) else inside[0].removesuffix(".py")), path
    for path in sorted(REFERENCE.rglob("*.py")):
        yield "reference", path


def is_for_type_checkers(node: ast.AST) -> bool:
    """Whether a statement is an `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports() -> Iterator[Import]:
    names = {path.stem for path in PACKAGE.iterdir() if path.stem != "__init__"} | {"reference"}
    for part, path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside_functions = {
            child
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.Lambda)
            for child in ast.walk(node)
        }
        never_run = {child for node in ast.walk(tree) if is_for_type_checkers(node) for child in ast.walk(node)}
        for node in ast.walk(tree):
            if node in never_run:
                continue
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
                whole = node.module == "attn_numba"
                found = [
                    f"attn_numba.{alias.name}" if whole and alias.name in names else node.module for alias in node.names
                ]
            else:
                continue
            yield from (
                Import(part, path, name, node.lineno, node not in inside_functions) for name in sorted(set(found))
            )


IMPORTS = list(imports())
OWN = [found for found in IMPORTS if found.name.split(".")[0] == "attn_numba"]
OTHERS = [found for found in IMPORTS if found.name.split(".")[0] not in {"attn_numba", *sys.stdlib_module_names}]


def test_every_part_is_known():
    assert {part for part, _ in sources()} <= set(ALLOWED)
    assert len(OWN) > 50


def test_parts_import_only_what_is_below_them():
    wrong = [found for found in OWN if found.target not in ALLOWED[found.part]]
    assert not wrong


def test_compiled_and_optional_parts_are_loaded_when_called():
    wrong = [
        found
        for found in OWN
        if found.on_loading
        and found.target in WHEN_CALLED - {found.part}
        and not (found.target == "reference" and found.part in MAY_LOAD_REFERENCE)
    ]
    assert not wrong


def test_other_libraries_are_imported_where_they_belong():
    wrong = []
    for found in OTHERS:
        library = found.name.split(".")[0]
        allowed = LIBRARIES.get(found.part, {"numpy"})
        if found.part == "integrations":
            name = found.path.relative_to(PACKAGE).parts[1].removesuffix(".py")
            allowed = LIBRARIES.get(f"integrations/{name}", allowed) | {name}
        if library not in allowed:
            wrong.append(found)
    assert not wrong


def test_nothing_imports_tests_or_benchmarks():
    assert not [found for found in IMPORTS if found.name.split(".")[0] in {"tests", "benchmarks", "examples"}]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(sys.prefix))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_numpy_and_little_else():
    code = """
import sys
import numpy
before = set(sys.modules)
import attn_numba
print(*sorted(name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names))
"""
    assert run(code).split() == ["attn_numba"]


def test_the_reference_runs_where_numpy_is_alone():
    code = """
import sys
for name in ("numba", "llvmlite", "scipy", "ml_dtypes", "safetensors", "tqdm", "rich", "torch", "jax"):
    sys.modules[name] = None  # importing it now raises ImportError
import numpy as np
import attn_numba as an
x = np.eye(3)
out = an.attention(x, x, x, mask=an.Causal() & an.SlidingWindow(1, 0), modifiers=an.SoftCap(5.0), backend="reference")
assert out[0].tolist() == [1, 0, 0]
assert (an.reference.attention(x, x, x) > 0).all()
available, reason = an.backends()["cpu"]
assert not available and "numba" in reason.lower(), reason
try:
    an.attention(x, x, x, backend="cpu")
except (ImportError, RuntimeError, NotImplementedError) as error:
    print(error)
"""
    assert "numba" in run(code).lower()


def test_every_folder_of_the_package_is_installed():
    configuration = Path(__file__).parents[1] / "pyproject.toml"
    if not (configuration.is_file() and (configuration.parent / "attn_numba").is_dir()):
        pytest.skip("the sources are not beside the tests")
    packages = tomllib.loads(configuration.read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(PACKAGE).parts for path in PACKAGE.rglob("__init__.py")} | {("reference",)}
    assert sorted(packages) == sorted(".".join(("attn_numba", *parts)) for parts in folders)
