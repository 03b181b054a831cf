"""`d2f-stream models`: names, what fits, and the hub's cache on this machine."""

import argparse
import asyncio
import json
import os
import socket
import sys
from pathlib import Path

import pytest

from d2f_runtime.models.catalogue import BITS, CATALOGUE, ON_CPU, ON_GPU
from d2f_runtime.models.measured import PEAKS, Peak
from d2f_runtime.models.names import find
from d2f_runtime.models.shelf import Kept
from d2f_stream import PRESETS, ModelNotFound, cli
from d2f_stream.terminal.machine import GIB, Machine
from d2f_stream.terminal.models_command import installed, listed, recommended, run, shown
from d2f_stream.terminal.served import served
from installed_model import python_path
from serving import ALICE, TWO_CLIENTS, serving, url_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give tables room for a line a row, whatever the tests are run in."""
    monkeypatch.setenv("COLUMNS", "200")


def test_names_are_unique_and_lower_case_and_what_they_name_exists() -> None:
    assert len({entry.name for entry in CATALOGUE}) == len(CATALOGUE)
    for entry in CATALOGUE:
        assert entry.name == entry.name.lower()
        assert entry.preset is None or entry.preset in PRESETS


def test_less_exact_weights_take_less_memory_and_fp8_no_less_while_it_loads() -> None:
    for entry in CATALOGUE:
        assert entry.memory("nf4") < entry.memory("int8") < entry.memory("bf16")
        assert entry.memory("bf16") < entry.memory("fp32")
        assert 2e9 * entry.parameters < entry.memory("fp8") <= entry.memory("bf16")
    assert set(BITS) == {*ON_GPU, *ON_CPU}


@pytest.mark.parametrize("peak", PEAKS, ids=lambda peak: f"{peak.names[0]} {peak.quantization}")
def test_measured_peak_is_that_of_its_record_and_near_what_is_computed(peak: Peak) -> None:
    record = json.loads((ROOT / peak.record).read_text("utf-8"))
    value = found = record["results"]
    for key in peak.keys:
        value = value[key]
    assert value == peak.gb
    device = found["device"]
    assert (device["name"] if isinstance(device, dict) else device) == peak.device
    for name in peak.names:
        entry = find(name)
        assert entry is not None
        assert abs(entry.memory(peak.quantization) / 1e9 - peak.gb) < 1.8  # the reserve, for most


def test_llada_in_bf16_takes_what_its_tensors_add_up_to() -> None:
    # 32 layers of 4 x 4096^2 + 3 x 4096 x 12288 and two tables of 126,464 rows, 2 bytes each.
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 12288) + 2 * 126464 * 4096)
    entry = find("llada:8b")
    assert entry is not None
    assert entry.memory("bf16", context=0) - (3 << 29) == pytest.approx(weights, rel=0.01)
    assert entry.kv_bytes == 32 * 2 * 4096 * 2


def test_name_is_found_whatever_its_case_and_by_its_repository() -> None:
    assert find("SDAR:4B") == find("JetLM/SDAR-4B-Chat")
    assert find("my/model") is None
    assert find("./folder") is None


def test_misspelt_name_is_answered_with_those_like_it() -> None:
    with pytest.raises(ModelNotFound, match=r"'lada:8b'; did you mean .*llada:8b"):
        find("lada:8b")
    with pytest.raises(ModelNotFound, match="models list"):
        find("zzz:99b")


def test_list_tells_what_is_on_disk_known_or_not() -> None:
    here = [Kept("JetLM/SDAR-4B-Chat", 8_800_000_000), Kept("my/own", 1_000_000_000)]
    lines = listed(CATALOGUE, here, {}).splitlines()
    assert any(line.startswith("sdar:4b") and "8.8 GB" in line for line in lines)
    assert any(line.startswith("-") and line.endswith("my/own") for line in lines)


async def test_list_tells_what_the_configured_server_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("D2F_TOKEN", raising=False)
    async with serving(auth=TWO_CLIENTS) as server:
        url = url_of(server)
        await asyncio.to_thread(cli.main, ["config", "set", "server", url])
        assert await asyncio.to_thread(cli.main, ["models", "list"]) == 0
        assert f"{url} does not tell what it serves: " in capsys.readouterr().out
        await asyncio.to_thread(cli.main, ["config", "set", "token", ALICE])
        assert await asyncio.to_thread(cli.main, ["models", "list"]) == 0
        *table, _, told = capsys.readouterr().out.splitlines()
        assert told.startswith(f"{url} serves scripted: 4,096 tokens of context")
        assert any(line.startswith("sdar:4b") for line in table)


def test_server_that_cannot_be_reached_is_a_line_below_the_list(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections, says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert served(url, patience_s=0.1) == f"{url} did not answer within 0 s"
    assert cli.main(["models", "list", "--server", url]) == 0
    *table, _, told = capsys.readouterr().out.splitlines()
    assert told.startswith(f"{url} does not tell what it serves: ")
    assert any(line.startswith("sdar:4b") for line in table)


def test_installed_models_are_listed_first_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = python_path(tmp_path).split(os.pathsep)
    monkeypatch.setattr(sys, "path", [*paths, *sys.path])
    table = listed((), [], installed()).splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["smollm2-135m-d2f", "word-problems"]
    assert table[1].endswith("installed")
    told = run(argparse.Namespace(action="show", name="smollm2-135m-d2f"))
    assert "0.09 GB" in told
    assert "It chats in English" in told


def test_show_names_the_adapter_and_what_fits() -> None:
    entry = find("d2f-llada:8b")
    assert entry is not None
    text = shown(entry, {entry.repo}, Machine(64 * GIB, gpu=12 * GIB))
    assert "SJTU-Deng-Lab/D2F_LLaDA_Instruct_8B_Lora" in text
    assert "(on this machine)" in text
    memory = [line for line in text.splitlines() if line.startswith("memory, ")]
    verdicts = [line.partition("GiB computed: ")[2] for line in memory]
    assert verdicts == ["not on a GPU", *["does not fit"] * 2, "fits", "fits"]
    assert "the 12.0 GiB of the GPU's memory" in text


def test_show_tells_what_was_measured_and_where() -> None:
    entry = find("llada2.0-mini:16b")
    assert entry is not None
    text = shown(entry, set(), Machine(64 * GIB))
    assert (
        "GiB computed: needs a GPU; 10.1 measured on NVIDIA H200, bench/mixture-h200.json" in text
    )


def test_recommendation_takes_the_most_exact_that_fits() -> None:
    def rows(gpu: int | None, host: int = 64 * GIB) -> dict[str, list[str]]:
        table = recommended(CATALOGUE, Machine(host, gpu)).split("\n\n")[0].splitlines()
        return {row.split()[0]: row.split()[1:] for row in table}

    assert rows(80 * GIB)["name"] == ["bf16", "fp8", "int8", "nf4", "take"]
    assert rows(80 * GIB)["llada:8b"][-1] == "bf16"
    assert rows(12 * GIB)["llada:8b"] == ["(18.4)", "(16.4)", "11.9", "8.8", "int8"]
    assert rows(10 * GIB)["llada:8b"][-1] == "nf4"
    assert rows(6 * GIB)["llada:8b"][-1] == "-"
    assert rows(None)["name"] == ["fp32", "bf16", "take"]
    assert rows(None, host=32 * GIB)["llada:8b"][-1] == "bf16"


def test_recommendation_tells_apart_what_was_measured() -> None:
    computed, _, measured = recommended(CATALOGUE, Machine(64 * GIB)).partition("Measured")
    assert "computed from the models' sizes" in computed
    assert "  llada2.0-mini:16b bf16: 32.0 on NVIDIA H200\n" in measured
    assert len(measured.splitlines()) == 1 + sum(len(peak.names) for peak in PEAKS)


def test_cache_is_listed_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from d2f_runtime.models.shelf import kept, remove

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert kept() == []
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--my--own"
    for folder in (repo / "blobs", repo / "snapshots" / commit, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs" / "abc").write_bytes(b"x" * 100)
    (repo / "snapshots" / commit / "config.json").symlink_to(repo / "blobs" / "abc")
    assert [(item.repo, item.size) for item in kept()] == [("my/own", 100)]
    with pytest.raises(ModelNotFound, match="the cache holds no my/other"):
        remove("my/other")
    assert remove("my/own") == 100
    assert kept() == []
