"""The original's weights and the graph's are one copy, in a file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_decoders import save_decoder, step_on

from onnxpress.exporters import DecoderReference, export, share_weights
from onnxpress.optimizers.targets import target
from onnxpress.workbench import Workbench

pytestmark = pytest.mark.newest


@pytest.mark.parametrize(("name", "share"), [("qwen2", 0.95), ("qwen3-moe", 0.5), ("gpt2", 0.95)])
def test_the_original_reads_its_weights_from_the_graphs_file(name: str, share: float, tmp_path: Path) -> None:
    """But for experts, which the graph has in another form."""
    exported = export(save_decoder(tmp_path / "model", name))
    reference = exported.reference
    assert isinstance(reference, DecoderReference)
    module, ids = reference.module, np.arange(3, 40)
    before = {key: weight.detach().clone() for key, weight in module.state_dict().items()}
    places = {key: weight.data_ptr() for key, weight in module.named_parameters()}
    expected = reference.logits(ids, [5, 36])
    bench = Workbench(tmp_path / "work", target("cpu"))
    share_weights(module, exported.graph, bench.write_weights)

    moved = [weight.numel() for key, weight in module.named_parameters() if weight.data_ptr() != places[key]]
    assert sum(moved) > share * sum(weight.numel() for weight in module.parameters())
    assert all(torch.equal(weight, before[key]) for key, weight in module.state_dict().items())
    np.testing.assert_allclose(reference.logits(ids, [5, 36]), expected, rtol=1e-5, atol=1e-6)
    file = tmp_path / "work" / "weights.data"
    written = file.read_bytes()
    if sys.platform == "linux":  # models have thousands of weights, and processes a thousand files
        opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        assert opened.count(file) <= 1
    step = step_on(exported.graph, tmp_path)
    np.testing.assert_allclose(step.run(0, [ids.tolist()])[0], expected[1], rtol=2e-4, atol=2e-5)

    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
    assert not reference.logits(ids, [5]).any()
    assert file.read_bytes() == written, "what the module writes is its own"
