"""The networks of a run, each loaded once for all phases and clips that use it one after the other."""

from collections.abc import Callable, Container, Mapping
from typing import TypeVar

import mlx.nn as nn

from ltx2.runtime.layers.matmul import Choice
from ltx2.runtime.layers.packed import choose_products
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network

Network = TypeVar("Network", bound=nn.Module)
Observe = Callable[[str, nn.Module], None]


class Networks:
    """Those of a model folder that are loaded. `matmul`: how packed weights are multiplied; `products`: what that was
    for each form of them. `observe` is called with every network's component and the network before it is used; it
    gets a new one every time. `built`: networks that are built already, and not loaded."""

    def __init__(
        self, folder: ModelFolder, matmul: str, observe: Observe | None, built: Mapping[str, nn.Module]
    ) -> None:
        self.products: dict[str, Choice] = {}
        self._folder, self._matmul, self._observe, self._built = folder, matmul, observe, dict(built)
        self._loaded: dict[str, nn.Module] = {}

    @property
    def observed(self) -> bool:
        return self._observe is not None

    def load(
        self, component: str, expected: type[Network], make: Callable[[ModelFolder], Network] | None = None
    ) -> Network:
        """A network that was checked to be there, or what `make` makes of its files."""
        loaded = self._loaded.get(component)
        if isinstance(loaded, expected):
            return loaded
        if make:
            network = make(self._folder)
        else:
            network = load_network(self._folder, component, expected, self._built.pop(component, None))
        self.products.update(choose_products(network, self._matmul))
        if self._observe is not None:
            self._observe(component, network)
        else:
            self._loaded[component] = network
        return network

    def keep(self, components: Container[str]) -> None:
        """Let go of all others."""
        self._loaded = {name: network for name, network in self._loaded.items() if name in components}
