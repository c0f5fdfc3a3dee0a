"""Hydra discovers this plugin; it adds the config groups of installed stabletrain plugins to every Hydra app."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

from stabletrain.config import discovery


class StabletrainSearchPath(SearchPathPlugin):
    """Append every plugin's conf/ and the none option of every slot, and nothing else, to the search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folders after the app's own, so that the app's files take precedence.

        Args:
            search_path: Hydra's search path.
        """
        for folder in discovery.plugin_conf_dirs():
            search_path.append("stabletrain", discovery.searchpath(folder))
        for slot in discovery.slots():
            # not appended as a folder: conf/ would also add the groups model, trainer and others to the app
            ConfigStore.instance().store(group=f"plugins/{slot}", name="none", node={}, provider="stabletrain")
