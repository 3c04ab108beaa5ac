"""torch.export, ONNX and TorchScript: graphs that leave Python give the network's own results at any size."""
import io
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from families import FAMILIES, TWO_STAGES, each_family, image, make, merged
from onnx.numpy_helper import to_array
from torch import Tensor, nn

from timm_shiftwise.layers import MergedConv2d

EXAMPLE = (2, 3, 48, 64)
OTHER_SIZES = [(1, 3, 48, 64), (5, 3, 32, 40), (2, 3, 128, 384)]

pytestmark = pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')
both_forms = pytest.mark.parametrize('form', ['unmerged', 'merged'])


def in_form(model: nn.Module, form: str) -> nn.Module:
    return merged(model) if form == 'merged' else model.eval()


def export_program(model: nn.Module, example: tuple[int, ...] = EXAMPLE) -> torch.export.ExportedProgram:
    """Export with batch, height and width left open; one that had to be fixed is an error."""
    axes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    return torch.export.export(model, (image(*example),), dynamic_shapes=(axes,))


def export_onnx(model: nn.Module | torch.export.ExportedProgram, example: tuple[int, ...] = EXAMPLE) -> onnx.ModelProto:
    """The ONNX model, with batch, height and width open if the program has them open."""
    program = torch.onnx.export(model, (image(*example),), dynamo=True, verbose=False)
    return program.model_proto


def start(model: onnx.ModelProto | bytes) -> onnxruntime.InferenceSession:
    content = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(content, providers=['CPUExecutionProvider'])


def infer(session: onnxruntime.InferenceSession, x: Tensor) -> Tensor:
    name = session.get_inputs()[0].name
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@both_forms
@each_family
@torch.no_grad()
def test_one_program_and_one_onnx_graph_for_every_size(family, form):
    model = in_form(make(family), form)
    program = export_program(model)
    called = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert {target.namespace for target in called} == {'aten'}
    graph = export_onnx(program)
    assert {node.domain for node in graph.graph.node} == {''} and not graph.functions
    session, exported = start(graph), program.module()
    for size in [EXAMPLE, *OTHER_SIZES]:
        x = image(*size)
        wanted = model(x)
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(exported(x), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(infer(session, x), wanted, rtol=0, atol=1e-4)


SELECTING = (
    'Gather', 'Concat', 'Slice', 'Split', 'index_select', 'gather', 'cat', 'slice', 'split', 'narrow', 'select')
"""Operators, of ONNX and of PyTorch, that pick channels out of a map or put them together."""


def operators_in_onnx(model: nn.Module, legacy: bool) -> Counter[str]:
    """How often each operator occurs in a graph of ONNX, made by either of PyTorch's exporters.

    What is made of constants alone is left out: a runtime computes that once, when it loads the graph.
    """
    if legacy:
        file = io.BytesIO()
        torch.onnx.export(model, (image(*EXAMPLE),), file, dynamo=False)
        graph = onnx.load_from_string(file.getvalue()).graph
    else:
        graph = export_onnx(model).graph
    constants, counts = {'', *(tensor.name for tensor in graph.initializer)}, Counter()
    for node in graph.node:
        if constants.issuperset(node.input):
            constants.update(node.output)
        else:
            counts[node.op_type] += 1
    return counts


def operators_in_program(model: nn.Module, traced: bool) -> Counter[str]:
    """The same in an exported program, or in a TorchScript trace."""
    if traced:
        nodes = torch.jit.trace(model, image(*EXAMPLE)).inlined_graph.nodes()
        return Counter(node.kind().removeprefix('aten::') for node in nodes)
    graph = export_program(model).graph
    return Counter(str(node.target).split('.')[1] for node in graph.nodes if node.op == 'call_function')


GRAPHS = {
    'onnx': lambda model: operators_in_onnx(model, legacy=False),
    'onnx, legacy': lambda model: operators_in_onnx(model, legacy=True),
    'program': lambda model: operators_in_program(model, traced=False),
    'trace': lambda model: operators_in_program(model, traced=True),
}


@pytest.fixture(scope='module')
def graphs_of_convnext() -> dict[str, Counter[str]]:
    """Operators in each kind of graph of timm's own ConvNeXt, with as many blocks as the networks compared with it."""
    model = timm.create_model('convnext_tiny', depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=10).eval()
    return {kind: count(model) for kind, count in GRAPHS.items()}


@pytest.mark.parametrize('kind', GRAPHS)
@pytest.mark.parametrize('family', [family for family in FAMILIES if family != 'p2_sw'])
@torch.no_grad()
def test_nothing_is_selected_in_the_graph_of_a_merged_network(family, kind, graphs_of_convnext):
    counts = GRAPHS[kind](merged(make(family)))
    for name in SELECTING:
        assert counts[name] <= graphs_of_convnext[kind][name], name


@pytest.mark.parametrize('large_map', [True, False])
@pytest.mark.parametrize('family', [family for family in FAMILIES if family != 'p2_sw'])
@torch.no_grad()
def test_the_graph_of_a_merged_operator_is_two_convolutions(family, large_map):
    model = merged(make(family))
    operators = [module for module in model.modules() if isinstance(module, MergedConv2d)]
    assert all(operator.large_map for operator in operators), 'both stages have large maps'
    for operator in operators:
        operator.large_map = large_map
    graph = export_onnx(model).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    depthwise = [
        node for node in graph.node if node.op_type == 'Conv'
        and any(attribute.name == 'group' and attribute.i > 1 for attribute in node.attribute)]
    assert len(depthwise) == 2 * len(operators)  # one tall, one wide
    is_wide = []
    for node in depthwise:
        channels, one, rows, columns = constants[node.input[1]].dims
        (group,) = [attribute.i for attribute in node.attribute if attribute.name == 'group']
        assert (channels, one) == (group, 1)  # no channel multiplier
        is_wide.append(columns > rows)
    assert sum(is_wide) == len(operators)
    # the runtime would take one by zero back into the convolution
    padded = [node for node in graph.node if node.op_type == 'Pad']
    assert len(padded) == (len(operators) if large_map else 0)
    assert all(to_array(constants[node.input[2]]) > 0 for node in padded)


@torch.no_grad()
def test_no_tensor_of_the_merged_graph_is_larger_than_the_hidden_layer():
    graph = export_onnx(merged(make('sw'))).graph
    sizes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in graph.value_info}
    made = {name for node in graph.node for name in node.output}
    assert made - {value.name for value in graph.output} <= sizes.keys()
    assert max(np.prod(size) for size in sizes.values()) == 2 * 12 * 16 * 4 * TWO_STAGES['dims'][0]


