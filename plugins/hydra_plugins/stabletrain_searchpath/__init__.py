"""Hydra finds this by itself: every Hydra app sees the config groups of the installed stabletrain plugins."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

from stabletrain.config import discovery


class StabletrainSearchPath(SearchPathPlugin):
    """Append every plugin's conf/ and the none option of every slot, and nothing else, to the search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append our folders behind the app's own, so that the app's files win.

        Args:
            search_path: Hydra's search path.
        """
        for folder in discovery.plugin_conf_dirs():
            search_path.append("stabletrain", folder.as_uri())
        for slot in discovery.slots():
            # Stored, not appended as a folder: our conf/ would bring model, trainer and more into the app.
            ConfigStore.instance().store(group=f"plugins/{slot}", name="none", node={}, provider="stabletrain")
