"""Build callbacks from config nodes, in stabletrain's own runs and in other Hydra apps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from stabletrain import settings
from stabletrain.config import construct
from stabletrain.config.discovery import content, default_options, groups
from stabletrain.config.outputs import Outputs, check_outputs
from stabletrain.config.problems import suggestion
from stabletrain.config.slot_choice import check_choice, is_slot
from stabletrain.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Callback


def callbacks(node: object, *, trust: Iterable[str] = (), paths_outside: bool = False) -> list[Any]:
    """Build the callbacks of a ``plugins`` node for ``Trainer(callbacks=...)``, in the node's order.

    The list may be passed to the Trainers of ``lightning.pytorch`` and ``pytorch_lightning``, which name different
    types of callbacks.

    Args:
        node: an OmegaConf or plain mapping of slots to ``{_target_: ..., arguments}``; slots that are null or empty
            (option ``none``) are skipped.
        trust: packages of your own that ``_target_`` may name, besides stabletrain, its plugins, torch and lightning.
        paths_outside: whether paths in the node may be absolute or lead out of the current folder with ``..``, as in a
            config that you have written yourself.

    Raises:
        UserError: if the node is no mapping, a slot has arguments but no ``_target_``, or a path may not be used.
        TrustError: if a ``_target_`` may not be built from a config.

    >>> callbacks({"clip": None, "spike": {}})
    []
    """
    plain = _to_plain(node)
    if plain is None:
        return []
    if not isinstance(plain, Mapping):
        raise UserError(f"plugins: expected a mapping of slots, got a {type(plain).__name__}; pass cfg.plugins")
    nodes = {f"plugins.{slot}": value for slot, value in plain.items() if value}
    for key, value in nodes.items():  # all are checked before the first is built
        construct.raise_first(construct.parse(_with_target(value, key), key, trust)[1])
    if not paths_outside:
        advice = "which needs stabletrain.callbacks(..., paths_outside=True); add it if you trust the config"
        for problem in check_outputs({"plugins": plain}, (), advice):
            raise UserError(str(problem).replace("the run's folder", "the current folder"))
    return [build_callback(value, key=key, trust=trust) for key, value in nodes.items()]


def default_callbacks(**choices: str | Callback | None) -> list[Any]:
    """Return the callbacks of conf/train.yaml: clipping, skipping of bad steps, rollback, gradient monitor.

    The options are read from their files without Hydra.

    Args:
        choices: for a slot, or ``schedule`` (by default there is none), what to use instead: the name of an option, as
            in ``plugins/spike=detect`` on the command line; a callback, such as ``ClipNorm(0.5)``; None: nothing, as
            ``"none"``.

    Raises:
        UserError: if there is no such slot or option, or a callback belongs to another slot.

    >>> from lightning.pytorch import Trainer
    >>> from stabletrain import ClipNorm
    >>> stack = default_callbacks(clip=ClipNorm(0.5), spike=None, resume="exactly")
    >>> trainer = Trainer(callbacks=stack, logger=False, enable_checkpointing=False, accelerator="cpu")
    """
    options = groups()
    chosen = default_options()
    slots = {group.removeprefix("plugins/"): group for group in (*chosen, *options) if is_slot(group)}
    for slot, choice in choices.items():
        if slot not in slots:
            raise UserError(f"default_callbacks: there is no slot {slot!r}{suggestion(slot, slots)}")
        check_choice(slot, choice, options)
    stack: list[Callback] = []
    for slot, group in slots.items():
        choice = choices.get(slot, chosen.get(group))
        if isinstance(choice, str):
            node = content(options[group][choice])
            choice = construct.instantiate(node, key=group.replace("/", ".")) if node else None
        if choice is None:
            continue
        if slot not in choices:
            vars(choice)["chosen_by_default"] = True
        stack.append(choice)
    return stack


def build_callback(
    node: Mapping[str, Any], *, key: str, trust: Iterable[str] = (), outputs: Outputs | None = None
) -> Callback:
    """Build one Lightning callback from its node.

    Args:
        node: a plain mapping with ``_target_``.
        key: the node's config key, for messages.
        trust: further packages that ``_target_`` may name.
        outputs: where relative paths of files to write are; None: in the current folder.

    Raises:
        UserError: if the node has no ``_target_``, or something in it may not be built; nothing has been built then.
    """
    with settings.by_config():
        built: Callback = construct.instantiate(_with_target(node, key), trust=trust, key=key, outputs=outputs)
    settings.mark(built)
    return built


def _with_target(node: object, key: str) -> Mapping[str, Any]:
    if not isinstance(node, Mapping) or "_target_" not in node:
        slot = key.replace(".", "/", 1)
        raise UserError(f"{key}: expected _target_ and its arguments, got {node!r}; select an option: {slot}=OPTION")
    return node


def _to_plain(node: object) -> object:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
