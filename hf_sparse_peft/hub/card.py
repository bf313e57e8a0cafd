"""The model card of an adapter: rendered from its unit spaces, pieces and config, whatever its tuner."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftConfig
from torch import nn

from ..training.run_record import RunRecord
from ..tuners import AdapterLayer, adapter_layers
from ..tuners.shared.base_overrides import QUANTIZATION, recorded_overrides
from ..tuners.shared.config import AdapterConfig
from ..tuners.shared.counts import AdapterCounts, adapter_counts
from ..tuners.shared.pieces import Decomposed, Nonlinear
from ..utils.environment import package_versions
from ..utils.installation import install_command, repository_url
from ..utils.parts import plain
from .base_model import pipeline_of
from .card_results import Metrics, eval_results, for_metadata, result_rows
from .loading_code import base_class, loading_code, quantization, trained_base
from .summary import adapter_summary

TEMPLATE = Path(__file__).with_name("card_template.md")
GENERATED = "<!-- Written by hf-sparse-peft at every save while this line is here; delete it to keep your edits. -->"


def adapter_card(
    model: nn.Module,
    *,
    adapter_name: str = "default",
    base_model: str | None = None,
    method: str | None = None,
    paper: str | None = None,
    metrics: Metrics | None = None,
    evaluated_on: str | None = None,
    run: RunRecord | None = None,
    picture: str | None = None,
    notes: str | None = None,
    repo_id: str | None = None,
    training_data: str | Sequence[str] | None = None,
    license: str | None = None,
    tags: Sequence[str] | None = None,
    generated: bool = False,
) -> ModelCard:
    """The model card of an adapter of any tuner of this package, filled in from its unit spaces, pieces and config.

    Args:
        model: has the adapter.
        adapter_name: which adapter.
        base_model: what the base is called; None: the name that the adapter's config holds. It becomes Hub metadata
            only where it can be a Hub id, since the Hub refuses cards that name a local path.
        method: name of the method.
        paper: where it is from.
        metrics: names and numbers, or a list of `huggingface_hub.EvalResult`; None: the last evaluation of `run`.
        evaluated_on: what the numbers were measured on, prose or a dataset of the Hub; then they become metadata.
        run: the record of the run (`RunReportCallback.record`): settings, cost and environment.
        picture: name of a picture that lies beside the card.
        notes: a paragraph about training.
        repo_id: Hub repo of the adapter.
        training_data: prose, or a list of Hub dataset ids, which become metadata.
        license: a Hub licence id; without one the card states none.
        tags: added to the card's own.
        generated: mark the card as one that later saves may rewrite.

    Raises:
        ValueError: `model` has no adapter of this package of that name, or `metrics` is neither a mapping nor a list of
            results.
    """
    layers = adapter_layers(model, adapter_name=adapter_name)
    config = layers[0].adapter_configs[adapter_name]
    base_model = base_model or config.base_model_name_or_path or None
    datasets = [training_data] if isinstance(training_data, str) else list(training_data or ())
    hub_datasets = [] if isinstance(training_data, str) else [name for name in datasets if _is_hub_id(name)]
    class_of_base = base_class(model, config)
    pipeline = pipeline_of(class_of_base[0])
    metrics = run.metrics if metrics is None and run is not None else metrics
    results = eval_results({} if metrics is None else metrics, evaluated_on, pipeline)
    for_hub = for_metadata(results, _is_hub_id)
    title = repo_id.rpartition("/")[2] if repo_id else f"Sparse adapter for {base_model or 'a model without a name'}"
    kind = config.peft_type.value
    tags = ["hf-sparse-peft", "peft", kind.lower(), *([method] if method else []), *(tags or ())]
    if _is_hub_id(base_model):
        tags.append(f"base_model:adapter:{base_model}")
    data = ModelCardData(
        library_name="peft",
        base_model=base_model if _is_hub_id(base_model) else None,
        license=license,
        base_model_relation="adapter" if _is_hub_id(base_model) else None,
        pipeline_tag=pipeline,
        eval_results=for_hub or None,
        model_name=title if for_hub else None,
        datasets=hub_datasets or None,
        tags=sorted(set(tags)),
    )
    rows, counts = adapter_summary(model, adapter_name), adapter_counts(model, adapter_name)
    overrides = recorded_overrides(model, config)
    shown = repo_id or "path/or/repo-of-this-adapter"
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=title,
        summary=_summary(rows, counts, config, base_model, method, paper),
        install=install_command(),
        install_remark="" if repository_url() else " It is run in a clone of its repository.",
        # The fence comes with the code: formatters rewrite Python blocks of Markdown files, placeholders too.
        load_code=f"```python\n{loading_code(class_of_base, shown, base_model, config, overrides)}\n```",
        trained_base=trained_base(overrides, shown),
        peft_type=kind,
        leaving=_leaving(layers, adapter_name, class_of_base, base_model, config, overrides),
        summary_table=_summary_table(rows, counts),
        summary_legend=_legend(rows),
        config_table=_table(("option", "value"), _config_rows(config)),
        metrics=_table(*result_rows(results)) if results else "None were given with this card.",
        picture=f"![Losses, density and rank over the steps of the run]({picture})" if picture else "",
        training=_training(config, overrides, datasets, notes, run),
        versions=_versions(run),
        marker=GENERATED if generated else "",
    )


def exported_card(config: PeftConfig, source: PeftConfig) -> ModelCard:
    """The short card of an adapter that was exported from `source` to a format of upstream's."""
    base, kind = config.base_model_name_or_path, config.peft_type.value
    data = ModelCardData(
        library_name="peft",
        base_model=base if _is_hub_id(base) else None,
        tags=sorted({"hf-sparse-peft", "peft", kind.lower()}),
    )
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {kind} export\n\nA {kind} adapter for {_base_link(base)}, exported from a "
        f"{source.peft_type.value} adapter by hf-sparse-peft. It loads with plain peft:\n\n"
        "```python\nfrom peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base, "path/or/repo-of-this-adapter")\n```\n'
    )


