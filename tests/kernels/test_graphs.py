"""Work that is played back is the work itself, to the bit; with `card.py` in place of a GPU."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reifusion import kernels
from reifusion.kernels import graphs
from reifusion.model.attention import attention
from reifusion.model.clip import CLIP
from reifusion.model.config import UNetConfig
from reifusion.model.decoder import Decoder
from reifusion.model.diffusion import GEGLU, UNet
from reifusion.steer.ip_adapter import IPAdapter, Looking, Plain, cross_attentions
from reifusion.swap import swap
from reifusion.weights.lora import apply, load_lora, places, remove
from tests.kernels.card import Card
from tests.model.test_fast import UNET, VAE, normal, randomized
from tests.tiny import SMALL


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """Everything is drawn on a card."""
    card = Card()
    monkeypatch.setattr(graphs, "recorder", graphs.Recorder(card.record))
    monkeypatch.setattr(graphs, "suits", lambda x: torch.is_inference_mode_enabled())
    return card


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def playing(network: nn.Module) -> Any:
    """The network, plain inside, whose work is played back."""
    swap(network, kernels.FAST[type(network)])
    return network


def unet() -> Any:
    return playing(randomized(UNet(UNET)))


def given(seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(batch, 4, 8, 8, seed=seed),
        normal(batch, 7, 24, seed=seed + 100),
        torch.tensor([float(7 * seed + 1)]),
    )


def run(network: nn.Module, *inputs: Tensor) -> Tensor:
    """The same network, as it is written."""
    with graphs.recorder.eager():
        return network(*inputs)


def count(card: Card) -> tuple[int, int]:
    """How many were recorded, and how often was one played."""
    return len(card.outputs), len(card.played)


def test_the_first_call_runs_the_second_is_recorded_and_all_others_are_played(card):
    network = unet()
    for seed, expected in enumerate([(0, 0), (1, 1), (1, 2), (1, 3)]):
        assert torch.equal(network(*given(seed)), run(network, *given(seed)))
        assert count(card) == expected


def test_what_is_played_keeps_to_itself(card):
    network = unet()
    outputs = [network(*given(seed)) for seed in range(5)]  # none is overwritten by the next
    for seed, output in enumerate(outputs):
        assert torch.equal(output, run(network, *given(seed)))
    inputs = given(9)
    before = [x.clone() for x in inputs]
    output = network(*inputs)
    output.zero_()  # nor does anyone's change of an output, or of an input, reach the recording
    for x in inputs:
        x.mul_(2)
    assert torch.equal(network(*before), run(network, *before))
    assert count(card)[0] == 1


def test_every_shape_and_layout_has_its_own_recording(card):
    network = unet()
    inputs = [
        given(1),
        given(2, batch=3),
        (given(3)[0].contiguous(memory_format=torch.channels_last), *given(3)[1:]),
    ]
    inputs += [(normal(2, 4, 12, 8), *given(4)[1:]), (*given(5)[:2], torch.tensor([3.0, 4.0]))]
    for _ in range(3):
        for each in inputs:
            assert torch.equal(network(*each), run(network, *each))
    assert count(card) == (len(inputs), 2 * len(inputs))


def test_only_a_few_are_kept_and_the_one_that_was_not_played_for_longest_goes(card):
    graphs.recorder.kept = 2
    network = unet()
    one, two, three = given(1, batch=1), given(1, batch=2), given(1, batch=3)
    for each in (one, one, two, two, one, three, three):  # of one and two, two is the older
        network(*each)
    assert count(card) == (3, 4)
    network(*one)
    assert count(card) == (3, 5)
    network(*two)  # begins anew
    assert count(card) == (3, 5)


# What a network does may change at any time

Change = Callable[[Any], Any]


def scaled(network: Any) -> None:
    network.down[1][0].conv_1.weight.mul_(1.5)


def moved(network: Any) -> None:
    weight = network.down[1][0].conv_1.weight
    weight.data = weight.data * 1.5


def replaced(network: Any) -> None:
    network.down[1][0].conv_1 = randomized(nn.Conv2d(32, 32, 3, padding=1), seed=3)


def swapped(network: Any) -> Any:
    class Double(GEGLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    return swap(network.down[1][1].layers[0].feed_forward, Double)


def told(network: Any) -> None:
    network.down[1][0].norm_1.eps = 0.1


def other_kernel(network: Any) -> None:
    network.down[1][1].layers[0].self_attention.kernel = lambda q, k, v, causal: 2 * attention(q, k, v)


def own_forward(network: Any) -> None:
    network.down[1][1].forward = lambda x, given: x


def without_a_layer(network: Any) -> None:
    network.down[1][1].layers = nn.ModuleList()


def a_buffer(network: Any) -> None:
    layer = network.down[1][0].conv_1
    weight = layer.weight.detach() * 1.5
    del layer.weight
    layer.register_buffer("weight", weight)


CHANGES: list[Change] = [
    scaled, moved, replaced, swapped, told, other_kernel, own_forward, without_a_layer, a_buffer,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_network_is_seen_in_the_next_call(card, change):
    network = unet()
    before = [network(*given(1)) for _ in range(3)][-1]
    put_back = change(network)
    expected = run(network, *given(1))
    assert not torch.equal(expected, before)
    for _ in range(3):
        assert torch.equal(network(*given(1)), expected)
    assert count(card)[0] == (1 if change is scaled else 2)  # new numbers in the old place need no recording
    if put_back is not None:
        put_back()
        assert torch.equal(network(*given(1)), before)


def test_another_dtype_is_seen_in_the_next_call(card):
    network = unet()
    for _ in range(3):
        network(*given(1))
    network.double()
    x, context, t = (x.double() for x in given(1))
    for _ in range(3):
        output = network(x, context, t)
        assert output.dtype == torch.float64 and torch.equal(output, run(network, x, context, t))


def test_loras_are_seen_and_taken_out_again(card, tmp_path):
    config = replace(SMALL, clip=replace(SMALL.clip, width=24), unet=UNET)
    models = {"clip": randomized(CLIP(config.clip)), "diffusion": unet()}
    network = models["diffusion"]
    before = [network(*given(1)) for _ in range(3)][-1]
    name = next(place.diffusers for place in places(config) if place.layer == "down.1.0.conv_1")
    path = tmp_path / "lora.safetensors"
    up, down = normal(32, 2, 1, 1), normal(2, 32, 3, 3, seed=1)
    save_file({f"{name}.lora.up.weight": up, f"{name}.lora.down.weight": down}, path)
    apply(models, load_lora(path))
    expected = run(network, *given(1))
    assert not torch.equal(expected, before)
    assert all(torch.equal(network(*given(1)), expected) for _ in range(3))
    remove(models)
    assert all(torch.equal(network(*given(1)), before) for _ in range(3))


def test_each_picture_of_an_ip_adapter_is_seen_and_none_stays(card):
    network = unet()
    before = [network(*given(1)) for _ in range(3)][-1]
    outs = [layer.q.out_features for layer in cross_attentions(network)]
    adapter = randomized(IPAdapter(Plain(8, 4, 24), 24, outs)).ip_adapter
    seen = []
    for seed in (1, 2):
        looking = Looking(network, network, [(adapter, normal(2, 4, 24, seed=seed), 0.7)], count=1)
        expected = run(looking, *given(1))
        played = len(card.played)
        assert all(torch.equal(looking(*given(1)), expected) for _ in range(3))
        assert len(card.played) > played  # the picture's own recording
        seen.append(expected)
    assert not torch.equal(*seen) and not torch.equal(seen[0], before)
    assert all(torch.equal(network(*given(1)), before) for _ in range(3))


@pytest.mark.parametrize("kind", ["forward", "before", "attention", "global"])
def test_hooks_are_called_and_nothing_is_played_as_long_as_there_are_any(card, kind):
    network, calls = unet(), []
    expected = [network(*given(1)) for _ in range(3)][-1]
    block = network.down[1][0]
    layer = network.down[1][1].layers[0].cross_attention
    handle: Any = {
        "forward": lambda: block.register_forward_hook(lambda *_: calls.append(0)),
        "before": lambda: block.register_forward_pre_hook(lambda *_: calls.append(0)),
        "attention": lambda: setattr(layer, "hook", lambda weights: calls.append(0)),
        "global": lambda: nn.modules.module.register_module_forward_hook(
            lambda module, *_: calls.append(0) if module is block else None
        ),
    }[kind]()
    before = count(card)
    for _ in range(3):
        assert torch.equal(network(*given(1)), expected)
    assert len(calls) == 3 and count(card) == before
    if kind == "attention":
        layer.hook = None
    else:
        handle.remove()
    assert torch.equal(network(*given(2)), run(network, *given(2)))
    assert count(card) == (before[0], before[1] + 1)


def test_the_whole_networks_own_hook_is_called_as_well(card):
    network, calls = unet(), []
    network.register_forward_hook(lambda *_: calls.append(0))
    for _ in range(4):
        network(*given(1))
    assert len(calls) == 4 and count(card) == (0, 0)


def test_nothing_is_played_while_it_is_not_wanted(card):
    network = unet()
    expected = [network(*given(1)) for _ in range(3)][-1]
    before = count(card)
    with graphs.recorder.eager():
        assert torch.equal(network(*given(1)), expected)
    assert count(card) == before
    assert torch.equal(network(*given(1)), expected)
    assert count(card) == (1, before[1] + 1)


def test_work_that_reads_numbers_is_said_to_be_run_and_is_run(card):
    class Reads(UNet):
        def forward(self, latents: Tensor, context: Tensor, t: Tensor) -> Tensor:
            if latents.sum() > 0:  # a wait on a GPU
                return latents
            return -latents

    network = randomized(Reads(UNET))
    swap(network, type("Playing", (Reads, graphs.Recorded), {
        "forward": lambda self, *inputs: graphs.played(self, Reads.forward.__get__(self), *inputs)
    }))  # fmt: skip
    x, context, t = given(1)
    assert torch.equal(network(x.abs(), context, t), x.abs())
    with pytest.warns(UserWarning, match=r"Reads\.forward is run, as it cannot be recorded: .*not permitted"):
        assert torch.equal(network(-x.abs(), context, t), x.abs())
    assert torch.equal(network(-x.abs(), context, t), x.abs())  # once is enough
    assert count(card) == (0, 0)


def test_work_inside_of_work_that_is_recorded_is_a_part_of_it(card):
    network = unet()
    for seed in range(2):
        network(*given(seed))
    assert count(card) == (1, 1)

    def twice(x: Tensor, context: Tensor, t: Tensor) -> Tensor:
        return network(network(x, context, t), context, t)

    for seed, expected in enumerate([(1, 3), (2, 4), (2, 5)]):  # two of network; then one of both
        output = graphs.played(network, twice, *given(seed))
        with graphs.recorder.eager():
            assert torch.equal(output, twice(*given(seed)))
        assert count(card) == expected


def test_threads_take_turns(card):
    network = unet()
    expected = {seed: run(network, *given(seed)) for seed in range(4)}
    wrong: list[int] = []

    def draw(seed: int) -> None:
        with torch.inference_mode():
            for _ in range(15):
                if not torch.equal(network(*given(seed)), expected[seed]):
                    wrong.append(seed)

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and count(card) == (1, 59)


def test_a_thread_that_has_not_done_the_work_does_it_before_it_records_it(card, monkeypatch):
    """cuDNN's handle of a thread is made in its first convolution, and takes memory: no recording may."""
    known: set[int] = set()
    recorded: list[Any] = []
    recording: list[bool] = []

    class Handled(UNet):
        def forward(self, latents: Tensor, context: Tensor, t: Tensor) -> Tensor:
            me = threading.get_ident()
            if me not in known and recording:
                raise RuntimeError("operation not permitted when stream is capturing")
            known.add(me)
            return super().forward(latents, context, t)

    def record(work: Callable[[], Any]) -> Any:
        recording.append(True)
        try:
            recorded.append(card.record(work))
        finally:
            recording.pop()
        return recorded[-1]

    monkeypatch.setattr(graphs.recorder, "record", record)
    network = randomized(Handled(UNET))
    swap(network, type("Playing", (Handled, graphs.Recorded), {
        "forward": lambda self, *inputs: graphs.played(self, Handled.forward.__get__(self), *inputs)
    }))  # fmt: skip
    network(*given(1))
    outputs: list[Tensor] = []

    def draw() -> None:
        with torch.inference_mode():
            outputs.append(network(*given(2)))

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert len(recorded) == 1 and torch.equal(outputs[0], run(network, *given(2)))


