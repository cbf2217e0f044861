"""Turn a Plan, or a Front of slices, into one self-contained page of HTML.

Styles and drawings are inside the page; it fetches nothing and runs no script. What the
planner alone can say (neighbours, why the runner-up lost) is handed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from llmos_jax.ir import Front, Neighbour, Plan, axes_text, fidelity_of
from llmos_jax.ir.facts import exchange_text, schedule_text
from llmos_jax.telemetry.plan_figures import (
    candidates_plot,
    chip_colours,
    front_plot,
    memory_bars,
    part_colours,
    time_bars,
)
from llmos_jax.units import format_bytes, format_seconds, format_si


def page_of_plan(
    plan: Plan,
    *,
    budget_bytes: float,
    neighbours: Sequence[tuple[Neighbour, str]],
    why_lost: str,
    resources: Mapping[str, str],
    reasons: Sequence[str],
    config_toml: str,
    versions: Mapping[str, str],
) -> str:
    """Return the page of a plan.

    Args:
        plan: what to show.
        budget_bytes: what a plan may use of one device.
        neighbours: each with what its way has that the plan's has not.
        why_lost: why the runner-up lost.
        resources: resource -> what keeps it busy.
        reasons: kinds of rejections, counted.
        config_toml: every key of the config.
        versions: package -> version.
    """
    return _render(
        "plan_page.html.j2",
        title=f"{plan.params.name} on {plan.topology.name}",
        subtitle=_subtitle(plan),
        headlines=_headlines(plan),
        choice=_choice(plan),
        memory_svg=memory_bars(plan, budget_bytes),
        memory_rows=_memory_rows(plan, budget_bytes),
        time_svg=time_bars(plan, resources),
        candidates_svg=candidates_plot(plan, budget_bytes),
        runner_up=_runner_up(plan, why_lost),
        neighbours=[_neighbour(plan, item, way) for item, way in neighbours],
        collectives=_collectives(plan),
        compiled=plan.compiled,
        fidelity=fidelity_of(plan),
        reasons=[reason.strip() for reason in reasons],
        plan=plan,
        config_toml=config_toml,
        versions=versions,
    )


def page_of_front(front: Front) -> str:
    """Return the page of a front."""
    work = front.workload
    colours = chip_colours(front)
    tried = len(front.front) + len(front.beaten) + len(front.infeasible)
    return _render(
        "front_page.html.j2",
        title=f"{front.model}: which slice?",
        subtitle=(
            f"{_people(front.num_params)} parameters, {work.phase}, "
            f"{work.global_batch} x {work.seq_len} tokens a step; {tried} slices"
        ),
        plot_svg=front_plot(front),
        legend=list(colours.items()),
        rows=[_slice(item.summary()) for item in front.front],
        beaten=[_slice(item.summary()) for item in front.beaten],
        colours=colours,
        front=front,
    )


def _render(name: str, **fields: Any) -> str:
    import jinja2

    def read(template: str) -> str:
        return files(__package__).joinpath(template).read_text("utf-8")

    return (
        jinja2.Environment(
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            loader=jinja2.FunctionLoader(read),
        )
        .get_template(name)
        .render(**fields)
    )


def _people(count: float) -> str:
    return format_si(count).replace(" ", "").replace("G", "B")


def _subtitle(plan: Plan) -> str:
    work, machine = plan.workload, plan.topology
    chips = f"{machine.chips} chip{'s' * (machine.chips > 1)}"
    return (
        f"{_people(plan.params.num_params)} parameters on {chips}, {work.phase}, "
        f"{work.global_batch} x {work.seq_len} tokens a step, "
        f"{work.compute_dtype} compute, {work.param_dtype} weights"
    )


def _headlines(plan: Plan) -> list[tuple[str, str]]:
    found, whole = plan.predicted, plan.topology.hbm_bytes_per_device
    peak = found.peak_hbm_bytes
    if plan.compiled is not None:
        peak = float(plan.compiled["peak_hbm_bytes"])
    band = "" if found.error is None else f" \N{PLUS-MINUS SIGN} {found.error:.0%}"
    return [
        ("step time", f"{format_seconds(found.step_s)}{band}"),
        ("tokens/s", format_si(found.tokens_per_s)),
        ("MFU", f"{found.mfu:.1%}"),
        ("bound by", found.bound_by),
        ("peak memory", f"{format_bytes(peak)}, {peak / whole:.0%}"),
    ]


def _choice(plan: Plan) -> list[tuple[str, str]]:
    way, placed = plan.way, plan.predicted.placement
    rows = [("mesh", str(plan.mesh))]
    rows += [
        (f"{axis}={n} lies on", placed[axis])
        for axis, n in plan.mesh.sizes.items()
        if n > 1 and axis in placed
    ]
    if plan.workload.local_steps:
        steps = plan.workload.local_steps
        rows.append(("replicas", f"agree on parameters once in {steps} steps"))
    rows += [("remat", plan.remat), ("microbatches", str(plan.microbatches))]
    if plan.mesh.stage > 1:
        rows.append(("schedule", schedule_text(way)))
    if plan.mesh.context > 1:
        rows.append(("keys of others", exchange_text(way)))
    if way.offload:
        rows.append(("in host memory", ", ".join(way.offload)))
    if way.loss_tiles > 1:
        rows.append(("loss", f"in {way.loss_tiles} tiles of the {way.loss_over}"))
    if way.state_dtype != "float32":
        rows.append(("optimizer state", way.state_dtype))
    if way.gradient_dtype != "float32":
        rows.append(("gradients", way.gradient_dtype))
    rows.append(("layers", "written out" if way.unrolled else "one loop (scan)"))
    if plan.topology.chip.vendor == "cpu":
        rows.append(("note", "cpu figures are nominal: they rank, they are no speed"))
    elif plan.predicted.domain:
        rows.append(("support", plan.predicted.domain))
    return rows


def _memory_rows(plan: Plan, budget_bytes: float) -> list[dict[str, Any]]:
    whole, peak = plan.topology.hbm_bytes_per_device, plan.predicted.peak_hbm_bytes
    memory = {name: size for name, size in plan.predicted.memory.items() if size > 0}
    colours = part_colours(memory)
    parts = [(name, size, colours[name]) for name, size in memory.items()]
    reserve = whole - budget_bytes
    parts += [
        ("reserve", reserve, "reserve"),
        ("free", whole - peak - reserve, "var(--track)"),
    ]
    return [
        {
            "name": name,
            "colour": colour,
            "size": format_bytes(size),
            "share": f"{size / whole:.1%}",
        }
        for name, size, colour in parts
    ]


def _runner_up(plan: Plan, why_lost: str) -> dict[str, str] | None:
    if plan.runner_up is None:
        return None
    found = plan.runner_up.predicted
    return {
        "way": str(plan.runner_up.way),
        "figures": f"{format_seconds(found.step_s)} a step, MFU {found.mfu:.1%}, "
        f"{format_bytes(found.peak_hbm_bytes)}",
        "why": why_lost,
    }


def _neighbour(plan: Plan, item: Neighbour, way: str) -> dict[str, str]:
    if item.best is None:
        return {"change": item.change, "reason": item.reason}
    found = item.best.predicted
    return {
        "change": item.change,
        "reason": "",
        "step": format_seconds(found.step_s),
        "tokens": format_si(found.tokens_per_s),
        "speed": _speed(found.tokens_per_s / plan.predicted.tokens_per_s),
        "memory": format_bytes(found.peak_hbm_bytes),
        "way": way,
    }


def _speed(ratio: float) -> str:
    return "same" if abs(ratio - 1) < 0.005 else f"{ratio - 1:+.0%}"


def _collectives(plan: Plan) -> list[dict[str, str]]:
    if plan.compiled is None:
        return []
    kinds = (("collectives", ""), ("unplanned_collectives", "unplanned"))
    return [
        {
            "op": str(item["op"]),
            "axes": axes_text(item["axes"]),
            "link": str(item.get("link", "")).upper(),
            "count": f"{item['count']:,}",
            "bytes": format_bytes(item["bytes"]),
            "style": style,
            "why": str(item.get("why", "")),
        }
        for key, style in kinds
        for item in plan.compiled.get(key, [])
    ]


def _slice(item: Mapping[str, Any]) -> dict[str, str]:
    usd, hour = item["usd_per_million_tokens"], item["usd_per_hour"]
    mesh = " ".join(f"{axis}={n}" for axis, n in item["mesh"].items() if n > 1)
    offload = f", offload {'+'.join(item['offload'])}" if item["offload"] else ""
    return {
        "topology": item["topology"],
        "chip": item["chip"],
        "chips": f"{item['chips']:,}",
        "step": format_seconds(item["step_s"]),
        "tokens": format_si(item["tokens_per_s"]),
        "usd": "no price" if usd is None else f"${usd:.3g}",
        "hour": "" if hour is None else f"${hour:,.2f}",
        "free": f"{item['headroom']:.0%}",
        "mfu": f"{item['mfu']:.0%}",
        "way": f"{mesh or 'one device'}, remat {item['remat']}{offload}, "
        f"microbatches\N{NO-BREAK SPACE}{item['microbatches']}",
    }
