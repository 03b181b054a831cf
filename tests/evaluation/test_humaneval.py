import json
from pathlib import Path

from d2f_runtime.evaluation.__main__ import main
from d2f_runtime.evaluation.humaneval import program_of

PROMPT = 'from math import sqrt\n\n\ndef root(x: int) -> float:\n    """Return the root."""\n'


def run(program: str) -> float:
    names: dict[str, object] = {}
    exec(PROMPT + program, names)
    root = names["root"]
    assert callable(root)
    result = root(9)
    assert isinstance(result, float)
    return result


def test_fenced_function_is_taken_from_the_prose_around_it() -> None:
    answer = f"Sure:\n```python\n{PROMPT}    return sqrt(x)\n```\nThat is all.\n```python\nno\n```"
    program = program_of(PROMPT, answer, "root")
    assert run(program) == 3.0
    assert "Sure" not in program
    assert "no" not in program


def test_body_alone_continues_the_prompt() -> None:
    assert run(program_of(PROMPT, "    return sqrt(x)\n\nThis returns the root.", "root")) == 3.0


def test_what_the_function_does_not_need_is_dropped() -> None:
    answer = (
        "```python\nLIMIT: int = 4\n\ndef half(x):\n    return x / LIMIT * 2\n\n"
        "def other(x):\n    return x\n\ndef root(x):\n    return half(x) * 2 / 3.0\n\n"
        "print(root(4))\n```"
    )
    program = program_of(PROMPT, answer, "root")
    assert run(program) == 3.0
    assert "half" in program
    assert "LIMIT" in program
    assert "other" not in program
    assert "print" not in program


def test_function_cut_off_in_the_middle_leaves_what_parses() -> None:
    answer = "```python\ndef root(x):\n    return sqrt(x)\n\ndef later(x):\n    if x >"
    assert run(program_of(PROMPT, answer, "root")) == 3.0


def test_prose_gives_no_program() -> None:
    assert "def" not in program_of("", "I cannot do this, sorry.", "root")


def test_command_writes_programs_for_the_logged_answers(tmp_path: Path) -> None:
    samples, output = tmp_path / "samples.jsonl", tmp_path / "programs.jsonl"
    doc = {"task_id": "HumanEval/0", "prompt": PROMPT, "entry_point": "root"}
    entry = {"doc": doc, "resps": [["    return sqrt(x)", "```python\n    return 1.0\n```"]]}
    samples.write_text(json.dumps(entry) + "\n")
    main(["humaneval", str(samples), f"--output={output}"])
    programs = [json.loads(line) for line in output.read_text().splitlines()]
    assert [p["task_id"] for p in programs] == ["HumanEval/0"] * 2
    assert [run(p["completion"]) for p in programs] == [3.0, 1.0]
