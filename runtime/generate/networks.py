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
    """The loaded networks of a model folder. `matmul`: how packed weights are multiplied; `products`: the choice for
    each of their forms. `observe` is called with a component's name and network before each use; it gets a new network
    every time. `built`: networks that are built and not loaded yet."""

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
        """A component's network, or the one that `make` makes of the folder."""
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
        """Free all others."""
        self._loaded = {name: network for name, network in self._loaded.items() if name in components}
