"""Every name that a package says it has."""

import importlib
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