def test_recordings_go_with_their_network_and_are_not_copied(card):
    network = unet()
    for _ in range(3):
        network(*given(1))
    twin = copy.deepcopy(network)
    assert torch.equal(twin(*given(1)), network(*given(1)))
    assert len(graphs.recorder._networks) == 2
    del twin
    gc.collect()
    assert len(graphs.recorder._networks) == 1
    network.to("meta")  # as on an idle device, where nothing is to be kept
    assert len(graphs.recorder._networks) == 0


def test_networks_may_share_the_memory_of_their_recordings(card):
    networks = unet(), playing(randomized(UNet(UNetConfig(**{**vars(UNET), "layers": 2}))))
    for seed in range(4):
        for network in networks:
            assert torch.equal(network(*given(seed)), run(network, *given(seed)))
    assert count(card) == (2, 6)


def test_the_decoder_is_played_as_well(card):
    decoder = playing(randomized(Decoder(VAE)))
    for seed in range(3):
        z = normal(1, 4, 6, 8, seed=seed)
        assert torch.equal(decoder(z), run(decoder, z))
    assert count(card) == (1, 2)


def test_a_network_that_is_taken_back_to_the_textbook_is_not_played(card):
    network = unet()
    for _ in range(3):
        network(*given(1))
    before = count(card)
    kernels.uninstall({"diffusion": network})
    assert type(network) is UNet
    network(*given(1))
    assert count(card) == before


