"""The network: what its map of evidence promises, and what it may not do."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import export, probes
from busgen_cds.learning.encoders import Encoder
from busgen_cds.learning.reader import MALIGNANCY, Reader, Shape, attend


@pytest.fixture(scope="module")
def reader() -> Reader:
    torch.set_num_threads(1)  # small networks lose time on threads
    torch.manual_seed(0)
    return Reader(Shape(width=16)).eval()


def frames(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 64, 64, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_evidence_sums_to_the_score(reader: Reader) -> None:
    """The malignancy logit is the exact sum of the evidence map plus one bias."""
    reading = reader(frames(3))
    bias = reader.heads[MALIGNANCY].bias
    torch.testing.assert_close(reading.heat.sum((1, 2)) + bias, reading.malignancy, atol=1e-6, rtol=0)


@torch.inference_mode()
def test_a_frame_alone_and_in_company(reader: Reader) -> None:
    """A frame's answer depends on that frame alone, not on the batch it came in."""
    batch = frames(4)
    torch.testing.assert_close(reader(batch).malignancy[2:3], reader(batch[2:3]).malignancy, atol=1e-5, rtol=0)


def test_attention_sums_to_one_and_lies_in_the_lesion() -> None:
    """All but a small floor of the attention lies in a lesion that is clearly seen."""
    mask = torch.full((1, 1, 56, 56), -12.0)
    mask[..., 20:36, 20:36] = 12.0
    attention = attend(mask, floor=0.05, quantum=4.0)
    assert float(attention.sum()) == pytest.approx(1, abs=1e-5)
    assert float(attention[..., 20:36, 20:36].sum()) > 0.93


def test_attention_without_a_lesion_is_the_whole_image() -> None:
    """Where no lesion is seen the whole image is weighed alike."""
    attention = attend(torch.full((1, 1, 56, 56), -15.0), floor=0.05, quantum=4.0)
    assert float(attention.max() / attention.min()) < 1.01


def test_evidence_is_taught_without_the_outline_now_and_then(reader: Reader) -> None:
    """With a blind share of one, training weighs the whole image alike; reading never does."""
    blind = Reader(dataclasses.replace(reader.shape, blind=1.0))
    assert blind.train()._floor() == 1.0 and blind.eval()._floor() == reader.shape.floor


def test_starting_weights_see_grey_as_equal_colours(tmp_path: Path) -> None:
    """The grey stem answers as the colour stem does to three equal channels in -1..1."""
    rng = np.random.default_rng(0)
    arrays, encoder = {}, Reader(Shape(width=16)).encoder
    convolutions = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    for i, conv in enumerate(convolutions):
        deep = conv.groups > 1
        shape = (1, 3, 3, conv.out_channels) if deep else (conv.out_channels, *conv.kernel_size, conv.in_channels)
        if i == 0:
            shape = (32, 3, 3, 3)
        name = f"{i:02d}_{'depthwise_' if deep else ''}conv_2d"
        arrays[name + "_w"] = rng.standard_normal(shape).astype(np.float32)
        arrays[name + "_b"] = rng.standard_normal(conv.out_channels).astype(np.float32)
    np.savez(tmp_path / "start.npz", **arrays)
    encoder.start_from(tmp_path / "start.npz")
    grey = frames(1)
    weight = torch.tensor(arrays["00_conv_2d_w"]).permute(0, 3, 1, 2)
    colour = torch.nn.functional.pad((2 * grey - 1).expand(1, 3, 64, 64), (0, 1, 0, 1))  # TensorFlow's SAME at stride 2
    expected = torch.nn.functional.conv2d(colour, weight, torch.tensor(arrays["00_conv_2d_b"]), stride=2)
    torch.testing.assert_close(encoder.stem(grey), expected, atol=1e-4, rtol=1e-4)


def test_an_encoder_starts_as_the_efficientnet_that_its_file_holds(tmp_path: Path) -> None:
    """Folding EfficientNet-Lite's batch norms into its convolutions changes no answer; the grey is its RGB's."""
    rng = torch.Generator().manual_seed(5)
    encoder = Encoder("lite0")
    state: dict[str, torch.Tensor] = {}
    convolutions = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    for i, conv in enumerate(convolutions):
        out, inner, *kernel = conv.weight.shape
        state[f"c{i:02d}.weight"] = torch.randn(out, 3 if i == 0 else inner, *kernel, generator=rng)
        for name, low, high in (("weight", 0.5, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.1, 3)):
            state[f"n{i:02d}.{name}"] = torch.rand(out, generator=rng) * (high - low) + low
    torch.save(state, tmp_path / "start.pth")
    encoder.start_from(tmp_path / "start.pth")

    norm = {name: state[f"n00.{name}"] for name in ("running_mean", "running_var", "weight", "bias")}
    grey = frames(1)
    colour = F.pad(((255 * grey - 127) / 128).expand(1, 3, 64, 64), (0, 1, 0, 1))
    expected = F.batch_norm(F.conv2d(colour, state["c00.weight"], stride=2), *norm.values(), eps=1e-3)
    torch.testing.assert_close(encoder.stem(grey)[..., :-1, :-1], expected[..., :-1, :-1], atol=1e-3, rtol=1e-3)