@both_forms
@each_family
@torch.no_grad()
def test_torchscript_traces_and_scripts(family, form):
    model = in_form(make(family), form)
    x = image(*EXAMPLE)
    for compiled in (torch.jit.trace(model, x), torch.jit.script(model)):
        buffer = io.BytesIO()
        torch.jit.save(compiled, buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    for size in OTHER_SIZES:  # of the last, scripted, one
        torch.testing.assert_close(loaded(image(*size)), model(image(*size)), rtol=1e-4, atol=1e-5)


def test_a_scripted_network_trains():
    model = make('sw')
    scripted = torch.jit.script(make('sw'))
    x = image(*EXAMPLE)
    for network in (model, scripted):
        network(x).square().sum().backward()
    for (name, seen), wanted in zip(scripted.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(seen.grad, wanted.grad, rtol=1e-3, atol=1e-4, msg=name)


@torch.no_grad()
def test_feature_maps_are_exported_too():
    model = timm.create_model('sw_tiny', features_only=True, out_indices=(0, 1), **TWO_STAGES).eval()
    session = start(export_onnx(export_program(model)))
    x = image(1, 3, 32, 64)
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for seen, wanted in zip(outputs, model(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(seen), wanted, rtol=0, atol=1e-4)


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> dict[str, tuple[Tensor, Tensor]]:
    """Images, as the packaged weights want them, and labels of the handwritten digits, by split."""
    from timm.data import create_dataset, create_transform, resolve_model_data_config

    from timm_shiftwise.quickstart.digits import write_digits

    folder = tmp_path_factory.mktemp('digits') / 'images'
    write_digits(folder)
    transform = create_transform(**resolve_model_data_config(timm.create_model('test_sw.digits')))
    splits = {}
    for split in ('train', 'val'):
        dataset = create_dataset('', folder, split=split, transform=transform)
        picked = range(0, len(dataset), 10 if split == 'train' else 1)
        images, labels = zip(*(dataset[k] for k in picked), strict=True)
        splits[split] = torch.stack(images), torch.tensor(labels)
    return splits


@torch.no_grad()
def test_int8_of_the_merged_network_reads_digits(digits, tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = merged(timm.create_model('test_sw.digits', pretrained=True))
    images, labels = digits['val']
    example = (2, 3, 64, 64)
    program = torch.export.export(model, (image(*example),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    plain, prepared, quantized = (tmp_path / f'{name}.onnx' for name in ('plain', 'prepared', 'quantized'))
    onnx.save(export_onnx(program, example), plain)
    session = start(plain.read_bytes())
    name = session.get_inputs()[0].name

    class Calibration(CalibrationDataReader):
        batches = iter(digits['train'][0].split(32))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {name: batch.numpy()}

    quant_pre_process(plain, prepared, skip_symbolic_shape=True)  # as the command does it
    quantize_static(
        prepared, quantized, Calibration(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8)
    wanted, seen = infer(session, images), infer(start(quantized.read_bytes()), images)
    torch.testing.assert_close(wanted, model(images), rtol=0, atol=1e-4)
    accuracy, accuracy_int8 = ((logits.argmax(1) == labels).float().mean().item() for logits in (wanted, seen))
    error = ((seen - wanted).norm() / wanted.norm()).item()
    print(f'digits, {len(labels)} images: top-1 {accuracy:.2%} in float32, {accuracy_int8:.2%} in int8; '
          f'relative error of the logits {error:.3f}; {plain.stat().st_size} and {quantized.stat().st_size} bytes')
    assert {'QuantizeLinear', 'DequantizeLinear'} <= {node.op_type for node in onnx.load(quantized).graph.node}
    assert accuracy > 0.95
    assert accuracy_int8 > accuracy - 0.02
    assert error < 0.1
