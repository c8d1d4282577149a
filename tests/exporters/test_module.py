"""Plain modules: a convolutional network, a recurrent one, nested answers, and declared axes."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_decoders import CONTEXT, make_model
from tiny_models import OnnxRunner
from torch import nn

from onnxpress.errors import ConversionError, ParityError, SourceError
from onnxpress.exporters import ParityCheck, export
from onnxpress.exporters.conventions import learn
from onnxpress.exporters.transformers_decoder import export_causal_lm
from onnxpress.exporters.verify import drawn_like


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
        )
        self.head = nn.Linear(8, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.body(pixels).flatten(1)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, tokens: torch.Tensor, scale: torch.Tensor) -> dict[str, object]:
        states, (last, cell) = self.lstm(self.table(tokens))
        return {"states": states * scale[:, None], "last": (last, cell)}


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(2, 12).sum(1)


def _trained_convolutions() -> Convolutions:
    torch.manual_seed(0)
    module = Convolutions()
    for _ in range(3):  # running statistics that are not those of a fresh BatchNorm
        module(torch.randn(4, 3, 8, 8) * 2 + 1)
    return module


@pytest.mark.parametrize("batch", [1, 2])
def test_convolutional_network(batch, tmp_path):
    module = _trained_convolutions()
    exported = export(module, example_inputs=torch.randn(batch, 3, 8, 8))
    signature = exported.graph.signature
    assert signature.task == "module"
    assert [(spec.name, spec.shape) for spec in signature.inputs] == [("pixels", ("batch", 3, 8, 8))]
    assert [(spec.name, spec.shape) for spec in signature.outputs] == [("output_0", ("batch", 4))]
    assert signature.axes == {"batch": (1, 1024)}
    assert module.training
    assert module.dropout.training
    _check(exported, tmp_path)


class WritesInPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = x.clone()
        left[:, 0].add_(3)
        return left.relu_().to(torch.int64)


def test_writes_in_place_and_casts(tmp_path):
    exported = export(WritesInPlace(), example_inputs=torch.randn(2, 5) * 3)
    rows = ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))
    assert max(row.max_abs for row in rows) == 0


def _sum(x: torch.Tensor) -> torch.Tensor:
    return torch.matmul(x, x.mT).add_(x.sum()).div_(3)


def _chosen(x: torch.Tensor) -> torch.Tensor:
    best = x.topk(2).values
    total = best.sum(-1, keepdim=True)
    best.div_(total)
    return torch.zeros_like(x).scatter_(-1, x.topk(2).indices, best).square()


def _seen_by_a_view(x: torch.Tensor) -> torch.Tensor:
    left = x * 2
    flat = left.reshape(-1)
    left.add_(1)
    return flat * 3


def _seen_by_a_view_of_a_view(x: torch.Tensor) -> torch.Tensor:
    left = x * 2
    rows = left[:1]
    rows.transpose(0, 1).mul_(5)
    return left + rows


def _broadcast_into_parts(x: torch.Tensor) -> torch.Tensor:
    whole = x.new_empty(len(x), 10)
    whole[:, :5] = x
    whole[:, 5:] = x[:, :1]
    return whole * 2


def _cast_into_parts(x: torch.Tensor) -> torch.Tensor:
    whole = x.new_empty(len(x), 10, dtype=torch.int64)
    whole[:, :5] = x
    whole[:, 5:] = x * 2
    return whole / 4


def _overlapping_parts(x: torch.Tensor) -> torch.Tensor:
    whole = x.new_empty(len(x), 8)
    whole[:, 3:] = x
    whole[:, :5] = x * 2
    return whole + 1


def _parts_read_between(x: torch.Tensor) -> torch.Tensor:
    whole = x.new_empty(len(x), 10)
    whole[:, :5] = x
    first = whole[:, 2:4]
    whole[:, 5:] = x * 2
    whole[:, :5] = x * 3
    return whole * first.sum()


def _parts_of_another_axis(x: torch.Tensor) -> torch.Tensor:
    whole = x.new_empty(10, len(x))
    whole[:5] = x.mT
    whole[5:] = x.mT * 2
    whole[5:, :1] = 3
    return whole.mT.contiguous()


def _parts_of_what_is_written_between(x: torch.Tensor) -> torch.Tensor:
    part = x * 2
    whole = x.new_empty(len(x), 10)
    whole[:, :5] = part
    part.add_(1)
    whole[:, 5:] = part
    return whole * 2


def _seen_through_what_does_not_say_so(x: torch.Tensor) -> torch.Tensor:
    left = x * 2
    torch.atleast_3d(left).add_(1)
    return left * 3


def _into_what_is_given(x: torch.Tensor) -> torch.Tensor:
    joined = torch.empty(len(x), 10)
    torch.cat([x, x * 2], 1, out=joined)
    return joined + 1


def _another_dtype_anew(x: torch.Tensor) -> torch.Tensor:
    left = x.relu()
    left.logical_not_()
    return left @ left.mT


def _keeps_its_dtype(x: torch.Tensor) -> torch.Tensor:
    left = x.to(torch.float16) * 0 + 1
    left.add_(x * 0 + 1e-4)  # nothing, in float16
    return (left.to(torch.float32) - 1) * 1000


def _parts(x: torch.Tensor) -> torch.Tensor:
    whole = x.new_empty(len(x), 12)
    whole[:, 5:] = torch.cat([x, x[:, :2]], 1)
    whole[:, :5] = x * 2
    return whole.mT @ whole


def _operators_of_other_arguments(x: torch.Tensor) -> torch.Tensor:
    left = x * 2
    left **= 2
    left.double().float_power_(2)
    return left.ldexp_(torch.ones(5)) + 1


def _seen_by_a_view_that_hides_it(x: torch.Tensor) -> torch.Tensor:
    left = x * 2
    flat = torch.ops.aten._unsafe_view(left, (len(x) * 5,))
    left.add_(1)
    return flat * 1


def _a_part_copied_onto_itself(x: torch.Tensor) -> torch.Tensor:
    whole = x.new_empty(len(x), 10)
    part = whole[..., :5]
    part.copy_(part)
    whole[..., 5:] = x * 2
    return whole[:, 5:] * 1


def _other_spellings(x: torch.Tensor) -> torch.Tensor:
    """And what nothing reads but an assertion of its dtype."""
    torch.diff(x).gt(0).to(torch.int64)
    return nn.functional.dropout(torch.min(x, x * x), 0.5, training=False) @ x.T


@pytest.mark.parametrize("written", [_sum, _chosen, _parts, _other_spellings])
def test_writes_into_memory_of_their_own_need_no_second_trace(written, monkeypatch, tmp_path):
    def taken_apart(*_: object) -> None:
        raise AssertionError("the program was traced once more")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", taken_apart)
    _writes(written, tmp_path)


@pytest.mark.parametrize(
    "written",
    [
        _seen_by_a_view,
        _seen_by_a_view_of_a_view,
        _broadcast_into_parts,
        _cast_into_parts,
        _overlapping_parts,
        _parts_read_between,
        _parts_of_another_axis,
        _parts_of_what_is_written_between,
        _seen_through_what_does_not_say_so,
        _into_what_is_given,
        _another_dtype_anew,
        _keeps_its_dtype,
        _operators_of_other_arguments,
        _seen_by_a_view_that_hides_it,
        _a_part_copied_onto_itself,
    ],
)
def test_writes_that_are_left_to_torch(written, tmp_path):
    _writes(written, tmp_path)


def _writes(written, tmp_path):
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = written(x)
            return answer

    torch.manual_seed(0)
    exported = export(Writes(), example_inputs=torch.randn(3, 5) * 3)
    rows = ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))
    assert max(row.max_rel for row in rows) < 1e-5


class ReadsRows(nn.Module):
    """Of a table that is a parameter, which the exporter reads through a Transpose that changes nothing."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)
        self.table = nn.Parameter(torch.randn(rows, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.linear(x) + self.table[x[:, 0].abs().to(torch.int64) % len(self.table)]
        return answer


@pytest.mark.parametrize("rows", [20, 8])
def test_rows_of_a_parameter_are_read(rows, tmp_path):
    exported = export(ReadsRows(rows), example_inputs=3 * torch.randn(5, 4))
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))


