"""Networks of switches: how many endpoints they have, and which nodes are near each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """Equal fat trees side by side, without oversubscription, of switches with so many ports.

    A network card is an endpoint of one tree. With `planes` above 1 each plane is a tree of its
    own, between which only GPUs of a node forward (arXiv 2505.09343, section 5.1). For k ports and
    t tiers a plane has 2 (k/2)^t endpoints, (2t - 1) (k/2)^(t-1) switches, and 2 (k/2)^t links from
    each tier to the next one.

    Attributes:
        tiers: layers of switches, from 1 up.
        ports: of each switch, even.
        planes: from 1 up; the cards of a node are shared out evenly.
        rails: the cards that a node has on a plane go to different leaf switches, those of one
            index to the same one; False: they go to the same leaf.

    Raises:
        ValueError: a number that no such network has.
    """

    tiers: int
    ports: int
    planes: int = 1
    rails: bool = False

    def __post_init__(self) -> None:
        if self.tiers < 1 or self.planes < 1:
            raise ValueError(
                f"a network has 1 or more tiers and planes, got {self.tiers} and {self.planes}"
            )
        if self.ports < 2 or self.ports % 2:
            raise ValueError(
                f"a switch of a fat tree has an even number of ports, half of them upward, got "
                f"{self.ports}"
            )

    @property
    def endpoints(self) -> int:
        """Network cards that can be joined, on all planes."""
        return self.planes * self._of_a_tier

    @property
    def switches(self) -> int:
        """On all planes: the upmost tier has half as many as each other one."""
        return self.planes * (2 * self.tiers - 1) * (self.ports // 2) ** (self.tiers - 1)

    @property
    def links(self) -> int:
        """Between switches, on all planes; those to network cards are not among them."""
        return self.planes * (self.tiers - 1) * self._of_a_tier

    @property
    def _of_a_tier(self) -> int:
        return 2 * (self.ports // 2) ** self.tiers

    def nodes(self, nics_per_node: int) -> int:
        """How many nodes the network holds; `nics_per_node` is a multiple of `planes`."""
        return self._of_a_tier // (nics_per_node // self.planes)

    def nodes_per_leaf(self, nics_per_node: int) -> int:
        """How many nodes reach each other, card to card of one index, through one switch."""
        # A single tier has no ports upward.
        downward = self.ports if self.tiers == 1 else self.ports // 2
        if self.rails:
            return min(downward, self.nodes(nics_per_node))
        return downward // (nics_per_node // self.planes)
