"""Turning config nodes into callbacks, here and in other people's Hydra apps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from stabletrain.config.discovery import content, groups
from stabletrain.config.problems import suggestion
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


def default_callbacks(**choices: str) -> list[Callback]:
    """Return the stack of conf/train.yaml: schedule, clipping, skipping of bad steps, rollback, gradient monitor.

    Hydra is not needed: the defaults are single files without interpolation.

    Args:
        choices: another option for a slot, or for the schedule, as on the command line: ``spike="none"`` is
            ``plugins/spike=none`` there.

    Raises:
        UserError: if there is no such slot or option.

    >>> from lightning.pytorch import Trainer
    >>> stack = default_callbacks(clip="norm", resume="exactly")
    >>> trainer = Trainer(callbacks=stack, logger=False, enable_checkpointing=False, accelerator="cpu")
    """
    import yaml

    options = groups()
    train = yaml.safe_load((data_dir("conf") / "train.yaml").read_text(encoding="utf-8"))
    chosen = {group: name for entry in train["defaults"] if isinstance(entry, dict) for group, name in entry.items()}
    slots = {group.removeprefix("plugins/"): group for group in chosen if group.startswith(("plugins/", "schedule"))}
    for slot, name in choices.items():
        if slot not in slots:
            raise UserError(f"default_callbacks: there is no slot {slot!r}{suggestion(slot, slots)}")
        if name not in options[slots[slot]]:
            known = suggestion(str(name), options[slots[slot]])
            raise UserError(f"default_callbacks: {slot} has no option {name!r}{known}")
        chosen[slots[slot]] = name
    nodes = {group: content(options[group][chosen[group]]) for group in slots.values()}
    return [build_callback(node, key=group.replace("/", ".")) for group, node in nodes.items() if node]


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