def test_what_is_known_as_it_was_traced_is_not_taken_apart(monkeypatch, tmp_path):
    """Nor is a language model's export, whose time that would double; networks with batch norms are."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("taken apart")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", fail)
    export(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)), example_inputs=torch.randn(2, 4))
    model = make_model("qwen3")
    export_causal_lm(model, learn(model, positions=CONTEXT), context=CONTEXT)
    with pytest.raises(ConversionError, match="taken apart"):
        export(_trained_convolutions(), example_inputs=torch.randn(2, 3, 8, 8))


def test_height_and_width_can_be_declared(tmp_path):
    exported = export(
        _trained_convolutions(),
        example_inputs=(torch.randn(2, 3, 8, 12),),
        dynamic_axes={"pixels": {0: "batch", 2: "height", 3: "width"}},
    )
    signature = exported.graph.signature
    assert signature.inputs[0].shape == ("batch", 3, "height", "width")
    assert signature.axes["height"][1] == 2**20
    _check(exported, tmp_path)


def test_recurrent_network_with_nested_answer(tmp_path):
    torch.manual_seed(0)
    example = {"tokens": torch.randint(0, 20, (3, 7)), "scale": torch.randn(3, 1)}
    exported = export(Recurrent(), example_inputs=example)
    signature = exported.graph.signature
    assert [(spec.name, spec.shape) for spec in signature.outputs] == [
        ("states", ("batch", 7, 12)),
        ("last.0", (4, "batch", 6)),
        ("last.1", (4, "batch", 6)),
    ]
    assert signature.inputs[0].bounds == (0, 19)  # rows of the embedding, not what the example happens to hold
    assert "LSTM" in exported.graph.operators()
    _check(exported, tmp_path)


class Layered(nn.Module):
    """past: nothing, the state of a GRU, or the two of an LSTM."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, **past: torch.Tensor) -> tuple[torch.Tensor, object]:
        states = tuple(past.values())
        return self.layer(x, states[0] if len(states) == 1 else states or None)


