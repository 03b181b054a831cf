"""Time to the first answer: python -m lab.first_success --output bench/first-success.json.

Each persona gets a fresh virtual environment, in which the documented commands are run as they
stand, one after the other: pip's own cache and the machine's load are what they are, and the load
is recorded. Needs the package registry that pip is set to, and port 8000.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, Final

from lab.first_success.personas import PERSONAS, ROOT, Persona, commands, program
from lab.records import command_of, write_record

SERVER: Final = "http://127.0.0.1:8000"
QUESTION: Final = "What is the capital of Japan?"
TIMEOUT_S: Final = 1800.0


def main(argv: list[str] | None = None) -> None:
    """Run the personas and write the record."""
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m lab.first_success", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the record")
    names = [persona.name for persona in PERSONAS]
    parser.add_argument("--only", choices=names, help="one persona")
    arguments = parser.parse_args(given)
    results: dict[str, Any] = {}
    for persona in PERSONAS:
        if arguments.only in (None, persona.name):
            results[persona.name] = measured(persona)
            print(persona.name, json.dumps(results[persona.name]), flush=True)
            command = command_of("lab.first_success", given)
            write_record(arguments.output, "first-success", results, command=command)


def measured(persona: Persona) -> dict[str, Any]:
    """Return what one persona ran, and the seconds it took.

    Raises:
        CalledProcessError: a documented command failed.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        environment = _environment(Path(folder))
        began_s = time.monotonic()
        installs = commands(persona.install, "pip install")[: persona.num_installs]
        for line in installs:
            _run(shlex.split(line), environment)
        installed_s = time.monotonic()
        answering = commands(persona.answer, persona.begins)[0] if persona.begins else "python"
        words = shlex.split(answering)
        if persona.begins == "d2f-stream serve":
            first = _first_of_server(words, environment)
        else:
            script = program(persona.answer) if not persona.begins else ""
            first = _run([*words, *(["-c", script] if script else [])], environment)
        ended_s = time.monotonic()
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {
        "commands": [*installs, answering if persona.begins else f"program of {persona.answer}"],
        "install_s": round(installed_s - began_s, 1),
        "first_answer_s": round(ended_s - installed_s, 1),
        "environment_mb": round(size / 1e6),
        "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
        "said": first.strip()[:80],
        **({"note": persona.note} if persona.note else {}),
    }


def _environment(venv: Path) -> dict[str, str]:
    """Return a newcomer's variables: the environment's programs, nothing of this one's."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = f"{venv / 'bin'}{os.pathsep}{kept['PATH']}"
    home = str(venv / "home")  # no configuration, no history
    return kept | {"VIRTUAL_ENV": str(venv), "PATH": path, "XDG_CONFIG_HOME": home}


def _run(words: list[str], environment: dict[str, str]) -> str:
    program = shutil.which(words[0], path=environment["PATH"]) or words[0]
    done = subprocess.run(
        [program, *words[1:]],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    return done.stdout


def _first_of_server(words: list[str], environment: dict[str, str]) -> str:
    """Start a server, open its page, and return the first words of an answer."""
    program = shutil.which(words[0], path=environment["PATH"]) or words[0]
    server = subprocess.Popen([program, *words[1:]], env=environment, cwd=ROOT)
    try:
        _wait_served(server)
        body = {"model": "d2f", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
        request = urllib.request.Request(
            f"{SERVER}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    if text := choice["delta"].get("content"):
                        return str(text)
        raise SystemExit("the server's answer has no word")
    finally:
        server.terminate()
        server.wait()


def _wait_served(server: "subprocess.Popen[bytes]") -> None:
    """Wait until the page can be opened."""
    end_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end_s and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{SERVER}/", timeout=10) as page:
            page.read()
            return
        time.sleep(0.1)
    raise SystemExit("d2f-stream serve did not come up")


if __name__ == "__main__":
    main()
