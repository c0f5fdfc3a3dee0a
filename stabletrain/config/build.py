"""Turning config nodes into callbacks, here and in other people's Hydra apps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from stabletrain.config.discovery import content, groups
from stabletrain.config.trust import instantiate
from stabletrain.errors import UserError
from stabletrain.paths import data_dir

if TYPE_CHECKING:
    from lightning.pytorch import Callback


def callbacks(node: object, *, trust: Iterable[str] = ()) -> list[Callback]:
    """Turn a ``plugins`` node into callbacks for ``Trainer(callbacks=...)``.

    Slots without an answer (``none``, null) are left out; the order of the node is kept.

    Args:
        node: an OmegaConf or plain mapping: slot -> ``{_target_: ..., arguments}`` or nothing.
        trust: packages of your own that ``_target_`` may name, besides stabletrain, its plugins, torch and lightning.

    Raises:
        UserError: if the node is no mapping, or a slot has arguments but no ``_target_``.
        TrustError: if a ``_target_`` may not be built from a config.

    >>> callbacks({"clip": None, "spike": {}})
    []
    """
    plain = _plain(node)
    if plain is None:
        return []
    if not isinstance(plain, Mapping):
        raise UserError(f"plugins: expected a mapping of slots, got {type(plain).__name__}; pass cfg.plugins")
    return [build_callback(given, key=f"plugins.{slot}", trust=trust) for slot, given in plain.items() if given]


def default_callbacks() -> list[Callback]:
    """Return the stack of conf/train.yaml: learning-rate schedule, clipping, skipping of bad steps, gradient monitor.

    Hydra is not needed: the defaults are single files without interpolation.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=default_callbacks(), logger=False, enable_checkpointing=False, accelerator="cpu")
    """
    import yaml

    options = groups()
    train = yaml.safe_load((data_dir("conf") / "train.yaml").read_text(encoding="utf-8"))
    chosen = {group: name for entry in train["defaults"] if isinstance(entry, dict) for group, name in entry.items()}
    found = []
    for group, name in chosen.items():
        if group == "schedule" or group.startswith("plugins/"):
            node = content(options[group][name])
            if node:
                found.append(build_callback(node, key=group.replace("/", ".")))
    return found


def build_callback(node: Mapping[str, Any], *, key: str, trust: Iterable[str] = ()) -> Callback:
    """Build one Lightning callback from its node.

    Args:
        node: a plain mapping with ``_target_``.
        key: the node's config key, for messages.
        trust: further packages that ``_target_`` may name.

    Raises:
        UserError: if nothing is chosen, or what was built is no callback.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        slot = key.replace(".", "/", 1)
        raise UserError(f"{key}: expected _target_ and its arguments, got {node!r}; choose an option: {slot}=OPTION")
    built = instantiate(node, trust=trust, key=key)
    from lightning.pytorch import Callback

    if not isinstance(built, Callback):
        raise UserError(f"{key}: {node['_target_']!r} made a {type(built).__name__}, expected a Lightning callback")
    return built


def _plain(node: object) -> object:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
