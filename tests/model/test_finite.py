"""Numbers that are not finite, on a device that answers later: a stand-in tells where it is asked."""

from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reifusion.model import finite


def test_the_answer_is_waited_for_on_the_device_that_gives_it(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: asked.append(torch.device(device).type))
    with FakeTensorMode():
        answer, arrival = finite._fetched(torch.empty((), dtype=torch.bool, device="cuda"))
    assert asked == ["cuda"]
    assert answer.device.type == "cpu" and arrival is not None
