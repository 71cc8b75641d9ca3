"""Old module names: they import, warn, and give the very objects of the new modules."""

from __future__ import annotations

import importlib
import sys
import types

import pytest

from vpd_fast import _deprecated


@pytest.fixture(autouse=True)
def _forget_old_names(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if _deprecated._new_names(name)]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if _deprecated._new_names(name)]:
        del sys.modules[name]


@pytest.mark.parametrize("old", _deprecated.MOVED)
def test_old_names_import_and_warn(old: str) -> None:
    new = _deprecated.MOVED[old]
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {new[0]}") as caught:
        module = importlib.import_module(old)
    assert len(caught) == 1
    for name in new:
        for key, value in vars(importlib.import_module(name)).items():
            if not key.startswith("_") and not isinstance(value, types.ModuleType):
                assert getattr(module, key) is value


def test_both_forms_of_import_work() -> None:
    from vpd_fast.pictures import reading, resizing

    with pytest.warns(DeprecationWarning, match=r"vpd_fast\.pictures\.reading") as caught:
        from vpd_fast.inference.images import fit_size, read_image
    assert caught[0].filename == __file__  # the line to change, and not one of the machinery's
    import vpd_fast.inference.images  # noqa: PLC0415 the second import does not warn again

    assert vpd_fast.inference.images.read_image is read_image is reading.read_image
    assert fit_size is resizing.fit_size


def test_submodules_move_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_deprecated.MOVED, "vpd_fast.images", ("vpd_fast.pictures",))
    with pytest.warns(DeprecationWarning) as caught:  # noqa: PT030 both are checked below
        from vpd_fast.images.palette import palette
    assert [str(warning.message).split(";")[0] for warning in caught] == [
        "vpd_fast.images has moved to vpd_fast.pictures",
        "vpd_fast.images.palette has moved to vpd_fast.pictures.palette",
    ]
    assert len(palette(3)) == 3
    with (
        pytest.warns(DeprecationWarning, match="nothing"),
        pytest.raises(ModuleNotFoundError, match=r"vpd_fast\.pictures\.nothing"),
    ):
        importlib.import_module("vpd_fast.images.nothing")


def test_other_names_are_not_touched() -> None:
    _deprecated.install()
    assert sum(type(finder).__name__ == "_MovedModules" for finder in sys.meta_path) == 1
    with pytest.raises(ModuleNotFoundError, match="No module named 'vpd_fast.nothing'"):
        importlib.import_module("vpd_fast.nothing")
