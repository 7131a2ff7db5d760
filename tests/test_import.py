"""The promises of `import reifusion`."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

import reifusion


def python(code: str) -> str:
    """Runs the code in an interpreter of its own; returns stdout."""
    env = os.environ | {"PYTHONPATH": str(Path(reifusion.__file__).parents[1])}  # installed or not
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


def test_importing_is_cheap():
    heavy = "torch", "numpy", "PIL", "transformers", "diffusers", "typer"
    assert python(f"import sys, reifusion; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


def test_loading_a_model_does_not_import_the_compiler():
    heavy = "torch._dynamo", "torch._inductor", "sympy"
    code = "import sys, reifusion; reifusion.load()"
    assert python(f"{code}; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


def test_the_command_line_does_not_import_torch_to_print_help():
    code = "import sys; from reifusion.cli import main; main(['generate', '--help'])"
    code += "; assert 'torch' not in sys.modules"
    assert "--sampler" in python(code)


def test_the_model_imports_nothing_of_the_package_outside_itself():
    for path in Path(reifusion.__file__).with_name("model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2 and (node.module or "").split(".")[0] != "reifusion", path.name


def test_the_package_offers_two_functions_and_a_version():
    assert sorted(reifusion.__all__) == ["__version__", "generate", "load"]
    assert reifusion.__version__.count(".") == 2


def test_generate_has_the_seeds_signature():
    parameters = inspect.signature(reifusion.generate).parameters
    seeds = {
        "prompt": inspect.Parameter.empty,
        "uncond_prompt": None,
        "input_image": None,
        "strength": 0.8,
        "do_cfg": True,
        "cfg_scale": None,
        "sampler_name": None,
        "n_inference_steps": None,
        "models": None,
        "seed": None,
        "device": None,
        "idle_device": None,
        "tokenizer": None,
    }
    positional = {n: p.default for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert positional == seeds
    assert list(positional) == list(seeds)
    assert [p.kind for p in parameters.values()][-1] is inspect.Parameter.VAR_KEYWORD
    called: list[Any] = []
    small: dict[str, Any] = {"seed": 3, "n_inference_steps": 1, "progress": False, "callback": called.append}
    pictures: Any = reifusion.generate("a cat", height=64, width=72, num_images=2, **small)
    assert [picture.size for picture in pictures] == [(72, 64)] * 2 and len(called) == 1
    begun: dict[str, Any] = {"input_image": pictures[0], "mask": Image.new("L", (72, 64))}
    kept: Any = reifusion.generate("a cat", height=64, width=72, **begun, **small)
    assert kept.tobytes() == pictures[0].tobytes()


def test_load_has_its_signature():
    parameters = inspect.signature(reifusion.load).parameters
    assert [(n, p.default) for n, p in parameters.items()] == [
        ("source", "mini"),
        ("device", None),
        ("dtype", None),
        ("vae", None),
        ("unet", None),
        ("prediction_type", None),
        ("compile", False),
        ("idle_device", None),
        ("ema", False),
    ]


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(reifusion, "nothing")
