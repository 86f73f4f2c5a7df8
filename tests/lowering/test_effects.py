"""What passes share: removing what nobody reads any more."""

import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lowering.effects import erase_unused
from tests.lowering.layers import T, batch, inference_graph, ops, text

COUNT, METADATA = torch.tensor([5], dtype=torch.int32), torch.tensor([5, 0, 5], dtype=torch.int32)


def test_erase_unused_stops_at_ordered_ops_and_where_it_is_told():
    def model(x: Tensor, count: Tensor, metadata: Tensor) -> Tensor:
        y = ops.rsv_combine(x, count, metadata, T, "local").exp()
        return (y + y.sin()) * y.cos()

    module, _ = inference_graph(model, batch(), COUNT, METADATA)
    graph = module.graph
    exp, product = (next(n for n in graph.nodes if n.name == name) for name in ("exp", "mul"))
    (output,) = graph.find_nodes(op="output")
    output.args = ((),)
    erase_unused(exp)  # others read it
    erase_unused(product, exp)
    with_exp = text(graph)
    (sink,) = graph.find_nodes(op="call_function", target=torch.ops.prims._sink_tokens.default)
    (token,) = sink.all_input_nodes
    for node in (sink, token):
        graph.erase_node(node)
    erase_unused(exp)
    graph.lint()
    assert_expected_inline(f"{with_exp}\n\n{text(graph)}", """\
_make_token_default = prims._make_token()
with_effects = !rsv_combine(_make_token_default, in0, in1, in2, 8, 'local')
getitem = with_effects[0]
getitem_1 = with_effects[1]
exp = exp(getitem_1)
return ()

_make_token_default = prims._make_token()
with_effects = !rsv_combine(_make_token_default, in0, in1, in2, 8, 'local')
return ()""")
