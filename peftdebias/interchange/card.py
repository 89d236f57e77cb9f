"""README.md of an exported folder: what it is, where it comes from, and what it cannot show."""

import json
from pathlib import Path

from .. import __version__, checkpoint

WRITTEN = "Written by peftdebias"
LIMITS = "The benchmarks have positive predictive power only: they can show bias, never its absence. Gender is treated as binary, and the word lists are narrow."


def card(run: Path, config: dict, form: str, base: str, longest: int, onto: str | None = None) -> str:
    """README.md of an exported folder: axis, method, base, data, figures of the run's last event, limits.

    base: the model that a peft folder lies on, or the one that the run began from. longest: tokens at which the run cuts a text. onto: the class of transformers that
    a peft folder is loaded onto.
    """
    headers = [checkpoint.read_header(f) for f in checkpoint.adapter_folders(run)]
    axes = sorted({h["axis"] for h in headers} | ({config["axis"]} if "axis" in config else set()))
    what = [f"{h['method']} ({', '.join(f'{k} {v}' for k, v in h['config'].items() if v is not None)}), learnt on the axis {h['axis']}"
            + (f", read from a folder of {h['origin']['library']}" if "origin" in h else "") for h in headers]
    began = f"{WRITTEN} {__version__} from a run of `{config.get('command', '')}`"
    of_run = base != config.get("model", "")
    described = of_run or not (run / "model").is_dir()  # a module's header tells of the model that it lies on
    about = "".join(f" ({b['type']}, {b['layers']} layers, hidden {b['hidden']}, sha256 {(b.get('sha256') or 'unknown')[:12]})" for b in [h["base"] for h in headers[:1]] if described)
    lines = ["---", f"library_name: {'peft' if form == 'peft' else 'transformers'}", f"base_model: {json.dumps(base)}",
             "tags: [peftdebias, debiasing]", "---", "", f"# Debiasing: {', '.join(axes) or 'none'}", "",
             began + (", its modules merged into the weights." if form == "merged" else "."), "",
             *(f"- module: {w}" for w in what), *([] if what else [f"- method: {config.get('method', 'full fine-tuning')}, the whole base"])]
    lines.append(f"- base: {base}{about}" + (f", trained from {config['model']}" if of_run and config.get("model") else ""))
    if config.get("command") == "upstream" and config.get("adapter"):
        lines.append(f"- learnt and measured beside: {', '.join(config['adapter'])}, not part of this folder")
    if onto:
        lines.append(f"- load: `PeftModel.from_pretrained({onto}.from_pretrained({base!r}, dtype=torch.float32), FOLDER)`; on a model of another class or base its names may find no "
                     "place, and peft then warns and leaves the base as it was, or its answers are others")
    lines.append(f"- texts: the run cuts them at {longest} tokens (`truncation=True, max_length={longest}`)")
    data = [Path(f).name for key in ("corpus", "train", "dev", "test") for f in ([config[key]] if isinstance(config.get(key), str) else config.get(key, []))]
    lines += [f"- data: {', '.join(data) or 'not recorded'}", "", "## Figures", "", *(_figures(run) or ["None recorded."]), "", "## Limits", "", LIMITS, ""]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _figures(run: Path) -> list[str]:
    """A line for every figure of the last event in metrics.jsonl; none where it is not there, or damaged."""
    try:
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        last = next(e for e in reversed(events) if e.get("event") == "final")
        found = [f"- {m['name']}: {_number(m['value'])} {m.get('unit', '')}".rstrip() + (f" (95 % interval {_number(m['low'])} to {_number(m['high'])})" if m.get("low") is not None else "")
                 for m in last.get("measures", [])]
        if found or "loss" not in last:
            return found
        # Of the last training: that of a new head comes before it.
        before = next((f"{e['loss']:.4f} before, " for e in reversed(events) if e.get("event") == "validation" and e.get("step") == 0), "")
        return [f"- masked-LM loss on held-out texts, nats a masked token: {before}{last['loss']:.4f} at step {last['step']}"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
        return []
