"""One setting on a task of lm-evaluation-harness, for a sweep."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2f_runtime.evaluation.lm_eval import D2FStreamLM
from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import ParamOverrides

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

__all__ = ["score_task"]


def score_task(
    task: str,
    overrides: ParamOverrides,
    *,
    number: int,
    include_path: Path | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """Run the task's first `number` documents; return its first metric and what it took. Blocks.

    Args:
        task: a name that lm-eval knows.
        overrides: parameters, which win over the task's own.
        number: of documents.
        include_path: a folder with tasks beside lm-eval's own.
        engine: model, batch size and so on, see D2FStreamLM.

    Raises:
        InvalidParams: the task has no metric that is a number, or the model refused a document.
    """
    from lm_eval import simple_evaluate

    model = D2FStreamLM(**engine, **overrides)
    try:
        results = simple_evaluate(
            model,
            tasks=[task],
            limit=number,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=_tasks_with(task, include_path),
        )
        totals = model.get_model_info()["d2f_stream"]
    finally:
        model.close()
    if totals["num_refused"]:
        raise InvalidParams("task", task, "one whose every document the model takes")
    return {
        "score": _first_metric(task, results["results"][task]),
        "tokens_per_step": totals["tokens_per_step"],
        "mean_tokens": round(totals["total_tokens"] / totals["num_samples"], 1),
        "mean_steps": round(totals["steps"] / totals["num_samples"], 2),
        "tokens_per_s": "",
    }


def _tasks_with(task: str, folder: Path | None) -> "TaskManager":
    """Return an index that holds the task; lm-eval's own takes half a minute to read."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        found = TaskManager(include_path=str(folder), include_defaults=False)
        if task in found.all_subtasks:
            return found
    return TaskManager(include_path=None if folder is None else str(folder))


def _first_metric(task: str, results: dict[str, Any]) -> float:
    for name, value in results.items():
        metric = name.partition(",")[0]
        if "," in name and not metric.endswith("_stderr") and isinstance(value, int | float):
            return round(float(value), 4)
    raise InvalidParams("task", task, f"one with a metric that is a number, not {sorted(results)}")