@pytest.mark.parametrize(
    ("layer", "states"),
    [
        (nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True), 0),
        (nn.LSTM(8, 6, batch_first=True, bias=False), 2),
        (nn.GRU(8, 6, num_layers=2, batch_first=True, bidirectional=True), 1),
        (nn.GRU(8, 6, batch_first=True), 0),
    ],
)
def test_recurrent_layers_take_any_number_of_steps(layer, states, tmp_path):
    module, directions = Layered(layer), 2 if layer.bidirectional else 1
    past = {f"past_{index}": torch.randn(layer.num_layers * directions, 3, 6) for index in range(states)}
    axes = {"x": {0: "batch", 1: "time"}, **{name: {1: "batch"} for name in past}}
    kernels = {op: dict(op.py_kernels) for op in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)}
    exported = export(module, example_inputs={"x": torch.randn(3, 7, 8), **past}, dynamic_axes=axes)
    assert exported.graph.operators()[type(layer).__name__] == layer.num_layers
    _check(exported, tmp_path)
    runner = OnnxRunner(exported.graph.model, tmp_path)
    for steps in (1, 40):
        feeds = {"x": torch.randn(3, steps, 8), **past}
        answer = runner.run({name: tensor.numpy() for name, tensor in feeds.items()})
        with torch.no_grad():
            np.testing.assert_allclose(answer["output_0"], module(**feeds)[0], atol=1e-6)
    assert all(op.py_kernels == before for op, before in kernels.items())


def test_a_batch_that_is_fixed_stays_fixed_and_is_named(tmp_path):
    exported = export(FixedBatch(), example_inputs=torch.randn(2, 3, 4))
    assert exported.graph.signature.inputs[0].shape == (2, 3, 4)
    assert exported.notes == ("batch: fixed as in the example inputs (a batch of 5 fails with RuntimeError)",)
    _check(exported, tmp_path)


