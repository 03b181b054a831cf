"""The command line's tests do not read the config file of whoever runs them."""

import pytest


@pytest.fixture(autouse=True)
def _no_config_file(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "no-config"))
