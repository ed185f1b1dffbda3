"""Every example in a docstring runs and gives what stands under it."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import fisherfast


def examples() -> dict[str, doctest.DocTest]:
    """All docstrings with examples, by name."""
    found = {}
    for module in pkgutil.walk_packages(fisherfast.__path__, "fisherfast."):
        if module.name.endswith(("__main__", "._C")):
            continue  # the command line, and the native module
        for test in doctest.DocTestFinder().find(importlib.import_module(module.name)):
            if test.examples:
                found[test.name] = test
    return found


EXAMPLES = examples()


def test_public_functions_have_examples():
    """Catches a search that finds nothing, and a public function that shows no use of itself."""
    public = [
        function
        for module in (fisherfast, fisherfast.ops, fisherfast.dual)
        for function in map(vars(module).get, module.__all__)
        if inspect.isfunction(function)
    ]
    assert len(public) >= len(fisherfast.ops.__all__)
    named = {f"{function.__module__}.{function.__name__}" for function in public}
    assert not named - set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_gives_what_it_says(name):
    """Catches an example that was cut by a line break, or that the code has left behind."""
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    runner.run(EXAMPLES[name], out=report.append)
    assert runner.failures == 0, "".join(report)