def test_module_that_branches_on_data_is_refused():
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ConversionError, match="Branching does not convert to ONNX"):
        export(Branching(), example_inputs=torch.randn(2, 3))


def test_weights_that_are_no_numbers_are_named():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    with torch.no_grad():
        module[1].bias[1] = torch.nan
    with pytest.raises(SourceError, match=r"The weights of Sequential are damaged: 1\.bias holds"):
        export(module, example_inputs=(torch.ones(2, 4),))


def test_module_that_answers_no_tensors_is_refused():
    class Naming(nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "cat"

    with pytest.raises(ConversionError, match="answers a str"):
        export(Naming(), example_inputs=torch.randn(2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "without example inputs"),
        ({"example_inputs": ("cat",)}, "not all tensors"),
        ({"example_inputs": {"image": torch.randn(1, 3, 8, 8)}}, "no input image; its forward takes pixels"),
        ({"example_inputs": (torch.randn(1, 3, 8, 8),) * 2}, "2 example inputs were given"),
        ({"example_inputs": torch.randn(1, 3, 8, 8), "dynamic_axes": {"image": {0: "n"}}}, "declared for image"),
        ({"example_inputs": torch.randn(1, 3, 8, 8), "dynamic_axes": {"pixels": {4: "n"}}}, "pixels has 4 axes"),
        ({"example_inputs": torch.randn(1, 3, 8, 8), "task": "fill-mask"}, "whose only task is 'module'"),
    ],
)
def test_wrong_use_is_refused(options, message):
    with pytest.raises(SourceError, match=message):
        export(Convolutions(), **options)


def _check(exported, folder) -> None:
    check = ParityCheck(exported)
    assert check.notes == ()
    rows = check.check(OnnxRunner(exported.graph.model, folder))
    assert rows[0].case == "the example"
    assert len(rows) >= 3 * len(exported.graph.signature.outputs)
    assert max(row.max_rel for row in rows) < 5e-6


class InverseOfTheErrorFunction(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erfinv(x)


def test_an_operator_that_torch_does_not_translate(tmp_path):
    """Both polynomials, and where they meet."""
    module = InverseOfTheErrorFunction()
    exported = export(module, example_inputs=torch.rand(3, 5))
    x = torch.cat([torch.linspace(-0.99, 0.99, 199), torch.tensor([0.9966, 0.99665, 0.9999, -0.9999, 1 - 1e-6, 1e-7])])
    answer = OnnxRunner(exported.graph.model, tmp_path).run({"x": x.reshape(-1, 5).numpy()})["output_0"]
    torch.testing.assert_close(torch.from_numpy(answer.reshape(-1)), torch.erfinv(x), rtol=2e-6, atol=0)


@pytest.mark.parametrize("limit", [-100, 0])
def test_whether_all_is_true(limit, tmp_path):
    """What checks of values are made of (torch._check_tensor_all)."""

    class Counted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch._is_all_true(x > limit)

    exported = export(Counted(), example_inputs=torch.randn(2, 4))
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))


def test_answers_that_come_as_they_went_in_or_twice(tmp_path):
    """Inputs, parameters and one tensor twice; a key that is an input's name too."""

    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> dict[str, object]:
            y = self.linear(x)
            masked = y.masked_fill(torch.arange(4) > 2, float("-inf"))
            return {"x": x, "x_out": masked, "again": [y, y], "again.1": y, "weight": self.linear.weight}

    exported = export(Answers(), example_inputs=torch.randn(2, 4))
    names = [spec.name for spec in exported.graph.signature.outputs]
    assert names == ["x_out", "x_out_out", "again.0", "again.1", "again.1_out", "weight"]
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))


