"""Which steps may reach the weights: decided on the device, from the loss and the gradient's norm."""

import torch
from torch import Tensor


class StepGuard:
    """Judges steps by a rolling window of the last `window` accepted ones.

    A step is skipped if its loss or gradient norm is not finite, or, with `sigma`, lies more than that many standard
    deviations above the window's mean, once the window is half full (OLMo-core's skip_step_optimizer). Skipped steps
    do not enter the window, so an outlier cannot make the next one look ordinary.
    """

    def __init__(self, sigma: float | None, window: int, device: torch.device | str):
        self._sigma = sigma
        self._enough = max(2, window // 2)
        self._values = torch.zeros(window, 2, device=device)
        self._accepted = torch.zeros((), dtype=torch.int64, device=device)
        self._places = torch.arange(window, device=device)

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 if this step is to be skipped, else 0.0: 0-d float32 on the device, without waiting for it.

        loss and grad_norm: 0-d on the device and equal on every rank, so that the answer is too.
        """
        latest = torch.stack((loss, grad_norm)).to(self._values.dtype)
        skip = ~latest.isfinite().all()
        if self._sigma is not None:
            skip = skip | (latest > self._limits()).any()
        self._remember(latest, skip)
        return skip.float()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs to go on alike; the tensors themselves."""
        return {"values": self._values, "accepted": self._accepted}

    def _limits(self) -> Tensor:
        """Largest loss and gradient norm that pass, [2] in float64; infinite while the window is too empty."""
        filled = (self._places < self._accepted).unsqueeze(1)
        number = filled.sum()
        values = self._values.double()
        mean = values.sum(0) / number
        variance = ((values - mean).square() * filled).sum(0) / (number - 1)
        return torch.where(number >= self._enough, mean + self._sigma * variance.sqrt(), torch.inf)

    def _remember(self, latest: Tensor, skip: Tensor) -> None:
        place = (self._places == self._accepted % len(self._places)) & ~skip
        torch.where(place.unsqueeze(1), latest, self._values, out=self._values)
        self._accepted += ~skip
