"""HumanEval: from a model's answer to a program that can be run.

The procedure of the published D2F evaluation (arXiv 2508.09192; postprocess_code.py of its
repository, whose sanitizer is EvalPlus's), written anew: the first fenced block, after the task's
prompt; of that the longest run of lines that is Python; of that the imports and what the task's
function needs. Without it instruct models, which answer in prose with a fenced block, score near 0.

Runs nothing: the programs go to openai/human-eval's `evaluate_functional_correctness`, or a sandbox
of yours.
"""

import ast
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from d2f_stream.parser import Parser, new_parser

__all__ = ["humaneval_parser", "main", "program_of"]

FENCE: Final = "```python\n"
MAX_LINES: Final = 100  # of a program; the search is quadratic


def program_of(prompt: str, answer: str, entry_point: str) -> str:
    """Return the program in an answer; empty where nothing of it is Python.

    Args:
        prompt: of the task: imports, the function's head and its docstring.
        answer: as the model gave it, not cut at stop strings.
        entry_point: name of the function that the task asks for.
    """
    lines = f"{prompt}\n{_fenced(answer)}".expandtabs(4).splitlines()[:MAX_LINES]
    span = _longest_python(lines)
    return _needed(span, entry_point)


def main(argv: Sequence[str]) -> None:
    """Read the answers that lm-eval logged, write the programs for human-eval."""
    arguments = humaneval_parser().parse_args(argv)
    lines = arguments.samples.read_text(encoding="utf-8-sig").split("\n")
    entries = [json.loads(line) for line in lines if line.strip()]
    with arguments.output.open("w", encoding="utf-8") as file:
        for entry in entries:
            task = entry["doc"]
            for answer in entry["resps"][0]:
                program = program_of(task["prompt"], answer, task["entry_point"])
                file.write(json.dumps({"task_id": task["task_id"], "completion": program}) + "\n")


def humaneval_parser() -> Parser:
    """Return the parser of `main`."""
    parser = new_parser(
        "d2f-stream eval humaneval",
        __doc__ or "",
        example="d2f-stream eval humaneval samples_humaneval_1.jsonl --output programs.jsonl",
    )
    parser.add_argument("samples", type=Path, help="samples_humaneval_*.jsonl of --log_samples")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines for human-eval")
    return parser


def _fenced(answer: str) -> str:
    _, fence, rest = answer.partition(FENCE)
    return rest.partition("```")[0] if fence else answer


def _longest_python(lines: Sequence[str]) -> str:
    """Return the run of lines that is Python and has the most that are not blank."""
    filled = [0]
    for line in lines:
        filled.append(filled[-1] + bool(line.strip()))
    spans = [
        (filled[first] - filled[stop], first, stop)
        for first in range(len(lines))
        for stop in range(first + 1, len(lines) + 1)
    ]
    for _, first, stop in sorted(spans):
        text = "\n".join(lines[first:stop])
        if _parse(text) is not None:
            return text
    return ""


def _parse(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _needed(text: str, entry_point: str) -> str:
    """Keep imports, and the definitions that the entry point reaches; all where there is none."""
    tree = _parse(text)
    if tree is None:
        return ""
    lines = text.splitlines()
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    definitions = {name: node for node in tree.body for name in _names(node)}
    reached = _reached(entry_point, definitions) if entry_point in definitions else definitions
    kept = {*imports, *(definitions[name] for name in reached)}  # the last of equal names
    return "\n".join(_source(node, lines) for node in tree.body if node in kept)


def _names(node: ast.stmt) -> Iterator[str]:
    """Names that the statement defines; a function without a return is a head without a body."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            if any(isinstance(inner, ast.Return) for inner in ast.walk(node)):
                yield node.name
        case ast.ClassDef():
            yield node.name
        case ast.Assign():
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name
        case _:
            pass


def _reached(entry_point: str, definitions: dict[str, ast.stmt]) -> set[str]:
    reached: set[str] = set()
    waiting = [entry_point]
    while waiting:
        name = waiting.pop()
        if name in definitions and name not in reached:
            reached.add(name)
            nodes = ast.walk(definitions[name])
            waiting += [node.id for node in nodes if isinstance(node, ast.Name)]
    return reached


def _source(node: ast.stmt, lines: Sequence[str]) -> str:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return "\n".join(lines[first - 1 : node.end_lineno])
