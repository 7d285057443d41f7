"""Before the money is spent: how long a training run takes, on what, with how much energy, and at what price."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from gale.core.errors import GaleError
from gale.train.hardware import GIB, Device
from gale.train.layout import SHARDINGS, Layout, lay_out, least_devices, usable_memory
from gale.train.plan_model import CHINCHILLA_TOKENS_PER_PARAMETER, PlannedModel


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked, what it comes to, and in ``reasons`` why, by the name of the figure.

    ``flops`` are the model's, without recomputation. ``layout`` is None where the model does not fit; the figures
    are then those of ``devices`` devices that had the memory.
    """

    model: PlannedModel
    device: Device
    devices: int
    tokens: float
    sequence: int
    batch_tokens: float
    flops: float
    device_hours: float
    days: float
    energy_kwh: float
    electricity_cost: float
    rent: float | None
    layout: Layout | None
    devices_needed: int | None
    reasons: dict[str, str]

    def as_data(self) -> dict[str, Any]:
        """The plan as plain data, for programs."""
        content = asdict(self)
        if self.layout:
            content["layout"]["memory"]["total"] = self.layout.memory.total
            content["layout"]["sharding"] = SHARDINGS[self.layout.sharding]
        return content


def optimal_batch_tokens(flops: float) -> float:
    """Tokens of a step for a run of so many FLOPs (DeepSeek-AI 2024, fitted from 1e17 to 2e19)."""
    return float(0.2920 * flops**0.3271)


def plan(
    model: PlannedModel,
    device: Device,
    devices: int,
    *,
    tokens: float | None = None,
    sequence: int = 2048,
    batch_tokens: float | None = None,
    utilisation: float | None = None,
    achieved_flops: float | None = None,
    recompute: bool | None = None,
    pue: float = 1.2,
    electricity_price: float = 0.12,
    price: float | None = None,
) -> Plan:
    """Plan a run. ``utilisation`` is the share of the peak in model FLOPs; ``achieved_flops`` instead are all FLOP/s
    that a device does, recomputation included, as older papers give them; ``recompute`` forces what else the layout
    decides. Prices are in one currency, an hour of a device and a kWh. Raises :class:`GaleError` for what is no plan.
    """
    checked = {"devices": devices, "sequence": sequence, "tokens": tokens, "batch tokens": batch_tokens, "PUE": pue}
    checked |= {"utilisation": utilisation, "achieved FLOP/s": achieved_flops}
    if wrong := [name for name, value in checked.items() if value is not None and not value > 0]:
        raise GaleError(f"These must be greater than zero: {', '.join(wrong)}.")
    if utilisation is not None and utilisation > 1:
        raise GaleError(f"A utilisation of {utilisation:g} is more than the device can do.", hint="Give 0.4 for 40%.")
    reasons: dict[str, str] = {}
    if tokens is None:
        tokens = CHINCHILLA_TOKENS_PER_PARAMETER * model.active
        reasons["tokens"] = "20 a parameter that works on a token: the most for the compute (Hoffmann et al. 2022)"
    else:
        reasons["tokens"] = "as given"
    flops = model.flops_per_token(sequence) * tokens
    reasons["flops"] = "6 x active parameters x tokens, and attention (Kaplan et al. 2020); no recomputation"
    if batch_tokens is None:
        batch_tokens = min(optimal_batch_tokens(flops), tokens)
        reasons["batch"] = "0.292 x FLOPs^0.3271 (DeepSeek-AI 2024)"
    else:
        reasons["batch"] = "as given"
    batch_sequences = max(1, round(batch_tokens / sequence))
    if utilisation is not None:
        device = replace(device, utilisation=utilisation, utilisation_reason="as given")
    layout = lay_out(model, device, devices, sequence=sequence, batch_sequences=batch_sequences)
    needed = None
    if layout is None:
        needed = least_devices(model, device, sequence=sequence, batch_sequences=batch_sequences)
    again = recompute if recompute is not None else bool(layout and layout.recompute)
    work = flops * (4 / 3 if again else 1)
    if achieved_flops:
        rate = achieved_flops
        reasons["rate"] = f"{rate / 1e12:.3g} TFLOP/s a device, recomputation included, as given"
    else:
        rate = device.flops * device.utilisation
        reasons["rate"] = (
            f"{device.utilisation:.0%} of {device.flops / 1e12:.4g} TFLOP/s: {device.utilisation_reason}"
            + ("; a third more work, since activations are computed again" if again else "")
        )
    device_hours = work / rate / 3600
    energy = device_hours * device.watts / 1000 * pue
    reasons["energy"] = f"{device.watts:.0f} W a device, PUE {pue:g}; hosts and network are not counted"
    given, price = price, device.price if price is None else price
    if price is None:
        reasons["rent"] = "no price is known for this device; give --price"
    else:
        reasons["rent"] = f"{price:g} a device-hour" + (
            "" if given is not None else ", in dollars, about: give --price"
        )
    reasons["electricity"] = f"{electricity_price:g} a kWh"
    reasons["layout"] = _why(model, device, devices, layout, needed)
    return Plan(
        model=model,
        device=device,
        devices=devices,
        tokens=tokens,
        sequence=sequence,
        batch_tokens=float(batch_sequences * sequence),
        flops=flops,
        device_hours=device_hours,
        days=device_hours / devices / 24,
        energy_kwh=energy,
        electricity_cost=energy * electricity_price,
        rent=None if price is None else device_hours * price,
        layout=layout,
        devices_needed=needed,
        reasons=reasons,
    )


def _why(model: PlannedModel, device: Device, devices: int, layout: Layout | None, needed: int | None) -> str:
    room = usable_memory(device) / GIB
    if layout is None:
        state = 18 * model.parameters / GIB
        able = f"{needed:,} would do" if needed else "nor on any number up to 65,536"
        return f"does not fit: the state alone is {state:,.0f} GiB, a device has {room:.0f} to fill; {able}"
    parts = [f"{layout.memory.total / GIB:.1f} of {room:.0f} GiB"]
    if layout.tensor > 1:
        parts.append(f"tensor parallel over {layout.tensor} within a node, whose links are fast")
    if layout.pipeline > 1:
        parts.append(f"a pipeline of {layout.pipeline} stages, which talk least")
    if layout.sharding:
        parts.append(f"sharded over the {layout.data} copies, since whole ones do not fit or step slower")
    if layout.recompute:
        parts.append("activations computed again, since they do not fit")
    if devices == 1:
        parts.append("one device")
    elif len(parts) == 1:
        parts.append("every device holds the whole model and its share of the batch")
    return "; ".join(parts)
