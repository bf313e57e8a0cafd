"""AdamW whose moments live in a subspace of the gradient: GaLore, Fira, FRUGAL, GradNormLoRP."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..sparsity import stream_seed
from ..utils.parts import FrozenDict, UnknownPart, load_part
from ._fp32_state import state_dtype
from .aged_adamw import AgedAdamW
from .backward_steps import several_ranks, step_in_backward
from .moments import drop_moments, start_moments, updated_moments
from .optimizer_kinds import refuse_partitioned
from .projections import Projection
from .residuals import Residual
from .row_norms import RowNorms, joined, split

_OWN = ("projection", "residual", "every", "scale", "reset_moments", "weight_norm", "bits", "released", "seed")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ProjectedAdamW(AgedAdamW):
    r"""AdamW that keeps its moments in a subspace of the gradients of matrices.

    For a matrix `[m, n]` of a group with a `projection` :math:`P`, :math:`t = 0, 1, ...` the steps it took part in,
    with :math:`P` chosen anew from the gradient :math:`G` where `t` is a multiple of `every`:

    .. math::
        R &= P(G), \qquad M \leftarrow \beta_1 M + (1-\beta_1) R, \qquad V \leftarrow \beta_2 V + (1-\beta_2) R^2 \\
        N &= \frac{M / (1-\beta_1^{t+1})}{\sqrt{V / (1-\beta_2^{t+1})} + \epsilon} \\
        W &\leftarrow (1-\eta\lambda)\,W - \eta\,\alpha\,\big(P^{-1}(N) + E(G - P^{-1}(R))\big)

    with the `residual` :math:`E`, none in GaLore, and the `scale` :math:`\alpha`. A choice keeps the moments, which
    then are read in the new subspace (GaLore), or begins them anew, bias correction included (`reset_moments`, FRUGAL).
    Groups without a projection, and parameters that are no matrix, are updated as by `AgedAdamW`.

    `released` is the arithmetic of the released classes of GaLore and Fira instead: :math:`N = M/(\sqrt V+\epsilon)`,
    where :math:`\epsilon` has not been corrected; :math:`W \leftarrow W - \eta_t(\alpha P^{-1}(N) + E)` with
    :math:`\eta_t = \eta\sqrt{1-\beta_2^{t+1}}/(1-\beta_1^{t+1})` and :math:`E` of :math:`G - \alpha P^{-1}(R)`; decay
    after the update; all groups alike.

    With `weight_norm` (GradNormLoRP) a projected matrix is :math:`W = g \odot V/\|V\|` by rows: the above is the update
    of :math:`V` by its gradient, which is orthogonal to it, and :math:`g` `[m]` gets Adam's own; both decay
    (`optim.row_norms`). State: `magnitude`, `norm` and two moments, `[m]` each; :math:`V` is not kept. The released
    class keeps it, leaves its gradient's radial part in and forgets :math:`g` at every step.

    All of the state is tensors, the subspace too, so that a run resumes to the bit with `weights_only=True`: `step`;
    `exp_avg`, `exp_avg_sq` of the projection's shape, fp32, or uint8 with a `_scale` each (`bits=8`); `left`, `right`
    or `indices`; `residual_norm`. While the gradient of a matrix is all 0, as that of LoRA's `A` at the start, it has
    no step: a subspace would be chosen from nothing, and kept.

    Gradients must be whole: DDP, or one process. There every rank has the subspace of rank 0. A parameter whose units
    move cannot be projected: the moments are not theirs.

    Args:
        params: parameters or groups; a group may set any option below.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`. GaLore's class has `eps=1e-6`.
        projection: a `Projection`, its dict, or None.
        residual: a `Residual`, its dict, or None: what is not in the subspace is dropped.
        every: steps between two choices of the subspace.
        scale: factor on the update of projected matrices.
        reset_moments: whether moments begin anew at each choice.
        weight_norm: see above.
        bits: 32, or 8 for bitsandbytes' blockwise 8-bit moments of what is projected, where they have 4,096 numbers.
        released: see above.
        seed: of random projections.
        per_unit_age, unit_axis: as `AgedAdamW`'s, for groups without a projection.

    Raises:
        ValueError: an option out of range; a residual without a projection, or that it does not go with; a sharded
            parameter; a gradient that is not finite where a subspace is to be chosen; a file of other options or
            shapes.

    Source: GaLore, Zhao et al., 2024; Fira, Chen et al., 2024; FRUGAL, Zmushko et al., 2024.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        projection: Projection | dict[str, Any] | None = None,
        residual: Residual | dict[str, Any] | None = None,
        every: int = 200,
        scale: float = 1.0,
        reset_moments: bool = False,
        weight_norm: bool = False,
        bits: int = 32,
        released: bool = False,
        seed: int = 0,
    ) -> None:
        self._options = {"projection": projection, "residual": residual, "every": every, "scale": scale, "bits": bits}
        self._options |= {
            "reset_moments": reset_moments,
            "weight_norm": weight_norm,
            "released": released,
            "seed": seed,
        }
        self._position: dict[int, int] = {}
        super().__init__(params, lr, betas, eps, weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after checking its options and parameters."""
        group = {**self._options, **param_group}
        # Plain values, as torch.load(weights_only=True) takes them.
        group["projection"] = _plain(Projection, group["projection"])
        group["residual"] = _plain(Residual, group["residual"])
        _check_options(group)
        super().add_param_group(group)
        try:
            for p in self.param_groups[-1]["params"]:
                if group["projection"] is not None:
                    refuse_partitioned(p, f"A parameter of shape {tuple(p.shape)}")
        except ValueError:
            self.param_groups.pop()
            raise
        self._position = {}

    def projects(self, p: Tensor) -> bool:
        """Whether the moments of `p` are those of a subspace."""
        return id(p) in self._positions()

    def step_in_backward(self) -> Callable[[], None]:
        """Update every parameter as soon as its gradient is complete, in the backward pass, and free the gradient;
        `step()` then finds nothing to do. Returns a function that ends it. See `optim.step_in_backward`."""
        return step_in_backward(self)

    def update_now(self, p: Tensor) -> None:
        """One update of `p` by its gradient, outside of `step()`."""
        group = next(group for group in self.param_groups if any(one is p for one in group["params"]))
        with torch.no_grad():
            self._update(group, p, p.grad)

    def _positions(self) -> dict[int, int]:
        """id of each projected parameter -> its number among them."""
        if not self._position:
            groups = [group for group in self.param_groups if group["projection"] is not None]
            found = [p for group in groups for p in group["params"] if p.dim() == 2]
            self._position = {id(p): at for at, p in enumerate(found)}
        return self._position

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        projected = group["projection"] is not None and p.dim() == 2
        if not projected and not group["released"]:
            return super()._update(group, p, grad)
        if grad.is_sparse or grad.is_complex():
            raise RuntimeError("ProjectedAdamW takes dense real gradients.")
        refuse_partitioned(grad, f"The gradient of a parameter of shape {tuple(p.shape)}")
        w, grad = p.to(state_dtype(p)), grad.to(state_dtype(p))  # p itself for fp32
        if projected and group["weight_norm"] and (rows := split(self.state[p], w, group["released"])) is not None:
            w.copy_(self._normalised(group, p, grad, rows))
        else:
            _apply(group, w, (self._projected if projected else self._whole)(group, p, grad))
        if w is not p:
            p.copy_(w)

    def _normalised(self, group: dict[str, Any], p: Tensor, grad: Tensor, rows: RowNorms) -> Tensor:
        """The matrix after a step of its magnitudes and directions."""
        along, across = rows.gradients(grad, radial=group["released"])
        state, magnitude, direction = self.state[p], rows.magnitude.clone(), rows.unit * rows.norm[:, None]
        update, step = self._projected(group, p, across), None
        if update is not None:
            m, v = state["magnitude_avg"], state["magnitude_avg_sq"]
            beta1, beta2 = group["betas"]
            m.lerp_(along, 1 - beta1)
            v.mul_(beta2).addcmul_(along, along, value=1 - beta2)
            step, correction = _adam(m, v, state["step"].item(), group)
            step = step * correction
        _apply(group, direction, update)
        _apply(group, magnitude, step)
        return joined(state, magnitude, direction)

    def _whole(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> Tensor:
        """The update of what is not projected, in the released arithmetic."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            start_moments(state, tuple(p.shape), grad, 32)
        state["step"] += 1
        m, v = updated_moments(state, grad, group["betas"])
        step, correction = _adam(m, v, state["step"].item(), group)
        return step.mul_(correction)

    def _projected(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> Tensor | None:
        """The update of a matrix; None where it has no step."""
        state, projection, residual = self.state[p], *_parts(group)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        done, every = int(state["step"].item()), group["every"]
        if done % every == 0 and not self._choose(group, p, grad, done):
            return None
        state["step"] += 1
        age = done % every + 1 if group["reset_moments"] else done + 1
        if "exp_avg" not in state:  # a block without moments in this period
            return residual.update(grad.clone(), grad, grad, 0, state).mul_(group["scale"]) if residual else None
        small, shape = projection.down(grad, state), tuple(p.shape)
        step, correction = _adam(*updated_moments(state, small, group["betas"]), age, group)
        update = projection.up(step, state, shape)
        if group["released"]:
            update = update.mul(group["scale"])
        if residual is not None:
            back = projection.up(small, state, shape)
            rest = torch.sub(grad, back, alpha=group["scale"] if group["released"] else 1)
            axis = projection.kept_axis(shape)
            update = update + residual.update(rest, small, step, 0 if axis is None else axis, state)
        return update * (correction if group["released"] else group["scale"])

    def _choose(self, group: dict[str, Any], p: Tensor, grad: Tensor, done: int) -> bool:
        """Choose the subspace of the coming steps, which needs evidence; whether there is one now."""
        state, (projection, _) = self.state[p], _parts(group)
        position, period = self._positions()[id(p)], done // group["every"]
        if not projection.holds(position, len(self._positions()), period, group["seed"]):
            drop_moments(state)
            return True
        if projection.reads_gradient and not p.is_meta:
            if not bool(grad.any()):
                return done > 0
            if not bool(grad.isfinite().all()):
                raise ValueError(
                    f"The gradient of a parameter of shape {tuple(p.shape)} is not finite at its step {done}, where "
                    "ProjectedAdamW chooses its subspace by it. Lower the learning rate, or look for the batch."
                )
        seed = stream_seed(group["seed"], "subspace", position, period)
        for name, tensor in projection.choose(grad, seed).items():
            tensor = tensor.to(p.dtype) if tensor.is_floating_point() else tensor
            state[name] = _as_on_rank_zero(tensor)
        if "exp_avg" not in state or group["reset_moments"]:
            start_moments(state, projection.reduced(tuple(p.shape)), grad, group["bits"])
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; raises `ValueError` where its subspaces are other ones than the groups', as `AgedAdamW`
        where shapes are."""
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            other = [name for name in _OWN if name in saved and saved[name] != own[name]]
            if other:
                raise ValueError(
                    f"The file was saved with {other[0]}={saved[other[0]]!r}, and this optimizer has "
                    f"{own[other[0]]!r}. Build it as when it was saved, or start without the file's state."
                )
        super().load_state_dict(state_dict)

    def _restored(self, group: dict[str, Any], p: Tensor, name: str, value: Tensor) -> Tensor:
        if name == "step" or not self.projects(p):
            return super()._restored(group, p, name, value)
        projection, shape = _parts(group)[0], tuple(p.shape)
        if name in _MOMENTS and tuple(value.shape) != projection.reduced(shape):
            raise ValueError(
                f"Loaded state '{name}' has shape {tuple(value.shape)}, and {projection} of {shape} has "
                f"{projection.reduced(shape)}. Build the model and the optimizer as when it was saved."
            )
        if value.dtype in (torch.uint8, torch.int32) or name.endswith("_scale"):
            return value.to(device=p.device, copy=True)
        dtype = p.dtype if name in ("left", "right") else state_dtype(p)
        return value.to(device=p.device, dtype=dtype, copy=True)


def _apply(group: dict[str, Any], w: Tensor, update: Tensor | None) -> None:
    """Decay and update, in the order of the group's arithmetic; decay alone where there is no update."""
    lr, decay = float(group["lr"]), group["weight_decay"]
    if decay and not group["released"]:
        w.mul_(1 - lr * decay)
    if update is not None:
        w.sub_(update, alpha=lr)
    if decay and group["released"]:
        w.mul_(1 - lr * decay)


def _adam(m: Tensor, v: Tensor, age: float, group: dict[str, Any]) -> tuple[Tensor, float]:
    """Adam's step of these moments, and the factor that corrects it, 1 where it is in the step."""
    first, second = 1 - group["betas"][0] ** age, (1 - group["betas"][1] ** age) ** 0.5
    if group["released"]:
        return m / v.sqrt().add_(group["eps"]), second / first
    return m.div(first).div_((v.sqrt() / second).add_(group["eps"])), 1.0


def _as_on_rank_zero(tensor: Tensor) -> Tensor:
    """Gradients are equal on all ranks, their factorisations need not be to the last bit."""
    if several_ranks() and not tensor.is_meta:
        tensor = tensor.contiguous()
        torch.distributed.broadcast(tensor, 0)
    return tensor


def _plain(base: type, value: Any) -> dict[str, Any] | None:
    """A part as a file has it.

    Raises:
        ValueError: neither such a part nor the dict or name of one.
    """
    if value is None:
        return None
    found = load_part(base, value, f"ProjectedAdamW({base.part_kind})")
    if isinstance(found, UnknownPart):
        raise ValueError(f"ProjectedAdamW({base.part_kind}={found.data}) cannot run here: {found.reason}.")
    return found.to_dict()


def _parts(group: dict[str, Any]) -> tuple[Projection | None, Residual | None]:
    return tuple(
        None if group[name] is None else _loaded(base, FrozenDict(group[name]))
        for name, base in (("projection", Projection), ("residual", Residual))
    )


@cache
def _loaded(base: type, data: FrozenDict) -> Any:
    return load_part(base, data, base.part_kind)


def _check_options(group: dict[str, Any]) -> None:
    projection, residual = _parts(group)
    for name, accepted, right in (
        ("every", "an integer >= 1", type(group["every"]) is int and group["every"] >= 1),
        ("scale", "a number > 0", group["scale"] > 0),
        ("bits", "8 or 32", group["bits"] in (8, 32)),
    ):
        if not right:
            raise ValueError(f"{name}={group[name]!r} is out of range: ProjectedAdamW takes {accepted}.")
    if residual is not None and projection is None:
        raise ValueError(f"residual={residual} is of what a projection leaves out: give one, or leave it out too.")
    if residual is not None and residual.needs_axis and projection.kept_axis((1, 1)) is None:
        raise ValueError(
            f"residual={residual} scales rows or columns, of which {projection} keeps none. Take a projection of one "
            "side, SVDProjection(side='std')."
        )
