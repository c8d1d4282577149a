"""Changes a traced program so that torch.onnx can translate it as it is: writes in place become values of their own."""

from __future__ import annotations

import operator

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg


def spare_decomposition(program: ExportedProgram) -> None:
    """Let a program stay as it was traced where the translation knows all of its operators.

    torch.onnx takes each program apart first, which traces it once more with symbolic shapes: half of the time of an export. In
    transformers' models that changes no more than what casts and bitwise operators are called, and writes in place.
    """
    aten = torch.ops.aten
    _join_parts(program.graph)
    if not all(_writes_anew(node) for node in program.graph.nodes if _writes_in_place(node)):
        program.graph_module.recompile()
        return  # writes into a part of something are left to torch
    for node in program.graph.nodes:
        if node.target is aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)  # else what it looks at stays, though nothing else reads it
        elif node.target is aten.dropout.default and not node.args[2]:  # an impure one, which would stay as well
            node.replace_all_uses_with(node.args[0], delete_user_cb=lambda user: user.op != "output")
            if not node.users:
                program.graph.erase_node(node)
        elif getattr(node.target, "overloadpacket", None) is aten.to:
            cast, dtype = node.args[0], node.meta["val"].dtype
            if cast.meta["val"].dtype == dtype:
                node.replace_all_uses_with(cast, delete_user_cb=lambda user: user.op != "output")
            node.target, node.args, node.kwargs = aten._to_copy.default, (cast,), {"dtype": dtype}
        elif node.target is aten.__and__.Tensor:
            node.target = aten.bitwise_and.Tensor
        elif node.target is aten.max.other:
            node.target = aten.maximum.default
        elif node.target is aten.min.other:
            node.target = aten.minimum.default
        elif node.target is aten.square.default:
            node.target, node.args = aten.pow.Tensor_Scalar, (*node.args, 2)
        elif node.target is aten.numpy_T.default:
            node.target, node.args = aten.permute.default, (*node.args, list(range(node.meta["val"].dim()))[::-1])
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    program.run_decompositions = lambda *_, **__: program


def _join_parts(graph: torch.fx.Graph) -> None:
    """Make x = y.new_empty(…); x[..., :8] = a; x[..., 8:] = b a concatenation: as writes they are a dozen operators in ONNX."""
    for whole in graph.find_nodes(op="call_function", target=torch.ops.aten.new_empty.default):
        parts = sorted(filter(_is_filled, whole.users), key=lambda part: part.args[2])
        readers = [user for user in whole.users if user not in parts]
        copies = [next(iter(part.users)) for part in parts]
        if not parts or any(reader < max(copies) for reader in readers):
            continue
        if any(
            _writes_in_place(node) and min(copies) < node < max(copies) and node not in copies for node in graph.nodes
        ):
            continue  # perhaps into what was copied before
        axis = parts[0].args[1]
        size = whole.meta["val"].shape[axis]
        starts = [part.args[2] for part in parts]
        ends = [min(part.args[3], size) for part in parts] if isinstance(size, int) else []
        if [*starts, size] != [0, *ends] or any(part.args[1] != axis for part in parts):
            continue
        with graph.inserting_after(max(copies)):
            joined = graph.call_function(torch.ops.aten.cat.default, ([copy.args[1] for copy in copies], axis))
        joined.meta = dict(whole.meta)
        whole.replace_all_uses_with(joined, delete_user_cb=readers.__contains__)
        for node in (*copies, *parts, whole):
            graph.erase_node(node)


def _is_filled(part: Node) -> bool:
    """Whether it is a slice, from one number to another, that a tensor of its shape and dtype is copied into, and that is read by nothing."""
    if part.target is not torch.ops.aten.slice.Tensor or len(part.users) != 1 or len(part.args) != 4:
        return False
    (copy,) = part.users
    if (
        copy.target is not torch.ops.aten.copy_.default
        or copy.users
        or copy.args[0] is not part
        or copy.args[1] is part
    ):
        return False
    kinds = {(value.dtype, str(value.shape)) for value in (node.meta["val"] for node in copy.all_input_nodes)}
    return len(kinds) == 1 and all(isinstance(number, int) for number in part.args[1:])


def _writes_in_place(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _writes_anew(node: Node) -> bool:
    """Make x.div_(y) an x.div(y), where nothing else sees x's memory; whether that was so."""
    target, written = node.target, node.args[0]
    assert isinstance(target, OpOverload)
    name = target._schema.name.removeprefix("aten::")
    anew = getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), target._overloadname, None)
    if not name.endswith("_") or anew is None or not isinstance(written, Node) or _may_be_view(written):
        return False
    if [str(given.type) for given in anew._schema.arguments] != [str(given.type) for given in target._schema.arguments]:
        return False  # pow_.Scalar takes a tensor and a number, pow.Scalar a number and a tensor
    if any(user > node or _may_be_view(user) for user in written.users if user is not node):
        return False
    given = map_arg((node.args, node.kwargs), lambda value: value.meta["val"])
    value, before = anew(*given[0], **given[1]), written.meta["val"]
    if value.dtype != before.dtype or str(value.shape) != str(before.shape):
        return False  # what is written is cast, or spread, to what is there
    node.target = anew
    return True


def _may_be_view(node: Node) -> bool:
    """Whether a result may be memory of another node. Operators that are made of others do not always say so."""
    made_by = node.args[0] if node.target is operator.getitem else node
    target = made_by.target if isinstance(made_by, Node) else None
    if target is torch.ops.aten._unsafe_view.default:
        return True
    if target in (torch.ops.aten.linear.default, torch.ops.aten.matmul.default):
        return False
    return (
        not isinstance(target, OpOverload)
        or any(result.alias_info is not None for result in target._schema.returns)
        or target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    )
