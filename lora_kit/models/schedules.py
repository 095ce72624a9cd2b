"""Facts of noise schedules that need neither torch nor diffusers."""

from __future__ import annotations

from typing import Any

ZERO_TERMINAL_SNR: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""What a sampler's config has for a network trained with zero terminal SNR: the rescaled schedule (Lin et al. 2023,
section 3.1), and steps that begin at its last timestep (section 3.3)."""
