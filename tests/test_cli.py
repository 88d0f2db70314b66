import os
import sys
import types
from pathlib import Path

import pytest
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

import s2edit_pipeline
from s2edit_pipeline.avatars import MODEL_FOLDER, instruct_training, recipe
from s2edit_pipeline.avatars.autoencoder_training import AutoencoderSettings
from s2edit_pipeline.avatars.denoiser_training import DenoiserSettings
from s2edit_pipeline.avatars.flow_training import FlowSettings
from s2edit_pipeline.avatars.instruct_training import InstructSettings
from s2edit_pipeline.cli import main


def test_train_avatars_passes_its_options_on(monkeypatch, capsys):
    calls = []

    def train(folder, **settings):
        calls.append((folder, settings))
        return Path(folder) / "model"

    monkeypatch.setattr(recipe, "train_avatars", train)
    options = "--pictures 7 --creatures 4 --autoencoder-steps 5 --denoiser-steps 3 --device cpu --seed 2".split()
    options += ["--start-from", "there"]
    assert main(["train-avatars", "--out", "here", *options]) == 0
    assert main(["train-avatars", "--out", "here"]) == 0
    given = {"num_pictures": 7, "num_creatures": 4, "start_from": "there", "device": "cpu"}
    given["autoencoder"] = AutoencoderSettings(num_steps=5, seed=2)
    given["denoiser"] = DenoiserSettings(num_steps=3, seed=2)
    plain = {"num_pictures": 16000, "num_creatures": 12000, "start_from": None, "device": None}
    plain["autoencoder"] = AutoencoderSettings(num_steps=2400)
    plain["denoiser"] = DenoiserSettings(num_steps=3800)
    assert calls == [("here", given), ("here", plain)]
    assert str(Path("here") / "model") in capsys.readouterr().out


def test_train_avatars_trains_the_flow_transformer_too(monkeypatch, capsys):
    calls, sheets = [], []

    def train(folder, model, **settings):
        calls.append((folder, model, settings))
        return Path(folder) / "model"

    monkeypatch.setattr(recipe, "train_flow_avatars", train)
    monkeypatch.setattr(recipe, "draw_flow_sheet", lambda *args, **more: sheets.append((args, more)))
    options = "--pictures 500 --creatures 0 --flow-steps 3 --no-grounding --device cpu --seed 2 --model there".split()
    assert main(["train-avatars", "--out", "here", "--family", "flow", *options]) == 0
    assert main(["train-avatars", "--out", "here", "--family", "flow"]) == 0
    given = {"num_pictures": 500, "num_creatures": 0, "device": "cpu"}
    given["settings"] = FlowSettings(num_steps=3, grounding_weight=0.0, seed=2)
    plain = {"num_pictures": 9000, "num_creatures": 6000, "device": None, "settings": FlowSettings()}
    assert calls == [("here", "there", given), ("here", MODEL_FOLDER, plain)]
    assert str(Path("here") / "model") in capsys.readouterr().out
    assert main(["train-avatars", "--out", "here", "--family", "flow", "--sheet", "a.png"]) == 0
    assert sheets == [(("here", MODEL_FOLDER, "a.png"), {"device": None})] and len(calls) == 2


def test_train_instruct_passes_its_options_on(monkeypatch, capsys):
    calls = []

    def train(folder, **settings):
        calls.append((folder, settings))
        return Path(folder) / "model"

    monkeypatch.setattr(instruct_training, "train_instruct", train)
    options = "--model there --people 7 --creatures 4 --steps 5 --device cpu --seed 2".split()
    assert main(["train-instruct", "--out", "here", *options]) == 0
    assert main(["train-instruct", "--out", "here"]) == 0
    given = {"model": "there", "num_people": 7, "num_creatures": 4, "device": "cpu"}
    given["settings"] = InstructSettings(num_steps=5, seed=2)
    plain = {"model": MODEL_FOLDER, "num_people": 8000, "num_creatures": 6000, "device": None}
    plain["settings"] = InstructSettings(num_steps=1600)
    assert calls == [("here", given), ("here", plain)]
    assert str(Path("here") / "model") in capsys.readouterr().out


def test_demo_is_its_own_module(monkeypatch):
    demo = types.ModuleType("s2edit_pipeline.demo")
    demo.add_arguments = lambda parser: parser.add_argument("--steps", type=int)
    demo.run = lambda args: args.steps
    monkeypatch.setitem(sys.modules, "s2edit_pipeline.demo", demo)
    monkeypatch.setattr(s2edit_pipeline, "demo", demo, raising=False)
    assert main(["demo", "--steps", "3"]) == 3


@pytest.mark.parametrize(
    ("argv", "status"),
    [(["--help"], 0), (["train-avatars", "--help"], 0), (["publish", "--help"], 0), ([], 2), (["x"], 2)],
)
def test_help_and_mistakes_name_the_commands(argv, status, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == status
    shown = "".join(capsys.readouterr())
    assert "--out" in shown if len(argv) == 2 else "demo" in shown or "command" in shown


def test_train_avatars_needs_a_folder(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train-avatars"])
    assert exit.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_arguments_are_taken_from_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["s2edit", "--help"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert "usage: s2edit" in shown and "train-avatars" in shown


@pytest.mark.parametrize("fails", [False, True])
def test_a_command_leaves_the_libraries_logging_as_found(fails, monkeypatch):
    def quiet(args):
        for library in (diffusers_logging, transformers_logging):
            library.set_verbosity_error()
            library.disable_progress_bar()
        if fails:
            raise RuntimeError("nothing works")
        return 0

    demo = types.ModuleType("s2edit_pipeline.demo")
    demo.add_arguments, demo.run = lambda parser: None, quiet
    monkeypatch.setitem(sys.modules, "s2edit_pipeline.demo", demo)
    monkeypatch.setattr(s2edit_pipeline, "demo", demo, raising=False)
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)

    def state():
        libraries = (diffusers_logging, transformers_logging)
        return [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]

    before = state()
    diffusers_logging.set_verbosity_warning()
    transformers_logging.set_verbosity_info()
    found = state()
    try:
        assert main(["demo"]) == int(fails)
        assert state() == found and "TRANSFORMERS_VERBOSITY" not in os.environ
    finally:
        diffusers_logging.set_verbosity(before[0][0])
        transformers_logging.set_verbosity(before[1][0])