def test_what_a_module_makes_at_its_first_call_and_answers_of_its_buffers(tmp_path):
    """Tables of positions are not left behind, or can be trained with; a buffer that is written and answered is answered as it was written."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("table", None)
            self.register_buffer("state", torch.zeros(4))
            self.kept = None

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if self.table is None:
                self.table = torch.linspace(0, 1, 4)
            if self.kept is None:
                self.kept = torch.ones(4)
            self.state += 1
            return self.linear(x + self.table) * self.kept, self.state

    module = Positions()
    exported = export(module, example_inputs=torch.randn(2, 4))
    assert module.table is None
    assert list(module.state_dict()) == ["state", "linear.weight", "linear.bias"]
    answers = exported.reference.run(exported.example)
    assert (answers["output_1"] == 1).all()
    assert (module.state == 0).all()
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))
    module(torch.randn(2, 4))[0].sum().backward()


@pytest.mark.parametrize("seed", range(3))
def test_half_precision_and_classes_of_pixels(seed, tmp_path):
    """float16 is allowed its own rounding, and two classes that were as good to change places in one pixel of ten thousand."""
    torch.manual_seed(seed)
    half = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).half()
    exported = export(half, example_inputs=torch.randn(4, 64).half())
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 21, 3, padding=1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x).argmax(1)

    exported = export(Classes(), example_inputs=torch.randn(1, 3, 256, 256))
    runner = OnnxRunner(exported.graph.model, tmp_path)
    ParityCheck(exported).check(runner)

    class Others:
        input_names = runner.input_names

        def run(self, feeds):
            found = runner.run(feeds)["output_0"].copy()
            found[:, :2, :10] += 1  # 20 of 65,536
            return {"output_0": found}

    with pytest.raises(ParityError, match="where 0 is allowed"):
        ParityCheck(exported).check(Others())


def test_inputs_are_drawn_like_the_example():
    random = np.random.default_rng(0)

    def drawn(*values, dtype=np.float32, bounds=None):
        return drawn_like(np.array([values], dtype), (50, 40), bounds, random)

    for one, other, dtype in ((0, -np.inf, np.float32), (1, 0, np.int64), (True, False, np.bool_)):
        mask = np.array([[one, one, one, other], [one, one, one, one]], dtype)
        rows = drawn_like(mask, (50, 6), None, random)
        assert len(np.unique(rows, axis=0)) == 2, "a mask: rows of the example"
        assert (rows[:, :3] == one).all()
        assert (rows[:, 3:] == rows[:, 3:4]).all()
    assert set(np.unique(drawn(*[0, 1e-9, 1] * 6))) == {0, np.float32(1e-9), 1}
    positive = drawn(0.5, 1, 2, 8)
    assert positive.min() >= 0.5
    assert positive.max() <= 8
    assert len(np.unique(positive)) > 1000
    assert drawn(-1, -0.5, 1, 2).min() < -2, "both signs: normal"
    assert abs(drawn(3, 3).mean() - 3) < 0.2
    assert drawn(3, 3).std() > 0.9
    temperatures = drawn(0.7)
    assert (temperatures.min() > 0.3, temperatures.max() < 1.1, temperatures.std() > 0.1) == (True, True, True)
    image = drawn_like(np.zeros((1, 8, 8, 3), np.uint8), (2, 8, 8, 3), None, random)
    assert image.min() < 10 < 245 < image.max()
    assert (drawn(4, 4, dtype=np.uint8) == 4).all(), "a category"
    assert set(np.unique(drawn(0, dtype=np.int64, bounds=(0, 3)))) == {0, 1, 2, 3}
    assert drawn(True, dtype=np.bool_).all(), "nothing hides anything"
    assert set(np.unique(drawn_like(np.array([True]), (50,), None, random))) == {False, True}
    for shape, dtype in (((6,), np.float32), ((6,), np.int64), ((1, 6), np.float32), ((6, 1), np.float32)):
        shown = drawn_like(np.ones((2, *shape), dtype), (50, *shape), None, random, name="attention_mask")
        assert shown.dtype == dtype
        rows = shown.reshape(50, 6)
        assert set(rows.sum(1)) == {1, 2, 3, 4, 5, 6}, "no row is hidden, few are whole"
        assert (np.diff(rows, axis=1) <= 0).all(), "ones, and zeros behind them"
    assert (drawn_like(np.ones((2, 1), np.float32), (50, 1), None, random, name="mask") == 1).all(), "of one place"
    scale = drawn_like(np.ones((2, 1), np.float32), (50, 1), None, random, name="mask_scale")
    assert (scale.min() > 0.4, scale.std() > 0.1) == (True, True), "no mask"


def test_padding_in_torchs_fast_path_is_no_difference(tmp_path):
    """nn.TransformerEncoder answers zeros there, in evaluation mode and without gradients; the graph does not."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.encoder(x, src_key_padding_mask=padding)
            return answer

    padding = torch.arange(7) >= torch.tensor([[7], [4], [5]])
    exported = export(Encoder().eval(), example_inputs=(torch.randn(3, 7, 32), padding))
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))
    assert torch.backends.mha.get_fastpath_enabled()