# When a GPU is drawn on


def test_only_plain_drawing_in_the_usual_stream_of_a_gpu_is_played(monkeypatch):
    streams = {"current": 0}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams["current"])
    x: Any = SimpleNamespace(device=torch.device("cuda", 0))
    assert graphs.suits(x)
    assert not graphs.suits(torch.zeros(1))
    assert not graphs.suits(SimpleNamespace(device=torch.device("cuda", 1)))  # type: ignore[arg-type]
    with torch.inference_mode(False):
        assert not graphs.suits(x)
        with torch.no_grad():
            assert not graphs.suits(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not graphs.suits(x)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert not graphs.suits(x)
    streams["current"] = 1  # somebody's own, or one that is being recorded
    assert not graphs.suits(x) and graphs.on_gpu(x)


def test_a_recording_that_fails_gives_the_stream_back(monkeypatch):
    """PyTorch leaves its own `with` by an error, and the stream stays that of the recording."""
    streams = {"current": "usual"}

    class Stream:
        def __init__(self, stream: str):
            self.stream = stream

        def __enter__(self) -> None:
            self.before, streams["current"] = streams["current"], self.stream

        def __exit__(self, *_: object) -> None:
            streams["current"] = self.before

    class Graph:
        def __init__(self, graph: Any, pool: Any, stream: str, capture_error_mode: str):
            self.stream = stream

        def __enter__(self) -> None:
            streams["current"] = self.stream

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("an earlier error")

    def fails() -> None:
        assert streams["current"] == "recorded"
        raise RuntimeError("a number was read")

    for name, fake in (
        ("CUDAGraph", object),
        ("current_device", lambda: 0),
        ("current_stream", lambda: streams["current"]),
        ("stream", Stream),
        ("graph", Graph),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(graphs, "_stream", lambda device: "recorded")
    with pytest.raises(RuntimeError):
        graphs.capture(fails)
    assert streams["current"] == "usual"


def test_after_a_recording_that_failed_the_next_one_has_memory_of_its_own(monkeypatch):
    """PyTorch goes on "recording" into the memory of one that failed, and lets no other begin there."""
    pools: list[Any] = []

    class Graph:
        its: Any

        def pool(self) -> Any:
            return self.its

        def replay(self) -> None:
            pass

    @contextmanager
    def recording(graph: Any, pool: Any, stream: str, capture_error_mode: str) -> Iterator[None]:
        graph.its = object() if pool is None else pool
        pools.append(graph.its)
        yield

    def fails() -> None:
        raise RuntimeError("a number was read")

    for name, fake in (
        ("CUDAGraph", Graph),
        ("current_device", lambda: 0),
        ("current_stream", lambda: "usual"),
        ("stream", lambda stream: nullcontext()),
        ("graph", recording),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(graphs, "_stream", lambda device: "recorded")
    monkeypatch.setattr(graphs, "_GRAPHS", WeakSet())
    monkeypatch.setattr(graphs, "_FAILED", [])
    kept = [graphs.capture(lambda: None) for _ in range(2)]
    with pytest.raises(RuntimeError):
        graphs.capture(fails)
    kept += [graphs.capture(lambda: None) for _ in range(2)]
    assert pools[0] is pools[1] is pools[2] and pools[3] is pools[4] is not pools[0]
    assert [graph.its for graph in graphs._FAILED] == [
        pools[0]
    ]  # which the memory asks about each new tensor


@pytest.mark.gpu
def test_a_cuda_graph_is_the_network_to_the_bit():
    network = unet().to("cuda", torch.float16, memory_format=torch.channels_last)
    for seed in range(5):
        inputs = [x.cuda().half() if x.ndim > 1 else x.cuda() for x in given(seed)]
        output = network(*inputs)
        with graphs.recorder.eager():
            assert torch.equal(output, network(*inputs))
    assert [r.play is not None for r in graphs.recorder._networks[network].recordings.values()] == [True]
