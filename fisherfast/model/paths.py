"""Follow a forward pass from operation to operation: what depends on the input through which site.

A site is a *cut* when every path from the input to the output passes it. This is read off the
operations and not off their values, so it does not matter that a weight is zero, that a ReLU is
dead or that there are few samples. Where the operations cannot tell (random numbers, values that
leave torch), a path counts as one that passes no site: a cut may be missed, none is invented.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fisherfast.data.inputs import Samples, tensors_of
from fisherfast.model.affine import keeps_information
from fisherfast.model.hooks import Forward
from fisherfast.model.sites import INPUT, OUTPUT, Site

TRACE_SAMPLES = 8
"""Samples of the pass that is followed. The paths show with one; the range of the values, by which
a shift is judged, takes a few."""

WITHOUT_VALUES = {
    *("zeros_like", "ones_like", "full_like", "empty_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"),
}
"""Operations that read the shape of a tensor only."""

LEAVING = {
    *("numpy", "tolist", "data_ptr", "storage", "untyped_storage", "__array__", "__dlpack__"),
    *("__array_interface__", "__cuda_array_interface__", "__deepcopy__", "__reduce_ex__"),
}
"""Functions by which values leave torch."""

NO_DRAW = {"train": False, "training": False, "dropout_p": 0.0, "dropout": 0.0, "p": 0.0}
"""Arguments with which an operation that may draw random numbers draws none."""


@dataclass(frozen=True)
class Origin:
    """Where the values of a tensor come from.

    Attributes:
        through: sites that every path from the input passes.
        near: the last sites on these paths.
        summed: the sites that a sum has just added up; empty after any other site.
        copy_of: the site of which the values are an invertible affine map.
    """

    through: frozenset[str] = frozenset()
    near: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()
    copy_of: str | None = None


def follow(model: nn.Module, x: Samples, sites: Sequence[Site]) -> None:
    """Find cuts, chains, copies and sums, and fill `descendants`, `cut`, `copy_of` and `summed` of
    all sites. Call inside `evaluation`.

    If the model cannot be followed, `cut` stays None and there are no descendants.

    Args:
        model: the model.
        x: samples [n, ...], of one input or of several.
        sites: of `survey`.

    Cost: one forward pass of at most `TRACE_SAMPLES` samples, with a Python call per operation.
    """
    for site in sites:
        site.descendants, site.cut, site.copy_of, site.summed = set(), None, None, ()
    by_event = {event: site for site in sites for event in site.names}
    paths = Paths()
    found: dict[str, Origin] = {}

    def consume(event: str, kind: str, module: nn.Module | None, output: Tensor) -> Tensor | None:
        site = by_event.get(event)
        if site is None:
            return None
        if site.name in found:  # the program may have chosen this output since
            found[site.name] = paths.narrowed(site.name, found[site.name])
            return None
        with torch._C.DisableTorchFunction():
            own = output if _whole(output) else output.clone()  # a part of a tensor gets its own
            found[site.name] = paths.mark(site.name, own)
        return None if own is output else own

    start = x[:TRACE_SAMPLES].clone()
    for entry in tensors_of(start):
        paths.mark(INPUT, entry)
    try:
        with Forward(model, consume, sites) as forward, _Leaving(paths), paths:
            forward.run(start)
    except Exception:  # an operation refuses to be followed, or the network the copy of a value
        return
    by_name = {site.name: site for site in sites}
    end = found.get(OUTPUT)
    for name, origin in found.items():
        for passed in origin.through - {name}:
            by_name[passed].descendants.add(name)
        by_name[name].cut = None if end is None else name in end.through
        by_name[name].summed = origin.summed
        if not name.startswith(OUTPUT):  # what leaves the network is measured itself
            by_name[name].copy_of = origin.copy_of


class Paths(TorchDispatchMode):
    """Keep the `Origin` of every storage while a network runs.

    A storage that is written twice comes from all that was written. Its key is its address: one
    that is used again is overwritten by the operation that fills it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._origins: dict[int, Origin] = {}
        self._left: frozenset[str] | None = None  # passed by all values that left torch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do not import torch's compiler, which takes seconds: nothing here is compiled."""
        return False

    def mark(self, name: str, output: Tensor) -> Origin:
        """Note that a tensor is the output of a site, and return where it comes from."""
        before = self._origins.get(_key(output), Origin(frozenset({INPUT})))
        through = before.through if self._left is None else before.through & self._left
        through |= {INPUT, name}
        root = name if before.copy_of in (None, INPUT) else before.copy_of
        self._origins[_key(output)] = Origin(through, (name,), copy_of=root)
        return Origin(through, before.near, before.summed, None if root == name else root)

    def narrowed(self, name: str, origin: Origin) -> Origin:
        """Return where a site comes from if values that have left torch so far decide about it."""
        if self._left is None:
            return origin
        return replace(origin, through=origin.through & self._left | {INPUT, name})

    def leave(self, values: Any) -> None:
        """Note that values leave torch: all that follows may depend on them."""
        for tensor in _tensors(values):
            origin = self._origins.get(_key(tensor))
            if origin is not None:
                left = origin.through if self._left is None else origin.through & self._left
                self._left = left

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        schema = func._schema
        name = schema.name.rpartition("::")[2].rstrip("_")
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        if _decides(func, name, given):
            self.leave((args, kwargs))
        read = _tensors(given)
        keys = {_key(tensor) for tensor in read}
        written = {
            _key(tensor)
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(given.get(argument.name))
        }
        origin = self._origin_of(func, name, given, read, out)
        for key in written | {_key(tensor) for tensor in _tensors(out)} - (keys - written):
            if origin is None:
                self._origins.pop(key, None)
            else:
                self._origins[key] = origin

    def _origin_of(
        self, func: Any, name: str, given: dict[str, Any], read: list[Tensor], out: Any
    ) -> Origin | None:
        """Return where the result of an operation comes from; None for a constant."""
        if _draws(func, given):
            return Origin()
        if name in WITHOUT_VALUES:
            read = []
        known = [(t, o) for t in read if (o := self._origins.get(_key(t))) is not None]
        origins = list(dict.fromkeys(origin for _, origin in known))
        if not origins:
            return None if self._left is None else Origin(self._left)
        through = frozenset.intersection(*(origin.through for origin in origins))
        if self._left is not None:
            through &= self._left
        near = tuple(dict.fromkeys(site for origin in origins for site in origin.near))
        summed = origins[0].summed if len(origins) == 1 else ()
        if name == "add" and len(near) > 1:
            summed = near
        copy_of = None
        if len(known) == 1:
            tensor, copy_of = known[0][0], known[0][1].copy_of
            result = _tensors(out)[:1]
            if copy_of is not None and not (
                _whole(tensor) and result and keeps_information(name, given, tensor, result[0])
            ):
                copy_of = None
        return Origin(through, near, summed, copy_of)


class _Leaving(TorchFunctionMode):
    """Report values that leave torch by a function that is no operation."""

    def __init__(self, paths: Paths) -> None:
        super().__init__()
        self._paths = paths

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in LEAVING:
            with torch._C.DisableTorchFunction():
                self._paths.leave((args, kwargs))
        return func(*args, **(kwargs or {}))


def _decides(func: Any, name: str, given: Mapping[str, Any]) -> bool:
    """Return whether the program may see values: as a number, or as the shape of a result."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if name == "index":
        masks = (torch.bool, torch.uint8)
        return any(index.dtype in masks for index in _tensors(given.get("indices")))
    return torch.Tag.dynamic_output_shape in func.tags


def _draws(func: Any, given: Mapping[str, Any]) -> bool:
    """Return whether an operation draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    arguments = {a.name: given.get(a.name, a.default_value) for a in func._schema.arguments}
    return all(arguments.get(name, True) != value for name, value in NO_DRAW.items())


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    """Return what views of the same memory share."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a sparse tensor has none
        return id(tensor)


def _whole(tensor: Tensor) -> bool:
    """Return whether a tensor holds every number of its memory once."""
    if tensor.layout != torch.strided:
        return True
    if tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
        return False
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != step:
            return False
        step *= size
    return True
