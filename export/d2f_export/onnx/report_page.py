"""The readable page of a verification: Markdown, one table for each part."""

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["page"]

TITLES: Final = {
    "logits": "Logits against the checkpoint in fp32",
    "decoding": "Decoding against the checkpoint in fp32",
    "accuracy": "Right answers",
    "startup_s": "Seconds from a new process",
}
NAMES: Final = {
    "num_rows": "rows compared",
    "max_error": "largest error",
    "max_relative": "largest error, by the largest logit of its row",
    "mean_error": "mean error",
    "top1": "same best token",
    "moved": "beyond the bound: moved when computed again (checkpoint, artefact)",
    "num_prompts": "prompts",
    "num_proposals": "proposals compared",
    "token_agreement": "proposals with the same token",
    "max_confidence_error": "largest error of a confidence",
    "mean_confidence_error": "mean error of a confidence",
    "same_blocks": "blocks committed alike",
    "same_answers": "answers alike",
    "steps": "steps, checkpoint and artefact",
    "loaded": "model loaded",
    "block": "first block",
}


def page(report: Mapping[str, Any]) -> str:
    """Return the page of a report; see Verification.to_dict, and record.environment."""
    artefact = report["artefact"]
    lines = [
        f"# Verification of {artefact['name']}",
        "",
        f"Target {artefact['target']}, weights {artefact['quantization']}, "
        f"{artefact['bytes'] / 1e6:.1f} MB. {_verdict(report)}",
        "",
    ]
    lines += [f"- {name}: {'holds' if ok else 'MISSED'}" for name, ok in report["bounds"].items()]
    for key, title in TITLES.items():
        if report[key]:
            lines += ["", f"## {title}", "", "| figure | value |", "|---|---|"]
            lines += [f"| {NAMES.get(k, k)} | {_shown(v)} |" for k, v in report[key].items()]
    lines += ["", "## Files", "", "| file | bytes |", "|---|---|"]
    lines += [f"| {name} | {size:,} |" for name, size in artefact["files"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += ["", f"    {report['command']}", ""]
    lines += [
        f"{report['date']}, commit {report['commit']}, {report['processor']}, {versions}.",
        "",
    ]
    return "\n".join(lines)


def _verdict(report: Mapping[str, Any]) -> str:
    if not report["bounds"]:
        return "Its files are whole; there was nothing to hold it to."
    return "Passed." if report["passed"] else "FAILED."


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
