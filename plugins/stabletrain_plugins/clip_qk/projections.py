"""The query and key projections of a module: which rows of which parameters belong to which head."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from torch import Tensor, nn

from stabletrain.core.layer_names import plain_name
from stabletrain.errors import UserError


class Rows(NamedTuple):
    """The rows of one parameter that belong to queries or keys, the heads one after the other.

    Args:
        parameter: a weight (rows, inputs) or a bias (rows,).
        first: the first of these rows.
        heads: number of heads.
        of_queries: whether they are of the queries; else of the keys.
    """

    parameter: Tensor
    first: int
    heads: int
    of_queries: bool


@dataclass(frozen=True)
class Projection:
    """The projections of one attention.

    Args:
        name: of the projection, or of both.
        home: name of the module whose forward pass is the attention.
        heads: of the queries.
        kv_heads: of the keys; divides ``heads``.
        width: rows of a head.
        rows: of all parameters.
        modules: what computes queries and keys, the same module twice if it computes both; None: unknown modules,
            because nn.MultiheadAttention computes them itself.
    """

    name: str
    home: str
    heads: int
    kv_heads: int
    width: int
    rows: tuple[Rows, ...]
    modules: tuple[nn.Module, nn.Module] | None


@dataclass(frozen=True)
class Patterns:
    """What the user has given; see `ClipQK`.

    Args:
        qkv: names of fused projections.
        query: names of query projections.
        key: names of key projections.
        heads: of the queries.
        kv_heads: of the keys.
        setting: the config key of an argument, or the argument of a script.
    """

    qkv: str | None
    query: str | None
    key: str | None
    heads: int | None
    kv_heads: int | None
    setting: Callable[[str], str]

    def find(self, module: nn.Module) -> list[Projection]:
        """The projections of a module, in its order.

        Raises:
            UserError: if a pattern matches nothing, a module that cannot be scaled, or heads do not divide the rows.
        """
        modules = {plain_name(name): each for name, each in module.named_modules()}
        if self.qkv is None and self.query is None:
            names = [name for name, each in modules.items() if isinstance(each, nn.MultiheadAttention)]
            if not names:
                self._wrong(
                    "qkv", f"no pattern is given, and {type(module).__name__} has no nn.MultiheadAttention. {_HOW}"
                )
            found = [self._of_attention(name, modules[name]) for name in names]
        elif self.qkv is not None:
            found = [self._fused(name, modules[name]) for name in self._matched("qkv", self.qkv, modules)]
        else:
            found = list(self._separate(modules))
        self._check_homes(found)
        return found

    def _matched(self, argument: str, pattern: str | None, modules: dict[str, nn.Module]) -> list[str]:
        names = [name for name in modules if pattern is not None and re.fullmatch(pattern, name)]
        if not names:
            known = [name for name, each in modules.items() if isinstance(each, nn.Linear | nn.MultiheadAttention)]
            linear = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "") or "none"
            self._wrong(
                argument, f"{pattern!r} matches the whole name of no module. {_HOW} Linear layers are: {linear}"
            )
        return names

    def _of_attention(self, name: str, attention: nn.Module) -> Projection:
        assert isinstance(attention, nn.MultiheadAttention)
        heads = attention.num_heads
        if self.heads not in (None, heads) or self.kv_heads not in (None, heads):
            self._wrong("heads", f"{name} has {heads} heads of queries and of keys, got {self.heads}")
        if attention.bias_k is not None:
            self._wrong("qkv", f"{name} has add_bias_kv=True, a key that no projection computes. Leave it out")
        size = attention.embed_dim
        rows = []
        for parameter, first, of_queries in (
            (attention.in_proj_weight, 0, True),
            (attention.in_proj_weight, size, False),
            (attention.q_proj_weight, 0, True),
            (attention.k_proj_weight, 0, False),
            (attention.in_proj_bias, 0, True),
            (attention.in_proj_bias, size, False),
        ):
            if parameter is not None:
                rows.append(Rows(self._own(name, attention, parameter), first, heads, of_queries))
        return Projection(name, name, heads, heads, size // heads, tuple(rows), None)

    def _fused(self, name: str, fused: nn.Module) -> Projection:
        if isinstance(fused, nn.MultiheadAttention):
            return self._of_attention(name, fused)
        heads, kv_heads = self._heads("qkv")
        weight = self._weight("qkv", name, fused)
        total = heads + 2 * kv_heads
        if weight.shape[0] % total:
            self._indivisible(name, weight.shape[0], f"{heads} heads of queries and {kv_heads} each of keys and values")
        width = weight.shape[0] // total
        rows = [*_rows(fused, 0, heads, True), *_rows(fused, heads * width, kv_heads, False)]
        home = name.rpartition(".")[0]
        return Projection(name, home, heads, kv_heads, width, tuple(rows), (fused, fused))

    def _separate(self, modules: dict[str, nn.Module]) -> Iterator[Projection]:
        queries, keys = self._matched("query", self.query, modules), self._matched("key", self.key, modules)
        if len(queries) != len(keys):
            self._wrong(
                "key", f"{len(queries)} query projections ({queries[0]}, ...) and {len(keys)} of keys ({keys[0]})"
            )
        heads, _ = self._heads("query")
        for name, other in zip(queries, keys, strict=True):
            query, key = modules[name], modules[other]
            if query is key:
                self._wrong("key", f"{name} is also the query projection; for fused projections use qkv")
            rows, key_rows = (self._weight(*each).shape[0] for each in (("query", name, query), ("key", other, key)))
            if rows % heads:
                self._indivisible(name, rows, f"{heads} heads")
            width = rows // heads
            kv_heads = key_rows // width
            if key_rows % width or not kv_heads or heads % kv_heads or self.kv_heads not in (None, kv_heads):
                expected = f"{self.kv_heads or 'a divisor of ' + str(heads)} key heads of {width} rows"
                self._wrong("kv_heads", f"{other} has {key_rows} rows: expected {expected}, as {name} has {rows}")
            home = _common(name, other)
            found = (*_rows(query, 0, heads, True), *_rows(key, 0, kv_heads, False))
            yield Projection(f"{name} and {other}", home, heads, kv_heads, width, found, (query, key))

    def _heads(self, argument: str) -> tuple[int, int]:
        if self.heads is None:
            self._wrong("heads", f"expected the number of heads of the modules that {argument} matches, got null")
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            self._wrong("kv_heads", f"expected a divisor of heads={self.heads}, got {kv_heads}")
        return self.heads, kv_heads

    def _weight(self, argument: str, name: str, module: nn.Module) -> Tensor:
        if not isinstance(module, nn.Linear):
            self._wrong(
                argument, f"{name} is a {type(module).__name__}; expected nn.Linear, or nn.MultiheadAttention for qkv"
            )
        return self._own(name, module, module.weight)

    def _own(self, name: str, module: nn.Module, parameter: Tensor) -> Tensor:
        if not any(each is parameter for each in module.parameters(recurse=False)):
            reason = f"the weight of {name} is computed from other parameters (a parametrization), and cannot be scaled"
            self._wrong("qkv" if self.query is None else "query", reason)
        return parameter

    def _check_homes(self, found: list[Projection]) -> None:
        seen: dict[str, str] = {}
        owners: dict[int, str] = {}
        argument = "qkv" if self.query is None else "query"
        for each in found:
            if each.home in seen:
                both = f"{seen[each.home]} and {each.name} are both within {each.home or 'the module'}"
                self._wrong(argument, f"{both}: which of them an attention call uses is unknown. Match one of them")
            seen[each.home] = each.name
            for parameter in {id(rows.parameter) for rows in each.rows}:
                if parameter in owners:
                    self._wrong(
                        argument, f"{owners[parameter]} and {each.name} have the same weight. Match one of them"
                    )
                owners[parameter] = each.name

    def _indivisible(self, name: str, rows: int, by: str) -> NoReturn:
        self._wrong("heads", f"the {rows} rows of {name} cannot be divided into {by}")

    def _wrong(self, argument: str, reason: str) -> NoReturn:
        raise UserError(f"clip_qk: {self.setting(argument)}: {reason}")


_HOW = "Expected a regular expression for the whole name of query and key projections."


def _rows(linear: nn.Module, first: int, heads: int, of_queries: bool) -> Iterator[Rows]:
    """Those of the weight, and of the bias if there is one."""
    for parameter in (linear.weight, linear.bias):
        if isinstance(parameter, Tensor):
            yield Rows(parameter, first, heads, of_queries)


def _common(one: str, other: str) -> str:
    """The name of the nearest module that contains both."""
    shared = []
    for mine, theirs in zip(one.split(".")[:-1], other.split(".")[:-1], strict=False):
        if mine != theirs:
            break
        shared.append(mine)
    return ".".join(shared)