# Parts of the card


def _is_hub_id(name: str | None) -> bool:
    return bool(name) and not os.path.exists(name) and is_repo_id(name)


def is_repo_id(name: str) -> bool:
    """Whether the Hub takes it for a repo's name; a relative path may look like one."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _summary(
    rows: list[dict[str, Any]],
    counts: AdapterCounts,
    config: AdapterConfig,
    base_model: str | None,
    method: str | None,
    paper: str | None,
) -> str:
    modules = sum(row["modules"] for row in rows)
    spaces = [space for row in rows for space in row["spaces"] if space["alive"]]
    shape = []
    if units := dict.fromkeys(space["unit"] for space in spaces if space["kind"] == "support"):
        shape.append(f"a support of {' and '.join(units)} units")
    if any(space["kind"] == "rank" for space in spaces):
        shape.append("a low-rank half")
    others = dict.fromkeys(space["kind"] for space in spaces if space["kind"] not in ("support", "rank"))
    shape += [f"a {kind} update" for kind in others]
    has_units = any(row["spaces"] for row in rows)
    form = " and ".join(shape) or ("nothing yet" if has_units else f"a {config.peft_type.value} update")
    text = (
        f"An adapter of {counts.living:,} parameters for {_base_link(base_model)}: {form}, in {modules} linear layers"
        f"{f', and {counts.beside:,} parameters of heads and biases' if counts.beside else ''}. "
        "Made with hf-sparse-peft, a package of tuners for peft."
    )
    if method:
        text += f" Method: `{method}`" + (f" ({paper})." if paper else ".")
    elif paper:
        text += f" Method: {paper}."
    return text


def _base_link(base_model: str | None) -> str:
    if not base_model:
        return "a base model that its config does not name"
    return f"[{base_model}](https://huggingface.co/{base_model})" if _is_hub_id(base_model) else f"`{base_model}`"


def _leaving(
    layers: list[AdapterLayer],
    adapter_name: str,
    class_of_base: tuple[str, str],
    base_model: str | None,
    config: AdapterConfig,
    overrides: dict[str, Any],
) -> str:
    """How the adapter is used where this package is not."""
    pieces = [piece for layer in layers for piece in layer.pieces(adapter_name)]
    if any(isinstance(piece, Nonlinear) for piece in pieces):
        return (
            "It is a module beside weights and no change of them: nothing of it can be merged, or written as a LoRA. "
            "Other engines cannot run it."
        )
    shifted = any(layer.bias_change(adapter_name) is not None for layer in layers)
    if not shifted and all(piece.exact_rank is not None for piece in pieces):
        kind = "DoRA" if any(isinstance(piece, Decomposed) for piece in pieces) else "LoRA"
        loads = loading_code(class_of_base, "as-lora", base_model, config, overrides, alone=True)
        done = 'hub.export_lora(model, "as-lora")  # exactly'
        said = f"As a plain {kind}, without loss, it goes wherever {kind} goes:"
    else:
        name, library = class_of_base
        loads = f'from {library} import {name}\n\nmodel = {name}.from_pretrained("as-dense")'
        done = 'hub.merge_to_dense(model, "as-dense")'
        said = "Merged into a dense model it goes to engines that know nothing of adapters like this one:"
    code = f"from hf_sparse_peft import hub\n\n{done}"
    if class_of_base[1] != "transformers" and "as-dense" in done:
        return f"{said}\n\n```python\nfrom hf_sparse_peft import hub\n\ndense = hub.merge_to_dense(model)\n```"
    return f"{said}\n\n```python\n{code}\n```\n\nand is loaded from then on by\n\n```python\n{loads}\n```"


def _summary_table(rows: list[dict[str, Any]], counts: AdapterCounts) -> str:
    kinds = list(dict.fromkeys(space["kind"] for row in rows for space in row["spaces"]))
    weights = sum(row["modules"] * row["rows"] * row["cols"] for row in rows)
    changed = sum(row["density"] * row["modules"] * row["rows"] * row["cols"] for row in rows)
    body = [
        (
            f"{row['modules']} x `{row['group']}`",
            f"{row['rows']} x {row['cols']}",
            *(_living(row["spaces"], kind) for kind in kinds),
            f"{row['density']:.4%}",
            f"{row['parameters']:,}",
        )
        for row in rows
    ]
    if counts.beside:
        body.append(("heads and biases", "", *("" for _ in kinds), "", f"{counts.beside:,}"))
    in_all = (sum(s["alive"] for row in rows for s in row["spaces"] if s["kind"] == kind) for kind in kinds)
    body.append(
        (
            f"{sum(row['modules'] for row in rows)} in all",
            "",
            *(f"{count:,}" for count in in_all),
            f"{changed / weights:.4%}",
            f"{counts.living:,}",
        )
    )
    return _table(("layers", "shape", *(f"living units: {kind}" for kind in kinds), "density", "parameters"), body)


def _living(spaces: list[dict[str, Any]], kind: str) -> str:
    found = [space for space in spaces if space["kind"] == kind]
    if not found:
        return "none"
    alive, capacity = (sum(space[key] for space in found) for key in ("alive", "capacity"))
    unit = found[0]["unit"]
    ending, own = next((pair for pair in (("y", "ies"), ("is", "es")) if unit.endswith(pair[0])), ("", "s"))
    plural = f"{unit.removesuffix(ending)}{own}"
    return f"{alive:,}" + (f" of {capacity:,}" if alive != capacity else "") + f" {unit if alive == 1 else plural}"


_MEANING = {
    "support": "a support's are entries, blocks, rows or columns of a weight",
    "rank": "a rank's are components of the low-rank half",
    "kernel": "a kernel's are the entries of the update that are not zero",
    "basis": "a basis's are its columns, or its trained entries where it has a mask",
}


def _legend(rows: list[dict[str, Any]]) -> str:
    kinds = dict.fromkeys(space["kind"] for row in rows for space in row["spaces"])
    meanings = "; ".join(_MEANING[kind] for kind in kinds if kind in _MEANING)
    units = f"Units are what the update is made of: {meanings}. Only living ones are counted. " if meanings else ""
    return f"{units}Density is the fraction of a weight's entries that living units change one by one."


_LONGEST = 12
"""Entries of a dict that a table shows."""
_ALWAYS_SHOWN = ("r", "lora_alpha", "density", "granularity", "criterion", "seed")
_NOT_SHOWN = {
    *(field.name for field in dataclasses.fields(PeftConfig)),
    *(
        "base_overrides",
        "exclude_modules",
        "install_hint",
        "saved_base_weights",
        "sizes",
        "training_finished",
        "target_modules",
    ),
}


def _config_rows(config: AdapterConfig) -> list[tuple[str, str]]:
    """The options that are not at their defaults, and those that everybody asks for."""
    always = {name: plain(getattr(config, name)) for name in _ALWAYS_SHOWN if hasattr(config, name)}
    if getattr(config, "budget", None) is not None:  # says what `density` would
        del always["density"]
    written = {**always, **{name: value for name, value in config.to_dict().items() if name not in _NOT_SHOWN}}
    order = [field.name for field in dataclasses.fields(config)] + sorted(config.unknown_options)
    shown = {name: _option_value(written[name]) for name in order if name in written}
    targets = config.target_modules
    if targets is not None:  # peft expands "all-linear" to one whole name a module: the last parts tell as much
        names = targets if isinstance(targets, str) else {name.rpartition(".")[2] for name in targets}
        shown["target_modules"] = names if isinstance(names, str) else ", ".join(sorted(names))
    return [(f"`{key}`", f"`{value}`") for key, value in shown.items()]


def _option_value(value: Any) -> str:
    """A JSON value as a reader of a table takes it: `{"type": "cosine", "start": 0.3}` -> `cosine(start=0.3)`."""
    if isinstance(value, dict):
        kind, options = value.get("type"), {key: inner for key, inner in value.items() if key != "type"}
        shown = [f"{key}={_option_value(inner)}" for key, inner in options.items() if inner is not None]
        # An option by module names has an entry for every layer; what the config takes has fewer.
        inside = ", ".join(shown if len(shown) <= _LONGEST else [*shown[:2], f"... ({len(shown)} in all)"])
        return f"{kind}({inside})" if kind and inside else kind or inside
    if isinstance(value, (list, tuple, set)):
        return ", ".join(_option_value(inner) for inner in (sorted(value) if isinstance(value, set) else value))
    return _number(value)


def _training(
    config: AdapterConfig, overrides: dict[str, Any], datasets: list[str], notes: str | None, run: RunRecord | None
) -> str:
    parts = [f"Data: {', '.join(datasets)}." if datasets else "The training data was not given with this card."]
    if QUANTIZATION in overrides:
        parts.append(f"Base weights while training: {quantization(overrides)}.")
    if config.training_finished:
        parts.append("Training is over: schedules are done, dead units and components are dropped.")
    elif config.has_schedule:
        parts.append("Saved while its schedules were running; supports or ranks may still move when training goes on.")
    if notes:
        parts.append(notes)
    if run is not None and (told := {**run.facts, **run.cost}):
        parts.append(_table(("run", ""), list(told.items())))
    return "\n\n".join(parts)


def _versions(run: RunRecord | None) -> str:
    made_with = package_versions() if run is None or not run.environment else run.environment
    return "\n".join(f"- {name} {version}" for name, version in made_with.items())


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)
