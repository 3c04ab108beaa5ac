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
from torch import Tensor, nn

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


@pytest.fixture(scope='module')
def operators_of_convnext() -> set[str]:
    """Types of the operators that timm's own ConvNeXt V2 is exported to."""
    model = timm.create_model('convnextv2_tiny', depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=10).eval()
    return {node.op_type for node in export_onnx(model, (2, 3, 64, 96)).graph.node}


@pytest.mark.parametrize('family', [family for family in FAMILIES if family != 'p2_sw'])
@torch.no_grad()
def test_the_merged_graph_is_plain_convolutions(family, operators_of_convnext):
    graph = export_onnx(merged(make(family))).graph
    counts = Counter(node.op_type for node in graph.node)
    blocks = sum(TWO_STAGES['depths'])
    in_head = 1  # torch's exporter reads the pooled features through a Gather, timm's own convnext's too
    # of the block, not the operator
    allowed = {'BatchNormalization', 'Relu', 'Sigmoid'} if family == 'sw_v2' else set()
    assert counts.keys() - operators_of_convnext - allowed <= {'Gather', 'Concat'}
    if family in ('sw', 'sw_v2'):
        assert counts['Gather'] == 2 * blocks + in_head  # the channels worked on, and the ghosts
        assert counts['Concat'] == blocks
    else:
        assert counts['Gather'] == in_head and not counts['Concat']

    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    depthwise = [
        node for node in graph.node if node.op_type == 'Conv'
        and any(attribute.name == 'group' and attribute.i > 1 for attribute in node.attribute)]
    assert len(depthwise) == 2 * blocks  # one tall, one wide
    for node in depthwise:
        (group,) = [attribute.i for attribute in node.attribute if attribute.name == 'group']
        assert constants[node.input[1]].dims[0] == group  # no channel multiplier
    for node in graph.node:
        if node.op_type == 'Gather':
            assert node.input[1] in constants
            assert node.input[0] not in producers or producers[node.input[0]].op_type != 'Gather'


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

    quant_pre_process(plain, prepared)
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