def test_starting_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    """Weights that do not fit the encoder, or are no weights, are refused with the file's name."""
    tensors = {"c.weight": torch.zeros(8, 3, 3, 3), "n.weight": torch.ones(8), "n.bias": torch.zeros(8)}
    torch.save(tensors | {"n.running_mean": torch.zeros(8), "n.running_var": torch.ones(8)}, tmp_path / "other.pth")
    with pytest.raises(Misconfigured, match=r"other\.pth holds the weights of another encoder"):
        Encoder("lite0").start_from(tmp_path / "other.pth")
    np.savez(tmp_path / "other.npz", features=np.zeros(3))
    with pytest.raises(Misconfigured, match=r"other\.npz holds .* 0 convolutions of 52"):
        Encoder().start_from(tmp_path / "other.npz")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(Misconfigured, match=r"text\.pth holds no starting weights"):
        Encoder("lite0").start_from(tmp_path / "text.pth")


def test_what_is_held_learns_nothing() -> None:
    """A held part of the encoder gets no gradient; letting go gives it one again."""
    encoder = Encoder("lite0")
    for blocks, learning in ((None, False), (3, True), (0, True)):
        encoder.hold(blocks)
        assert encoder.deep.weight.requires_grad is learning
        assert encoder.stem.weight.requires_grad is (blocks == 0)


@pytest.fixture(scope="module")
def exported(reader: Reader) -> tuple[export.Deployed, bytes]:
    torch.manual_seed(1)
    deployed = export.Deployed([reader, Reader(Shape(width=16, encoder="lite0")).eval()]).eval()
    with torch.no_grad():
        for tensor in deployed.state_dict().values():
            tensor.copy_(tensor.half().float())
    return deployed, export.to_onnx(deployed, size=64)


def test_the_outline_may_be_drawn_by_the_first_members_alone(reader: Reader) -> None:
    """With one member drawing, the outline is that member's and the score is everybody's."""
    other, x = Reader(Shape(width=16)).eval(), frames(2)
    with torch.inference_mode():
        alone = export.Deployed([reader])(x)
        mixed = export.Deployed([reader, other], drawing=1)(x)
        both = export.Deployed([reader, other])(x)
    torch.testing.assert_close(mixed[0], alone[0])
    assert not torch.allclose(both[0], alone[0])
    torch.testing.assert_close(mixed[2], both[2])
    with pytest.raises(Misconfigured, match="3 members cannot draw"):
        export.Deployed([reader, other], drawing=3)


def test_graph_agrees_with_torch(exported: tuple[export.Deployed, bytes]) -> None:
    """The exported graph agrees with torch within 1e-3 in every output, the map included, for any batch."""
    deployed, graph = exported
    run = export.open_graph(graph)
    for count in (1, 3):
        assert max(export.parity(deployed, run, frames(count).numpy()).values()) < export.TOLERANCE


def test_a_graph_that_disagrees_is_no_candidate(exported: tuple[export.Deployed, bytes]) -> None:
    """A graph that does not agree with torch is refused."""
    deployed, graph = exported
    run = export.open_graph(probes.randomise(graph))
    with pytest.raises(Misconfigured, match="does not agree"):
        export.parity(deployed, run, frames(2).numpy())


def test_graph_names_nothing_of_the_machine(exported: tuple[export.Deployed, bytes]) -> None:
    """The shipped graph carries no path of the machine that exported it."""
    model = onnx.load_from_string(exported[1])
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert b"site-packages" not in exported[1]


def test_mirrored_views_agree(exported: tuple[export.Deployed, bytes]) -> None:
    """A frame and its mirror image get the same score, and mirrored maps."""
    run = export.open_graph(exported[1])
    image = frames(1).numpy()
    plain, turned = run(image), run(np.ascontiguousarray(image[..., ::-1]))
    np.testing.assert_allclose(plain["malignancy"], turned["malignancy"], atol=1e-4)
    np.testing.assert_allclose(plain["heat"], turned["heat"][..., ::-1], atol=1e-4)


def test_a_further_task_is_one_more_head() -> None:
    """A task file adds one head and leaves the rest of the network as it was."""
    shape = Shape(width=16)
    more = Reader(replace(shape, tasks={**shape.tasks, "carcinoma-type": 3}))
    assert more(frames(2)).tasks["carcinoma-type"].shape == (2, 3)
    added = set(more.state_dict()) - set(Reader(shape).state_dict())
    assert all(name.startswith("heads.carcinoma-type.") for name in added)
