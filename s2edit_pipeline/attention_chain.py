"""Several of what changes or records attention, one after the other at the seam (``attention_seam``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .attention_seam import AttentionAccess, AttentionController, AttentionSite, Cuts


class Controllers(AttentionController):
    """Several controllers, one after the other; at most one of them cuts."""

    def __init__(self, controllers: Sequence[AttentionController]) -> None:
        self.controllers = tuple(controllers)

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        return max((c.access_needed(site) for c in self.controllers), default=AttentionAccess.NONE)

    def exchange(
        self, query: torch.Tensor, key: torch.Tensor, site: AttentionSite
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for controller in self.controllers:
            if controller.access_needed(site):
                query, key = controller.exchange(query, key, site)
        return query, key

    def weigh(self, value: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        for controller in self.controllers:
            if controller.access_needed(site):
                value = controller.weigh(value, site)
        return value

    def cuts(self, site: AttentionSite, keys: int, device: torch.device) -> Cuts | None:
        each = [c.cuts(site, keys, device) for c in self.controllers if c.access_needed(site)]
        cuts = [one for one in each if one is not None]
        assert len(cuts) <= 1
        return cuts[0] if cuts else None

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        for controller in self.controllers:
            if controller.access_needed(site):
                probs = controller(probs, site)
        return probs
