import json
import math

import pytest
import torch

from s2edit_pipeline.avatars.training import Checkpoint, Log, WeightAverage, late_decay_factor, learning_rate_factor


def test_the_learning_rate_warms_up_linearly_and_falls_as_a_half_cosine():
    factors = [learning_rate_factor(step, 110, 10) for step in range(111)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    # a half cosine: 1 at the start, 0 at the end, and odd about its middle
    assert factors[10] == pytest.approx(1)
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0)
    assert factors[35] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    for i in range(51):
        assert factors[60 - i] + factors[60 + i] == pytest.approx(1) or i > 50


def test_past_the_last_step_the_learning_rate_stays_zero():
    assert learning_rate_factor(500, 100, 10) == 0


def test_the_late_decay_is_a_line_at_either_end_and_one_between():
    factors = [late_decay_factor(step, 100, 10, 20) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(factors[10:81]) == {1.0}
    assert factors[80:] == pytest.approx([1 - i / 20 for i in range(21)])
    assert late_decay_factor(500, 100, 10, 20) == 0
    # until the decay begins, a longer training is the same one
    assert [late_decay_factor(step, 900, 10, 20) for step in range(81)] == factors[:81]


def test_the_average_is_the_recursion_in_float64():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30, 4, generator=generator)
    parameter = torch.nn.Parameter(values[0].clone())
    average = WeightAverage([parameter], 0.6)
    expected = values[0].double()
    for n, value in enumerate(values[1:], 1):
        with torch.no_grad():
            parameter.copy_(value)
        average.update()
        keep = min(0.6, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * value.double()
        assert torch.allclose(average.average[0].double(), expected, atol=1e-6)
    # both branches of the minimum were taken
    assert (1 + 1) / 11 < 0.6 < (1 + 29) / 39


def test_swapping_twice_restores_the_weights_to_the_bit():
    parameter = torch.nn.Parameter(torch.randn(5))
    average = WeightAverage([parameter], 0.9)
    mine, theirs = torch.randn(5), torch.randn(5)
    with torch.no_grad():
        parameter.copy_(mine)
    average.average[0].copy_(theirs)
    average.swap()
    assert torch.equal(parameter, theirs) and torch.equal(average.average[0], mine)
    average.swap()
    assert torch.equal(parameter, mine) and torch.equal(average.average[0], theirs)


def test_an_average_goes_on_where_it_was(tmp_path):
    def run(average, parameter, steps):
        for step in steps:
            with torch.no_grad():
                parameter.copy_(torch.full((3,), float(step)))
            average.update()

    one = torch.nn.Parameter(torch.zeros(3))
    whole = WeightAverage([one], 0.9)
    run(whole, one, range(10))
    two = torch.nn.Parameter(torch.zeros(3))
    first = WeightAverage([two], 0.9)
    run(first, two, range(4))
    checkpoint = Checkpoint(tmp_path / "a.ckpt")
    checkpoint.save(first.state_dict())
    second = WeightAverage([two], 0.9)
    second.load_state_dict(checkpoint.load())
    run(second, two, range(4, 10))
    assert torch.equal(second.average[0], whole.average[0]) and second.updates == whole.updates == 10


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "deep" / "a.ckpt")
    assert checkpoint.load() is None
    checkpoint.save({"step": 3, "x": torch.arange(3)})

    def fail(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({"step": 4})
    assert checkpoint.load()["step"] == 3


def test_a_checkpoint_is_due_after_its_interval(tmp_path):
    now = Checkpoint(tmp_path / "a.ckpt", every_seconds=-1)
    later = Checkpoint(tmp_path / "a.ckpt", every_seconds=1000)
    assert now.due and not later.due
    later.every_seconds, later._last = 1000, later._last - 1001
    assert later.due
    later.save({})
    assert not later.due


def test_the_log_is_one_record_a_line_and_is_continued(tmp_path):
    Log(tmp_path / "runs" / "a.jsonl").write(step=1, loss=0.5)
    Log(tmp_path / "runs" / "a.jsonl").write(step=2, loss=0.25)
    lines = (tmp_path / "runs" / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
