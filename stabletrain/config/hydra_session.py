"""Hydra, initialised for one recipe, with files read by stabletrain's own reader."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from hydra import initialize_config_dir
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from stabletrain.config import discovery
from stabletrain.config.problems import ConfigError, Problem
from stabletrain.config.recipe_file import Selections, check_content, check_header, selected
from stabletrain.config.yaml_file import parse_yaml, read_text
from stabletrain.paths import data_dir

RECIPE = "_recipe_"
"""The name of the recipe in Hydra, whatever its file is called: ``train.yaml`` would hide stabletrain's own."""
BASE = "train"
"""The config that every recipe starts from; it is always stabletrain's own."""


@contextmanager
def hydra_session(recipe: Path) -> Iterator[Any]:
    """Initialise Hydra for one recipe, and clear its global state on exit; yields Hydra's config loader.

    Args:
        recipe: its file.
    """
    Plugins.instance()  # registers Hydra's own sources, of which one is replaced here
    types = SourcesRegistry.instance().types
    before = types["file"]
    members = {"recipe": recipe, "selections": Selections(RECIPE), "installed": _installed()}
    types["file"] = type("Folder", (_Folder,), members)
    try:
        with initialize_config_dir(str(recipe.parent), job_name="stabletrain", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    finally:
        types["file"] = before


def is_installed(file: Path) -> bool:
    """Return whether a config file belongs to stabletrain or to an installed plugin.

    Args:
        file: a YAML file.
    """
    return any(Path(folder) in file.resolve().parents for folder in _installed())


def _installed() -> frozenset[str]:
    folders = [data_dir("conf"), data_dir("recipes"), *discovery.plugin_conf_dirs()]
    return frozenset(map(os.path.realpath, folders))


class _Folder(FileConfigSource):
    """A config folder: the recipe's own, stabletrain's or that of a plugin."""

    recipe: ClassVar[Path]
    selections: ClassVar[Selections]
    installed: ClassVar[frozenset[str]]

    def load_config(self, config_path: str) -> ConfigResult:
        """Read and check a file.

        Args:
            config_path: ``group/option``.

        Raises:
            ConfigError: if it cannot be read, or contains what a config file must not.
        """
        file = self._file(config_path)
        folder = os.path.realpath(self.path)
        name = config_path.removesuffix(".yaml")
        if name != RECIPE and not os.path.realpath(file).startswith(folder.rstrip(os.sep) + os.sep):
            raise ConfigError([Problem(str(file), f"expected a file in the config folder {self.path}; copy it there")])
        text = read_text(file)
        content = parse_yaml(text, file)
        if folder not in self.installed:
            check_header(text, file)
            check_content(content, file)
        self.selections.add(name, selected(content, name.rpartition("/")[0], file), file)
        return ConfigResult(
            config=OmegaConf.create(content),
            path=f"{self.scheme()}://{self.path}",
            provider=self.provider,
            header=ConfigSource._get_header_dict(text[:512]),
        )

    def is_config(self, config_path: str) -> bool:
        """Whether the folder has a file; Hydra's own configs and the base of all recipes come from their packages."""
        name = config_path.removesuffix(".yaml")
        if name == RECIPE:
            return self.provider == "main"
        if name.startswith("hydra/") or (name == BASE and os.path.realpath(self.path) not in self.installed):
            return False
        return os.path.exists(self._file(config_path))  # also a named pipe, so that the message says that it is one

    def _file(self, config_path: str) -> Path:
        if config_path.removesuffix(".yaml") == RECIPE:
            return self.recipe
        return Path(self.path, self._normalize_file_name(config_path))
