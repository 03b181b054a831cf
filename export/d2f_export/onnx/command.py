"""d2f-stream export and d2f-stream verify: arguments, and what is said of the results."""

import argparse
import importlib.util
import json
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from d2f_stream.core.errors import InvalidParams, MissingExtra, ModelDamaged
from d2f_stream.core.params import GenerationParams
from d2f_stream.parser import Parser, new_parser

if TYPE_CHECKING:
    from d2f_export.onnx.artefact import Defaults
    from d2f_export.onnx.verification import Question, Verification
    from d2f_runtime.models.manifest import Manifest
    from d2f_runtime.text.tokenizer import Tokenizer

__all__ = ["export_parser", "run_export", "run_verify", "verify_parser"]

NUM_RANDOM = 8  # prompts of random tokens, where no others are given


def run_export(argv: Sequence[str]) -> int:
    """Export a model as an ONNX folder; return the exit code."""
    arguments = export_parser().parse_args(argv)
    _require("export")
    from d2f_export.onnx.artefact import Description, write_artefact
    from d2f_runtime.models.facts import About
    from d2f_runtime.models.manifest import TrainingInfo

    checkpoint, name = _fetched(arguments.model)
    adapter = None if arguments.adapter is None else _fetched(arguments.adapter)[0]
    training = TrainingInfo(command=arguments.training, figures=arguments.figures)
    description = Description(
        name=arguments.name or name,
        defaults=arguments.defaults or _defaults(checkpoint, adapter, arguments.family),
        training=training if arguments.training or arguments.figures else None,
        about=About(
            description=arguments.description,
            license=arguments.license,
            examples=tuple(arguments.example),
        ),
        tokenizer=arguments.tokenizer,
        chat_template=arguments.chat_template,
    )
    manifest = write_artefact(
        checkpoint,
        arguments.output,
        description,
        target=arguments.target,
        quantization=arguments.quantize,
        adapter=adapter,
        family=arguments.family,
        window=arguments.window,
        capacity=arguments.capacity,
    )
    assert manifest.onnx is not None
    size = sum(file.bytes for file in manifest.files.values()) / 1e6
    quantization = manifest.onnx.quantization
    sys.stdout.write(f"wrote {arguments.output}: {manifest.name}, {quantization}, {size:.1f} MB\n")
    return 0


def run_verify(argv: Sequence[str]) -> int:
    """Verify an ONNX folder; return the exit code, 1 where a bound is missed."""
    arguments = verify_parser().parse_args(argv)
    _require("verify")
    from d2f_export.onnx.verification import verify_artefact
    from d2f_runtime.backends.devices import check_device
    from d2f_runtime.models.facts import WITHOUT_THOUGHTS
    from d2f_runtime.models.manifest import read_manifest
    from d2f_runtime.text.tokenizer import Tokenizer

    if arguments.number < 1:
        raise InvalidParams("number", arguments.number, "at least 1")
    check_device(arguments.device, backend="onnx")
    manifest = read_manifest(arguments.artefact)
    if manifest.onnx is None:
        raise ModelDamaged(f"{arguments.artefact} holds no ONNX graph; there is nothing to verify")
    codec = Tokenizer.from_folder(
        arguments.artefact,
        mask_id=manifest.mask_id,
        opens_thoughts=manifest.family not in WITHOUT_THOUGHTS,
    )
    found = verify_artefact(
        arguments.artefact,
        _questions(arguments, manifest, codec),
        codec,
        checkpoint=None if arguments.model is None else _fetched(arguments.model)[0],
        adapter=None if arguments.adapter is None else _fetched(arguments.adapter)[0],
        family=arguments.family,
        device=arguments.device,
        num_compared=arguments.compared,
    )
    command = shlex.join(["d2f-stream", "verify", *argv])
    _report(found, manifest, arguments, command)
    return 0 if found.passed else 1