def test_answers_that_are_drawn_or_complex_are_named():
    class DrawnBesideMasks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + torch.rand_like(x)).masked_fill(torch.arange(x.shape[1]) > 2, -1e9)

    with pytest.raises(ConversionError, match="otherwise at each call"):
        export(DrawnBesideMasks(), example_inputs=torch.randn(4, 6))

    class Drawn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x, 0.5, training=True)

    class Spectrum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.rfft(x)

    with pytest.raises(ConversionError, match="Drawn answers the same inputs otherwise at each call"):
        export(Drawn(), example_inputs=torch.randn(2, 64))
    with pytest.raises(ConversionError, match="output_0 is complex"):
        export(Spectrum(), example_inputs=torch.randn(2, 64))


def test_one_tensor_as_two_inputs(tmp_path):
    class Difference(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x - 2 * y

    x = torch.randn(2, 4)
    exported = export(Difference(), example_inputs=(x, x))
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))


def test_answers_of_a_dataclass_have_its_fields_names(tmp_path):
    @dataclasses.dataclass
    class Boxes:
        scores: torch.Tensor
        corners: list[torch.Tensor]
        masks: torch.Tensor | None = None

    class Detector(nn.Module):
        def forward(self, x: torch.Tensor) -> Boxes:
            return Boxes(x.sigmoid(), [x + 1, x - 1])

    exported = export(Detector(), example_inputs=torch.randn(2, 4))
    assert [spec.name for spec in exported.graph.signature.outputs] == ["scores", "corners.0", "corners.1"]
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))


def test_modules_that_fail_or_answer_what_no_array_holds_are_named():
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.bfloat16()

    with pytest.raises(SourceError, match=r"Linear fails on its example inputs: RuntimeError: .*mat1 and mat2"):
        export(nn.Linear(3, 4), example_inputs=torch.randn(2, 4))
    with pytest.raises(SourceError, match="example input input is complex"):
        export(nn.ReLU(), example_inputs=torch.zeros(2, 4, dtype=torch.complex64))
    with pytest.raises(SourceError, match=r"example input input is empty, \(0, 4\)"):
        export(nn.ReLU(), example_inputs=torch.zeros(0, 4))
    with pytest.raises(ConversionError, match="answers bfloat16"):
        export(Wide(), example_inputs=torch.randn(2, 4))


def test_a_module_that_answers_nothing_is_named():
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[()]:
            return ()

    with pytest.raises(ConversionError, match="Nothing answers nothing for the example inputs"):
        export(Nothing(), example_inputs=torch.randn(2, 4))


def test_what_a_module_writes_is_as_before(tmp_path):
    """Its buffers, in place or anew, and its inputs: each call begins as the first did, and so does the graph."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("calls", torch.ones(()))
            self.register_buffer("last", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.last = x[0]
            return self.linear(x.add_(self.calls))

    module, x = Writes(), torch.randn(2, 4)
    before, given = [(value, value.clone()) for value in module.buffers()], x.clone()
    exported = export(module, example_inputs=x)
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))
    assert "written by the module: calls, last; a graph keeps nothing" in exported.notes[0]
    assert torch.equal(x, given)
    for value, (buffer, content) in zip(module.buffers(), before, strict=True):
        assert value is buffer
        assert torch.equal(buffer, content)


class Scaled(nn.Module):
    """Its embedding writes its own weight when it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, max_norm=1.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids).sum(1)


