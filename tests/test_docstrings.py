"""Docstrings: everything public has one that matches its signature, rules cite sources, and every example runs."""

from __future__ import annotations

import dataclasses
import doctest
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

import attn_numba as an
from attn_numba import reference, rules

SECTIONS = ("Parameters", "Returns", "Yields", "Raises", "Attributes", "Notes", "References", "Examples", "See Also")
NOTHING = (None, "None", "Iterator[None]")
OPTIONAL_LIBRARIES = {
    "cupy",
    "dask",
    "distributed",
    "jax",
    "matplotlib",
    "ml_dtypes",
    "mpi4py",
    "rich",
    "safetensors",
    "sklearn",
    "torch",
    "tqdm",
}


def modules() -> Iterator[str]:
    for package in (an, reference):
        yield package.__name__
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                yield found.name


MODULES = sorted(set(modules()))


def load(name: str) -> ModuleType:
    if name.startswith("attn_numba.gpu.") and not importlib.util.find_spec("numba_cuda"):
        pytest.skip("numba-cuda is not installed")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL_LIBRARIES:
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(load(name), optionflags=options).failed == 0


def public() -> Iterator[tuple[str, Any]]:
    """Yield every public function and class, and the public methods that a class defines itself, once each."""
    owners = [("attn_numba", an, [name for name in an.__all__ if name not in {"reference", "rules"}])]
    owners.append(("attn_numba.reference", reference, reference.__all__))
    shorts = [
        "files",
        "learning",
        "job",
        "comparison",
        "workloads",
        "cli",
        "cluster",
        "sequences",
        "averages",
        "panels",
        "options",
        "plotting",
        "selection",
        "tune_command",
    ]
    shorts += [
        f"integrations.{name}"
        for name in ("dask", "jax", "matplotlib", "sklearn", "torch")
        if importlib.util.find_spec(name)
    ]
    for short in shorts:
        module = importlib.import_module(f"attn_numba.{short}")
        owners.append((module.__name__, module, module.__all__))
    if importlib.util.find_spec("mpi4py"):
        owners.append(("attn_numba.mpi", an.mpi, an.mpi.__all__))
    for prefix, owner, names in owners:
        for name in names:
            thing = getattr(owner, name)
            if not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            yield f"{prefix}.{name}", thing
            for attribute, method in vars(thing).items() if inspect.isclass(thing) else ():
                if not attribute.startswith("_") and inspect.isfunction(method):
                    yield f"{prefix}.{name}.{attribute}", method


PUBLIC = dict(public())
RULES = {
    name: thing
    for name, thing in PUBLIC.items()
    if inspect.isclass(thing)
    and issubclass(thing, rules.Mask | rules.Modifier | rules.Dropout | rules.Score | rules.Normalizer)
}


def documented(thing: Any) -> str:
    """Return the docstring, or for an overriding method that of what it overrides."""
    return inspect.getdoc(thing) or ""


def sections(text: str) -> dict[str, str]:
    """Return the sections of a NumPy-style docstring by their headings; what comes first goes by ''."""
    parts = re.split(rf"^({'|'.join(SECTIONS)})\n-+\n", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def described(text: str) -> list[str]:
    """Return the names that a Parameters section describes, in order."""
    headings = re.findall(r"^([\w*, ]+?)(?: : .*)?$", text, flags=re.MULTILINE)
    return [name.strip().lstrip("*") for heading in headings for name in heading.split(",")]


def parameters(thing: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(thing).parameters if name not in {"self", "cls"}]


def is_method(name: str) -> bool:
    return name.rpartition(".")[0] in PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_matches_signature(name):
    thing = PUBLIC[name]
    text = documented(thing)
    first = text.split("\n")[0]
    assert first.rstrip("`").endswith((".", ":")) or ". " in first, f"{name}: the first line is no sentence: {first!r}"
    found = sections(text)
    wanted = parameters(thing)
    if inspect.isclass(thing) and not (dataclasses.is_dataclass(thing) or issubclass(thing, tuple)):
        wanted = parameters(thing.__init__) if inspect.isfunction(thing.__init__) else []
    if is_method(name) and "Parameters" not in found:
        return  # methods of one class share their parameters, which its docstring or its base's explains
    assert described(found.get("Parameters", "")) == wanted, f"{name}: parameters in the docstring and in the signature"
    if inspect.isfunction(thing) and inspect.signature(thing).return_annotation not in NOTHING:
        assert {"Returns", "Yields"} & set(found), f"{name}: what it returns is not described"


def test_there_are_rules():
    assert len(RULES) >= 16


@pytest.mark.parametrize("name", RULES)
def test_a_rule_cites_its_source_or_says_that_it_is_ours(name):
    found = sections(documented(RULES[name]))
    cited = re.search(r"\b(19|20)\d\d\b", found.get("References", ""))
    ours = re.search(r"\b(ours|our own)\b", documented(RULES[name]))
    assert cited or ours, f"{name} names no source with its year and does not say that it is ours"