def export_parser() -> Parser:
    """Return the parser of `run_export`."""
    parser = new_parser(
        "d2f-stream export",
        "Write a model as a folder that onnxruntime runs.",
        example="d2f-stream export --model smollm2:135m --quantize int8 --output smollm2-onnx",
    )
    parser.add_argument(
        "-m",
        "--model",
        required=True,
        help="a name, a checkpoint's folder, a .gguf file or a hub id",
    )
    parser.add_argument(
        "--adapter", help="folder or hub id of a LoRA adapter, to merge or to draft with"
    )
    parser.add_argument("--family", metavar="NAME", help="the model's, if its files tell none")
    parser.add_argument(
        "--target",
        choices=("cpu", "cuda", "device"),
        default="cpu",
        help="what runs it; device: with fixed shapes, for phones and NPUs",
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder; replaced whole")
    parser.add_argument(
        "--quantize", metavar="NAME", help="fp32, fp16, int8, int4, int4-fp16 or int4-int8"
    )
    parser.add_argument("--name", help="of the model, for people; default: of its folder")
    parser.add_argument("--window", type=int, default=64, help="positions; for --target device")
    parser.add_argument("--capacity", type=int, default=512, help="tokens; for --target device")
    about = parser.add_argument_group("what the manifest says (for published models: their own)")
    about.add_argument("--tokenizer", type=Path, help="where the model's folder has none")
    about.add_argument("--chat-template", help="jinja text")
    about.add_argument("--defaults", type=json.loads, metavar="JSON", help="by kind of device")
    about.add_argument("--description", default="", help="what the model can do")
    about.add_argument("--license", default="", help="of the weights, such as Apache-2.0")
    about.add_argument("--example", action="append", default=[], help="a prompt; may be repeated")
    about.add_argument("--training", default="", help="what made the checkpoint")
    about.add_argument(
        "--figures", type=json.loads, default={}, metavar="JSON", help="what was measured of it"
    )
    return parser


def verify_parser() -> Parser:
    """Return the parser of `run_verify`."""
    parser = new_parser(
        "d2f-stream verify",
        "Compare an exported folder with its checkpoint.",
        example="d2f-stream verify smollm2-onnx --model smollm2:135m --number 100",
    )
    parser.add_argument("artefact", type=Path, help="the exported folder")
    text = "the checkpoint; without it only the files are checked"
    parser.add_argument("-m", "--model", help=text)
    parser.add_argument("--adapter", help="that was exported with it")
    parser.add_argument("--family", metavar="NAME", help="that it was exported with")
    parser.add_argument(
        "--questions", type=Path, help="JSON lines with prompt or messages, and ending to be scored"
    )
    parser.add_argument("--number", type=int, default=1000, help="how many questions")
    parser.add_argument(
        "--compared", type=int, default=80, help="how many of them are compared step by step"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--output", type=Path, help="folder for report.json and report.md")
    parser.add_argument("--record", action="store_true", help="put the figures into the manifest")
    return parser


def _questions(
    arguments: argparse.Namespace, manifest: "Manifest", codec: "Tokenizer"
) -> "list[Question]":
    """Return the given questions, or random ones."""
    from d2f_export.onnx.verification import Question, read_questions

    if arguments.questions is not None:
        return read_questions(arguments.questions, codec, arguments.number)
    rng = random.Random(0)
    allowed = [i for i in range(manifest.num_tokens) if i != manifest.mask_id]
    allowed = [token for token in allowed if token not in manifest.eos_ids]
    lengths = [max(1, min(manifest.max_len // 4, 64) * (i + 1) // NUM_RANDOM) for i in range(8)]
    return [Question(rng.choices(allowed, k=length)) for length in lengths]


def _report(
    found: "Verification", manifest: "Manifest", arguments: argparse.Namespace, command: str
) -> None:
    from d2f_export.onnx.report_page import page
    from d2f_runtime.models.manifest import FILE_NAME, VerificationInfo, encode_manifest
    from d2f_runtime.provenance import environment

    report = environment(command) | found.to_dict()
    text = page(report)
    sys.stdout.write(text)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        encoded = json.dumps(report, indent=2) + "\n"
        (arguments.output / "report.json").write_text(encoded, encoding="utf-8")
        (arguments.output / "report.md").write_text(text, encoding="utf-8")
    if arguments.record:
        figures: dict[str, Any] = {}
        for part in ("logits", "decoding", "accuracy"):
            for key, value in getattr(found, part).items():
                if not isinstance(value, tuple | list):
                    figures[f"{part}.{key}"] = value
        verification = VerificationInfo(command=command, passed=found.passed, figures=figures)
        changed = replace(manifest, verification=verification)
        path = arguments.artefact / FILE_NAME
        unfinished = path.with_name(f".{FILE_NAME}")
        unfinished.write_bytes(encode_manifest(changed))
        unfinished.replace(path)


def _require(command: str) -> None:
    for library in ("torch", "onnx", "onnxruntime"):
        if importlib.util.find_spec(library) is None:
            raise MissingExtra(f"d2f-stream {command}", library, "export")


def _fetched(model: str) -> tuple[Path, str]:
    """Return the folder of a model or adapter, fetched where it is a hub id, and its name."""
    from d2f_runtime.models.hub import HubModel, fetch_description, fetch_weights, locate

    source = locate(model)
    if isinstance(source, HubModel):
        folder = fetch_description(source)
        fetch_weights(source, folder)
        return folder, source.name
    return source, source.name


def _defaults(checkpoint: Path, adapter: Path | None, family: str | None) -> "Defaults":
    """Return a published model's own request defaults, or those of its folder's manifest."""
    from d2f_runtime.models.draft_facts import DraftFacts
    from d2f_runtime.models.manifest import FILE_NAME, read_manifest
    from d2f_runtime.models.published import find_published

    draft = None if adapter is None else DraftFacts.read(adapter)
    if (checkpoint / FILE_NAME).is_file() and draft is None:
        return read_manifest(checkpoint).defaults
    published = find_published(checkpoint, family=family)
    params = GenerationParams()
    if published is not None:
        params = published.defaults(adapted=adapter is not None)
    elif draft is None:
        return {}
    if draft is not None:
        params = draft.defaults(params)
    plain = msgspec.to_builtins(GenerationParams())
    changed = {k: v for k, v in msgspec.to_builtins(params).items() if v != plain[k]}
    changed.pop("top_p", None)  # the graph samples without it
    changed["block_size"] = params.block_size
    return {"cpu": changed}
