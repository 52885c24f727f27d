"""Which blocks are plain: they read and change values, compute with them, and can do nothing else.

Everything in a plain block is on a list: the statements, the names of attributes, the functions. So it can neither change the
process that it runs in nor look at how a tensor came there. The runner asks before the block has run, when it can be believed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from .._capture import parse
from ..errors import ProtocolError
from ..protocol import DefinitionNode, EnvoyNode, ImportNode, InstanceNode, Job, ModuleNode, Node, SiteNode, read_job
from ._together import can_share

_ASSIGNED = frozenset({"output", "input", "inputs"})
_LIBRARIES = frozenset({("torch", ""), ("torch.nn.functional", ""), ("math", "")})  # and no name in them
_FUNCTIONS = frozenset(
    "abs all any bool dict enumerate float int len list max min print range reversed round set sorted str sum tuple zip".split()
)
# Of values, of tensors, of torch and its functions, of lists and texts.
_ATTRIBUTES = frozenset(
    "output input inputs save skip logits last_hidden_state shape dtype ndim dim size numel device item tolist clone "
    "detach abs add add_ sub sub_ mul mul_ div div_ pow neg sqrt rsqrt exp log log2 sin cos tan tanh sigmoid relu "
    "gelu silu softmax log_softmax softplus sign round floor ceil clamp clamp_ clip clamp_min clamp_max sum mean std "
    "var norm prod max min amax amin argmax argmin topk sort argsort cumsum cumprod median logsumexp any all eq ne lt "
    "le gt ge isnan isinf isfinite allclose equal nonzero where gather index_select take masked_fill masked_fill_ "
    "masked_select scatter scatter_ index_add index_copy index_fill zero_ fill_ copy_ zeros zeros_like ones ones_like "
    "full full_like arange linspace eye tensor new_zeros new_ones new_full new_tensor cat stack chunk split unbind "
    "hstack vstack view reshape flatten unflatten squeeze unsqueeze transpose permute movedim swapaxes T mT expand "
    "repeat repeat_interleave tile roll flip triu tril diag diagonal outer dot mm bmm mv matmul einsum tensordot "
    "inner cross cosine_similarity normalize layer_norm linear cross_entropy kl_div mse_loss one_hot pad embedding "
    "cdist dist pdist lerp addmm addmm_ baddbmm bincount unique float double half bfloat16 long int to cpu type_as "
    "float16 float32 float64 int8 int16 int32 int64 uint8 bool nn functional inf pi nan e linalg vector_norm "
    "matrix_norm svd qr layers resid_pre resid_mid resid_post attn_out mlp_out append extend items keys values get "
    "join upper lower strip".split()
)
_PARTS = (
    *(
        ast.Module,
        ast.Expr,
        ast.Assign,
        ast.AugAssign,
        ast.AnnAssign,
        ast.If,
        ast.For,
        ast.Pass,
        ast.Break,
        ast.Continue,
    ),
    *(
        ast.Name,
        ast.Attribute,
        ast.Subscript,
        ast.Slice,
        ast.Starred,
        ast.Constant,
        ast.Tuple,
        ast.List,
        ast.Dict,
        ast.Set,
    ),
    *(ast.Call, ast.keyword, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.NamedExpr),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension, ast.JoinedStr, ast.FormattedValue),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.Load, ast.Store),
)


def is_plain(frame: bytes, model: Any) -> bool:
    """Whether a job's block is plain, on this model."""
    try:
        job, _ = read_job(frame)
        return can_share(job, len(frame)) and _brings_data(job) and _is_plain_source(job, model)
    except (ProtocolError, SyntaxError, ValueError, RecursionError):
        return False


def _brings_data(job: Job) -> bool:
    """Whether the names that a block reads stand for values, modules of the model, or libraries that are known."""
    roots: list[Any] = [value for space in job.namespaces for value in space.values.values()]
    roots += [*job.main.variables.values(), *job.containers, *job.args]
    return all(_is_data(node) for root in roots for node in _nodes(root))


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
        value = [getattr(value, name) for name in value.__struct_fields__]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _nodes(item)


def _is_data(node: Node) -> bool:
    if isinstance(node, ImportNode):
        return (node.module, node.name) in _LIBRARIES
    if isinstance(node, EnvoyNode):
        return not node.attribute
    return not isinstance(node, (DefinitionNode, InstanceNode, ModuleNode, SiteNode))


def _is_plain_source(job: Job, model: Any) -> bool:
    block = job.main.block
    names = {part for path, _ in model._module.named_modules() for part in path.split(".")}
    parts = list(ast.walk(parse(block.source)))
    known = {name for space in job.namespaces for name in space.values} | set(job.main.variables)
    known |= {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return all(_is_plain_part(part, names, known) for part in parts)


def _is_plain_part(part: ast.AST, modules: set[str], known: set[str]) -> bool:
    if isinstance(part, ast.Attribute):
        stored = not isinstance(part.ctx, ast.Load)
        return part.attr in _ASSIGNED if stored else part.attr in _ATTRIBUTES or part.attr in modules
    if isinstance(part, ast.Name):
        return not isinstance(part.ctx, ast.Load) or part.id in known or part.id in _FUNCTIONS
    if isinstance(part, ast.Compare):
        pairs = zip(part.ops, part.comparators, strict=True)
        return all(not isinstance(how, (ast.Is, ast.IsNot)) or isinstance(what, ast.Constant) for how, what in pairs)
    return isinstance(part, _PARTS)
