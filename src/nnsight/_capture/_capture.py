"""Finding the with-block that a frame is entering."""

import ast
from types import FrameType

from ..errors import CaptureError
from ._block import Block
from ._cache import IdentityCache
from ._find import Entry, entry_at, matching_item
from ._names import names_of, refuse_leaving
from ._program import block_of
from ._source import FUTURES, Site, is_current, sites_in, sources_of, stale, where
from ._text import Text, cut

_blocks: IdentityCache[object, Block] = IdentityCache(1024)


def capture(frame: FrameType, *, waits: bool = False) -> Block:
    """The block of the with-statement that `frame` is about to enter; call it from `__enter__`.

    With `waits`, it is that of an `async with`, and called from `__aenter__`.

    Raises:
        CaptureError: There is no source, it has changed, or the body cannot run as a function of its own.
    """
    found = _blocks.get(frame.f_code, frame.f_lasti)
    if found is None:
        found = _capture(frame, waits)
        _blocks.put(frame.f_code, found, frame.f_lasti)
    return found


def _capture(frame: FrameType, waits: bool) -> Block:
    entry = entry_at(frame.f_code, frame.f_lasti)
    around = block_of(frame.f_code)
    text, site, item = _in_block(around, entry, frame) if around else _in_file(entry, frame)
    if isinstance(site.node, ast.AsyncWith):
        if not waits:
            raise CaptureError(f"{where(frame)}: `async with` cannot run later; write `with`.")
        if item != len(site.node.items) - 1:
            raise CaptureError(f"{where(frame)}: in an `async with` of several, the trace must come last.")
    refuse_leaving(site.node.body)
    return _block(text, site, item, frame)


def _in_file(entry: Entry, frame: FrameType) -> tuple[Text, Site, int]:
    for source in sources_of(frame):
        try:
            nodes = [site.node for site in source.sites]
        except SyntaxError:  # the file is being edited
            continue
        found = matching_item(nodes, entry)
        if found and is_current(frame.f_code, source.sites[found[0]], source, frame):
            return source.text, source.sites[found[0]], found[1]
    raise stale(frame)


def _in_block(around: Block, entry: Entry, frame: FrameType) -> tuple[Text, Site, int]:
    """In the code of a block, which has no file where it runs elsewhere."""
    context = (around.function, around.owner, around.first_argument)
    sites = sites_in(around.text.parse().body, *context)
    placed = sites_in(around.tree().body, *context)
    found = matching_item([site.node for site in placed], entry)
    if found is None:
        raise stale(frame)
    return around.text, sites[found[0]], found[1]


def _block(text: Text, site: Site, item: int, frame: FrameType) -> Block:
    target = site.node.items[item].optional_vars
    part = cut(text, site.node, item)
    bare = Block(
        source=part.source,
        filename=frame.f_code.co_filename,
        first_line=part.first_line,
        function=site.function,
        target=ast.unparse(target) if target is not None else None,
        line=frame.f_lineno,
        margins=part.margins,
        owner=site.owner,
        first_argument=site.first_argument,
        flags=frame.f_code.co_flags & FUTURES,
    )
    return bare.with_names(names_of(bare.all_statements(), bare.owner))
