"""Every name that a package says it has."""

import importlib
import inspect
import pkgutil

import pytest

import circuits

PACKAGES = ["circuits", *(m.name for m in pkgutil.walk_packages(circuits.__path__, "circuits.") if m.ispkg)]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_of_a_package_exists_and_is_listed(package):
    module = importlib.import_module(package)
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(module, name)] == []
    assert set(names) <= set(dir(module))


def test_what_follows_the_third_argument_is_given_by_its_name():
    found = set()
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", []):
            function = getattr(module, name)
            if not inspect.isfunction(function):
                continue
            parameters = inspect.signature(function).parameters.values()
            if sum(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in parameters) > 3:
                found.add(f"{function.__module__.split('.')[1]}.{name}")
    assert found == set()
