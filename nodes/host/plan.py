"""A device plan for the checkpoint and the machine at hand."""

from collections.abc import Mapping

import comfy.model_management

from ...glm_core.errors import FileError, shown
from ...glm_core.files.component import COMPONENTS, Component
from ...glm_core.placement.plan import GIB, plan_stages
from ...glm_core.placement.splits import parse_split
from ...glm_core.placement.stages import Request, stages
from ...glm_core.placement.table import plan_table
from .devices import DevicePlan, default_placement, machine, rooms
from .paths import as_listed, model_names
from .vae import working_dtype
from .weights import choose_precision, open_model


def plannable_names() -> list[str]:
    """The names of snapshots and single files that hold any stage."""
    return list(dict.fromkeys(name for kind in COMPONENTS for name in model_names(kind)))


def require_plannable(model_name: object) -> None:
    """
    Raises:
        GLMImageError: no model has that name.
    """
    if as_listed("model_name", model_name, plannable_names()) is None:
        raise FileError(
            f"No model is called '{shown(model_name)}'; choose one that the loaders list."
        )


def make_plan(
    model_name: str,
    weight_dtype: str,
    size: tuple[int, int],
    batch_size: int,
    references: int,
    strategy: str,
    *,
    pins: Mapping[str, str],
    splits: Mapping[str, str],
    reserve_gb: float,
) -> tuple[DevicePlan, str]:
    """The plan, and its table.

    Raises:
        GLMImageError: the model is missing or broken, a split is wrong, or a stage is both pinned
            and split.
    """
    components = _open(model_name, weight_dtype)
    main = components.get("decoder") or next(iter(components.values()))
    compute = choose_precision(main, weight_dtype, default_placement().load).compute
    vae = working_dtype(comfy.model_management.vae_device())
    request = Request(*size, batch_size, references, compute, vae)
    needs = stages(components, weight_dtype, request)
    layers = {stage.name: len(stage.layers) for stage in needs}
    plan = plan_stages(
        needs,
        rooms(int(reserve_gb * GIB)),
        strategy=strategy,
        pins=pins,
        splits={
            stage: parse_split(text, stage, layers.get(stage)) for stage, text in splits.items()
        },
    )
    return DevicePlan(plan, machine()), plan_table(plan)


def _open(model_name: str, weight_dtype: str) -> dict[str, Component]:
    require_plannable(model_name)
    listed = {kind: as_listed("model_name", model_name, model_names(kind)) for kind in COMPONENTS}
    return {
        kind: open_model(kind, name, weight_dtype)
        for kind, name in listed.items()
        if name is not None
    }
