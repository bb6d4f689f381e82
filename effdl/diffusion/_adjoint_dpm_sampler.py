"""adjoint-dpm: the probability-flow ODE of a diffusion model in the variables (y, rho), and a sampler on top of it.

    dx/dt = f(t) x + g(t)^2 / (2 sigma_t) eps(x, t, c)        y_t = (alpha_T / alpha_t) x_t
    dy/drho = eps((alpha_t / alpha_T) y, t(rho), c)           rho_t = alpha_T sigma_t / alpha_t - sigma_T

(AdjointDPM, eqs. 9-12.) ``rho`` runs from 0 at the noise down to about ``-sigma_T``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from effdl.core.errors import ConfigurationError, check, check_choice, check_integer, check_number
from effdl.core.noise import TableVP, VPSchedule, convert
from effdl.core.solvers import FIXED_GRID, odeint
from effdl.diffusion._adjoint_dpm_ode import adjoint_odeint, check_steps
from effdl.diffusion._denoiser import call_network
from effdl.diffusion._flow import Condition, wide

SKIPS = ("time_uniform", "logSNR", "time_quadratic")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def time_grid(
    schedule: VPSchedule, steps: int, skip_type: str = "time_uniform", t_start: float = 1.0, t_end: float = 1e-3
) -> Tensor:
    """Times ``[steps + 1]`` float64 from ``t_start`` (noise) to ``t_end``, both included.

    Args:
        schedule: of :mod:`effdl.core.noise`, T = 1.
        steps: N >= 1.
        skip_type: ``"time_uniform"``, ``"logSNR"`` (uniform in lambda) or ``"time_quadratic"`` (in sqrt t).
        t_start, t_end: 0 < t_end < t_start <= 1.

    Raises:
        ConfigurationError: a number out of range, an unknown name.

    Example::

        times = time_grid(LinearVP(), 30)
    """
    check_integer("steps", steps, 1)
    check_choice("skip_type", skip_type, SKIPS)
    check_number("t_start", t_start, 0, 1, closed="(]")
    check_number("t_end", t_end, 0, t_start, closed="()")
    ends = torch.tensor([t_start, t_end], dtype=torch.float64)
    if skip_type == "time_uniform":
        return torch.linspace(t_start, t_end, steps + 1, dtype=torch.float64)
    if skip_type == "time_quadratic":
        return torch.linspace(*ends.sqrt().tolist(), steps + 1, dtype=torch.float64).square()
    times = schedule.inverse(torch.linspace(*schedule.half_log_snr(ends).tolist(), steps + 1, dtype=torch.float64))
    times[0], times[-1] = t_start, t_end
    return times


def rho_grid(schedule: VPSchedule, times: Tensor) -> Tensor:
    """``rho = alpha_T e^(-lambda_t) - sigma_T`` of falling times ``[N + 1]`` (eq. 11), T being the first of them.

    Example::

        rho = rho_grid(LinearVP(), time_grid(LinearVP(), 30))        # 0 ... about -1
    """
    return _shifted(schedule, times) - schedule.sigma(times[0])


def _shifted(schedule: VPSchedule, times: Tensor) -> Tensor:
    """``rho + sigma_T = alpha_T e^(-lambda_t)``: the same ODE, and no cancellation next to the data in fp32."""
    return schedule.alpha(times[0]) * torch.exp(-schedule.half_log_snr(times))


def guided_noise(
    predict: Callable[[Tensor, Tensor, Any], Tensor], x: Tensor, t: Tensor, condition: Any, null: Any, scale: float
) -> Tensor:
    """``eps_u + w (eps_c - eps_u)``: one call on the doubled batch; one half alone where w is 0 or 1 (or no null)."""
    if null is None or scale == 1:
        return predict(x, t, condition)
    if scale == 0:
        return predict(x, t, null)
    both = tree_map(lambda *halves: torch.cat(halves), null, condition)
    free, bound = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    return free + scale * (bound - free)


class AdjointSampler(nn.Module):
    """Samples of a diffusion model as a function of noise, conditioning and weights, with gradients in constant memory.

    Forwards it is a deterministic sampler (with ``"euler"``: DDIM on the same times). Backwards it solves the adjoint
    ODE, which needs the activations of one network call, whatever the number of steps. All of x_T, the condition and
    the network's parameters that require grad get one; nothing else costs anything.

    The gradient is the continuous one: with few steps it differs from backpropagation through the same sampler (by
    several percent with Euler; in the closed form of a Gaussian midpoint is 10 % off at 40 steps, 0.3 % at 200, rk4
    1e-4 % at 40). :meth:`backprop` has the other one: checkpointing each of *its* steps takes a little more time
    than the adjoint and memory of the same kind, and is exact for the discrete sampler. The adjoint's own gains are
    ``state="recompute"`` (no stored states) and another number of steps backwards.

    Args:
        network: diffusers' ``UNet2DModel``, ``UNet2DConditionModel``, ``SD3Transformer2DModel`` or any
            ``network(x, label, condition)``; in eval mode (dropout would give wrong gradients). Of a plain callable
            the weights are not seen: name them in ``parameters``.
        schedule: a :class:`effdl.core.noise.VPSchedule`, or a diffusers scheduler with ``alphas_cumprod``, read by its
            ``prediction_type`` unless ``prediction`` is given. The network's label is the index in that table,
            fractional (``t T - 1``), and t in [0, 1] for a schedule in continuous time.
        steps: N, intervals of the forward grid.
        solver: ``"euler"``, ``"midpoint"``, ``"rk4"`` (1, 2, 4 calls a step) or ``"explicit_adams"`` (torchdiffeq's:
            its coefficients assume steps of one length). The official code: euler for Stable Diffusion,
            explicit_adams for ADM.
        backward_steps: ``None``: as forwards. A multiple or a divisor of ``steps``; with ``"recompute"`` any number.
        skip_type: ``"time_uniform"``, ``"logSNR"``, ``"time_quadratic"``.
        t_start: where the noise is, 0 < t_end < t_start <= 1; ``alpha(t_start)`` must not be 0 (zero terminal SNR).
        t_end: ``None``: 1/T of a table of T entries, else 1e-3.
        guidance_scale: w of ``eps_u + w (eps_c - eps_u)``, for calls with a ``null`` condition.
        prediction: ``"epsilon"``, ``"v_prediction"``, ``"sample"``: what the network says.
        state: ``"stored"`` or ``"recompute"``, see :func:`adjoint_odeint`.
        denoise_to_zero: one more step, from t_end to the predicted x_0, differentiated as usual.
        parameters: tensors that a ``network`` which is no Module closes over.

    Shapes: ``x_T [B, ...]`` -> ``x_0 [B, ...]``, in at least fp32 (errors in y grow by 1/alpha_T, about 150 for linear
    schedules). ``condition``: tensor ``[B, ...]``, a dict of such, or ``None``; ``null`` shaped alike.

    Raises:
        ConfigurationError: an argument out of range; a scheduler that thresholds x_0 (not smooth) or has no
            ``alphas_cumprod``; guidance without a ``null``.
        RuntimeError: in backward, see :func:`adjoint_odeint`.

    Example::

        sampler = AdjointSampler(unet.eval().requires_grad_(False), DDPMScheduler(), steps=30)
        x_T = torch.randn(4, 3, 32, 32, requires_grad=True)
        score(sampler(x_T)).backward()                          # x_T.grad
    """

    def __init__(
        self,
        network: nn.Module | Callable,
        schedule: Any,
        steps: int = 30,
        solver: str = "midpoint",
        backward_steps: int | None = None,
        skip_type: str = "time_uniform",
        t_start: float = 1.0,
        t_end: float | None = None,
        guidance_scale: float = 7.5,
        prediction: str | None = None,
        state: str = "stored",
        denoise_to_zero: bool = False,
        parameters: tuple[Tensor, ...] = (),
    ) -> None:
        super().__init__()
        self.schedule, said = as_schedule(schedule)
        self.prediction = said if prediction is None else prediction
        check_choice("prediction", self.prediction, PREDICTIONS)
        check_integer("steps", steps, 1)
        check_choice("solver", solver, FIXED_GRID)
        backward_steps = steps if backward_steps is None else backward_steps
        check_integer("backward_steps", backward_steps, 1)
        check_steps(steps, backward_steps, state)
        check_number("guidance_scale", guidance_scale, 0, float("inf"), closed="[)")
        check(isinstance(denoise_to_zero, bool), "denoise_to_zero", denoise_to_zero, "True or False")
        if t_end is None:
            t_end = 1 / len(self.schedule._log_alpha) if isinstance(self.schedule, TableVP) else 1e-3
        self.times = time_grid(self.schedule, steps, skip_type, t_start, t_end)
        back = time_grid(self.schedule, backward_steps, skip_type, t_start, t_end)
        self.alpha_T = float(self.schedule.alpha(self.times[0]))
        check(self.alpha_T > 1e-6, "t_start", t_start, f"a time with signal left: alpha is {self.alpha_T:.1g} there")
        self.grid, self.back = _shifted(self.schedule, self.times), _shifted(self.schedule, back)
        self.network, self.solver, self.state = network, solver, state
        self.guidance_scale, self.denoise_to_zero = guidance_scale, denoise_to_zero
        self.closed_over = tuple(parameters)

    def forward(self, x_T: Tensor, condition: Condition = None, null: Condition = None) -> Tensor:
        """Samples ``[B, ...]`` of noise ``[B, ...]``, differentiable by the adjoint."""
        tensors, rebuild = self._conditions(condition, null)
        trained = [p for p in self._weights() if p.requires_grad]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x_T, *tensors, *trained)):
            _warn_of_chance(self.network)
        y = adjoint_odeint(
            self._slope(rebuild), wide(x_T), self.grid, *tensors, method=self.solver, parameters=trained,
            back=self.back, state=self.state,
        )  # fmt: skip
        return self._finish(y, *rebuild(tensors))

    def backprop(self, x_T: Tensor, condition: Condition = None, null: Condition = None) -> Tensor:
        """The same samples with the activations of every step kept, for ordinary backpropagation."""
        tensors, rebuild = self._conditions(condition, null)
        slope = self._slope(rebuild)
        y = odeint(lambda s, y: slope(s, y, *tensors), wide(x_T), self.grid, self.solver)[-1]
        return self._finish(y, *rebuild(tensors))

    def noise_at(self, x: Tensor, t: Tensor, condition: Condition = None, null: Condition = None) -> Tensor:
        """eps of states ``[B, ...]`` at the time ``t`` (a scalar tensor), guided."""
        label = self.schedule.label(t) if isinstance(self.schedule, TableVP) else t
        label = label.to(x.dtype).expand(len(x))
        a, s = self.schedule.alpha(t).to(x.dtype), self.schedule.sigma(t).to(x.dtype)

        def predict(x: Tensor, label: Tensor, condition: Condition) -> Tensor:
            out = wide(call_network(self.network, x.clone(), label, condition))  # which may write into its input
            check(out.shape == x.shape, "network", tuple(out.shape), f"an output of its input's shape {tuple(x.shape)}")
            return convert(out, x, a, s, self.prediction, "epsilon")

        return guided_noise(predict, x, label, condition, null, self.guidance_scale)

    def _slope(self, rebuild: Callable) -> Callable[..., Tensor]:
        def slope(s: Tensor, y: Tensor, *tensors: Tensor) -> Tensor:
            half_log_snr = -torch.log(s.double() / self.alpha_T)
            alpha = torch.sigmoid(2 * half_log_snr).sqrt()
            x = (alpha / self.alpha_T).to(y.dtype) * y
            return self.noise_at(x, self.schedule.inverse(half_log_snr), *rebuild(tensors)).to(y.dtype)

        return slope

    def _finish(self, y: Tensor, condition: Condition, null: Condition) -> Tensor:
        t = self.times[-1].to(y.device)
        a, s = self.schedule.alpha(t).to(y.dtype), self.schedule.sigma(t).to(y.dtype)
        x = (a / self.alpha_T) * y
        if not self.denoise_to_zero:
            return x
        return convert(self.noise_at(x, t, condition, null), x, a, s, "epsilon", "sample")

    def _conditions(self, condition: Condition, null: Condition) -> tuple[list[Tensor], Callable]:
        """The tensors in both conditions, and what puts them together again."""
        if condition is not None and null is None and self.guidance_scale != 1:
            raise ConfigurationError(
                f"guidance_scale={self.guidance_scale!r} needs the empty condition: give null=..., or guidance_scale=1."
            )
        null = None if self.guidance_scale == 1 else null
        leaves, spec = tree_flatten((condition, null))
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def rebuild(tensors: Any) -> tuple[Condition, Condition]:
            full = list(leaves)
            for i, tensor in zip(where, tensors):
                full[i] = tensor
            return tree_unflatten(full, spec)

        return [leaves[i] for i in where], rebuild

    def _weights(self) -> list[Tensor]:
        inside = list(self.network.parameters()) if isinstance(self.network, nn.Module) else []
        return [*inside, *self.closed_over]


def as_schedule(schedule: Any) -> tuple[VPSchedule, str]:
    """A schedule and the prediction that goes with it, from a schedule or a diffusers scheduler."""
    if isinstance(schedule, VPSchedule):
        return schedule, "epsilon"
    named = "a VPSchedule, or a diffusers scheduler with alphas_cumprod"
    check(hasattr(schedule, "alphas_cumprod"), "schedule", type(schedule).__name__, named)
    config = getattr(schedule, "config", {})
    check(not config.get("thresholding", False), "schedule", "thresholding=True", "a scheduler without thresholding",
          "Clipped predictions make the ODE non-smooth: the adjoint would be wrong.")  # fmt: skip
    return TableVP(schedule.alphas_cumprod), config.get("prediction_type", "epsilon")


def _warn_of_chance(network: Any) -> None:
    for name, module in network.named_modules() if isinstance(network, nn.Module) else ():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if module.training and (dropout or isinstance(module, nn.modules.batchnorm._BatchNorm)):
            warnings.warn(f"{name} ({type(module).__name__}) is in training mode: the network of the backward pass is "
                          "another one than the forward pass's, and the gradient wrong. Call network.eval().",
                          stacklevel=3)  # fmt: skip
            return
