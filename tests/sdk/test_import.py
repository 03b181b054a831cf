import subprocess
import sys

import pytest

import d2f_stream

HEAVY = ("torch", "numpy", "onnxruntime", "transformers", "tokenizers", "jinja2", "rich")


def test_public_names_are_sorted_and_exist() -> None:
    constants_first = sorted(d2f_stream.__all__, key=lambda name: (not name.isupper(), name))
    assert d2f_stream.__all__ == constants_first
    assert all(hasattr(d2f_stream, name) for name in d2f_stream.__all__)


def test_public_names_are_those_of_the_modules() -> None:
    from d2f_stream import api
    from d2f_stream.core import errors, events, limits, params, session

    modules = (api, errors, events, limits, session)
    names = {name for module in modules for name in module.__all__}
    names |= {"GenerationParams", "PRESETS", "ParamOverrides", "__version__", "sync"}
    assert set(params.__all__) >= {"GenerationParams", "ParamOverrides"}
    assert set(d2f_stream.__all__) == names


def loaded_by(code: str, *names: str) -> list[str]:
    """Those of the modules that a fresh interpreter has loaded after running the code."""
    code += f"\nimport sys\nprint(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_the_package_loads_nothing_heavy_and_not_even_asyncio() -> None:
    assert loaded_by("import d2f_stream", *HEAVY, "d2f_runtime", "asyncio") == []


def test_public_names_load_nothing_heavy() -> None:
    assert loaded_by("from d2f_stream import *", *HEAVY, "d2f_runtime", "asyncio") == ["asyncio"]


def test_engine_loads_nothing_heavy() -> None:
    code = (
        "import d2f_runtime.engine.local, d2f_runtime.engine.opening, d2f_runtime.backends.scripted"
    )
    assert loaded_by(code, *HEAVY) == []


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'genrate'"):
        _ = d2f_stream.genrate  # type: ignore[attr-defined]


def test_every_field_of_a_public_value_is_explained() -> None:
    silent = [
        f"{name}.{field}"
        for name in d2f_stream.__all__
        if isinstance(value := getattr(d2f_stream, name), type)
        for fields in ("__struct_fields__", "__dataclass_fields__")
        for field in getattr(value, fields, ())
        if f" {field}: " not in (value.__doc__ or "")
    ]
    assert silent == []
