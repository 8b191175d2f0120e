"""Updates whose gradient is not finite: decided on the gradient norm, before weights or moments change.

The norm is taken over the gradients that all ranks share (DDP has summed them, ZeRO asks all ranks), so every rank
decides alike. Where the optimizer has a kernel that can leave itself out (`found_inf`), the device decides and the
host learns of it only when it asks; elsewhere the host reads one number per update. Nothing of an update that is left
out remains: no weight, no moment, no step count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class UpdateGuard:
    """Keeps, per update since the last `read`, whether it was left out.

    Attributes:
        grad_norm: norm before clipping of the newest update, a float32 scalar on the device or a float; None before.
        in_a_row: how many updates in a row had been left out when `read` was last called.
        total: how many in all, then.
    """

    def __init__(self) -> None:
        self.grad_norm: torch.Tensor | float | None = None
        self.in_a_row = self.total = 0
        self._flags: list[torch.Tensor | bool] = []

    def add(self, left_out: torch.Tensor | bool, grad_norm: torch.Tensor | float | None) -> None:
        """Note one update; `left_out` may be a scalar on the device, which is not waited for."""
        self.grad_norm = grad_norm
        self._flags.append(left_out)

    def read(self) -> list[bool]:
        """One flag per update since the last call, oldest first; waits for the device where flags are there."""
        on_device = [flag for flag in self._flags if torch.is_tensor(flag)]
        values = iter(torch.stack(on_device).tolist() if on_device else ())
        flags = [bool(next(values)) if torch.is_tensor(flag) else flag for flag in self._flags]
        self._flags.clear()
        for left_out in flags:
            self.in_a_row = self.in_a_row + 1 if left_out else 0
            self.total += left_out
        return flags


def gradient_norm(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """The global 2-norm of the gradients, which are clipped to `max_norm` in place; 0 does not clip."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))


def step_if_finite(
    optimizer: torch.optim.Optimizer, base: torch.optim.Optimizer, norm: torch.Tensor
) -> torch.Tensor | bool:
    """Step unless `norm` is not finite; returns whether the step was left out, a scalar on the device or a bool.

    Args:
        optimizer: what is stepped, accelerate's wrapper or the optimizer itself.
        base: the torch optimizer below the wrappers.
    """
    bad = ~torch.isfinite(norm)
    if decides_on_device(base):
        base.found_inf = bad.to(torch.float32)
        try:
            optimizer.step()
        finally:
            del base.found_inf
        return bad
    if bad.item():
        return True
    optimizer.step()
    return False


def decides_on_device(base: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's kernel leaves itself out where `found_inf` is 1, as torch's fused Adam and AdamW do.

    `found_inf` is how torch's own GradScaler tells them (torch.amp.grad_scaler, torch 2.1 to 2.13); such optimizers
    say so by `_step_supports_amp_scaling`.
    """
    fused = all(group.get("fused") for group in base.param_groups)
    return bool(fused and getattr(base, "_step_supports_amp_scaling", False))