def test_weights_that_forward_changes_are_as_before(tmp_path):
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.linear.weight.clamp_(-0.01, 0.01)
            return self.linear(x)

    scaled, clamped = Scaled(), Clamped()
    table, weight = scaled.table.weight.detach().clone(), clamped.linear.weight.detach().clone()
    exported = export(scaled, example_inputs=torch.randint(0, 20, (2, 5)))
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))
    assert torch.equal(scaled.table.weight, table)
    with pytest.raises(ConversionError, match=r"Clamped changes its parameter linear\.weight in forward"):
        export(clamped, example_inputs=torch.randn(2, 4))
    assert torch.equal(clamped.linear.weight, weight)


def test_a_train_of_its_own_has_to_be_called(tmp_path):
    class Noisy(nn.Module):
        def train(self, mode: bool = True) -> "Noisy":
            self.noise = 1.0 if mode else 0.0
            return super().train(mode)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x + self.noise

    module = nn.Sequential(Noisy().train())
    with pytest.raises(SourceError, match=r"Noisy has a train\(\) of its own .* give Sequential after eval\(\)"):
        export(module, example_inputs=torch.randn(2, 4))
    exported = export(module.eval(), example_inputs=torch.randn(2, 4))
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))


def test_weights_without_a_shape_and_answers_that_are_no_numbers():
    with pytest.raises(SourceError, match="has no shape yet: call the module once"):
        export(nn.LazyLinear(4), example_inputs=torch.randn(2, 4))

    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sqrt()

    exported = export(Root(), example_inputs=-torch.ones(2, 4))
    with pytest.raises(SourceError, match=r"holds numbers that are none \(NaN\) for the example"):
        ParityCheck(exported).check(exported.reference)


@pytest.mark.parametrize(
    "mask", [torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool(), torch.tensor([[0, -1e9]] * 2)]
)
def test_attention_with_a_mask_of_padding(mask, tmp_path):
    """The mask is the same for all queries, which ONNX Runtime's kernel does not take."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.layer(x, src_key_padding_mask=mask)

    exported = export(Encoder(), example_inputs=(torch.randn(2, mask.shape[1], 32), mask))
    assert exported.graph.operators()["Attention"] == 1
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))


class Orient(torch.nn.Module):
    """Portraits are turned: what is asked of sizes is answered once, when it is traced."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(3, 8, (3, 5), padding=(1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] > x.shape[3]:
            x = x.transpose(2, 3)
        return self.layer(x).relu().mean((2, 3))


class Parity(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = x.shape[1] // 8
        return x[:, : blocks * 8].mean(1) if blocks % 2 == 0 else x[:, : blocks * 8].amax(1)


class Eights(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] % 8 == 0 else x * 3


class Large(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.numel() > 1000 else x * 3


@pytest.mark.parametrize(
    ("module", "shape", "axes"),
    [
        (Eights(), (2, 16), {}),
        (Large(), (2, 16), {}),
        (Orient(), (2, 3, 16, 24), {2: "h", 3: "w"}),
        (Parity(), (2, 17, 4), {1: "length"}),
    ],
)
def test_sizes_at_which_forward_goes_another_way_are_compared(module, shape, axes, tmp_path):
    exported = export(module.eval(), example_inputs={"x": torch.randn(shape)}, dynamic_axes={"x": {0: "batch", **axes}})
    assert exported.sizes
    runner = OnnxRunner(exported.graph.model, tmp_path)
    with pytest.raises(ParityError, match="for which forward may go another way"):
        ParityCheck(exported).check(runner)


def test_axes_that_are_alike_by_chance_are_refused():
    class Square(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x

    with pytest.raises(
        ConversionError, match="is declared as dynamic, and in the trace of Square it has always the size of"
    ):
        export(Square(), example_inputs={"x": torch.randn(2, 4, 4)}, dynamic_axes={"x": {1: "h", 2: "w"}})
